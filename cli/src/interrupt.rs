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

/// Does something at every request to stop from now on, on a thread of its own: for work that has no runtime.
///
/// # Errors
/// The system does not let it.
pub(crate) fn at_each(act: impl Fn() + Send + 'static) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(cannot)?;
    let mut requests = runtime.block_on(async { Requests::new() })?;
    let listen = async move {
        loop {
            requests.next().await;
            act();
        }
    };
    let listens = std::thread::Builder::new().name("interrupt".into());
    listens.spawn(move || runtime.block_on(listen)).map(drop).map_err(cannot)
}

/// From now on a request to stop ends the process at once, but for what telemetry has to tell.
///
/// # Errors
/// The system does not let it.
pub(crate) fn end_at_once() -> Result<(), Failure> {
    at_each(end)
}

/// Ends the process as one that was interrupted.
pub(crate) fn end() {
    telemetry::flush();
    std::process::exit(130);
}

/// The failure of listening.
fn cannot(error: std::io::Error) -> Failure {
    Failure::failed(format!("cannot listen for Ctrl-C: {error}"))
}
