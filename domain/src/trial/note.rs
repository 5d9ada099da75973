//! What an agent has to say of a trial that changes nothing, for the trial's log.

use serde::{Deserialize, Serialize};

/// How much a line of a log matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// All goes its way.
    #[default]
    Info,
    /// Something did not, and the trial goes on.
    Warning,
    /// The trial does not go on, or not until somebody does something.
    Error,
}

impl Severity {
    /// Its name.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

/// A line of a trial's log that its agent writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// Its number in the attempt, from 1 on: one that is said again is known by it.
    pub number: u32,
    /// How much it matters.
    pub severity: Severity,
    /// What happened, and what to do about it.
    pub message: String,
}

impl Note {
    /// Notes of one attempt at most. A trial in trouble has said by then what it is.
    pub const MOST: u32 = 100;
}
