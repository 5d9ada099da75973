//! What hostile input leaves in the memory of a server, which is a process of its own. This program is also that
//! process: [`role`] is what it runs.

use super::bytes::{methods, send};
use super::fixture::LONG;
use actor::Scope;
use domain::SystemClock;
use prost::Message;
use proto::v1;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use v1::session_request::Message as Say;

const DIR: &str = "LORAFLEET_TEST_DIR";

/// What the server's process runs; nothing when the tests are run.
#[test]
fn role() {
    let Ok(dir) = std::env::var(DIR) else { return };
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let scope = Scope::new();
        let options = coordinator::Options {
            data_dir: dir.into(),
            listen: "127.0.0.1:0".parse().unwrap(),
            clock: Arc::new(SystemClock::new()),
            heartbeat: LONG / 4,
            lease: LONG,
            access: coordinator::Access::default(),
        };
        println!("ready {}", coordinator::start(options, scope.clone()).await.unwrap().address);
        scope.cancelled().await;
    });
}

/// The server. It is killed when it is dropped.
struct Server(Child, String);

impl Server {
    fn start(dir: &Path) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "memory::role", "--nocapture"]).env(DIR, dir).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let ready =
            lines.find_map(|l| l.unwrap().split_once("ready ").map(|(_, address)| address.to_string()));
        Self(child, ready.expect("the server starts"))
    }

    /// Megabytes of a field of `/proc/<process>/status`.
    fn megabytes(&self, field: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(field)).unwrap();
        line.trim().trim_end_matches("kB").trim().parse::<u64>().unwrap() / 1000
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// A message just below the limit, one above it, one that is no message, and an agent that says as much of itself as it
/// may: the same one each round, since those that were let in are remembered for a while.
fn messages(round: usize) -> Vec<Vec<u8>> {
    let name = |i: usize| format!("{round}-{i}-{}", "x".repeat(150));
    let device =
        |i| v1::Device { id: name(i), accelerator: name(i), max_pack_size: 1, ..v1::Device::default() };
    let (version, devices) = (proto::version::VERSION.into(), (0..1000).map(device).collect());
    let agent = v1::Agent { id: "a".repeat(200), version, devices, ..v1::Agent::default() };
    let holding =
        |i| v1::Holding { trial_id: format!("{}/1", name(i)), attempt: 1, step: 1, held_seconds: None };
    let hello = v1::Hello { agent: Some(agent), holdings: (0..1000).map(holding).collect() };
    vec![
        v1::GetSweepRequest { sweep_id: "x".repeat(4_000_000) }.encode_to_vec(),
        v1::GetSweepRequest { sweep_id: "x".repeat(5_000_000) }.encode_to_vec(),
        (0..4_000_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect(),
        v1::SessionRequest { message: Some(Say::Hello(hello)) }.encode_to_vec(),
    ]
}

/// What was refused is forgotten. Linux alone tells a process's memory so.
#[cfg(target_os = "linux")]
#[tokio::test]
async fn hostile_input_does_not_fill_the_servers_memory() {
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(dir.path());
    let channel = super::fixture::line(&format!("http://{}", server.1), None).await;
    let round = async |round| {
        for message in messages(round) {
            for method in methods() {
                // Whatever it answers: other tests look at that.
                let _ = send(&channel, &method, vec![message.clone()]).await;
            }
        }
    };
    round(0).await;
    let before = server.megabytes("VmRSS:");
    let rounds = if std::env::var_os("LORAFLEET_FULL").is_some() { 50 } else { 3 };
    for number in 1..=rounds {
        round(number).await;
    }
    let (after, peak) = (server.megabytes("VmRSS:"), server.megabytes("VmHWM:"));
    assert!(after < before + 60 && peak < 250, "{before} MB, {after} MB in the end, {peak} MB at most");
}
