//! What a sweep may spend, in paused time: sweeps, dispatcher and agents as they are, on the registry's model; the
//! agents train nothing.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "common/fleet.rs"]
mod fleet;

use actor::Scope;
use coordinator::actors::directory::Directory;
use coordinator::actors::dispatcher::Dispatcher;
use coordinator::actors::message::{Ending, Outbox, ToAgent, TrialEvent};
use coordinator::actors::sweep::{Operation, Selection};
use domain::fleet::{Agent, Beginning, Holding};
use domain::sweep::{Sweep, SweepSpec, SweepState};
use domain::trial::TrialSummary;
use domain::{Attempt, Clock, SweepId, TrialId};
use fleet::{INTERVAL, Jumping, LEASE, served, submission};
use registry::MemoryRegistry;
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// Of a step. A trial that is told to end does so at its next one.
const STEP: Duration = Duration::from_secs(1);
/// Of a device.
const PER_HOUR: f64 = 3600.0;
const HOUR_MS: i64 = 3_600_000;

/// What an agent trains.
type Held = Arc<Mutex<BTreeMap<TrialId, Training>>>;

struct Training {
    attempt: Attempt,
    /// Steps made.
    step: u64,
    /// Whether it is to end.
    end: Option<Ending>,
    since: Instant,
}

/// A coordinator and its agents, which can be started anew on the same records.
struct Bench {
    dir: tempfile::TempDir,
    registry: Arc<MemoryRegistry>,
    clock: Arc<Jumping>,
    agents: Vec<Held>,
    pack: u32,
    scope: Scope,
    directory: Option<Directory>,
}

impl Bench {
    async fn start(agents: usize, pack: u32) -> Self {
        let mut bench = Self {
            dir: tempfile::tempdir().unwrap(),
            registry: Arc::new(MemoryRegistry::new()),
            clock: Arc::new(Jumping::new()),
            agents: (0..agents).map(|_| Held::default()).collect(),
            pack,
            scope: Scope::new(),
            directory: None,
        };
        bench.serve().await;
        bench
    }

    async fn serve(&mut self) {
        self.scope = Scope::new();
        let (directory, dispatcher) = served(self.dir.path(), &self.registry, &self.clock, &self.scope).await;
        for (number, held) in self.agents.iter().enumerate() {
            let agent = agent(number, self.pack);
            let train = train(agent, held.clone(), directory.clone(), dispatcher.clone(), self.scope.clone());
            self.scope.spawn("agent", train);
        }
        self.directory = Some(directory);
    }

    /// Ends everything and starts it on the same records; the agents go on with what they trained.
    async fn restart(&mut self) {
        self.restart_after(Duration::ZERO).await;
    }

    /// The same with a while in between, in which there is no coordinator.
    async fn restart_after(&mut self, away: Duration) {
        assert!(self.scope.finish(LEASE).await);
        sleep(away).await;
        self.serve().await;
    }

    fn directory(&self) -> &Directory {
        self.directory.as_ref().unwrap()
    }

    async fn submit(&self, document: &Value) -> SweepId {
        self.directory().submit(submission(document)).await.unwrap().id
    }

    /// The sweep once it is over.
    async fn over(&self, id: &SweepId) -> Sweep {
        loop {
            let sweep = self.directory().sweep(id).await.unwrap();
            if sweep.state.is_terminal() {
                return sweep;
            }
            sleep(STEP / 10).await;
        }
    }

    fn jump(&self, hours: i64) {
        self.clock.offset_ms.fetch_add(hours * HOUR_MS, Ordering::Relaxed);
    }
}

fn agent(number: usize, pack: u32) -> Agent {
    fleet::agent(&format!("agent-{number}"), pack, PER_HOUR)
}

/// Makes a step of every trial each [`STEP`], until `scope` ends.
async fn train(agent: Agent, held: Held, directory: Directory, dispatcher: Dispatcher, scope: Scope) {
    let id = agent.id.clone();
    let (outbox, mut told) = Outbox::new();
    let holdings = || {
        let held = held.lock().unwrap();
        let holding = |(trial, of): (&TrialId, &Training)| Holding {
            trial: trial.clone(),
            attempt: of.attempt,
            step: of.step,
            held: Some(of.since.elapsed()),
        };
        held.iter().map(holding).collect()
    };
    let session = dispatcher.connect(agent, holdings(), outbox).await.unwrap();
    let mut step = tokio::time::interval(STEP);
    loop {
        tokio::select! {
            () = scope.cancelled() => return,
            message = told.recv() => match message.unwrap().unwrap() {
                ToAgent::Assign(assign) => {
                    let (attempt, since) = (assign.attempt, Instant::now());
                    let training = Training { attempt, step: 0, end: None, since };
                    held.lock().unwrap().insert(assign.trial.clone(), training);
                    let started = TrialEvent::Started { total_steps: 1000, start_step: 0, digests: None };
                    directory.event(&assign.trial, assign.attempt, &id, started).await.unwrap();
                }
                ToAgent::Stop(trial, _, reason) => {
                    // Nobody here is asked for more than to end; a pause is one, without an ending.
                    let ending = match reason {
                        coordinator::actors::message::StopReason::Release => Ending::Completed,
                        _ => Ending::Stopped,
                    };
                    if let Some(entry) = held.lock().unwrap().get_mut(&trial) {
                        entry.end = Some(ending);
                    }
                }
                _ => {}
            },
            _ = step.tick() => {
                let mut ending = Vec::new();
                held.lock().unwrap().retain(|trial, of| {
                    of.step += 1;
                    of.end.map(|end| ending.push((trial.clone(), of.attempt, of.step, end))).is_none()
                });
                for (trial, attempt, steps, end) in ending {
                    let summary = Box::new(TrialSummary { steps, ..TrialSummary::default() });
                    let event = match end {
                        Ending::Stopped => TrialEvent::Finished { ending: end, summary, message: String::new() },
                        _ => TrialEvent::Released,
                    };
                    let _ = directory.event(&trial, attempt, &id, event).await;
                }
                let _ = dispatcher.heartbeat(&id, session, holdings(), HashMap::new(), Beginning::default()).await;
            }
        }
    }
}

fn document(budget: &Value, max_trials: u32) -> Value {
    json!({
        "name": "s", "pretrained_model_id": "/m", "dataset_name": "/d", "max_steps": 1000, "budget": budget,
        "search": {"algorithm": "random", "max_trials": max_trials},
        "parameters": {"learning_rate": {"log_uniform": [1e-6, 1e-1]}},
    })
}

/// Each part of a budget ends its sweep, and what is spent beyond it is what one interval and one step cost.
#[tokio::test(start_paused = true)]
async fn a_budget_is_overspent_by_one_interval_at_most() {
    let beyond = (INTERVAL + STEP).as_secs_f64();
    for (agents, pack, budget, cost, seconds) in [
        (1, 1, json!({"max_cost_usd": 10}), Some(10.0), None),
        (1, 8, json!({"max_cost_usd": 10}), Some(10.0), None),
        (5, 4, json!({"max_cost_usd": 100.5}), Some(100.5), None),
        (1, 1, json!({"max_wall_clock": "30s"}), None, Some(30.0)),
        (5, 4, json!({"max_wall_clock": "31s"}), None, Some(31.0)),
        (2, 2, json!({"max_cost_usd": 1000, "max_wall_clock": "9s"}), None, Some(9.0)),
        (2, 2, json!({"max_cost_usd": 9, "max_wall_clock": "1h"}), Some(9.0), None),
    ] {
        let bench = Bench::start(agents, pack).await;
        let submitted = bench.clock.monotonic();
        let id = bench.submit(&document(&budget, 100)).await;
        let sweep = bench.over(&id).await;
        let took = (bench.clock.monotonic() - submitted).as_secs_f64();
        assert_eq!(sweep.state, SweepState::Completed, "{budget}");
        assert!(sweep.ended_early.is_some(), "{budget}");
        if let Some(most) = cost {
            let limit = most + agents as f64 * PER_HOUR / 3600.0 * beyond;
            assert!((most..=limit).contains(&sweep.cost_usd), "{budget}: {} > {limit}", sweep.cost_usd);
        }
        if let Some(most) = seconds {
            assert!((most..=most + beyond + 0.1).contains(&took), "{budget}: {took} s");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn no_trial_is_made_beyond_max_trials() {
    for (agents, pack, max_trials) in [(1, 1, 3), (5, 4, 21), (1, 64, 1)] {
        let bench = Bench::start(agents, pack).await;
        let mut document = document(&json!({}), max_trials);
        document["budget"] = json!({"max_wall_clock": "1h"});
        let id = bench.submit(&document).await;
        sleep(STEP * 3).await;
        // Every trial that waits for a device gets one.
        while bench.directory().sweep(&id).await.unwrap().proposed < max_trials {
            let running =
                bench.agents.iter().flat_map(|held| held.lock().unwrap().keys().cloned().collect::<Vec<_>>());
            for trial in running.collect::<Vec<_>>() {
                bench.directory().stop_trial(&trial).await.unwrap();
            }
            sleep(STEP * 2).await;
        }
        sleep(STEP * 10).await;
        let all = Selection { limit: 1000, ..Selection::default() };
        assert_eq!(bench.directory().trials(&id, all).await.unwrap().len(), max_trials as usize);
    }
}

/// The wall clock of a sweep counts the time in which it ran, whatever the hour did meanwhile.
#[tokio::test(start_paused = true)]
async fn an_hour_that_jumps_at_a_restart_a_pause_or_an_extension_is_no_wall_clock() {
    for hours in [3, -3] {
        let mut bench = Bench::start(1, 2).await;
        let id = bench.submit(&document(&json!({"max_wall_clock": "60s"}), 100)).await;
        let run = Duration::from_secs(10);
        sleep(run).await;
        bench.jump(hours);
        bench.restart().await;
        sleep(run).await;
        bench.jump(hours);
        bench.directory().operate(&id, Operation::Pause).await.unwrap();
        sleep(run).await;
        bench.jump(hours);
        bench.restart().await;
        sleep(run).await;
        bench.directory().operate(&id, Operation::Resume).await.unwrap();
        bench.jump(hours);
        sleep(run).await;
        let raised = document(&json!({"max_wall_clock": "90s"}), 100);
        let raised = Box::new(SweepSpec::from_document(raised.as_object().unwrap()).unwrap());
        bench.directory().operate(&id, Operation::Extend("e".into(), raised)).await.unwrap();
        bench.jump(hours);
        let since = bench.clock.monotonic();
        let sweep = bench.over(&id).await;
        let rest = (bench.clock.monotonic() - since).as_secs_f64();
        assert!(sweep.ended_early.unwrap().contains("90 s"));
        // 30 of the 90 seconds were over; each of the two restarts may have lost one interval of them.
        let interval = INTERVAL.as_secs_f64();
        let (least, most) = (60.0, 60.0 + 2.0 * interval + interval + STEP.as_secs_f64() + 0.1);
        assert!((least..=most).contains(&rest), "{hours} h: {rest} s");
    }
}

/// Nor is it money: what is charged for the time without a coordinator is what the agents trained in it, by their own clocks.
#[tokio::test(start_paused = true)]
async fn an_hour_that_jumps_at_a_restart_is_no_money() {
    let beyond = (INTERVAL + STEP).as_secs_f64();
    for (hours, pack) in [(1, 1), (-1, 1), (0, 1), (1, 4), (-1, 4)] {
        let mut bench = Bench::start(1, pack).await;
        let submitted = bench.clock.monotonic();
        let id = bench.submit(&document(&json!({"max_cost_usd": 150}), 100)).await;
        // Each more than an interval, and the second longer than a lease.
        for away in [Duration::from_secs(5), LEASE * 2] {
            sleep(Duration::from_secs(20)).await;
            assert!(!bench.directory().sweep(&id).await.unwrap().state.is_terminal(), "{hours} h");
            bench.jump(hours);
            bench.restart_after(away).await;
        }
        let sweep = bench.over(&id).await;
        let took = (bench.clock.monotonic() - submitted).as_secs_f64();
        assert!(sweep.ended_early.is_some(), "{hours} h");
        let cost = sweep.cost_usd;
        assert!((150.0..=150.0 + beyond).contains(&cost), "{hours} h: ${cost}");
        // Its only device costs a dollar a second, and was never without a trial.
        assert!((took - cost).abs() <= beyond, "{hours} h: ${cost} in {took} s");
    }
}
