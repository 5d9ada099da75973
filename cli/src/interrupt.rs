//! Ctrl-C, and the SIGTERM of a machine that is being taken away.

use crate::Failure;
use actor::Interrupts;

/// Requests to stop, listened for from when it is made: none is lost between two looks.
pub(crate) struct Requests(Interrupts);

impl Requests {
    /// Listens from now on.
    ///
    /// # Errors
    /// The system does not let it.
    pub(crate) fn new() -> Result<Self, Failure> {
        Interrupts::new().map(Self).map_err(cannot)
    }

    /// Waits for the next request.
    pub(crate) async fn next(&mut self) {
        self.0.next().await;
    }
}

/// The failure of listening.
pub(crate) fn cannot(error: std::io::Error) -> Failure {
    Failure::failed(format!("cannot listen for Ctrl-C: {error}"))
}
