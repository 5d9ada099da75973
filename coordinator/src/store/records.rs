//! What is kept of sweeps and trials.

use super::SpecObject;
use crate::actors::sweep::Stage;
use domain::data::{ContentHash, Reference};
use domain::footprint::ModelShape;
use domain::sweep::{StateCounts, Sweep, SweepSpec, SweepState};
use domain::trial::{
    Digests, Failure, Severity, Trial, TrialConfig, TrialDevice, TrialPlacement, TrialState, TrialSummary,
    serialize_differing,
};
use domain::{AgentId, Attempt, DeviceId, SweepId, Timestamp, TrialId};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// Why a trial or a sweep is to end before its time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StopCause {
    /// Successive halving.
    Search,
    /// The sweep's budget is spent.
    Budget,
    /// A person.
    Person,
}

impl StopCause {
    /// The cause in force when this one comes after another: a person's word is the last.
    pub fn after(self, before: Option<StopCause>) -> Self {
        if before == Some(Self::Person) { Self::Person } else { self }
    }
}

/// A sweep's spec as it was from a trial number on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Revision {
    /// The first trial that it may have proposed.
    pub from: u32,
    /// The spec.
    pub spec: SweepSpec,
}

/// What stays of a deleted sweep.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tombstone {
    /// The sweep.
    pub sweep: SweepId,
    /// When its records were removed.
    pub deleted_at: Timestamp,
    /// When its last checkpoint was removed.
    pub completed_at: Option<Timestamp>,
}

/// Something that happened to a trial.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogEntry {
    /// When.
    pub time: Timestamp,
    /// What: `proposed`, `assigned`, `started`, `checkpoint`, `told_to_release`, `told_to_stop`, `queued`,
    /// `queued_again`, `adapter_removed`, the state in which it ended; or the severity of what its agent says.
    pub event: String,
    /// How much it matters. Of an earlier version it is not known.
    #[serde(default)]
    pub severity: Severity,
    /// The assignment that was current then; 0 before the first.
    pub attempt: Attempt,
    /// The last step whose metrics were durable then.
    pub step: u64,
    /// More about it, for people.
    pub message: String,
}

/// Where a trial trains.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Placement {
    /// The agent.
    pub agent: AgentId,
    /// Its device.
    pub device: DeviceId,
    /// The device's price, in US dollars an hour of everybody's time.
    pub price_per_hour: f64,
    /// What the device is. `None` in a record of an earlier version.
    #[serde(default)]
    pub is: Option<TrialDevice>,
    /// What the trial had cost when it was given the device. `None` in a record of an earlier version.
    #[serde(default)]
    pub before_usd: Option<f64>,
}

/// A complete checkpoint: both parts of one upload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// The step it was taken at.
    pub step: u64,
    /// The adapter's path in the object store.
    pub adapter: String,
    /// The resume state's path in the object store.
    pub resume: String,
}

/// What of a sweep's record is in the registry wherever its spec lies.
#[derive(Debug, Clone, Deserialize)]
pub struct SweepHead {
    /// Its id.
    pub id: SweepId,
    /// Where it stands.
    pub state: SweepState,
    /// Its submitter's.
    #[serde(default)]
    pub namespace: String,
    /// How many of its trials stand in each state.
    #[serde(default)]
    pub counts: StateCounts,
    /// What it cost so far, in US dollars.
    pub cost_usd: f64,
    /// When it was submitted.
    pub created_at: Timestamp,
    /// When it ended.
    pub finished_at: Option<Timestamp>,
    /// The object that holds its spec, if the record does not.
    #[serde(skip)]
    pub specs: Option<SpecObject>,
}

/// A sweep, and what only the coordinator needs to know of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SweepRecord {
    /// What people see.
    pub sweep: Sweep,
    /// Set once it proposes no more and its trials are told to end.
    pub stop: Option<StopCause>,
    /// Milliseconds on its wall clock. That is counted, not read from two hours of which one may be wrong. `None` in
    /// a record of an earlier version.
    #[serde(default)]
    pub active_ms: Option<u64>,
    /// When it was paused, while it is; of earlier versions.
    #[serde(default, skip_serializing)]
    paused_at: Option<Timestamp>,
    /// Milliseconds since its submission in which it was paused or over; of earlier versions.
    #[serde(default, skip_serializing)]
    idle_ms: u64,
    /// Every spec it has had, if it was extended; the last is the sweep's.
    #[serde(default)]
    pub revisions: Vec<Revision>,
    /// Request ids of its extensions: the same one again is the same extension.
    #[serde(default)]
    pub extensions: Vec<String>,
    /// Shapes of base models, by the name that trials give them: what memory is predicted from.
    #[serde(default)]
    pub base_models: BTreeMap<String, ModelShape>,
    /// Where in its trace the command called that submitted it: a W3C `traceparent`.
    #[serde(default)]
    pub submitted_by: Option<String>,
}

impl SweepRecord {
    /// A sweep that was just submitted.
    pub fn new(sweep: Sweep, base_models: BTreeMap<String, ModelShape>) -> Self {
        Self {
            sweep,
            stop: None,
            active_ms: Some(0),
            paused_at: None,
            idle_ms: 0,
            revisions: Vec::new(),
            extensions: Vec::new(),
            base_models,
            submitted_by: None,
        }
    }

    /// The uploaded data that it names, also before it was extended.
    pub fn trees(&self) -> BTreeSet<ContentHash> {
        let specs =
            std::iter::once(&self.sweep.spec).chain(self.revisions.iter().map(|revision| &revision.spec));
        let named = specs.flat_map(|spec| config::paths::named(&spec.to_document()));
        named.filter_map(|named| Some(named.name.parse::<Reference>().ok()?.tree)).collect()
    }

    /// Seconds on its wall clock: those in which a server ran it and it was neither paused nor over.
    pub fn active_seconds(&self) -> f64 {
        self.active_ms.unwrap_or_default() as f64 / 1e3
    }

    /// Begins to count the wall clock of a record of an earlier version, which kept hours.
    pub fn count_wall_clock(&mut self, now: Timestamp) {
        let until = self.paused_at.or(self.sweep.finished_at).unwrap_or(now);
        let active = until.since(self.sweep.created_at).as_millis() as u64;
        self.active_ms.get_or_insert(active.saturating_sub(self.idle_ms));
    }
}

/// An agent, and the name of the token that it belongs to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// The agent.
    pub agent: AgentId,
    /// The token's name.
    pub token: String,
}

/// A file that was uploaded, or of which an upload began.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Uploaded {
    /// The file.
    pub file: ContentHash,
    /// The namespace that it counts for.
    pub namespace: String,
    /// Its bytes, as they were announced.
    pub bytes: u64,
}

/// What a leader found of the metrics in an object store when it began: of the terms before its own no other objects
/// count, whenever they come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Closed {
    /// The leader's term.
    pub by: u64,
    /// The number of each term's last object; terms that have none are not here.
    pub last: BTreeMap<u64, u64>,
}

impl Closed {
    /// Whether an object counts.
    pub fn counts(&self, term: u64, number: u64) -> bool {
        term >= self.by || self.last.get(&term).is_some_and(|last| number <= *last)
    }
}

/// How a [`Trial`] is kept: without what is not there, and without parameters that have their defaults. Ten thousand of them are to
/// fit into etcd.
#[derive(Serialize, Deserialize)]
#[serde(remote = "Trial")]
struct KeptTrial {
    id: TrialId,
    #[serde(serialize_with = "serialize_differing")]
    config: TrialConfig,
    parameters: BTreeMap<String, Value>,
    state: TrialState,
    attempt: Attempt,
    step: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    total_steps: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    agent: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    device: Option<TrialDevice>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    adapter: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    resume: Option<(String, u64)>,
    attempts: Vec<(Attempt, u64)>,
    #[serde(default)]
    placements: Vec<TrialPlacement>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    eval_loss: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    cost_usd: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    summary: Option<TrialSummary>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    failure: Option<Failure>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    digests: Option<Digests>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    trace_id: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    replicate_of: Option<TrialId>,
    created_at: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    started_at: Option<Timestamp>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    finished_at: Option<Timestamp>,
}

/// A trial, and what only the coordinator needs to know of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrialRecord {
    /// What people see.
    #[serde(with = "KeptTrial")]
    pub trial: Trial,
    /// Where it trains, while it holds a device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub placement: Option<Placement>,
    /// Set once it was told to end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop: Option<StopCause>,
    /// Whether its agent was asked to give it back to the queue.
    #[serde(default)]
    pub release: bool,
    /// Whether a person tried it again: the search does not end it early any more.
    #[serde(default)]
    pub retried: bool,
    /// The newest checkpoint that it can go on from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<Checkpoint>,
    /// While it is not over, an older one at which the sweep's metric was better than at the newest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub best_checkpoint: Option<Checkpoint>,
    /// The step at which the newest adapter was taken.
    pub adapter_step: u64,
    /// The last value of the sweep's metric.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<f64>,
    /// What earlier assignments cost, in US dollars.
    pub earlier_cost_usd: f64,
    /// When the current assignment was last charged for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub charged_at: Option<Timestamp>,
    /// For how many seconds its device had held it then, by clocks that do not jump. `None` in a record of an earlier version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub charged_held_seconds: Option<f64>,
    /// Times that it was lost or failed through no fault of its own since its last checkpoint.
    pub losses: u32,
    /// Entries of its log.
    #[serde(default)]
    pub logged: u32,
    /// The number of the last note of its current attempt.
    #[serde(default)]
    pub noted: u32,
    /// What it does, for its trace. `None` in a record of an earlier version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stage: Option<Stage>,
    /// The newest attempt that there are metrics of, if it is none that the record knows: the state was restored from a copy
    /// older than they are. 0 otherwise. The metrics say it whenever they are read.
    #[serde(skip)]
    pub forgotten: Attempt,
}

impl TrialRecord {
    /// A trial that the search has just proposed.
    pub fn new(
        id: TrialId,
        config: TrialConfig,
        parameters: BTreeMap<String, Value>,
        created_at: Timestamp,
    ) -> Self {
        Self {
            trial: Trial::new(id, config, parameters, created_at),
            placement: None,
            stop: None,
            release: false,
            retried: false,
            checkpoint: None,
            best_checkpoint: None,
            adapter_step: 0,
            value: None,
            earlier_cost_usd: 0.0,
            charged_at: None,
            charged_held_seconds: None,
            losses: 0,
            logged: 0,
            noted: 0,
            stage: None,
            forgotten: Attempt(0),
        }
    }

    /// The number of its next assignment: larger than that of any that it ever had.
    pub fn next_attempt(&self) -> Attempt {
        self.trial.attempt.max(self.forgotten).next()
    }

    /// The object-store paths that it points at.
    pub fn paths(&self) -> BTreeSet<String> {
        let checkpoints = self.checkpoint.iter().chain(&self.best_checkpoint);
        let paths = checkpoints.flat_map(|c| [&c.adapter, &c.resume]);
        let items = self.trial.summary.iter().flat_map(|summary| &summary.items);
        paths.chain(&self.trial.adapter).chain(items).cloned().collect()
    }

    /// Whether it came to an end of its own: it made all its steps, or the search ended it. Of such trials a sweep
    /// may keep the best adapters alone; the others that are over were cut off, and keep what they can go on from.
    pub fn has_result(&self) -> bool {
        match self.trial.state {
            TrialState::Completed => true,
            TrialState::Stopped => self.stop != Some(StopCause::Budget),
            _ => false,
        }
    }

    /// Its value where the best trials come first; none of a run with another seed, which has a better value by luck and
    /// never stands before its first.
    pub fn ranked_value(&self) -> Option<f64> {
        self.value.filter(|_| self.trial.replicate_of.is_none())
    }
}
