//! The best trials run again with other seeds, in paused time: sweep, dispatcher and agents as they are, on the registry's
//! model, with a coordinator that ends and starts again in the midst; the agents train nothing.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "common/fleet.rs"]
mod fleet;

use actor::Scope;
use coordinator::actors::directory::Directory;
use coordinator::actors::dispatcher::Dispatcher;
use coordinator::actors::message::{Ending, Outbox, ToAgent, TrialEvent};
use coordinator::actors::sweep::Selection;
use domain::fleet::{Agent, Beginning, Holding};
use domain::sweep::{Replicates, Sweep, SweepState};
use domain::trial::{Trial, TrialState, TrialSummary};
use domain::{Attempt, SweepId, TrialId};
use fleet::{Jumping, LEASE, served, submission};
use registry::MemoryRegistry;
use serde_json::json;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::time::sleep;

const STEP: Duration = Duration::from_secs(1);
const STEPS: u64 = 5;

/// What the agent trains: the attempt, the rank that its value is, and the steps made.
type Held = Arc<Mutex<BTreeMap<TrialId, (Attempt, u32, u64)>>>;

/// A coordinator and its agent, which can be started anew on the same records.
struct Bench {
    dir: tempfile::TempDir,
    registry: Arc<MemoryRegistry>,
    clock: Arc<Jumping>,
    held: Held,
    scope: Scope,
    directory: Option<Directory>,
}

impl Bench {
    async fn start() -> Self {
        let mut bench = Self {
            dir: tempfile::tempdir().unwrap(),
            registry: Arc::new(MemoryRegistry::new()),
            clock: Arc::new(Jumping::new()),
            held: Held::default(),
            scope: Scope::new(),
            directory: None,
        };
        bench.serve().await;
        bench
    }

    async fn serve(&mut self) {
        self.scope = Scope::new();
        let (directory, dispatcher) = served(self.dir.path(), &self.registry, &self.clock, &self.scope).await;
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
    fleet::agent("agent", 2, 1.0)
}

/// Makes a step of every trial each [`STEP`], and ends those that made [`STEPS`], until `scope` ends.
async fn train(held: Held, directory: Directory, dispatcher: Dispatcher, scope: Scope) {
    let id = agent().id;
    let (outbox, mut told) = Outbox::new();
    let holdings = || {
        let held = held.lock().unwrap();
        held.iter()
            .map(|(t, (a, _, step))| Holding { trial: t.clone(), attempt: *a, step: *step, held: None })
            .collect()
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
        let id = bench.directory().submit(submission(&document)).await.unwrap().id;
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
