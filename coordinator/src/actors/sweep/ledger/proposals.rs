//! New trials: what the search proposes, and further runs of the best; and what the search hears of its own.

use super::{Effect, Ledger};
use crate::search::Proposal;
use crate::store::TrialRecord;
use domain::trial::{TrialConfig, TrialState};
use domain::{Timestamp, TrialId};
use serde_json::Value;
use std::collections::BTreeMap;
use telemetry::trace::TrialTrace;

/// Trials that wait for a device at least, so that a device that frees up finds one. As many may wait as train, so
/// that a large fleet fills in few rounds.
pub(super) const QUEUE_AHEAD: u32 = 8;

impl Ledger {
    /// Proposes as many trials as may wait.
    pub fn fill(&mut self, now: Timestamp) {
        let ahead = QUEUE_AHEAD.max(self.tally.holding());
        while self.proposes() && self.tally.count(TrialState::Queued) < ahead && self.has_room() {
            match self.searcher.propose() {
                Proposal::Trial(proposed) => {
                    self.enter(proposed.config, proposed.parameters, None, now);
                }
                Proposal::Wait => return,
                Proposal::Exhausted => self.exhausted = true,
            }
        }
        self.run_again(ahead, now);
    }

    /// Whether one more trial may be under way.
    pub(super) fn has_room(&self) -> bool {
        let most = self.record.sweep.spec.search.max_concurrent_trials;
        most.is_none_or(|most| self.tally.live_count() < most as usize)
    }

    /// A new trial; answers with its number.
    pub(super) fn enter(
        &mut self,
        config: TrialConfig,
        parameters: BTreeMap<String, Value>,
        replicate_of: Option<TrialId>,
        now: Timestamp,
    ) -> u32 {
        let number = self.record.sweep.proposed + 1;
        let id = TrialId::of(&self.record.sweep.id, number);
        let mut record = TrialRecord::new(id, config, parameters, now);
        record.trial.replicate_of = replicate_of;
        let trace = TrialTrace::of(&self.record.sweep.request_id, number);
        record.trial.trace_id = Some(trace.id());
        self.tally.enter(number, &record);
        self.trials.insert(number, Box::new(record));
        self.record.sweep.proposed = number;
        self.changes.trials.insert(number);
        self.changes.sweep = true;
        self.effects.push(Effect::Enqueue(number));
        number
    }

    /// The search hears that a trial of its own is over.
    pub(super) fn tell_end(&mut self, number: u32, value: Option<f64>) {
        if let Some(place) = self.runs.searched(number) {
            self.searcher.ended(place, value);
        }
    }
}
