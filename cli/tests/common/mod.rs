//! What the tests of the command share.

#![allow(dead_code, reason = "each test uses its part")]

use serde_json::Value;
use std::path::Path;
use std::process::{Command, Output};

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
