//! Ctrl-C, and the SIGTERM of a machine that is being taken away: a request to stop after a checkpoint.

use crate::Failure;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A flag that the first request sets; the second one ends the process at once.
pub(crate) fn flag() -> Result<Arc<AtomicBool>, Failure> {
    let cannot = |e: std::io::Error| Failure::failed(format!("cannot listen for Ctrl-C: {e}"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(cannot)?;
    let mut requests = runtime.block_on(async { Requests::new() }).map_err(cannot)?;
    let interrupted = Arc::new(AtomicBool::new(false));
    let flag = interrupted.clone();
    let listen = async move {
        while requests.next().await {
            if flag.swap(true, Ordering::Relaxed) {
                std::process::exit(130);
            }
            eprintln!("\ninterrupted: finishing this step, then a checkpoint (once more ends at once)");
        }
    };
    std::thread::Builder::new()
        .name("interrupt".into())
        .spawn(move || runtime.block_on(listen))
        .map_err(cannot)?;
    Ok(interrupted)
}

/// Requests to stop, listened for from when it is made.
#[cfg(unix)]
struct Requests {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

#[cfg(unix)]
impl Requests {
    fn new() -> std::io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    async fn next(&mut self) -> bool {
        tokio::select! {
            request = self.interrupt.recv() => request.is_some(),
            request = self.terminate.recv() => request.is_some(),
        }
    }
}

/// Requests to stop.
#[cfg(not(unix))]
struct Requests;

#[cfg(not(unix))]
impl Requests {
    fn new() -> std::io::Result<Self> {
        Ok(Self)
    }

    async fn next(&mut self) -> bool {
        tokio::signal::ctrl_c().await.is_ok()
    }
}
