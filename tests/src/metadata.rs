//! A cloud's metadata server on a free port of this machine, as far as it tells a machine that it is taken away.

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::ETAG;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;

const GCE: &str = "/computeMetadata/v1/instance/";
/// What Google tells where nothing is set.
const UNSET: &str = "NONE";
const TOKEN: &str = "a-token-of-tests";

/// Texts by the paths that they are asked for.
type Values = BTreeMap<String, String>;

/// The server. It ends when it is dropped.
#[derive(Debug)]
pub struct Metadata {
    /// Where it serves, as `http://127.0.0.1:<port>`.
    pub endpoint: String,
    values: watch::Sender<Values>,
    /// The version that whoever asked last for a path knew.
    asked: watch::Receiver<Values>,
    _tasks: JoinSet<()>,
}

impl Metadata {
    /// Starts one that tells nothing yet.
    ///
    /// # Panics
    /// It does not start.
    #[allow(clippy::expect_used, reason = "a test fails by panicking")]
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let endpoint = format!("http://{}", listener.local_addr().expect("it is bound"));
        let ((values, seen), (asking, asked)) =
            (watch::channel(Values::new()), watch::channel(Values::new()));
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (seen, asking) = (seen.clone(), asking.clone());
                let service = service_fn(move |request| answer(request, seen.clone(), asking.clone()));
                connections.spawn(async move {
                    // Who asks may be gone.
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service)
                        .await;
                });
            }
        });
        Self { endpoint, values, asked, _tasks: tasks }
    }

    /// Tells this from now on.
    pub fn set(&self, path: &str, value: &str) {
        self.values.send_modify(|values| drop(values.insert(path.into(), value.into())));
    }

    /// Returns once somebody asks for a value who knows it as it is now; of Amazon's, once it is told.
    ///
    /// # Panics
    /// It has ended.
    #[allow(clippy::expect_used, reason = "a test fails by panicking")]
    pub async fn heard(&self, path: &str) {
        let now = self.values.borrow().get(path).map_or_else(|| version(UNSET), |value| version(value));
        let is = |asked: &Values| asked.get(path) == Some(&now);
        self.asked.clone().wait_for(is).await.expect("it runs");
    }
}

/// The version of a value.
fn version(value: &str) -> String {
    format!("v{}{}", value.len(), value.to_lowercase())
}

async fn answer(
    request: Request<Incoming>,
    mut values: watch::Receiver<Values>,
    asking: watch::Sender<Values>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let header = |name| request.headers().get(name).and_then(|value| value.to_str().ok());
    let path = request.uri().path();
    if let Some(key) = path.strip_prefix(GCE) {
        if header("metadata-flavor") != Some("Google") {
            return Ok(said(StatusCode::FORBIDDEN, ""));
        }
        let query: BTreeMap<_, _> = request
            .uri()
            .query()
            .unwrap_or_default()
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .collect();
        let known = query.get("last_etag").copied().unwrap_or_default();
        asking.send_modify(|asked| drop(asked.insert(key.into(), known.into())));
        let value = |values: &Values| values.get(key).cloned().unwrap_or_else(|| UNSET.into());
        if query.get("wait_for_change") == Some(&"true") {
            let limit = query.get("timeout_sec").and_then(|seconds| seconds.parse().ok()).unwrap_or(0);
            let other = values.wait_for(|values| version(&value(values)) != known);
            // What did not change is told all the same.
            let _ = tokio::time::timeout(Duration::from_secs(limit), other).await;
        }
        let value = value(&values.borrow());
        let mut answer = said(StatusCode::OK, &value);
        if let Ok(name) = version(&value).parse() {
            answer.headers_mut().insert(ETAG, name);
        }
        return Ok(answer);
    }
    if path == "/latest/api/token" {
        let asked =
            *request.method() == Method::PUT && header("x-aws-ec2-metadata-token-ttl-seconds").is_some();
        return Ok(if asked { said(StatusCode::OK, TOKEN) } else { said(StatusCode::BAD_REQUEST, "") });
    }
    if header("x-aws-ec2-metadata-token") != Some(TOKEN) {
        return Ok(said(StatusCode::UNAUTHORIZED, ""));
    }
    let key = path.trim_start_matches("/latest/meta-data/");
    let value = values.borrow().get(key).cloned();
    let told = version(value.as_deref().unwrap_or(UNSET));
    asking.send_modify(|asked| drop(asked.insert(key.into(), told)));
    Ok(value.map_or_else(|| said(StatusCode::NOT_FOUND, ""), |value| said(StatusCode::OK, &value)))
}

fn said(status: StatusCode, text: &str) -> Response<Full<Bytes>> {
    let mut answer = Response::new(Full::new(Bytes::copy_from_slice(text.as_bytes())));
    *answer.status_mut() = status;
    answer
}
