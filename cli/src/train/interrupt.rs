//! A request to stop as a flag that the training loop looks at between two steps.

use crate::Failure;
use crate::interrupt::{at_each, end};
use crate::output::say;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A flag that the first request sets; the second one ends the process at once.
pub(crate) fn flag() -> Result<Arc<AtomicBool>, Failure> {
    let interrupted = Arc::new(AtomicBool::new(false));
    let flag = interrupted.clone();
    at_each(move || {
        if flag.swap(true, Ordering::Relaxed) {
            end();
        }
        say!("\ninterrupted: finishing this step, then a checkpoint (once more ends at once)");
    })?;
    Ok(interrupted)
}
