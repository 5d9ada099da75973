//! The coordinator under test: `lorafleet up` as a process of its own, on a data directory that goes with it.

use crate::Failure;
use crate::client::ENDPOINT_FILE;
use domain::{Clock, SystemClock};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};
use tempfile::TempDir;

/// More calls than there are.
const UNLIMITED: &str = "1000000";

/// The process; killed when dropped.
pub(super) struct Server {
    child: Child,
    /// Kept open: a server whose messages nobody reads must not end of it.
    _stderr: BufReader<ChildStderr>,
    endpoint: String,
    dir: TempDir,
}

impl Server {
    /// Starts it in a new folder below `parent`.
    pub(super) fn start(parent: Option<&Path>) -> Result<Self, Failure> {
        let dir = match parent {
            Some(parent) => TempDir::new_in(parent),
            None => TempDir::new(),
        };
        let dir = dir.map_err(|e| Failure::invalid(format!("--dir: cannot make a folder: {e}")))?;
        let data_dir = dir.path().join("data");
        let failed = |e: std::io::Error| Failure::failed(format!("cannot start `lorafleet up`: {e}"));
        let mut command =
            lorafleet(&["up", "--listen", "127.0.0.1:0", "--spot-notice", "off", "--data-dir"])?;
        // All agents are one client, that of this machine.
        command.env("LORAFLEET_MAX_CALLS", UNLIMITED).env("LORAFLEET_MAX_CALLS_PER_SECOND", UNLIMITED);
        let mut child = command.arg(&data_dir).stderr(Stdio::piped()).spawn().map_err(failed)?;
        let stderr =
            child.stderr.take().ok_or_else(|| Failure::failed("`lorafleet up` has no standard error"))?;
        let mut stderr = BufReader::new(stderr);
        let mut line = String::new();
        stderr.read_line(&mut line).map_err(failed)?;
        let endpoint = std::fs::read_to_string(data_dir.join(ENDPOINT_FILE)).unwrap_or_default();
        // From here on dropping ends the process.
        let server = Self { child, _stderr: stderr, endpoint: endpoint.trim().into(), dir };
        match line.contains(" serving ") {
            true => Ok(server),
            false => Err(Failure::failed(format!("`lorafleet up` did not start: {}", line.trim()))),
        }
    }

    /// Where it serves.
    pub(super) fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Seconds that a verb takes as a process of its own, from its start to its end.
    pub(super) fn time(&self, verb: &[&str]) -> Result<f64, Failure> {
        let clock = SystemClock::new();
        let started = clock.monotonic();
        let mut command = lorafleet(verb)?;
        let status = command.args(["--endpoint", &self.endpoint]).stdout(Stdio::null()).status();
        match status {
            Ok(status) if status.success() => Ok((clock.monotonic() - started).as_secs_f64()),
            other => Err(Failure::failed(format!("`lorafleet {}`: {other:?}", verb.join(" ")))),
        }
    }

    /// What the process uses, as Linux counts it: `rss_bytes` now, `peak_rss_bytes` so far.
    pub(super) fn usage(&self) -> Result<Value, Failure> {
        let path = PathBuf::from(format!("/proc/{}/status", self.child.id()));
        let status = std::fs::read_to_string(&path).map_err(|e| {
            Failure::failed(format!("{}: {e}; the process's memory is read there", path.display()))
        })?;
        let bytes = |field: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(field))?;
            Some(line.trim().trim_end_matches("kB").trim().parse::<u64>().ok()? * 1024)
        };
        Ok(json!({ "rss_bytes": bytes("VmRSS:"), "peak_rss_bytes": bytes("VmHWM:") }))
    }

    /// Bytes of all files in its data directory.
    pub(super) fn bytes(&self) -> u64 {
        fn below(dir: &Path) -> u64 {
            let entries = std::fs::read_dir(dir)
                .map(|entries| entries.flatten().collect::<Vec<_>>())
                .unwrap_or_default();
            let size = |entry: &std::fs::DirEntry| match entry.metadata() {
                Ok(metadata) if metadata.is_dir() => below(&entry.path()),
                Ok(metadata) => metadata.len(),
                Err(_) => 0,
            };
            entries.iter().map(size).sum()
        }
        below(self.dir.path())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may be over already; then there is nothing to end.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A verb of this same program.
fn lorafleet(args: &[&str]) -> Result<Command, Failure> {
    let program = std::env::current_exe().map_err(|e| Failure::failed(format!("cannot find myself: {e}")))?;
    let mut command = Command::new(program);
    command.args(args).env_remove("LORAFLEET_ENDPOINT").stdin(Stdio::null());
    Ok(command)
}
