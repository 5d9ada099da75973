//! What is said while it cannot be written yet, in paused time: the actors as they are, on a registry that refuses writes
//! for a while.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use actor::Scope;
use coordinator::access::Caller;
use coordinator::actors::agent_session::{self, Desk};
use coordinator::actors::directory::Submission;
use coordinator::actors::dispatcher::Terms;
use coordinator::actors::message::{
    Assignment, Ending, FromAgent, Numbered, Outbox, Outgoing, ToAgent, TrialEvent,
};
use coordinator::actors::sweep::Operation;
use coordinator::artifacts::Artifacts;
use coordinator::history::{Disk, History, RealDisk, SegmentFile};
use coordinator::store::Store;
use coordinator::{Kept, go_on};
use domain::fleet::{Agent, Device, Holding};
use domain::metric::{EVAL_LOSS, MetricPoint};
use domain::sweep::{SweepSpec, SweepState};
use domain::trial::{ItemScores, TrialState, TrialSummary};
use domain::{AgentId, Attempt, Clock, DeviceId, SweepId, Timestamp, TrialId};
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt};
use registry::{Entries, Fence, MemoryRegistry, Registry, RegistryError, Write};
use serde_json::json;
use std::collections::{BTreeMap, HashSet};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout};
use tokio_stream::wrappers::ReceiverStream;

/// Longer than anything takes that is not held up.
const SOON: Duration = Duration::from_secs(30);

/// Time without a sign of life after which a trial is its agent's no more.
const LEASE: Duration = SOON.saturating_mul(1000);

/// Dollars of the agent's device: one a second.
const PER_HOUR: f64 = 3600.0;

/// A registry whose disk may be full.
struct Full {
    inner: MemoryRegistry,
    is_full: AtomicBool,
}

impl Registry for Full {
    fn lead(&self, holder: &str) -> BoxFuture<'_, registry::Result<Fence>> {
        self.inner.lead(holder)
    }

    fn commit(&self, fence: Fence, batch: Vec<Write>) -> BoxFuture<'_, registry::Result<()>> {
        match self.is_full.load(Ordering::Relaxed) {
            true => std::future::ready(Err(RegistryError::Storage("the disk is full".into()))).boxed(),
            false => self.inner.commit(fence, batch),
        }
    }

    fn get(&self, key: &str) -> BoxFuture<'_, registry::Result<Option<Vec<u8>>>> {
        self.inner.get(key)
    }

    fn list(
        &self,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> BoxFuture<'_, registry::Result<Entries>> {
        self.inner.list(prefix, after, limit)
    }
}

/// A clock that goes with tokio's paused time.
struct Paused(Instant);

impl Clock for Paused {
    fn now(&self) -> Timestamp {
        Timestamp(1_000_000 + self.monotonic().as_millis() as u64)
    }

    fn monotonic(&self) -> Duration {
        self.0.elapsed()
    }
}

/// The metrics' disk, which may be full.
struct FullDisk(Arc<AtomicBool>);

impl Disk for FullDisk {
    fn create(&self, path: &Path) -> io::Result<Box<dyn SegmentFile>> {
        match self.0.load(Ordering::Relaxed) {
            true => Err(io::Error::other("the disk is full")),
            false => RealDisk.create(path),
        }
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        RealDisk.sync_dir(dir)
    }
}

/// A stream of the agent `agent`: what it says, and what it is told.
fn stream(desk: &Desk, scope: &Scope, holdings: Vec<Holding>) -> (mpsc::Sender<FromAgent>, Outgoing) {
    let (says, said) = mpsc::channel(16);
    let (outbox, told) = Outbox::new();
    let device = Device {
        id: DeviceId::new("cpu"),
        accelerator: "CPU".into(),
        memory_bytes: 1 << 40,
        max_pack_size: 1,
        price_per_hour: PER_HOUR,
        price_from: None,
        resident_base: None,
        simulated_speed: None,
        compute_capability: None,
    };
    let agent = Agent {
        id: AgentId::new("agent"),
        version: "0".into(),
        hostname: "h".into(),
        devices: vec![device],
        labels: BTreeMap::new(),
        understands: Default::default(),
    };
    says.try_send(FromAgent::Hello(agent, holdings)).unwrap();
    let incoming = ReceiverStream::new(said).map(Ok);
    let (desk, ends) = (desk.clone(), scope.clone());
    scope.spawn("stream", async move {
        agent_session::serve(desk, incoming, outbox, Caller::default(), ends).await;
    });
    (says, told)
}

/// The next that is told and wanted.
async fn told<T>(from: &mut Outgoing, wanted: impl Fn(ToAgent) -> Option<T>) -> T {
    loop {
        if let Some(found) = wanted(from.recv().await.expect("the stream lasts").unwrap()) {
            return found;
        }
    }
}

/// Waits for the acknowledgement of a message.
async fn acknowledged(from: &mut Outgoing, wanted: u64) {
    told(from, |message| match message {
        ToAgent::Acknowledge(_, _, sequence) => (sequence == wanted).then_some(()),
        ToAgent::Stop(..) => panic!("{message:?}"),
        _ => None,
    })
    .await;
}

/// Waits for a trial.
async fn assigned(from: &mut Outgoing) -> Assignment {
    *told(from, |message| if let ToAgent::Assign(assignment) = message { Some(assignment) } else { None })
        .await
}

/// What is said second of a trial: that it made all its steps.
fn completed(trial: &TrialId, attempt: Attempt) -> FromAgent {
    finished(trial, attempt, TrialSummary { steps: 10, ..TrialSummary::default() })
}

/// The same, with what came of it.
fn finished(trial: &TrialId, attempt: Attempt, summary: TrialSummary) -> FromAgent {
    let (summary, message) = (Box::new(summary), String::new());
    let body = TrialEvent::Finished { ending: Ending::Completed, summary, message };
    FromAgent::Event(Numbered { trial: trial.clone(), attempt, sequence: 2, body })
}

/// A coordinator's actors on such a registry.
struct Bench {
    registry: Arc<Full>,
    store: Store,
    desk: Desk,
    scope: Scope,
    _dir: tempfile::TempDir,
}

impl Bench {
    async fn start() -> Self {
        Self::on(|dir| History::open(dir).unwrap()).await
    }

    /// One that keeps metrics where it is told.
    async fn on(history: impl FnOnce(&Path) -> History) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let registry = Arc::new(Full { inner: MemoryRegistry::new(), is_full: AtomicBool::new(false) });
        let (scope, terms) = (Scope::new(), Terms { heartbeat: SOON, lease: LEASE });
        let store = Store::lead(registry.clone(), "test").await.unwrap();
        let kept = Kept {
            store: store.clone(),
            history: history(&dir.path().join("history")),
            artifacts: Artifacts::local(&dir.path().join("artifacts")).unwrap(),
        };
        let desk = go_on(kept, Arc::new(Paused(Instant::now())), terms, &scope).await.unwrap();
        Self { registry, store, desk, scope, _dir: dir }
    }

    /// Whether the disk is full from now on.
    fn fill(&self, is_full: bool) {
        self.registry.is_full.store(is_full, Ordering::Relaxed);
    }

    async fn submit(&self, spec: SweepSpec) -> SweepId {
        let (request_id, spec) = ("r".into(), Box::new(spec));
        let submission = Submission {
            request_id,
            namespace: "default".into(),
            spec,
            base_models: BTreeMap::new(),
            submitted_by: None,
        };
        self.desk.directory.submit(submission).await.unwrap().id
    }

    /// A sweep of one trial, which the agent has said that it trains: its stream, and the trial.
    async fn begun(&self) -> (mpsc::Sender<FromAgent>, Outgoing, TrialId, Attempt) {
        let (says, mut hears) = stream(&self.desk, &self.scope, Vec::new());
        self.submit(spec(&[2])).await;
        let Assignment { trial, attempt, .. } = assigned(&mut hears).await;
        let body = TrialEvent::Started { total_steps: 10, start_step: 0, digests: None };
        let event = Numbered { trial: trial.clone(), attempt, sequence: 1, body };
        says.send(FromAgent::Event(event)).await.unwrap();
        acknowledged(&mut hears, 1).await;
        (says, hears, trial, attempt)
    }
}

fn spec(ranks: &[u32]) -> SweepSpec {
    let document = json!({
        "name": "s", "pretrained_model_id": "/m", "dataset_name": "/d", "max_steps": 10,
        "search": {"algorithm": "grid"}, "parameters": {"lora_rank": ranks},
    });
    SweepSpec::from_document(document.as_object().unwrap()).unwrap()
}

/// A sweep that is over and goes on says so once that is durable, and goes on then, whatever the disk said before.
#[tokio::test(start_paused = true)]
async fn a_sweep_that_goes_on_while_the_disk_is_full_goes_on_once_it_is_durable() {
    let bench = Bench::start().await;
    let id = bench.submit(spec(&[2])).await;
    let directory = &bench.desk.directory;
    directory.stop_trial(&TrialId::of(&id, 1)).await.unwrap();
    let state = async || bench.store.sweep(&id).await.unwrap().unwrap().sweep.state;
    assert_eq!(state().await, SweepState::Completed);

    bench.fill(true);
    let extension = Operation::Extend("e".into(), Box::new(spec(&[2, 4])));
    let mut extended = Box::pin(directory.operate(&id, extension));
    assert!(timeout(SOON, &mut extended).await.is_err(), "it is not durable");
    assert_eq!(state().await, SweepState::Completed);
    bench.fill(false);
    assert_eq!(extended.await.unwrap().state, SweepState::Running);
    assert_eq!(state().await, SweepState::Running);
    let (_says, mut hears) = stream(&bench.desk, &bench.scope, Vec::new());
    assert_eq!(assigned(&mut hears).await.trial, TrialId::of(&id, 2));
    bench.scope.finish(SOON).await;
}

#[tokio::test(start_paused = true)]
async fn an_event_that_is_said_again_waits_for_its_first_to_be_durable() {
    let bench = Bench::start().await;
    let Bench { store, desk, scope, .. } = &bench;
    let (says, mut hears, trial, attempt) = bench.begun().await;
    let state = async || store.trial(&trial).await.unwrap().unwrap().trial.state;

    bench.fill(true);
    says.send(completed(&trial, attempt)).await.unwrap();
    assert!(timeout(SOON, acknowledged(&mut hears, 2)).await.is_err(), "it is not durable");
    // The stream breaks, and the agent says it again: what is over in the coordinator's memory alone is not over.
    drop((says, hears));
    let holding = Holding { trial: trial.clone(), attempt, step: 10, held: None };
    let (says, mut hears) = stream(desk, scope, vec![holding]);
    says.send(completed(&trial, attempt)).await.unwrap();
    assert!(timeout(SOON, acknowledged(&mut hears, 2)).await.is_err(), "its first is not durable yet");
    assert_ne!(state().await, TrialState::Completed);

    bench.fill(false);
    acknowledged(&mut hears, 2).await;
    assert_eq!(state().await, TrialState::Completed);
    // Once more, now of a sweep that is over.
    says.send(completed(&trial, attempt)).await.unwrap();
    acknowledged(&mut hears, 2).await;
    scope.finish(SOON).await;
}

/// A trial's last word waits for the disk while its lease ends: it counts, and what the attempt cost is charged, once.
#[tokio::test(start_paused = true)]
async fn what_ends_while_its_lease_does_is_charged() {
    let bench = Bench::start().await;
    let Bench { store, scope, .. } = &bench;
    let (says, mut hears, trial, attempt) = bench.begun().await;

    // The first that cannot be written is what the trial has cost so far; changes wait from then on.
    bench.fill(true);
    tokio::time::sleep(3 * SOON).await;
    says.send(completed(&trial, attempt)).await.unwrap();
    assert!(timeout(SOON, acknowledged(&mut hears, 2)).await.is_err(), "it waits");
    drop((says, hears));
    tokio::time::sleep(2 * LEASE).await;
    bench.fill(false);
    tokio::time::sleep(SOON).await;
    let ended = store.trial(&trial).await.unwrap().unwrap().trial;
    assert_eq!((ended.state, ended.attempt), (TrialState::Completed, attempt));
    let cost = ended.cost_usd.unwrap();
    assert!((cost - LEASE.as_secs_f64()).abs() < 1.0, "{cost}: a dollar a second, for as long as its lease");
    scope.finish(SOON).await;
}

/// What a stream said last is taken to its end although the stream is gone: points that are durable are in their trial's
/// record too, which a person may end before the agent is back.
#[tokio::test(start_paused = true)]
async fn points_that_are_on_their_way_when_the_stream_ends_are_in_the_trials_record() {
    let bench = Bench::start().await;
    let Bench { desk, scope, .. } = &bench;
    let (says, _hears, trial, attempt) = bench.begun().await;

    let point = MetricPoint { step: 2, time: Timestamp(0), values: vec![(EVAL_LOSS.into(), 1.0)] };
    let body = vec![point];
    says.send(FromAgent::Metrics(Numbered { trial: trial.clone(), attempt, sequence: 2, body }))
        .await
        .unwrap();
    drop(says);
    // Its stream's end is told last.
    while desk.dispatcher.agents().await.unwrap().iter().any(|agent| agent.connected) {
        tokio::task::yield_now().await;
    }
    let stopped = desk.directory.stop_trial(&trial).await.unwrap().trial;
    let durable = desk.history.curve(&trial, &stopped.attempts).await.unwrap();
    assert_eq!((durable.len(), stopped.step), (1, 2));
    scope.finish(SOON).await;
}

/// What the disk refused until its trial was over is written no more: the trial's record would not hear of it.
#[tokio::test(start_paused = true)]
async fn points_that_were_refused_until_their_trial_was_over_are_nobodys() {
    let is_full = Arc::new(AtomicBool::new(true));
    let disk = Box::new(FullDisk(is_full.clone()));
    let bench = Bench::on(|dir| History::open_here(dir, disk, &HashSet::new()).unwrap()).await;
    let Bench { desk, scope, .. } = &bench;
    let (says, mut hears) = stream(desk, scope, Vec::new());
    bench.submit(spec(&[2, 4])).await;
    let Assignment { trial, attempt, .. } = assigned(&mut hears).await;
    let body = vec![MetricPoint { step: 2, time: Timestamp(0), values: vec![(EVAL_LOSS.into(), 1.0)] }];
    says.send(FromAgent::Metrics(Numbered { trial: trial.clone(), attempt, sequence: 1, body }))
        .await
        .unwrap();
    assert!(timeout(SOON, acknowledged(&mut hears, 1)).await.is_err(), "it is not durable");

    // A person ends it, and its agent is gone: it is over when its lease is.
    desk.directory.stop_trial(&trial).await.unwrap();
    drop((says, hears));
    tokio::time::sleep(2 * LEASE).await;
    let ended = bench.store.trial(&trial).await.unwrap().unwrap().trial;
    assert_eq!((ended.state, ended.step), (TrialState::Cancelled, 0));
    is_full.store(false, Ordering::Relaxed);
    tokio::time::sleep(SOON).await;
    assert_eq!(desk.history.curve(&trial, &ended.attempts).await.unwrap(), []);
    scope.finish(SOON).await;
}

/// What is said again before its first is durable is kept twice, and is not the same if the agent trained on: what the
/// trial's record comes to name stays, and the other goes.
#[tokio::test(start_paused = true)]
async fn of_what_documents_made_of_a_trial_that_stays_which_its_record_names() {
    let bench = Bench::start().await;
    let Bench { store, desk, scope, .. } = &bench;
    let (says, mut hears, trial, attempt) = bench.begun().await;
    let finished = |steps| {
        let items = ItemScores {
            metric: "eval/t/acc".into(),
            asked: "x".into(),
            scores: vec![255],
            base: vec![0],
            ..ItemScores::default()
        };
        finished(&trial, attempt, TrialSummary { steps, item_scores: vec![items], ..TrialSummary::default() })
    };

    // The first that cannot be written is what the trial has cost so far; changes wait from then on.
    bench.fill(true);
    tokio::time::sleep(3 * SOON).await;
    says.send(finished(9)).await.unwrap();
    assert!(timeout(SOON, acknowledged(&mut hears, 2)).await.is_err(), "it waits");
    drop((says, hears));
    let (says, mut hears) =
        stream(desk, scope, vec![Holding { trial: trial.clone(), attempt, step: 9, held: None }]);
    says.send(finished(10)).await.unwrap();
    assert!(timeout(SOON, acknowledged(&mut hears, 2)).await.is_err(), "it waits behind the first");
    let [first, again] = [9, 10].map(|step| format!("sweeps/{trial}/items-a{}-s{step}", attempt.0));
    let is_there = async |path: &str| desk.artifacts.items(path).await.is_ok();
    assert!(is_there(&first).await && is_there(&again).await);

    bench.fill(false);
    acknowledged(&mut hears, 2).await;
    let summary = store.trial(&trial).await.unwrap().unwrap().trial.summary.unwrap();
    assert_eq!(summary.items.as_ref(), Some(&first));
    assert!(is_there(&first).await && !is_there(&again).await);
    // Nor does it go however late it is called unneeded.
    desk.discard(&trial, [first.clone()]).await;
    assert!(is_there(&first).await);
    scope.finish(SOON).await;
}
