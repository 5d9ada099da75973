//! The services. Each method reads its request, asks the directory or the store, and writes the answer; wire
//! types end here.

mod adapters;
mod agents;
mod checkpoints;
mod data;
mod fleet;
pub mod guard;
pub mod health;
pub mod limit;
mod members;
mod page;
mod suited;
mod sweeps;
mod trials;

use crate::access::Access;
use crate::actors::agent_session::Desk;
use crate::blobs::Blobs;
use crate::error::{CoordinatorError, Result};
use crate::fleet::Stale;
use crate::place::Place;
use crate::web::Beside;
use actor::Scope;
use domain::{Clock, SweepId, TrialId};
use limit::Limits;
use proto::STALE_SECONDS;
use proto::v1::adapter_service_server::AdapterServiceServer;
use proto::v1::agent_service_server::AgentServiceServer;
use proto::v1::data_service_server::DataServiceServer;
use proto::v1::fleet_service_server::FleetServiceServer;
use proto::v1::sweep_service_server::SweepServiceServer;
use proto::v1::trial_service_server::TrialServiceServer;
use registry::Leadership;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use telemetry::http::Readiness;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::codegen::http::header::HeaderValue;
use tonic::codegen::http::{Request, Response};
use tonic::service::Routes;
use tonic::transport::Server;
use tower::ServiceBuilder;
use tower::util::{BoxCloneSyncService, MapResponseLayer};

/// Silence on a connection after which the other side is asked for a sign of life.
const KEEPALIVE: Duration = Duration::from_secs(20);

/// Calls that one connection may have open; a client opens another connection for more.
const STREAMS: u32 = 256;

/// A stream of answers.
type Answers<T> = Pin<Box<dyn futures::Stream<Item = std::result::Result<T, Status>> + Send>>;

/// What the services work with.
#[derive(Clone)]
pub struct Services {
    /// Sweeps, leases, history and checkpoints.
    pub desk: Desk,
    /// Data that submitters upload.
    pub blobs: Blobs,
    /// The hour.
    pub clock: Arc<dyn Clock>,
    /// Who may call what.
    pub access: Access,
    /// Where the coordinator keeps metrics and checkpoints.
    pub place: Place,
    /// Who is of the fleet, if there is one.
    pub leadership: Option<Arc<dyn Leadership>>,
    /// Of a coordinator that led and leads no more: how old what it tells is.
    pub stale: Option<Stale>,
    /// Ends streams, and with them the server.
    pub scope: Scope,
}

/// What answers requests: the services, or something in their place.
pub(crate) type Answering = BoxCloneSyncService<Request<Body>, Response<Body>, Infallible>;

/// The services, with the page beside them if there is one. `ready` says whether it can do its work.
///
/// # Errors
/// The description of the services is none.
pub(crate) fn answering(
    services: Services,
    has_page: bool,
    ready: Readiness,
) -> std::result::Result<Answering, tonic_reflection::server::Error> {
    let leads = services.stale.is_none();
    let health = health::service(leads, ready, &services.scope);
    // Tools differ in which of the two versions of reflection they speak.
    let described = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let (access, stale) = (services.access.clone(), services.stale.clone());
    let limits = Limits::new(access.terms, services.clock.clone());
    let guard = guard::Guard { access, limits, stale: stale.clone() };
    let page = if has_page { Beside::of(&services, &guard) } else { Beside::instead(no_page) };
    let routes = Routes::new(health)
        .add_service(described().build_v1()?)
        .add_service(described().build_v1alpha()?)
        .add_service(SweepServiceServer::new(services.clone()))
        .add_service(TrialServiceServer::new(services.clone()))
        .add_service(AdapterServiceServer::new(services.clone()))
        .add_service(FleetServiceServer::new(services.clone()))
        .add_service(DataServiceServer::new(services.clone()))
        .add_service(AgentServiceServer::new(services));
    let answering = ServiceBuilder::new()
        .layer(MapResponseLayer::new(move |answer: Response<Body>| match &stale {
            Some(stale) => marked(answer, stale),
            None => answer,
        }))
        .layer(page)
        .layer(counted())
        .layer(MapResponseLayer::new(explained))
        .layer(guard)
        .service(routes.prepare());
    Ok(Answering::new(answering))
}

/// Counts and traces calls.
pub(crate) fn counted() -> telemetry::grpc::ServerLayer {
    telemetry::grpc::ServerLayer { serves: |path| guard::Who::of(path).is_some() }
}

/// Serves until the scope is cancelled. `browsers`: whoever speaks HTTP/1.1, as the page does, is answered as well.
pub(crate) async fn serve<S>(
    answering: S,
    incoming: crate::Incoming,
    browsers: bool,
    scope: Scope,
) -> std::result::Result<(), tonic::transport::Error>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    Server::builder()
        .accept_http1(browsers)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .max_concurrent_streams(STREAMS)
        .serve_with_incoming_shutdown(answering, incoming, async move { scope.cancelled().await })
        .await
}

fn no_page() -> Status {
    Status::not_found(
        "there is no page here: without --tokens it is for who is on the coordinator's machine alone",
    )
}

/// An answer that says how old what it tells is. A refusal tells nothing.
fn marked(mut answer: Response<Body>, stale: &Stale) -> Response<Body> {
    if answer.status().is_success() && Status::from_header_map(answer.headers()).is_none() {
        answer.headers_mut().insert(STALE_SECONDS, HeaderValue::from(stale.since.elapsed().as_secs()));
    }
    answer
}

/// An answer that is a refusal, with details if it has none: tonic refuses by itself what it cannot read.
fn explained(answer: Response<Body>) -> Response<Body> {
    match Status::from_header_map(answer.headers()) {
        Some(status) if status.details().is_empty() => proto::status::explained(status).into_http(),
        _ => answer,
    }
}

impl Services {
    /// What cannot be written, as [`Place::look`] finds it. Who leads no more writes nothing to find out.
    async fn trouble(&self) -> Option<String> {
        if self.stale.is_some() {
            return None;
        }
        self.place.look(&self.desk.trouble).await
    }

    /// Refuses a person's change while it could not be written: better a clear word now than a long silence.
    async fn writable(&self) -> Result<()> {
        match self.trouble().await {
            Some(why) => Err(CoordinatorError::Trouble(why)),
            None => Ok(()),
        }
    }
}

fn sweep_id(id: String) -> Result<SweepId> {
    if id.is_empty() {
        return Err(CoordinatorError::invalid("sweep_id", "is missing"));
    }
    Ok(SweepId::new(id))
}

fn trial_id(id: String) -> Result<TrialId> {
    let id = TrialId::new(id);
    match id.number() {
        Some(_) => Ok(id),
        None => {
            Err(CoordinatorError::invalid("trial_id", format!("`{id}` is not of the form <sweep>/<number>")))
        }
    }
}
