//! What is known of all trials together, kept up to date with each change, so that a change costs the same in a
//! sweep of ten trials and in one of a hundred thousand.

use super::Trials;
use crate::store::TrialRecord;
use domain::sweep::{Goal, StateCounts, SweepSpec};
use domain::trial::TrialState;
use std::cmp::Ordering;
use std::collections::BTreeSet;

/// In a dollar. Costs are summed as whole numbers, so that the sum does not depend on the order in which it came
/// about; nine million dollars fit.
const PICODOLLARS: f64 = 1e12;

fn picodollars(usd: Option<f64>) -> i64 {
    (usd.unwrap_or_default() * PICODOLLARS).round() as i64
}

/// Sums, counts and bests over a sweep's trials.
#[derive(Debug, PartialEq)]
pub(super) struct Tally {
    goal: Goal,
    counts: StateCounts,
    live: BTreeSet<u32>,
    cost_picodollars: i64,
    /// The best of the completed trials, and of those that were stopped: number and value.
    completed: Option<(u32, f64)>,
    stopped: Option<(u32, f64)>,
    /// How many adapters are kept of trials with a result; `None`: all.
    most_kept: Option<usize>,
    /// Those trials, best first.
    kept: BTreeSet<Rank>,
}

/// A trial's place among those whose adapters are kept: by its value, the best first, a trial without one last. Of
/// equals the earlier trial.
#[derive(Debug, Clone, Copy)]
struct Rank {
    /// The smaller the better; NaN without a value.
    loss: f64,
    number: u32,
}

impl Rank {
    fn of(goal: Goal, number: u32, value: Option<f64>) -> Self {
        let loss = value.filter(|value| !value.is_nan()).map(|value| match goal {
            Goal::Minimize => value,
            Goal::Maximize => -value,
        });
        // 0 and -0 are equals.
        Self { loss: loss.map_or(f64::NAN, |loss| loss + 0.0), number }
    }
}

impl Ord for Rank {
    fn cmp(&self, other: &Self) -> Ordering {
        self.loss.total_cmp(&other.loss).then(self.number.cmp(&other.number))
    }
}

impl PartialOrd for Rank {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Rank {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Rank {}

impl Tally {
    pub(super) fn of(spec: &SweepSpec, trials: &Trials) -> Self {
        let mut tally = Self {
            goal: spec.search.goal,
            counts: StateCounts::default(),
            live: BTreeSet::new(),
            cost_picodollars: 0,
            completed: None,
            stopped: None,
            most_kept: spec.keep_adapters.map(|most| most as usize),
            kept: BTreeSet::new(),
        };
        for (number, record) in trials {
            tally.enter(*number, record);
        }
        tally
    }

    /// A trial that was not there before, in whatever state.
    pub(super) fn enter(&mut self, number: u32, record: &TrialRecord) {
        self.counts.add(record.trial.state);
        self.cost_picodollars += picodollars(record.trial.cost_usd);
        if record.trial.state.is_terminal() {
            self.rank(number, record);
            self.keep(number, record);
        } else {
            self.live.insert(number);
        }
    }

    pub(super) fn went(&mut self, from: TrialState, to: TrialState) {
        self.counts.remove(from);
        self.counts.add(to);
    }

    /// A trial's cost went from one value to another.
    pub(super) fn charge(&mut self, from_usd: Option<f64>, to_usd: Option<f64>) {
        self.cost_picodollars += picodollars(to_usd) - picodollars(from_usd);
    }

    /// A trial has come to its end. Answers with the trial, itself or another, whose adapter is to go for it.
    pub(super) fn over(&mut self, number: u32, record: &TrialRecord) -> Option<u32> {
        self.live.remove(&number);
        self.rank(number, record);
        self.keep(number, record)
    }

    /// Takes a trial among those whose adapters are kept; if there are too many then, the worst leaves. The sweep's
    /// best trial, which comes before stopped ones with better values, never does.
    fn keep(&mut self, number: u32, record: &TrialRecord) -> Option<u32> {
        let most = self.most_kept?;
        if !record.has_result() || record.trial.adapter.is_none() {
            return None;
        }
        self.kept.insert(Rank::of(self.goal, number, record.ranked_value()));
        if self.kept.len() <= most {
            return None;
        }
        let best = self.best().map(|(number, _)| number);
        let worst = self.kept.iter().rev().find(|rank| Some(rank.number) != best).copied()?;
        self.kept.remove(&worst);
        Some(worst.number)
    }

    fn rank(&mut self, number: u32, record: &TrialRecord) {
        if record.trial.replicate_of.is_some() {
            return;
        }
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

    pub(super) fn live_count(&self) -> usize {
        self.live.len()
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
        self.cost_picodollars as f64 / PICODOLLARS
    }

    /// The best of the completed trials; while there is none, the best of those that were stopped.
    pub(super) fn best(&self) -> Option<(u32, f64)> {
        self.completed.or(self.stopped)
    }
}
