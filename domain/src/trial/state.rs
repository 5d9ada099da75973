//! Trial states and their legal transitions: one table, documented in `docs/trial-lifecycle.md`.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Where a trial stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TrialState {
    /// Waits for a device.
    Queued,
    /// Given to an agent, which has not yet said that it trains.
    Assigned,
    /// Trains.
    Running,
    /// Made all its steps.
    Completed,
    /// Ended early by the search (successive halving) with a sound adapter.
    Stopped,
    /// Its loss became NaN or infinite; the last good checkpoint is kept.
    Diverged,
    /// Could not go on; the failure says why.
    Failed,
    /// Ended by a person.
    Cancelled,
}

/// A transition that the table does not allow.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a trial cannot go from {from} to {to}")]
pub struct IllegalTransition {
    /// The state it is in.
    pub from: TrialState,
    /// The state that was asked for.
    pub to: TrialState,
}

impl TrialState {
    /// Every state, in the order of a life.
    pub const ALL: [TrialState; 8] = [
        TrialState::Queued,
        TrialState::Assigned,
        TrialState::Running,
        TrialState::Completed,
        TrialState::Stopped,
        TrialState::Diverged,
        TrialState::Failed,
        TrialState::Cancelled,
    ];

    /// The states that may follow this one. This is the table.
    pub fn successors(self) -> &'static [TrialState] {
        use TrialState::*;
        match self {
            // A stop can reach a trial that was sent back to the queue by a lost agent.
            Queued => &[Assigned, Stopped, Failed, Cancelled],
            // Back to the queue when the agent is lost or hands the trial over.
            Assigned => &[Running, Queued, Failed, Cancelled],
            Running => &[Completed, Stopped, Diverged, Failed, Cancelled, Queued],
            Completed => &[],
            // A person tries it again, or a raised budget lets it go on.
            Stopped | Diverged | Failed | Cancelled => &[Queued],
        }
    }

    /// Whether the trial is over.
    pub fn is_terminal(self) -> bool {
        !matches!(self, TrialState::Queued | TrialState::Assigned | TrialState::Running)
    }

    /// Whether a device holds the trial.
    pub fn holds_device(self) -> bool {
        matches!(self, TrialState::Assigned | TrialState::Running)
    }

    /// `to`, if the table allows it.
    pub fn transition(self, to: TrialState) -> Result<TrialState, IllegalTransition> {
        if self.successors().contains(&to) { Ok(to) } else { Err(IllegalTransition { from: self, to }) }
    }

    /// The state's name in records, tables and `-o json`.
    pub fn as_str(self) -> &'static str {
        match self {
            TrialState::Queued => "queued",
            TrialState::Assigned => "assigned",
            TrialState::Running => "running",
            TrialState::Completed => "completed",
            TrialState::Stopped => "stopped",
            TrialState::Diverged => "diverged",
            TrialState::Failed => "failed",
            TrialState::Cancelled => "cancelled",
        }
    }
}

impl fmt::Display for TrialState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The document and the table say the same.
    #[test]
    fn the_documented_table_is_the_table() {
        let doc = include_str!("../../../docs/trial-lifecycle.md");
        for state in TrialState::ALL {
            let successors: Vec<_> = state.successors().iter().map(|s| format!("`{s}`")).collect();
            let cell = if successors.is_empty() { "–".to_string() } else { successors.join(", ") };
            let row = format!("| `{state}` | {cell} |");
            assert!(doc.contains(&row), "docs/trial-lifecycle.md lacks the row: {row}");
        }
    }

    #[test]
    fn terminal_states_stay_unless_they_are_tried_again() {
        for from in TrialState::ALL {
            for to in TrialState::ALL {
                let allowed = from.transition(to).is_ok();
                assert_eq!(allowed, from.successors().contains(&to), "{from} -> {to}");
                assert!(!allowed || !from.is_terminal() || to == TrialState::Queued, "{from} is terminal");
            }
        }
    }
}
