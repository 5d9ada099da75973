//! Calls to etcd with deadlines, and the names of our keys.

use super::EtcdOptions;
use super::nodes::{Node, Nodes};
use crate::{RegistryError, Result};
use etcd_client::{Client, ConnectOptions, GetOptions, ResponseHeader};
use futures::stream::{FuturesUnordered, StreamExt};
use security::Flags;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering::Relaxed};
use std::time::Duration;
use tokio::time::Instant;

/// The time that a call may take. An etcd that elects its own leader answers within a few seconds.
const DEADLINE: Duration = Duration::from_secs(10);
/// Silence after which another node is asked as well.
pub(super) const PATIENCE: Duration = Duration::from_secs(2);
/// The time between two signs of life on a connection that is in use, and the time to answer one. Of clients that ask more
/// often etcd drops the connection, and of those that ask while they call nothing.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

/// A value as it is stored: this byte, then the value itself.
pub(super) const INLINE: u8 = 0;
/// A value as it is stored: this byte, then the id of its parts.
pub(super) const PARTED: u8 = 1;
/// Bytes of a value that is stored in one piece, and of a part.
pub(super) const PART: usize = 48 * 1024;
/// Parts that are read in one go.
const PARTS_PAGE: i64 = 32;

/// Tries of a call that nobody can answer now: nodes that have lost their leader elect another within seconds, also where two of
/// them stand at once and it takes a second round.
const TRIES: u32 = 100;
/// The pause after one that failed.
const PAUSE: Duration = Duration::from_millis(50);

/// gRPC's number of the status that another try may mend.
const UNAVAILABLE: i32 = 14;

/// What etcd answers.
type Answer<T> = std::result::Result<T, etcd_client::Error>;

/// What is asked of etcd.
#[derive(Debug, Clone, Copy)]
pub(super) struct Operation {
    /// The method's name in etcd's API, by which failures are counted.
    method: &'static str,
    /// What it is for, in messages.
    words: &'static str,
}

impl Operation {
    pub(super) const READ: Self = Self::new("Range", "reading");
    pub(super) const ASK_WHO_LEADS: Self = Self::new("Range", "asking who leads");
    pub(super) const WRITE: Self = Self::new("Txn", "writing");
    pub(super) const REGISTER: Self = Self::new("Put", "registering");
    pub(super) const GRANT_LEASE: Self = Self::new("LeaseGrant", "asking for a lease");
    pub(super) const RENEW_LEASE: Self = Self::new("LeaseKeepAlive", "renewing a lease");
    pub(super) const REVOKE_LEASE: Self = Self::new("LeaseRevoke", "revoking a lease");
    pub(super) const CAMPAIGN: Self = Self::new("Campaign", "standing for leader");

    const fn new(method: &'static str, words: &'static str) -> Self {
        Self { method, words }
    }

    /// Counts a call that failed.
    pub(super) fn failed(self, error: &etcd_client::Error) {
        self.count(match error {
            etcd_client::Error::GRpcStatus(status) => telemetry::grpc::name(status.code()),
            etcd_client::Error::TransportError(_) | etcd_client::Error::IoError(_) => "UNAVAILABLE",
            _ => "UNKNOWN",
        });
    }

    /// Counts a call that had no answer in time.
    pub(super) fn unanswered(self) {
        self.count("DEADLINE_EXCEEDED");
    }

    fn count(self, code: &str) {
        let attributes = [("operation", self.method), ("rpc.response.status_code", code)];
        telemetry::metrics::ETCD_ERRORS.add(1.0, &attributes);
    }
}

/// Connections to its nodes. Clones share them.
#[derive(Clone)]
pub(super) struct Etcd {
    pub(super) nodes: Nodes,
    /// The same, whose clients ask nodes that have no leader, too.
    alone: Nodes,
    /// Whether a read is answered by one node alone, from what it knows.
    reads_alone: bool,
    /// The latest revision of the store that an answer was of.
    pub(super) seen: Arc<AtomicI64>,
    prefix: String,
    pub(super) endpoints: String,
}

impl std::fmt::Debug for Etcd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Etcd").field("endpoints", &self.endpoints).field("prefix", &self.prefix).finish()
    }
}

/// A key, its stored value, and the revision at which it was read.
pub(super) type Found = (Vec<u8>, Vec<u8>, i64);

impl Etcd {
    /// Makes ready to connect; nobody is asked yet.
    pub(super) fn new(options: &EtcdOptions) -> Result<Self> {
        let endpoints = options.endpoints.join(",");
        let settings = ConnectOptions::new()
            .with_require_leader(true)
            .with_connect_timeout(KEEP_ALIVE)
            .with_keep_alive(KEEP_ALIVE, KEEP_ALIVE)
            .with_keep_alive_while_idle(false);
        let settings = authenticated(settings, options)
            .map_err(|error| RegistryError::Storage(format!("etcd at {endpoints}: {error}")))?;
        let prefix = options.prefix.trim_end_matches('/').to_string();
        let nodes = Nodes::new(&options.endpoints, &settings);
        let alone = Nodes::new(&options.endpoints, &settings.with_require_leader(false));
        Ok(Self { nodes, alone, reads_alone: false, seen: Arc::default(), prefix, endpoints })
    }

    /// The same for reading alone, of whichever node answers: without a majority, nodes have no leader, and answer only who
    /// wants no more than what they know.
    pub(super) fn last_known(&self) -> Self {
        Self { nodes: self.alone.clone(), reads_alone: true, ..self.clone() }
    }

    /// Connects, and sees that somebody answers: who leads, which everyone may ask.
    pub(super) async fn connect(options: &EtcdOptions) -> Result<Self> {
        let etcd = Self::new(options)?;
        etcd.get(format!("{}/", etcd.election()), GetOptions::new().with_count_only()).await?;
        Ok(etcd)
    }

    /// The node that answers, as far as is known, for what takes as long as it likes.
    pub(super) fn node(&self) -> Result<Arc<Node>> {
        self.nodes.first().ok_or_else(|| RegistryError::Storage("etcd: no address is given".into()))
    }

    /// Whether there is no other node to go to.
    pub(super) fn has_one_node(&self) -> bool {
        self.nodes.is_one()
    }

    /// Counts what a node refused. Whether another try may succeed; then another node is asked first.
    pub(super) fn refused(&self, node: &Arc<Node>, operation: Operation, error: &etcd_client::Error) -> bool {
        operation.failed(error);
        let again = is_unavailable(error);
        if again {
            self.nodes.fails(node);
        }
        again
    }

    /// Counts what a node did not answer in time; others are asked before it from now on.
    pub(super) fn unanswered(&self, node: &Arc<Node>, operation: Operation) {
        operation.unanswered();
        tracing::warn!(node = node.endpoint, asked = operation.words, "a node of etcd does not answer");
        self.nodes.is_silent(node);
    }

    /// Makes a call within the deadline: of one node, and as long as none answers of the next one as well. So it may have its
    /// effect more than once, and long after it was answered, as a node that stands still does what it was asked once it goes
    /// on: a call must be one for which that is no matter.
    pub(super) async fn call<T, F>(&self, operation: Operation, call: impl Fn(Client) -> F) -> Result<T>
    where
        F: Future<Output = Answer<T>>,
    {
        let ask = |node: Arc<Node>, pause: Duration| {
            let call = &call;
            async move {
                // A sleep of nothing at all would wait for the timer's next tick.
                if !pause.is_zero() {
                    tokio::time::sleep(pause).await;
                }
                let answer = match node.client().await {
                    Ok(client) => call(client).await,
                    Err(error) => Err(error),
                };
                (node, answer)
            }
        };
        let until = Instant::now() + DEADLINE;
        let (mut asked, mut pause, mut said) = (FuturesUnordered::new(), Duration::ZERO, None);
        for _ in 0..TRIES {
            let last = self.node()?;
            asked.push(ask(Arc::clone(&last), pause));
            tokio::select! {
                Some((node, answer)) = asked.next() => match answer {
                    Ok(answer) => {
                        self.nodes.answers(&node);
                        return Ok(answer);
                    }
                    Err(error) => {
                        let again = self.refused(&node, operation, &error);
                        said = Some(error);
                        if !again {
                            break;
                        }
                        pause = PAUSE;
                    }
                },
                () = tokio::time::sleep(PATIENCE), if !self.nodes.is_one() => {
                    self.unanswered(&last, operation);
                    pause = Duration::ZERO;
                }
                () = tokio::time::sleep_until(until) => {
                    operation.unanswered();
                    break;
                }
            }
        }
        Err(self.failure(operation, said))
    }

    /// What a call comes to that nobody answered, or that was refused at last.
    fn failure(&self, operation: Operation, said: Option<etcd_client::Error>) -> RegistryError {
        let (at, words) = (&self.endpoints, operation.words);
        let unavailable = |problem: String| {
            RegistryError::Unavailable(format!(
                "etcd at {at} has no majority or does not answer: {words}: {problem}"
            ))
        };
        match said {
            None => unavailable(format!("no answer within {} s", DEADLINE.as_secs())),
            Some(error) => match explained(&error) {
                (problem, false) if is_unavailable(&error) => unavailable(problem),
                (problem, _) => RegistryError::Storage(format!("etcd at {at}: {words}: {problem}")),
            },
        }
    }

    /// Notes the revision that an answer is of; answers with it.
    pub(super) fn saw(&self, header: Option<&ResponseHeader>) -> i64 {
        let revision = header.map_or(0, ResponseHeader::revision);
        self.seen.fetch_max(revision, Relaxed);
        revision
    }

    /// Reads keys, linearizably: every write that was answered before is seen.
    pub(super) async fn get(&self, key: impl Into<Vec<u8>>, options: GetOptions) -> Result<Vec<Found>> {
        let key = key.into();
        let read = |client: Client| {
            let (mut client, key) = (client.kv_client().max_decoding_message_size(64 << 20), key.clone());
            let options = options.clone();
            async move { client.get(key, Some(options)).await }
        };
        let mut answer = match self.reads_alone {
            true => self.ask_each(&key, &options).await?,
            false => self.call(Operation::READ, read).await?,
        };
        let revision = self.saw(answer.header());
        let found = answer.take_kvs().into_iter().map(|kv| {
            let (key, value) = kv.into_key_value();
            (key, value, revision)
        });
        Ok(found.collect())
    }

    /// A stored value's own bytes; parts are read as they were at `revision`.
    pub(super) async fn whole_value(&self, stored: &[u8], revision: i64) -> Result<Vec<u8>> {
        let damaged =
            |problem: String| RegistryError::Storage(format!("etcd at {}: {problem}", self.endpoints));
        match stored.split_first() {
            Some((&INLINE, value)) => Ok(value.to_vec()),
            Some((&PARTED, id)) => {
                let prefix = self.parts(&String::from_utf8_lossy(id));
                let end = after_all_of(prefix.clone());
                let (mut next, mut whole) = (prefix.into_bytes(), Vec::new());
                loop {
                    let options = GetOptions::new()
                        .with_range(end.clone())
                        .with_revision(revision)
                        .with_limit(PARTS_PAGE);
                    let page = self.get(next, options).await?;
                    for (_, part, _) in &page {
                        whole.extend_from_slice(part);
                    }
                    match page.last() {
                        Some((last, ..)) if page.len() as i64 == PARTS_PAGE => next = successor(last),
                        _ => return Ok(whole),
                    }
                }
            }
            _ => Err(damaged(
                "a value is not in a form that this version knows; was it written by a newer one?".into(),
            )),
        }
    }

    pub(super) fn election(&self) -> String {
        format!("{}/leader", self.prefix)
    }

    pub(super) fn state(&self, key: &str) -> Vec<u8> {
        format!("{}/state/{key}", self.prefix).into_bytes()
    }

    pub(super) fn parts(&self, id: &str) -> String {
        format!("{}/parts/{id}/", self.prefix)
    }

    pub(super) fn all_parts(&self) -> String {
        format!("{}/parts/", self.prefix)
    }

    pub(super) fn owner(&self, id: &str) -> String {
        format!("{}/owners/{id}", self.prefix)
    }

    pub(super) fn journal(&self) -> String {
        format!("{}/journal", self.prefix)
    }

    pub(super) fn turn(&self) -> String {
        format!("{}/turn", self.prefix)
    }

    pub(super) fn member(&self, id: &str) -> String {
        format!("{}/agents/{id}", self.prefix)
    }
}

/// With certificates, and a user who signs in again when etcd forgot of it.
fn authenticated(
    mut settings: ConnectOptions,
    options: &EtcdOptions,
) -> std::result::Result<ConnectOptions, security::FileError> {
    if options.endpoints.iter().any(|endpoint| endpoint.starts_with("https://")) {
        settings = settings.with_tls(options.client.tls()?);
    }
    if let Some((user, password)) = &options.user {
        settings = settings.with_user(user, password.expose()).with_auto_token_refresh(true);
    }
    Ok(settings)
}

/// What etcd, or the way to it, says, and what to do; and whether that is known to be about certificates. Of a connection that
/// is refused for want of TLS or of a certificate the reason may arrive or not, as the other side is faster to send it or
/// to close.
pub(super) fn explained(error: &etcd_client::Error) -> (String, bool) {
    use etcd_client::Error;
    let (why, is_connection) = match error {
        Error::TransportError(error) => (security::explain_for(Flags::Etcd, error), true),
        Error::GRpcStatus(status) => (security::explain_for(Flags::Etcd, status), is_of_connection(status)),
        _ => (None, false),
    };
    let hint = match error {
        Error::InvalidUri(_) | Error::InvalidArgs(_) => {
            "; write https://HOST:2379, or http:// without TLS".into()
        }
        _ if is_connection && !nobody_listens(error) => format!(
            "; write https:// if etcd wants TLS, and show a certificate with {} if it wants one",
            Flags::Etcd.identity()
        ),
        _ => String::new(),
    };
    let is_known = why.is_some();
    (why.unwrap_or_else(|| format!("{error}{hint}")), is_known)
}

/// Whether the address is right as far as it goes and nothing answers there: what was to be said reached nobody.
fn nobody_listens(error: &etcd_client::Error) -> bool {
    let kind = |error: &std::io::Error| error.kind() == std::io::ErrorKind::ConnectionRefused;
    // It does not tell its own source.
    let mut next: Option<&(dyn std::error::Error + 'static)> = match error {
        etcd_client::Error::TransportError(error) => Some(error),
        etcd_client::Error::GRpcStatus(status) => Some(status),
        _ => None,
    };
    while let Some(error) = next {
        if error.downcast_ref().is_some_and(kind) {
            return true;
        }
        next = error.source();
    }
    false
}

/// Whether nobody answers now: etcd says so, or nobody listens, or the connection broke, under whatever code that is told. One
/// that breaks over certificates will break again.
fn is_unavailable(error: &etcd_client::Error) -> bool {
    match error {
        etcd_client::Error::GRpcStatus(status) if i32::from(status.code()) == UNAVAILABLE => true,
        etcd_client::Error::GRpcStatus(status) => {
            is_of_connection(status) && security::explain_for(Flags::Etcd, status).is_none()
        }
        error => nobody_listens(error),
    }
}

/// Whether a status was made on this side, of a connection that failed: what etcd itself says has no other source.
fn is_of_connection(status: &impl std::error::Error) -> bool {
    status.source().is_some()
}

/// The least key after every key that begins with `prefix`, which is not empty.
pub(super) fn after_all_of(prefix: impl Into<Vec<u8>>) -> Vec<u8> {
    let mut end: Vec<u8> = prefix.into();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            break;
        }
    }
    end
}

/// The least key after `key`.
pub(super) fn successor(key: &[u8]) -> Vec<u8> {
    [key, &[0]].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;
    use tokio::net::TcpListener;

    #[tokio::test]
    async fn a_connection_that_breaks_in_a_call_sends_it_to_another_node() {
        let nodes = [
            TcpListener::bind("127.0.0.1:0").await.unwrap(),
            TcpListener::bind("127.0.0.1:0").await.unwrap(),
        ];
        let endpoint = |node: &TcpListener| format!("http://{}", node.local_addr().unwrap());
        let options = EtcdOptions::new(nodes.iter().map(endpoint).collect());
        // It reads what a call begins with, and hangs up.
        let breaks = async |node: &TcpListener| {
            let (mut stream, _) = node.accept().await.unwrap();
            stream.read_exact(&mut [0; 24]).await.unwrap();
        };
        tokio::select! {
            _ = async { tokio::join!(breaks(&nodes[0]), breaks(&nodes[1])) } => {}
            done = Etcd::connect(&options) => panic!("one node was asked: {:?}", done.err()),
        }
    }
}
