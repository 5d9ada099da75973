//! What the end-to-end tests share.

pub mod certificates;
pub mod etcd;
pub mod log;
pub mod program;

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

/// Sends a process a signal, such as `STOP`.
///
/// # Panics
/// It cannot be sent.
#[allow(clippy::expect_used, reason = "a test fails by panicking")]
pub fn signal(pid: u32, name: &str) {
    let sent = std::process::Command::new("kill").args(["-s", name, &pid.to_string()]).status();
    assert!(sent.expect("kill runs").success(), "kill -s {name} {pid}");
}
