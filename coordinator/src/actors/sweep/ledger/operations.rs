//! What a person asks of a sweep beside ending it: to hold it, to go on, to extend it, to try a trial again.

use super::replicates::Runs;
use super::tally::Tally;
use super::{Effect, Ledger, extension};
use crate::actors::message::StopReason;
use crate::actors::sweep::Stage;
use crate::actors::sweep::budget::spent;
use crate::error::{CoordinatorError, Result};
use crate::search::Searcher;
use crate::store::{Revision, StopCause, SweepRecord};
use domain::sweep::{SweepSpec, SweepState};
use domain::trial::{Note, TrialState};

impl Ledger {
    /// Whether the search may propose trials.
    pub(super) fn proposes(&self) -> bool {
        self.record.stop.is_none() && !self.exhausted && !self.is_paused()
    }

    /// Whether a person holds it.
    pub fn is_paused(&self) -> bool {
        self.record.sweep.state == SweepState::Paused
    }

    /// Holds the sweep: what waits wants no device any more, what trains is given back to the queue.
    ///
    /// # Errors
    /// It is over.
    pub fn pause(&mut self) -> Result<()> {
        self.refuse_over()?;
        if self.is_paused() {
            return Ok(());
        }
        self.record.sweep.state = SweepState::Paused;
        self.changes.sweep = true;
        self.effects.push(Effect::Withdraw);
        let training = self.trials.iter().filter(|(_, t)| t.trial.state.holds_device() && t.stop.is_none());
        for number in training.map(|(number, _)| *number).collect::<Vec<_>>() {
            let record = self.get_mut(number)?;
            record.release = true;
            let attempt = record.trial.attempt;
            self.changes.trials.insert(number);
            self.effects.push(Effect::Stop(number, attempt, StopReason::Release));
        }
        Ok(())
    }

    /// Goes on: what waits wants a device again. A trial that is being given back follows when it has been.
    ///
    /// # Errors
    /// It is over.
    pub fn resume(&mut self) -> Result<()> {
        self.refuse_over()?;
        if !self.is_paused() {
            return Ok(());
        }
        self.record.sweep.state = SweepState::Running;
        self.changes.sweep = true;
        let waiting = self.trials.iter().filter(|(_, t)| t.trial.state == TrialState::Queued);
        self.effects.extend(waiting.map(|(number, _)| Effect::Enqueue(*number)));
        Ok(())
    }

    /// Milliseconds go by on the sweep's wall clock, which stands still while it is paused.
    pub fn pass(&mut self, milliseconds: u64) {
        if milliseconds > 0 && self.record.sweep.state == SweepState::Running {
            *self.record.active_ms.get_or_insert(0) += milliseconds;
            self.changes.sweep |= self.record.sweep.spec.budget.max_wall_clock_seconds.is_some();
        }
    }

    /// What a trial's agent was told and may not have heard: to be said again after a restart.
    pub fn pending_stop(&self, number: u32) -> Result<Option<StopReason>> {
        let record = self.get(number)?;
        let release = record.release.then_some(StopReason::Release);
        Ok(record.stop.map(super::reason).or(release))
    }

    /// Goes on under a changed spec. A sweep that was over runs again, and trials that its spent budget had ended
    /// go on. The same request again changes nothing.
    ///
    /// # Errors
    /// It was cancelled, or is just ending; the spec changes what it may not, or makes the search impossible.
    pub fn extend(&mut self, request_id: &str, spec: SweepSpec) -> Result<()> {
        if self.record.extensions.iter().any(|known| known == request_id) {
            return Ok(());
        }
        let sweep = &self.record.sweep;
        let refused = match self.record.stop {
            Some(StopCause::Person) => Some("cancelled"),
            Some(_) if !sweep.state.is_terminal() => Some("ending; ask again once it is over"),
            _ => None,
        };
        if let Some(state) = refused {
            return Err(CoordinatorError::Over { kind: "sweep", id: sweep.id.to_string(), state });
        }
        extension::check(&self.record, self.runs.searched_up_to(sweep.proposed), &spec)?;
        self.searcher.extend(&spec).map_err(CoordinatorError::problems)?;
        let record = &mut self.record;
        if record.revisions.is_empty() {
            record.revisions.push(Revision { from: 1, spec: record.sweep.spec.clone() });
        }
        record.revisions.push(Revision { from: record.sweep.proposed + 1, spec: spec.clone() });
        record.extensions.push(request_id.into());
        record.stop = None;
        record.sweep.spec = spec;
        record.sweep.max_trials = self.searcher.size();
        record.sweep.ended_early = None;
        self.exhausted = false;
        self.runs.reconsider();
        self.reopen();
        let cut = |t: &crate::store::TrialRecord| {
            // One that had not begun by then holds no cause in records of earlier versions.
            let never_began = t.stop.is_none() && t.trial.attempt.0 == 0;
            t.trial.state == TrialState::Stopped && (t.stop == Some(StopCause::Budget) || never_began)
        };
        let cut: Vec<_> =
            self.trials.values().filter(|t| cut(t)).filter_map(|t| t.trial.id.number()).collect();
        let again = cut.into_iter().try_for_each(|number| self.again(number));
        self.recount();
        again
    }

    /// Puts a trial that is over back into the queue, to go on from its last checkpoint. The sweep runs again if it
    /// was over; one that was cancelled proposes nothing more.
    ///
    /// # Errors
    /// It is not over, or it made all its steps; the budget is spent.
    pub fn retry(&mut self, number: u32) -> Result<()> {
        let trial = &self.get(number)?.trial;
        if !trial.state.successors().contains(&TrialState::Queued) || trial.state.holds_device() {
            let (id, state) = (trial.id.to_string(), trial.state.as_str());
            return Err(CoordinatorError::Over { kind: "trial", id, state });
        }
        let sweep = &self.record.sweep;
        if let Some(spent) = spent(&sweep.spec.budget, sweep.cost_usd, self.record.active_seconds()) {
            let problem = format!("the sweep's {spent}; raise it with `lorafleet extend` first");
            return Err(CoordinatorError::invalid("trial_id", problem));
        }
        self.reopen();
        self.get_mut(number)?.retried = true;
        let again = self.again(number);
        self.recount();
        again
    }

    /// A sweep that is over runs again.
    fn reopen(&mut self) {
        self.changes.sweep = true;
        let sweep = &mut self.record.sweep;
        if sweep.state.is_terminal() {
            sweep.state = SweepState::Running;
            (sweep.failure, sweep.finished_at) = (None, None);
        }
    }

    fn again(&mut self, number: u32) -> Result<()> {
        self.go(number, TrialState::Queued)?;
        let record = self.get_mut(number)?;
        (record.stop, record.losses) = (None, 0);
        (record.trial.failure, record.trial.summary, record.trial.finished_at) = (None, None, None);
        if let Some(place) = self.runs.searched(number) {
            self.searcher.again(place);
            self.runs.reconsider();
        }
        if !self.is_paused() {
            self.effects.push(Effect::Enqueue(number));
        }
        Ok(())
    }

    /// Counts anew: a trial that is over no more may have been the best.
    fn recount(&mut self) {
        self.tally = Tally::of(&self.record.sweep.spec, &self.trials);
    }

    /// Counts new entries of a trial's log; answers with the number of the first of them.
    pub fn logged(&mut self, number: u32, entries: usize) -> Result<u32> {
        let record = self.get_mut(number)?;
        let first = record.logged;
        record.logged += u32::try_from(entries).unwrap_or(u32::MAX);
        Ok(first)
    }

    /// Whether a note of a trial's current attempt is a new one that its log has room for; then it counts as told.
    pub fn noted(&mut self, number: u32, note: u32) -> Result<bool> {
        let record = self.get_mut(number)?;
        let new = note > record.noted && note <= Note::MOST;
        if new {
            record.noted = note;
            self.changes.trials.insert(number);
        }
        Ok(new)
    }

    /// What a trial does, for its trace.
    pub fn staged(&mut self, number: u32, stage: Option<Stage>) -> Result<()> {
        self.get_mut(number)?.stage = stage;
        Ok(())
    }

    fn refuse_over(&self) -> Result<()> {
        let sweep = &self.record.sweep;
        match sweep.state.is_terminal() {
            true => Err(CoordinatorError::Over {
                kind: "sweep",
                id: sweep.id.to_string(),
                state: sweep.state.as_str(),
            }),
            false => Ok(()),
        }
    }
}

/// The search as it stands by a sweep's record: brought through every spec that it has had. Of `runs` it knows nothing.
pub(super) fn searcher(record: &SweepRecord, runs: &Runs) -> Result<Searcher> {
    let first = record.revisions.first().map_or(&record.sweep.spec, |revision| &revision.spec);
    let mut searcher = Searcher::new(first).map_err(CoordinatorError::problems)?;
    for Revision { from, spec } in record.revisions.iter().skip(1) {
        searcher.fast_forward(runs.searched_up_to(from - 1));
        searcher.extend(spec).map_err(CoordinatorError::problems)?;
    }
    searcher.fast_forward(runs.searched_up_to(record.sweep.proposed));
    Ok(searcher)
}
