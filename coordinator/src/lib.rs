//! Schedules the trials of sweeps onto agents, and keeps what they send.
//!
//! | module | holds |
//! |---|---|
//! | [`access`] | who may reach it, and how |
//! | [`actors`] | who owns which state: sweeps, dispatcher, agent sessions |
//! | [`grpc`] | the services |
//! | [`store`] | typed records over the registry |
//! | [`history`] | metric points |
//! | [`artifacts`] | checkpoints |
//! | [`blobs`] | data that submitters upload |
//! | [`allow`] | what a submission may name |
//! | [`owners`] | which token an agent belongs to |
//! | [`uploads`] | which namespace uploaded what, and how much it may |
//! | [`place`] | where metrics and checkpoints lie: a directory, or an object store |
//! | [`fleet`] | one of several coordinators: standing by, taking over, leading, and left without etcd |
//! | [`fsck`] | whether a data directory is sound |
//! | [`search`] | which trial next, and which to stop (pure) |
//! | [`placement`] | which trial goes where (pure) |
//! | [`trouble`] | what cannot be written now |
//! | [`report`] | a sweep's HTML report (pure) |
//! | [`web`] | the live page, beside the services |

pub mod access;
pub mod actors;
pub mod allow;
pub mod artifacts;
pub mod blobs;
pub mod error;
pub mod fleet;
pub mod fsck;
pub mod grpc;
pub mod history;
pub mod owners;
pub mod place;
pub mod placement;
pub mod report;
pub mod search;
pub mod store;
pub mod trouble;
pub mod uploads;
pub mod web;

pub use error::CoordinatorError;

pub use access::Access;

use actor::Scope;
use actors::agent_session::Desk;
use actors::directory::Directory;
use actors::dispatcher::{Dispatcher, Terms};
use actors::sweep::Tools;
use artifacts::Artifacts;
use blobs::{Blobs, Retained};
use domain::data::ContentHash;
use domain::{Clock, Timestamp};
use error::Result;
use futures::future::{BoxFuture, FutureExt};
use futures::stream::{BoxStream, StreamExt};
use grpc::Services;
use history::History;
use owners::Owners;
use place::Place;
use registry::{DirectoryLock, Leadership, SqliteRegistry};
use security::Connection;
use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use store::Store;
use telemetry::http::{Look, Readiness};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tonic::Status;

/// How long what is under way may take to end, in all, when the `coordinator` program is told to stop. With
/// [`telemetry::program::END_LIMIT`] it ends before systemd kills it.
pub const STOP_LIMIT: Duration = Duration::from_secs(30);
use trouble::Trouble;
use uploads::Uploads;

/// How a coordinator runs.
#[derive(Clone)]
pub struct Options {
    /// Where it keeps everything: `coordinator.db`, `history/`, `artifacts/`. One coordinator a directory.
    pub data_dir: PathBuf,
    /// The address to serve at; port 0 takes a free one.
    pub listen: SocketAddr,
    /// The hour.
    pub clock: Arc<dyn Clock>,
    /// Time between an agent's heartbeats.
    pub heartbeat: Duration,
    /// Time without a heartbeat after which an agent's trials go to others.
    pub lease: Duration,
    /// Who may reach it, and how.
    pub access: Access,
}

/// A coordinator that serves.
#[derive(Debug)]
pub struct Server {
    /// Where it serves.
    pub address: SocketAddr,
    /// Where it also serves this machine alone, without TLS.
    pub local: Option<SocketAddr>,
    /// What it can say of itself.
    pub health: Health,
}

/// Whether a coordinator can do its work.
#[derive(Clone)]
pub struct Health(Role);

/// What a coordinator is, with what says whether it can be that.
#[derive(Clone)]
enum Role {
    Leads(Store, Trouble, Place),
    /// It does not, and says why.
    Not(fleet::Say),
    /// One of a fleet's: now this, now that.
    Now(watch::Receiver<fleet::Face>),
}

impl std::fmt::Debug for Health {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let leads = matches!(self.0, Role::Leads(..));
        f.debug_struct("Health").field("leads", &leads).finish_non_exhaustive()
    }
}

impl Health {
    /// Looks at it whenever it is asked.
    pub fn readiness(&self) -> Readiness {
        Readiness::of(self.look())
    }

    /// How it is looked at.
    pub fn look(&self) -> Look {
        let health = self.clone();
        Arc::new(move || {
            let health = health.clone();
            async move { health.check().await }.boxed()
        })
    }

    /// Looks whether it leads, can read its state, and can write to its disk or store.
    ///
    /// # Errors
    /// What it cannot do, for people.
    pub async fn check(&self) -> std::result::Result<(), String> {
        match &self.0 {
            Role::Not(say) => Err(Status::from(say()).message().to_string()),
            Role::Now(faces) => {
                let health = faces.borrow().health.clone();
                // What a face has is never this again, so that it ends.
                Box::pin(health.check()).await
            }
            Role::Leads(store, trouble, place) => {
                store.drained().await.map_err(|error| format!("the state cannot be read: {error}"))?;
                place.look(trouble).await.map_or(Ok(()), Err)
            }
        }
    }
}

/// The connections of clients.
type Incoming = BoxStream<'static, std::io::Result<Connection>>;

/// Starts a coordinator and goes on with what its data directory says was under way. It stops when `scope` is
/// cancelled, and cancels `scope` itself if it cannot go on; `scope.finish` waits for its end.
///
/// # Errors
/// The data directory is in use or cannot be read, or the address cannot be listened on.
pub fn start(options: Options, scope: Scope) -> BoxFuture<'static, Result<Server>> {
    // Boxed here, so that all of the server is compiled once and not again into every program that starts one.
    started(options, scope).boxed()
}

async fn started(options: Options, scope: Scope) -> Result<Server> {
    let (listener, address) = bind(options.listen).await?;
    let mut incoming = security::incoming(listener, options.access.tls.clone()).boxed();
    let mut local = None;
    if options.access.also_local {
        let (listener, address) = bind((Ipv4Addr::LOCALHOST, 0).into()).await?;
        incoming = futures::stream::select(incoming, security::incoming(listener, None).boxed()).boxed();
        local = Some(address);
    }
    let lock = DirectoryLock::acquire(&options.data_dir)?;
    // Before anything in the directory changes.
    History::refuse_newer(&options.data_dir.join("history"))?;
    let registry = Arc::new(SqliteRegistry::open(&options.data_dir.join("coordinator.db"))?);
    let store = Store::lead(registry, &format!("process {} at {address}", std::process::id())).await?;
    let place = Place::Directory(options.data_dir.clone());
    let has_page = web::is_served(options.listen, &options.access);
    let (services, health) = lead(options, place, store, None, Some(lock), &scope).await?;
    let answering = grpc::answering(services, has_page, health.readiness())?;
    scope.clone().spawn("grpc server", async move {
        if let Err(error) = grpc::serve(answering, incoming, has_page, scope.clone()).await {
            tracing::error!(%error, "the server ended");
        }
        scope.cancel();
    });
    Ok(Server { address, local, health })
}

async fn bind(listen: SocketAddr) -> Result<(TcpListener, SocketAddr)> {
    let failed = |source| CoordinatorError::Listen { address: listen, source };
    let listener = TcpListener::bind(listen).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    Ok((listener, address))
}

/// Leads: goes on with what is under way. `leadership` is the fleet's, if it is one's. `lock` is held until the last that works
/// for it is gone.
async fn lead(
    options: Options,
    place: Place,
    store: Store,
    leadership: Option<Arc<dyn Leadership>>,
    lock: Option<DirectoryLock>,
    scope: &Scope,
) -> Result<(Services, Health)> {
    let Options { clock, heartbeat, lease, access, .. } = options;
    let kept = Kept::open(store.clone(), &place, scope).await?;
    if let Some(lock) = lock {
        kept.history.hold(lock);
    }
    let desk = go_on(kept, clock.clone(), Terms { heartbeat, lease }, scope).await?;
    if let Some(limits) = &access.limits {
        desk.dispatcher.limit(limits.clone()).await?;
    }
    let health = Health(Role::Leads(store, desk.trouble.clone(), place.clone()));
    let (blobs, scope, stale) = (Blobs::on(desk.artifacts.store()), scope.clone(), None);
    let services = Services { desk, blobs, clock, access, place, leadership, stale, scope };
    tracing::info!(data = %services.place, "serving");
    Ok((services, health))
}

/// What a coordinator keeps.
#[derive(Clone)]
pub struct Kept {
    /// The state, led.
    pub store: Store,
    /// Metrics.
    pub history: History,
    /// Checkpoints.
    pub artifacts: Artifacts,
}

impl Kept {
    /// What a leader finds in a place. In an object store all of it is of the leader's term and tied to `scope`.
    ///
    /// # Errors
    /// It cannot be read, or is damaged.
    pub async fn open(store: Store, place: &Place, scope: &Scope) -> Result<Self> {
        let deleted = store.tombstones().await?.into_iter().map(|tombstone| tombstone.sweep).collect();
        let (history, artifacts) = match place {
            Place::Directory(dir) => (
                History::open_without(&dir.join("history"), &deleted)?,
                Artifacts::local(&dir.join("artifacts"))?,
            ),
            Place::Objects(objects) => {
                let history = History::open_in(objects.store(), store.clone(), &deleted, scope).await?;
                (history, Artifacts::on(objects.store()).in_term(store.term(), scope.clone()))
            }
        };
        Ok(Self { store, history, artifacts })
    }
}

/// Starts a leader's actors, which go on with what is under way. They end with `scope`.
///
/// # Errors
/// What is kept cannot be read, or another leads.
pub fn go_on(kept: Kept, clock: Arc<dyn Clock>, terms: Terms, scope: &Scope) -> BoxFuture<'_, Result<Desk>> {
    taken_up(kept, clock, terms, scope).boxed()
}

async fn taken_up(kept: Kept, clock: Arc<dyn Clock>, terms: Terms, scope: &Scope) -> Result<Desk> {
    let Kept { store, history, artifacts } = kept;
    let store = store.beside(artifacts.clone());
    let stored = remove_unused(&store, &artifacts, clock.now()).await;
    let uploads = Uploads::open(store.clone(), stored.as_ref()).await?;
    let dispatcher = Dispatcher::start(clock.clone(), terms, store.drained().await?, scope);
    let trouble = Trouble::new(clock.clone());
    let tools = Tools {
        trouble: trouble.clone(),
        store: store.clone(),
        history: history.clone(),
        artifacts: artifacts.clone(),
        dispatcher: dispatcher.clone(),
        clock,
        tick: terms.heartbeat,
    };
    let directory = Directory::start(tools, scope).await?;
    let owners = Owners::open(store).await?;
    dispatcher.serve().await?;
    Ok(Desk { directory, dispatcher, history, artifacts, owners, uploads, trouble, lease: terms.lease })
}

/// Removes what no record points at: checkpoints of which a deletion was cut off, or of an upload without its record, and
/// data that no sweep names any more. Before anything is uploaded here, so that none of it is about to be recorded;
/// `artifacts` says why a coordinator that was replaced can record no checkpoint either. Answers with the uploaded files that
/// are left, as far as that is known.
async fn remove_unused(
    store: &Store,
    artifacts: &Artifacts,
    now: Timestamp,
) -> Option<BTreeSet<ContentHash>> {
    let removed = match store.paths().await {
        Ok(used) => artifacts.delete_all_but(&used).await.map_err(CoordinatorError::from),
        Err(error) => Err(error),
    };
    if let Err(error) = removed {
        tracing::warn!(%error, "checkpoints that nothing points at were not removed");
    }
    let blobs = Blobs::on(artifacts.store());
    let removed = match store.trees().await {
        Ok(used) => {
            let leads = || {
                let store = store.clone();
                async move { store.still_leads().await.map_err(CoordinatorError::from) }.boxed()
            };
            blobs.retain(&used, now, blobs::KEPT_UNUSED, leads).await
        }
        Err(error) => Err(error),
    };
    match removed {
        Ok(Retained { files, removed }) => {
            if removed > 0 {
                tracing::info!(objects = removed, "removed uploaded data that no sweep names");
            }
            Some(files)
        }
        Err(error) => {
            tracing::warn!(%error, "uploaded data that no sweep names was not removed");
            None
        }
    }
}
