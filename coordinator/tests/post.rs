//! A fleet's coordinator at its post: what answers at its port as it stands by, takes over, leads, and is left without etcd. One
//! connection lasts through all of it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use actor::Scope;
use coordinator::fleet::{self, Fleet, Leader, Post};
use coordinator::grpc::health::{LIVE, READY};
use coordinator::place::Place;
use coordinator::{Access, CoordinatorError, Options};
use domain::SystemClock;
use futures::future::{BoxFuture, FutureExt};
use proto::v1::fleet_service_client::FleetServiceClient;
use proto::v1::sweep_service_client::SweepServiceClient;
use proto::v1::sweep_service_server;
use proto::v1::trial_service_client::TrialServiceClient;
use proto::{STALE_SECONDS, v1};
use registry::{Entries, Fence, Leadership, Member, MemoryRegistry, Registry, RegistryError, Write};
use serde_json::json;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::Instant;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_types::StatusExt;

/// What a test waits for at most.
const PATIENCE: Duration = Duration::from_secs(60);

/// What is read last before a leader takes up its sweeps.
const READ_LAST: &str = "deleted/";

/// A fleet's state that elects a leader, and lets it read, when it is told to.
struct Gated {
    state: Arc<MemoryRegistry>,
    elects: watch::Receiver<bool>,
    lets_read: watch::Receiver<bool>,
}

async fn open(gate: &watch::Receiver<bool>) {
    gate.clone().wait_for(|open| *open).await.unwrap();
}

impl Registry for Gated {
    fn lead(&self, holder: &str) -> BoxFuture<'_, registry::Result<Fence>> {
        let holder = holder.to_string();
        async move {
            open(&self.elects).await;
            self.state.lead(&holder).await
        }
        .boxed()
    }

    fn commit(&self, fence: Fence, batch: Vec<Write>) -> BoxFuture<'_, registry::Result<()>> {
        self.state.commit(fence, batch)
    }

    fn get(&self, key: &str) -> BoxFuture<'_, registry::Result<Option<Vec<u8>>>> {
        self.state.get(key)
    }

    fn list(
        &self,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> BoxFuture<'_, registry::Result<Entries>> {
        let (prefix, after) = (prefix.to_string(), after.map(String::from));
        async move {
            if prefix == READ_LAST {
                open(&self.lets_read).await;
            }
            self.state.list(&prefix, after.as_deref(), limit).await
        }
        .boxed()
    }
}

/// Says what it is told to say.
#[derive(Clone, Default)]
struct Said(Arc<Mutex<Option<Result<String, String>>>>);

impl Said {
    fn say(&self, leader: Result<&str, &str>) {
        *self.0.lock().unwrap() = Some(leader.map(String::from).map_err(String::from));
    }
}

impl Leadership for Said {
    fn leader(&self) -> BoxFuture<'_, registry::Result<Option<String>>> {
        let said = self.0.lock().unwrap().clone();
        std::future::ready(said.transpose().map_err(RegistryError::Unavailable)).boxed()
    }

    fn members(&self) -> BoxFuture<'_, registry::Result<Vec<Member>>> {
        std::future::ready(Ok(vec![Member { id: "agent".into(), value: b"{}".to_vec() }])).boxed()
    }
}

/// A coordinator, and the state that its fleet shares.
struct Coordinator {
    options: Options,
    post: Post,
    state: Arc<MemoryRegistry>,
    said: Said,
    channel: Channel,
}

/// One turn of it.
struct Turn {
    scope: Scope,
    elects: watch::Sender<bool>,
    lets_read: watch::Sender<bool>,
}

impl Coordinator {
    async fn open(dir: &Path, scope: &Scope) -> Self {
        let options = Options {
            data_dir: dir.to_path_buf(),
            listen: "127.0.0.1:0".parse().unwrap(),
            clock: Arc::new(SystemClock::new()),
            heartbeat: Duration::from_secs(15),
            lease: PATIENCE,
            access: Access::default(),
        };
        let said = Said::default();
        let post = Post::open(&options, None, Arc::new(said.clone()), scope).await.unwrap();
        let endpoint = Endpoint::from_shared(format!("http://{}", post.address())).unwrap();
        let channel = endpoint.connect().await.unwrap();
        Self { options, post, state: Arc::default(), said, channel }
    }

    /// Begins a turn.
    fn turn(&self) -> (Turn, impl Future<Output = Result<Leader, CoordinatorError>> + '_) {
        let scope = Scope::new();
        let (elects, is_elected) = watch::channel(false);
        let (lets_read, may_read) = watch::channel(false);
        let state = Gated { state: self.state.clone(), elects: is_elected, lets_read: may_read };
        let fleet = Fleet {
            registry: Arc::new(state),
            last_known: self.state.clone(),
            leadership: Arc::new(self.said.clone()),
            last_members: Arc::new(self.said.clone()),
            place: Place::Directory(self.options.data_dir.clone()),
        };
        let turn = Turn { scope: scope.clone(), elects, lets_read };
        (turn, async move { fleet::start(self.options.clone(), fleet, &self.post, &scope).await })
    }

    /// Ends one.
    async fn end(&self, turn: Turn) {
        self.post.step_down();
        assert!(turn.scope.finish(PATIENCE).await);
    }

    fn address(&self) -> String {
        format!("http://{}", self.post.address())
    }

    fn sweeps(&self) -> SweepServiceClient<Channel> {
        SweepServiceClient::new(self.channel.clone())
    }

    fn trials(&self) -> TrialServiceClient<Channel> {
        TrialServiceClient::new(self.channel.clone())
    }

    /// The ids of sweeps, and how old that is.
    async fn list(&self) -> Result<(Vec<String>, Option<u64>), Status> {
        let answer = self.sweeps().list_sweeps(v1::ListSweepsRequest::default()).await?;
        let age = age(&answer);
        Ok((answer.into_inner().sweeps.into_iter().map(|sweep| sweep.id).collect(), age))
    }

    /// Asks for the list until it is refused with those words.
    async fn refuses(&self, words: &str) -> Status {
        let refused = async {
            loop {
                match self.list().await {
                    Err(status) if status.message().contains(words) => return status,
                    _ => tokio::task::yield_now().await,
                }
            }
        };
        tokio::time::timeout(PATIENCE, refused).await.unwrap_or_else(|_| panic!("nobody says `{words}`"))
    }

    async fn submit(&self) -> Result<v1::Sweep, Status> {
        let document = json!({
            "name": "grid", "pretrained_model_id": "/models/a", "dataset_name": "/data/a.jsonl", "max_steps": 6,
            "search": {"algorithm": "grid"}, "parameters": {"lora_rank": [2, 4]},
        });
        let spec = Some(proto::convert::to_struct(document.as_object().unwrap()));
        let request_id = uuid::Uuid::new_v4().to_string();
        let request = v1::SubmitSweepRequest { request_id, spec, base_models: [].into() };
        Ok(self.sweeps().submit_sweep(request).await?.into_inner().sweep.unwrap())
    }

    /// Which of these are served.
    async fn health(&self) -> [bool; 4] {
        let mut served = Vec::new();
        for service in [LIVE, READY, "", sweep_service_server::SERVICE_NAME] {
            let request = HealthCheckRequest { service: service.into() };
            let status = HealthClient::new(self.channel.clone()).check(request).await.unwrap();
            served.push(status.into_inner().status() == ServingStatus::Serving);
        }
        served.try_into().unwrap()
    }

    /// What a browser is answered.
    async fn browse(&self, request: &str) -> String {
        let mut stream = TcpStream::connect(self.post.address()).await.unwrap();
        let headers =
            "Host: localhost\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: 0\r\n";
        stream.write_all(format!("{request} HTTP/1.1\r\n{headers}\r\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }
}

/// Of what so many seconds ago an answer tells, if it is old.
fn age<T>(answer: &tonic::Response<T>) -> Option<u64> {
    answer.metadata().get(STALE_SECONDS).map(|seconds| seconds.to_str().unwrap().parse().unwrap())
}

fn reason(status: &Status) -> String {
    status.get_details_error_info().unwrap().reason
}

const LEADS: [bool; 4] = [true, true, true, true];
const LIVES: [bool; 4] = [true, false, false, false];

#[tokio::test]
async fn whoever_asks_while_it_takes_over_is_told_what_it_does_and_then_answered() {
    let (dir, scope) = (tempfile::tempdir().unwrap(), Scope::new());
    let coordinator = Coordinator::open(dir.path(), &scope).await;
    coordinator.said.say(Err("etcd has no majority"));
    let refused = coordinator.refuses("it is not known who leads: etcd has no majority").await;
    assert_eq!((refused.code(), reason(&refused).as_str()), (Code::Unavailable, "STANDBY"));

    // With nothing to take up, and then with a sweep.
    let (turn, led) = coordinator.turn();
    turn.elects.send_replace(true);
    turn.lets_read.send_replace(true);
    led.await.unwrap();
    let sweep = coordinator.submit().await.unwrap().id;
    assert_eq!(coordinator.health().await, LEADS);
    coordinator.end(turn).await;
    assert_eq!(coordinator.health().await, LIVES);

    let (turn, led) = coordinator.turn();
    let told = async {
        coordinator.said.say(Ok("http://other:7401"));
        let refused = coordinator.refuses("stands by; http://other:7401 leads").await;
        assert_eq!(reason(&refused), "STANDBY");
        turn.elects.send_replace(true);
        let refused = coordinator.refuses("taking over: loading sweeps").await;
        assert_eq!((refused.code(), reason(&refused).as_str()), (Code::Unavailable, "TAKING_OVER"));
        let again = refused.get_details_retry_info().unwrap().retry_delay;
        assert!(again.is_some_and(|pause| !pause.is_zero()), "{again:?}");
        assert_eq!(coordinator.health().await, LIVES);
        let page = coordinator.browse("GET /").await;
        assert!(page.starts_with("HTTP/1.1 503 ") && page.contains("taking over: loading sweeps"), "{page}");
        // Who asks meanwhile waits, and again on a machine so slow that it takes longer, until it leads.
        turn.lets_read.send_replace(true);
        let answered = async {
            loop {
                match coordinator.list().await {
                    Ok(listed) => return listed,
                    Err(status) => assert_eq!(reason(&status), "TAKING_OVER", "{status}"),
                }
            }
        };
        tokio::time::timeout(PATIENCE, answered).await.expect("it leads")
    };
    let (led, listed) = tokio::join!(led, told);
    led.unwrap();
    assert_eq!(listed, (vec![sweep], None));
    assert_eq!(coordinator.health().await, LEADS);
    coordinator.end(turn).await;
    assert!(scope.finish(PATIENCE).await);
}

#[tokio::test]
async fn a_leader_without_etcd_tells_what_it_knew_and_changes_nothing_until_another_leads() {
    let (dir, scope) = (tempfile::tempdir().unwrap(), Scope::new());
    let coordinator = Coordinator::open(dir.path(), &scope).await;
    let (turn, led) = coordinator.turn();
    turn.elects.send_replace(true);
    turn.lets_read.send_replace(true);
    let leader = led.await.unwrap();
    let sweep = coordinator.submit().await.unwrap();
    assert_eq!(coordinator.list().await.unwrap(), (vec![sweep.id.clone()], None));

    // Some time ago etcd was heard of last.
    let since = Instant::now() - Duration::from_secs(7);
    leader.retire(&coordinator.post, since).await.unwrap();
    coordinator.end(turn).await;
    coordinator.said.say(Err("etcd has no majority"));
    // Its own name is what etcd may still hold of the time before.
    for leader in [Err("etcd has no majority"), Ok(coordinator.address())] {
        let (turn, led) = coordinator.turn();
        coordinator.said.say(leader.as_deref().map_err(|why| *why));
        let asked = async {
            let (listed, age) = coordinator.list().await.unwrap();
            assert_eq!(listed, std::slice::from_ref(&sweep.id));
            assert!(age.is_some_and(|seconds| seconds >= 7), "{age:?}");
            let request = v1::GetSweepRequest { sweep_id: sweep.id.clone() };
            let found = coordinator.sweeps().get_sweep(request).await.unwrap();
            assert!(is_old(&found) && found.into_inner().sweep.unwrap().spec == sweep.spec);
            let request = v1::ListTrialsRequest { sweep_id: sweep.id.clone(), ..Default::default() };
            let trials = coordinator.trials().list_trials(request).await.unwrap();
            assert!(is_old(&trials));
            let trial_id = trials.into_inner().trials[0].id.clone();
            let request = v1::GetTrialRequest { trial_id: trial_id.clone() };
            assert!(is_old(&coordinator.trials().get_trial(request).await.unwrap()));
            let request = v1::GetTrialMetricsRequest { trial_id: trial_id.clone(), first_step: 0 };
            assert!(is_old(&coordinator.trials().get_trial_metrics(request).await.unwrap()));
            let request = v1::GetTrialLogRequest { trial_id: trial_id.clone(), follow: false };
            let log = coordinator.trials().get_trial_log(request).await.unwrap();
            assert!(is_old(&log));
            assert_eq!(log.into_inner().message().await.unwrap().unwrap().event, "proposed");
            let request = v1::GetReportRequest { sweep_id: sweep.id.clone(), ..Default::default() };
            assert!(is_old(&coordinator.sweeps().get_report(request).await.unwrap()));
            let mut agents = FleetServiceClient::new(coordinator.channel.clone());
            let agents = agents.list_agents(v1::ListAgentsRequest::default()).await.unwrap();
            assert!(is_old(&agents) && agents.into_inner().agents[0].registered);
            let page = coordinator.browse("GET /api/server").await;
            assert!(page.starts_with("HTTP/1.1 200 ") && page.contains(STALE_SECONDS), "{page}");
            assert_eq!(coordinator.health().await, LIVES);

            // Whatever changes something is refused at once.
            let refused = coordinator.submit().await.unwrap_err();
            assert_eq!(refused.code(), Code::Unavailable, "{refused}");
            assert!(refused.metadata().get(STALE_SECONDS).is_none(), "a refusal tells nothing");
            let request = v1::CancelSweepRequest { sweep_id: sweep.id.clone() };
            let refused = coordinator.sweeps().cancel_sweep(request).await.unwrap_err();
            assert_eq!(refused.code(), Code::Unavailable, "{refused}");
            let page = coordinator.browse(&format!("POST /api/sweeps/{}/cancel", sweep.id)).await;
            assert!(page.starts_with("HTTP/1.1 503 "), "{page}");
        };
        tokio::select! {
            () = asked => {}
            _ = led => panic!("nobody elected it"),
        }
        turn.scope.finish(PATIENCE).await;
    }

    // Who watches sees what was known, and nothing more until another leads.
    let request = v1::WatchSweepRequest { sweep_id: sweep.id.clone() };
    let watched = coordinator.sweeps().watch_sweep(request).await.unwrap();
    assert!(is_old(&watched));
    let mut watched = watched.into_inner();
    for event in ["the sweep", "a trial", "another"] {
        watched.message().await.unwrap().expect(event);
    }
    let (turn, led) = coordinator.turn();
    coordinator.said.say(Ok("http://other:7401"));
    let told = async {
        let refused = coordinator.refuses("http://other:7401 leads").await;
        assert_eq!(reason(&refused), "STANDBY");
        assert_eq!(watched.message().await.unwrap_err().code(), Code::Unavailable);
        // It leads again: nothing was changed, and nothing is old.
        turn.elects.send_replace(true);
        turn.lets_read.send_replace(true);
        while coordinator.list().await.is_err() {}
    };
    let (led, ()) = tokio::time::timeout(PATIENCE, async { tokio::join!(led, told) }).await.unwrap();
    led.unwrap();
    assert_eq!(coordinator.list().await.unwrap(), (vec![sweep.id], None));
    coordinator.submit().await.unwrap();
    coordinator.end(turn).await;
    assert!(scope.finish(PATIENCE).await);
}

/// Whether an answer says that it is old.
fn is_old<T>(answer: &tonic::Response<T>) -> bool {
    age(answer).is_some()
}
