//! Ctrl-C, and the SIGTERM of a machine that is being taken away.

use std::io;

/// Requests to stop, listened for from when it is made: none is lost between two looks.
#[cfg(unix)]
#[derive(Debug)]
pub struct Interrupts {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

#[cfg(unix)]
impl Interrupts {
    /// Listens from now on.
    ///
    /// # Errors
    /// The system does not let it.
    pub fn new() -> io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    /// Waits for the next request.
    pub async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

/// Requests to stop.
#[cfg(not(unix))]
#[derive(Debug)]
pub struct Interrupts;

#[cfg(not(unix))]
impl Interrupts {
    /// Listens from now on.
    ///
    /// # Errors
    /// None; on other systems there are.
    pub fn new() -> io::Result<Self> {
        Ok(Self)
    }

    /// Waits for the next request.
    pub async fn next(&mut self) {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
