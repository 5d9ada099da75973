//! Fenced durable state: a key-value store whose every write is one atomic batch, refused unless it comes from
//! the current leader. One trait, [`Registry`]; two implementations here, SQLite (one machine) and an in-memory
//! model; one contract suite runs against both.

use futures::future::BoxFuture;

/// Proof of leadership: larger than that of any leader before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Fence(pub u64);

/// One change of a batch. Keys are paths such as `sweeps/<id>`; values are bytes (JSON records).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write {
    /// Sets a key.
    Put(String, Vec<u8>),
    /// Removes a key, if it is there.
    Delete(String),
}

/// What a registry can answer with.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// Another leader was elected since: the caller must stop acting as one.
    #[error("fenced off: leadership {held} was replaced by {current}")]
    Fenced {
        /// The caller's fence.
        held: u64,
        /// The current leader's.
        current: u64,
    },
    /// The store cannot be read or written.
    #[error("{0}")]
    Storage(String),
}

/// A registry's result.
pub type Result<T> = std::result::Result<T, RegistryError>;

/// Fenced durable state.
pub trait Registry: Send + Sync + 'static {
    /// Becomes the leader; every earlier fence is dead from here on. `holder` is for people's eyes.
    fn lead(&self, holder: &str) -> BoxFuture<'_, Result<Fence>>;
    /// Applies all of a batch or nothing, durably, if `fence` is the current leader's.
    fn commit(&self, fence: Fence, batch: Vec<Write>) -> BoxFuture<'_, Result<()>>;
    /// A key's value.
    fn get(&self, key: &str) -> BoxFuture<'_, Result<Option<Vec<u8>>>>;
    /// Keys that start with `prefix` and come after `after`, in byte order, at most `limit`, with values.
    fn list(
        &self,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> BoxFuture<'_, Result<Vec<(String, Vec<u8>)>>>;
}
