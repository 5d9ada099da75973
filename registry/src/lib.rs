//! Fenced durable state: a key-value store whose every write is one atomic batch, refused unless it comes from
//! the current leader. One trait, [`Registry`]; three implementations: SQLite (one machine), etcd (a fleet) and an
//! in-memory model; one contract suite (`tests/contract.rs`) runs against all three.
//!
//! | module | holds |
//! |---|---|
//! | [`sqlite`] | [`SqliteRegistry`]: one file, one writer thread, group commit |
//! | `etcd` | `EtcdRegistry`, and who is a member of the fleet; behind the feature `etcd` |
//! | [`memory`] | [`MemoryRegistry`]: the model that says what the others must do |
//! | [`lock`] | [`DirectoryLock`]: one process a data directory |
//! | [`snapshot`] | [`Snapshot`]: all of a SQLite registry, read without changing a byte of it |

#[cfg(feature = "etcd")]
pub mod etcd;
pub mod lock;
pub mod memory;
pub mod snapshot;
pub mod sqlite;

#[cfg(feature = "etcd")]
pub use etcd::EtcdRegistry;
pub use lock::DirectoryLock;
pub use memory::MemoryRegistry;
pub use snapshot::Snapshot;
pub use sqlite::SqliteRegistry;

use futures::future::BoxFuture;
use std::path::PathBuf;

/// Proof of leadership: larger than that of any leader before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fence(pub u64);

impl Fence {
    /// Refuses whoever does not hold the current leader's fence. `current` is 0 before anyone led; nobody
    /// holds that.
    fn check(self, current: u64) -> Result<()> {
        if self.0 == current && current > 0 {
            Ok(())
        } else {
            Err(RegistryError::Fenced { held: self.0, current })
        }
    }
}

/// One change of a batch. Keys are paths such as `sweeps/<id>`; values are bytes (JSON records).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write {
    /// Sets a key.
    Put(String, Vec<u8>),
    /// Removes a key, if it is there.
    Delete(String),
}

/// What a registry can answer with.
#[derive(Debug, Clone, thiserror::Error)]
pub enum RegistryError {
    /// Another leader was elected since: the caller must stop acting as one.
    #[error("fenced off: leadership {held} was replaced by {current}")]
    Fenced {
        /// The caller's fence.
        held: u64,
        /// The current leader's.
        current: u64,
    },
    /// Another process works in the data directory.
    #[error("`{}` is in use by {}; stop it or choose another --data-dir", dir.display(), process(*.pid))]
    InUse {
        /// The data directory.
        dir: PathBuf,
        /// The other process, where its lock file says so.
        pid: Option<u32>,
    },
    /// The data was written by a later version of this program.
    #[error("data directory was written by a newer LoraFleet (schema {found} > {known}); upgrade (`{}`)", path.display())]
    Newer {
        /// The file that says so.
        path: PathBuf,
        /// The schema version in the file.
        found: i64,
        /// The latest one that this program knows.
        known: i64,
    },
    /// The file is another program's database.
    #[error("`{}` is another program's database; choose another --data-dir", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
    },
    /// The store cannot be read or written; the message names the file. After a failed commit it is not
    /// known whether the batch will be there when the store is opened again.
    #[error("{0}")]
    Storage(String),
    /// The store answers nobody now, and may later: etcd without a majority, or out of reach. Of a commit that was under way
    /// as with `Storage`.
    #[error("{0}")]
    Unavailable(String),
}

impl RegistryError {
    /// Whether the store refused, so that trying again may be right.
    pub fn is_storage(&self) -> bool {
        matches!(self, Self::Storage(_) | Self::Unavailable(_))
    }
}

/// What to do about a file that cannot be written.
const NOT_WRITABLE: &str = "; see that this user may write there and that the disk is not read-only, or choose another \
    --data-dir";

fn process(pid: Option<u32>) -> String {
    pid.map_or_else(|| "another process".into(), |pid| format!("process {pid}"))
}

/// A registry's result.
pub type Result<T> = std::result::Result<T, RegistryError>;

/// What [`Registry::inline_limit`] says where values are to stay small: every node of etcd holds all of them in memory, and
/// every revision of each until it is compacted.
pub const INLINE_LIMIT: usize = 4 * 1024;

/// Keys and their values, in the keys' byte order.
pub type Entries = Vec<(String, Vec<u8>)>;

/// Fenced durable state.
///
/// A future that is dropped before it is done may or may not have had its effect. Commits that are under way
/// together apply in any order; who needs one awaits each.
pub trait Registry: Send + Sync + 'static {
    /// Becomes the leader; every earlier fence is dead from here on. `holder` is for people's eyes.
    fn lead(&self, holder: &str) -> BoxFuture<'_, Result<Fence>>;
    /// Applies all of a batch or nothing, durably, if `fence` is the current leader's. The writes apply in
    /// order: of two to one key, the later counts.
    fn commit(&self, fence: Fence, batch: Vec<Write>) -> BoxFuture<'_, Result<()>>;
    /// A key's value. Sees every commit that was answered before the call.
    fn get(&self, key: &str) -> BoxFuture<'_, Result<Option<Vec<u8>>>>;
    /// Keys that start with `prefix` and come after `after`, in byte order, at most `limit`, with values. Sees
    /// every commit that was answered before the call.
    fn list(&self, prefix: &str, after: Option<&str>, limit: usize) -> BoxFuture<'_, Result<Entries>>;
    /// Bytes above which something that has a place elsewhere should lie there, with its name in a value here; values may be
    /// longer all the same. `None`: a long value is as good here as anywhere.
    fn inline_limit(&self) -> Option<usize> {
        None
    }
}

/// Tells where the leading coordinator of a fleet serves, and who is of the fleet.
pub trait Leadership: Send + Sync + 'static {
    /// Its address, as `http://host:port`; `None` while nobody leads.
    fn leader(&self) -> BoxFuture<'_, Result<Option<String>>>;
    /// Every agent that is registered, in the order of their ids.
    fn members(&self) -> BoxFuture<'_, Result<Vec<Member>>>;
}

/// An agent that is registered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its id.
    pub id: String,
    /// What it says of itself.
    pub value: Vec<u8>,
}

/// The least key that a listing may begin with. A string's successor in byte order is the string and a zero.
fn lower_bound(prefix: &str, after: Option<&str>) -> String {
    match after {
        Some(after) if after >= prefix => format!("{after}\0"),
        _ => prefix.to_string(),
    }
}
