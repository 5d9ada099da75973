//! Who may call what: one table, and the layer before all services that asks it. What is not in the table nobody may
//! call, so that a new method is closed until somebody decides. The same layer counts what each client asks.

use super::limit::{Call, Limits};
use crate::access::{Access, Caller};
use crate::fleet::Stale;
use config::tokens::{Known, Principal, Role, Tokens};
use futures::FutureExt;
use futures::future::BoxFuture;
use http_body::{Frame, SizeHint};
use proto::status::RpcError;
use security::watched::Watched;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::http::header::AUTHORIZATION;
use tonic::codegen::http::{Request, Response};
use tonic::codegen::{Bytes, Service};
use tonic::transport::server::TcpConnectInfo;
use tower::layer::Layer;

/// Who may call a method.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    /// Without a token, too.
    Anyone,
    /// This role and those above it: viewer, submitter, operator. Agents stand beside them.
    From(Role),
    /// This role and those above it, and agents.
    WithAgents(Role),
}

use Who::{Anyone, From, WithAgents};

const VIEWER: Who = From(Role::Viewer);
const SUBMITTER: Who = From(Role::Submitter);
const OPERATOR: Who = From(Role::Operator);
const AGENT: Who = From(Role::Agent);
const SUBMITTER_AND_AGENT: Who = WithAgents(Role::Submitter);

/// Who may call which method.
pub const TABLE: &[(&str, Who)] = &[
    ("/lorafleet.v1.SweepService/SubmitSweep", SUBMITTER),
    ("/lorafleet.v1.SweepService/GetSweep", VIEWER),
    ("/lorafleet.v1.SweepService/ListSweeps", VIEWER),
    ("/lorafleet.v1.SweepService/CancelSweep", SUBMITTER),
    ("/lorafleet.v1.SweepService/PauseSweep", SUBMITTER),
    ("/lorafleet.v1.SweepService/ResumeSweep", SUBMITTER),
    ("/lorafleet.v1.SweepService/ExtendSweep", SUBMITTER),
    ("/lorafleet.v1.SweepService/DeleteSweep", OPERATOR),
    ("/lorafleet.v1.SweepService/WatchSweep", VIEWER),
    ("/lorafleet.v1.SweepService/GetReport", VIEWER),
    ("/lorafleet.v1.TrialService/GetTrial", VIEWER),
    ("/lorafleet.v1.TrialService/ListTrials", VIEWER),
    ("/lorafleet.v1.TrialService/GetTrialMetrics", VIEWER),
    ("/lorafleet.v1.TrialService/GetTrialLog", VIEWER),
    ("/lorafleet.v1.TrialService/StopTrial", SUBMITTER),
    ("/lorafleet.v1.TrialService/RetryTrial", SUBMITTER),
    ("/lorafleet.v1.AdapterService/ListAdapters", VIEWER),
    ("/lorafleet.v1.AdapterService/DownloadAdapter", VIEWER),
    ("/lorafleet.v1.FleetService/GetServerInfo", VIEWER),
    ("/lorafleet.v1.FleetService/ListAgents", VIEWER),
    ("/lorafleet.v1.FleetService/GetAgent", VIEWER),
    ("/lorafleet.v1.FleetService/DrainAgent", OPERATOR),
    ("/lorafleet.v1.AgentService/Session", AGENT),
    ("/lorafleet.v1.AgentService/UploadCheckpoint", AGENT),
    ("/lorafleet.v1.AgentService/DownloadCheckpoint", AGENT),
    ("/lorafleet.v1.DataService/FindMissing", SUBMITTER),
    ("/lorafleet.v1.DataService/UploadFile", SUBMITTER),
    ("/lorafleet.v1.DataService/CommitTree", SUBMITTER),
    ("/lorafleet.v1.DataService/GetTree", SUBMITTER_AND_AGENT),
    ("/lorafleet.v1.DataService/DownloadFile", SUBMITTER_AND_AGENT),
    // What restarts a server that hangs, and what spreads load, has no token; it learns that somebody serves.
    ("/grpc.health.v1.Health/Check", Anyone),
    ("/grpc.health.v1.Health/Watch", Anyone),
    ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", VIEWER),
    ("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", VIEWER),
];

impl Who {
    /// Who may call the method of a path; `None`: nobody.
    pub fn of(path: &str) -> Option<Self> {
        TABLE.iter().find(|(known, _)| *known == path).map(|(_, who)| *who)
    }

    /// Whether what they may call changes nothing: a viewer may call it.
    fn reads(self) -> bool {
        matches!(self, Anyone | VIEWER)
    }

    /// Whether a role is among them.
    pub fn permits(self, role: Role) -> bool {
        match (self, role) {
            (Anyone, _) | (AGENT | WithAgents(_), Role::Agent) => true,
            (AGENT, _) | (_, Role::Agent) => false,
            (From(least) | WithAgents(least), role) => role >= least,
        }
    }

    /// The roles that may, for people.
    fn names(self) -> String {
        let may = Role::ALL.into_iter().filter(|role| self.permits(*role));
        may.map(Role::name).collect::<Vec<_>>().join(" or ")
    }
}

/// Asks the table before each call.
#[derive(Debug, Clone)]
pub struct Guard {
    /// Who may call.
    pub access: Access,
    /// How much.
    pub limits: Limits,
    /// Of a coordinator that leads no more: then nobody may call what changes something.
    pub stale: Option<Stale>,
}

impl<S> Layer<S> for Guard {
    type Service = Guarded<S>;

    fn layer(&self, inner: S) -> Guarded<S> {
        Guarded { guard: self.clone(), inner }
    }
}

/// A service behind the table.
#[derive(Debug, Clone)]
pub struct Guarded<S> {
    guard: Guard,
    inner: S,
}

impl<S> Service<Request<Body>> for Guarded<S>
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

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        // Nobody behind this needs it, and nobody can log it then.
        let shown = request.headers_mut().remove(AUTHORIZATION);
        let token = shown.as_ref().and_then(|value| value.to_str().ok());
        let (call, caller) = match self.guard.admit(request.uri().path(), peer(&request), token) {
            Ok(admitted) => admitted,
            Err(refusal) => return std::future::ready(Ok(Status::from(refusal).into_http())).boxed(),
        };
        request.extensions_mut().insert(caller.clone());
        let asked = caller.clone();
        let request =
            request.map(|body| Body::new(WhileKnown { body, caller: asked, tells: false, _call: None }));
        let answer = self.inner.call(request);
        async move {
            let answer = answer.await?;
            Ok(answer.map(|body| while_known(body, caller, call)))
        }
        .boxed()
    }
}

impl Guard {
    /// Lets a call of a method in and counts it, or says why not. What is refused counts too: of the token's name, or, where
    /// the token is none, of the address that it comes from. `token` is what `authorization` says.
    ///
    /// # Errors
    /// The token is none, or not for that, or its client asks too much; or it changes something, and this coordinator leads
    /// no more.
    pub fn admit(
        &self,
        path: &str,
        peer: Option<SocketAddr>,
        token: Option<&str>,
    ) -> Result<(Option<Call>, Caller), RpcError> {
        let admitted = self.let_in(path, peer, token)?;
        match &self.stale {
            Some(stale) if !Who::of(path).is_some_and(Who::reads) => Err(stale.refusal()),
            _ => Ok(admitted),
        }
    }

    fn let_in(
        &self,
        path: &str,
        peer: Option<SocketAddr>,
        token: Option<&str>,
    ) -> Result<(Option<Call>, Caller), RpcError> {
        let Some(tokens) = &self.access.tokens else {
            return Ok((self.begin(None, peer)?, Caller::default()));
        };
        let who = Who::of(path);
        let known = match who {
            Some(Anyone) => return Ok((self.begin(None, peer)?, Caller::default())),
            _ => recognise(tokens, token),
        };
        let call = self.begin(known.as_ref().ok().map(|known| &known.principal), peer)?;
        let Some(who) = who else { return Err(RpcError::Denied(format!("{path}: nobody may call that"))) };
        let known = known?;
        let principal = &known.principal;
        if !who.permits(principal.role) {
            let method = path.rsplit('/').next().unwrap_or_default();
            return Err(RpcError::Denied(format!(
                "{} is a token of the role {}, and {method} is for {}; use another token, or ask who runs the server",
                principal.name,
                principal.role,
                who.names()
            )));
        }
        Ok((call, Caller::known(known, tokens.clone())))
    }

    /// Counts a call: of the token's name, or of the address that it comes from. Agents may be many with one token, and each
    /// of them has calls open: theirs are counted by both.
    fn begin(
        &self,
        principal: Option<&Principal>,
        peer: Option<SocketAddr>,
    ) -> Result<Option<Call>, RpcError> {
        let address = || match peer {
            Some(peer) => security::server::network(peer.ip()).to_string(),
            None => "a client without an address".into(),
        };
        match principal {
            Some(Principal { name, role: Role::Agent, .. }) => {
                self.limits.begin(&format!("{name} at {}", address()))
            }
            Some(principal) => self.limits.begin(&principal.name),
            None => self.limits.begin(&address()),
        }
    }
}

/// The address that a request comes from.
pub fn peer(request: &Request<Body>) -> Option<SocketAddr> {
    request.extensions().get::<TcpConnectInfo>().and_then(TcpConnectInfo::remote_addr)
}

/// An answer that ends when its caller's token is taken back. The call is over when the answer is.
pub fn while_known(body: Body, caller: Caller, call: Option<Call>) -> Body {
    Body::new(WhileKnown { body, caller, tells: true, _call: call })
}

/// Whose token was shown.
fn recognise(tokens: &Watched<Tokens>, authorization: Option<&str>) -> Result<Known, RpcError> {
    let token = authorization.and_then(|text| text.split_once(' '));
    let token =
        token.filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer")).map(|(_, token)| token.trim());
    let Some(token) = token else {
        return Err(RpcError::Unauthenticated(
            "this server wants a token: give --token-file or LORAFLEET_TOKEN; who runs the server makes one with \
             `lorafleet token create`"
                .into(),
        ));
    };
    tokens.current().find(token).cloned().ok_or_else(|| {
        RpcError::Unauthenticated(
            "the token is none that this server knows, or was taken back; ask who runs the server for another".into(),
        )
    })
}

/// The bytes of a call for as long as its token is known. A token that is taken back ends what it opened at the next
/// word of either side.
struct WhileKnown {
    body: Body,
    caller: Caller,
    /// Whether this is the answer, in which a caller is told.
    tells: bool,
    _call: Option<Call>,
}

impl http_body::Body for WhileKnown {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = self.get_mut();
        let next = Pin::new(&mut this.body).poll_frame(context);
        if !matches!(next, Poll::Ready(Some(_))) || this.caller.is_known() {
            return next;
        }
        let status = Status::from(RpcError::Unauthenticated("the token was taken back".into()));
        this.body = Body::empty();
        Poll::Ready(Some(match this.tells {
            true => Ok(Frame::trailers(status.into_http::<Body>().into_parts().0.headers)),
            false => Err(status),
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grpc::limit::Terms;
    use prost::Message;
    use prost_types::FileDescriptorSet;
    use std::collections::BTreeSet;
    use std::sync::Arc;

    /// Every method of the descriptor sets of what is served.
    fn methods() -> BTreeSet<String> {
        let sets = [
            proto::FILE_DESCRIPTOR_SET,
            tonic_health::pb::FILE_DESCRIPTOR_SET,
            tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
            tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
        ];
        let mut methods = BTreeSet::new();
        for set in sets {
            for file in FileDescriptorSet::decode(set).unwrap().file {
                for service in &file.service {
                    let path = |name: &str| format!("/{}.{}/{name}", file.package(), service.name());
                    methods.extend(service.method.iter().map(|method| path(method.name())));
                }
            }
        }
        methods
    }

    #[test]
    fn every_method_is_in_the_table_and_nothing_else() {
        let table: BTreeSet<_> = TABLE.iter().map(|(path, _)| path.to_string()).collect();
        assert_eq!(table.len(), TABLE.len(), "one line for each");
        assert_eq!(table, methods());
        assert_eq!(Who::of("/lorafleet.v1.SweepService/Other"), None);
        assert_eq!(Who::of(""), None);
    }

    #[test]
    fn agents_with_one_token_are_counted_by_their_addresses() {
        let known = [("gpu", Role::Agent), ("ada", Role::Operator)];
        let add = |known: Tokens, (name, role): &(&str, Role)| {
            known.with(Principal::new(*name, *role), config::tokens::hash(name))
        };
        let known = known.iter().fold(Tokens::default(), add);
        let tokens = Watched::open(vec![], move || Ok::<_, security::FileError>(known.clone())).unwrap();
        let access = Access { tokens: Some(Arc::new(tokens)), ..Access::default() };
        let terms = Terms { at_once: 1, per_second: 100.0 };
        let limits = Limits::new(Some(terms), Arc::new(domain::SystemClock::new()));
        let guard = Guard { access, limits, stale: None };
        let mut open = Vec::new();
        for (token, address, is_let_in) in [
            ("gpu", "10.0.0.1:1", true),
            ("gpu", "10.0.0.1:2", false),
            ("gpu", "10.0.0.2:1", true),
            ("ada", "10.0.0.1:1", true),
            ("ada", "10.0.0.2:1", false),
        ] {
            let path = match token {
                "gpu" => "/lorafleet.v1.AgentService/Session",
                _ => "/lorafleet.v1.SweepService/WatchSweep",
            };
            let admitted =
                guard.admit(path, Some(address.parse().unwrap()), Some(&format!("Bearer {token}")));
            assert_eq!(admitted.is_ok(), is_let_in, "{token} at {address}");
            open.extend(admitted);
        }
    }

    #[test]
    fn what_roles_may() {
        let may = |who: Who| Role::ALL.map(|role| who.permits(role));
        for (who, want) in [
            (Anyone, [true, true, true, true]),
            (VIEWER, [true, true, true, false]),
            (SUBMITTER, [false, true, true, false]),
            (OPERATOR, [false, false, true, false]),
            (AGENT, [false, false, false, true]),
            (SUBMITTER_AND_AGENT, [false, true, true, true]),
        ] {
            assert_eq!(may(who), want, "{who:?}");
        }
        assert_eq!(SUBMITTER.names(), "submitter or operator");
    }
}
