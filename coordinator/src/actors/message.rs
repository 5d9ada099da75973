//! What agents and coordinator say to each other, in domain types; `grpc::agents` puts it on the wire.

use crate::error::CoordinatorError;
use domain::data::Reference;
use domain::fleet::{Agent, Beginning, Holding};
use domain::metric::MetricPoint;
use domain::sweep::Evaluations;
use domain::trial::{Digests, Failure, Note, TrialConfig, TrialSummary};
use domain::{Attempt, DeviceId, TrialId};
use std::collections::HashMap;
use std::time::Duration;
use telemetry::trace::Place;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// From an agent.
#[derive(Debug, Clone, PartialEq)]
pub enum FromAgent {
    /// Who speaks and what it holds.
    Hello(Agent, Vec<Holding>),
    /// A sign of life.
    Heartbeat {
        /// What the agent holds.
        holdings: Vec<Holding>,
        /// Each device's resident base, by device.
        resident_bases: HashMap<DeviceId, String>,
        /// How long the agent took from when it joined.
        beginning: Beginning,
    },
    /// Metric points of one trial.
    Metrics(Numbered<Vec<MetricPoint>>),
    /// Something happened to a trial.
    Event(Numbered<TrialEvent>),
}

/// A message about one trial that is to be acknowledged.
#[derive(Debug, Clone, PartialEq)]
pub struct Numbered<T> {
    /// The trial.
    pub trial: TrialId,
    /// The assignment.
    pub attempt: Attempt,
    /// The agent's running number of the message.
    pub sequence: u64,
    /// What it says.
    pub body: T,
}

impl<T> Numbered<T> {
    /// The same message with its body in other words.
    pub fn map<U>(self, say: impl FnOnce(T) -> U) -> Numbered<U> {
        let Self { trial, attempt, sequence, body } = self;
        Numbered { trial, attempt, sequence, body: say(body) }
    }
}

/// Something happened to a trial.
#[derive(Debug, Clone, PartialEq)]
pub enum TrialEvent {
    /// It trains.
    Started {
        /// Steps it will make if nothing ends it.
        total_steps: u64,
        /// Finished steps it starts from.
        start_step: u64,
        /// What is trained on what.
        digests: Option<Digests>,
    },
    /// It ended, with its last checkpoint uploaded before.
    Finished {
        /// How.
        ending: Ending,
        /// Its numbers.
        summary: Box<TrialSummary>,
        /// More about a divergence.
        message: String,
    },
    /// It could not go on.
    Failed(Failure),
    /// The agent gave it back unfinished.
    Released,
    /// Nothing changed: a line for its log.
    Noted(Note),
}

impl TrialEvent {
    /// Its name in logs.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Started { .. } => "started",
            Self::Finished { .. } => "finished",
            Self::Failed(_) => "failed",
            Self::Released => "released",
            Self::Noted(_) => "noted",
        }
    }
}

/// How a trial's training ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// It made all its steps.
    Completed,
    /// It was told to stop.
    Stopped,
    /// Its loss became NaN or infinite.
    Diverged,
}

/// To an agent.
#[derive(Debug, Clone, PartialEq)]
pub enum ToAgent {
    /// The session is open.
    Welcome {
        /// Time between heartbeats.
        heartbeat: Duration,
        /// Time without a heartbeat after which assignments go to other agents.
        lease: Duration,
        /// Holdings that are not current.
        drop: Vec<Holding>,
    },
    /// Train this.
    Assign(Box<Assignment>),
    /// End this.
    Stop(TrialId, Attempt, StopReason),
    /// Durable up to this sequence number.
    Acknowledge(TrialId, Attempt, u64),
    /// Fetch this uploaded data while nothing else is to be fetched. Takes the place of what was said before.
    Prefetch(Vec<Reference>),
}

/// Why an agent is to end a trial.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StopReason {
    /// The search, or the budget, ended it early.
    Search,
    /// A person ended it.
    Cancelled,
    /// It is to wait: checkpoint it and give it back.
    Release,
    /// The assignment is not current.
    Fenced,
}

/// A trial given to a device.
#[derive(Debug, Clone, PartialEq)]
pub struct Assignment {
    /// The trial.
    pub trial: TrialId,
    /// The assignment's number.
    pub attempt: Attempt,
    /// The device to train on.
    pub device: DeviceId,
    /// Every parameter that its device needs, with the value in force.
    pub config: TrialConfig,
    /// What its sweep asks of it once it is trained.
    pub evaluations: Option<Evaluations>,
    /// The step of the checkpoint to go on from.
    pub resume_step: Option<u64>,
    /// What earlier attempts were trained on.
    pub digests: Option<Digests>,
    /// Predicted peak bytes; 0 is unknown.
    pub predicted_peak_memory_bytes: u64,
    /// Where in a trace it belongs what the agent tells of it.
    pub belongs: Option<Place>,
}

/// Messages that may wait for a slow agent before its stream is cut.
pub const OUTBOX_CAPACITY: usize = 4096;

/// The way to an agent. It never waits: an agent so slow that [`OUTBOX_CAPACITY`] messages wait for it is cut
/// off, and says what it holds when it comes back. The stream ends when all clones are dropped.
#[derive(Debug, Clone)]
pub struct Outbox {
    sender: mpsc::Sender<Result<ToAgent, CoordinatorError>>,
    cut: CancellationToken,
}

/// The end of an [`Outbox`] that the stream reads.
pub type Outgoing = mpsc::Receiver<Result<ToAgent, CoordinatorError>>;

impl Outbox {
    /// An outbox and the end that the stream reads.
    pub fn new() -> (Self, Outgoing) {
        let (sender, receiver) = mpsc::channel(OUTBOX_CAPACITY);
        (Self { sender, cut: CancellationToken::new() }, receiver)
    }

    /// Sends, or says that the agent cannot be reached.
    pub fn send(&self, message: ToAgent) -> Result<(), Unreachable> {
        self.sender.try_send(Ok(message)).map_err(|_| Unreachable)
    }

    /// Ends the stream with an error.
    pub fn refuse(&self, error: CoordinatorError) {
        // If there is no room for it, the stream ends all the same, without saying why.
        let _ = self.sender.try_send(Err(error));
    }

    /// Tells the session to end: a newer stream of the agent has replaced it, or the agent is too slow.
    pub fn cut(&self) {
        self.cut.cancel();
    }

    /// Returns when the stream's reader is gone, or the stream was cut.
    pub async fn closed(&self) {
        tokio::select! {
            () = self.sender.closed() => {}
            () = self.cut.cancelled() => {}
        }
    }
}

/// The agent's stream is gone or too slow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the agent cannot be reached")]
pub struct Unreachable;
