//! Agents and their devices.

use crate::machine::{ComputeCapability, PriceSource};
use crate::{AgentId, Attempt, DeviceId, TrialId};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::RangeInclusive;
use std::time::Duration;

/// What the id of an agent begins with whose devices are simulated.
pub const SIMULATED_AGENT: &str = "simulated-";

/// How many of its seconds a simulated device may have in one.
pub const SIMULATED_SPEED: RangeInclusive<f64> = 1.0..=1e6;

/// A place where trials train.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Device {
    /// `cpu`, `cuda:0`, ….
    pub id: DeviceId,
    /// `CPU`, `A100-40GB`, ….
    pub accelerator: String,
    /// Bytes that trials may use.
    pub memory_bytes: u64,
    /// Trials that may share it at a time; at least 1.
    pub max_pack_size: u32,
    /// US dollars an hour; 0 for a machine of one's own.
    pub price_per_hour: f64,
    /// Where that price comes from. `None`: whoever started the agent named it, or there is none.
    #[serde(default)]
    pub price_from: Option<PriceSource>,
    /// The base model that is resident, as trials name it.
    pub resident_base: Option<String>,
    /// Of a device that only behaves as if it trained, how many of its seconds pass in one. `None`: it trains.
    #[serde(default)]
    pub simulated_speed: Option<f64>,
    /// Of a GPU, the compute capability whose instructions trials get there. `None`: it is not known, or there is no GPU.
    #[serde(default)]
    pub compute_capability: Option<ComputeCapability>,
}

impl Device {
    /// US dollars for an hour of everybody else's time: a simulated device has more hours in it.
    pub fn cost_per_hour(&self) -> f64 {
        self.price_per_hour * self.simulated_speed.unwrap_or(1.0)
    }
}

/// A process that trains trials on its devices.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Agent {
    /// Its id, stable across its restarts on one data directory.
    pub id: AgentId,
    /// Its LoraFleet version.
    pub version: String,
    /// The machine's name.
    pub hostname: String,
    /// Its devices.
    pub devices: Vec<Device>,
    /// What whoever started it says of it: `zone`, `spot`, ….
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// What it understands beyond what every version does.
    #[serde(default)]
    pub understands: BTreeSet<Feature>,
}

/// Something that agents and coordinators say to each other and that those of an earlier version do not understand. Each side
/// says what it does, and is told nothing else. docs/fleet.md says how one is added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Feature {
    /// To a coordinator: lines for a trial's log.
    Notes,
    /// To an agent: the tasks that a sweep asks of its trials.
    Evaluations,
    /// To an agent: which uploaded data to fetch ahead.
    Prefetch,
}

impl Feature {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Notes, Self::Evaluations, Self::Prefetch];
    /// What a coordinator of this version understands.
    pub const OF_COORDINATORS: [Self; 1] = [Self::Notes];
    /// What an agent of this version understands.
    pub const OF_AGENTS: [Self; 2] = [Self::Evaluations, Self::Prefetch];

    /// Its name where it is said.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Notes => "notes",
            Self::Evaluations => "evaluations",
            Self::Prefetch => "prefetch",
        }
    }

    /// Those of these names that this version knows too; what else a later version understands is no matter.
    pub fn known<'a>(names: impl IntoIterator<Item = &'a String>) -> BTreeSet<Self> {
        let named = |name: &String| Self::ALL.into_iter().find(|feature| feature.as_str() == name);
        names.into_iter().filter_map(named).collect()
    }
}

/// How long an agent took from when it joined.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Beginning {
    /// Until its first trial came; `None`: it has not.
    pub first_trial_seconds: Option<f64>,
    /// Until its first training step was made.
    pub first_step_seconds: Option<f64>,
}

/// A trial that an agent holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holding {
    /// The trial.
    pub trial: TrialId,
    /// The assignment.
    pub attempt: Attempt,
    /// Finished steps.
    pub step: u64,
    /// For how long a device of the agent has held it, by the agent's monotonic clock. `None`: the agent does not say so.
    #[serde(default)]
    pub held: Option<Duration>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_understood_is_said_by_name() {
        let names: Vec<_> = Feature::ALL.iter().map(|feature| feature.as_str().to_string()).collect();
        let later = ["Notes".to_string(), "of_a_later_version".into()];
        assert_eq!(Feature::known(names.iter().chain(&later)), Feature::ALL.into());
        for feature in Feature::ALL {
            assert_eq!(serde_json::to_value(feature).unwrap(), feature.as_str());
            let said = Feature::OF_AGENTS.contains(&feature) || Feature::OF_COORDINATORS.contains(&feature);
            assert!(said, "{feature:?} is understood by somebody");
        }
    }
}
