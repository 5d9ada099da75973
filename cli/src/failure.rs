//! How a command ends when it does not end well. Exit codes: 0 done, 1 the work failed, 2 usage or invalid
//! spec, 3 unreachable, 130 interrupted.

use crate::output::say;
use std::process::ExitCode;

/// What a command says before it exits, and its exit code.
#[derive(Debug)]
pub(crate) struct Failure {
    code: u8,
    message: String,
}

impl Failure {
    /// The work failed.
    pub(crate) fn failed(message: impl ToString) -> Self {
        Self { code: 1, message: message.to_string() }
    }

    /// What was asked for cannot be done: usage, an invalid spec, unusable input.
    pub(crate) fn invalid(message: impl ToString) -> Self {
        Self { code: 2, message: message.to_string() }
    }

    /// The server cannot be reached.
    pub(crate) fn unreachable(message: impl ToString) -> Self {
        Self { code: 3, message: message.to_string() }
    }

    /// A person interrupted it; the message says how to go on.
    pub(crate) fn interrupted(message: impl ToString) -> Self {
        Self { code: 130, message: message.to_string() }
    }

    /// Whether what was called may be there again later.
    pub(crate) fn is_unreachable(&self) -> bool {
        self.code == 3
    }

    /// What it says.
    pub(crate) fn message(&self) -> &str {
        &self.message
    }

    /// Prints the message to standard error.
    pub(crate) fn report(self) -> ExitCode {
        say!("{}{}", if self.code == 130 { "" } else { "error: " }, self.message);
        ExitCode::from(self.code)
    }
}
