//! Who may reach a coordinator, how, and as whom.

use crate::allow::{Allow, AllowError};
use crate::grpc::guard::Who;
use crate::grpc::limit::Terms;
use config::limits::{Limit, Limits};
use config::tokens::{self, Known, Principal, Role, Tokens};
use domain::sweep::DEFAULT_NAMESPACE;
use security::args::{ServerArgs, ServerArgsError};
use security::watched::Watched;
use security::{FileError, Secret, ServerTls};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// How a coordinator lets clients in. By default: in plaintext, whoever reaches it.
#[derive(Debug, Clone, Default)]
pub struct Access {
    /// Its certificate; `None`: connections are not encrypted.
    pub tls: Option<Arc<ServerTls>>,
    /// Whether it also serves in plaintext on a free port of this machine, for what else runs here.
    pub also_local: bool,
    /// Who may call; `None`: whoever reaches it may do everything.
    pub tokens: Option<Arc<Watched<Tokens>>>,
    /// What submissions may name.
    pub allow: Allow,
    /// How much one client may ask; `None`: without limits.
    pub terms: Option<Terms>,
    /// How much a namespace may take; `None`: without limits.
    pub limits: Option<Arc<Watched<Limits>>>,
}

/// The flags of a coordinator that others reach.
#[derive(Debug, Clone, clap::Args)]
pub struct AccessArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// Who may call, and as what: a list of names, roles and hashes of tokens, which `lorafleet token create` makes. A
    /// changed file is read again.
    #[arg(long, env = "LORAFLEET_TOKENS", value_name = "FILE")]
    tokens: Option<PathBuf>,
    /// Serve whoever has a connection, without tokens and certificates of clients, at an address that other machines
    /// reach.
    #[arg(long, env = "LORAFLEET_ALLOW_ANONYMOUS")]
    allow_anonymous: bool,
    /// Directories of the agents' machines that sweeps may name, with all below them, or `all`. May be given several times.
    /// On 127.0.0.1 all, else none, unless given.
    #[arg(long = "allow-path", env = "LORAFLEET_ALLOW_PATH", value_delimiter = ',', value_name = "DIR|all")]
    allow_paths: Vec<String>,
    /// Models and data sets of the hub that sweeps may name: `ORG/NAME`, `ORG/` for all of an organisation, or `all`. May
    /// be given several times. On 127.0.0.1 all, else none, unless given.
    #[arg(long, env = "LORAFLEET_ALLOW_HUB", value_delimiter = ',', value_name = "ORG/[NAME]|all")]
    allow_hub: Vec<String>,
    /// Calls that one client, by its token or its address, may have open at a time; of agents by both.
    #[arg(long, env = "LORAFLEET_MAX_CALLS", default_value_t = 256, value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..))]
    max_calls: u32,
    /// Calls that one client may make in a second, in the long run; five times as many in one go.
    #[arg(long, env = "LORAFLEET_MAX_CALLS_PER_SECOND", default_value_t = 200, value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..))]
    max_calls_per_second: u32,
    /// How many trials, GPUs and uploaded bytes namespaces may have, such as `team-a: { max_gpus: 4 }`. A changed file is read
    /// again.
    #[arg(long, env = "LORAFLEET_LIMITS", value_name = "FILE")]
    limits: Option<PathBuf>,
}

/// Why the flags do not go together.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// Those of the connection.
    #[error(transparent)]
    Server(#[from] ServerArgsError),
    /// Tokens would be readable on the way.
    #[error(
        "--listen {0}: with --tokens, others could read the tokens on their way; add --tls-cert and --tls-key"
    )]
    ReadableTokens(SocketAddr),
    /// Nobody would be asked who they are, and nobody said that this is meant.
    #[error(
        "--listen {0}: whoever reaches it could do everything; name who may with --tokens, or ask for certificates with \
         --client-ca, or say --allow-anonymous"
    )]
    Anonymous(SocketAddr),
    /// The file of tokens cannot be used.
    #[error(transparent)]
    Tokens(#[from] FileError),
    /// The file of limits cannot be used.
    #[error("{0}")]
    Limits(FileError),
    /// What sweeps may name is said so that nothing can be it.
    #[error(transparent)]
    Allow(#[from] AllowError),
}

impl AccessArgs {
    /// What these flags make of a coordinator that listens there.
    ///
    /// # Errors
    /// See [`AccessError`].
    pub fn access(&self, listen: SocketAddr) -> Result<Access, AccessError> {
        let tls = self.server.tls(listen)?;
        let reachable = !listen.ip().is_loopback();
        if reachable && tls.is_none() && self.tokens.is_some() {
            return Err(AccessError::ReadableTokens(listen));
        }
        let asks = self.tokens.is_some() || self.server.client_ca.is_some();
        let meant = self.allow_anonymous || tls.is_none() && self.server.allow_plaintext;
        if reachable && !asks && !meant {
            return Err(AccessError::Anonymous(listen));
        }
        let tokens = self.tokens.as_deref().map(|path| watch(path, None)).transpose()?;
        let allow = Allow::new(&self.allow_paths, &self.allow_hub, reachable)?;
        let terms =
            Terms { at_once: self.max_calls as usize, per_second: f64::from(self.max_calls_per_second) };
        let limits = self.limits.as_deref().map(watch_limits).transpose().map_err(AccessError::Limits)?;
        Ok(Access { tls, also_local: false, tokens, allow, terms: Some(terms), limits })
    }

    /// The same with an agent that is in no file, and its token if there are tokens.
    ///
    /// # Errors
    /// See [`AccessError`].
    pub fn with_agent(&self, listen: SocketAddr) -> Result<(Access, Option<Secret>), AccessError> {
        let access = self.access(listen)?;
        let Some(path) = &self.tokens else { return Ok((access, None)) };
        let unusable = |error: security::secret::NoRandomness| FileError::new(path, error);
        let secret = Secret::random(tokens::PREFIX).map_err(unusable)?;
        let agent = Principal::new(tokens::THIS_MACHINE, Role::Agent);
        let tokens = watch(path, Some((agent, tokens::hash(secret.expose()))))?;
        Ok((Access { tokens: Some(tokens), ..access }, Some(secret)))
    }
}

fn watch(path: &Path, beside: Option<(Principal, tokens::Hash)>) -> Result<Arc<Watched<Tokens>>, FileError> {
    let file = path.to_path_buf();
    let load = move || {
        let text = std::fs::read_to_string(&file).map_err(|error| FileError::new(&file, error))?;
        let tokens = Tokens::parse(&text).map_err(|problem| FileError::new(&file, problem))?;
        Ok(match beside.clone() {
            Some((principal, hash)) => tokens.with(principal, hash),
            None => tokens,
        })
    };
    Ok(Arc::new(Watched::open(vec![path.into()], load)?))
}

fn watch_limits(path: &Path) -> Result<Arc<Watched<Limits>>, FileError> {
    let file = path.to_path_buf();
    let load = move || {
        let text = std::fs::read_to_string(&file).map_err(|error| FileError::new(&file, error))?;
        Limits::parse(&text).map_err(|problem| FileError::new(&file, problem))
    };
    Ok(Arc::new(Watched::open(vec![path.into()], load)?))
}

impl Access {
    /// What a namespace may take.
    pub fn limit(&self, namespace: &str) -> Limit {
        self.limits.as_ref().map(|limits| limits.current().of(namespace)).unwrap_or_default()
    }

    /// The address of a server at `address`, as clients write it.
    pub fn url(&self, address: SocketAddr) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{address}")
    }
}

/// Who calls.
#[derive(Debug, Clone, Default)]
pub struct Caller(Option<(Known, Arc<Watched<Tokens>>)>);

impl Caller {
    /// Who made a call.
    pub fn of<T>(request: &tonic::Request<T>) -> Self {
        request.extensions().get().cloned().unwrap_or_default()
    }

    /// Somebody with a token of these.
    pub fn known(token: Known, tokens: Arc<Watched<Tokens>>) -> Self {
        Self(Some((token, tokens)))
    }

    /// The name of its token, if tokens are asked for.
    pub fn name(&self) -> Option<&str> {
        self.0.as_ref().map(|(token, _)| token.principal.name.as_str())
    }

    /// What its sweeps and uploads belong to.
    pub fn namespace(&self) -> &str {
        self.0.as_ref().map_or(DEFAULT_NAMESPACE, |(token, _)| &token.principal.namespace)
    }

    /// Whether its token, if it needed one, is for a method.
    pub fn may(&self, method: &str) -> bool {
        let permits = |who: Who, token: &Known| who.permits(token.principal.role);
        self.0.as_ref().is_none_or(|(token, _)| Who::of(method).is_some_and(|who| permits(who, token)))
    }

    /// Whether its token, if it needed one, is known still.
    pub fn is_known(&self) -> bool {
        self.0.as_ref().is_none_or(|(token, tokens)| tokens.current().knows(token))
    }

    /// Whether somebody of that name has a token still.
    pub fn knows(&self, name: &str) -> bool {
        self.0.as_ref().is_some_and(|(_, tokens)| tokens.current().names(name))
    }
}
