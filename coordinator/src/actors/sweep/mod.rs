//! A running sweep: it owns the sweep's record, its trials and its search. Each change is durable before anyone
//! hears of it. The actor ends with the sweep.
//!
//! | file | holds |
//! |---|---|
//! | `mod.rs` | the handle: what may be asked |
//! | `running.rs` | the actor: what came together is applied together |
//! | `running/writing.rs` | what changed is written, then told |
//! | `log.rs` | what a change of a trial's record tells people |
//! | `traced.rs` | what it tells the trial's trace |
//! | `budget.rs` | which part of a budget is spent |
//! | `ledger.rs` | what happens to the records, without I/O |

mod budget;
mod ledger;
mod log;
mod running;
mod traced;

pub use traced::Stage;

pub use ledger::Standing;

use super::dispatcher::Dispatcher;
use super::message::TrialEvent;
use crate::artifacts::{Artifacts, Stored};
use crate::error::Result;
use crate::history::History;
use crate::store::{Checkpoint, Store, SweepRecord, TrialRecord};
use crate::trouble::Trouble;
use actor::{Gone, Mailbox, Reply, Scope};
use domain::metric::MetricPoint;
use domain::sweep::{Sweep, SweepSpec};
use domain::trial::{Trial, TrialState};
use domain::{AgentId, Attempt, Clock, SweepId, TrialId};
use futures::future::BoxFuture;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::broadcast;

/// Commands that may wait.
const CAPACITY: usize = 1024;

/// What the sweeps work with.
#[derive(Clone)]
pub struct Tools {
    /// The durable state.
    pub store: Store,
    /// Metric history.
    pub history: History,
    /// Checkpoints.
    pub artifacts: Artifacts,
    /// Devices.
    pub dispatcher: Dispatcher,
    /// What cannot be written, for people to see.
    pub trouble: Trouble,
    /// The hour.
    pub clock: Arc<dyn Clock>,
    /// Time between two looks at cost and budget.
    pub tick: Duration,
}

/// A sweep with its trials, by number.
#[derive(Debug, Clone)]
pub struct View {
    /// The sweep.
    pub sweep: Sweep,
    /// Its trials.
    pub trials: Vec<TrialRecord>,
}

/// Which of a sweep's trials are wanted.
#[derive(Debug, Clone, Default)]
pub struct Selection {
    /// Only trials with larger numbers.
    pub after: u32,
    /// At most so many.
    pub limit: usize,
    /// Only trials in one of these states; empty means all.
    pub states: Vec<TrialState>,
}

impl Selection {
    /// Whether a trial is in one of the states.
    pub fn wants(&self, record: &TrialRecord) -> bool {
        self.states.is_empty() || self.states.contains(&record.trial.state)
    }
}

/// What watchers hear.
#[derive(Debug, Clone)]
pub enum Change {
    /// The sweep as it stands.
    Sweep(Box<Sweep>),
    /// A trial as it stands, and its last value of the sweep's metric.
    Trial(Box<Trial>, Option<f64>),
    /// A running trial's newest point.
    Progress(TrialId, Attempt, MetricPoint),
}

/// What a sweep is asked.
enum Command {
    Query(Query),
    Mutation(Mutation),
}

/// What changes nothing.
enum Query {
    Sweep(Reply<Sweep>),
    View(Reply<View>),
    Watch(Reply<(View, broadcast::Receiver<Change>)>),
    Subscribe(Reply<broadcast::Receiver<Change>>),
    Trial(u32, Reply<Result<TrialRecord>>),
    Trials(Selection, Reply<Vec<TrialRecord>>),
    Standing(u32, Attempt, Option<AgentId>, Reply<Result<Standing>>),
}

/// What is answered once it is durable.
enum Mutation {
    Metrics(u32, Attempt, Vec<MetricPoint>, Reply<Result<()>>),
    Event(u32, Attempt, AgentId, Box<TrialEvent>, Reply<Result<()>>),
    Checkpoint(u32, Attempt, u64, Stored, Reply<Result<Vec<String>>>),
    CheckpointGone(u32, Attempt, Checkpoint, Reply<Result<()>>),
    StopTrial(u32, Reply<Result<TrialRecord>>),
    Cancel(Reply<Result<Sweep>>),
    Operate(Operation, Reply<Result<Sweep>>),
    /// Nothing.
    Settle(Reply<Sweep>),
}

/// What a person asks of a sweep beside ending it.
#[derive(Debug, Clone, PartialEq)]
pub enum Operation {
    /// Propose and train nothing until it is resumed.
    Pause,
    /// Go on.
    Resume,
    /// More trials, more budget, another space: the extension's request id, and the whole spec.
    Extend(String, Box<SweepSpec>),
    /// Try a trial again, by its number.
    Retry(u32),
}

impl Operation {
    /// Whether it makes a sweep that is over run again.
    pub fn reopens(&self) -> bool {
        matches!(self, Self::Extend(..) | Self::Retry(_))
    }
}

/// Speaks to a running sweep. Every call answers [`Gone`] once the sweep is over; its records then lie in the
/// store.
#[derive(Clone)]
pub struct SweepHandle(Mailbox<Command>);

impl SweepHandle {
    /// Starts a sweep from its records, new, after a restart, or to run again by an operation. `ended` is called
    /// when it is over.
    ///
    /// # Errors
    /// Its records or metrics cannot be read, or the operation is refused. What the disk refuses is written later.
    pub async fn start<F>(
        record: SweepRecord,
        trials: Vec<TrialRecord>,
        again: Option<Operation>,
        tools: Tools,
        scope: &Scope,
        ended: F,
    ) -> Result<Self>
    where
        F: FnOnce(SweepId) -> BoxFuture<'static, ()> + Send + 'static,
    {
        let id = record.sweep.id.clone();
        let sweep = running::RunningSweep::restore(record, trials, again, tools, scope.clone()).await?;
        let (mailbox, inbox) = actor::mailbox(CAPACITY);
        scope.spawn("sweep", async move {
            sweep.run(inbox).await;
            ended(id).await;
        });
        Ok(Self(mailbox))
    }

    /// The sweep as it stands, without its trials.
    pub async fn sweep(&self) -> std::result::Result<Sweep, Gone> {
        self.query(Query::Sweep).await
    }

    /// The sweep as it stands, with its trials.
    pub async fn view(&self) -> std::result::Result<View, Gone> {
        self.query(Query::View).await
    }

    /// The sweep as it stands, and every change after.
    pub async fn watch(&self) -> std::result::Result<(View, broadcast::Receiver<Change>), Gone> {
        self.query(Query::Watch).await
    }

    /// A trial as it stands.
    pub async fn trial(&self, number: u32) -> std::result::Result<Result<TrialRecord>, Gone> {
        self.query(|reply| Query::Trial(number, reply)).await
    }

    /// Some of its trials, in the order of their numbers.
    pub async fn trials(&self, selection: Selection) -> std::result::Result<Vec<TrialRecord>, Gone> {
        self.query(|reply| Query::Trials(selection, reply)).await
    }

    /// Whether a message about an attempt still counts; `by`: from that agent.
    pub async fn standing(
        &self,
        number: u32,
        attempt: Attempt,
        by: Option<AgentId>,
    ) -> std::result::Result<Result<Standing>, Gone> {
        self.query(|reply| Query::Standing(number, attempt, by, reply)).await
    }

    /// Durable points of an attempt.
    pub async fn metrics(
        &self,
        number: u32,
        attempt: Attempt,
        points: Vec<MetricPoint>,
    ) -> std::result::Result<Result<()>, Gone> {
        self.mutate(|reply| Mutation::Metrics(number, attempt, points, reply)).await
    }

    /// What an agent says of an attempt; durable when it returns.
    pub async fn event(
        &self,
        number: u32,
        attempt: Attempt,
        by: AgentId,
        event: TrialEvent,
    ) -> std::result::Result<Result<()>, Gone> {
        self.mutate(|reply| Mutation::Event(number, attempt, by, Box::new(event), reply)).await
    }

    /// An attempt's checkpoint is in the object store; durable when it returns. Answers with the paths that
    /// nothing points at any more.
    pub async fn checkpoint(
        &self,
        number: u32,
        attempt: Attempt,
        step: u64,
        stored: Stored,
    ) -> std::result::Result<Result<Vec<String>>, Gone> {
        self.mutate(|reply| Mutation::Checkpoint(number, attempt, step, stored, reply)).await
    }

    /// The checkpoint that an attempt was to go on from is not in the object store any more. Another attempt goes on without it
    /// when this returns.
    pub async fn checkpoint_gone(
        &self,
        number: u32,
        attempt: Attempt,
        gone: Checkpoint,
    ) -> std::result::Result<Result<()>, Gone> {
        self.mutate(|reply| Mutation::CheckpointGone(number, attempt, gone, reply)).await
    }

    /// Ends a trial for a person.
    pub async fn stop_trial(&self, number: u32) -> std::result::Result<Result<TrialRecord>, Gone> {
        self.mutate(|reply| Mutation::StopTrial(number, reply)).await
    }

    /// Ends the sweep for a person.
    pub async fn cancel(&self) -> std::result::Result<Result<Sweep>, Gone> {
        self.mutate(Mutation::Cancel).await
    }

    /// Does what a person asks; durable when it returns.
    pub async fn operate(&self, operation: Operation) -> std::result::Result<Result<Sweep>, Gone> {
        self.mutate(|reply| Mutation::Operate(operation, reply)).await
    }

    /// The sweep as it stands, once that is durable.
    pub async fn settled(&self) -> std::result::Result<Sweep, Gone> {
        self.mutate(Mutation::Settle).await
    }

    /// Every change from now on.
    pub async fn subscribe(&self) -> std::result::Result<broadcast::Receiver<Change>, Gone> {
        self.query(Query::Subscribe).await
    }

    async fn query<T>(&self, query: impl FnOnce(Reply<T>) -> Query) -> std::result::Result<T, Gone> {
        self.0.ask(|reply| Command::Query(query(reply))).await
    }

    async fn mutate<T>(&self, mutation: impl FnOnce(Reply<T>) -> Mutation) -> std::result::Result<T, Gone> {
        self.0.ask(|reply| Command::Mutation(mutation(reply))).await
    }
}
