//! What trains. An engine works in steps on one thread and speaks in values that can be serialised, so that
//! it can be hosted by a thread of the agent or by another process.
//!
//! | module | holds |
//! |---|---|
//! | here | commands, events, the [`Engine`] trait |
//! | [`host`] | one host: the thread that steps an engine, and survives its panics |
//! | [`process`] | the other: a child process a device, restarted when it dies |
//! | [`child`] | what that process does |
//! | `lines` | what the two say to each other, as JSON |
//! | [`pack`] | the engine: trials that share a base, stepped together; generic over what trains them |
//! | [`candle`] | what trains them: the trainer |
//! | `exams` | what its trials are asked once they are trained |
//! | `kept` | bases in 4 bits, read from the agent's cache or written to it |
//! | [`sources`] | what trials name on the hub, downloaded |
//! | [`simulated`] | what only says that it trains: analytic loss curves, for tests of everything around it |

pub mod candle;
pub mod child;
mod exams;
pub mod host;
mod kept;
mod lines;
pub mod pack;
pub mod process;
pub mod simulated;
pub mod sources;

pub use exams::pass_tokens;

use crate::Assignment;
use crate::cache::quantised::Draft;
use domain::Timestamp;
use domain::data::ContentHash;
use domain::metric::MetricPoint;
use domain::sweep::Evaluations;
use domain::trial::{Digests, Failure, Severity, TrialConfig, TrialSummary};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The two folders of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointDirs {
    /// The adapter, in PEFT's format.
    pub adapter: PathBuf,
    /// What going on needs beside it.
    pub resume: PathBuf,
}

impl CheckpointDirs {
    /// The folders of the checkpoint at `step` within a trial's work folder.
    pub fn within(work_dir: &Path, step: u64) -> Self {
        Self {
            adapter: work_dir.join(format!("adapter-{step}")),
            resume: work_dir.join(format!("resume-{step}")),
        }
    }
}

/// A trial to train.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Admission {
    /// The trial and its attempt.
    pub assignment: Assignment,
    /// Every parameter with the value in force.
    pub config: TrialConfig,
    /// The checkpoint to go on from; `None` starts anew.
    pub resume: Option<CheckpointDirs>,
    /// What earlier attempts were trained on; other bytes are refused.
    pub digests: Option<Digests>,
    /// What its sweep asks of it once it is trained.
    #[serde(default)]
    pub evaluations: Option<Evaluations>,
    /// Where uploaded data that it names lies on this machine.
    #[serde(default)]
    pub places: BTreeMap<String, PathBuf>,
    /// The agent's cache, where bases in 4 bits are kept; `None` keeps none.
    #[serde(default)]
    pub cache: Option<PathBuf>,
    /// The folder in which the engine puts checkpoints. The engine removes it when told to drop the trial.
    pub work_dir: PathBuf,
    /// Where in a trace it belongs what is logged of it: a W3C `traceparent`.
    #[serde(default)]
    pub belongs: Option<String>,
}

impl Admission {
    /// Its configuration with uploaded data by where it lies here. A trial's own names what it holds, which is the same on
    /// every machine.
    pub fn placed(&self) -> TrialConfig {
        let mut config = self.config.clone();
        config.sources_mut().for_each(|name| self.place(name));
        config
    }

    /// What its sweep asks, with uploaded documents by where they lie here.
    pub fn placed_evaluations(&self) -> Option<Evaluations> {
        let mut evaluations = self.evaluations.clone()?;
        evaluations.sources_mut().for_each(|name| self.place(name));
        Some(evaluations)
    }

    fn place(&self, name: &mut String) {
        if let Some(path) = self.places.get(name) {
            *name = path.to_string_lossy().into_owned();
        }
    }
}

/// How a trial is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum How {
    /// Checkpoint, then [`Happening::Finished`] as stopped: the search or a person ended it.
    Stop,
    /// Checkpoint, then [`Happening::Released`]: another agent goes on.
    Release,
    /// Forget it without a word.
    Drop,
}

/// What an engine is told.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Command {
    /// Train this.
    Admit(Box<Admission>),
    /// End this.
    Stop(Assignment, How),
    /// Log what these directives say.
    Log(String),
    /// Write the base that is in memory to the agent's cache, which has room for it: the answer to [`Event::Quantised`].
    Keep(Draft),
    /// End yourself.
    Shutdown,
}

/// How a trial's training ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ending {
    /// It made all its steps.
    Completed,
    /// It was told to stop.
    Stopped,
    /// Its loss became NaN or infinite.
    Diverged,
}

/// A checkpoint on this machine's disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoint {
    /// Finished steps.
    pub step: u64,
    /// Where it lies.
    pub dirs: CheckpointDirs,
}

impl Checkpoint {
    /// Removes it from the disk. What cannot be removed goes with the trial's work folder.
    pub fn remove(&self) {
        for dir in [&self.dirs.adapter, &self.dirs.resume] {
            let _ = std::fs::remove_dir_all(dir);
        }
    }
}

/// Something that happened to a trial. After `Finished`, `Failed` or `Released` nothing more comes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Happening {
    /// It trains.
    Started {
        /// Steps it will make if nothing ends it.
        total_steps: u64,
        /// Finished steps it starts from.
        start_step: u64,
        /// What is trained on what.
        digests: Digests,
    },
    /// Numbers, in the order of steps.
    Points(#[serde(with = "lines::points")] Vec<MetricPoint>),
    /// A checkpoint was written. Points of later steps may have come before it.
    Checkpoint(Checkpoint),
    /// It ended; its last checkpoint was written before.
    Finished {
        /// How.
        ending: Ending,
        /// Its numbers.
        summary: Box<TrialSummary>,
        /// More about a divergence.
        message: String,
    },
    /// Nothing changed: a line for its log, and the agent's.
    Note(Severity, String),
    /// It could not go on.
    Failed(Failure),
    /// It was given back; its last checkpoint was written before.
    Released,
}

impl Happening {
    /// Whether nothing more comes after it.
    pub fn is_last(&self) -> bool {
        matches!(self, Self::Finished { .. } | Self::Failed(_) | Self::Released)
    }
}

/// What an engine does for a trial beside its steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Work {
    /// Reads the base's weights to the device; to 4 bits they are quantised one by one as they come,
    /// unless the agent's cache has them so ([`FourBits`]).
    Load,
    /// Reads its rows, and its checkpoint if it goes on from one.
    Prepare,
    /// Evaluates on the held-out rows, or asks what its sweep asks.
    Evaluate,
    /// Writes a checkpoint to this machine's disk, while it trains on.
    Checkpoint,
}

impl Work {
    /// Its name in traces and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Load => "load",
            Self::Prepare => "prepare",
            Self::Evaluate => "evaluate",
            Self::Checkpoint => "checkpoint",
        }
    }
}

/// A piece of work that is over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Phase {
    /// What it was.
    pub work: Work,
    /// When it began.
    pub start: Timestamp,
    /// How long it took.
    pub took: Duration,
    /// Finished steps of the trial then.
    pub step: u64,
    /// Of a base that is loaded in 4 bits from files in more: how it came to be so.
    #[serde(default)]
    pub four_bits: Option<FourBits>,
}

/// How a base came to be in 4 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FourBits {
    /// The agent's cache had it so.
    Cached,
    /// Its matrices were quantised as they were read.
    Quantised(Quantising),
}

/// The quantising of a base's matrices, from the first to the last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quantising {
    /// When the first began.
    pub start: Timestamp,
    /// From then to the end of the last, what was read in between included.
    pub took: Duration,
    /// The time in which a matrix was quantised. Of a GPU, which does so as pieces are read, what was left to tell it after the last.
    pub busy: Duration,
    /// How many.
    pub matrices: u64,
    /// Bytes that they take in 4 bits.
    pub bytes: u64,
}

/// What an engine says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub enum Event {
    /// About a trial.
    Trial(Assignment, Happening),
    /// Something that it did for a trial is over.
    Phase(Assignment, Phase),
    /// The seconds that each of its last steps took, evaluations left out.
    Steps(Vec<f64>),
    /// The base that is loaded is one in 4 bits, which the agent's cache has under `key`.
    Quantised {
        /// What names it.
        key: ContentHash,
        /// Bytes that it would take there at most, as it was quantised now; `None` if it was read from there.
        bytes: Option<u64>,
    },
    /// Which base is in the device's memory now.
    BaseResident(Option<String>),
}

/// Something that trains, step by step, on the thread that calls it.
pub trait Engine {
    /// Takes a trial; it joins the others at the next step boundary.
    fn admit(&mut self, admission: Admission);
    /// Ends a trial at the next step boundary. Unknown trials are ignored.
    fn stop(&mut self, assignment: &Assignment, how: How);
    /// Writes the base in memory to the agent's cache, beside what else it does.
    fn keep(&mut self, _: Draft) {}
    /// Does one piece of work: carries out stops, loads a trial, or makes one optimizer step.
    fn step(&mut self, emit: &mut dyn FnMut(Event));
    /// Whether [`Engine::step`] would do nothing.
    fn is_idle(&self) -> bool;
}
