//! One of a fleet's coordinators: it stands by while another leads, and says who; when it leads, it serves.
//!
//! The state is in a registry that all of them reach (etcd). Metrics and checkpoints lie in an object store, where a
//! leader that is replaced while its process lives on can do no harm ([`crate::history`], [`crate::artifacts`]); or in a
//! directory that all of them see. Its lock is held by the one that serves, so that the files of a leader that is
//! replaced are not touched before its process is gone.

use crate::error::{CoordinatorError, Result};
use crate::history::History;
use crate::place::Place;
use crate::store::Store;
use crate::web::Beside;
use crate::{Health, Incoming, Options, Role, Server, grpc};
use actor::Scope;
use futures::StreamExt;
use futures::future::{BoxFuture, FutureExt};
use proto::status::RpcError;
use registry::{DirectoryLock, Leadership, Registry, RegistryError};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::body::Body;
use tonic::codegen::http::Response;
use tonic::transport::Server as Transport;
use tonic::{Code, Status};
use tonic_health::pb::health_server::{Health as Reports, HealthServer};
use tower::util::MapResponseLayer;

/// The pause between two looks at who leads, and between two tries to take the directory.
const PAUSE: Duration = Duration::from_millis(250);
/// The time in which a coordinator that stops standing by closes its connections.
const CLOSING: Duration = Duration::from_secs(1);

/// The fleet that a coordinator is one of.
#[derive(Clone)]
pub struct Fleet {
    /// The state.
    pub registry: Arc<dyn Registry>,
    /// Says who leads.
    pub leadership: Arc<dyn Leadership>,
    /// Where metrics and checkpoints lie, for all of them.
    pub place: Place,
    /// Where others reach this coordinator, as `https://host:port`; `None`: at the address that it listens on.
    pub advertise: Option<String>,
}

/// Stands by until this coordinator leads, then starts as [`crate::start`] does on the fleet's state and in its place,
/// which is not `options.data_dir`. `told` hears the address as soon as it is listened on.
///
/// # Errors
/// As [`crate::start`]'s; `Gone` if `scope` is cancelled before it leads.
pub fn start<'a>(
    options: Options,
    fleet: Fleet,
    scope: Scope,
    told: Told<'a>,
) -> BoxFuture<'a, Result<Server>> {
    started(options, fleet, scope, told).boxed()
}

/// Hears of a server that listens.
pub type Told<'a> = Box<dyn FnOnce(&Server) + Send + 'a>;

async fn started(options: Options, fleet: Fleet, scope: Scope, told: Told<'_>) -> Result<Server> {
    let (listener, address) = crate::bind(options.listen).await?;
    let failed = |source| CoordinatorError::Listen { address, source };
    let listener = listener.into_std().map_err(failed)?;
    let standby = scope.child();
    let known = look(fleet.leadership.clone(), &standby);
    let mut server = Server { address, local: None, health: Health(Role::StandsBy(known.clone())) };
    told(&server);
    let waiting = TcpListener::from_std(listener.try_clone().map_err(failed)?).map_err(failed)?;
    let tls = options.access.tls.clone();
    let health = grpc::health::service(false, server.health.readiness(), &standby);
    stand_by(security::incoming(waiting, tls.clone()).boxed(), health, known, &standby);

    let advertise = fleet.advertise.unwrap_or_else(|| options.access.url(address));
    let led = tokio::select! {
        led = lead(&fleet.place, fleet.registry, &advertise) => led,
        () = scope.cancelled() => Err(actor::Gone.into()),
    };
    if !standby.finish(CLOSING).await {
        tracing::warn!("connections from the time of standing by are still open");
    }
    let (store, lock) = led?;
    let listener = TcpListener::from_std(listener).map_err(failed)?;
    let (incoming, leadership) = (security::incoming(listener, tls).boxed(), Some(fleet.leadership));
    server.health = crate::serve(options, incoming, fleet.place, lock, store, leadership, scope).await?;
    Ok(server)
}

async fn lead(
    place: &Place,
    registry: Arc<dyn Registry>,
    advertise: &str,
) -> Result<(Store, Option<DirectoryLock>)> {
    let store = Store::lead(registry, advertise).await?;
    tracing::info!(advertise, "this coordinator leads");
    let Place::Directory(dir) = place else { return Ok((store, None)) };
    let lock = take(dir).await?;
    History::refuse_newer(&dir.join("history"))?;
    Ok((store, Some(lock)))
}

/// Takes the directory as soon as the last leader's process has let go of it.
async fn take(dir: &Path) -> Result<DirectoryLock> {
    let mut said = false;
    loop {
        match DirectoryLock::acquire(dir) {
            Err(error @ RegistryError::InUse { .. }) => {
                if !std::mem::replace(&mut said, true) {
                    tracing::warn!(%error, "waiting for the last leader's process to end");
                }
                tokio::time::sleep(PAUSE).await;
            }
            other => return Ok(other?),
        }
    }
}

/// Who leads, if one does, or why that is not known: as a coordinator that stands by last heard it.
pub(crate) type Known = watch::Receiver<std::result::Result<Option<String>, String>>;

/// What a coordinator that stands by answers.
pub(crate) fn refusal(known: &Known) -> Status {
    RpcError::Standby(known.borrow().clone()).into()
}

/// Looks who leads, until the scope is cancelled.
fn look(leadership: Arc<dyn Leadership>, scope: &Scope) -> Known {
    let (leader, known) = watch::channel(Err("nobody has said so yet".into()));
    let stop = scope.clone();
    scope.spawn("leader watch", async move {
        let look = async {
            let mut answered = true;
            loop {
                let found = leadership.leader().await;
                if let Err(error) = &found
                    && answered
                {
                    tracing::warn!(%error, "it is not known who leads");
                }
                answered = found.is_ok();
                // Nobody reads what may be old: while nobody says who leads, the last answer is forgotten.
                drop(leader.send_replace(found.map_err(|error| error.to_string())));
                tokio::time::sleep(PAUSE).await;
            }
        };
        tokio::select! {
            () = look => {}
            () = stop.cancelled() => {}
        }
    });
    known
}

/// Answers every call but those after its health with who leads, until the scope is cancelled.
fn stand_by(incoming: Incoming, health: HealthServer<impl Reports>, known: Known, scope: &Scope) {
    let stop = scope.clone();
    scope.spawn("standby server", async move {
        let say = move || refusal(&known);
        let refuse = say.clone();
        // There is no other service.
        let refused = move |answer: Response<Body>| match Status::from_header_map(answer.headers()) {
            Some(status) if status.code() == Code::Unimplemented => refuse().into_http(),
            _ => answer,
        };
        let server = Transport::builder()
            .accept_http1(true)
            .layer(Beside::instead(say))
            .layer(MapResponseLayer::new(refused))
            .add_service(health);
        tokio::select! {
            served = server.serve_with_incoming(incoming) => {
                if let Err(error) = served {
                    tracing::error!(%error, "standing by, but nobody can ask");
                }
            }
            () = stop.cancelled() => {}
        }
    });
}
