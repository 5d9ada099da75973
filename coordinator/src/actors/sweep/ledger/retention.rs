//! Which checkpoints and adapters are kept: while a trial trains, the newest checkpoint and the best; at its end what
//! it can go on from, and its adapter if that is among those that the sweep keeps.

use super::{Effect, Ledger, unknown};
use crate::artifacts::Stored;
use crate::error::Result;
use crate::store::Checkpoint;
use domain::Timestamp;
use domain::metric::MetricPoint;
use domain::trial::TrialState;
use std::collections::BTreeSet;

impl Ledger {
    /// A checkpoint of the current attempt is in the object store. `curve` is what is durable of the trial's
    /// metrics. Answers with the paths that nothing points at any more.
    pub fn checkpoint(
        &mut self,
        number: u32,
        step: u64,
        stored: Stored,
        curve: &[MetricPoint],
    ) -> Result<Vec<String>> {
        let (goal, metric) =
            (self.record.sweep.spec.search.goal, self.record.sweep.spec.search.metric.clone());
        let record = self.get_mut(number)?;
        // An attempt starts from the newest checkpoint, so what is older than that is an upload whose answer
        // was lost and which was overtaken.
        if record.checkpoint.as_ref().is_some_and(|newest| step < newest.step) {
            return self.unused(number, stored);
        }
        let further = record.checkpoint.as_ref().is_none_or(|newest| step > newest.step);
        let before = record.paths();
        if let Some(adapter) = &stored.adapter {
            record.trial.adapter = Some(adapter.clone());
            record.adapter_step = step;
        }
        if let (Some(adapter), Some(resume)) = (stored.adapter, stored.resume) {
            record.trial.resume = Some((resume.clone(), step));
            let newest = Checkpoint { step, adapter, resume };
            let earlier = record.checkpoint.replace(newest.clone()).filter(|earlier| earlier.step < step);
            let candidates = [record.best_checkpoint.take(), earlier, Some(newest)].into_iter().flatten();
            // Points may come after the checkpoint of their step, so all are compared anew each time. Of equals
            // the earlier: the newest has its predecessor's value until its own comes.
            let value = |of: &Checkpoint| value_at(curve, &metric, of.step);
            let valued = candidates.filter_map(|of| Some((value(&of)?, of)));
            let best = valued.reduce(|best, next| if goal.better(next.0, best.0) { next } else { best });
            record.best_checkpoint = best.map(|(_, best)| best).filter(|best| best.step < step);
            // One that got no further is lost again for the same reason.
            if further {
                record.losses = 0;
            }
        }
        let after = record.paths();
        self.changes.trials.insert(number);
        Ok(before.difference(&after).cloned().collect())
    }

    /// The checkpoint that a trial was to go on from is not in the object store any more, as where the state was restored from a
    /// copy that is older than the store: it goes on from the best one before, if there is one, or begins anew.
    pub fn checkpoint_gone(&mut self, number: u32, gone: &Checkpoint, now: Timestamp) -> Result<()> {
        let record = self.get_mut(number)?;
        let before = record.paths();
        record.checkpoint = record.best_checkpoint.take();
        let left = record.checkpoint.as_ref();
        if record.trial.adapter.as_ref() == Some(&gone.adapter) {
            record.adapter_step = left.map_or(record.adapter_step, |left| left.step);
            record.trial.adapter = left.map(|left| left.adapter.clone());
        }
        record.trial.resume = left.map(|left| (left.resume.clone(), left.step));
        // No agent was at fault.
        record.losses = 0;
        let after = record.paths();
        self.remove(number, before.difference(&after).cloned().collect());
        self.requeue(number, now)
    }

    /// The paths of a stored checkpoint that the trial's record does not point at.
    pub fn unused(&self, number: u32, stored: Stored) -> Result<Vec<String>> {
        let used = self.get(number)?.paths();
        Ok([stored.adapter, stored.resume]
            .into_iter()
            .flatten()
            .filter(|path| !used.contains(path))
            .collect())
    }

    /// A trial has come to its end: lets go of the checkpoints that nothing goes on from, and of the adapter, its
    /// own or another trial's, that is no more among those that the sweep keeps.
    pub(super) fn retain(&mut self, number: u32) -> Result<()> {
        let record = self.get_mut(number)?;
        let before = record.paths();
        record.best_checkpoint = None;
        if record.trial.state == TrialState::Completed {
            (record.checkpoint, record.trial.resume) = (None, None);
        }
        let after = record.paths();
        self.remove(number, before.difference(&after).cloned().collect());
        let record = self.trials.get(&number).ok_or_else(|| unknown(&self.record, number))?;
        if let Some(number) = self.tally.over(number, record) {
            let record = self.get_mut(number)?;
            let before = record.paths();
            (record.checkpoint, record.trial.resume, record.trial.adapter) = (None, None, None);
            // What documents made of it stays: reports compare it with others.
            let after = record.paths();
            self.changes.trials.insert(number);
            self.remove(number, before.difference(&after).cloned().collect());
        }
        Ok(())
    }

    fn remove(&mut self, number: u32, paths: BTreeSet<String>) {
        if !paths.is_empty() {
            self.effects.push(Effect::Remove(number, paths));
        }
    }
}

/// The metric's last value up to a step, if it has one. Step 0 is the base without an adapter.
fn value_at(curve: &[MetricPoint], metric: &str, step: u64) -> Option<f64> {
    let until = curve.iter().rev().filter(|point| (1..=step).contains(&point.step));
    until.filter_map(|point| point.get(metric)).next().filter(|value| !value.is_nan())
}
