//! The port of one of a fleet's coordinators. It is listened on from the start to the end; what answers there changes with
//! what the coordinator is.

use super::{Found, PAUSE, Stale};
use crate::error::Result;
use crate::grpc::{self, Answering, Services};
use crate::web::{self, Beside};
use crate::{Health, Options, Role};
use actor::Scope;
use futures::StreamExt;
use futures::future::{BoxFuture, FutureExt};
use proto::status::RpcError;
use registry::Leadership;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use telemetry::http::Look;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::codegen::http::{Request, Response};
use tonic::service::Routes;
use tonic::{Code, Status};
use tower::ServiceBuilder;
use tower::util::{MapResponseLayer, ServiceExt};

/// How long a call waits for a coordinator that takes over, before it is told so.
const PATIENCE: Duration = Duration::from_secs(2);

/// When whoever was told so is to ask again.
const AGAIN: Duration = Duration::from_secs(1);

/// What the paths of calls after a server's health begin with.
const HEALTH: &str = "/grpc.health.v1.Health/";

/// What a coordinator that does not lead answers.
pub(crate) type Say = Arc<dyn Fn() -> RpcError + Send + Sync>;

/// What a coordinator is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    StandsBy,
    TakesOver,
    Leads,
    Retired,
}

/// What answers at the port.
#[derive(Clone)]
pub(crate) struct Face {
    kind: Kind,
    answering: Answering,
    pub(crate) health: Health,
    /// Those that have begun and have no answer yet.
    requests: TaskTracker,
    /// Ends answers that go on, once another face is shown.
    scope: Scope,
}

/// The port of one of a fleet's coordinators. Clones are the same one.
#[derive(Clone)]
pub struct Post {
    address: SocketAddr,
    advertised: Arc<str>,
    has_page: bool,
    faces: watch::Sender<Face>,
    known: watch::Sender<Found>,
    scope: Scope,
}

impl Post {
    /// Listens until `scope` is cancelled, and follows who leads. `advertise` is where others reach it, unless at the address
    /// that it listens on.
    ///
    /// # Errors
    /// The address cannot be listened on.
    pub async fn open(
        options: &Options,
        advertise: Option<String>,
        leadership: Arc<dyn Leadership>,
        scope: &Scope,
    ) -> Result<Self> {
        let (listener, address) = crate::bind(options.listen).await?;
        let incoming = security::incoming(listener, options.access.tls.clone()).boxed();
        let advertised: Arc<str> = advertise.unwrap_or_else(|| options.access.url(address)).into();
        let known = watch::Sender::new(Err("nobody has said so yet".into()));
        look(leadership, known.clone(), scope);
        let first = refusing(Kind::StandsBy, who_leads(&known, &advertised), scope);
        let (faces, shown) = watch::channel(first);
        let has_page = web::is_served(options.listen, &options.access);
        let stop = scope.clone();
        scope.spawn("grpc server", async move {
            // A browser is told who leads, too.
            if let Err(error) = grpc::serve(Front(shown), incoming, true, stop.clone()).await {
                tracing::error!(%error, "the server ended");
            }
            stop.cancel();
        });
        Ok(Self { address, advertised, has_page, faces, known, scope: scope.clone() })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// How it is looked whether this coordinator can do its work.
    pub fn look(&self) -> Look {
        Health(Role::Now(self.faces.subscribe())).look()
    }

    /// Where others reach it.
    pub(super) fn advertised(&self) -> &str {
        &self.advertised
    }

    /// Says who leads. One that is retired does so once another is known to.
    pub(super) fn stand_by(&self) {
        if self.faces.borrow().kind != Kind::Retired {
            self.show(self.standing_by());
        }
    }

    /// Says that it takes over, and what it does, which is to be kept up to date. Whoever asks hears it, without a token too.
    pub(super) fn take_over(&self) -> watch::Sender<&'static str> {
        let (progress, does) = watch::channel("reading the state");
        let say = move || RpcError::TakingOver(does.borrow().to_string(), AGAIN);
        self.show(refusing(Kind::TakesOver, Arc::new(say), &self.scope));
        progress
    }

    /// Serves until `scope` is cancelled, which is finished once the last request is answered.
    pub(super) fn lead(&self, services: Services, health: Health, scope: &Scope) -> Result<()> {
        let answering = grpc::answering(services, self.has_page, health.readiness())?;
        let requests = TaskTracker::new();
        let (post, begun, over) = (self.clone(), requests.clone(), scope.clone());
        scope.spawn("requests", async move {
            over.cancelled().await;
            post.step_down();
            begun.close();
            begun.wait().await;
        });
        let scope = self.scope.child();
        self.show(Face { kind: Kind::Leads, answering, health, requests, scope });
        Ok(())
    }

    /// Tells what was known at `since`, until another is known to lead. `services` makes the services that do so and change
    /// nothing; their streams end with that scope.
    pub(super) fn retire(
        &self,
        since: Instant,
        services: impl FnOnce(Stale, Scope) -> Services,
    ) -> Result<()> {
        // What it heard last is of the time before.
        drop(self.known.send_replace(Err("etcd does not confirm that this coordinator leads".into())));
        let (scope, say) = (self.scope.child(), who_leads(&self.known, &self.advertised));
        let health = Health(Role::Not(say.clone()));
        let services = services(Stale { since, say }, scope.clone());
        let answering = grpc::answering(services, self.has_page, health.readiness())?;
        let requests = TaskTracker::new();
        self.show(Face { kind: Kind::Retired, answering, health, requests, scope: scope.clone() });
        let (post, mut known, over) = (self.clone(), self.known.subscribe(), scope.clone());
        scope.spawn("retirement", async move {
            let another =
                known.wait_for(|known| matches!(known, Ok(Some(leader)) if **leader != *post.advertised));
            tokio::select! {
                _ = another => post.show_after(&[Kind::Retired]),
                () = over.cancelled() => {}
            }
        });
        Ok(())
    }

    /// Leads no more, nor is about to.
    pub fn step_down(&self) {
        self.show_after(&[Kind::Leads, Kind::TakesOver]);
    }

    /// Stands by, if it is one of these.
    fn show_after(&self, kinds: &[Kind]) {
        let mut face = self.standing_by();
        self.faces.send_if_modified(|shown| {
            let is = kinds.contains(&shown.kind);
            if is {
                std::mem::swap(shown, &mut face);
            }
            is
        });
        // The one that is not shown. It goes when nobody is kept waiting for what is.
        face.scope.cancel();
    }

    fn show(&self, face: Face) {
        self.faces.send_replace(face).scope.cancel();
    }

    fn standing_by(&self) -> Face {
        refusing(Kind::StandsBy, who_leads(&self.known, &self.advertised), &self.scope)
    }
}

/// Looks who leads, until the scope is cancelled.
fn look(leadership: Arc<dyn Leadership>, known: watch::Sender<Found>, scope: &Scope) {
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
                drop(known.send_replace(found.map_err(|error| error.to_string())));
                tokio::time::sleep(PAUSE).await;
            }
        };
        tokio::select! {
            () = look => {}
            () = stop.cancelled() => {}
        }
    });
}

/// Says who leads, as far as that is known. Whom etcd names itself is about to.
fn who_leads(known: &watch::Sender<Found>, advertised: &Arc<str>) -> Say {
    let (known, advertised) = (known.subscribe(), advertised.clone());
    Arc::new(move || match known.borrow().clone() {
        Ok(Some(leader)) if *leader == *advertised => {
            RpcError::TakingOver("etcd names this coordinator as the leader".into(), AGAIN)
        }
        found => RpcError::Standby(found),
    })
}

/// Answers every call but those after its health with a refusal.
fn refusing(kind: Kind, say: Say, scope: &Scope) -> Face {
    let (scope, health) = (scope.child(), Health(Role::Not(say.clone())));
    let reports = grpc::health::service(false, health.readiness(), &scope);
    let refuse = say.clone();
    // There is no other service.
    let refused = move |answer: Response<Body>| match Status::from_header_map(answer.headers()) {
        Some(status) if status.code() == Code::Unimplemented => Status::from(refuse()).into_http(),
        _ => answer,
    };
    let answering = ServiceBuilder::new()
        .layer(Beside::instead(move || say().into()))
        .layer(grpc::counted())
        .layer(MapResponseLayer::new(refused))
        .service(Routes::new(reports).prepare());
    Face { kind, answering: Answering::new(answering), health, requests: TaskTracker::new(), scope }
}

/// Has whatever face is shown answer.
#[derive(Clone)]
struct Front(watch::Receiver<Face>);

impl Service<Request<Body>> for Front {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, std::result::Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<std::result::Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let mut faces = self.0.clone();
        async move {
            // Who asks for its health is told at once. All others would ask again, and this mostly takes no time.
            if !request.uri().path().starts_with(HEALTH) {
                let ready = faces.wait_for(|face| face.kind != Kind::TakesOver);
                let _ = tokio::time::timeout(PATIENCE, ready).await;
            }
            let (answering, _begun) = {
                // Both while it is shown: whoever shows another, and then waits for those that have begun, waits for this one.
                let face = faces.borrow();
                (face.answering.clone(), face.requests.token())
            };
            answering.oneshot(request).await
        }
        .boxed()
    }
}
