//! The frame that LoraFleet's programs share: the log and telemetry, a runtime, and how an end is said and becomes an exit
//! code.

use crate::{Options, Settings};
use std::fmt::{self, Display};
use std::io;
use std::process::ExitCode;
use std::time::Duration;
use tokio::runtime::Runtime;

/// How long threads that still work are waited for at the end.
const LAST_THREADS: Duration = Duration::from_secs(2);

/// The time that a program takes at most once its work is done: for threads that still work, and for what was not exported.
pub const END_LIMIT: Duration = LAST_THREADS.saturating_add(crate::FLUSH_LIMIT);

/// Why a program ends, and its exit code.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End(u8, String);

impl End {
    /// A wrong argument, or a directory that is somebody else's: exit code 2.
    pub fn invalid(why: impl Display) -> Self {
        Self(2, why.to_string())
    }

    /// It could not go on: exit code 1.
    pub fn failed(why: impl Display) -> Self {
        Self(1, why.to_string())
    }
}

impl Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.1)
    }
}

/// Runs a program's work on the threads of a runtime, with telemetry as the environment asks for it.
pub fn run(options: &Options, work: impl Future<Output = Result<(), End>>) -> ExitCode {
    let settings = match Settings::from_env() {
        Ok(settings) => settings,
        Err(error) => return say(&End::invalid(error)),
    };
    let telemetry = match crate::start(options, &settings) {
        Ok(telemetry) => telemetry,
        Err(error) => return say(&End::invalid(error)),
    };
    let done = block_on(work)
        .unwrap_or_else(|error| Err(End::failed(format!("no threads can be started: {error}"))));
    let code = end(done);
    drop(telemetry);
    code
}

/// Does work on the threads of a runtime, a program's only one. However it ends, in a panic too, threads that still work are
/// waited for only so long: one may ask a driver that does not answer, and telemetry is to be flushed after that.
///
/// # Errors
/// The system gives no threads.
pub fn block_on<T>(work: impl Future<Output = T>) -> io::Result<T> {
    let runtime = Runtime::new()?;
    crate::process::observe_runtime(&runtime);
    let handle = runtime.handle().clone();
    let _threads = Threads(Some(runtime));
    Ok(handle.block_on(work))
}

struct Threads(Option<Runtime>);

impl Drop for Threads {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_timeout(LAST_THREADS);
        }
    }
}

/// Runs work that has no runtime and tells nothing but its log: a part of another program, in a process of its own.
pub fn run_quietly(options: &Options, work: impl FnOnce() -> Result<(), End>) -> ExitCode {
    let options = Options { scraped: false, ..options.clone() };
    match Settings::logs_only().and_then(|settings| crate::start(&options, &settings)) {
        Ok(_telemetry) => end(work()),
        Err(error) => say(&End::invalid(error)),
    }
}

fn end(done: Result<(), End>) -> ExitCode {
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(end) if end.0 == 2 => say(&end),
        Err(End(code, why)) => {
            tracing::error!("{why}");
            ExitCode::from(code)
        }
    }
}

/// What is wrong with arguments is said to people, as clap says it, and is no matter of the log.
#[allow(clippy::print_stderr, reason = "it is the program's answer")]
fn say(End(code, why): &End) -> ExitCode {
    eprintln!("error: {}", crate::secrets::redact(why));
    ExitCode::from(*code)
}
