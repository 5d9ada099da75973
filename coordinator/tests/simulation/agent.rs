//! A simulated agent: it keeps to the protocol as the real one does (`gpu-agent/src/actors`), and trains by drawing up
//! numbers.

mod device;

use crate::draws::Draws;
use crate::link::{Line, Link};
use crate::plan::AgentPlan;
use crate::server::{self, Refused};
use crate::spool::{Assignment, Said, Spool};
use crate::world::World;
use coordinator::actors::message::{self, Ending, FromAgent, Numbered, StopReason, ToAgent, TrialEvent};
use domain::fleet::{Agent, Beginning, Device, Holding};
use domain::metric::{LOSS, MetricPoint};
use domain::rng;
use domain::trial::{Failure, FailureClass, TrialConfig, TrialSummary};
use domain::{AgentId, Clock, DeviceId};
use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until};

/// Of a device, in dollars.
pub const PRICE_PER_HOUR: f64 = 36.0;
/// What the values of an attempt that is not current differ by.
pub const FENCED: f64 = 1000.0;
/// Messages of a trial that may be sent before the first of them is acknowledged.
const WINDOW: u64 = 64;
/// The coordinator's time to answer a hello, or a call.
const LIMIT: Duration = Duration::from_secs(10);
/// The time to end in order.
const GRACE: Duration = Duration::from_secs(20);

/// What a trial's loss is at a step, whoever trains it.
pub fn loss(config: &TrialConfig, step: u64) -> f64 {
    let key = key(config);
    1.0 + rng::uniform(key, 0) + 2.0 / (step + 1) as f64 + 0.01 * rng::uniform(key, 1 + step)
}

/// The step at which it diverges, if it does.
pub fn diverges_at(config: &TrialConfig) -> Option<u64> {
    let key = rng::mix(key(config));
    (rng::uniform(key, 0) < 0.05).then(|| 1 + (rng::uniform(key, 1) * 8.0) as u64)
}

fn key(config: &TrialConfig) -> u64 {
    let searched = [config.learning_rate, f64::from(config.lora_rank), config.lora_alpha_in_force()];
    searched.iter().fold(0, |key, value| rng::mix(key ^ value.to_bits()))
}

/// What happens to an agent.
#[derive(Debug)]
pub enum Order {
    Kill { down: Duration, keeps_disk: bool },
    Leave(Duration),
    EngineDies,
    Repeat,
}

/// Starts an agent whenever it is not there. `idle` says whether it holds nothing and has nothing to say.
pub async fn supervise(
    world: Arc<World>,
    number: usize,
    plan: AgentPlan,
    link: Arc<Link>,
    mut orders: mpsc::UnboundedReceiver<Order>,
    idle: Arc<AtomicBool>,
) {
    let mut spool = Spool::default();
    let (mut lives, mut disks) = (0, 1);
    loop {
        lives += 1;
        let id = AgentId::new(format!("agent-{number}-{disks}"));
        let (tell, told) = mpsc::unbounded_channel();
        let draws = Draws::new(world.seed, &format!("agent {number} {lives}"));
        let mut leaves = Duration::ZERO;
        let down = {
            let life =
                Life::new(&world, id.clone(), plan.clone(), link.clone(), spool.clone(), draws, idle.clone());
            let mut life = pin!(life.run(told));
            loop {
                tokio::select! {
                    biased;
                    order = orders.recv() => match order {
                        None => return,
                        Some(Order::Kill { down, keeps_disk }) => {
                            world.say(id.as_str(), if keeps_disk { "is killed" } else { "is killed with its disk" });
                            if !keeps_disk {
                                spool = Spool::default();
                                disks += 1;
                            }
                            break down;
                        }
                        Some(order) => {
                            if let Order::Leave(down) = order {
                                leaves = down;
                            }
                            let _ = tell.send(order);
                        }
                    },
                    () = &mut life => {
                        world.say(id.as_str(), "has ended");
                        break leaves;
                    }
                }
            }
        };
        idle.store(false, Ordering::Relaxed);
        link.cut();
        tokio::select! {
            () = sleep(down) => {}
            () = world.healed.cancelled() => {}
        }
    }
}

/// A trial that it holds.
struct Held {
    config: TrialConfig,
    since: Instant,
    step: u64,
    /// Whether it trains; before, its checkpoint is being downloaded.
    admitted: bool,
    uploading: bool,
    /// The newest checkpoint that waits for its upload, and the number of the last message before it.
    newest: Option<(u64, Value, u64)>,
    failures: u32,
    /// The step of the last checkpoint.
    saved: Option<u64>,
    /// Its last word, said once nothing is left to upload; it trains no more.
    last: Option<TrialEvent>,
}

enum Transferred {
    Up(Assignment, u64, Value, Result<(), Refused>),
    Down(Assignment, u64, Result<(u64, Value), Refused>),
}

/// An agent from its start to its end.
struct Life {
    world: Arc<World>,
    id: AgentId,
    plan: AgentPlan,
    link: Arc<Link>,
    spool: Spool,
    draws: Draws,
    idle: Arc<AtomicBool>,
    held: BTreeMap<Assignment, Held>,
    /// For how long it held what it holds by words alone.
    let_go: BTreeMap<Assignment, Duration>,
    transfers: FuturesUnordered<BoxFuture<'static, Transferred>>,
    line: Option<Line>,
    is_welcome: bool,
    sent: BTreeMap<Assignment, u64>,
    pause: Duration,
    connect_at: Option<Instant>,
    /// The next sign of life; before the welcome, when it is waited for no more.
    beat_at: Option<Instant>,
    step_at: Instant,
    /// When it is over with waiting, once it is to end.
    ends_at: Option<Instant>,
}

impl Life {
    fn new(
        world: &Arc<World>,
        id: AgentId,
        plan: AgentPlan,
        link: Arc<Link>,
        spool: Spool,
        draws: Draws,
        idle: Arc<AtomicBool>,
    ) -> Self {
        for assignment in spool.unfinished() {
            spool.append(&assignment, true, Said::Event(failed("the agent was started again")));
        }
        let now = Instant::now();
        Self {
            world: world.clone(),
            id,
            plan,
            link,
            spool,
            draws,
            idle,
            held: BTreeMap::new(),
            let_go: BTreeMap::new(),
            transfers: FuturesUnordered::new(),
            line: None,
            is_welcome: false,
            sent: BTreeMap::new(),
            pause: Duration::from_millis(100),
            connect_at: Some(now),
            beat_at: None,
            step_at: now,
            ends_at: None,
        }
    }

    async fn run(mut self, mut orders: mpsc::UnboundedReceiver<Order>) {
        loop {
            self.send();
            let is_idle = self.held.is_empty() && self.spool.is_empty();
            self.idle.store(is_idle && self.is_welcome, Ordering::Relaxed);
            if self.ends_at.is_some_and(|at| is_idle || at <= Instant::now()) {
                return;
            }
            let trains = self.held.values().any(Held::trains);
            tokio::select! {
                biased;
                Some(order) = orders.recv() => self.obey(order),
                () = until(self.ends_at) => {}
                message = hear(&mut self.line) => match message {
                    Some(message) => self.hear(message),
                    None => self.disconnect(),
                },
                Some(done) = self.transfers.next() => self.transferred(done),
                () = until(Some(self.step_at)), if trains => self.step(),
                () = until(self.beat_at) => self.beat(),
                () = until(self.connect_at) => self.connect(),
            }
        }
    }

    fn say(&self, what: impl std::fmt::Display) {
        self.world.say(self.id.as_str(), what);
    }

    fn obey(&mut self, order: Order) {
        match order {
            Order::Leave(_) => {
                self.say("is to end");
                self.ends_at.get_or_insert(Instant::now() + GRACE);
                for assignment in self.held.keys().cloned().collect::<Vec<_>>() {
                    self.stop(&assignment, StopReason::Release);
                }
            }
            Order::EngineDies => {
                self.say("loses its engine");
                let training = self.held.iter().filter(|(_, held)| held.trains());
                for assignment in training.map(|(assignment, _)| assignment.clone()).collect::<Vec<_>>() {
                    self.end(&assignment, failed("the engine died"));
                }
            }
            Order::Repeat => self.sent.clear(),
            Order::Kill { .. } => {}
        }
    }

    fn connect(&mut self) {
        self.connect_at = None;
        match self.world.leader().filter(|_| !self.link.is_partitioned()) {
            Some(server) => {
                let line = self.link.connect(&self.world, &server);
                line.say(FromAgent::Hello(self.myself(), self.holdings()));
                (self.line, self.is_welcome) = (Some(line), false);
                self.sent.clear();
                self.beat_at = Some(Instant::now() + LIMIT);
            }
            None => self.disconnect(),
        }
    }

    fn disconnect(&mut self) {
        if std::mem::take(&mut self.is_welcome) {
            self.say("is cut off");
        }
        (self.line, self.beat_at) = (None, None);
        let pause = self.pause.as_millis() as u64;
        self.connect_at = Some(Instant::now() + self.draws.millis(pause / 2, pause));
        self.pause = (2 * self.pause).min(Duration::from_secs(5));
    }

    fn myself(&self) -> Agent {
        let device = Device {
            id: DeviceId::new("cpu"),
            accelerator: "CPU".into(),
            memory_bytes: 1 << 40,
            max_pack_size: self.plan.pack,
            price_per_hour: PRICE_PER_HOUR,
            price_from: None,
            resident_base: None,
            simulated_speed: None,
            compute_capability: None,
        };
        let (id, hostname) = (self.id.clone(), "h".into());
        let (labels, understands) = (BTreeMap::new(), Default::default());
        Agent { id, version: "0".into(), hostname, devices: vec![device], labels, understands }
    }

    /// What it holds, and what it holds only by words that are not acknowledged yet.
    fn holdings(&self) -> Vec<Holding> {
        let spooled = self.spool.assignments().into_iter().map(|of| {
            let held = self.let_go.get(&of).copied();
            (of, (0, held))
        });
        let mut holdings: BTreeMap<_, _> = spooled.collect();
        let held = |held: &Held| (held.step, Some(held.since.elapsed()));
        holdings.extend(self.held.iter().map(|(assignment, of)| (assignment.clone(), held(of))));
        let holding = |((trial, attempt), (step, held))| Holding { trial, attempt, step, held };
        holdings.into_iter().map(holding).collect()
    }

    fn beat(&mut self) {
        if !self.is_welcome {
            return self.disconnect();
        }
        let holdings = self.holdings();
        if let Some(line) = &self.line {
            line.say(FromAgent::Heartbeat {
                holdings,
                resident_bases: HashMap::new(),
                beginning: Beginning::default(),
            });
        }
        self.beat_at = Some(Instant::now() + server::TERMS.heartbeat);
    }

    /// Sends what was not sent on this stream.
    fn send(&mut self) {
        let Some(line) = self.line.as_ref().filter(|_| self.is_welcome) else { return };
        while let Some((assignment, sequence, said)) = self.spool.next(&self.sent, WINDOW) {
            let (trial, attempt) = assignment.clone();
            line.say(match said {
                Said::Points(body) => FromAgent::Metrics(Numbered { trial, attempt, sequence, body }),
                Said::Event(body) => FromAgent::Event(Numbered { trial, attempt, sequence, body }),
            });
            self.sent.insert(assignment, sequence);
        }
    }

    fn hear(&mut self, message: ToAgent) {
        match message {
            ToAgent::Welcome { drop, .. } => {
                self.say(format_args!("is welcome; drops {}", drop.len()));
                (self.is_welcome, self.pause) = (true, Duration::from_millis(100));
                self.beat_at = Some(Instant::now());
                for Holding { trial, attempt, .. } in drop {
                    self.let_go(&(trial, attempt));
                }
            }
            ToAgent::Assign(assignment) => self.assign(*assignment),
            ToAgent::Prefetch(_) => {}
            ToAgent::Stop(trial, attempt, StopReason::Fenced) => self.let_go(&(trial, attempt)),
            ToAgent::Stop(trial, attempt, reason) => {
                self.say(format_args!("is to stop {}: {reason:?}", name(&(trial.clone(), attempt))));
                self.stop(&(trial, attempt), reason);
            }
            ToAgent::Acknowledge(trial, attempt, sequence) => {
                let assignment = (trial, attempt);
                for said in self.spool.acknowledge(&assignment, sequence) {
                    self.check_durable(&assignment, &said);
                }
            }
        }
    }

    /// Drops what is not current, unless it is stubborn: the coordinator may not rely on that.
    fn let_go(&mut self, assignment: &Assignment) {
        match self.link.is_stubborn() {
            true => self.say(format_args!("does not drop {}", name(assignment))),
            false => self.forget(assignment),
        }
    }

    /// Nothing is acknowledged before it is durable. Points are looked for in the end: a gap shows those that are not.
    fn check_durable(&self, assignment: &Assignment, said: &Said) {
        let Said::Event(event) = said else { return };
        let known = (assignment.0.number().unwrap(), assignment.1);
        let seen = self.world.seen();
        let durable = match event {
            TrialEvent::Started { .. } => seen.ran.contains(&known) || seen.let_go.contains(&known),
            TrialEvent::Finished { .. } => seen.ended.contains(&known),
            TrialEvent::Failed(_) | TrialEvent::Released => seen.let_go.contains(&known),
            TrialEvent::Noted(_) => panic!("no agent of the simulation says that"),
        };
        drop(seen);
        self.say(format_args!("hears that {} is {}", name(assignment), event.name()));
        if !durable {
            let (name, event) = (name(assignment), event.name());
            self.world.find(format_args!("{name} is acknowledged as {event}, and no record says so"));
        }
    }

    fn assign(&mut self, assign: message::Assignment) {
        let assignment = (assign.trial.clone(), assign.attempt);
        if self.held.contains_key(&assignment) || self.spool.assignments().contains(&assignment) {
            return;
        }
        let of_trial = |other: &&Assignment| other.0 == assignment.0;
        let older: Vec<_> = self.held.keys().filter(of_trial).cloned().collect();
        if older.iter().any(|other| other.1 > assignment.1) {
            return;
        }
        older.iter().for_each(|older| self.forget(older));
        let start = assign.resume_step.unwrap_or(0);
        self.say(format_args!("is given {} from step {start}", name(&assignment)));
        self.check_assignment(&assignment, start);
        let held = Held {
            config: assign.config,
            since: Instant::now(),
            step: start,
            admitted: false,
            uploading: false,
            newest: None,
            failures: 0,
            saved: None,
            last: None,
        };
        self.held.insert(assignment.clone(), held);
        if self.ends_at.is_some() {
            self.stop(&assignment, StopReason::Release);
        } else if assign.resume_step.is_some() {
            self.download(assignment, start, 0);
        } else {
            self.admit(&assignment);
        }
    }

    /// Nothing is told before it is durable, and no work before an acknowledged checkpoint is done again.
    fn check_assignment(&self, assignment: &Assignment, start: u64) {
        let number = assignment.0.number().unwrap();
        let seen = self.world.seen();
        let known = seen.trials.get(&number).map_or(Default::default(), |record| record.trial.attempt);
        let acknowledged = seen.acknowledged.get(&number).copied().filter(|_| known == assignment.1);
        drop(seen);
        if known < assignment.1 {
            self.world.find(format_args!("{} is assigned, and no record says so", name(assignment)));
        }
        if let Some(step) = acknowledged.filter(|step| *step > start) {
            let name = name(assignment);
            self.world
                .find(format_args!("{name} starts at {start}; a checkpoint of {step} was acknowledged"));
        }
    }
}

impl Held {
    fn trains(&self) -> bool {
        self.admitted && self.last.is_none()
    }
}

fn failed(why: &str) -> TrialEvent {
    TrialEvent::Failed(Failure { class: FailureClass::Infrastructure, message: why.into() })
}

/// A trial's number and attempt: what it is called does not depend on the sweep's drawn name.
fn name((trial, attempt): &Assignment) -> String {
    format!("trial {} attempt {attempt}", trial.number().unwrap())
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}

async fn hear(line: &mut Option<Line>) -> Option<ToAgent> {
    match line {
        Some(line) => line.hear().await,
        None => std::future::pending().await,
    }
}
