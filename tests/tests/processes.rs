//! A coordinator and an agent in processes of their own, each killed alone with SIGKILL. This program is also those
//! processes: [`role`] is what they run.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use actor::Scope;
use common::{Trial, results, submit, until};
use domain::{Clock, SystemClock, rng};
use proto::v1;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

/// What a test waits for at most.
const PATIENCE: Duration = Duration::from_secs(120);

const ROLE: &str = "LORAFLEET_TEST_ROLE";
const DIR: &str = "LORAFLEET_TEST_DIR";
const ADDRESS: &str = "LORAFLEET_TEST_ADDRESS";

/// What the two processes run; nothing when the tests are run.
#[test]
fn role() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let (dir, address) = (std::env::var(DIR).unwrap(), std::env::var(ADDRESS).unwrap());
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
        let scope = Scope::new();
        let (data_dir, heartbeat, lease) = (dir.into(), Duration::from_millis(100), Duration::from_secs(5));
        let address = if role == "coordinator" {
            let listen = address.parse().unwrap();
            let access = coordinator::Access::default();
            let options = coordinator::Options { data_dir, listen, clock, heartbeat, lease, access };
            coordinator::start(options, scope.clone()).await.unwrap().address.to_string()
        } else {
            let endpoint = format!("http://{address}");
            let (devices, labels) = (vec![gpu_agent::devices::cpu()], BTreeMap::new());
            let (coordinator, cache_limit) = (endpoint.into(), gpu_agent::cache::DEFAULT_LIMIT);
            let options = gpu_agent::Options { coordinator, data_dir, devices, labels, cache_limit, clock };
            gpu_agent::start(options, scope.clone()).await.unwrap();
            address
        };
        println!("ready {address}");
        scope.cancelled().await;
    });
}

/// One of the two processes. It is killed when it is dropped.
struct Process {
    child: Child,
    address: String,
}

impl Process {
    fn start(role: &str, dir: &Path, address: &str) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "role", "--nocapture"]).stdout(Stdio::piped());
        command.env(ROLE, role).env(DIR, dir.join(role)).env(ADDRESS, address);
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let ready =
            lines.find_map(|line| line.unwrap().split_once("ready ").map(|(_, address)| address.to_string()));
        Self { child, address: ready.expect("the process starts") }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// Trains the sweep; each kill is of one process, once a trial has come to a step.
async fn train(kills: &[(&str, u64)]) -> BTreeMap<String, Trial> {
    let dir = tempfile::tempdir().unwrap();
    let mut coordinator = Process::start("coordinator", dir.path(), "127.0.0.1:0");
    let address = coordinator.address.clone();
    let mut agent = Process::start("agent", dir.path(), &address);
    let endpoint = format!("http://{address}");
    let sweep_id = submit(&endpoint).await;
    let reach = async |step| {
        let reached = tokio::time::timeout(PATIENCE, until(&endpoint, &sweep_id, step)).await;
        reached.unwrap_or_else(|_| panic!("{kills:?}: waited in vain for step {step}"));
    };
    for (role, step) in kills {
        reach(*step).await;
        let killed = if *role == "agent" { &mut agent } else { &mut coordinator };
        killed.child.kill().unwrap();
        killed.child.wait().unwrap();
        *killed = Process::start(role, dir.path(), &address);
    }
    reach(u64::MAX).await;
    let results = results(&endpoint, &sweep_id).await;
    drop((agent, coordinator));
    let found = coordinator::fsck::check(&dir.path().join("coordinator")).unwrap();
    assert!(found.problems.is_empty(), "{kills:?}: {:#?}", found.problems);
    results
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn either_process_can_be_killed_alone() {
    let uninterrupted = train(&[]).await;
    let completed = |trial: &Trial| trial.state == v1::TrialState::Completed && trial.attempts == 1;
    assert!(uninterrupted.len() == 2 && uninterrupted.values().all(completed), "{uninterrupted:?}");

    // Without a coordinator the agent trains on: no step is made twice, so that there is no second attempt.
    assert_eq!(train(&[("coordinator", 10), ("coordinator", 40)]).await, uninterrupted);

    // Without its agent a trial goes on from its last checkpoint, to the same losses.
    let found = train(&[("agent", 10), ("agent", 40), ("coordinator", 60)]).await;
    for (number, trial) in &found {
        assert_eq!(
            (trial.state, &trial.losses),
            (uninterrupted[number].state, &uninterrupted[number].losses)
        );
        assert!(trial.attempts > 1, "an agent was killed while it trained trial {number}");
    }
}

/// Kills of drawn processes at drawn steps. Far enough apart that every trial has a new checkpoint between two.
fn drawn(seed: u64) -> Vec<(&'static str, u64)> {
    let key = rng::key(seed, "processes");
    let mut step = 0;
    let kills = (0..3).map(|kill| {
        step += 8 + rng::bits(key, 2 * kill) % 16;
        (["agent", "coordinator"][rng::bits(key, 2 * kill + 1) as usize % 2], step)
    });
    kills.collect()
}

/// `LORAFLEET_SEED=n` replays one seed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn processes_that_are_killed_at_drawn_moments_lose_nothing() {
    let uninterrupted = train(&[]).await;
    for seed in tests::seeds() {
        println!("LORAFLEET_SEED={seed}");
        let kills = drawn(seed);
        for (number, trial) in train(&kills).await {
            let expected = &uninterrupted[&number];
            assert_eq!(
                (trial.state, &trial.losses),
                (expected.state, &expected.losses),
                "trial {number}, LORAFLEET_SEED={seed}: {kills:?}"
            );
        }
    }
}
