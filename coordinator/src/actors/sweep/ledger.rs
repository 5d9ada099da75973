//! What happens to a sweep's records, without I/O: each method applies one happening, marks what it changed and
//! says what is to be done about it. The actor writes the changes, then does what was said.

mod account;
mod extension;
mod operations;
mod proposals;
mod replicates;
mod retention;
mod tally;

use super::traced;
use crate::actors::message::{Assignment, Ending, StopReason, TrialEvent};
use crate::error::{CoordinatorError, Result};
use crate::placement::Waiting;
use crate::search::{Searcher, Verdict};
use crate::store::{Placement, StopCause, SweepRecord, TrialRecord};
use domain::footprint::PeakBytes;
use domain::metric::{EVAL_LOSS, MetricPoint};
use domain::sweep::{Evaluations, SweepState};
use domain::trial::{Digests, Failure, FailureClass, Trial, TrialState, TrialSummary};
use domain::{AgentId, Attempt, Timestamp, TrialId};
use replicates::Runs;
use std::collections::{BTreeMap, BTreeSet};
use tally::Tally;

/// Times that a trial may be lost, or fail through no fault of its own, between two checkpoints.
const MOST_LOSSES: u32 = 3;

/// What is to be done once a change is durable.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// The trial wants a device.
    Enqueue(u32),
    /// Its agent is to train it.
    Assign(Box<Assignment>),
    /// Its agent is to end it.
    Stop(u32, Attempt, StopReason),
    /// No waiting trial wants a device any more.
    Withdraw,
    /// Nothing points at these paths of the trial's any more.
    Remove(u32, BTreeSet<String>),
}

/// Whether a message about an attempt still counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// The attempt is current.
    Current {
        /// The steps that the trial makes at most, as far as its configuration or its agent has said so.
        steps: Option<u64>,
    },
    /// The attempt was the trial's last, and the trial is over: what comes now is a repetition.
    Over,
}

impl Standing {
    /// Where an attempt of a trial stands; an error if it is not the trial's newest, or not that of the agent which asks.
    pub fn of(trial: &Trial, attempt: Attempt, by: Option<&AgentId>) -> Result<Self> {
        let its_own = by.is_none_or(|agent| trial.agent.as_deref() == Some(agent.as_str()));
        match trial.attempt == attempt && its_own {
            true if trial.state.holds_device() => {
                let asked = trial.config.max_steps.map(u64::from);
                Ok(Self::Current { steps: asked.into_iter().chain(trial.total_steps).min() })
            }
            true if trial.state.is_terminal() => Ok(Self::Over),
            _ => Err(CoordinatorError::Fenced { trial: trial.id.clone(), attempt }),
        }
    }
}

/// Trials by number. Boxed: a record takes more than a kilobyte, and a tree that grows at its end is half empty.
pub type Trials = BTreeMap<u32, Box<TrialRecord>>;

/// What is to be written: the sweep's record or not, and which trials'.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Whether the sweep's record changed.
    pub sweep: bool,
    /// The trials that did.
    pub trials: BTreeSet<u32>,
}

/// A sweep's records and search.
pub struct Ledger {
    record: SweepRecord,
    trials: Trials,
    tally: Tally,
    searcher: Searcher,
    exhausted: bool,
    runs: Runs,
    changes: Changes,
    effects: Vec<Effect>,
    /// Whether its trials are those of simulated devices; `None` until one was assigned.
    simulated: Option<bool>,
}

impl Ledger {
    /// A sweep as its records have it, with the search brought to where it was.
    pub fn new(record: SweepRecord, trials: Vec<TrialRecord>) -> Result<Self> {
        let numbered = trials.into_iter().filter_map(|t| Some((t.trial.id.number()?, Box::new(t))));
        let trials: Trials = numbered.collect();
        let runs = Runs::of(trials.iter().map(|(number, record)| (*number, record.as_ref())));
        let searcher = operations::searcher(&record, &runs)?;
        Ok(Self {
            runs,
            tally: Tally::of(&record.sweep.spec, &trials),
            simulated: trials.values().find_map(|record| record.trial.kind()),
            record,
            trials,
            searcher,
            exhausted: false,
            changes: Changes::default(),
            effects: Vec::new(),
        })
    }

    /// Brings a trial to where its durable curve stands, and tells the search what it knew.
    pub fn replay(&mut self, number: u32, curve: &[MetricPoint]) -> Result<()> {
        let record = self.get_mut(number)?;
        // The last word of a trial that is over is its summary's.
        let last = (record.value, record.trial.eval_loss);
        if !curve.is_empty() {
            record.trial.step = 0;
        }
        self.take_points(number, curve)?;
        let record = self.get_mut(number)?;
        // The checkpoint that it goes on from may lie behind the last point before it.
        let start = record.trial.attempts.last().map_or(0, |(_, start)| *start);
        record.trial.step = record.trial.step.max(start);
        if record.trial.state.is_terminal() {
            (record.value, record.trial.eval_loss) = last;
            let value = feasible(record);
            self.tell_end(number, value);
        }
        Ok(())
    }

    /// There are metrics of this attempt of a trial. Later ones than its record knows belong to a time that the state has no
    /// memory of: what is made from now on is not to be taken for theirs.
    pub fn measured(&mut self, number: u32, attempt: Attempt) -> Result<()> {
        let record = self.get_mut(number)?;
        if attempt > record.trial.attempt {
            record.forgotten = attempt;
        }
        Ok(())
    }

    /// The sweep.
    pub fn record(&self) -> &SweepRecord {
        &self.record
    }

    /// Its trials, by number.
    pub fn trials(&self) -> &Trials {
        &self.trials
    }

    /// A copy of every trial's record, in the order of their numbers.
    pub fn records(&self) -> Vec<TrialRecord> {
        self.trials.values().map(|record| TrialRecord::clone(record)).collect()
    }

    /// A trial.
    pub fn get(&self, number: u32) -> Result<&TrialRecord> {
        self.trials.get(&number).map(Box::as_ref).ok_or_else(|| unknown(&self.record, number))
    }

    fn get_mut(&mut self, number: u32) -> Result<&mut TrialRecord> {
        self.trials.get_mut(&number).map(Box::as_mut).ok_or_else(|| unknown(&self.record, number))
    }

    /// What is to be written.
    pub fn changes(&self) -> &Changes {
        &self.changes
    }

    /// All changes are durable; answers with what they were.
    pub fn written(&mut self) -> Changes {
        std::mem::take(&mut self.changes)
    }

    /// Takes what is to be done.
    pub fn effects(&mut self) -> Vec<Effect> {
        std::mem::take(&mut self.effects)
    }

    /// What a trial needs of a device.
    pub fn needs(&self, number: u32) -> Result<Waiting> {
        let trial = &self.get(number)?.trial;
        let (config, spec) = (&trial.config, &self.record.sweep.spec);
        let shape = self.record.base_models.get(&config.pretrained_model_id);
        let peak = shape.map(|shape| shape.peak_bytes_at_most(config)[0]);
        Ok(Waiting {
            base: config.base_model().to_string(),
            namespace: self.record.sweep.namespace.clone(),
            accelerators: match &config.accelerator {
                Some(accelerator) => vec![accelerator.clone()],
                None => spec.resources.accelerators.clone(),
            },
            max_pack_size: spec.resources.max_pack_size,
            base_bytes: peak.map_or(0, |peak| peak.weights),
            own_bytes: peak.as_ref().map_or(0, PeakBytes::own),
            simulated: trial.kind().or(self.simulated),
            evaluated: spec.evaluations.as_ref().is_some_and(|evaluations| evaluations.asks(config)),
            compute_capability: config.base_model().precision.compute_capability(),
        })
    }

    /// What a trial is asked once it has made all its steps.
    pub fn asked(&self, number: u32) -> Result<Option<Evaluations>> {
        let config = &self.get(number)?.trial.config;
        Ok(self.record.sweep.spec.evaluations.as_ref().and_then(|evaluations| evaluations.of(config)))
    }

    /// A device was granted to a waiting trial.
    pub fn assign(&mut self, number: u32, placement: Placement) -> Result<()> {
        self.go(number, TrialState::Assigned)?;
        let needs = self.needs(number)?;
        let evaluations = self.asked(number)?;
        let record = self.get_mut(number)?;
        (record.charged_at, record.charged_held_seconds) = (None, None);
        let before_usd = record.trial.cost_usd.unwrap_or_default();
        record.noted = 0;
        let resume_step = record.checkpoint.as_ref().map(|c| c.step);
        let attempt = record.next_attempt();
        let trial = &mut record.trial;
        let (agent, device) = (placement.agent.clone(), placement.device.clone());
        trial.assign(attempt, resume_step.unwrap_or(0), agent, device);
        let trace = traced::trace(trial);
        trial.agent = Some(placement.agent.to_string());
        trial.device = placement.is.clone();
        let kind = trial.kind();
        let assignment = Assignment {
            trial: trial.id.clone(),
            attempt: trial.attempt,
            device: placement.device.clone(),
            config: trial.config.for_device(),
            evaluations,
            resume_step,
            digests: trial.digests.clone(),
            predicted_peak_memory_bytes: needs.base_bytes + needs.own_bytes,
            belongs: trace.map(|trace| trace.attempt(trial.attempt.0)),
        };
        record.placement = Some(Placement { before_usd: Some(before_usd), ..placement });
        self.simulated = self.simulated.or(kind);
        self.effects.push(Effect::Assign(Box::new(assignment)));
        Ok(())
    }

    /// Durable points of the current attempt.
    pub fn metrics(&mut self, number: u32, points: &[MetricPoint]) -> Result<()> {
        let verdict = self.take_points(number, points)?;
        let record = self.get(number)?;
        if verdict == Verdict::Stop && record.stop.is_none() && !record.retried {
            self.stop(number, StopCause::Search)?;
        }
        Ok(())
    }

    fn take_points(&mut self, number: u32, points: &[MetricPoint]) -> Result<Verdict> {
        let searched = self.runs.searched(number);
        let record = self.trials.get_mut(&number).ok_or_else(|| unknown(&self.record, number))?;
        let mut verdict = Verdict::Continue;
        // Step 0 is the base without an adapter, and what is not newer is a repetition.
        for point in points {
            if point.step <= record.trial.step {
                continue;
            }
            record.trial.step = point.step;
            record.trial.eval_loss = point.get(EVAL_LOSS).or(record.trial.eval_loss);
            if let Some(value) = point.get(&self.record.sweep.spec.search.metric) {
                record.value = Some(value);
                if let Some(place) = searched
                    && self.searcher.report(place, point.step, value) == Verdict::Stop
                {
                    verdict = Verdict::Stop;
                }
            }
        }
        Ok(verdict)
    }

    /// What the agent says of the current attempt.
    pub fn event(&mut self, number: u32, event: TrialEvent, now: Timestamp) -> Result<()> {
        match event {
            TrialEvent::Started { total_steps, digests, .. } => {
                self.started(number, total_steps, digests, now)
            }
            TrialEvent::Finished { ending, summary, message } => {
                self.go(number, TrialState::Running)?;
                self.summarise(number, *summary)?;
                self.finished(number, ending, message, now)
            }
            TrialEvent::Failed(failure) if failure.class == FailureClass::Infrastructure => {
                self.lost(number, &failure.message, now)
            }
            TrialEvent::Failed(failure) => self.fail(number, failure, now),
            TrialEvent::Released => self.requeue(number, now),
            // It is in the trial's log, and changes nothing.
            TrialEvent::Noted(_) => Ok(()),
        }
    }

    fn started(
        &mut self,
        number: u32,
        total_steps: u64,
        digests: Option<Digests>,
        now: Timestamp,
    ) -> Result<()> {
        let before = self.get(number)?.trial.digests.clone();
        if let (Some(before), Some(digests)) = (&before, &digests)
            && let Some((what, before, after)) = before.difference(digests)
        {
            let message = format!(
                "its {what} changed between two attempts: it was {before}, it is {after}; submit the sweep anew"
            );
            self.fail(number, Failure { class: FailureClass::User, message }, now)?;
            // Its agent trains already.
            let attempt = self.get(number)?.trial.attempt;
            self.effects.push(Effect::Stop(number, attempt, StopReason::Fenced));
            return Ok(());
        }
        self.go(number, TrialState::Running)?;
        let trial = &mut self.get_mut(number)?.trial;
        trial.total_steps = Some(total_steps);
        trial.begin(now);
        trial.digests = digests.or(before);
        Ok(())
    }

    fn summarise(&mut self, number: u32, summary: TrialSummary) -> Result<()> {
        let compared = &self.record.sweep.spec.search.metric;
        let by_loss = compared == EVAL_LOSS;
        let score = summary.evaluation(compared).map(|score| score.value);
        let record = self.get_mut(number)?;
        record.trial.eval_loss = summary.eval_loss.or(record.trial.eval_loss);
        // What a task makes of a trial is known at its end alone.
        record.value = summary.eval_loss.filter(|_| by_loss).or(score).or(record.value);
        record.trial.summary = Some(summary);
        Ok(())
    }

    fn finished(&mut self, number: u32, ending: Ending, message: String, now: Timestamp) -> Result<()> {
        let asked = self.get(number)?.stop;
        match ending {
            Ending::Completed => self.end(number, TrialState::Completed, now),
            Ending::Stopped => self.end(number, ended_by(asked.unwrap_or(StopCause::Search)), now),
            Ending::Diverged => self.fail(number, Failure { class: FailureClass::Diverged, message }, now),
        }
    }

    /// The current attempt ended through no fault of the trial: it waits again, unless that happened too often.
    pub fn lost(&mut self, number: u32, why: &str, now: Timestamp) -> Result<()> {
        let record = self.get_mut(number)?;
        record.losses += 1;
        if record.losses < MOST_LOSSES || record.stop.is_some() {
            return self.requeue(number, now);
        }
        let message = format!("{why}; {MOST_LOSSES} times since its last checkpoint");
        self.fail(number, Failure { class: FailureClass::Infrastructure, message }, now)
    }

    fn requeue(&mut self, number: u32, now: Timestamp) -> Result<()> {
        self.go(number, TrialState::Queued)?;
        let paused = self.is_paused();
        let record = self.get_mut(number)?;
        record.trial.leave(now);
        record.placement = None;
        record.release = false;
        match record.stop {
            Some(cause) => self.end(number, ended_by(cause), now),
            None if paused => Ok(()),
            None => {
                self.effects.push(Effect::Enqueue(number));
                Ok(())
            }
        }
    }

    fn fail(&mut self, number: u32, failure: Failure, now: Timestamp) -> Result<()> {
        let diverged = failure.class == FailureClass::Diverged;
        if diverged {
            self.go(number, TrialState::Running)?;
        }
        self.get_mut(number)?.trial.failure = Some(failure);
        self.end(number, if diverged { TrialState::Diverged } else { TrialState::Failed }, now)
    }

    fn end(&mut self, number: u32, state: TrialState, now: Timestamp) -> Result<()> {
        self.go(number, state)?;
        let record = self.get_mut(number)?;
        record.trial.finished_at = Some(now);
        record.trial.leave(now);
        record.placement = None;
        record.release = false;
        let value = feasible(record);
        self.tell_end(number, value);
        self.retain(number)
    }

    /// Moves a trial along the table of states; staying is no move.
    fn go(&mut self, number: u32, to: TrialState) -> Result<()> {
        let trial = &mut self.get_mut(number)?.trial;
        if trial.state != to {
            let from = trial.state;
            trial.state = from.transition(to)?;
            self.tally.went(from, to);
        }
        self.changes.trials.insert(number);
        Ok(())
    }

    /// Ends a trial before its time: at once if it waits, else by telling its agent.
    pub fn stop_trial(&mut self, number: u32, cause: StopCause, now: Timestamp) -> Result<()> {
        let trial = &self.get(number)?.trial;
        match trial.state {
            state if state.is_terminal() => {
                Err(CoordinatorError::Over { kind: "trial", id: trial.id.to_string(), state: state.as_str() })
            }
            TrialState::Queued => {
                self.get_mut(number)?.stop = Some(cause);
                self.end(number, ended_by(cause), now)
            }
            _ => self.stop(number, cause),
        }
    }

    fn stop(&mut self, number: u32, cause: StopCause) -> Result<()> {
        let record = self.get_mut(number)?;
        let cause = cause.after(record.stop);
        record.stop = Some(cause);
        let attempt = record.trial.attempt;
        self.effects.push(Effect::Stop(number, attempt, reason(cause)));
        self.changes.trials.insert(number);
        Ok(())
    }

    /// Notes what ends the sweep before its search is through.
    pub fn ended_early(&mut self, why: String) {
        self.record.sweep.ended_early = Some(why);
        self.changes.sweep = true;
    }

    /// Proposes no more, and ends all that is under way.
    pub fn stop_all(&mut self, cause: StopCause, now: Timestamp) -> Result<()> {
        self.record.stop = Some(cause.after(self.record.stop));
        self.changes.sweep = true;
        let live: Vec<_> = self.tally.live().collect();
        live.into_iter().try_for_each(|number| self.stop_trial(number, cause, now))
    }

    /// The numbers of the trials that are not over, in their order.
    pub fn live(&self) -> impl Iterator<Item = u32> {
        self.tally.live()
    }

    /// Brings the sweep's own record up to date, and ends it if nothing is left to do.
    pub fn settle(&mut self, now: Timestamp) {
        let through = self.exhausted && self.owes_no_run();
        let over = (through || self.record.stop.is_some()) && self.tally.live().next().is_none();
        let failure = if over { self.failure() } else { None };
        let best =
            self.tally.best().map(|(number, value)| (TrialId::of(&self.record.sweep.id, number), value));
        let (cost_usd, counts) = (self.tally.cost_usd(), self.tally.counts());
        let sweep = &mut self.record.sweep;
        if (sweep.best != best) || (sweep.cost_usd, &sweep.counts) != (cost_usd, &counts) {
            (sweep.best, sweep.cost_usd, sweep.counts) = (best, cost_usd, counts);
            self.changes.sweep = true;
        }
        if over && !sweep.state.is_terminal() {
            sweep.finished_at = Some(now);
            if let (Some(why), None) = (&mut sweep.ended_early, &sweep.best) {
                let metric = &sweep.spec.search.metric;
                *why += &format!(", before any trial that ended had a value of {metric}");
            }
            (sweep.state, sweep.failure) = match (self.record.stop, failure) {
                (Some(StopCause::Person), _) => (SweepState::Cancelled, None),
                (_, Some(failure)) => (SweepState::Failed, Some(failure)),
                (_, None) => (SweepState::Completed, None),
            };
            self.changes.sweep = true;
        }
    }

    /// The first trial's failure, if every trial failed.
    fn failure(&self) -> Option<String> {
        let all = self.tally.count(TrialState::Failed) as usize == self.trials.len();
        let first = &self.trials.values().next().filter(|_| all)?.trial;
        let why = first.failure.as_ref().map(|f| f.message.as_str()).unwrap_or_default();
        Some(format!("every trial failed; {}: {why}", first.id))
    }
}

fn unknown(sweep: &SweepRecord, number: u32) -> CoordinatorError {
    CoordinatorError::not_found("trial", TrialId::of(&sweep.sweep.id, number))
}

/// The state of a trial that ended because it was told to.
fn ended_by(cause: StopCause) -> TrialState {
    match cause {
        StopCause::Person => TrialState::Cancelled,
        StopCause::Search | StopCause::Budget => TrialState::Stopped,
    }
}

/// What the agent is told of why a trial ends.
fn reason(cause: StopCause) -> StopReason {
    if cause == StopCause::Person { StopReason::Cancelled } else { StopReason::Search }
}

/// What the search is told of a trial that is over.
fn feasible(record: &TrialRecord) -> Option<f64> {
    let sound = matches!(record.trial.state, TrialState::Completed | TrialState::Stopped);
    record.value.filter(|_| sound)
}

#[cfg(test)]
mod tests;
