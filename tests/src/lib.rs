//! What the end-to-end tests share.

pub mod certificates;
pub mod etcd;
pub mod http;
pub mod log;
pub mod metadata;
pub mod program;
pub mod proxy;
pub mod s3;

use std::io::Write;
use std::path::PathBuf;

/// The repository's root.
pub fn root() -> PathBuf {
    let mut root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    root.pop();
    root
}

/// Says that this machine cannot run a test, and why: on the spot, and at the end of `tests/run`.
#[allow(clippy::print_stderr, reason = "a test says why it did nothing")]
pub fn skipped(why: &str) {
    eprintln!("SKIPPED: {why}");
    if let Some(path) = std::env::var_os("LORAFLEET_SKIPPED") {
        let file = std::fs::OpenOptions::new().append(true).create(true).open(path);
        // That it was said on the spot is enough where the file cannot be written.
        let _ = file.and_then(|mut file| writeln!(file, "SKIPPED: {why}"));
    }
}

/// The seeds of a test that kills processes: 5, or 50 with `LORAFLEET_FULL`, or the one that `LORAFLEET_SEED` replays.
///
/// # Panics
/// `LORAFLEET_SEED` is no number.
pub fn seeds() -> Vec<u64> {
    seeds_up_to(5)
}

/// The seeds of a test that draws its faults: `count`, or ten times as many with `LORAFLEET_FULL`, or the one that
/// `LORAFLEET_SEED` replays.
///
/// # Panics
/// `LORAFLEET_SEED` is no number.
#[allow(clippy::expect_used, reason = "a test fails by panicking")]
pub fn seeds_up_to(count: u64) -> Vec<u64> {
    if let Ok(seed) = std::env::var("LORAFLEET_SEED") {
        return vec![seed.parse().expect("LORAFLEET_SEED is a number")];
    }
    (1..=if std::env::var_os("LORAFLEET_FULL").is_some() { 10 * count } else { count }).collect()
}

/// Sets the clock of a test's runtime, of one thread, forward: nothing waits for that.
pub async fn after(time: std::time::Duration) {
    tokio::time::pause();
    tokio::time::advance(time).await;
    tokio::time::resume();
}

/// Sends a process a signal, such as `STOP`.
///
/// # Panics
/// It cannot be sent.
#[allow(clippy::expect_used, reason = "a test fails by panicking")]
pub fn signal(pid: u32, name: &str) {
    let sent = std::process::Command::new("kill").args(["-s", name, &pid.to_string()]).status();
    assert!(sent.expect("kill runs").success(), "kill -s {name} {pid}");
}
