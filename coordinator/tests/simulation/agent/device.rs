//! What an agent does with its trials: it trains them, and uploads and downloads their checkpoints.

use super::*;
use serde_json::json;

impl Life {
    pub(super) fn admit(&mut self, assignment: &Assignment) {
        if !self.held.values().any(Held::trains) {
            self.step_at = Instant::now() + self.plan.step;
        }
        let Some(held) = self.held.get_mut(assignment) else { return };
        held.admitted = true;
        let (start_step, total_steps) = (held.step, total(&held.config));
        let started = TrialEvent::Started { total_steps, start_step, digests: None };
        self.spool.append(assignment, false, Said::Event(started));
        if start_step == 0 {
            let point = self.point(assignment);
            self.spool.append(assignment, false, Said::Points(vec![point]));
        }
        if start_step >= total_steps {
            self.finish(assignment, Ending::Completed);
        }
    }

    /// Whether the durable state does not give it the trial (any more), which it cannot know.
    fn is_fenced(&self, assignment: &Assignment) -> bool {
        !self.world.is_current(&assignment.0, assignment.1, &self.id)
    }

    fn value(&self, assignment: &Assignment) -> f64 {
        let held = &self.held[assignment];
        loss(&held.config, held.step) + if self.is_fenced(assignment) { FENCED } else { 0.0 }
    }

    fn point(&self, assignment: &Assignment) -> MetricPoint {
        let values = vec![(LOSS.to_string(), self.value(assignment))];
        MetricPoint { step: self.held[assignment].step, time: self.world.clock.now(), values }
    }

    /// A step of every trial that trains.
    pub(super) fn step(&mut self) {
        self.step_at = Instant::now() + self.plan.step;
        let training = self.held.iter().filter(|(_, held)| held.trains());
        for assignment in training.map(|(assignment, _)| assignment.clone()).collect::<Vec<_>>() {
            let Some(held) = self.held.get_mut(&assignment) else { continue };
            held.step += 1;
            let (step, total, config) = (held.step, total(&held.config), held.config.clone());
            if diverges_at(&config) == Some(step) {
                // What counts of it is its last good step.
                held.step -= 1;
                self.finish(&assignment, Ending::Diverged);
                continue;
            }
            if step.is_multiple_of(config.logging_steps.into()) || step == total {
                let point = self.point(&assignment);
                self.spool.append(&assignment, false, Said::Points(vec![point]));
            }
            if step >= total {
                self.finish(&assignment, Ending::Completed);
            } else if config.save_steps > 0 && step.is_multiple_of(config.save_steps.into()) {
                self.checkpoint(&assignment);
            }
        }
    }

    fn checkpoint(&mut self, assignment: &Assignment) {
        let fenced = self.is_fenced(assignment);
        let before = self.spool.last_sequence(assignment);
        let Some(held) = self.held.get_mut(assignment) else { return };
        let step = held.step;
        if held.saved.replace(step) != Some(step) {
            let (trial, attempt) = assignment;
            let content =
                json!({"trial": trial.number(), "attempt": attempt, "step": step, "fenced": fenced});
            held.newest = Some((step, content, before));
            self.upload(assignment);
        }
    }

    fn finish(&mut self, assignment: &Assignment, ending: Ending) {
        self.checkpoint(assignment);
        let value = Some(self.value(assignment));
        let summary =
            TrialSummary { steps: self.held[assignment].step, eval_loss: value, ..Default::default() };
        let message = String::new();
        self.end(assignment, TrialEvent::Finished { ending, summary: Box::new(summary), message });
    }

    pub(super) fn end(&mut self, assignment: &Assignment, last: TrialEvent) {
        if let Some(held) = self.held.get_mut(assignment) {
            held.last.get_or_insert(last);
        }
        self.conclude(assignment);
    }

    /// Says a trial's last word once nothing of it is left to upload.
    fn conclude(&mut self, assignment: &Assignment) {
        let Some(held) = self.held.get_mut(assignment) else { return };
        if !held.uploading
            && held.newest.is_none()
            && let Some(last) = held.last.take()
        {
            self.let_go.insert(assignment.clone(), held.since.elapsed());
            self.held.remove(assignment);
            self.spool.append(assignment, true, Said::Event(last));
        }
    }

    pub(super) fn stop(&mut self, assignment: &Assignment, reason: StopReason) {
        let Some(held) = self.held.get(assignment).filter(|held| held.last.is_none()) else { return };
        match (reason, held.admitted) {
            (StopReason::Release, true) => {
                self.checkpoint(assignment);
                self.end(assignment, TrialEvent::Released);
            }
            (StopReason::Release, false) => self.end(assignment, TrialEvent::Released),
            (_, true) => self.finish(assignment, Ending::Stopped),
            (_, false) => {
                let summary = Box::new(TrialSummary { steps: held.step, ..Default::default() });
                let (ending, message) = (Ending::Stopped, String::new());
                self.end(assignment, TrialEvent::Finished { ending, summary, message });
            }
        }
    }

    /// Drops an assignment that is not current, with all that is kept of it.
    pub(super) fn forget(&mut self, assignment: &Assignment) {
        let held = self.held.remove(assignment).is_some();
        if self.spool.forget(assignment) || held {
            self.say(format_args!("drops {}", name(assignment)));
        }
    }

    fn upload(&mut self, assignment: &Assignment) {
        // What it says is not acknowledged any more.
        let is_rude = self.link.is_stubborn() && self.is_fenced(assignment);
        let Some(held) = self.held.get_mut(assignment) else { return };
        if held.uploading {
            return;
        }
        let Some((step, content, before)) = held.newest.take() else { return };
        held.uploading = true;
        let pause = pause(held.failures);
        let (world, link, spool, of) =
            (self.world.clone(), self.link.clone(), self.spool.clone(), assignment.clone());
        self.transfers.push(Box::pin(async move {
            sleep(pause).await;
            if !is_rude && !spool.acknowledged(&of, before).await {
                return Transferred::Up(of, step, content, Err(Refused::Fenced));
            }
            let call = async {
                let server = world.leader().ok_or(Refused::Later)?;
                tokio::select! {
                    biased;
                    () = server.dead.cancelled() => Err(Refused::Later),
                    done = server::receive(&server, &of.0, of.1, step, &content) => done,
                }
            };
            let done = call_over(&link, call).await;
            Transferred::Up(of, step, content, done)
        }));
    }

    pub(super) fn download(&mut self, assignment: Assignment, start: u64, failures: u32) {
        if let Some(held) = self.held.get_mut(&assignment) {
            held.failures = failures;
        }
        let (world, link) = (self.world.clone(), self.link.clone());
        self.transfers.push(Box::pin(async move {
            sleep(pause(failures)).await;
            let call = async {
                let server = world.leader().ok_or(Refused::Later)?;
                tokio::select! {
                    biased;
                    () = server.dead.cancelled() => Err(Refused::Later),
                    done = server::send(&server, &assignment.0, assignment.1) => done,
                }
            };
            let done = call_over(&link, call).await;
            Transferred::Down(assignment, start, done)
        }));
    }

    pub(super) fn transferred(&mut self, transferred: Transferred) {
        match transferred {
            Transferred::Up(assignment, step, content, done) => {
                self.uploaded(&assignment, step, content, done)
            }
            Transferred::Down(assignment, start, done) => self.downloaded(assignment, start, done),
        }
    }

    fn uploaded(&mut self, assignment: &Assignment, step: u64, content: Value, done: Result<(), Refused>) {
        let Some(held) = self.held.get_mut(assignment) else { return };
        held.uploading = false;
        match done {
            Ok(()) => {
                held.failures = 0;
                self.check_stored(assignment, step);
            }
            Err(Refused::Fenced) if !self.link.is_stubborn() => return self.forget(assignment),
            Err(Refused::Later | Refused::Fenced) => {
                held.failures += 1;
                held.newest.get_or_insert((step, content, 0));
            }
            Err(Refused::Never(why)) => {
                self.world.find(format_args!("{}: step {step} cannot be uploaded: {why}", name(assignment)));
                return self.forget(assignment);
            }
        }
        self.upload(assignment);
        self.conclude(assignment);
    }

    /// A checkpoint is acknowledged once a record points at it, unless the trial is over.
    fn check_stored(&self, assignment: &Assignment, step: u64) {
        let number = assignment.0.number().unwrap();
        self.say(format_args!("hears that {} is stored at step {step}", name(assignment)));
        let mut seen = self.world.seen();
        if seen.ended.contains(&(number, assignment.1)) {
            return;
        }
        if seen.checkpoints.get(&number).is_none_or(|newest| *newest < step) {
            drop(seen);
            let name = name(assignment);
            return self.world.find(format_args!("{name} is stored at step {step}, and no record says so"));
        }
        let newest = seen.acknowledged.entry(number).or_default();
        *newest = (*newest).max(step);
    }

    fn downloaded(&mut self, assignment: Assignment, start: u64, done: Result<(u64, Value), Refused>) {
        let Some(held) = self.held.get(&assignment) else { return };
        match done {
            Ok((step, content)) => {
                let right = json!({"trial": assignment.0.number(), "step": start, "fenced": false});
                let of = |key: &str| content.get(key) == right.get(key);
                if step != start || !["trial", "step", "fenced"].into_iter().all(of) {
                    let name = name(&assignment);
                    self.world.find(format_args!("{name} resumes at {start} from step {step}: {content}"));
                }
                self.admit(&assignment);
            }
            Err(Refused::Fenced) => self.forget(&assignment),
            Err(Refused::Later) => {
                let failures = held.failures + 1;
                self.download(assignment, start, failures);
            }
            Err(Refused::Never(why)) => {
                self.world.find(format_args!("{} cannot be downloaded: {why}", name(&assignment)));
                self.forget(&assignment);
            }
        }
    }
}

fn total(config: &TrialConfig) -> u64 {
    config.total_steps(0)
}

/// A call to the coordinator: it takes its time there and back, and its answer may be lost.
async fn call_over<T>(link: &Link, call: impl Future<Output = Result<T, Refused>>) -> Result<T, Refused> {
    sleep(link.latency()).await;
    if link.is_partitioned() {
        sleep(LIMIT).await;
        return Err(Refused::Later);
    }
    let done = call.await;
    sleep(link.latency()).await;
    if link.loses() {
        sleep(LIMIT).await;
        return Err(Refused::Later);
    }
    done
}

/// The pause after so many failures.
fn pause(failures: u32) -> Duration {
    match failures {
        0 => Duration::ZERO,
        _ => (Duration::from_millis(100) * 2u32.saturating_pow(failures - 1)).min(Duration::from_secs(10)),
    }
}
