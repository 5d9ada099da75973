//! A sweep as its watchers see it: what a stream of changes amounts to so far. Pure; who shows it is
//! elsewhere.

use crate::{Failure, forecast, output, view};
use domain::metric::{self, MetricPoint};
use domain::sweep::SweepSpec;
use domain::trial::{Trial, TrialState};
use proto::v1;
use proto::v1::watch_sweep_response::Event;
use std::collections::BTreeMap;

/// A sweep's trials, and the newest numbers of those that train.
#[derive(Default)]
pub(crate) struct Board {
    /// The sweep, once the first message has come.
    pub(crate) sweep: Option<v1::Sweep>,
    /// Its trials by number.
    pub(crate) trials: BTreeMap<u32, Trial>,
    /// Unfinished sweeps that were submitted before: their trials get the devices first.
    older: Vec<String>,
    /// What no agent has that is there, if there is one.
    pub(crate) lacks: Option<&'static str>,
    spec: Option<SweepSpec>,
    latest: BTreeMap<u32, Latest>,
    /// The step at which each trial was first seen.
    first_seen: BTreeMap<u32, u64>,
    /// When a trial was first seen to hold a device, in seconds since the watch began.
    training_since: Option<f64>,
}

/// The newest value of each metric that is shown while a trial trains. Step 0 is not among them: it measures
/// the base without an adapter, which is no trial's own value.
#[derive(Default, Clone, Copy)]
struct Latest {
    step: u64,
    loss: Option<f64>,
    eval_loss: Option<f64>,
    tokens_per_second: Option<f64>,
    /// The sweep's metric.
    value: Option<f64>,
}

impl Latest {
    fn add(&mut self, point: &MetricPoint, compared: &str) {
        if point.step == 0 {
            return;
        }
        self.step = self.step.max(point.step);
        for (mine, name) in [
            (&mut self.loss, metric::LOSS),
            (&mut self.eval_loss, metric::EVAL_LOSS),
            (&mut self.tokens_per_second, metric::TOKENS_PER_SECOND),
            (&mut self.value, compared),
        ] {
            *mine = point.get(name).or(*mine);
        }
    }
}

/// What a message changed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// The sweep's own record.
    Sweep,
    /// A trial's record; whether its state is another than before.
    Trial {
        /// The trial.
        number: u32,
        /// Whether it entered its state just now.
        entered: bool,
    },
    /// A training trial's numbers.
    Progress(u32),
    /// Nothing that is shown.
    Nothing,
}

impl Board {
    /// An empty board of a sweep behind `older` ones, to which the agents that are there lack something.
    pub(crate) fn new(older: Vec<String>, lacks: Option<&'static str>) -> Self {
        Self { older, lacks, ..Self::default() }
    }

    /// Takes a message in that came `now` seconds after the watch began.
    pub(crate) fn apply(&mut self, message: v1::WatchSweepResponse, now: f64) -> Result<Change, Failure> {
        Ok(match message.event {
            Some(Event::Sweep(sweep)) => {
                if self.spec.is_none()
                    && let Some(document) = &sweep.spec
                {
                    // A newer server's spec may hold what this version cannot read: then there is no forecast.
                    let document = proto::convert::from_struct(document.clone());
                    self.spec = SweepSpec::from_document(&document).ok();
                }
                self.sweep = Some(sweep);
                Change::Sweep
            }
            Some(Event::Trial(trial)) => {
                let trial = view::trial(trial)?;
                let Some(number) = trial.id.number() else { return Ok(Change::Nothing) };
                let before = self.trials.get(&number);
                let entered = before.map(|t| t.state) != Some(trial.state);
                if before.is_some_and(|t| t.attempt != trial.attempt) {
                    // The new attempt starts from a checkpoint, behind what the old one had reached.
                    self.latest.remove(&number);
                }
                self.first_seen.entry(number).or_insert(trial.step);
                if trial.state.holds_device() {
                    self.training_since.get_or_insert(now);
                }
                self.trials.insert(number, trial);
                Change::Trial { number, entered }
            }
            Some(Event::Progress(progress)) => {
                let number = domain::TrialId::new(progress.trial_id).number();
                let (Some(number), Some(point)) = (number, progress.point) else {
                    return Ok(Change::Nothing);
                };
                let point = MetricPoint::try_from(point).map_err(Failure::failed)?;
                let compared = self.metric().to_string();
                self.latest.entry(number).or_default().add(&point, &compared);
                Change::Progress(number)
            }
            None => Change::Nothing,
        })
    }

    /// Whether the sweep is over.
    pub(crate) fn is_over(&self) -> bool {
        use v1::SweepState::{Paused, Running, Unspecified};
        self.sweep.as_ref().is_some_and(|s| !matches!(s.state(), Running | Paused | Unspecified))
    }

    /// Whether a trial held a device since the watch began.
    pub(crate) fn has_trained(&self) -> bool {
        self.training_since.is_some()
    }

    /// Whether a person holds it.
    fn is_paused(&self) -> bool {
        self.sweep.as_ref().is_some_and(|s| s.state() == v1::SweepState::Paused)
    }

    /// Trials that train now.
    pub(crate) fn training(&self) -> impl Iterator<Item = (u32, &Trial)> {
        self.trials.iter().filter(|(_, t)| t.state.holds_device()).map(|(n, t)| (*n, t))
    }

    /// Finished steps of a trial, as far as is known.
    pub(crate) fn step(&self, number: u32) -> u64 {
        let latest = self.latest.get(&number).map_or(0, |l| l.step);
        self.trials.get(&number).map_or(0, |t| t.step).max(latest)
    }

    /// One trial's line: state, step, loss, speed, what the search chose.
    pub(crate) fn trial_line(&self, number: u32) -> String {
        let Some(trial) = self.trials.get(&number) else { return String::new() };
        let latest = self.latest.get(&number).copied().unwrap_or_default();
        let step = self.step(number);
        let of = trial.total_steps.map_or_else(String::new, |total| format!("/{total}"));
        let loss = if trial.state.is_terminal() { None } else { latest.loss };
        let eval = latest.eval_loss.or(trial.eval_loss);
        let mut parts = vec![format!("trial {number:>2} {:<9} step {step}{of}", trial.state.to_string())];
        parts.extend(loss.map(|l| format!("loss {l:.4}")));
        if step > 0 {
            parts.push(format!("eval/loss {}", output::loss(eval)));
        }
        if !trial.state.is_terminal() {
            parts.extend(latest.tokens_per_second.map(|t| format!("{t:.0} tokens/s")));
        }
        parts.push(view::parameters(trial));
        parts.extend(trial.failure.as_ref().map(|f| f.message.clone()));
        parts.join(" · ")
    }

    /// The sweep's line: trials over, the best so far, and what is left.
    pub(crate) fn sweep_line(&self, elapsed_seconds: f64) -> String {
        let over = self.trials.values().filter(|t| t.state.is_terminal()).count();
        let all = self.in_all().map_or_else(|| "?".into(), |all| all.to_string());
        let mut parts = vec![format!("{over}/{all} trials over")];
        if let Some((number, value)) = self.best_so_far() {
            let running = self.trials.get(&number).is_some_and(|t| !t.state.is_terminal());
            let running = if running { " (running)" } else { "" };
            parts.push(format!("best trial {number} at {value:.4}{running}"));
        }
        if self.is_paused() {
            parts.push("paused".into());
        } else if let Some(why) = self.sweep.as_ref().and_then(|sweep| sweep.waits_for.as_ref()) {
            parts.push(format!("waits: {why}"));
        } else if self.training_since.is_none() && !self.is_over() {
            parts.extend(self.lacks.map(|what| format!("waits for {what}")));
            if !self.older.is_empty() {
                parts.push(format!("waits behind {}", self.older.join(", ")));
            }
        }
        parts.push(format!("{} elapsed", output::duration(elapsed_seconds)));
        parts.extend(
            self.seconds_left(elapsed_seconds).map(|s| format!("about {} left", output::duration(s))),
        );
        parts.join(" · ")
    }

    /// Further runs of the best trials, if the search comes to all that it may propose.
    fn runs_again(&self) -> Option<u32> {
        let searched = self.sweep.as_ref()?.max_trials?;
        let replicates = self.spec.as_ref().and_then(|spec| spec.replicates);
        Some(replicates.map_or(0, |replicates| replicates.on_top_of(searched)))
    }

    /// Trials in all: those of the search, and further runs of the best of them.
    fn in_all(&self) -> Option<u32> {
        Some(self.sweep.as_ref()?.max_trials? + self.runs_again()?)
    }

    /// The metric by which the sweep compares its trials.
    pub(crate) fn metric(&self) -> &str {
        self.spec.as_ref().map_or(metric::EVAL_LOSS, |spec| spec.search.metric.as_str())
    }

    /// The best value so far with its trial's number: that of a trial that is over, or a better one that a
    /// running trial stands at.
    fn best_so_far(&self) -> Option<(u32, f64)> {
        let sweep = self.sweep.as_ref()?;
        let goal = self.spec.as_ref().map(|s| s.search.goal).unwrap_or_default();
        let over = sweep.best_trial_id.clone().zip(sweep.best_value);
        let over = over.and_then(|(id, value)| Some((domain::TrialId::new(id).number()?, value)));
        let running =
            self.training().filter_map(|(number, trial)| Some((number, self.value(number, trial)?)));
        over.into_iter()
            .chain(running)
            .reduce(|best, next| if goal.better(next.1, best.1) { next } else { best })
    }

    /// Where a trial that trains stands by the sweep's metric.
    fn value(&self, number: u32, trial: &Trial) -> Option<f64> {
        let recorded = trial.recorded(self.metric());
        self.latest.get(&number).and_then(|l| l.value).or(recorded).filter(|value| !value.is_nan())
    }

    /// Seconds left: the steps to come by the search's rule, at the pace of those made since the watch began.
    /// `None` without a basis: the number of trials or their steps are not known, or no step was made.
    fn seconds_left(&self, now: f64) -> Option<f64> {
        let spec = self.spec.as_ref()?;
        let max = self.sweep.as_ref()?.max_trials? as usize;
        if self.is_over() || self.is_paused() {
            return None;
        }
        let known: Option<Vec<_>> = self.trials.iter().map(|(n, t)| Some((*n, t, total_steps(t)?))).collect();
        let known = known?;
        let open = known.iter().filter(|(_, trial, _)| !trial.state.is_terminal());
        let left = |trial: &Trial, from: u64, total: u64| match trial.replicate_of {
            None => forecast::steps_to_come(&spec.search, from, total),
            // The search ends none of these.
            Some(_) => total.saturating_sub(from) as f64,
        };
        let under_way: f64 = open.map(|(n, trial, total)| left(trial, self.step(*n), *total)).sum();
        let searched: Vec<_> = known.iter().filter(|(_, trial, _)| trial.replicate_of.is_none()).collect();
        let mean = |steps: &dyn Fn(u64) -> f64| {
            searched.iter().map(|(_, _, total)| steps(*total)).sum::<f64>() / searched.len() as f64
        };
        let unproposed = |all: usize, known: usize| all.saturating_sub(known) as f64;
        let again = unproposed(self.runs_again()? as usize, known.len() - searched.len());
        let to_come = under_way
            + mean(&|total| forecast::steps_to_come(&spec.search, 0, total))
                * unproposed(max, searched.len())
            + mean(&|total| total as f64) * again;
        let made = |(n, _, _): &(u32, &Trial, u64)| {
            self.step(*n).saturating_sub(self.first_seen.get(n).copied().unwrap_or_default())
        };
        let made: u64 = known.iter().map(made).sum();
        let seconds = now - self.training_since?;
        (made > 0 && to_come > 0.0).then(|| (to_come * seconds / made as f64).max(1.0))
    }

    /// The best trial's record, if there is one.
    pub(crate) fn best(&self) -> Option<&Trial> {
        let id = self.sweep.as_ref()?.best_trial_id.as_ref()?;
        self.trials.values().find(|t| t.id.as_str() == id)
    }

    /// Trials that ended in a state.
    pub(crate) fn count(&self, state: TrialState) -> usize {
        self.trials.values().filter(|t| t.state == state).count()
    }
}

/// Steps of a whole trial, as far as they are known before its rows are read.
fn total_steps(trial: &Trial) -> Option<u64> {
    let config = &trial.config;
    let by_rows = config.max_steps.is_none() && config.num_train_epochs.is_some();
    trial.total_steps.or_else(|| (!by_rows).then(|| config.total_steps(0)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use domain::{Attempt, Timestamp, TrialId};

    /// A sweep of trials of 135 steps at most, compared by held-out loss.
    fn sweep(search: &str, max_trials: u32, best: Option<(u32, f64)>) -> v1::WatchSweepResponse {
        let document = serde_json::json!({
            "name": "s",
            "pretrained_model_id": "m",
            "dataset_name": "d",
            "max_steps": 135,
            "eval_steps": 15,
            "search": { "algorithm": search, "max_trials": max_trials, "min_steps": 15 },
            "parameters": [{ "lora_rank": [4, 8, 16] }],
        });
        let mut document = document.as_object().unwrap().clone();
        if search == "grid" {
            document["search"].as_object_mut().unwrap().remove("min_steps");
        }
        SweepSpec::from_document(&document).unwrap();
        let sweep = v1::Sweep {
            spec: Some(proto::convert::to_struct(&document)),
            max_trials: Some(max_trials),
            state: v1::SweepState::Running.into(),
            best_trial_id: best.map(|(number, _)| format!("s-0000/{number}")),
            best_value: best.map(|(_, value)| value),
            ..Default::default()
        };
        v1::WatchSweepResponse { event: Some(Event::Sweep(sweep)) }
    }

    fn trial(number: u32, state: TrialState, step: u64) -> v1::WatchSweepResponse {
        let id = TrialId::new(format!("s-0000/{number}"));
        let config = domain::trial::TrialConfig { max_steps: Some(135), ..Default::default() };
        let parameters = [("lora_rank".into(), serde_json::json!(8))].into();
        let proposed = Trial::new(id, config, parameters, Timestamp(0));
        let trial = Trial { state, attempt: Attempt(1), step, total_steps: Some(135), ..proposed };
        v1::WatchSweepResponse { event: Some(Event::Trial(trial.into())) }
    }

    fn progress(number: u32, step: u64, values: &[(&str, f64)]) -> v1::WatchSweepResponse {
        let values = values.iter().map(|(name, value)| ((*name).to_string(), *value)).collect();
        let point = MetricPoint { step, time: Timestamp(0), values };
        v1::WatchSweepResponse {
            event: Some(Event::Progress(v1::TrialProgress {
                trial_id: format!("s-0000/{number}"),
                attempt: 1,
                point: Some(point.into()),
            })),
        }
    }

    fn board(messages: impl IntoIterator<Item = v1::WatchSweepResponse>) -> Board {
        let mut board = Board::default();
        for message in messages {
            board.apply(message, 0.0).unwrap();
        }
        board
    }

    #[test]
    fn a_stream_becomes_lines() {
        let mut board = Board::default();
        for (message, want) in [
            (sweep("grid", 3, Some((1, 1.25))), Change::Sweep),
            (trial(1, TrialState::Running, 0), Change::Trial { number: 1, entered: true }),
            (trial(1, TrialState::Running, 20), Change::Trial { number: 1, entered: false }),
            (trial(1, TrialState::Completed, 135), Change::Trial { number: 1, entered: true }),
            (trial(2, TrialState::Running, 0), Change::Trial { number: 2, entered: true }),
            (progress(2, 0, &[("eval/loss", 5.0)]), Change::Progress(2)),
            (progress(2, 60, &[("loss", 2.5), ("tokens_per_second", 900.0)]), Change::Progress(2)),
        ] {
            assert_eq!(board.apply(message, 1.0).unwrap(), want);
        }
        assert_eq!(
            board.trial_line(2),
            "trial  2 running   step 60/135 · loss 2.5000 · eval/loss – · 900 tokens/s · lora_rank 8"
        );
        // 195 of 405 steps are made, in ten seconds of training: 11 for the others.
        assert_eq!(
            board.sweep_line(11.0),
            "1/3 trials over · best trial 1 at 1.2500 · 11 s elapsed · about 11 s left"
        );
        assert!(!board.is_over());
    }

    /// One step a second: what is said to be left, against what successive halving then takes.
    #[test]
    fn the_time_left_under_successive_halving() {
        use TrialState::{Completed, Queued, Running, Stopped};
        type Rows = &'static [(TrialState, u64)];
        // Trials so far of twelve, and the least and most seconds that may be said.
        let rows: &[(Rows, Option<(f64, f64)>)] = &[
            (&[(Queued, 0), (Queued, 0)], None),
            (&[(Running, 0), (Running, 0)], None),
            (&[(Running, 10), (Running, 10)], Some((350.0, 450.0))),
            // The first that is over made a ninth of its steps; the two others alone have 180 to make at most.
            (&[(Running, 45), (Running, 45), (Stopped, 15), (Running, 10)], Some((350.0, 550.0))),
            // The last one has 90 steps to make, whatever the others made.
            (
                &[
                    (Stopped, 15),
                    (Stopped, 15),
                    (Stopped, 15),
                    (Stopped, 15),
                    (Stopped, 15),
                    (Stopped, 15),
                    (Stopped, 15),
                    (Stopped, 15),
                    (Stopped, 45),
                    (Stopped, 45),
                    (Completed, 135),
                    (Running, 45),
                ],
                Some((90.0, 90.0)),
            ),
            (
                &[
                    (Stopped, 15),
                    (Stopped, 15),
                    (Stopped, 15),
                    (Stopped, 15),
                    (Stopped, 15),
                    (Stopped, 15),
                    (Stopped, 15),
                    (Stopped, 15),
                    (Stopped, 45),
                    (Stopped, 45),
                    (Completed, 135),
                    (Completed, 135),
                ],
                None,
            ),
        ];
        for (trials, want) in rows {
            let mut board = board([sweep("asha", 12, None)]);
            let numbered = || (1..).zip(trials.iter());
            for (number, (state, _)) in numbered() {
                let first = if *state == Queued { Queued } else { Running };
                board.apply(trial(number, first, 0), 0.0).unwrap();
            }
            for (number, (state, step)) in numbered() {
                board.apply(trial(number, *state, *step), 0.0).unwrap();
            }
            let made: u64 = trials.iter().map(|(_, step)| step).sum();
            let got = board.seconds_left(made as f64);
            match (got, want) {
                (None, None) => {}
                (Some(got), Some((least, most))) => {
                    assert!((*least..=*most).contains(&got), "{trials:?}: {got}, not {least} to {most}");
                }
                _ => panic!("{trials:?}: {got:?}, not {want:?}"),
            }
        }
    }

    #[test]
    fn steps_made_before_the_watch_began_set_no_pace() {
        let mut board = board([
            sweep("grid", 3, None),
            trial(1, TrialState::Completed, 135),
            trial(2, TrialState::Running, 100),
        ]);
        assert_eq!(board.seconds_left(1.0), None);
        board.apply(trial(2, TrialState::Running, 110), 10.0).unwrap();
        assert_eq!(board.seconds_left(10.0), Some(160.0), "25 and 135 steps at one a second");
    }

    #[test]
    fn the_best_so_far() {
        use TrialState::{Completed, Running};
        let eval = |number, step, value| progress(number, step, &[("eval/loss", value)]);
        let rows = [
            (None, vec![trial(1, Running, 0)], None),
            (None, vec![trial(1, Running, 0), eval(1, 0, 5.0)], None),
            (None, vec![trial(1, Running, 15), eval(1, 15, 2.0)], Some("best trial 1 at 2.0000 (running)")),
            (
                Some((1, 1.5)),
                vec![trial(1, Completed, 135), trial(2, Running, 15), eval(2, 15, 2.0)],
                Some("best trial 1 at 1.5000 ·"),
            ),
            (
                Some((1, 1.5)),
                vec![
                    trial(1, Completed, 135),
                    trial(2, Running, 15),
                    eval(2, 15, 1.0),
                    eval(3, 15, f64::NAN),
                ],
                Some("best trial 2 at 1.0000 (running)"),
            ),
        ];
        for (best, messages, want) in rows {
            let line = board([sweep("asha", 3, best)].into_iter().chain(messages)).sweep_line(1.0);
            match want {
                Some(want) => assert!(line.contains(want), "{line} lacks {want}"),
                None => assert!(!line.contains("best"), "{line}"),
            }
        }
    }

    #[test]
    fn a_sweep_that_waits_says_for_what() {
        let older = || vec!["older-1a2b".into()];
        for (older, lacks, want) in [
            (older(), None, "waits behind older-1a2b · "),
            (vec![], Some("a newer agent"), "waits for a newer agent · "),
            (older(), Some("a newer agent"), "waits for a newer agent · waits behind older-1a2b · "),
            (vec![], None, ""),
        ] {
            let mut board = Board::new(older, lacks);
            board.apply(sweep("asha", 12, None), 0.0).unwrap();
            board.apply(trial(1, TrialState::Queued, 0), 0.0).unwrap();
            assert_eq!(board.sweep_line(9.0), format!("0/12 trials over · {want}9 s elapsed"));
            board.apply(trial(1, TrialState::Running, 0), 9.0).unwrap();
            assert_eq!(board.sweep_line(10.0), "0/12 trials over · 10 s elapsed");
        }
        let mut board = Board::new(older(), None);
        board.apply(sweep("asha", 12, None), 0.0).unwrap();
        board.apply(trial(1, TrialState::Queued, 0), 0.0).unwrap();
        if let Some(sweep) = &mut board.sweep {
            sweep.waits_for = Some("namespace a has 2 of its 2 trials on devices".into());
        }
        let line = "0/12 trials over · waits: namespace a has 2 of its 2 trials on devices · 9 s elapsed";
        assert_eq!(board.sweep_line(9.0), line);
    }
}
