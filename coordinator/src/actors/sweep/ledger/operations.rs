//! What a person asks of a whole sweep: to hold it and to go on.

use super::{Effect, Ledger};
use crate::actors::message::StopReason;
use crate::error::{CoordinatorError, Result};
use domain::Timestamp;
use domain::sweep::SweepState;
use domain::trial::TrialState;

impl Ledger {
    /// Whether the search may propose trials.
    pub(super) fn proposes(&self) -> bool {
        self.record.stop.is_none() && !self.is_paused()
    }

    /// Whether a person holds it.
    pub fn is_paused(&self) -> bool {
        self.record.sweep.state == SweepState::Paused
    }

    /// Holds the sweep: what waits wants no device any more, what trains is given back to the queue.
    ///
    /// # Errors
    /// It is over.
    pub fn pause(&mut self, now: Timestamp) -> Result<()> {
        self.refuse_over()?;
        if self.is_paused() {
            return Ok(());
        }
        self.record.sweep.state = SweepState::Paused;
        self.record.paused_at = Some(now);
        self.sweep_changed = true;
        self.effects.push(Effect::Withdraw);
        let training = self.trials.iter().filter(|(_, t)| t.trial.state.holds_device() && t.stop.is_none());
        for number in training.map(|(number, _)| *number).collect::<Vec<_>>() {
            let record = self.get_mut(number)?;
            record.release = true;
            let attempt = record.trial.attempt;
            self.changed.insert(number);
            self.effects.push(Effect::Stop(number, attempt, StopReason::Release));
        }
        Ok(())
    }

    /// Goes on: what waits wants a device again. A trial that is being given back follows when it has been.
    ///
    /// # Errors
    /// It is over.
    pub fn resume(&mut self, now: Timestamp) -> Result<()> {
        self.refuse_over()?;
        if !self.is_paused() {
            return Ok(());
        }
        self.record.sweep.state = SweepState::Running;
        if let Some(since) = self.record.paused_at.take() {
            self.record.idle_ms += now.since(since).as_millis() as u64;
        }
        self.sweep_changed = true;
        let waiting = self.trials.iter().filter(|(_, t)| t.trial.state == TrialState::Queued);
        self.effects.extend(waiting.map(|(number, _)| Effect::Enqueue(*number)));
        Ok(())
    }

    /// What a trial's agent was told and may not have heard: to be said again after a restart.
    pub fn pending_stop(&self, number: u32) -> Result<Option<StopReason>> {
        let record = self.get(number)?;
        let release = record.release.then_some(StopReason::Release);
        Ok(record.stop.map(super::reason).or(release))
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
