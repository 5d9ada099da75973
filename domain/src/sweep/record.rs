//! A sweep's record: what the coordinator keeps and people see.

use super::SweepSpec;
use crate::trial::TrialState;
use crate::{SweepId, Timestamp, TrialId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

/// Where a sweep stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SweepState {
    /// Proposes and trains trials.
    Running,
    /// Held by a person: proposes and trains nothing until it is resumed.
    Paused,
    /// All its trials are over.
    Completed,
    /// Ended by a person.
    Cancelled,
    /// No trial could be trained; the failure says why.
    Failed,
}

impl SweepState {
    /// Whether the sweep is over.
    pub fn is_terminal(self) -> bool {
        !matches!(self, SweepState::Running | SweepState::Paused)
    }

    /// The state's name in records, tables and `-o json`.
    pub fn as_str(self) -> &'static str {
        match self {
            SweepState::Running => "running",
            SweepState::Paused => "paused",
            SweepState::Completed => "completed",
            SweepState::Cancelled => "cancelled",
            SweepState::Failed => "failed",
        }
    }
}

impl fmt::Display for SweepState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// How many trials stand in each state.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct StateCounts(BTreeMap<TrialState, u32>);

impl StateCounts {
    /// One more in a state.
    pub fn add(&mut self, state: TrialState) {
        *self.0.entry(state).or_default() += 1;
    }

    /// One less in a state.
    pub fn remove(&mut self, state: TrialState) {
        if let Some(count) = self.0.get_mut(&state) {
            *count = count.saturating_sub(1);
        }
        self.0.retain(|_, count| *count > 0);
    }

    /// The trials in a state.
    pub fn of(&self, state: TrialState) -> u32 {
        self.0.get(&state).copied().unwrap_or_default()
    }

    /// The states that have trials, in the order of a life, with their numbers.
    pub fn iter(&self) -> impl Iterator<Item = (TrialState, u32)> {
        self.0.iter().map(|(state, count)| (*state, *count))
    }
}

impl FromIterator<TrialState> for StateCounts {
    fn from_iter<I: IntoIterator<Item = TrialState>>(states: I) -> Self {
        let mut counts = Self::default();
        states.into_iter().for_each(|state| counts.add(state));
        counts
    }
}

/// What sweeps belong to whose submitter has no other namespace.
pub const DEFAULT_NAMESPACE: &str = "default";

fn default_namespace() -> String {
    DEFAULT_NAMESPACE.into()
}

/// One sweep as the coordinator knows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sweep {
    /// `<name>-<4 hex digits>`.
    pub id: SweepId,
    /// What was asked for, defaults and overrides applied, paths resolved.
    pub spec: SweepSpec,
    /// Where it stands.
    pub state: SweepState,
    /// The submission's request id: the same one again is the same sweep.
    pub request_id: String,
    /// Its submitter's, for limits.
    #[serde(default = "default_namespace")]
    pub namespace: String,
    /// Trials proposed so far; they are numbered from 1.
    pub proposed: u32,
    /// Trials the search may propose in all, if it is bounded.
    pub max_trials: Option<u32>,
    /// How many of its trials stand in each state.
    #[serde(default)]
    pub counts: StateCounts,
    /// The best trial so far by the spec's metric and goal, and its value.
    pub best: Option<(TrialId, f64)>,
    /// What it cost so far, in US dollars.
    pub cost_usd: f64,
    /// Why it failed.
    pub failure: Option<String>,
    /// What ended it before its search was through: which part of its budget was spent.
    #[serde(default)]
    pub ended_early: Option<String>,
    /// When it was submitted.
    pub created_at: Timestamp,
    /// When it ended.
    pub finished_at: Option<Timestamp>,
}
