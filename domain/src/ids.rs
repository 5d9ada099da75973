//! Names of sweeps, trials, agents and devices.

use serde::{Deserialize, Serialize};
use std::fmt;

macro_rules! string_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(String);

        impl $name {
            /// Wraps an existing id; ids are made by the coordinator and the agents, not here.
            pub fn new(id: impl Into<String>) -> Self {
                Self(id.into())
            }

            /// The id as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

string_id! {
    /// A sweep: `<name>-<4 hex digits>`, unique in a coordinator.
    SweepId
}
string_id! {
    /// A trial: `<sweep id>/<number>`, numbered from 1 in the order in which they were proposed.
    TrialId
}
string_id! {
    /// An agent process, stable across its restarts on one data directory.
    AgentId
}
string_id! {
    /// A device of an agent: `cpu`, `cuda:0`, ….
    DeviceId
}

impl TrialId {
    /// The id of a sweep's trial number `number` (from 1).
    pub fn of(sweep: &SweepId, number: u32) -> Self {
        Self(format!("{sweep}/{number}"))
    }

    /// The sweep's part of the id, if the id has the form `<sweep>/<number>`.
    pub fn sweep(&self) -> Option<SweepId> {
        self.0.rsplit_once('/').map(|(sweep, _)| SweepId::new(sweep))
    }

    /// The trial's number within its sweep, if the id has the form `<sweep>/<number>`. A number has one form, so
    /// that a trial has one id.
    pub fn number(&self) -> Option<u32> {
        let (_, text) = self.0.rsplit_once('/')?;
        let one_form = text == "0" || !text.starts_with(['0', '+']);
        text.parse().ok().filter(|_| one_form)
    }
}

/// The number of an assignment of a trial to a device. It only grows; a message that carries an old one
/// is refused, and readers drop an older attempt's points from the step at which a newer one started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Attempt(pub u32);

impl Attempt {
    /// The attempt after this one.
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}
