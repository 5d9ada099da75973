//! What the tests of the command share.

#![allow(dead_code, reason = "each test uses its part")]

pub mod mlflow;

use domain::{Clock, SystemClock};
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

/// Tests ask again and again, without a pause, what people ask now and then.
pub const UNHURRIED: (&str, &str) = ("LORAFLEET_MAX_CALLS_PER_SECOND", "1000000");

/// What a test waits for at most.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Asks again and again, until there is an answer.
pub fn soon<T>(what: &str, ask: impl Fn() -> Option<T>) -> T {
    let clock = SystemClock::new();
    loop {
        if let Some(found) = ask() {
            return found;
        }
        assert!(clock.monotonic() < PATIENCE, "waited in vain for {what}");
    }
}

/// A sweep file and a data directory of one test.
pub struct Sandbox {
    pub dir: tempfile::TempDir,
    /// The server to talk to, if it is not the data directory's.
    pub endpoint: Option<String>,
}

impl Sandbox {
    pub fn new(sweep: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("sweep.yaml"), sweep).unwrap();
        Self { dir, endpoint: None }
    }

    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lorafleet"));
        command.args(args).current_dir(self.dir.path()).env_remove("LORAFLEET_ENDPOINT");
        command.envs(self.endpoint.as_ref().map(|endpoint| ("LORAFLEET_ENDPOINT", endpoint)));
        command.env_remove("LORAFLEET_DATA_DIR").env("XDG_CONFIG_HOME", self.dir.path().join("config"));
        command.env(UNHURRIED.0, UNHURRIED.1).env_remove("MLFLOW_TRACKING_URI");
        for who in ["USERNAME", "PASSWORD", "TOKEN"] {
            command.env_remove(format!("MLFLOW_TRACKING_{who}"));
        }
        command
    }

    pub fn lorafleet(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    /// What a command that must succeed prints as JSON.
    pub fn json(&self, args: &[&str]) -> Value {
        let output = self.lorafleet(&[args, &["-o", "json"]].concat());
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

/// The processes that a process started to host an engine with so much memory; any with `None`.
pub fn engines(parent: u32, memory: Option<u64>) -> Vec<u32> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap() {
        let path = entry.unwrap().path();
        let Some(pid) = path.file_name().and_then(|name| name.to_str()?.parse::<u32>().ok()) else {
            continue;
        };
        // It may end meanwhile.
        let read = |file: &str| std::fs::read(path.join(file)).unwrap_or_default();
        let status = String::from_utf8_lossy(&read("status")).into_owned();
        let mut arguments = read("cmdline");
        arguments.iter_mut().filter(|byte| **byte == 0).for_each(|byte| *byte = b' ');
        let arguments = String::from_utf8_lossy(&arguments).into_owned();
        let memory = memory.map_or(String::new(), |memory| format!(" --memory-bytes {memory} "));
        if status.contains(&format!("PPid:\t{parent}\n"))
            && arguments.contains(" engine-host ")
            && arguments.contains(&memory)
        {
            found.push(pid);
        }
    }
    found
}
