//! How much of the fleet a namespace may hold at a time.

use super::Slot;
use std::collections::{BTreeMap, BTreeSet};

/// The quotas of those namespaces that have one.
pub type Quotas = BTreeMap<String, Quota>;

/// What a namespace may hold, and what it does.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Quota {
    /// Trials that it may have on devices.
    pub max_trials: Option<u32>,
    /// GPUs on which they may be.
    pub max_gpus: Option<u32>,
    /// Trials that it has on devices.
    pub trials: u32,
    /// The GPUs among the slots on which they are, by their index.
    pub gpus: BTreeSet<usize>,
    /// Other GPUs on which they are: of agents that get no trials now.
    pub other_gpus: u32,
}

impl Quota {
    /// GPUs that it uses.
    pub fn used_gpus(&self) -> u32 {
        self.other_gpus.saturating_add(self.gpus.len() as u32)
    }

    /// Whether it may have another trial, somewhere.
    pub fn has_trials_left(&self) -> bool {
        self.max_trials.is_none_or(|most| self.trials < most)
    }

    /// Whether it may have another GPU.
    pub fn has_gpus_left(&self) -> bool {
        self.max_gpus.is_none_or(|most| self.used_gpus() < most)
    }

    /// Whether it may have another trial there.
    pub(super) fn admits(&self, index: usize, slot: &Slot) -> bool {
        self.has_trials_left() && (!slot.is_gpu() || self.gpus.contains(&index) || self.has_gpus_left())
    }

    /// It has another trial there.
    pub(super) fn take(&mut self, index: usize, slot: &Slot) {
        self.trials += 1;
        if slot.is_gpu() {
            self.gpus.insert(index);
        }
    }
}
