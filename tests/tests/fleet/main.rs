//! The programs of a fleet as people start them: coordinators and agents over a real etcd, killed with SIGKILL.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "../common/mod.rs"]
mod common;
mod faults;
mod ready;
mod restored;
mod specs;
mod spot;
mod stale;
mod upgrade;

use common::{results, submit, until};
use proto::v1;
use proto::v1::trial_service_client::TrialServiceClient;
use registry::Leadership;
use registry::etcd::{EtcdOptions, Members};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::time::Duration;
use tests::etcd::Etcd;
use tests::program::{self, Program};
use tests::s3::S3;

/// What a test waits for at most.
const PATIENCE: Duration = Duration::from_secs(60);
/// Seconds within which trials are placed again, and another leads, once the lease has ended.
const REPLACED_WITHIN: f64 = 5.0;
/// Seconds of the lease of trials, unless a test has its own: longer than an agent's pause between two tries to connect.
const ASSIGNMENT_LEASE: &str = "8";
/// Seconds of the leader's lease.
const ELECTION_TTL: &str = "2";

/// A fleet over an etcd.
struct Fleet {
    /// Its nodes.
    etcd: Vec<Etcd>,
    /// Their addresses, also of those that are gone.
    endpoints: String,
    dir: tempfile::TempDir,
}

impl Fleet {
    fn new() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let etcd = Etcd::start(&dir.path().join("etcd"))?;
        Some(Self::over(vec![etcd], dir))
    }

    fn of_three_nodes() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let nodes = Etcd::start_three(&dir.path().join("etcd"), 2000)?;
        Some(Self::over(nodes.into(), dir))
    }

    fn over(etcd: Vec<Etcd>, dir: tempfile::TempDir) -> Self {
        let endpoints = etcd.iter().map(|node| node.endpoint.as_str()).collect::<Vec<_>>().join(",");
        Self { etcd, endpoints, dir }
    }

    fn coordinator(&self) -> Program {
        self.coordinator_with(&["--election-ttl", ELECTION_TTL, "--assignment-lease", ASSIGNMENT_LEASE])
    }

    fn coordinator_with(&self, options: &[&str]) -> Program {
        let artifacts = self.dir.path().join("artifacts");
        let etcd = ["--listen", "127.0.0.1:0", "--etcd", &self.endpoints];
        let artifacts = ["--artifacts", artifacts.to_str().unwrap()];
        // Tests ask again and again, without a pause, what people ask now and then.
        Program::start_with("coordinator", &[&etcd[..], &artifacts, options].concat(), |command| {
            command.env("LORAFLEET_MAX_CALLS_PER_SECOND", "1000000");
        })
    }

    /// One that shares no directory with others.
    fn coordinator_on(&self, store: &S3) -> Program {
        let etcd = ["--listen", "127.0.0.1:0", "--election-ttl", ELECTION_TTL, "--etcd", &self.endpoints];
        // Longer than an agent takes to find out that a coordinator does not answer.
        let rest = ["--assignment-lease", "60", "--artifacts", "s3://fleet/of/tests"];
        let started = |command: &mut Command| {
            command.envs(store.variables());
        };
        Program::start_with("coordinator", &[&etcd[..], &rest].concat(), started)
    }

    fn agent(&self, name: &str) -> Program {
        self.agent_with(name, &[])
    }

    fn agent_with(&self, name: &str, options: &[&str]) -> Program {
        self.agent_of(name, &[&["--etcd", &self.endpoints], options].concat())
    }

    /// One that is told where its coordinator is.
    fn agent_of(&self, name: &str, options: &[&str]) -> Program {
        let data = self.dir.path().join(name);
        let own = ["--devices", "cpu", "--data-dir", data.to_str().unwrap()];
        Program::start("gpu-agent", &[&own[..], options].concat())
    }

    async fn members(&self) -> Members {
        Members::connect(&EtcdOptions::new(self.endpoints.split(',').map(String::from).collect()))
            .await
            .unwrap()
    }
}

/// Returns once so many agents are registered.
async fn there(members: &Members, count: usize) {
    while members.members().await.unwrap().len() != count {
        tokio::task::yield_now().await;
    }
}

/// What a browser is answered there.
fn browse(endpoint: &str) -> String {
    let mut stream = TcpStream::connect(endpoint.trim_start_matches("http://")).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("waited in vain for {what}"))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_and_an_agent_are_killed_and_nothing_is_lost() {
    let Some(fleet) = Fleet::new() else { return };

    // Undisturbed, on programs without etcd.
    let dir = fleet.dir.path();
    let data = dir.join("alone");
    let mut alone =
        Program::start("coordinator", &["--listen", "127.0.0.1:0", "--data-dir", data.to_str().unwrap()]);
    let endpoint = alone.says("listening on ");
    let data = dir.join("alone-agent");
    let options = ["--coordinator", &endpoint, "--devices", "cpu", "--data-dir", data.to_str().unwrap()];
    let agent = Program::start("gpu-agent", &options);
    let sweep = submit(&endpoint).await;
    soon("the sweep", until(&endpoint, &sweep, u64::MAX)).await;
    let undisturbed = results(&endpoint, &sweep).await;
    faults::completed(&undisturbed, 1);
    assert!(agent.terminate() && alone.terminate());

    let mut first = fleet.coordinator();
    let first_at = first.says("listening on ");
    first.says("leading");
    let mut second = fleet.coordinator();
    let second_at = second.says("listening on ");
    let agent = fleet.agent("first-agent");
    let sweep = submit(&first_at).await;
    soon("training", until(&first_at, &sweep, 10)).await;

    // Whoever asks the one that stands by is sent to the one that leads.
    let list = |endpoint: &str| {
        let output = Command::new(program::path("lorafleet"))
            .args(["list", "-o", "json", "--endpoint", endpoint])
            .output();
        let output = output.unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(list(&second_at).contains(&sweep));
    // A browser that asks it is told who leads, and shown the page by that one.
    let told = browse(&second_at);
    assert!(told.starts_with("HTTP/1.1 503 ") && told.contains(&format!("{first_at} leads")), "{told}");
    let shown = browse(&first_at);
    assert!(shown.starts_with("HTTP/1.1 200 ") && shown.contains("<title>LoraFleet</title>"), "{shown}");

    // The leader is gone: its agent trains on, and the other one adopts it.
    let killed = now();
    first.kill();
    second.says("leading");
    let leads_after = now() - killed;
    println!("another leads after {leads_after:.1} s, of a lease of {ELECTION_TTL} s");
    assert!(leads_after <= ELECTION_TTL.parse::<f64>().unwrap() + REPLACED_WITHIN, "{leads_after} s");
    assert!(list(&format!("{first_at},{second_at}")).contains(&sweep));
    soon("training under the second", until(&second_at, &sweep, 30)).await;
    let trials = attempts(&second_at, &sweep).await;
    assert!(trials.values().all(|attempt| *attempt == 1), "no training step paused: {trials:?}");

    // The agent is gone: another one that joins goes on from the last checkpoints.
    let joined = fleet.agent("second-agent");
    let members = fleet.members().await;
    soon("two members", there(&members, 2)).await;
    let killed = now();
    agent.kill();
    soon("the end", until(&second_at, &sweep, u64::MAX)).await;
    let found = results(&second_at, &sweep).await;
    placed_again(&second_at, &sweep, killed, ASSIGNMENT_LEASE).await;
    for (number, trial) in &found {
        assert_eq!(trial.losses, undisturbed[number].losses, "trial {number}");
        assert_eq!((trial.state, trial.attempts), (v1::TrialState::Completed, 2), "trial {number}");
    }
    assert_eq!(found.len(), undisturbed.len());
    soon("the dead agent's lease to end", there(&members, 1)).await;
    // Who is told to stop leaves at once, and not when a lease ends.
    assert!(joined.terminate());
    assert_eq!(members.members().await.unwrap(), []);
    assert!(second.terminate());
    assert_eq!(members.leader().await.unwrap(), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_etcd_that_stands_still_costs_no_step() {
    let Some(fleet) = Fleet::new() else { return };
    let mut coordinator = fleet.coordinator();
    let endpoint = coordinator.says("listening on ");
    coordinator.says("leading");
    let _agent = fleet.agent("agent");
    let sweep = submit(&endpoint).await;
    soon("training", until(&endpoint, &sweep, 10)).await;

    // The leader cannot renew its lease, so that it gives up by itself; the agent trains on.
    fleet.etcd[0].signal("STOP");
    coordinator.says("standing by");
    fleet.etcd[0].signal("CONT");
    coordinator.says("leading");
    soon("the sweep", until(&endpoint, &sweep, u64::MAX)).await;
    faults::completed(&results(&endpoint, &sweep).await, 1);
    assert!(coordinator.terminate());
}

/// The leader's process is stopped for longer than its lease, while another leads in the same object store; then it goes
/// on, with what agents had said to it still to be read, and with what it had begun.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_is_stopped_and_goes_on_has_no_effect() {
    let Some(fleet) = Fleet::new() else { return };
    let store = S3::start();
    let mut first = fleet.coordinator_on(&store);
    let first_at = first.says("listening on ");
    first.says("leading");
    let mut second = fleet.coordinator_on(&store);
    let second_at = second.says("listening on ");
    let agent = fleet.agent("agent");
    let sweep = submit(&first_at).await;
    soon("training", until(&first_at, &sweep, 10)).await;
    // It is stopped with a write of metrics on its way.
    let held = store.hold("PUT", "of/tests/history/");
    soon("a write", held.arrived()).await;
    tests::signal(first.id(), "STOP");
    second.says("leading");
    held.release();
    tests::signal(first.id(), "CONT");
    first.says("standing by");

    soon("the sweep", until(&second_at, &sweep, u64::MAX)).await;
    let found = results(&second_at, &sweep).await;
    faults::completed(&found, 1);
    assert!(agent.terminate());
    // All of it is in the store: the first reads what the second wrote.
    assert!(second.terminate());
    first.says("leading");
    assert_eq!(results(&first_at, &sweep).await, found);
    assert!(first.terminate());
    assert_eq!(store.uploads(), 0);
    // Of each trial there is the checkpoint that its record points at, and nothing else.
    let mut parts: Vec<_> =
        store.keys("/sweeps/").iter().map(|key| key.rsplit_once('/').unwrap().0.to_string()).collect();
    parts.dedup();
    assert_eq!(parts.len(), found.len(), "{parts:?}");
}

/// The attempts of a sweep's trials by their ids.
async fn attempts(endpoint: &str, sweep_id: &str) -> BTreeMap<String, u32> {
    let mut client = TrialServiceClient::connect(endpoint.to_string()).await.unwrap();
    let request = v1::ListTrialsRequest { sweep_id: sweep_id.into(), ..v1::ListTrialsRequest::default() };
    let trials = client.list_trials(request).await.unwrap().into_inner().trials;
    trials.into_iter().map(|trial| (trial.id, trial.attempt)).collect()
}

/// Sees that each trial of a sweep was given to an agent a second time soon enough after its first agent fell silent, whose lease
/// has so many seconds: by the coordinator's own records, whose clock is the one of `silent_at`.
async fn placed_again(endpoint: &str, sweep_id: &str, silent_at: f64, lease: &str) {
    let mut client = TrialServiceClient::connect(endpoint.to_string()).await.unwrap();
    let most = lease.parse::<f64>().unwrap() + REPLACED_WITHIN;
    for trial_id in attempts(endpoint, sweep_id).await.into_keys() {
        let request = v1::GetTrialLogRequest { trial_id: trial_id.clone(), follow: false };
        let mut log = client.get_trial_log(request).await.unwrap().into_inner();
        let mut placed = None;
        while let Some(entry) = log.message().await.unwrap() {
            if (entry.event.as_str(), entry.attempt) == ("assigned", 2) {
                placed = entry.time.map(|at| seconds(at.seconds, at.nanos));
            }
        }
        let after = placed.expect("it was assigned twice") - silent_at;
        println!("{trial_id}: placed again after {after:.1} s, of a lease of {lease} s");
        assert!((0.0..=most).contains(&after), "{trial_id}: {after} s, of {most}");
    }
}

/// The hour in seconds.
fn now() -> f64 {
    use domain::Clock;
    domain::SystemClock::new().now().0 as f64 / 1e3
}

/// The same of an hour on the wire.
fn seconds(seconds: i64, nanos: i32) -> f64 {
    seconds as f64 + f64::from(nanos) / 1e9
}

/// What a program refuses, and in what words.
#[test]
fn arguments_that_are_refused() {
    let rows: &[(&str, &[&str], &str)] = &[
        ("coordinator", &["--listen", "0.0.0.0:0"], "--allow-plaintext"),
        ("coordinator", &["--etcd", "http://127.0.0.1:1"], "--artifacts"),
        (
            "coordinator",
            &["--etcd", "http://127.0.0.1:1", "--artifacts", "ftp://bucket"],
            "s3://BUCKET/PREFIX",
        ),
        ("coordinator", &["--election-ttl", "1"], "2..=300"),
        ("gpu-agent", &[], "--coordinator"),
        ("gpu-agent", &["--coordinator", "http://127.0.0.1:1", "--devices", "7"], "no GPU \"7\""),
        ("gpu-agent", &["--coordinator", "not an address"], "https://HOST:PORT"),
        ("gpu-agent", &["--etcd", "not an address"], "--etcd not an address: "),
        ("coordinator", &["--tls-cert", "x"], "--tls-key"),
        ("coordinator", &["--tls-cert", "gone.crt", "--tls-key", "gone.key"], "gone.crt: No such file"),
        ("coordinator", &["--listen", "127.0.0.1:0", "--data-dir", "later"], "newer LoraFleet (format 7 >"),
    ];
    let dir = tempfile::tempdir().unwrap();
    // The head of a metric segment: its magic, then its format.
    let history = dir.path().join("later/history");
    std::fs::create_dir_all(&history).unwrap();
    let head = [&b"LFMETRIC"[..], &7u32.to_le_bytes(), &[0; 12]].concat();
    std::fs::write(history.join("segment-00000001.log"), head).unwrap();
    for (name, arguments, expected) in rows {
        let output =
            Command::new(program::path(name)).args(*arguments).current_dir(dir.path()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains(expected), "{name} {arguments:?}: {said}");
        assert_eq!(output.status.code(), Some(2), "{name} {arguments:?}: {said}");
    }
}
