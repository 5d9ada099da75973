//! A leader that is replaced while an actor of its own still writes, in paused time: the actors as they are, of both leaders, on
//! one registry and one object store. What the first had on its way it neither acknowledges nor acts upon, and said again to the
//! second it counts once.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[allow(dead_code, reason = "other tests use the rest of it")]
#[path = "common/fleet.rs"]
mod fleet;

use actor::Scope;
use bytes::Bytes;
use coordinator::access::Caller;
use coordinator::actors::agent_session::{self, Desk};
use coordinator::actors::dispatcher::Terms;
use coordinator::actors::message::{
    Assignment, Ending, FromAgent, Numbered, Outbox, Outgoing, ToAgent, TrialEvent,
};
use coordinator::artifacts::{ArtifactError, FileSpec, Part, Stored};
use coordinator::error::Result;
use coordinator::place::{Objects, Place};
use coordinator::store::Store;
use coordinator::{Kept, go_on};
use domain::data::ContentHash;
use domain::fleet::Holding;
use domain::metric::{EVAL_LOSS, MetricPoint};
use domain::trial::{TrialState, TrialSummary};
use domain::{Attempt, Timestamp, TrialId};
use fleet::{Jumping, agent, submission};
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt};
use object_store::memory::InMemory;
use registry::{Entries, Fence, MemoryRegistry, Registry, Write};
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;

/// Longer than anything takes that is not held up.
const SOON: Duration = Duration::from_secs(30);

/// No lease ends, and nobody reports or looks at a budget, while a test runs.
const TERMS: Terms = Terms { heartbeat: Duration::from_secs(3600), lease: Duration::from_secs(7200) };

/// A leader's way to the registry, on which its transactions may be held up.
struct Way {
    registry: Arc<MemoryRegistry>,
    is_open: watch::Sender<bool>,
    /// Transactions that were held up so far.
    held: watch::Sender<usize>,
}

impl Registry for Way {
    fn lead(&self, holder: &str) -> BoxFuture<'_, registry::Result<Fence>> {
        self.registry.lead(holder)
    }

    fn commit(&self, fence: Fence, batch: Vec<Write>) -> BoxFuture<'_, registry::Result<()>> {
        async move {
            let mut is_open = self.is_open.subscribe();
            if !*self.is_open.borrow() {
                self.held.send_modify(|held| *held += 1);
            }
            is_open.wait_for(|is_open| *is_open).await.unwrap();
            self.registry.commit(fence, batch).await
        }
        .boxed()
    }

    fn get(&self, key: &str) -> BoxFuture<'_, registry::Result<Option<Vec<u8>>>> {
        self.registry.get(key)
    }

    fn list(
        &self,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> BoxFuture<'_, registry::Result<Entries>> {
        self.registry.list(prefix, after, limit)
    }

    fn inline_limit(&self) -> Option<usize> {
        self.registry.inline_limit()
    }
}

struct Leader {
    way: Arc<Way>,
    store: Store,
    desk: Desk,
    scope: Scope,
}

/// What leaders share.
struct Shared {
    registry: Arc<MemoryRegistry>,
    objects: Arc<InMemory>,
    clock: Arc<Jumping>,
}

impl Shared {
    fn new() -> Self {
        Self { registry: Arc::default(), objects: Arc::default(), clock: Arc::new(Jumping::new()) }
    }

    async fn lead(&self) -> Leader {
        let (is_open, held) = (watch::Sender::new(true), watch::Sender::new(0));
        let way = Arc::new(Way { registry: self.registry.clone(), is_open, held });
        let (scope, place) = (Scope::new(), Place::Objects(Objects::on(self.objects.clone(), "memory")));
        let store = Store::lead(way.clone(), "test").await.unwrap();
        let kept = Kept::open(store.clone(), &place, &scope).await.unwrap();
        let desk = go_on(kept, self.clock.clone(), TERMS, &scope).await.unwrap();
        Leader { way, store, desk, scope }
    }
}

impl Leader {
    /// A stream of the agent: what it says, and what it is told.
    fn stream(&self, holdings: Vec<Holding>) -> (mpsc::Sender<FromAgent>, Outgoing) {
        let (says, said) = mpsc::channel(16);
        let (outbox, told) = Outbox::new();
        says.try_send(FromAgent::Hello(agent("agent", 1, 1.0), holdings)).unwrap();
        let incoming = ReceiverStream::new(said).map(Ok);
        let (desk, ends) = (self.desk.clone(), self.scope.clone());
        self.scope.spawn("stream", async move {
            agent_session::serve(desk, incoming, outbox, Caller::default(), ends).await;
        });
        (says, told)
    }

    /// Stores a checkpoint of a step, and does not record it.
    async fn stored(&self, trial: &TrialId, attempt: Attempt, step: u64) -> Stored {
        let bytes = format!("of step {step}").into_bytes();
        let file = |part| FileSpec {
            part,
            name: "file".into(),
            bytes: bytes.len() as u64,
            sha256: ContentHash::of(&bytes).0,
        };
        let files = vec![file(Part::Adapter), file(Part::Resume)];
        let mut upload = self.desk.artifacts.begin(trial, attempt, step, files).unwrap();
        upload.write(Bytes::from(bytes.repeat(2))).await.unwrap();
        upload.finish().await.unwrap()
    }

    async fn is_there(&self, part: &Option<String>) -> bool {
        match self.desk.artifacts.files(part.as_deref().unwrap()).await {
            Ok(_) => true,
            Err(ArtifactError::NotFound(_)) => false,
            Err(error) => panic!("{error}"),
        }
    }

    async fn steps(&self, trial: &TrialId) -> Vec<u64> {
        let attempts = self.store.trial(trial).await.unwrap().unwrap().trial.attempts;
        let curve = self.desk.history.curve(trial, &attempts).await.unwrap();
        curve.iter().map(|point| point.step).collect()
    }
}

/// The next that is told and wanted.
async fn told<T>(from: &mut Outgoing, wanted: impl Fn(ToAgent) -> Option<T>) -> T {
    let next = async {
        loop {
            if let Some(found) = wanted(from.recv().await.expect("the stream lasts").unwrap()) {
                return found;
            }
        }
    };
    timeout(SOON, next).await.expect("it is told")
}

async fn acknowledged(from: &mut Outgoing, wanted: u64) {
    let is = |message| matches!(message, ToAgent::Acknowledge(_, _, sequence) if sequence == wanted);
    told(from, |message| is(message).then_some(())).await;
}

/// What was on its way when the second leader was elected.
#[derive(Debug, Clone, Copy, PartialEq)]
enum OnItsWay {
    Metrics,
    Checkpoint,
    End,
}

/// What the agent says of its trial.
fn word(trial: &TrialId, attempt: Attempt, sequence: u64, event: TrialEvent) -> FromAgent {
    FromAgent::Event(Numbered { trial: trial.clone(), attempt, sequence, body: event })
}

fn points(
    trial: &TrialId,
    attempt: Attempt,
    sequence: u64,
    steps: std::ops::RangeInclusive<u64>,
) -> FromAgent {
    let point = |step| MetricPoint { step, time: Timestamp(step), values: vec![(EVAL_LOSS.into(), 1.0)] };
    let body = steps.map(point).collect();
    FromAgent::Metrics(Numbered { trial: trial.clone(), attempt, sequence, body })
}

fn completed() -> TrialEvent {
    let summary = Box::new(TrialSummary { steps: 8, ..TrialSummary::default() });
    TrialEvent::Finished { ending: Ending::Completed, summary, message: String::new() }
}

async fn check(what: OnItsWay) {
    let shared = Shared::new();
    let first = shared.lead().await;
    let (says, mut hears) = first.stream(Vec::new());
    let document = json!({
        "name": "s", "pretrained_model_id": "/m", "dataset_name": "/d", "max_steps": 8,
        "search": {"algorithm": "grid"}, "parameters": {"lora_rank": [2]},
    });
    first.desk.directory.submit(submission(&document)).await.unwrap();
    let assignment =
        |message| if let ToAgent::Assign(assignment) = message { Some(assignment) } else { None };
    let Assignment { trial, attempt, .. } = *told(&mut hears, assignment).await;
    let started = TrialEvent::Started { total_steps: 8, start_step: 0, digests: None };
    says.send(word(&trial, attempt, 1, started)).await.unwrap();
    says.send(points(&trial, attempt, 2, 1..=4)).await.unwrap();
    acknowledged(&mut hears, 2).await;
    let recorded = first.stored(&trial, attempt, 4).await;
    let unused = first.desk.directory.checkpoint(&trial, attempt, 4, recorded.clone()).await.unwrap();
    assert_eq!(unused, Vec::<String>::new(), "{what:?}");

    // The first has it, and its transaction is held up until the second has taken up what is durable.
    let newer = match what {
        OnItsWay::Checkpoint => Some(first.stored(&trial, attempt, 8).await),
        OnItsWay::Metrics | OnItsWay::End => None,
    };
    first.way.is_open.send_replace(false);
    let last = || match what {
        OnItsWay::End => word(&trial, attempt, 3, completed()),
        OnItsWay::Metrics | OnItsWay::Checkpoint => points(&trial, attempt, 3, 5..=8),
    };
    let mut recording: BoxFuture<'_, Result<Vec<String>>> = match newer.clone() {
        Some(newer) => first.desk.directory.checkpoint(&trial, attempt, 8, newer).boxed(),
        None => {
            says.send(last()).await.unwrap();
            std::future::pending().boxed()
        }
    };
    let mut held = first.way.held.subscribe();
    tokio::select! {
        biased;
        done = &mut recording => panic!("{what:?}: it was not held up: {done:?}"),
        arrived = timeout(SOON, held.wait_for(|held| *held > 0)) => drop(arrived.expect("it is written").unwrap()),
    }
    let second = shared.lead().await;
    first.way.is_open.send_replace(true);

    // The first acknowledges nothing of it, and ends where it finds out that it leads no more.
    if newer.is_some() {
        let refused = timeout(SOON, recording).await.expect("it is answered");
        assert!(refused.is_err(), "{what:?}: {refused:?}");
    }
    if what != OnItsWay::Metrics {
        timeout(SOON, first.scope.cancelled()).await.unwrap_or_else(|_| panic!("{what:?}: it goes on"));
    }
    let rest = async {
        while let Some(message) = hears.recv().await {
            assert!(!matches!(message, Ok(ToAgent::Acknowledge(..))), "{what:?}: {message:?}");
        }
    };
    timeout(SOON, rest).await.unwrap_or_else(|_| panic!("{what:?}: its stream goes on"));
    assert!(first.scope.finish(SOON).await, "{what:?}");
    // Nor has it let go of anything; what it stored and did not record went as the second began.
    let record = second.store.trial(&trial).await.unwrap().unwrap();
    assert_eq!(
        (record.trial.state, record.checkpoint.map(|c| c.step)),
        (TrialState::Running, Some(4)),
        "{what:?}"
    );
    assert!(second.is_there(&recorded.adapter).await && second.is_there(&recorded.resume).await, "{what:?}");
    if let Some(newer) = newer {
        assert!(!second.is_there(&newer.adapter).await && !second.is_there(&newer.resume).await, "{what:?}");
    }

    // The agent says it again to the second, which adopts it: it counts once.
    let (says, mut hears) =
        second.stream(vec![Holding { trial: trial.clone(), attempt, step: 4, held: None }]);
    says.send(last()).await.unwrap();
    acknowledged(&mut hears, 3).await;
    let made = if what == OnItsWay::End { 4 } else { 8 };
    assert_eq!(second.steps(&trial).await, (1..=made).collect::<Vec<_>>(), "{what:?}");
    says.send(word(&trial, attempt, 4, completed())).await.unwrap();
    acknowledged(&mut hears, 4).await;
    assert!(second.scope.finish(SOON).await, "{what:?}");
    let ended = second.store.trial(&trial).await.unwrap().unwrap().trial;
    assert_eq!((ended.state, ended.attempts), (TrialState::Completed, vec![(attempt, 0)]), "{what:?}");
    let log = second.store.log(&trial, 0).await.unwrap();
    let told: Vec<_> = log.iter().map(|entry| entry.event.as_str()).collect();
    assert_eq!(told, ["proposed", "assigned", "started", "checkpoint", "completed"], "{what:?}");
    assert!(second.is_there(&recorded.adapter).await && !second.is_there(&recorded.resume).await, "{what:?}");
}

#[tokio::test(start_paused = true)]
async fn what_is_on_its_way_when_a_leader_is_replaced_counts_once() {
    for what in [OnItsWay::Metrics, OnItsWay::Checkpoint, OnItsWay::End] {
        check(what).await;
    }
}
