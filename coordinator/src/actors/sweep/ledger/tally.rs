//! What is known of all trials together, kept up to date with each change, so that a change costs the same in a
//! sweep of ten trials and in one of a hundred thousand.

use crate::store::TrialRecord;
use domain::sweep::{Goal, StateCounts};
use domain::trial::TrialState;
use std::collections::{BTreeMap, BTreeSet};

/// Sums, counts and bests over a sweep's trials.
#[derive(Debug, PartialEq)]
pub(super) struct Tally {
    goal: Goal,
    counts: StateCounts,
    live: BTreeSet<u32>,
    cost_usd: f64,
    /// The best of the completed trials, and of those that were stopped: number and value.
    completed: Option<(u32, f64)>,
    stopped: Option<(u32, f64)>,
}

impl Tally {
    pub(super) fn of(goal: Goal, trials: &BTreeMap<u32, TrialRecord>) -> Self {
        let mut tally = Self {
            goal,
            counts: StateCounts::default(),
            live: BTreeSet::new(),
            cost_usd: 0.0,
            completed: None,
            stopped: None,
        };
        for (number, record) in trials {
            tally.enter(*number, record);
        }
        tally
    }

    /// A trial that was not there before, in whatever state.
    pub(super) fn enter(&mut self, number: u32, record: &TrialRecord) {
        self.counts.add(record.trial.state);
        self.cost_usd += record.trial.cost_usd.unwrap_or_default();
        if record.trial.state.is_terminal() {
            self.rank(number, record);
        } else {
            self.live.insert(number);
        }
    }

    pub(super) fn went(&mut self, from: TrialState, to: TrialState) {
        self.counts.remove(from);
        self.counts.add(to);
    }

    pub(super) fn charge(&mut self, more_usd: f64) {
        self.cost_usd += more_usd;
    }

    /// A trial has come to its end.
    pub(super) fn over(&mut self, number: u32, record: &TrialRecord) {
        self.live.remove(&number);
        self.rank(number, record);
    }

    fn rank(&mut self, number: u32, record: &TrialRecord) {
        let best = match record.trial.state {
            TrialState::Completed => &mut self.completed,
            TrialState::Stopped => &mut self.stopped,
            _ => return,
        };
        // A record is JSON, which has no other numbers.
        let Some(value) = record.value.filter(|value| value.is_finite()) else { return };
        let goal = self.goal;
        // Of equals, the earlier trial, in whatever order they end.
        if best.is_none_or(|(other, than)| goal.better(value, than) || (value == than && number < other)) {
            *best = Some((number, value));
        }
    }

    pub(super) fn live(&self) -> impl Iterator<Item = u32> {
        self.live.iter().copied()
    }

    pub(super) fn count(&self, state: TrialState) -> u32 {
        self.counts.of(state)
    }

    /// Trials that hold a device.
    pub(super) fn holding(&self) -> u32 {
        self.count(TrialState::Assigned) + self.count(TrialState::Running)
    }

    pub(super) fn counts(&self) -> StateCounts {
        self.counts.clone()
    }

    pub(super) fn cost_usd(&self) -> f64 {
        self.cost_usd
    }

    /// The best of the completed trials; while there is none, the best of those that were stopped.
    pub(super) fn best(&self) -> Option<(u32, f64)> {
        self.completed.or(self.stopped)
    }
}
