//! `/metrics` in Prometheus' text form, `/healthz` and `/readyz`: for a scraper and an orchestrator on the same network.
//! `/log`, to be told what to log, for who is on this machine.

use crate::{End, log};
use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HOST, HeaderMap, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use prometheus::{Encoder, Registry, TextEncoder};
use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::Instant;

/// Connections at a time; more wait.
const CONNECTIONS: usize = 32;
/// The time in which a request arrives and its answer is taken: who is slower makes room for others.
const TALK_LIMIT: Duration = Duration::from_secs(15);
/// The time in which it is known whether the program is ready.
const READY_LIMIT: Duration = Duration::from_secs(5);
/// For how long it is not looked again: a look may write to the disk.
const LOOK_PAUSE: Duration = Duration::from_secs(1);
/// Bytes of what is said about levels, at most.
const LONGEST_LEVELS: usize = 4096;
/// The pause after a connection could not be taken.
const PAUSE: Duration = Duration::from_millis(100);

/// Looks whether the program can do its work now; an error says why not.
pub type Look = Arc<dyn Fn() -> BoxFuture<'static, Result<(), String>> + Send + Sync>;

/// Whether a program is ready. Clones tell the same.
#[derive(Clone)]
pub struct Readiness(Arc<Mutex<Result<Arc<Looked>, String>>>);

/// How it looks, and what it saw last and when.
struct Looked {
    look: Look,
    last: tokio::sync::Mutex<Option<(Instant, Result<(), String>)>>,
}

impl Looked {
    fn by(look: Look) -> Arc<Self> {
        Arc::new(Self { look, last: tokio::sync::Mutex::default() })
    }
}

impl Readiness {
    /// Not ready yet.
    pub fn not_yet(why: &str) -> Self {
        Self(Arc::new(Mutex::new(Err(why.into()))))
    }

    /// It is looked.
    pub fn of(look: Look) -> Self {
        Self(Arc::new(Mutex::new(Ok(Looked::by(look)))))
    }

    /// From now on it is looked.
    pub fn look(&self, look: Look) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Ok(Looked::by(look));
    }

    /// Not ready from now on.
    pub fn not_now(&self, why: &str) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Err(why.into());
    }

    /// Whether it is ready, as it was seen within the last second.
    ///
    /// # Errors
    /// Why not, for people.
    pub async fn ask(&self) -> Result<(), String> {
        let looked = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()?;
        // Whoever asks meanwhile waits, and is told the same.
        let mut last = looked.last.lock().await;
        if let Some((at, seen)) = &*last
            && at.elapsed() < LOOK_PAUSE
        {
            return seen.clone();
        }
        let in_time = tokio::time::timeout(READY_LIMIT, (looked.look)()).await;
        let seen = in_time.unwrap_or_else(|_| Err(format!("no answer within {READY_LIMIT:?}")));
        *last = Some((Instant::now(), seen.clone()));
        seen
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
                Ok((stream, peer)) => open.push(talk(stream, peer, ready.clone())),
                Err(error) => {
                    tracing::warn!(%error, "a connection for /metrics could not be taken");
                    tokio::time::sleep(PAUSE).await;
                }
            },
            Some(()) = open.next() => {}
        }
    }
}

async fn talk(stream: TcpStream, peer: SocketAddr, ready: Readiness) {
    let answer = service_fn(move |request: Request<Incoming>| {
        let ready = ready.clone();
        async move {
            Ok::<_, Infallible>(match request.method() {
                &Method::PUT if request.uri().path() == "/log" => change_log(request, peer).await,
                method => answer(method, request.uri().path(), &ready).await,
            })
        }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), answer);
    match tokio::time::timeout(TALK_LIMIT, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "a connection for /metrics broke"),
        Err(_) => tracing::debug!("a connection for /metrics took too long"),
    }
}

async fn answer(method: &Method, path: &str, ready: &Readiness) -> Response<Full<Bytes>> {
    if *method != Method::GET && *method != Method::HEAD {
        return said(StatusCode::METHOD_NOT_ALLOWED, "only GET is answered, and PUT of /log\n".into());
    }
    match path {
        "/metrics" => {
            // It reads files and asks GPUs, which takes its time; one that is stuck must not become many.
            let Ok(turn) = COLLECTING.try_acquire() else {
                let why = "metrics are being collected for another; try again\n";
                return said(StatusCode::SERVICE_UNAVAILABLE, why.into());
            };
            let collected = tokio::task::spawn_blocking(move || {
                let _turn = turn;
                text()
            });
            match collected.await {
                Ok(text) => said(StatusCode::OK, text),
                Err(error) => said(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
            }
        }
        "/healthz" => said(StatusCode::OK, "lives\n".into()),
        "/readyz" => match ready.ask().await {
            Ok(()) => said(StatusCode::OK, "ready\n".into()),
            Err(why) => said(StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {why}\n")),
        },
        _ => said(StatusCode::NOT_FOUND, "there are /metrics, /healthz and /readyz\n".into()),
    }
}

/// Who collects metrics.
static COLLECTING: Semaphore = Semaphore::const_new(1);

/// Whether a `Host` names the machine itself, as `localhost` or by an address of its own alone. A browser can be made to look
/// up any other name as this machine.
pub fn is_named_here(host: &str) -> bool {
    let host = host.parse::<Uri>().ok();
    host.as_ref().and_then(Uri::host).is_some_and(|name| {
        let name = name.trim_matches(['[', ']']);
        name == "localhost"
            || name.parse::<IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback())
    })
}

/// Whether a request is neither passed on for somebody else nor a page's of another site, whose name a browser was made to
/// look up as this machine.
fn is_from_here(headers: &HeaderMap) -> bool {
    let passed_on = ["origin", "forwarded", "x-forwarded-for"].iter().any(|name| headers.contains_key(*name));
    let host = headers.get(HOST).and_then(|host| host.to_str().ok());
    host.is_some_and(is_named_here) && !passed_on
}

/// Changes what is logged to what a request says, for whoever is on this machine.
async fn change_log(request: Request<Incoming>, peer: SocketAddr) -> Response<Full<Bytes>> {
    if !peer.ip().to_canonical().is_loopback() || !is_from_here(request.headers()) {
        return said(StatusCode::FORBIDDEN, "the log is changed from this machine alone\n".into());
    }
    let body = Limited::new(request.into_body(), LONGEST_LEVELS).collect().await;
    let Ok(body) = body.map(|body| body.to_bytes()) else {
        return said(StatusCode::BAD_REQUEST, format!("more than {LONGEST_LEVELS} bytes, or none came\n"));
    };
    match log::change(String::from_utf8_lossy(&body).trim()) {
        Ok(now) => said(StatusCode::OK, format!("logs {now}\n")),
        Err(why) => said(StatusCode::BAD_REQUEST, format!("{why}\n")),
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
        if !address.ip().is_loopback() {
            tracing::warn!(
                "--http {address}: whoever reaches it may read metrics; nobody is asked who they are, nor are this machine's \
                 users, who may change what is logged"
            );
        }
    }
    tokio::select! {
        done = work => done,
        never = serve(listener, ready) => match never {},
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test(start_paused = true)]
    async fn it_is_looked_once_a_second() {
        let ready = Readiness::not_yet("it starts");
        assert_eq!(ready.ask().await, Err("it starts".into()));
        let looks = Arc::new(AtomicU32::new(0));
        let counted = looks.clone();
        ready.look(Arc::new(move || {
            counted.fetch_add(1, Ordering::Relaxed);
            Box::pin(async { Ok(()) })
        }));
        let all = futures::future::join_all((0..10).map(|_| ready.ask())).await;
        assert!(all.iter().all(Result::is_ok));
        assert_eq!(looks.load(Ordering::Relaxed), 1);
        tokio::time::advance(LOOK_PAUSE).await;
        assert_eq!(ready.ask().await, Ok(()));
        assert_eq!(looks.load(Ordering::Relaxed), 2);
        ready.not_now("it ends");
        assert_eq!(ready.ask().await, Err("it ends".into()));
    }

    #[tokio::test]
    async fn who_says_nothing_makes_room() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let asks = async {
            let mut silent = Vec::new();
            for _ in 0..CONNECTIONS {
                silent.push(TcpStream::connect(address).await.unwrap());
            }
            // Time runs only while nothing else does, from here on.
            tokio::time::pause();
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.unwrap();
            assert!(answer.ends_with("lives\n"), "{answer}");
        };
        tokio::select! {
            () = asks => {}
            never = serve(listener, Readiness::not_yet("it starts")) => match never {},
        }
    }
}
