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
use crate::place::Place;
use crate::web::Beside;
use actor::Scope;
use domain::{Clock, SweepId, TrialId};
use limit::Limits;
use proto::v1::adapter_service_server::AdapterServiceServer;
use proto::v1::agent_service_server::AgentServiceServer;
use proto::v1::data_service_server::DataServiceServer;
use proto::v1::fleet_service_server::FleetServiceServer;
use proto::v1::sweep_service_server::SweepServiceServer;
use proto::v1::trial_service_server::TrialServiceServer;
use registry::Leadership;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use telemetry::http::Readiness;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::http::Response;
use tonic::transport::Server;
use tower::util::MapResponseLayer;

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
    /// Ends streams, and with them the server.
    pub scope: Scope,
}

/// Serves until the scope is cancelled, with the page beside the services if there is one. `ready` says whether it can do its
/// work.
pub async fn serve(
    services: Services,
    incoming: crate::Incoming,
    has_page: bool,
    ready: Readiness,
) -> std::result::Result<(), ServeError> {
    let health = health::service(true, ready, &services.scope);
    // Tools differ in which of the two versions of reflection they speak.
    let described = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let access = services.access.clone();
    let limits = Limits::new(access.terms, services.clock.clone());
    let guard = guard::Guard { access, limits };
    let page = if has_page { Beside::of(&services, &guard) } else { Beside::none() };
    let scope = services.scope.clone();
    Server::builder()
        .accept_http1(page.is_there())
        .http2_keepalive_interval(Some(KEEPALIVE))
        .max_concurrent_streams(STREAMS)
        .layer(page)
        .layer(telemetry::grpc::ServerLayer { serves: |path| guard::Who::of(path).is_some() })
        .layer(MapResponseLayer::new(explained))
        .layer(guard)
        .add_service(health)
        .add_service(described().build_v1()?)
        .add_service(described().build_v1alpha()?)
        .add_service(SweepServiceServer::new(services.clone()))
        .add_service(TrialServiceServer::new(services.clone()))
        .add_service(AdapterServiceServer::new(services.clone()))
        .add_service(FleetServiceServer::new(services.clone()))
        .add_service(DataServiceServer::new(services.clone()))
        .add_service(AgentServiceServer::new(services))
        .serve_with_incoming_shutdown(incoming, async move { scope.cancelled().await })
        .await?;
    Ok(())
}

/// An answer that is a refusal, with details if it has none: tonic refuses by itself what it cannot read.
fn explained(answer: Response<Body>) -> Response<Body> {
    match Status::from_header_map(answer.headers()) {
        Some(status) if status.details().is_empty() => proto::status::explained(status).into_http(),
        _ => answer,
    }
}

/// The server ended before it was told to.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The sockets.
    #[error(transparent)]
    Transport(#[from] tonic::transport::Error),
    /// The description of the services.
    #[error(transparent)]
    Reflection(#[from] tonic_reflection::server::Error),
}

impl Services {
    /// What cannot be written, as [`Place::look`] finds it.
    async fn trouble(&self) -> Option<String> {
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
