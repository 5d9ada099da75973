//! The runs of the best trials with other seeds, once the search has nothing left to propose and what it proposed is over.
//!
//! Which runs are owed follows from the trials' records alone, as the search's proposals do: of the finalists, best first,
//! those runs that are not there yet, whatever came of those that are. So a restart, or a batch that was not written,
//! neither loses nor doubles one; and where the finalists change, after an extension or a trial that was tried again, the
//! new ones are owed theirs, and what there is of the others stays.
//!
//! The search hears nothing of these trials: it knows its own by their place among those that it proposed.

use super::Ledger;
use crate::store::TrialRecord;
use domain::sweep::Replicates;
use domain::trial::TrialState;
use domain::{Timestamp, TrialId};
use std::collections::{BTreeMap, VecDeque};

/// The runs that are no trials of the search. Every message about a trial asks for its place, so that is looked up and
/// never counted.
#[derive(Debug, Default)]
pub(super) struct Runs {
    /// Their numbers, rising.
    numbers: Vec<u32>,
    /// How many there are of each trial that was run again, its first aside, by its number.
    of: BTreeMap<u32, u32>,
    /// Finalists that are to be run again, a run an entry, the next first; `None` while the search is not through.
    owed: Option<VecDeque<u32>>,
}

impl Runs {
    /// Of trials in the order of their numbers.
    pub(super) fn of<'a>(trials: impl IntoIterator<Item = (u32, &'a TrialRecord)>) -> Self {
        let mut runs = Self::default();
        for (number, record) in trials {
            if let Some(first) = record.trial.replicate_of.as_ref().and_then(TrialId::number) {
                runs.enter(number, first);
            }
        }
        runs
    }

    /// One more run of a trial, with a number above all others'.
    fn enter(&mut self, number: u32, first: u32) {
        self.numbers.push(number);
        *self.of.entry(first).or_default() += 1;
    }

    /// The place of a trial among those that the search proposed, by which the search knows it; `None` of one that runs
    /// another again.
    pub(super) fn searched(&self, number: u32) -> Option<u32> {
        self.numbers.binary_search(&number).err().map(|before| without(number, before))
    }

    /// How many trials up to this number the search proposed.
    pub(super) fn searched_up_to(&self, number: u32) -> u32 {
        without(number, self.numbers.partition_point(|run| *run <= number))
    }

    /// Something changed by which other trials may be the finalists.
    pub(super) fn reconsider(&mut self) {
        self.owed = None;
    }

    /// Runs of a trial that there are, its first aside.
    fn there_are(&self, finalist: u32) -> u32 {
        self.of.get(&finalist).copied().unwrap_or_default()
    }
}

fn without(number: u32, runs: usize) -> u32 {
    number.saturating_sub(u32::try_from(runs).unwrap_or(u32::MAX))
}

impl Ledger {
    /// Whether every run that the sweep asks for is there.
    pub(super) fn owes_no_run(&self) -> bool {
        self.record.sweep.spec.replicates.is_none() || self.runs.owed.as_ref().is_some_and(VecDeque::is_empty)
    }

    /// Proposes as many further runs of finalists as may wait.
    pub(super) fn run_again(&mut self, ahead: u32, now: Timestamp) {
        let Some(asked) = self.record.sweep.spec.replicates else { return };
        if !self.exhausted || self.record.stop.is_some() || self.is_paused() {
            return;
        }
        if self.runs.owed.is_none() {
            if self.tally.live().any(|number| self.runs.searched(number).is_some()) {
                return;
            }
            self.runs.owed = Some(self.owed(asked));
        }
        while self.tally.count(TrialState::Queued) < ahead && self.has_room() {
            let Some(finalist) = self.runs.owed.as_mut().and_then(VecDeque::pop_front) else { return };
            let Some(first) = self.trials.get(&finalist).map(|record| record.trial.clone()) else { return };
            let mut config = first.config;
            config.seed = Replicates::seed(config.seed, 2 + self.runs.there_are(finalist));
            let number = self.enter(config, first.parameters, Some(first.id), now);
            self.runs.enter(number, finalist);
        }
    }

    /// The finalists of each round of runs, round after round: a budget that ends them leaves all with as many.
    fn owed(&self, asked: Replicates) -> VecDeque<u32> {
        let goal = self.record.sweep.spec.search.goal;
        let searched = self.trials.iter().filter(|(number, _)| self.runs.searched(**number).is_some());
        let mut finalists: Vec<_> = searched
            .filter(|(_, record)| record.trial.state == TrialState::Completed)
            .filter_map(|(number, record)| Some((*number, record.value.filter(|value| value.is_finite())?)))
            .collect();
        // The sort is stable: of equals the earlier.
        finalists.sort_by(|(_, a), (_, b)| goal.better(*b, *a).cmp(&goal.better(*a, *b)));
        finalists.truncate(asked.finalists as usize);
        let there: Vec<_> =
            finalists.iter().map(|(number, _)| (*number, self.runs.there_are(*number))).collect();
        let round =
            |run: u32| there.iter().filter(move |(_, runs)| runs + 1 < run).map(|(number, _)| *number);
        (2..=asked.runs).flat_map(round).collect()
    }
}
