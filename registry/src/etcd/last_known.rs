//! Reading the state: how values are found, and what is left of that without a majority.

use super::PAGE;
use super::client::{self, Etcd};
use crate::{Entries, Fence, Registry, Result, Write, lower_bound};
use etcd_client::GetOptions;
use futures::future::{BoxFuture, FutureExt};

/// The state as it was last known: whatever nodes of etcd can be reached answer by themselves, those that have heard of less than
/// this program alone excepted. It is old as soon as somebody else leads. Of a batch that was so large that it is applied
/// in several transactions, a part may show. Nothing can be written.
///
/// A node that wants a password lets nobody sign in without a majority, so that nothing can be read there then.
#[derive(Debug)]
pub struct LastKnown(pub(super) Etcd);

impl Registry for LastKnown {
    fn lead(&self, _: &str) -> BoxFuture<'_, Result<Fence>> {
        std::future::ready(Err(self.0.reads_only())).boxed()
    }

    fn commit(&self, _: Fence, _: Vec<Write>) -> BoxFuture<'_, Result<()>> {
        std::future::ready(Err(self.0.reads_only())).boxed()
    }

    fn get(&self, key: &str) -> BoxFuture<'_, Result<Option<Vec<u8>>>> {
        let key = key.to_string();
        async move { self.0.read(&key).await }.boxed()
    }

    fn list(&self, prefix: &str, after: Option<&str>, limit: usize) -> BoxFuture<'_, Result<Entries>> {
        let (from, prefix) = (lower_bound(prefix, after), prefix.to_string());
        async move { self.0.list(&prefix, from, limit).await }.boxed()
    }
}

impl Etcd {
    /// A key's value.
    pub(super) async fn read(&self, key: &str) -> Result<Option<Vec<u8>>> {
        let mut found = self.get(self.state(key), GetOptions::new()).await?;
        match found.pop() {
            Some((_, value, revision)) => Ok(Some(self.whole_value(&value, revision).await?)),
            None => Ok(None),
        }
    }

    /// Keys that start with `prefix`, from the key `from` on, at most `limit`, with values.
    pub(super) async fn list(&self, prefix: &str, from: String, limit: usize) -> Result<Entries> {
        let (start, end) = (self.state(""), client::after_all_of(self.state(prefix)));
        let mut next = self.state(&from);
        let mut entries = Entries::new();
        while entries.len() < limit {
            let asked = PAGE.min(limit - entries.len());
            let options = GetOptions::new().with_range(end.clone()).with_limit(asked as i64);
            let page = self.get(next, options).await?;
            let full = page.len() == asked;
            next = page.last().map(|(key, ..)| client::successor(key)).unwrap_or_default();
            for (key, value, revision) in page {
                let value = self.whole_value(&value, revision).await?;
                let key = key.get(start.len()..).unwrap_or_default();
                entries.push((String::from_utf8_lossy(key).into_owned(), value));
            }
            if !full {
                break;
            }
        }
        Ok(entries)
    }
}
