//! The registry as a model: a map behind a lock. Nothing outlives the process.

use crate::{Entries, Fence, INLINE_LIMIT, Registry, Result, Write, lower_bound};
use futures::future::{BoxFuture, FutureExt};
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Fenced state in memory, for tests.
#[derive(Debug, Default)]
pub struct MemoryRegistry(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    fence: u64,
    entries: BTreeMap<String, Vec<u8>>,
}

impl MemoryRegistry {
    /// An empty registry without a leader.
    pub fn new() -> Self {
        Self::default()
    }

    /// The state. A poisoned lock is no matter: no method can panic half-way through a change.
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn apply(&self, fence: Fence, batch: Vec<Write>) -> Result<()> {
        let mut state = self.state();
        fence.check(state.fence)?;
        for write in batch {
            match write {
                Write::Put(key, value) => state.entries.insert(key, value),
                Write::Delete(key) => state.entries.remove(&key),
            };
        }
        Ok(())
    }
}

impl Registry for MemoryRegistry {
    fn lead(&self, _holder: &str) -> BoxFuture<'_, Result<Fence>> {
        async {
            let mut state = self.state();
            state.fence += 1;
            Ok(Fence(state.fence))
        }
        .boxed()
    }

    fn commit(&self, fence: Fence, batch: Vec<Write>) -> BoxFuture<'_, Result<()>> {
        async move { self.apply(fence, batch) }.boxed()
    }

    fn get(&self, key: &str) -> BoxFuture<'_, Result<Option<Vec<u8>>>> {
        let key = key.to_string();
        async move { Ok(self.state().entries.get(&key).cloned()) }.boxed()
    }

    fn list(&self, prefix: &str, after: Option<&str>, limit: usize) -> BoxFuture<'_, Result<Entries>> {
        let (from, prefix) = (lower_bound(prefix, after), prefix.to_string());
        async move {
            let state = self.state();
            let entries = state.entries.range(from..).take_while(|(key, _)| key.starts_with(&prefix));
            Ok(entries.take(limit).map(|(key, value)| (key.clone(), value.clone())).collect())
        }
        .boxed()
    }

    /// As in etcd.
    fn inline_limit(&self) -> Option<usize> {
        Some(INLINE_LIMIT)
    }
}
