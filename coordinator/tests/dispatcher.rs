//! The dispatcher's actor on its own, in paused time: leases, the queue, what is charged, who is told what.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use actor::Scope;
use config::limits::Limits;
use coordinator::actors::dispatcher::{Charged, Dispatcher, Expected, Grant, Request, SessionId, Terms};
use coordinator::actors::message::{OUTBOX_CAPACITY, Outbox, Outgoing, StopReason, ToAgent};
use coordinator::placement::Waiting;
use domain::data::{ContentHash, Reference};
use domain::fleet::{Agent, Beginning, Device, Feature, Holding};
use domain::machine::ComputeCapability;
use domain::{AgentId, Attempt, Clock, DeviceId, SweepId, Timestamp, TrialId};
use security::FileError;
use security::watched::Watched;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::{Instant, advance};

const LEASE: Duration = Duration::from_secs(20);
/// Less than a lease.
const WHILE: Duration = Duration::from_secs(15);

/// A clock that goes with tokio's paused time.
struct Paused(Instant, AtomicU64);

impl Paused {
    /// Sets the hour ahead.
    fn ahead(&self, hours: u64) {
        self.1.fetch_add(hours * 3_600_000, Ordering::Relaxed);
    }
}

impl Clock for Paused {
    fn now(&self) -> Timestamp {
        Timestamp(1_000_000 + self.1.load(Ordering::Relaxed) + self.monotonic().as_millis() as u64)
    }
    fn monotonic(&self) -> Duration {
        self.0.elapsed()
    }
}

struct Bench {
    dispatcher: Dispatcher,
    clock: Arc<Paused>,
    _scope: Scope,
}

fn bench() -> Bench {
    let (scope, clock) = (Scope::new(), Arc::new(Paused(Instant::now(), AtomicU64::new(0))));
    let terms = Terms { heartbeat: LEASE / 4, lease: LEASE };
    Bench {
        dispatcher: Dispatcher::start(clock.clone(), terms, BTreeSet::new(), &scope),
        clock,
        _scope: scope,
    }
}

fn trial(number: u32) -> TrialId {
    TrialId::of(&SweepId::new("s"), number)
}

fn holding(number: u32, attempt: u32) -> Holding {
    Holding { trial: trial(number), attempt: Attempt(attempt), step: 0, held: None }
}

/// The same, held for so long.
fn for_seconds(seconds: u64, holding: Holding) -> Holding {
    Holding { held: Some(Duration::from_secs(seconds)), ..holding }
}

fn data(names: &[&str]) -> Vec<Reference> {
    let reference = |name: &&str| {
        let tree = ContentHash::of(name.as_bytes());
        Reference { tree, name: name.to_string(), is_directory: true }
    };
    names.iter().map(reference).collect()
}

fn on(accelerator: &str) -> Waiting {
    Waiting { base: "a".into(), accelerators: vec![accelerator.into()], ..Waiting::default() }
}

/// An agent with one device that two trials may share.
struct FakeAgent {
    id: AgentId,
    session: SessionId,
    told: Outgoing,
}

impl FakeAgent {
    async fn connect(bench: &Bench, id: &str, holdings: Vec<Holding>) -> Self {
        Self::connect_as(bench, id, holdings, Feature::OF_AGENTS.into()).await
    }

    /// One of a version that understands this.
    async fn connect_as(
        bench: &Bench,
        id: &str,
        holdings: Vec<Holding>,
        understands: BTreeSet<Feature>,
    ) -> Self {
        Self::connect_with(bench, id, holdings, understands, "CPU").await
    }

    /// One with such an accelerator, which does not say its compute capability.
    async fn connect_with(
        bench: &Bench,
        id: &str,
        holdings: Vec<Holding>,
        understands: BTreeSet<Feature>,
        accelerator: &str,
    ) -> Self {
        let device = Device {
            id: DeviceId::new("cpu"),
            accelerator: accelerator.into(),
            memory_bytes: 1 << 40,
            max_pack_size: 2,
            price_per_hour: 1.0,
            price_from: None,
            resident_base: None,
            simulated_speed: None,
            compute_capability: None,
        };
        let agent = Agent {
            id: AgentId::new(id),
            version: "0".into(),
            hostname: "h".into(),
            devices: vec![device],
            labels: BTreeMap::new(),
            understands,
        };
        let (outbox, told) = Outbox::new();
        let session = bench.dispatcher.connect(agent, holdings, outbox).await.unwrap();
        Self { id: AgentId::new(id), session, told }
    }

    /// What it was told since the last time, the welcome left out.
    fn told(&mut self) -> Vec<ToAgent> {
        let mut heard = Vec::new();
        while let Ok(message) = self.told.try_recv() {
            heard.push(message.unwrap());
        }
        heard.retain(|message| !matches!(message, ToAgent::Welcome { .. }));
        heard
    }

    async fn beat(&self, bench: &Bench, holdings: Vec<Holding>) -> Option<Vec<Holding>> {
        bench
            .dispatcher
            .heartbeat(&self.id, self.session, holdings, HashMap::new(), Beginning::default())
            .await
            .unwrap()
    }
}

impl Bench {
    async fn enqueue(&self, number: u32, created: u64, needs: Waiting) -> oneshot::Receiver<Grant> {
        self.enqueue_with(number, created, needs, Vec::new()).await
    }

    async fn enqueue_with(
        &self,
        number: u32,
        created: u64,
        needs: Waiting,
        data: Vec<Reference>,
    ) -> oneshot::Receiver<Grant> {
        let (granted, grant) = oneshot::channel();
        let created_at = Timestamp(created);
        let request = Request { trial: trial(number), attempt: Attempt(1), created_at, needs, data, granted };
        self.dispatcher.enqueue(request).await.unwrap();
        grant
    }

    /// The trials that each agent holds, when everything sent before has been dealt with.
    async fn held(&self) -> Vec<(String, Vec<u32>)> {
        let views = self.dispatcher.agents().await.unwrap();
        let numbers = |trials: Vec<TrialId>| trials.iter().filter_map(TrialId::number).collect();
        views.into_iter().map(|view| (view.agent.id.to_string(), numbers(view.trials))).collect()
    }
}

/// Whatever the sweep of the others: what a device holds counts, and not what came with the trial alone.
#[tokio::test(start_paused = true)]
async fn a_trial_that_wants_its_device_for_itself() {
    let bench = bench();
    let _agent = FakeAgent::connect(&bench, "one", vec![]).await;
    let alone = || Waiting { max_pack_size: Some(1), ..on("CPU") };
    // What is enqueued is placed once the dispatcher has nothing else to do.
    let held = async || {
        bench.held().await;
        bench.held().await.remove(0).1
    };
    let release = async |number| bench.dispatcher.release(trial(number), Attempt(1), false).await.unwrap();
    let _first = bench.enqueue(1, 10, alone()).await;
    let _second = bench.enqueue(2, 20, on("CPU")).await;
    let _third = bench.enqueue(3, 30, alone()).await;
    let _fourth = bench.enqueue(4, 40, on("CPU")).await;
    assert_eq!(held().await, [1], "nobody joins it");
    release(1).await;
    assert_eq!(held().await, [2, 4], "it joins nobody, and holds nobody up");
    release(2).await;
    assert_eq!(held().await, [4]);
    release(4).await;
    assert_eq!(held().await, [3]);
    // One that a restarted coordinator finds assigned is as much for itself.
    let bench = self::bench();
    let found = Expected { needs: alone(), ..expected(&bench, 1) };
    let _lost = bench.dispatcher.expect(found).await.unwrap();
    let _agent = FakeAgent::connect(&bench, "one", vec![holding(1, 4)]).await;
    let _second = bench.enqueue(2, 20, on("CPU")).await;
    bench.held().await;
    assert_eq!(bench.held().await, [("one".to_string(), vec![1])]);
}

#[tokio::test(start_paused = true)]
async fn the_oldest_goes_first_and_a_withdrawn_request_is_passed_by() {
    let bench = bench();
    let young = bench.enqueue(1, 30, on("CPU")).await;
    let withdrawn = bench.enqueue(2, 10, on("CPU")).await;
    let old = bench.enqueue(3, 20, on("CPU")).await;
    let youngest = bench.enqueue(4, 40, on("CPU")).await;
    let elsewhere = bench.enqueue(5, 1, on("H100-80GB")).await;
    drop(withdrawn);
    let _agent = FakeAgent::connect(&bench, "one", vec![]).await;
    assert_eq!(bench.held().await, [("one".to_string(), vec![1, 3])]);
    let (old, _young) = (old.await.unwrap(), young.await.unwrap());
    assert_eq!((old.agent.as_str(), old.device.as_str(), old.price_per_hour), ("one", "cpu", 1.0));
    let is = old.is.clone().unwrap();
    assert_eq!((is.accelerator.as_str(), is.price_per_hour), ("CPU", 1.0));
    bench.dispatcher.release(trial(3), Attempt(1), false).await.unwrap();
    let _youngest = youngest.await.unwrap();
    assert_eq!(bench.held().await, [("one".to_string(), vec![1, 4])]);
    assert!(!elsewhere.is_terminated(), "it waits for an accelerator that nobody has");
}

/// Nobody is said to lack anything before somebody is there who does.
#[tokio::test(start_paused = true)]
async fn the_accelerators_that_nobody_has_are_named() {
    let bench = bench();
    let lacking = || bench.dispatcher.lacking(SweepId::new("s"));
    let either = ["A100-40GB", "H100-80GB"].map(String::from).to_vec();
    let _here = bench.enqueue(1, 1, on("cpu")).await;
    let either = bench.enqueue(2, 2, Waiting { accelerators: either, ..Waiting::default() }).await;
    let one = bench.enqueue(3, 3, on("V100-16GB")).await;
    let same = bench.enqueue(4, 4, on("V100-16GB")).await;
    assert_eq!(lacking().await.unwrap(), None);
    let _agent = FakeAgent::connect(&bench, "one", vec![]).await;
    let said = "no agent that is connected has A100-40GB or H100-80GB, nor V100-16GB";
    assert_eq!(lacking().await.unwrap().as_deref(), Some(said));
    assert_eq!(bench.dispatcher.lacking(SweepId::new("other")).await.unwrap(), None);
    drop((either, one, same));
    assert_eq!(lacking().await.unwrap(), None);
}

#[tokio::test(start_paused = true)]
async fn what_is_to_be_evaluated_waits_for_an_agent_of_a_version_that_does_that() {
    let bench = bench();
    let _old = FakeAgent::connect_as(&bench, "old", vec![], BTreeSet::new()).await;
    let _evaluated = bench.enqueue(1, 1, Waiting { evaluated: true, ..on("CPU") }).await;
    let _plain = bench.enqueue(2, 2, on("CPU")).await;
    bench.held().await;
    assert_eq!(bench.held().await, [("old".to_string(), vec![2])]);
    let _new = FakeAgent::connect(&bench, "new", vec![]).await;
    assert_eq!(bench.held().await, [("new".to_string(), vec![1]), ("old".to_string(), vec![2])]);
}

#[tokio::test(start_paused = true)]
async fn bfloat16_waits_for_a_gpu_that_has_it() {
    let bench = bench();
    let sweep = SweepId::new("s");
    let brain = |accelerators: &[&str]| Waiting {
        accelerators: accelerators.iter().map(ToString::to_string).collect(),
        compute_capability: Some(ComputeCapability::BFLOAT16),
        ..on("CPU")
    };
    let lacking = || async { bench.dispatcher.lacking(sweep.clone()).await.unwrap() };
    let _waits = bench.enqueue(1, 1, brain(&[])).await;
    assert_eq!(lacking().await, None, "there is no device at all");
    let agents =
        |id, accelerator| FakeAgent::connect_with(&bench, id, vec![], Feature::OF_AGENTS.into(), accelerator);
    let _volta = agents("volta", "v100-16gb").await;
    let _passes = bench.enqueue(2, 2, on("V100-16GB")).await;
    bench.held().await;
    assert_eq!(bench.held().await, [("volta".to_string(), vec![2])]);
    let why = "bfloat16 needs compute capability 8.0; v100-16gb has 7.0; use float16";
    assert_eq!(lacking().await.as_deref(), Some(why));
    assert_eq!(bench.dispatcher.lacking(SweepId::new("other")).await.unwrap(), None);
    let _unknown = agents("unknown", "MI300X").await;
    bench.held().await;
    assert_eq!(
        bench.held().await,
        [("unknown".to_string(), vec![1]), ("volta".to_string(), vec![2])],
        "an accelerator of which nothing is known may have it"
    );
    assert_eq!(lacking().await, None);
    let _named = bench.enqueue(3, 3, brain(&["A100-40GB"])).await;
    assert_eq!(lacking().await.as_deref(), Some("no agent that is connected has A100-40GB"));
    let _ampere = agents("ampere", "A100-40GB").await;
    bench.held().await;
    assert_eq!(bench.held().await[0], ("ampere".to_string(), vec![3]));
}

#[tokio::test(start_paused = true)]
async fn what_waits_is_fetched_ahead() {
    let bench = bench();
    let mut agent = FakeAgent::connect(&bench, "one", vec![]).await;
    let mut grants = Vec::new();
    for number in 1..=2 {
        grants.push(bench.enqueue_with(number, number.into(), on("CPU"), data(&["base"])).await);
        bench.held().await;
    }
    assert_eq!(agent.told(), [], "nothing waits");
    let both = || data(&["base", "rows"]);
    grants.push(bench.enqueue_with(3, 3, on("CPU"), both()).await);
    bench.held().await;
    assert_eq!(agent.told(), [ToAgent::Prefetch(both())]);
    grants.push(bench.enqueue_with(4, 4, on("CPU"), both()).await);
    bench.held().await;
    assert_eq!(agent.told(), [], "it knows");
    // A new stream knows nothing.
    let mut agent = FakeAgent::connect(&bench, "one", vec![holding(1, 1), holding(2, 1)]).await;
    bench.held().await;
    assert_eq!(agent.told(), [ToAgent::Prefetch(both())]);
    // One that gets no trials is to fetch nothing, until it gets some again.
    bench.dispatcher.drain(agent.id.clone(), true).await.unwrap();
    bench.held().await;
    let stop = |number| ToAgent::Stop(trial(number), Attempt(1), StopReason::Release);
    assert_eq!(agent.told(), [stop(1), stop(2), ToAgent::Prefetch(vec![])]);
    bench.dispatcher.drain(agent.id.clone(), false).await.unwrap();
    bench.held().await;
    assert_eq!(agent.told(), [ToAgent::Prefetch(both())]);
    // Another takes both.
    let mut other = FakeAgent::connect(&bench, "two", vec![]).await;
    assert_eq!(bench.held().await, [("one".to_string(), vec![1, 2]), ("two".to_string(), vec![3, 4])]);
    assert_eq!((agent.told(), other.told()), (vec![ToAgent::Prefetch(vec![])], vec![]));
}

#[tokio::test(start_paused = true)]
async fn an_agent_of_an_earlier_version_is_not_told_what_to_fetch_ahead() {
    let bench = bench();
    // It would be the first of two alike.
    let mut older = FakeAgent::connect_as(&bench, "a", vec![], BTreeSet::new()).await;
    let mut newer = FakeAgent::connect(&bench, "b", vec![]).await;
    let mut grants = Vec::new();
    for number in 1..=5 {
        grants.push(bench.enqueue_with(number, number.into(), on("CPU"), data(&["rows"])).await);
    }
    bench.held().await;
    assert_eq!(bench.held().await, [("a".to_string(), vec![1, 2]), ("b".to_string(), vec![3, 4])]);
    assert_eq!((older.told(), newer.told()), (vec![], vec![ToAgent::Prefetch(data(&["rows"]))]));
}

#[tokio::test(start_paused = true)]
async fn what_waits_for_a_quota_is_not_fetched_ahead() {
    let bench = bench();
    let limits = Limits::parse("mine: { max_concurrent_trials: 1 }").unwrap();
    let limits = Watched::open(vec![], move || Ok::<_, FileError>(limits.clone())).unwrap();
    bench.dispatcher.limit(Arc::new(limits)).await.unwrap();
    let mut agent = FakeAgent::connect(&bench, "one", vec![]).await;
    let mut grants = Vec::new();
    for (number, namespace, named) in
        [(1, "mine", "a"), (2, "mine", "b"), (3, "yours", "c"), (4, "yours", "d")]
    {
        let needs = Waiting { namespace: namespace.into(), ..on("CPU") };
        grants.push(bench.enqueue_with(number, number.into(), needs, data(&[named])).await);
        bench.held().await;
    }
    assert_eq!(bench.held().await, [("one".to_string(), vec![1, 3])]);
    assert_eq!(agent.told(), [ToAgent::Prefetch(data(&["d"]))]);
    assert_eq!(
        bench.dispatcher.held_back("mine").await.unwrap().as_deref(),
        Some("namespace mine has 1 of its 1 trials on devices")
    );
    assert_eq!(bench.dispatcher.held_back("yours").await.unwrap(), None);
}

#[tokio::test(start_paused = true)]
async fn a_lease_lives_by_heartbeats() {
    let bench = bench();
    let mut agent = FakeAgent::connect(&bench, "one", vec![]).await;
    let mut grant = bench.enqueue(1, 1, on("CPU")).await.await.unwrap();
    for _ in 0..3 {
        advance(WHILE).await;
        let stale = agent.beat(&bench, vec![holding(1, 1), holding(1, 9), holding(2, 1)]).await.unwrap();
        assert_eq!(stale, [holding(1, 9), holding(2, 1)], "what it should not hold");
    }
    assert!(grant.lost.try_recv().is_err());
    // 45 s so far; the lease runs out 20 s after the last heartbeat.
    let seconds = grant.lost.await.unwrap();
    assert!((seconds - 65.0).abs() < 0.1, "{seconds}");
    assert_eq!(agent.told(), [ToAgent::Stop(trial(1), Attempt(1), StopReason::Fenced)]);
    assert_eq!(
        bench.dispatcher.release(trial(1), Attempt(1), false).await.unwrap(),
        None,
        "it is charged once"
    );
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_fell_silent_gets_nothing_before_it_is_heard_of() {
    let bench = bench();
    let agent = FakeAgent::connect(&bench, "one", vec![]).await;
    // Its stream is open all the time.
    bench.enqueue(1, 1, on("CPU")).await.await.unwrap().lost.await.unwrap();
    let mut waits = bench.enqueue(1, 1, on("CPU")).await;
    assert_eq!(bench.held().await, [("one".to_string(), vec![])]);
    assert!(waits.try_recv().is_err());
    agent.beat(&bench, vec![]).await;
    assert_eq!(bench.held().await, [("one".to_string(), vec![1])]);
}

#[tokio::test(start_paused = true)]
async fn a_newer_stream_replaces_the_older_and_hears_the_stop_again() {
    let bench = bench();
    let mut first = FakeAgent::connect(&bench, "one", vec![]).await;
    let grant = bench.enqueue(1, 1, on("CPU")).await.await.unwrap();
    let stop = ToAgent::Stop(trial(1), Attempt(1), StopReason::Search);
    bench.dispatcher.send(trial(1), Attempt(1), stop.clone()).await.unwrap();
    bench.dispatcher.send(trial(1), Attempt(7), stop.clone()).await.unwrap();
    bench.held().await;
    assert_eq!(first.told(), std::slice::from_ref(&stop), "another attempt's stop is nobody's");
    let mut second = FakeAgent::connect(&bench, "one", vec![holding(1, 1)]).await;
    assert_eq!(second.told(), [stop]);
    assert_eq!(first.beat(&bench, vec![holding(1, 1)]).await, None);
    assert_eq!(second.beat(&bench, vec![holding(1, 1)]).await, Some(vec![]));
    drop(grant);
}

/// What waits for an agent is bounded: one that takes nothing is cut off, and goes on with what it holds when it comes back.
#[tokio::test(start_paused = true)]
async fn an_agent_that_takes_nothing_is_cut_off_and_keeps_its_trials() {
    let bench = bench();
    let deaf = FakeAgent::connect(&bench, "one", vec![]).await;
    let mut grant = bench.enqueue(1, 1, on("CPU")).await.await.unwrap();
    let stop = ToAgent::Stop(trial(1), Attempt(1), StopReason::Release);
    let connected = async || bench.dispatcher.agents().await.unwrap()[0].connected;
    assert!(connected().await);
    for _ in 0..OUTBOX_CAPACITY {
        bench.dispatcher.send(trial(1), Attempt(1), stop.clone()).await.unwrap();
    }
    assert!(!connected().await, "the welcome was one more");
    assert_eq!(deaf.beat(&bench, vec![holding(1, 1)]).await, None);
    let mut again = FakeAgent::connect(&bench, "one", vec![holding(1, 1)]).await;
    assert_eq!(again.told(), [stop]);
    assert_eq!(again.beat(&bench, vec![holding(1, 1)]).await, Some(vec![]));
    assert!(grant.lost.try_recv().is_err());
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_leaves_gets_no_more() {
    let bench = bench();
    let _agent = FakeAgent::connect(&bench, "one", vec![]).await;
    let _grant = bench.enqueue(1, 1, on("CPU")).await.await.unwrap();
    advance(Duration::from_secs(3)).await;
    let seconds = bench.dispatcher.release(trial(1), Attempt(1), true).await.unwrap().unwrap();
    assert!((seconds - 3.0).abs() < 0.1, "{seconds}");
    let mut waits = bench.enqueue(1, 1, on("CPU")).await;
    assert_eq!(bench.held().await, [("one".to_string(), vec![])]);
    assert!(waits.try_recv().is_err());
    let _again = FakeAgent::connect(&bench, "one", vec![]).await;
    assert_eq!(bench.held().await, [("one".to_string(), vec![1])]);
}

/// What the agent `one` held before a restart, in its fourth attempt, for a hundred seconds when it was charged for, a minute
/// ago.
fn expected(bench: &Bench, number: u32) -> Expected {
    Expected {
        trial: trial(number),
        attempt: Attempt(4),
        agent: AgentId::new("one"),
        device: DeviceId::new("cpu"),
        needs: on("CPU"),
        charged: Some(Charged {
            at: Timestamp(bench.clock.now().0 - 60_000),
            held: Some(Duration::from_secs(100)),
        }),
    }
}

#[tokio::test(start_paused = true)]
async fn a_lease_runs_only_once_its_agent_can_come_back() {
    let bench = bench();
    let mut lost = bench.dispatcher.expect(expected(&bench, 1)).await.unwrap();
    // A coordinator that takes over reads all that is kept before anybody can connect.
    advance(10 * LEASE).await;
    for _ in 0..2 {
        assert_eq!(bench.held().await, []);
    }
    assert!(lost.try_recv().is_err(), "nobody could come back");
    bench.dispatcher.serve().await.unwrap();
    let serves = Instant::now();
    lost.await.unwrap();
    assert_eq!(serves.elapsed().as_secs(), LEASE.as_secs());
}

#[tokio::test(start_paused = true)]
async fn what_was_held_before_a_restart_is_adopted_or_lost() {
    let bench = bench();
    let mut adopted = bench.dispatcher.expect(expected(&bench, 1)).await.unwrap();
    let lost = bench.dispatcher.expect(expected(&bench, 2)).await.unwrap();
    bench.dispatcher.serve().await.unwrap();
    // What is answered after it was heard.
    assert_eq!(bench.held().await, []);
    advance(Duration::from_secs(10)).await;
    let agent = FakeAgent::connect(&bench, "one", vec![for_seconds(170, holding(1, 4)), holding(2, 3)]).await;
    // Shared by two: half of the minute without a coordinator and of the 10 s since. The other's lease runs out
    // another 10 s later, uncharged for the minute, since nobody said that it trained.
    let used = bench.dispatcher.used(vec![trial(1), trial(2)]).await.unwrap();
    let held: Vec<_> = used.iter().map(|(_, used)| used.held.map(|held| held.as_secs())).collect();
    assert_eq!(held, [Some(170), Some(110)], "as far as it was counted");
    let used: Vec<_> = used.into_iter().map(|(_, used)| used.seconds.round()).collect();
    assert_eq!(used, [35.0, 5.0]);
    assert_eq!(lost.await.unwrap().round(), 10.0);
    assert!(adopted.try_recv().is_err());
    assert_eq!(agent.beat(&bench, vec![holding(1, 4)]).await, Some(vec![]));
    advance(Duration::from_secs(5)).await;
    let seconds = bench.dispatcher.release(trial(1), Attempt(4), false).await.unwrap().unwrap();
    assert_eq!(seconds.round(), 45.0, "half of 60 s and of 20 s, and 5 s alone");
}

/// The hour may be put on or back between two coordinators. What counts is what the agent says; without that, no more than a
/// lease is charged that no meter saw.
#[tokio::test(start_paused = true)]
async fn time_without_a_coordinator_is_what_its_agent_says() {
    let lease = LEASE.as_secs();
    // The agent's word 10 s after the restart, what the record has, how long the hour says it was; what is charged, and what is
    // counted from then on.
    for (told, held, by_the_hour, charged, counted) in [
        (Some(170), Some(100), 60, 70, Some(170)),
        (Some(170), Some(100), 3660, 70, Some(170)),
        (Some(170), Some(100), 0, 70, Some(170)),
        // It heard of its trial a little later than the meter began.
        (Some(109), Some(100), 60, 10, Some(109)),
        (Some(170), None, 3, 13, Some(170)),
        (Some(170), None, 3660, lease + 10, Some(170)),
        (None, Some(100), 3660, lease + 10, Some(100 + lease + 10)),
        (None, Some(100), 0, 10, Some(110)),
        (None, None, 3, 13, None),
        (None, None, 3660, lease + 10, None),
    ] {
        let what = format!("{told:?} {held:?} {by_the_hour}");
        let bench = bench();
        let charged_until = Charged {
            at: Timestamp(bench.clock.now().0.saturating_sub(by_the_hour * 1000)),
            held: held.map(Duration::from_secs),
        };
        let expected = Expected { charged: Some(charged_until), ..expected(&bench, 1) };
        let _lost = bench.dispatcher.expect(expected).await.unwrap();
        bench.dispatcher.serve().await.unwrap();
        // What is answered after it was heard.
        assert_eq!(bench.held().await, [], "{what}");
        advance(Duration::from_secs(10)).await;
        let holding = Holding { held: told.map(Duration::from_secs), ..holding(1, 4) };
        let agent = FakeAgent::connect(&bench, "one", vec![holding.clone()]).await;
        // It is said again with each sign of life, and charged once.
        assert_eq!(agent.beat(&bench, vec![holding]).await, Some(vec![]), "{what}");
        let [(_, used)] = bench.dispatcher.used(vec![trial(1)]).await.unwrap()[..] else { panic!("{what}") };
        let found = (used.seconds.round() as u64, used.held.map(|held| held.as_secs()));
        assert_eq!(found, (charged, counted), "{what}");
    }
}

#[tokio::test(start_paused = true)]
async fn only_what_an_absent_agent_holds_is_abandoned() {
    let bench = bench();
    let here = FakeAgent::connect(&bench, "here", vec![]).await;
    let _here = [bench.enqueue(1, 1, on("CPU")).await, bench.enqueue(2, 2, on("CPU")).await];
    bench.held().await;
    let gone = FakeAgent::connect(&bench, "gone", vec![]).await;
    let _gone = bench.enqueue(3, 3, on("CPU")).await;
    bench.held().await;
    advance(Duration::from_secs(4)).await;
    bench.dispatcher.disconnect(gone.id.clone(), gone.session).await.unwrap();
    let abandoned = bench.dispatcher.abandon(vec![trial(1), trial(3), trial(9)]).await.unwrap();
    assert_eq!(abandoned.iter().map(|(t, s)| (t.number(), s.round())).collect::<Vec<_>>(), [(Some(3), 4.0)]);
    assert_eq!(bench.held().await, [("gone".to_string(), vec![]), ("here".to_string(), vec![1, 2])]);
    let mut back = FakeAgent::connect(&bench, "gone", vec![holding(3, 1)]).await;
    assert_eq!(back.beat(&bench, vec![holding(3, 1)]).await, Some(vec![holding(3, 1)]));
    assert!(back.told().is_empty());
    drop(here);
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_is_gone_for_long_is_forgotten_unless_it_holds_a_trial() {
    let bench = bench();
    let listed = async || bench.held().await.into_iter().map(|(id, _)| id).collect::<Vec<_>>();
    let leave = async |agent: FakeAgent| bench.dispatcher.disconnect(agent.id, agent.session).await.unwrap();
    let holder = FakeAgent::connect(&bench, "holder", vec![]).await;
    let _grant = bench.enqueue(1, 1, on("CPU")).await.await.unwrap();
    let stays = FakeAgent::connect(&bench, "stays", vec![]).await;
    let idle = FakeAgent::connect(&bench, "idle", vec![]).await;
    for gone in [idle, holder] {
        leave(gone).await;
    }
    assert_eq!(listed().await, ["holder", "idle", "stays"]);
    // A day later, before the lease of the trial is looked at.
    bench.clock.ahead(24);
    leave(FakeAgent::connect(&bench, "other", vec![]).await).await;
    assert_eq!(listed().await, ["holder", "other", "stays"]);
    for number in 0..300 {
        leave(FakeAgent::connect(&bench, &format!("many-{number}"), vec![]).await).await;
    }
    let last: Vec<_> = listed().await;
    assert_eq!(last.len(), 102, "a hundred, the one that holds a trial, the one that stays");
    assert!(last.contains(&"many-299".to_string()) && last.contains(&"holder".to_string()));
    drop(stays);
}
