//! The programs of the workspace, as people start them.

use std::io::{BufRead, BufReader, Lines, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

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
    lines: Lines<BufReader<Box<dyn Read + Send>>>,
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
        let said: Box<dyn Read + Send> = Box::new(child.stdout.take().expect("it is piped"));
        Self { child, lines: BufReader::new(said).lines() }
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
        let said: Box<dyn Read + Send> = Box::new(child.stderr.take().expect("it is piped"));
        Self { child, lines: BufReader::new(said).lines() }
    }

    fn command(name: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(path(name));
        command.args(arguments).env("LORAFLEET_LOG", "warn");
        command
    }

    /// The rest of its next line that begins so.
    ///
    /// # Panics
    /// It ends before it says that.
    pub fn says(&mut self, beginning: &str) -> String {
        let line = |line: std::io::Result<String>| {
            Some(line.expect("it speaks UTF-8").strip_prefix(beginning)?.to_string())
        };
        self.lines.find_map(line).unwrap_or_else(|| panic!("it ended before it said `{beginning}`"))
    }

    /// Its next line that has that in it.
    ///
    /// # Panics
    /// It ends before it says that.
    pub fn hears(&mut self, part: &str) -> String {
        let line = |line: &std::io::Result<String>| line.as_ref().is_ok_and(|line| line.contains(part));
        let found = self.lines.find(line).and_then(Result::ok);
        found.unwrap_or_else(|| panic!("it ended before it said something with `{part}`"))
    }

    /// Its number.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until it ends by itself; whether it says that all went well.
    ///
    /// # Panics
    /// It cannot be waited for.
    pub fn ends(mut self) -> bool {
        self.child.wait().expect("it ends").success()
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
    /// It cannot be told.
    pub fn terminate(mut self) -> bool {
        crate::signal(self.child.id(), "TERM");
        self.child.wait().expect("it ends").success()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
