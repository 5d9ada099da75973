//! Input that no client of ours would send: bytes that are no messages, messages that cannot be meant, agents that
//! lie, many who ask at once, a clock that jumps. Each gets an answer, and the server goes on serving. Real gRPC,
//! real SQLite.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]
#![allow(dead_code, reason = "the fixture is the service tests' too")]

#[path = "../service/agent.rs"]
mod agent;
mod bytes;
#[path = "../service/fixture.rs"]
mod fixture;
mod liars;
mod memory;
mod requests;
mod stolen;
mod together;

use fixture::Fixture;
use proto::v1;
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};
use tonic::{Code, Status};
use tonic_types::StatusExt;

static PANICS: AtomicUsize = AtomicUsize::new(0);

/// Counts what panics from now on, in whichever thread: a handler's panic ends its connection and no more.
fn watch_for_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            PANICS.fetch_add(1, Ordering::Relaxed);
            before(info);
        }));
    });
}

/// The server answers a normal request, and nothing has panicked.
async fn check_serves(fixture: &Fixture) {
    let info = fixture.fleet().get_server_info(v1::GetServerInfoRequest {}).await;
    assert!(info.is_ok(), "the server serves no more: {info:?}");
    fixture.sweeps().list_sweeps(v1::ListSweepsRequest::default()).await.unwrap();
    assert_eq!(PANICS.load(Ordering::Relaxed), 0, "something panicked");
}

/// A refusal of ours: a code for what the caller did, and details that a program can read.
fn check_refusal(what: &str, status: &Status) {
    let codes =
        [Code::InvalidArgument, Code::NotFound, Code::FailedPrecondition, Code::Aborted, Code::DataLoss];
    assert!(codes.contains(&status.code()), "{what}: {status:?}");
    let details = status.get_error_details();
    let domain = details.error_info().map(|info| info.domain.as_str());
    assert_eq!(domain, Some(proto::status::ERROR_DOMAIN), "{what}: {status:?}");
}
