//! `/metrics` in Prometheus' text form, `/healthz` and `/readyz`: for a scraper and an orchestrator on the same network.

use crate::End;
use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus::{Encoder, Registry, TextEncoder};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};

/// Connections at a time; more wait.
const CONNECTIONS: usize = 32;
/// The time in which a request's head arrives.
const HEAD_LIMIT: Duration = Duration::from_secs(5);
/// The time in which it is known whether the program is ready.
const READY_LIMIT: Duration = Duration::from_secs(5);
/// The pause after a connection could not be taken.
const PAUSE: Duration = Duration::from_millis(100);

/// Looks whether the program can do its work now; an error says why not.
pub type Look = Arc<dyn Fn() -> BoxFuture<'static, Result<(), String>> + Send + Sync>;

/// Whether a program is ready. Clones tell the same.
#[derive(Clone)]
pub struct Readiness(Arc<Mutex<Result<Look, String>>>);

impl Readiness {
    /// Not ready yet.
    pub fn not_yet(why: &str) -> Self {
        Self(Arc::new(Mutex::new(Err(why.into()))))
    }

    /// From now on it is looked.
    pub fn look(&self, look: Look) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Ok(look);
    }

    /// Not ready from now on.
    pub fn not_now(&self, why: &str) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Err(why.into());
    }

    async fn ask(&self) -> Result<(), String> {
        let look = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()?;
        let in_time = tokio::time::timeout(READY_LIMIT, look()).await;
        in_time.unwrap_or_else(|_| Err(format!("no answer within {READY_LIMIT:?}")))
    }
}

static SCRAPED: OnceLock<Registry> = OnceLock::new();

/// What `/metrics` shows.
pub(crate) fn scraped() -> Result<opentelemetry_prometheus::PrometheusExporter, String> {
    let registry = SCRAPED.get_or_init(Registry::new).clone();
    let exporter = opentelemetry_prometheus::exporter().with_registry(registry).scope_info_enabled(false);
    exporter.build().map_err(|error| error.to_string())
}

/// Every metric in Prometheus' text form.
pub fn text() -> String {
    let mut text = Vec::new();
    if let Some(registry) = SCRAPED.get() {
        // What cannot be written is left out.
        let _ = TextEncoder::new().encode(&registry.gather(), &mut text);
    }
    String::from_utf8_lossy(&text).into_owned()
}

/// Serves for as long as it is polled.
pub async fn serve(listener: TcpListener, ready: Readiness) -> Infallible {
    let mut open = FuturesUnordered::new();
    loop {
        tokio::select! {
            taken = listener.accept(), if open.len() < CONNECTIONS => match taken {
                Ok((stream, _)) => open.push(talk(stream, ready.clone())),
                Err(error) => {
                    tracing::warn!(%error, "a connection for /metrics could not be taken");
                    tokio::time::sleep(PAUSE).await;
                }
            },
            Some(()) = open.next() => {}
        }
    }
}

async fn talk(stream: TcpStream, ready: Readiness) {
    let answer = service_fn(move |request: Request<Incoming>| {
        let ready = ready.clone();
        async move { Ok::<_, Infallible>(answer(request.method(), request.uri().path(), &ready).await) }
    });
    let mut connection = hyper::server::conn::http1::Builder::new();
    let connection = connection.timer(TokioTimer::new()).header_read_timeout(HEAD_LIMIT).keep_alive(false);
    if let Err(error) = connection.serve_connection(TokioIo::new(stream), answer).await {
        tracing::debug!(%error, "a connection for /metrics broke");
    }
}

async fn answer(method: &Method, path: &str, ready: &Readiness) -> Response<Full<Bytes>> {
    if *method != Method::GET && *method != Method::HEAD {
        return said(StatusCode::METHOD_NOT_ALLOWED, "only GET is answered\n".into());
    }
    match path {
        "/metrics" => said(StatusCode::OK, text()),
        "/healthz" => said(StatusCode::OK, "lives\n".into()),
        "/readyz" => match ready.ask().await {
            Ok(()) => said(StatusCode::OK, "ready\n".into()),
            Err(why) => said(StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {why}\n")),
        },
        _ => said(StatusCode::NOT_FOUND, "there are /metrics, /healthz and /readyz\n".into()),
    }
}

fn said(status: StatusCode, text: String) -> Response<Full<Bytes>> {
    let mut answer = Response::new(Full::new(Bytes::from(text)));
    *answer.status_mut() = status;
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    answer.headers_mut().insert(CONTENT_TYPE, kind);
    answer
}

/// Works, and serves at an address meanwhile if there is one.
///
/// # Errors
/// It cannot be listened on, or those of the work.
pub async fn beside<T>(
    address: Option<SocketAddr>,
    ready: Readiness,
    work: impl Future<Output = Result<T, End>>,
) -> Result<T, End> {
    let Some(address) = address else { return work.await };
    let listener = TcpListener::bind(address).await;
    let listener = listener.map_err(|error| End::invalid(format!("--http {address}: {error}")))?;
    if let Ok(address) = listener.local_addr() {
        tracing::info!("metrics and health at http://{address}");
    }
    tokio::select! {
        done = work => done,
        never = serve(listener, ready) => match never {},
    }
}
