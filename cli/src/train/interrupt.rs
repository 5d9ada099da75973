//! A request to stop as a flag that the training loop looks at between two steps.

use crate::Failure;
use crate::interrupt::{Requests, cannot};
use crate::output::say;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A flag that the first request sets; the second one ends the process at once.
pub(crate) fn flag() -> Result<Arc<AtomicBool>, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(cannot)?;
    let mut requests = runtime.block_on(async { Requests::new() })?;
    let interrupted = Arc::new(AtomicBool::new(false));
    let flag = interrupted.clone();
    let listen = async move {
        loop {
            requests.next().await;
            if flag.swap(true, Ordering::Relaxed) {
                telemetry::flush();
                std::process::exit(130);
            }
            say!("\ninterrupted: finishing this step, then a checkpoint (once more ends at once)");
        }
    };
    std::thread::Builder::new()
        .name("interrupt".into())
        .spawn(move || runtime.block_on(listen))
        .map_err(cannot)?;
    Ok(interrupted)
}
