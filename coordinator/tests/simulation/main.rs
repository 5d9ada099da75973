//! The coordinator under faults that a seed draws: its actors as they are, in paused time, on the registry's model, with
//! agents that train nothing. One seed is one schedule. What must hold is looked at with each durable write, with each
//! word that an agent hears, and in the end.
//!
//! | file | holds |
//! |---|---|
//! | `plan.rs` | what a seed draws: a sweep, agents, faults |
//! | `world.rs` | what all share: the durable state, who leads, what was found |
//! | `stores.rs` | the storage that a coordinator sees, which may be slow, full, or not its own any more |
//! | `server.rs` | a coordinator's process |
//! | `link.rs` | the network between it and an agent |
//! | `agent.rs`, `spool.rs` | an agent's process, and what of it outlives that |
//! | `checks.rs` | what must be true in the end |

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod agent;
mod checks;
mod draws;
mod link;
mod plan;
mod server;
mod spool;
mod stores;
mod world;

use coordinator::CoordinatorError;
use coordinator::actors::directory::Submission;
use coordinator::actors::sweep::Operation;
use coordinator::store::Batch;
use domain::sweep::{SweepSpec, SweepState};
use domain::{AgentId, SweepId, TrialId};
use futures::FutureExt;
use futures::future::BoxFuture;
use link::Link;
use plan::{Fault, Plan, STUBBORN};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use world::World;

/// Schedules, unless more are asked for.
const SCHEDULES: u64 = 1000;
/// The time in which everything must be over once nothing goes wrong any more.
const HEALED: Duration = Duration::from_secs(3600);
/// The time that a person waits for an answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a server answers to a question.
type Answer = BoxFuture<'static, Result<(), CoordinatorError>>;

/// What came of a schedule.
struct Outcome {
    findings: Vec<String>,
    log: Vec<String>,
}

#[test]
fn drawn_schedules_of_faults_break_no_promise() {
    let seeds = tests::seeds_up_to(SCHEDULES);
    let (next, failed) = (AtomicU64::new(0), Mutex::new(Vec::new()));
    let work = || {
        while let Some(seed) = seeds.get(next.fetch_add(1, Ordering::Relaxed) as usize) {
            let outcome = run(*seed);
            if !outcome.findings.is_empty() {
                failed.lock().unwrap().push((*seed, outcome));
            }
        }
    };
    std::thread::scope(|scope| {
        let threads = std::thread::available_parallelism().map_or(2, usize::from);
        (0..threads).for_each(|_| drop(scope.spawn(work)));
    });
    let mut failed = failed.into_inner().unwrap();
    failed.sort_by_key(|(seed, _)| *seed);
    assert!(failed.is_empty(), "{}", told(&failed, seeds.len()));
}

/// What to know of the schedules that failed, and how to see one again.
fn told(failed: &[(u64, Outcome)], all: usize) -> String {
    let mut text = format!("{} of {all} schedules failed\n", failed.len());
    for (seed, outcome) in failed.iter().take(20) {
        text += &format!("seed {seed}:\n  {}\n", outcome.findings.join("\n  "));
    }
    if let [(_, outcome)] = failed {
        text += &format!("what happened:\n  {}\n", outcome.log.join("\n  "));
    }
    let seed = failed.first().map_or(0, |(seed, _)| *seed);
    text + &format!(
        "replay: LORAFLEET_SEED={seed} cargo test --release -p lorafleet-coordinator --test simulation"
    )
}

#[test]
fn one_seed_is_one_schedule() {
    for seed in 1..=30 {
        let (first, second) = (run(seed).log, run(seed).log);
        if let Some(at) = (0..first.len().max(second.len())).find(|at| first.get(*at) != second.get(*at)) {
            let (from, until) = (at.saturating_sub(5), at + 3);
            let part = |log: &[String]| log[from.min(log.len())..until.min(log.len())].join("\n  ");
            panic!("seed {seed}:\n  {}\nis not\n  {}", part(&first), part(&second));
        }
    }
}

fn run(seed: u64) -> Outcome {
    // Memory, where there is a folder of it: what a coordinator flushes to its disk is many small files.
    let memory = Path::new("/dev/shm");
    let dir = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    runtime.unwrap().block_on(simulate(seed, dir.path()))
}

async fn simulate(seed: u64, dir: &Path) -> Outcome {
    let plan = Plan::draw(seed);
    let world = World::new(seed, dir.join("history"));
    world.say("plan", &plan.document);
    let fleet = Arc::new(Fleet::start(&world, &plan));
    let story = async {
        let Some(sweep) = fleet.submit(&plan.document).await else { return };
        for (at, fault) in &plan.faults {
            sleep_until(fleet.start + *at).await;
            fleet.apply(&sweep, fault.clone());
        }
        sleep(plan.rest).await;
        fleet.heal();
        fleet.end(&sweep).await;
    };
    tokio::select! {
        () = story => {}
        () = world.scope.cancelled() => world.find("a task of the simulation panicked"),
    }
    world.scope.cancel();
    if let Some(server) = world.leader() {
        server.scope.finish(Duration::from_secs(10)).await;
    }
    // They hold each other.
    world.leader.send_replace(None);
    if world.seen().sweep.is_some() {
        checks::check(&world, plan.agents.len()).await;
    }
    let findings = std::mem::take(&mut world.seen().findings);
    Outcome { findings, log: world.log() }
}

/// The processes, and what is done to them.
struct Fleet {
    world: Arc<World>,
    start: Instant,
    coordinator: mpsc::UnboundedSender<server::Order>,
    agents: Vec<mpsc::UnboundedSender<agent::Order>>,
    links: Vec<Arc<Link>>,
    idle: Vec<Arc<AtomicBool>>,
    /// The sweep's document, as it was extended last.
    document: Mutex<Value>,
    drained: Mutex<Vec<AgentId>>,
}

impl Fleet {
    fn start(world: &Arc<World>, plan: &Plan) -> Self {
        let (coordinator, orders) = mpsc::unbounded_channel();
        world.scope.spawn("coordinator", until_over(world, server::supervise(world.clone(), orders)));
        let (mut agents, mut links, mut idle) = (Vec::new(), Vec::new(), Vec::new());
        for (number, of) in plan.agents.iter().enumerate() {
            let (tell, orders) = mpsc::unbounded_channel();
            let (link, rests) = (Arc::new(Link::new(world.seed, number)), Arc::new(AtomicBool::new(false)));
            let life =
                agent::supervise(world.clone(), number, of.clone(), link.clone(), orders, rests.clone());
            world.scope.spawn("agent", until_over(world, life));
            agents.push(tell);
            links.push(link);
            idle.push(rests);
        }
        let document = Mutex::new(plan.document.clone());
        let (world, start) = (world.clone(), Instant::now());
        Self { world, start, coordinator, agents, links, idle, document, drained: Mutex::default() }
    }

    /// Submits the sweep until it is accepted.
    async fn submit(&self, document: &Value) -> Option<SweepId> {
        let spec = match SweepSpec::from_document(document.as_object().unwrap()) {
            Ok(spec) => Box::new(spec),
            Err(problems) => {
                self.world.find(format_args!("{document} is no sweep: {problems:?}"));
                return None;
            }
        };
        loop {
            let submission = Submission {
                namespace: "default".into(),
                request_id: "r".into(),
                spec: spec.clone(),
                base_models: BTreeMap::new(),
                submitted_by: None,
            };
            if let Some(server) = self.world.leader()
                && let Ok(Ok(sweep)) = timeout(PATIENCE, server.desk.directory.submit(submission)).await
            {
                return Some(sweep.id);
            }
            sleep(Duration::from_millis(100)).await;
        }
    }

    fn apply(self: &Arc<Self>, sweep: &SweepId, fault: Fault) {
        self.world.say("fault", format_args!("{fault:?}"));
        // Whoever is told and not there has ended with the schedule.
        match fault {
            Fault::KillAgent { agent, down, keeps_disk } => {
                let _ = self.agents[agent].send(agent::Order::Kill { down, keeps_disk });
            }
            Fault::Leave { agent, down } => drop(self.agents[agent].send(agent::Order::Leave(down))),
            Fault::EngineDies(agent) => drop(self.agents[agent].send(agent::Order::EngineDies)),
            Fault::Repeat(agent) => drop(self.agents[agent].send(agent::Order::Repeat)),
            Fault::Cut(agent) => self.links[agent].cut(),
            Fault::Partition { agent, length, stubborn } => {
                self.links[agent].partition(true);
                self.links[agent].set_stubborn(stubborn);
                self.later(length, move |fleet| fleet.links[agent].partition(false));
                self.later(length + STUBBORN, move |fleet| fleet.links[agent].set_stubborn(false));
            }
            Fault::Delay(agent, length, slowest_ms) => {
                self.links[agent].slow(slowest_ms);
                self.later(length, move |fleet| fleet.links[agent].slow(0));
            }
            Fault::KillCoordinator(down) => drop(self.coordinator.send(server::Order::Kill(down))),
            Fault::TakeOver(limit) => drop(self.coordinator.send(server::Order::TakeOver(limit))),
            Fault::Full(storage, length) => {
                self.world.set_full(storage, true);
                self.later(length, move |fleet| fleet.world.set_full(storage, false));
            }
            Fault::Drain(agent, length) => {
                let id = AgentId::new(format!("agent-{agent}-1"));
                self.drained.lock().unwrap().push(id.clone());
                self.ask("drain", drain(id.clone(), true));
                self.later(length, move |fleet| fleet.ask("undrain", drain(id, false)));
            }
            Fault::Pause(length) => {
                self.operate(sweep, Operation::Pause);
                let sweep = sweep.clone();
                self.later(length, move |fleet| fleet.operate(&sweep, Operation::Resume));
            }
            Fault::Cancel => {
                let id = sweep.clone();
                self.ask("cancel", move |server| {
                    async move { server.desk.directory.cancel(&id).await.map(drop) }.boxed()
                });
            }
            Fault::Extend => self.extend(sweep),
            Fault::StopTrial(number) => {
                let trial = TrialId::of(sweep, number);
                self.ask("stop a trial", move |server| {
                    async move { server.desk.directory.stop_trial(&trial).await.map(drop) }.boxed()
                });
            }
            Fault::Retry(number) => {
                self.world.seen().may_reopen = true;
                self.operate(sweep, Operation::Retry(number));
            }
            Fault::Jump(hours) => self.world.clock.jump(hours),
        }
    }

    fn extend(&self, sweep: &SweepId) {
        let mut document = self.document.lock().unwrap();
        let raised = |value: &Value| json!(2.0 * value.as_f64().unwrap());
        if let Some(most) = document["search"].get("max_trials").and_then(Value::as_u64) {
            document["search"]["max_trials"] = json!(most + 2);
        } else if let Some(most) = document.get("budget").and_then(|budget| budget.get("max_cost_usd")) {
            document["budget"]["max_cost_usd"] = raised(most);
        } else {
            document["parameters"]["lora_rank"] = json!([2, 4, 6, 8, 10]);
        }
        self.world.seen().may_reopen = true;
        let spec = Box::new(SweepSpec::from_document(document.as_object().unwrap()).unwrap());
        self.operate(sweep, Operation::Extend(format!("extension of {document}"), spec));
    }

    fn operate(&self, sweep: &SweepId, operation: Operation) {
        let id = sweep.clone();
        let what = match &operation {
            Operation::Pause => "pause",
            Operation::Resume => "resume",
            Operation::Extend(..) => "extend",
            Operation::Retry(_) => "retry",
        };
        self.ask(what, move |server| {
            async move { server.desk.directory.operate(&id, operation).await.map(drop) }.boxed()
        });
    }

    /// Asks whoever leads, who may refuse, be gone, or never answer.
    fn ask(&self, what: &'static str, question: impl FnOnce(Arc<server::Server>) -> Answer + Send + 'static) {
        let world = self.world.clone();
        let task = async move {
            let Some(server) = world.leader() else { return world.say(what, "nobody leads") };
            let done = timeout(PATIENCE, question(server)).await;
            let (came, why) = match done {
                Err(_) => ("no answer", String::new()),
                Ok(Ok(())) => ("done", String::new()),
                // Its text may have the sweep's drawn name in it.
                Ok(Err(error)) => {
                    ("refused", format!("{error:?}").chars().take_while(|c| c.is_alphanumeric()).collect())
                }
            };
            world.say(what, format_args!("{came} {why}"));
        };
        self.world.scope.spawn("question", until_over(&self.world, task));
    }

    fn later(self: &Arc<Self>, after: Duration, then: impl FnOnce(&Arc<Self>) + Send + 'static) {
        let fleet = self.clone();
        let task = async move {
            sleep(after).await;
            then(&fleet);
        };
        self.world.scope.spawn("later", until_over(&self.world, task));
    }

    /// Nothing goes wrong any more.
    fn heal(&self) {
        self.world.say("fault", "none any more");
        self.world.healed.cancel();
        for storage in [plan::Storage::Registry, plan::Storage::History, plan::Storage::Artifacts] {
            self.world.set_full(storage, false);
        }
        for link in &self.links {
            link.partition(false);
            link.set_stubborn(false);
            link.slow(0);
        }
    }

    /// Waits for the end of everything, then starts the coordinator once more.
    async fn end(&self, sweep: &SweepId) {
        let until = Instant::now() + HEALED;
        loop {
            let state = self.world.seen().sweep.as_ref().map(|record| record.sweep.state);
            let state = state.unwrap_or(SweepState::Running);
            let idle = self.idle.iter().all(|idle| idle.load(Ordering::Relaxed));
            if state.is_terminal() && idle && self.world.leader().is_some() {
                break;
            }
            if Instant::now() > until {
                let idle: Vec<_> = self.idle.iter().map(|idle| idle.load(Ordering::Relaxed)).collect();
                return self
                    .world
                    .find(format_args!("an hour later the sweep is {state}; idle agents: {idle:?}"));
            }
            if state == SweepState::Paused {
                self.operate(sweep, Operation::Resume);
            }
            for agent in self.drained.lock().unwrap().iter() {
                self.ask("undrain", drain(agent.clone(), false));
            }
            sleep(Duration::from_secs(10)).await;
        }
        let number = || self.world.leader().map(|server| server.number);
        let before = number();
        let _ = self.coordinator.send(server::Order::Kill(Duration::ZERO));
        while number().is_none_or(|number| Some(number) == before) {
            if Instant::now() > until {
                return self.world.find("the coordinator does not start again");
            }
            sleep(Duration::from_secs(1)).await;
        }
    }
}

fn drain(agent: AgentId, drained: bool) -> impl FnOnce(Arc<server::Server>) -> Answer + Send + 'static {
    move |server| {
        async move {
            let mut batch = Batch::default();
            batch.drain(&agent, drained);
            server.desk.directory.store().commit(batch).await?;
            server.desk.dispatcher.drain(agent, drained).await?;
            Ok(())
        }
        .boxed()
    }
}

/// Runs a task until the simulation is over.
fn until_over(world: &World, task: impl Future<Output = ()> + Send + 'static) -> BoxFuture<'static, ()> {
    let scope = world.scope.clone();
    async move {
        tokio::select! {
            biased;
            () = scope.cancelled() => {}
            () = task => {}
        }
    }
    .boxed()
}
