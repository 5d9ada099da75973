//! The dispatcher: agents, their devices, the queue of waiting trials, and which device holds which trial until
//! when. It decides by [`placement::solve`] and never waits for anyone: a grant goes out through the one-shot
//! that came with the request, a loss through the one that went out with the grant.
//!
//! | file | holds |
//! |---|---|
//! | `mod.rs` | the handle: what may be asked |
//! | `state.rs`, `state/` | the actor: agents and leases; which device gets what; what namespaces hold; who is told what to fetch ahead |
//! | `ahead.rs` | what agents are told to fetch before they need it |

mod ahead;
mod state;

use super::message::{Outbox, ToAgent};
use crate::placement::Waiting;
use actor::{Gone, Mailbox, Reply, Scope};
use config::limits::Limits;
use domain::data::Reference;
use domain::fleet::{Agent, Beginning, Holding};
use domain::trial::TrialDevice;
use domain::{AgentId, Attempt, Clock, DeviceId, SweepId, Timestamp, TrialId};
use security::watched::Watched;
use state::State;
use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;

/// Commands that may wait, and that are taken together at most.
const CAPACITY: usize = 1024;

/// A trial that wants a device. Dropping `granted`'s other end withdraws it.
#[derive(Debug)]
pub struct Request {
    /// The trial.
    pub trial: TrialId,
    /// The number that its assignment will have.
    pub attempt: Attempt,
    /// When the search proposed it: the oldest goes first.
    pub created_at: Timestamp,
    /// What it needs.
    pub needs: Waiting,
    /// The uploaded data that it names.
    pub data: Vec<Reference>,
    /// Where the grant goes.
    pub granted: oneshot::Sender<Grant>,
}

/// A device for a trial. Dropping it gives the device back when the lease ends at the latest.
#[derive(Debug)]
pub struct Grant {
    /// The agent.
    pub agent: AgentId,
    /// Its device.
    pub device: DeviceId,
    /// The device's price, in US dollars an hour of everybody's time.
    pub price_per_hour: f64,
    /// What the device is.
    pub is: Option<TrialDevice>,
    /// When it was decided.
    pub at: Timestamp,
    /// Answers if the lease ends.
    pub lost: Lost,
}

/// Answers if a lease ends, with the device time used: seconds × the trial's share of the device.
pub type Lost = oneshot::Receiver<f64>;

/// A trial that was assigned before this coordinator started.
#[derive(Debug)]
pub struct Expected {
    /// The trial.
    pub trial: TrialId,
    /// The assignment.
    pub attempt: Attempt,
    /// The agent that holds it.
    pub agent: AgentId,
    /// The agent's device.
    pub device: DeviceId,
    /// What it needs.
    pub needs: Waiting,
    /// Until when its device was charged for, by the coordinator before; `None`: it was not.
    pub charged: Option<Charged>,
}

/// Until when an assignment was charged for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Charged {
    /// The hour of that, which may have been put on or back since.
    pub at: Timestamp,
    /// For how long the device had held the trial then. `None`: it is not known, as an earlier version did not keep it, or its
    /// agent does not say it.
    pub held: Option<Duration>,
}

/// What a trial used of its device since it was assigned.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Used {
    /// Seconds of device time × its share of the device, as [`Lost`] has it.
    pub seconds: f64,
    /// The time for which the device held it, whoever shared it, as far as it was counted; see [`Charged::held`].
    pub held: Option<Duration>,
}

/// An agent as people see it.
#[derive(Debug, Clone)]
pub struct AgentView {
    /// The agent.
    pub agent: Agent,
    /// Whether its session is open.
    pub connected: bool,
    /// When it was last heard from.
    pub last_seen: Timestamp,
    /// Whether a person drained it: it gets no trials.
    pub drained: bool,
    /// Trials it holds.
    pub trials: Vec<TrialId>,
    /// How long it took from when it joined.
    pub beginning: Beginning,
}

/// One opening of an agent's stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionId(u64);

/// The terms on which an agent holds trials.
#[derive(Debug, Clone, Copy)]
pub struct Terms {
    /// Time between heartbeats.
    pub heartbeat: Duration,
    /// Time without a heartbeat after which assignments go to other agents.
    pub lease: Duration,
}

/// What the dispatcher is asked.
#[derive(Debug)]
enum Command {
    Connect(Agent, Vec<Holding>, Outbox, Reply<SessionId>),
    Heartbeat(
        AgentId,
        SessionId,
        Vec<Holding>,
        HashMap<DeviceId, String>,
        Beginning,
        Reply<Option<Vec<Holding>>>,
    ),
    Disconnect(AgentId, SessionId),
    Enqueue(Request),
    Expect(Expected, Reply<Lost>),
    Serve,
    Send(TrialId, Attempt, ToAgent),
    Release(TrialId, Attempt, bool, Reply<Option<f64>>),
    Used(Vec<TrialId>, Reply<Vec<(TrialId, Used)>>),
    Abandon(Vec<TrialId>, Reply<Vec<(TrialId, f64)>>),
    Agents(Reply<Vec<AgentView>>),
    Drain(AgentId, bool, Reply<Option<AgentView>>),
    Limit(Arc<Watched<Limits>>),
    HeldBack(String, Reply<Option<String>>),
    Lacking(SweepId, Reply<Option<String>>),
}

/// Speaks to the dispatcher.
#[derive(Debug, Clone)]
pub struct Dispatcher(Mailbox<Command>);

impl Dispatcher {
    /// Starts the dispatcher, which gives nothing to `drained` agents. It ends with `scope`; assignments live on in
    /// the sweeps' records.
    pub fn start(clock: Arc<dyn Clock>, terms: Terms, drained: BTreeSet<AgentId>, scope: &Scope) -> Self {
        let (mailbox, inbox) = actor::mailbox(CAPACITY);
        let state = State::new(clock, terms, drained);
        let ends = scope.clone();
        scope.spawn("dispatcher", async move { state.run(inbox, ends).await });
        Self(mailbox)
    }

    /// What is left of a dispatcher that is gone: it tells of these agents, and nothing else. It ends with `scope`.
    pub fn retired(agents: Vec<AgentView>, scope: &Scope) -> Self {
        let (mailbox, mut inbox) = actor::mailbox(CAPACITY);
        let ends = scope.clone();
        scope.spawn("retired dispatcher", async move {
            let tell = async {
                while let Some(command) = inbox.recv().await {
                    // Whoever asked and is gone since does not need the answer.
                    match command {
                        Command::Agents(reply) => drop(reply.send(agents.clone())),
                        Command::HeldBack(_, reply) | Command::Lacking(_, reply) => drop(reply.send(None)),
                        // Nobody is left who would say or ask this; whoever does is told that it is gone. Each by name, so that
                        // what is asked anew is not left without an answer.
                        Command::Connect(..)
                        | Command::Heartbeat(..)
                        | Command::Disconnect(..)
                        | Command::Enqueue(_)
                        | Command::Expect(..)
                        | Command::Serve
                        | Command::Send(..)
                        | Command::Release(..)
                        | Command::Used(..)
                        | Command::Abandon(..)
                        | Command::Drain(..)
                        | Command::Limit(_) => {}
                    }
                }
            };
            tokio::select! {
                () = tell => {}
                () = ends.cancelled() => {}
            }
        });
        Self(mailbox)
    }

    /// An agent's stream opened: welcomes it, renews the leases of what it holds, and says what it should not
    /// hold. Replaces an older stream of the same agent.
    pub async fn connect(
        &self,
        agent: Agent,
        holdings: Vec<Holding>,
        outbox: Outbox,
    ) -> Result<SessionId, Gone> {
        self.0.ask(|reply| Command::Connect(agent, holdings, outbox, reply)).await
    }

    /// A sign of life: renews the leases of what the agent holds, and answers with what it holds but should
    /// not. `None`: a newer stream of the same agent has replaced this one.
    pub async fn heartbeat(
        &self,
        agent: &AgentId,
        session: SessionId,
        holdings: Vec<Holding>,
        resident_bases: HashMap<DeviceId, String>,
        beginning: Beginning,
    ) -> Result<Option<Vec<Holding>>, Gone> {
        let agent = agent.clone();
        let beat = |reply| Command::Heartbeat(agent, session, holdings, resident_bases, beginning, reply);
        self.0.ask(beat).await
    }

    /// An agent's stream closed. Its leases run on.
    pub async fn disconnect(&self, agent: AgentId, session: SessionId) -> Result<(), Gone> {
        self.0.tell(Command::Disconnect(agent, session)).await
    }

    /// A trial waits for a device.
    pub async fn enqueue(&self, request: Request) -> Result<(), Gone> {
        self.0.tell(Command::Enqueue(request)).await
    }

    /// A trial was assigned before this coordinator started: its agent has one full lease to come back, from
    /// [`Dispatcher::serve`] on.
    pub async fn expect(&self, expected: Expected) -> Result<Lost, Gone> {
        self.0.ask(|reply| Command::Expect(expected, reply)).await
    }

    /// Agents can come back from now on. What a coordinator takes to get there, which has much to read, is no silence of theirs.
    pub async fn serve(&self) -> Result<(), Gone> {
        self.0.tell(Command::Serve).await
    }

    /// Sends a message to the agent that holds the assignment. A stop reaches it after a reconnection too;
    /// what else cannot be sent is made good when the lease ends.
    pub async fn send(&self, trial: TrialId, attempt: Attempt, message: ToAgent) -> Result<(), Gone> {
        self.0.tell(Command::Send(trial, attempt, message)).await
    }

    /// The device is free of the trial. `given_back`: the agent did so; unless it was asked to, it leaves, and gets
    /// no more until it connects anew. Answers with the device time used, as [`Lost`] does; `None` if it answers, because the
    /// lease ended before.
    pub async fn release(
        &self,
        trial: TrialId,
        attempt: Attempt,
        given_back: bool,
    ) -> Result<Option<f64>, Gone> {
        self.0.ask(|reply| Command::Release(trial, attempt, given_back, reply)).await
    }

    /// What each held trial of these used since it was assigned.
    pub async fn used(&self, trials: Vec<TrialId>) -> Result<Vec<(TrialId, Used)>, Gone> {
        self.0.ask(|reply| Command::Used(trials, reply)).await
    }

    /// Takes those of these trials off their devices whose agents are away, and answers with them and the device
    /// time they used. An agent that comes back is told to drop them.
    pub async fn abandon(&self, trials: Vec<TrialId>) -> Result<Vec<(TrialId, f64)>, Gone> {
        self.0.ask(|reply| Command::Abandon(trials, reply)).await
    }

    /// Every agent that connected since this coordinator started and is not gone for long, by id.
    pub async fn agents(&self) -> Result<Vec<AgentView>, Gone> {
        self.0.ask(Command::Agents).await
    }

    /// Keeps namespaces within these limits from now on. What they hold already stays.
    pub async fn limit(&self, limits: Arc<Watched<Limits>>) -> Result<(), Gone> {
        self.0.tell(Command::Limit(limits)).await
    }

    /// Why waiting trials of a namespace get no device whatever there is: which of its limits is reached. `None` if none
    /// is.
    pub async fn held_back(&self, namespace: &str) -> Result<Option<String>, Gone> {
        self.0.ask(|reply| Command::HeldBack(namespace.into(), reply)).await
    }

    /// What waiting trials of a sweep must run on and no agent has that is there: accelerators, or devices that compute with
    /// their numbers. `None` if nothing is lacking, or nobody is there at all.
    pub async fn lacking(&self, sweep: SweepId) -> Result<Option<String>, Gone> {
        self.0.ask(|reply| Command::Lacking(sweep, reply)).await
    }

    /// Gives an agent no more trials and takes back what it holds, or ends that. `None`: no such agent connected since
    /// this coordinator started.
    pub async fn drain(&self, agent: AgentId, drained: bool) -> Result<Option<AgentView>, Gone> {
        self.0.ask(|reply| Command::Drain(agent, drained, reply)).await
    }
}
