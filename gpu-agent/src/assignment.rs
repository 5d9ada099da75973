//! A trial under an attempt number: what everything in the agent is keyed by.

use domain::{Attempt, TrialId};
use serde::{Deserialize, Serialize};
use std::fmt;

/// A trial as it was given to this agent.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Assignment {
    /// The trial.
    pub trial: TrialId,
    /// The number of the assignment.
    pub attempt: Attempt,
}

impl Assignment {
    /// Names an assignment.
    pub fn new(trial: impl Into<String>, attempt: u32) -> Self {
        Self { trial: TrialId::new(trial), attempt: Attempt(attempt) }
    }

    /// A name for files and folders. Trial ids come from the network: everything but letters, digits, `-` and
    /// `_` is replaced by its bytes in hexadecimal, so that no id leads out of its folder and no two ids meet.
    pub fn file_name(&self) -> String {
        let mut name = String::new();
        for byte in self.trial.as_str().bytes() {
            if byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_' {
                name.push(char::from(byte));
            } else {
                name.push_str(&format!("%{byte:02x}"));
            }
        }
        format!("{name}.{}", self.attempt)
    }
}

impl fmt::Display for Assignment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (attempt {})", self.trial, self.attempt)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_names_stay_in_their_folder() {
        for (trial, want) in
            [("quick-0a1b/7", "quick-0a1b%2f7.2"), ("../x", "%2e%2e%2fx.2"), ("a%2f", "a%252f.2"), ("", ".2")]
        {
            assert_eq!(Assignment::new(trial, 2).file_name(), want);
        }
    }
}
