//! The live page: a browser's view of sweeps, trials and agents at the address of the gRPC services, which it reads and
//! changes through them.
//!
//! | module | holds |
//! |---|---|
//! | [`assets`] | the page's files, which are in the binary |
//! | `ask` | what a request asks for, and the gRPC method that is the same |
//! | `api` | the answers: JSON, and changes of sweeps |
//! | `events` | answers that go on: server-sent events |
//! | `form` | records as JSON |
//! | `importance` | how much each parameter matters, as trials complete |
//!
//! Whoever may call a gRPC method may ask the page for the same, by the same table, tokens and limits
//! ([`crate::grpc::guard`]). A browser also carries what pages of other sites ask for. Where nobody shows a token, such a
//! page must not be able to ask: a request's `Host` has to name this machine, so that no other name was made to lead here,
//! and a request that a browser says is another site's is refused. gRPC's calls are told by their content type, which no
//! page of another site can send.

mod api;
mod ask;
pub mod assets;
mod events;
mod form;
mod importance;

use crate::access::{Access, Caller};
use crate::grpc::Services;
use crate::grpc::guard::{self, Guard};
use ask::{Ask, Asked};
use assets::Assets;
use futures::FutureExt;
use futures::future::BoxFuture;
use http_body_util::{BodyExt, Limited};
use proto::status::RpcError;
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Context, Poll};
use telemetry::http::is_named_here;
use tonic::body::Body;
use tonic::codegen::http::header::{self, HeaderMap, HeaderName, HeaderValue};
use tonic::codegen::http::{Method, Request, Response, StatusCode, Uri};
use tonic::codegen::{Bytes, Service};
use tonic::{Code, Status};
use tower::layer::Layer;

/// Bytes of what a request says, at most: those of a sweep's document.
const LONGEST: usize = 1 << 20;

/// What browsers are told with every answer. The page's own files are all that it loads and runs.
const PROTECTION: &[(&str, &str)] = &[
    (
        "content-security-policy",
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    ),
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "no-referrer"),
    ("cross-origin-opener-policy", "same-origin"),
    ("cross-origin-resource-policy", "same-origin"),
];

/// Whether a coordinator that listens there has a page: on this machine alone, or for whoever has a token.
pub fn is_served(listen: SocketAddr, access: &Access) -> bool {
    listen.ip().to_canonical().is_loopback() || access.tokens.is_some()
}

/// Puts the page beside the services: what is no gRPC call is its.
#[derive(Clone)]
pub struct Beside(Page);

impl Beside {
    /// A coordinator's page.
    pub fn of(services: &Services, guard: &Guard) -> Self {
        let assets = Assets::new();
        Self(Page::Live(Arc::new(Live { services: services.clone(), guard: guard.clone(), assets })))
    }

    /// Who asks is told something instead.
    pub fn instead(say: impl Fn() -> Status + Send + Sync + 'static) -> Self {
        Self(Page::Instead(Arc::new(say)))
    }
}

#[derive(Clone)]
enum Page {
    Live(Arc<Live>),
    Instead(Arc<dyn Fn() -> Status + Send + Sync>),
}

/// What the page answers with.
struct Live {
    services: Services,
    guard: Guard,
    assets: Assets,
}

impl<S> Layer<S> for Beside {
    type Service = WithPage<S>;

    fn layer(&self, inner: S) -> WithPage<S> {
        WithPage { page: self.0.clone(), inner }
    }
}

/// Services with the page beside them.
#[derive(Clone)]
pub struct WithPage<S> {
    page: Page,
    inner: S,
}

impl<S> Service<Request<Body>> for WithPage<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = BoxFuture<'static, Result<Response<Body>, S::Error>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        if is_grpc(request.headers()) {
            return self.inner.call(request).boxed();
        }
        let page = self.page.clone();
        async move { Ok(protected(page.answer(request).await)) }.boxed()
    }
}

/// Whether a request is a call: browsers let no page of another site say so.
fn is_grpc(headers: &HeaderMap) -> bool {
    let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    kind.is_some_and(|kind| kind.starts_with("application/grpc"))
}

fn protected(mut answer: Response<Body>) -> Response<Body> {
    for (name, value) in PROTECTION {
        answer.headers_mut().insert(HeaderName::from_static(name), HeaderValue::from_static(value));
    }
    answer
}

impl Page {
    async fn answer(self, request: Request<Body>) -> Response<Body> {
        match self {
            Self::Live(live) => live.answer(request).await,
            Self::Instead(say) => refused(&say()),
        }
    }
}

/// Why a request is not answered.
enum Refusal {
    /// What a gRPC client would be told.
    Rpc(Status),
    /// What only a browser can do wrong.
    Http(StatusCode, String),
}

impl From<Status> for Refusal {
    fn from(status: Status) -> Self {
        Self::Rpc(status)
    }
}

impl From<RpcError> for Refusal {
    fn from(error: RpcError) -> Self {
        Self::Rpc(error.into())
    }
}

impl From<crate::CoordinatorError> for Refusal {
    fn from(error: crate::CoordinatorError) -> Self {
        Self::Rpc(error.into())
    }
}

impl Live {
    async fn answer(&self, request: Request<Body>) -> Response<Body> {
        match self.answered(request).await {
            Ok(answer) => answer,
            Err(Refusal::Rpc(status)) => refused(&status),
            Err(Refusal::Http(code, why)) => error(code, &why),
        }
    }

    async fn answered(&self, request: Request<Body>) -> Result<Response<Body>, Refusal> {
        let reads = *request.method() == Method::GET || *request.method() == Method::HEAD;
        // The files are the same for everybody, and say nothing.
        if reads && let Some(answer) = self.assets.answer(request.uri().path(), request.headers()) {
            return Ok(answer);
        }
        let Some(ask) = Ask::of(request.method(), request.uri().path()) else {
            let why = "there is the page at /, and what it asks for at /api/".to_string();
            return Err(Refusal::Http(StatusCode::NOT_FOUND, why));
        };
        self.refuse_other_sites(&request, ask.what.changes())?;
        let token = request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let (call, caller) = self.guard.admit(ask.what.method(), guard::peer(&request), token)?;
        let zipped = accepts_gzip(request.headers());
        let said = match ask.what.changes() {
            true => said(request).await?,
            false => Value::Null,
        };
        let answer = self.done(ask, said, zipped, &caller).await?;
        Ok(answer.map(|body| guard::while_known(body, caller, call)))
    }

    /// Refuses what a page of another site asks through a browser.
    fn refuse_other_sites(&self, request: &Request<Body>, changes: bool) -> Result<(), Refusal> {
        let forbidden = |why: String| Err(Refusal::Http(StatusCode::FORBIDDEN, why));
        let host = request.uri().authority().map(|authority| authority.as_str());
        let text = |name: HeaderName| request.headers().get(name).and_then(|value| value.to_str().ok());
        let Some(host) = host.or_else(|| text(header::HOST)) else {
            return forbidden("the request has no Host".into());
        };
        if self.guard.access.tokens.is_none() && !is_named_here(host) {
            return forbidden(format!(
                "`{host}` does not name this machine, and without --tokens the page is for this machine alone; open it at \
                 127.0.0.1"
            ));
        }
        // Chrome, Firefox and Safari say whose page asks; who says nothing is no page.
        let site = text(HeaderName::from_static("sec-fetch-site")).unwrap_or("none");
        let origin = text(header::ORIGIN).map(|origin| origin.parse::<Uri>().ok());
        let same = match &origin {
            None => true,
            Some(origin) => {
                origin.as_ref().and_then(Uri::authority).is_some_and(|origin| origin.as_str() == host)
            }
        };
        if !same || !["same-origin", "none"].contains(&site) {
            return forbidden("a page of another site asks".into());
        }
        let kind = text(header::CONTENT_TYPE).unwrap_or_default();
        if changes && kind.split(';').next().map(str::trim) != Some("application/json") {
            let why = "changes are asked for in application/json".to_string();
            return Err(Refusal::Http(StatusCode::UNSUPPORTED_MEDIA_TYPE, why));
        }
        Ok(())
    }

    async fn done(
        &self,
        Asked { what, sweep, number }: Asked,
        said: Value,
        zipped: bool,
        caller: &Caller,
    ) -> Result<Response<Body>, Refusal> {
        let services = &self.services;
        Ok(match what {
            Ask::Server => json(&api::server(services, caller).await?),
            Ask::Overview => events::overview(services.clone(), zipped),
            Ask::Sweep => json(&api::sweep(services, &sweep).await?),
            Ask::Changes => events::changes(services.clone(), &sweep, zipped).await?,
            Ask::Trial => json(&api::trial(services, &sweep, number).await?),
            Ask::Metrics => json(&api::metrics(services, &sweep, number).await?),
            Ask::Log => events::log(services.clone(), &sweep, number, zipped).await?,
            Ask::Pause | Ask::Resume | Ask::Cancel | Ask::Extend | Ask::Stop | Ask::Retry => {
                api::change(services, what, sweep, number, said).await?;
                json(&json!({}))
            }
        })
    }
}

/// What a request says.
async fn said(request: Request<Body>) -> Result<Value, Refusal> {
    let wrong = |why: String| Refusal::Http(StatusCode::BAD_REQUEST, why);
    let body = Limited::new(request.into_body(), LONGEST).collect().await;
    let body = body.map_err(|_| wrong(format!("more than {LONGEST} bytes, or they did not all come")))?;
    match body.to_bytes() {
        empty if empty.is_empty() => Ok(Value::Null),
        bytes => serde_json::from_slice(&bytes).map_err(|why| wrong(format!("no JSON: {why}"))),
    }
}

fn accepts_gzip(headers: &HeaderMap) -> bool {
    let accepted =
        headers.get(header::ACCEPT_ENCODING).and_then(|value| value.to_str().ok()).unwrap_or_default();
    accepted.split(',').filter_map(|one| one.split(';').next()).any(|one| one.trim() == "gzip")
}

fn json(value: &Value) -> Response<Body> {
    answer(StatusCode::OK, "application/json", value.to_string().into())
}

fn error(code: StatusCode, why: &str) -> Response<Body> {
    answer(code, "application/json", json!({ "error": why }).to_string().into())
}

fn answer(code: StatusCode, kind: &'static str, text: Bytes) -> Response<Body> {
    // The errors of a body that is at hand: none.
    let mut answer = Response::new(Body::new(http_body_util::Full::new(text)));
    *answer.status_mut() = code;
    let headers = answer.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    answer
}

/// What a gRPC client would be told, in HTTP's codes.
fn refused(status: &Status) -> Response<Body> {
    let code = match status.code() {
        Code::InvalidArgument | Code::OutOfRange => StatusCode::BAD_REQUEST,
        Code::Unauthenticated => StatusCode::UNAUTHORIZED,
        Code::PermissionDenied => StatusCode::FORBIDDEN,
        Code::NotFound => StatusCode::NOT_FOUND,
        Code::FailedPrecondition | Code::Aborted => StatusCode::CONFLICT,
        Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
        Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    };
    error(code, status.message())
}
