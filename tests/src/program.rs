//! The programs of the workspace, as people start them.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::Duration;
use tokio::time::Instant;

/// Longer than a program takes to say anything, or to end; a test that waits this long has failed.
const PATIENCE: Duration = Duration::from_secs(120);
/// The pause between two looks at whether it has ended.
const LOOK: Duration = Duration::from_millis(20);

/// A program of the workspace. `cargo test --workspace` builds it.
///
/// # Panics
/// It is not there.
#[allow(clippy::expect_used, reason = "a test fails by panicking")]
pub fn path(name: &str) -> PathBuf {
    let tests = std::env::current_exe().expect("this test is a program");
    let path = tests.parent().and_then(Path::parent).expect("it lies in target/").join(name);
    assert!(path.exists(), "{} is not built: cargo build --release --workspace", path.display());
    path
}

/// Runs a program with these variables; its exit code, and what it says on standard output and standard error.
///
/// # Panics
/// It cannot be started.
#[allow(clippy::expect_used, reason = "a test fails by panicking")]
pub fn output(name: &str, arguments: &[&str], variables: &[(&str, &str)]) -> (Option<i32>, String, String) {
    let output = Command::new(path(name)).args(arguments).envs(variables.iter().copied()).output();
    let output = output.expect("it starts");
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

/// A running program. It is killed when it is dropped.
pub struct Program {
    child: Child,
    lines: Receiver<std::io::Result<String>>,
    /// What it said and was heard.
    heard: Vec<String>,
}

#[allow(clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]
impl Program {
    /// Starts one that speaks on standard output.
    ///
    /// # Panics
    /// It cannot be started.
    pub fn start(name: &str, arguments: &[&str]) -> Self {
        Self::start_with(name, arguments, |_| {})
    }

    /// The same with other variables, or with its log elsewhere.
    ///
    /// # Panics
    /// It cannot be started.
    pub fn start_with(name: &str, arguments: &[&str], how: impl FnOnce(&mut Command)) -> Self {
        let mut command = Self::command(name, arguments);
        how(&mut command);
        let mut child = command.stdout(Stdio::piped()).spawn().expect("it starts");
        let said = child.stdout.take().expect("it is piped");
        Self::heard(child, said)
    }

    /// Starts one that speaks on standard error.
    ///
    /// # Panics
    /// It cannot be started.
    pub fn start_heard(name: &str, arguments: &[&str]) -> Self {
        Self::start_heard_with(name, arguments, |_| {})
    }

    /// The same with other variables.
    ///
    /// # Panics
    /// It cannot be started.
    pub fn start_heard_with(name: &str, arguments: &[&str], how: impl FnOnce(&mut Command)) -> Self {
        let mut command = Self::command(name, arguments);
        how(&mut command);
        let mut child = command.stderr(Stdio::piped()).spawn().expect("it starts");
        let said = child.stderr.take().expect("it is piped");
        Self::heard(child, said)
    }

    /// Reads what it says on a thread, so that it can be waited for, and that the program never waits to say it.
    fn heard(child: Child, said: impl Read + Send + 'static) -> Self {
        let (line, lines) = mpsc::channel();
        std::thread::spawn(move || BufReader::new(said).lines().try_for_each(|said| line.send(said)));
        Self { child, lines, heard: Vec::new() }
    }

    fn command(name: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(path(name));
        command.args(arguments).env("LORAFLEET_LOG", "warn");
        command
    }

    /// The rest of its next line that begins so.
    ///
    /// # Panics
    /// It ends before it says that, or does not say it in time.
    pub fn says(&mut self, beginning: &str) -> String {
        self.awaited(beginning, |line| Some(line.strip_prefix(beginning)?.to_string()))
    }

    /// Its next line that has that in it.
    ///
    /// # Panics
    /// It ends before it says that, or does not say it in time.
    pub fn hears(&mut self, part: &str) -> String {
        self.awaited(part, |line| line.contains(part).then(|| line.to_string()))
    }

    fn awaited(&mut self, what: &str, found: impl Fn(&str) -> Option<String>) -> String {
        let until = Instant::now() + PATIENCE;
        loop {
            let why = match self.lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    let line = line.unwrap_or_else(|error| format!("(what cannot be read: {error})"));
                    let found = found(&line);
                    self.heard.push(line);
                    match found {
                        Some(found) => return found,
                        None => continue,
                    }
                }
                Err(RecvTimeoutError::Timeout) => "it was waited for in vain",
                Err(RecvTimeoutError::Disconnected) => "it ended",
            };
            panic!("{why} before it said `{what}`; it said {}", self.output());
        }
    }

    /// All that it said.
    fn output(&mut self) -> String {
        self.heard.extend(self.lines.try_iter().filter_map(Result::ok));
        format!("{} lines:\n{}", self.heard.len(), self.heard.join("\n"))
    }

    /// Its number.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until it ends by itself; whether it says that all went well.
    ///
    /// # Panics
    /// It does not end in time.
    pub fn ends(mut self) -> bool {
        self.ended().success()
    }

    fn ended(&mut self) -> ExitStatus {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("it is a child") {
                return status;
            }
            assert!(Instant::now() < until, "it does not end; it said {}", self.output());
            std::thread::sleep(LOOK);
        }
    }

    /// Whether it has not ended.
    ///
    /// # Panics
    /// Nobody knows.
    pub fn runs(&mut self) -> bool {
        self.child.try_wait().expect("it is a child").is_none()
    }

    /// Kills it.
    ///
    /// # Panics
    /// It cannot be killed.
    pub fn kill(mut self) {
        self.child.kill().expect("it is killed");
        self.child.wait().expect("it has ended");
    }

    /// Told to stop as a service manager does it; whether it says that all went well.
    ///
    /// # Panics
    /// It cannot be told, or does not end in time.
    pub fn terminate(mut self) -> bool {
        crate::signal(self.child.id(), "TERM");
        self.ended().success()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
