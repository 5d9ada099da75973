//! The best trials run again with other seeds, in paused time: sweep, dispatcher and agents as they are, on the registry's
//! model, with a coordinator that ends and starts again in the midst; the agents train nothing.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use actor::Scope;
use coordinator::actors::directory::{Directory, Submission};
use coordinator::actors::dispatcher::{Dispatcher, Terms};
use coordinator::actors::message::{Ending, Outbox, ToAgent, TrialEvent};
use coordinator::actors::sweep::{Selection, Tools};
use coordinator::artifacts::Artifacts;
use coordinator::history::History;
use coordinator::store::Store;
use coordinator::trouble::Trouble;
use domain::fleet::{Agent, Beginning, Device, Holding};
use domain::sweep::{Replicates, Sweep, SweepSpec, SweepState};
use domain::trial::{Trial, TrialState, TrialSummary};
use domain::{AgentId, Attempt, Clock, DeviceId, SweepId, Timestamp, TrialId};
use registry::MemoryRegistry;
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// Time between an agent's reports, and between two looks at a budget.
const INTERVAL: Duration = Duration::from_secs(2);
const LEASE: Duration = Duration::from_secs(20);
const STEP: Duration = Duration::from_secs(1);
const STEPS: u64 = 5;

/// A clock that goes with tokio's paused time.
struct Paused(Instant);

impl Clock for Paused {
    fn now(&self) -> Timestamp {
        Timestamp(1_000_000_000 + self.monotonic().as_millis() as u64)
    }

    fn monotonic(&self) -> Duration {
        self.0.elapsed()
    }
}

/// What the agent trains: the attempt, the rank that its value is, and the steps made.
type Held = Arc<Mutex<BTreeMap<TrialId, (Attempt, u32, u64)>>>;

/// A coordinator and its agent, which can be started anew on the same records.
struct Bench {
    dir: tempfile::TempDir,
    registry: Arc<MemoryRegistry>,
    clock: Arc<Paused>,
    held: Held,
    scope: Scope,
    directory: Option<Directory>,
}

impl Bench {
    async fn start() -> Self {
        let mut bench = Self {
            dir: tempfile::tempdir().unwrap(),
            registry: Arc::new(MemoryRegistry::new()),
            clock: Arc::new(Paused(Instant::now())),
            held: Held::default(),
            scope: Scope::new(),
            directory: None,
        };
        bench.serve().await;
        bench
    }

    async fn serve(&mut self) {
        self.scope = Scope::new();
        let terms = Terms { heartbeat: INTERVAL, lease: LEASE };
        let dispatcher = Dispatcher::start(self.clock.clone(), terms, BTreeSet::new(), &self.scope);
        let tools = Tools {
            store: Store::lead(self.registry.clone(), "test").await.unwrap(),
            history: History::open(&self.dir.path().join("history")).unwrap(),
            artifacts: Artifacts::local(&self.dir.path().join("artifacts")).unwrap(),
            dispatcher: dispatcher.clone(),
            trouble: Trouble::new(self.clock.clone()),
            clock: self.clock.clone(),
            tick: INTERVAL,
        };
        let directory = Directory::start(tools, &self.scope).await.unwrap();
        let train = train(self.held.clone(), directory.clone(), dispatcher, self.scope.clone());
        self.scope.spawn("agent", train);
        self.directory = Some(directory);
    }

    /// Ends everything and starts it on the same records; the agent goes on with what it trained.
    async fn restart(&mut self) {
        assert!(self.scope.finish(LEASE).await);
        self.serve().await;
    }

    fn directory(&self) -> &Directory {
        self.directory.as_ref().unwrap()
    }

    async fn sweep(&self, id: &SweepId) -> Sweep {
        self.directory().sweep(id).await.unwrap()
    }

    async fn trials(&self, id: &SweepId) -> Vec<Trial> {
        let all = Selection { limit: 1000, ..Selection::default() };
        self.directory().trials(id, all).await.unwrap().into_iter().map(|record| record.trial).collect()
    }
}

fn agent() -> Agent {
    let device = Device {
        id: DeviceId::new("cpu"),
        accelerator: "CPU".into(),
        memory_bytes: 1 << 40,
        max_pack_size: 2,
        price_per_hour: 1.0,
        resident_base: None,
        simulated_speed: None,
    };
    let id = AgentId::new("agent");
    let (labels, understands) = (BTreeMap::new(), Default::default());
    Agent { id, version: "0".into(), hostname: "h".into(), devices: vec![device], labels, understands }
}

/// Makes a step of every trial each [`STEP`], and ends those that made [`STEPS`], until `scope` ends.
async fn train(held: Held, directory: Directory, dispatcher: Dispatcher, scope: Scope) {
    let id = agent().id;
    let (outbox, mut told) = Outbox::new();
    let holdings = || {
        let held = held.lock().unwrap();
        held.iter().map(|(t, (a, _, step))| Holding { trial: t.clone(), attempt: *a, step: *step }).collect()
    };
    let session = dispatcher.connect(agent(), holdings(), outbox).await.unwrap();
    let mut step = tokio::time::interval(STEP);
    loop {
        tokio::select! {
            () = scope.cancelled() => return,
            message = told.recv() => if let ToAgent::Assign(assign) = message.unwrap().unwrap() {
                let rank = assign.config.lora_rank;
                held.lock().unwrap().insert(assign.trial.clone(), (assign.attempt, rank, 0));
                let started = TrialEvent::Started { total_steps: STEPS, start_step: 0, digests: None };
                let _ = directory.event(&assign.trial, assign.attempt, &id, started).await;
            },
            _ = step.tick() => {
                let mut ended = Vec::new();
                held.lock().unwrap().retain(|trial, (attempt, rank, step)| {
                    *step += 1;
                    let over = *step >= STEPS;
                    if over {
                        ended.push((trial.clone(), *attempt, *rank));
                    }
                    !over
                });
                for (trial, attempt, rank) in ended {
                    let summary =
                        TrialSummary { steps: STEPS, eval_loss: Some(f64::from(rank)), ..TrialSummary::default() };
                    let (ending, summary) = (Ending::Completed, Box::new(summary));
                    let event = TrialEvent::Finished { ending, summary, message: String::new() };
                    let _ = directory.event(&trial, attempt, &id, event).await;
                }
                let _ = dispatcher.heartbeat(&id, session, holdings(), HashMap::new(), Beginning::default()).await;
            }
        }
    }
}

/// What was run again is the same with and without restarts, and each run is there once.
#[tokio::test(start_paused = true)]
async fn every_run_is_there_once_whenever_the_coordinator_ends() {
    let document = json!({
        "name": "s", "pretrained_model_id": "/m", "dataset_name": "/d", "max_steps": STEPS,
        "search": {"algorithm": "grid"}, "parameters": {"lora_rank": [4, 1, 3, 2]},
        "replicates": 4, "finalists": 2,
    });
    for every in [1000, 3, 7, 11] {
        let mut bench = Bench::start().await;
        let spec = Box::new(SweepSpec::from_document(document.as_object().unwrap()).unwrap());
        let submission = Submission {
            request_id: "r".into(),
            namespace: "default".into(),
            spec,
            base_models: BTreeMap::new(),
            submitted_by: None,
        };
        let id = bench.directory().submit(submission).await.unwrap().id;
        let mut half_steps = 0;
        while !bench.sweep(&id).await.state.is_terminal() {
            sleep(STEP / 2).await;
            half_steps += 1;
            assert!(half_steps < 10_000, "it goes on and on");
            if half_steps % every == 0 && half_steps < 200 {
                bench.restart().await;
            }
        }
        assert_eq!(bench.sweep(&id).await.state, SweepState::Completed);
        let trials = bench.trials(&id).await;
        assert!(trials.iter().all(|trial| trial.state == TrialState::Completed), "every {every}");
        let seed = trials[0].config.seed;
        let again = trials.iter().filter_map(|trial| {
            Some((trial.replicate_of.as_ref()?.number()?, trial.config.lora_rank, trial.config.seed))
        });
        let want = [2, 3, 4].map(|run| Replicates::seed(seed, run));
        let want = want.into_iter().flat_map(|seed| [(2, 1, seed), (4, 2, seed)]);
        assert_eq!(again.collect::<Vec<_>>(), want.collect::<Vec<_>>(), "every {every}");
        assert_eq!(bench.sweep(&id).await.best, Some((TrialId::of(&id, 2), 1.0)), "every {every}");
    }
}
