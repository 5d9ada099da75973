//! The registry in etcd: for a fleet, whose coordinators may be several.
//!
//! | file | holds |
//! |---|---|
//! | `mod.rs` | [`EtcdRegistry`]: leading, reading; how values are stored |
//! | `client.rs` | calls with deadlines, and the names of our keys |
//! | `last_known.rs` | [`LastKnown`]: what is left to read without a majority |
//! | `nodes.rs` | which of its nodes is asked |
//! | `lease.rs` | a lease that is kept alive |
//! | `writer.rs` | the group commit; batches and values that are too large for one transaction |
//! | `members.rs` | [`Members`]: agents that say where they are, and who leads |
//!
//! | key | holds |
//! |---|---|
//! | `<prefix>/leader/<lease>` | etcd's election; the value is the leader's address |
//! | `<prefix>/agents/<agent>` | a member, as long as its lease lives |
//! | `<prefix>/state/<key>` | a value: a zero byte and the value itself, or a one and the id of its parts |
//! | `<prefix>/parts/<id>/<number>` | a part of a large value |
//! | `<prefix>/owners/<id>` | the key whose value these parts are |
//! | `<prefix>/journal` | a batch of many writes that is being applied |
//! | `<prefix>/turn` | the name of the last transaction that wrote any of these |
//!
//! A fence is the create revision of the leader's election key. Every transaction that writes state compares it, so that
//! a leader that was replaced writes nothing, whatever it believes. It compares the turn too, so that of several tries of one,
//! at several nodes, one counts, and none that comes later than the next transaction.

mod client;
mod last_known;
mod lease;
mod members;
mod nodes;
mod writer;

pub use last_known::LastKnown;
pub use members::Members;

use crate::{Entries, Fence, INLINE_LIMIT, Registry, RegistryError, Result, Write, lower_bound};
use actor::{Mailbox, Scope, mailbox};
use client::{Etcd, Operation};
use futures::future::{BoxFuture, FutureExt};
use lease::Lease;
use security::{Client, Secret};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;
use tokio::sync::{RwLock, watch};
use tokio::time::Instant;
use writer::{Commit, Writer};

/// Commits that may wait; whoever comes later waits for room.
const WAITING: usize = 1024;
/// Keys that are read in one go: with the largest values some 10 MB.
const PAGE: usize = 200;
/// The pause between two tries to become the leader while etcd does not answer.
const CAMPAIGN_PAUSE: Duration = Duration::from_millis(500);

/// Where etcd is, and where in it our keys are.
#[derive(Debug, Clone)]
pub struct EtcdOptions {
    /// Addresses, as `https://host:2379`; any one that answers will do.
    pub endpoints: Vec<String>,
    /// What our keys begin with; fleets with different prefixes share an etcd without knowing of each other.
    pub prefix: String,
    /// Time after its last sign of life that a leader counts as gone. At least two seconds.
    pub ttl: Duration,
    /// What is trusted, and shown, where the addresses are `https://`.
    pub client: Client,
    /// A user of etcd and the password.
    pub user: Option<(String, Secret)>,
}

impl EtcdOptions {
    /// The prefix unless another is named.
    pub const PREFIX: &str = "/lorafleet";
    /// The term of leases unless another is named.
    pub const TTL: Duration = Duration::from_secs(10);

    /// With the usual prefix and term.
    pub fn new(endpoints: Vec<String>) -> Self {
        Self { endpoints, prefix: Self::PREFIX.into(), ttl: Self::TTL, client: Client::default(), user: None }
    }
}

/// Fenced state in etcd.
#[derive(Debug)]
pub struct EtcdRegistry {
    etcd: Etcd,
    ttl: Duration,
    scope: Scope,
    commits: Mailbox<Commit>,
    /// The leadership that this registry holds, if it does.
    term: watch::Sender<Option<Arc<Term>>>,
    /// Once the leadership that was won last is over: when etcd last said that it goes on. Changes with `term`, while that is
    /// locked, so that an end is not taken for that of a leadership won since.
    ended: watch::Sender<Option<Instant>>,
    /// Whether etcd ever granted it a lease.
    answered: AtomicBool,
    /// Taken for writing while a batch is applied in several transactions: a reader sees all of it or nothing.
    whole: Arc<RwLock<()>>,
}

/// A leadership.
#[derive(Debug)]
struct Term {
    fence: Fence,
    /// The election key.
    key: Vec<u8>,
    lease: Lease,
}

impl EtcdRegistry {
    /// Connects to an etcd that is there. The registry works until `scope` is cancelled, and then gives its leadership back.
    ///
    /// # Errors
    /// No address can be used, or etcd does not answer.
    pub async fn connect(options: &EtcdOptions, scope: &Scope) -> Result<Self> {
        Ok(Self::over(Etcd::connect(options).await?, options.ttl, scope))
    }

    /// The same, whether or not etcd is there: whoever calls is told.
    ///
    /// # Errors
    /// The certificates cannot be read.
    pub fn open(options: &EtcdOptions, scope: &Scope) -> Result<Self> {
        Ok(Self::over(Etcd::new(options)?, options.ttl, scope))
    }

    fn over(etcd: Etcd, ttl: Duration, scope: &Scope) -> Self {
        let (commits, inbox) = mailbox(WAITING);
        let (term, whole) = (watch::Sender::new(None), Arc::default());
        let writer = Writer::new(etcd.clone(), term.subscribe(), Arc::clone(&whole));
        scope.spawn("etcd writer", writer.run(inbox, scope.clone()));
        let (ended, answered) = (watch::Sender::new(None), AtomicBool::new(false));
        Self { etcd, ttl, scope: scope.clone(), commits, term, ended, answered, whole }
    }

    /// Returns once the leadership that was won last is over, also if it was before the call: its lease ended, or was not
    /// renewed for its whole term. Answers with the moment at which it was renewed last, up to which nobody else can have written.
    pub async fn lost(&self) -> Instant {
        let mut ended = self.ended.subscribe();
        let alive = ended.wait_for(Option::is_some).await.ok().and_then(|alive| *alive);
        // The sender lives as long as `self`, so that waiting for it cannot fail.
        alive.unwrap_or_else(Instant::now)
    }

    /// The state as it was last known here, to be read while etcd has no majority.
    pub fn last_known(&self) -> LastKnown {
        LastKnown(self.etcd.last_known())
    }

    /// Who was a member as far as that was last known, to be asked while etcd has no majority.
    pub fn last_members(&self) -> Members {
        Members::of(self.etcd.last_known(), self.ttl)
    }

    /// Whether etcd has let it stand for leader: its addresses are right, and so is what it was shown.
    pub fn has_answered(&self) -> bool {
        self.answered.load(Relaxed)
    }

    /// Who leads and who is a member.
    pub fn members(&self) -> Members {
        Members::of(self.etcd.clone(), self.ttl)
    }

    async fn campaign(&self, holder: &str) -> Result<Fence> {
        let mut old = None;
        self.term.send_modify(|term| {
            old = term.take();
            self.ended.send_replace(None);
        });
        if let Some(old) = old {
            old.lease.end().await;
        }
        let (leader, lease) = loop {
            let lease = match Lease::grant(&self.etcd, self.ttl, &self.scope).await {
                Ok(lease) => lease,
                // Once it was there, it may come back. Before, an address or a password may be wrong.
                Err(error) if self.has_answered() || matches!(error, RegistryError::Unavailable(_)) => {
                    tracing::warn!(%error, "trying again");
                    tokio::time::sleep(CAMPAIGN_PAUSE).await;
                    continue;
                }
                Err(error) => return Err(error),
            };
            self.answered.store(true, Relaxed);
            let node = self.etcd.node()?;
            let stand =
                async { node.client().await?.campaign(self.etcd.election(), holder, lease.id()).await };
            let won = tokio::select! {
                won = stand => won.map(|mut answer| answer.take_leader()),
                _ = lease.over() => continue,
                // An election may take years: those who ask the node meanwhile find out that it does not answer.
                () = node.silent() => Ok(None),
            };
            match won {
                Ok(Some(leader)) => break (leader, lease),
                Ok(None) => {}
                Err(error) => {
                    self.etcd.refused(&node, Operation::CAMPAIGN, &error);
                    tracing::warn!(%error, "etcd holds no election now; trying again");
                }
            }
            // Or the place in the election that this try may have left would be held for ever.
            lease.end().await;
            tokio::time::sleep(CAMPAIGN_PAUSE).await;
        };
        let fence = Fence(leader.rev().unsigned_abs());
        let (all, ended, ending) = (self.term.clone(), self.ended.clone(), lease.clone());
        let key = leader.key().to_vec();
        // Before anybody waits for its end.
        self.term.send_replace(Some(Arc::new(Term { fence, key, lease })));
        self.scope.spawn("leadership", async move {
            let alive = ending.over().await;
            // Not one that was won since.
            all.send_if_modified(|term| {
                let over = term.take_if(|term| term.fence == fence).is_some();
                if over {
                    ended.send_replace(Some(alive));
                }
                over
            });
        });
        // What a leader before this one left half applied is applied before anything is read.
        self.send(fence, Vec::new()).await?;
        Ok(fence)
    }

    async fn send(&self, fence: Fence, batch: Vec<Write>) -> Result<()> {
        let gone = |_| RegistryError::Storage("etcd: shutting down".into());
        self.commits.ask(|reply| Commit { fence, batch, reply }).await.map_err(gone)?
    }
}

impl Registry for EtcdRegistry {
    /// Waits until nobody else leads. Not to be dropped before it is done but with the registry's scope: a
    /// campaign that nobody waits for may still be won.
    fn lead(&self, holder: &str) -> BoxFuture<'_, Result<Fence>> {
        let holder = holder.to_string();
        async move { self.campaign(&holder).await }.boxed()
    }

    fn commit(&self, fence: Fence, batch: Vec<Write>) -> BoxFuture<'_, Result<()>> {
        self.send(fence, batch).boxed()
    }

    fn get(&self, key: &str) -> BoxFuture<'_, Result<Option<Vec<u8>>>> {
        let key = key.to_string();
        async move {
            let _whole = self.whole.read().await;
            self.etcd.read(&key).await
        }
        .boxed()
    }

    fn list(&self, prefix: &str, after: Option<&str>, limit: usize) -> BoxFuture<'_, Result<Entries>> {
        let (from, prefix) = (lower_bound(prefix, after), prefix.to_string());
        async move {
            let _whole = self.whole.read().await;
            self.etcd.list(&prefix, from, limit).await
        }
        .boxed()
    }

    fn inline_limit(&self) -> Option<usize> {
        Some(INLINE_LIMIT)
    }
}
