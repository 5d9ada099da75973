//! Calls: a span and a duration each, and the context of the caller in the metadata. One layer for servers, one service
//! for clients.

use crate::metrics;
use crate::trace::{Place, TARGET};
use opentelemetry::propagation::Injector;
use opentelemetry_http::HeaderInjector;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use tokio::time::Instant;
use tonic::Code;
use tonic::codegen::http::{HeaderMap, Request, Response, Uri};
use tower::{Layer, Service};
use tracing::{Instrument, Span};

/// Where a caller's place in its trace stands (W3C Trace Context).
const TRACEPARENT: &str = "traceparent";

/// Whether calls take their caller's context along. It is known before the first call.
static PROPAGATES: AtomicBool = AtomicBool::new(true);

pub(crate) fn propagate(propagates: bool) {
    PROPAGATES.store(propagates, Ordering::Relaxed);
}

/// What stands for all methods that nobody serves (semantic conventions of RPC).
const OTHER: &str = "_OTHER";

/// A call's answer.
type Answer<R, E> = Pin<Box<dyn Future<Output = Result<R, E>> + Send>>;

/// The place in its trace that a caller sent.
pub fn caller(headers: &HeaderMap) -> Option<Place> {
    if !PROPAGATES.load(Ordering::Relaxed) {
        return None;
    }
    headers.get(TRACEPARENT)?.to_str().ok()?.parse().ok()
}

/// Which side of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Server,
    Client,
}

/// Traces the calls of a server.
#[derive(Debug, Clone, Copy)]
pub struct ServerLayer {
    /// Whether a path is one that is served. All others are counted as one: whoever calls chooses their names, also
    /// where the call is refused.
    pub serves: fn(&str) -> bool,
}

impl<S> Layer<S> for ServerLayer {
    type Service = Traced<S>;

    fn layer(&self, inner: S) -> Traced<S> {
        Traced { inner, side: Side::Server, server: None, serves: self.serves }
    }
}

/// A service whose calls are traced.
#[derive(Debug, Clone)]
pub struct Traced<S> {
    inner: S,
    side: Side,
    /// Of a client, whom it calls.
    server: Option<Arc<Server>>,
    serves: fn(&str) -> bool,
}

/// Host and port of a server.
#[derive(Debug)]
struct Server {
    address: String,
    port: u16,
}

impl<S> Traced<S> {
    /// Traces the calls of a client of the server at this address, and sends along where they belong.
    pub fn client(inner: S, server: &Uri) -> Self {
        let address = server.host().unwrap_or_default().trim_matches(['[', ']']).to_string();
        let usual = if server.scheme_str() == Some("https") { 443 } else { 80 };
        let server = Server { address, port: server.port_u16().unwrap_or(usual) };
        Self { inner, side: Side::Client, server: Some(Arc::new(server)), serves: |_| true }
    }
}

impl<S, A, B> Service<Request<A>> for Traced<S>
where
    S: Service<Request<A>, Response = Response<B>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
    B: Send + 'static,
{
    type Response = Response<B>;
    type Error = S::Error;
    type Future = Answer<Response<B>, S::Error>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<A>) -> Self::Future {
        let side = self.side;
        let method = method(request.uri().path(), self.serves).to_string();
        let span = match side {
            Side::Server => server_span(&method, request.headers()),
            Side::Client => client_span(&method, self.server.as_deref()),
        };
        if side == Side::Client
            && PROPAGATES.load(Ordering::Relaxed)
            && let Some(place) = span.in_scope(Place::current)
        {
            HeaderInjector(request.headers_mut()).set(TRACEPARENT, place.to_string());
        }
        let answer = span.in_scope(|| self.inner.call(request));
        let call = Call { span: span.clone(), side, method, started: Instant::now(), over: false };
        let timed = async move {
            let answer = answer.await;
            call.end(match &answer {
                Ok(answer) => {
                    tonic::Status::from_header_map(answer.headers()).map_or(Code::Ok, |status| status.code())
                }
                Err(_) => Code::Unavailable,
            });
            answer
        };
        Box::pin(timed.instrument(span))
    }
}

/// A call under way. Dropped, it was given up before its answer came: a deadline passed, or who called is gone.
struct Call {
    span: Span,
    side: Side,
    method: String,
    /// By tokio's clock, which stands still in tests that stop it.
    started: Instant,
    over: bool,
}

impl Call {
    fn end(mut self, code: Code) {
        self.over = true;
        self.tell(code);
    }

    fn tell(&self, code: Code) {
        let seconds = self.started.elapsed().as_secs_f64();
        let code_name = name(code);
        self.span.record("rpc.response.status_code", code_name);
        let mut attributes = vec![
            ("rpc.system.name", "grpc"),
            ("rpc.method", self.method.as_str()),
            ("rpc.response.status_code", code_name),
        ];
        if failed(self.side, code) {
            self.span.record("otel.status_code", "error");
            self.span.record("error.type", code_name);
            attributes.push(("error.type", code_name));
        }
        match self.side {
            Side::Server => metrics::RPC_SERVER_DURATION.record(seconds, &attributes),
            Side::Client => metrics::RPC_CLIENT_DURATION.record(seconds, &attributes),
        }
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        if !self.over {
            self.tell(Code::Cancelled);
        }
    }
}

/// The name by which a call of `/package.Service/Method` is counted.
fn method(path: &str, serves: fn(&str) -> bool) -> &str {
    if serves(path) { path.trim_start_matches('/') } else { OTHER }
}

fn server_span(method: &str, headers: &HeaderMap) -> Span {
    use tracing_opentelemetry::OpenTelemetrySpanExt;
    let span = tracing::info_span!(
        target: TARGET,
        "call",
        otel.name = method,
        otel.kind = "server",
        otel.status_code = tracing::field::Empty,
        rpc.system.name = "grpc",
        rpc.method = method,
        rpc.response.status_code = tracing::field::Empty,
        "error.type" = tracing::field::Empty,
    );
    if let Some(caller) = caller(headers) {
        // Where traces are not exported there is nothing to be set.
        let _ = span.set_parent(caller.context());
    }
    span
}

fn client_span(method: &str, server: Option<&Server>) -> Span {
    tracing::info_span!(
        target: TARGET,
        "call",
        otel.name = method,
        otel.kind = "client",
        otel.status_code = tracing::field::Empty,
        rpc.system.name = "grpc",
        rpc.method = method,
        rpc.response.status_code = tracing::field::Empty,
        "error.type" = tracing::field::Empty,
        server.address = server.map(|server| server.address.as_str()),
        server.port = server.map(|server| i64::from(server.port)),
    )
}

/// Whether a call failed through the fault of the side that tells of it (semantic conventions of gRPC).
fn failed(side: Side, code: Code) -> bool {
    use Code::{DataLoss, DeadlineExceeded, Internal, Ok, Unavailable, Unimplemented, Unknown};
    match side {
        Side::Client => code != Ok,
        Side::Server => {
            matches!(code, Unknown | DeadlineExceeded | Unimplemented | Internal | Unavailable | DataLoss)
        }
    }
}

/// A status' name as gRPC writes it.
pub fn name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn callers_make_up_no_names() {
        let serves = |path: &str| path == "/a.B/C";
        for (path, want) in
            [("/a.B/C", "a.B/C"), ("/a.B/D", OTHER), ("/x/1", OTHER), ("a.B/C", OTHER), ("", OTHER)]
        {
            assert_eq!(method(path, serves), want, "{path}");
        }
    }
}
