//! Agents and their devices.

use crate::{AgentId, Attempt, DeviceId, TrialId};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::RangeInclusive;

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
    /// The base model that is resident, as trials name it.
    pub resident_base: Option<String>,
    /// Of a device that only behaves as if it trained, how many of its seconds pass in one. `None`: it trains.
    #[serde(default)]
    pub simulated_speed: Option<f64>,
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
}
