//! Calls to etcd with deadlines, and the names of our keys.

use super::EtcdOptions;
use crate::{RegistryError, Result};
use etcd_client::{Client, ConnectOptions, GetOptions};
use security::Flags;
use std::time::Duration;

/// The time that a call may take. An etcd that elects its own leader answers within a few seconds.
const DEADLINE: Duration = Duration::from_secs(10);
/// The time between two signs of life on an idle connection, and the time to answer one.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

/// A value as it is stored: this byte, then the value itself.
pub(super) const INLINE: u8 = 0;
/// A value as it is stored: this byte, then the id of its parts.
pub(super) const PARTED: u8 = 1;
/// Bytes of a value that is stored in one piece, and of a part.
pub(super) const PART: usize = 48 * 1024;
/// Parts that are read in one go.
const PARTS_PAGE: i64 = 32;

/// Tries of a call that reaches nobody: of three nodes one that is gone may be drawn again and again.
const TRIES: u32 = 40;
/// The pause between two of them.
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
    pub(super) const SIGN_IN: Self = Self::new("Authenticate", "signing in");
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

/// A connection. Clones share it.
#[derive(Clone)]
pub(super) struct Etcd {
    client: Client,
    prefix: String,
    endpoints: String,
}

impl std::fmt::Debug for Etcd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Etcd").field("endpoints", &self.endpoints).field("prefix", &self.prefix).finish()
    }
}

/// A key, its stored value, and the revision at which it was read.
pub(super) type Found = (Vec<u8>, Vec<u8>, i64);

impl Etcd {
    /// Connects, and sees that somebody answers: who leads, which everyone may ask.
    pub(super) async fn connect(options: &EtcdOptions) -> Result<Self> {
        let endpoints = options.endpoints.join(",");
        let settings = ConnectOptions::new()
            .with_require_leader(true)
            .with_connect_timeout(KEEP_ALIVE)
            .with_keep_alive(KEEP_ALIVE, KEEP_ALIVE)
            .with_keep_alive_while_idle(true);
        let failed = |problem: String| RegistryError::Storage(format!("etcd at {endpoints}: {problem}"));
        let client = async {
            let settings = authenticated(settings, options).map_err(|error| failed(error.to_string()))?;
            let connect = Client::connect(&options.endpoints, Some(settings));
            connect.await.map_err(|error| {
                Operation::SIGN_IN.failed(&error);
                failed(format!("{}; write https://HOST:2379, or http:// without TLS", explained(&error)))
            })
        };
        // It signs in first, where it has a user; an etcd that does not answer would be waited for without end.
        let client = tokio::time::timeout(DEADLINE, client);
        let client = client.await.map_err(|_| {
            Operation::SIGN_IN.unanswered();
            failed(silence())
        })??;
        let prefix = options.prefix.trim_end_matches('/').to_string();
        let etcd = Self { client, prefix, endpoints };
        etcd.get(format!("{}/", etcd.election()), GetOptions::new().with_count_only()).await?;
        Ok(etcd)
    }

    /// The client; clones share its connection.
    pub(super) fn client(&self) -> Client {
        self.client.clone()
    }

    /// Makes a call within the deadline. It is made again while it reaches nobody, so that a node that is gone is no loss.
    pub(super) async fn call<T, F>(&self, operation: Operation, call: impl Fn(Client) -> F) -> Result<T>
    where
        F: Future<Output = Answer<T>>,
    {
        self.repeated(operation, call, nobody_listens).await
    }

    /// The same, made again as long as an error says that another try may succeed.
    async fn repeated<T, F>(
        &self,
        operation: Operation,
        call: impl Fn(Client) -> F,
        again: impl Fn(&etcd_client::Error) -> bool,
    ) -> Result<T>
    where
        F: Future<Output = Answer<T>>,
    {
        let failed = |problem: String| {
            RegistryError::Storage(format!("etcd at {}: {}: {problem}", self.endpoints, operation.words))
        };
        let once = async || call(self.client()).await.inspect_err(|error| operation.failed(error));
        let calls = async {
            for _ in 1..TRIES {
                match once().await {
                    Err(error) if again(&error) => tokio::time::sleep(PAUSE).await,
                    answer => return answer,
                }
            }
            once().await
        };
        match tokio::time::timeout(DEADLINE, calls).await {
            Ok(answer) => answer.map_err(|error| failed(explained(&error))),
            Err(_) => {
                operation.unanswered();
                Err(failed(silence()))
            }
        }
    }

    /// Reads keys, linearizably: every write that was answered before is seen.
    pub(super) async fn get(&self, key: impl Into<Vec<u8>>, options: GetOptions) -> Result<Vec<Found>> {
        let key = key.into();
        let read = |client: Client| {
            let (mut client, key) = (client.kv_client().max_decoding_message_size(64 << 20), key.clone());
            let options = options.clone();
            async move { client.get(key, Some(options)).await }
        };
        // What only reads may be asked twice, also of a node that was lost in the middle of it.
        let mut answer = self.repeated(Operation::READ, read, is_unavailable).await?;
        let revision = answer.header().map_or(0, |header| header.revision());
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

/// What etcd, or the way to it, says, and what to do. Of a connection that is refused for want of TLS or of a certificate
/// the reason may arrive or not, as the other side is faster to send it or to close.
fn explained(error: &etcd_client::Error) -> String {
    let (why, is_connection) = match error {
        etcd_client::Error::TransportError(error) => (security::explain_for(Flags::Etcd, error), true),
        // What etcd itself says has no other source.
        etcd_client::Error::GRpcStatus(status) => {
            (security::explain_for(Flags::Etcd, status), std::error::Error::source(status).is_some())
        }
        _ => (None, false),
    };
    let hint = match is_connection && !nobody_listens(error) {
        true => format!(
            "; write https:// if etcd wants TLS, and show a certificate with {} if it wants one",
            Flags::Etcd.identity()
        ),
        false => String::new(),
    };
    why.unwrap_or_else(|| format!("{error}{hint}"))
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

/// Whether nobody answers now.
fn is_unavailable(error: &etcd_client::Error) -> bool {
    match error {
        etcd_client::Error::GRpcStatus(status) => i32::from(status.code()) == UNAVAILABLE,
        error => nobody_listens(error),
    }
}

fn silence() -> String {
    format!("no answer within {} s; is it running, with a majority?", DEADLINE.as_secs())
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
