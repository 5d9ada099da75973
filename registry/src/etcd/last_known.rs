//! Reading the state: how values are found, and what is left of that without a majority.

use super::PAGE;
use super::client::{self, Etcd, Operation, PATIENCE};
use crate::{Entries, Fence, INLINE_LIMIT, Registry, RegistryError, Result, Write, lower_bound};
use etcd_client::{Client, Error, GetOptions, GetResponse, ResponseHeader};
use futures::future::{BoxFuture, FutureExt};
use std::sync::atomic::Ordering::Relaxed;

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

    fn inline_limit(&self) -> Option<usize> {
        Some(INLINE_LIMIT)
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

    /// Asks one node after the other what it knows, until one does that knows all that was ever seen here: one that lags might
    /// tell of a time before.
    pub(super) async fn ask_each(&self, key: &[u8], options: &GetOptions) -> Result<GetResponse> {
        let seen = self.seen.load(Relaxed);
        let mut why = String::new();
        for node in self.nodes.all() {
            let ask = async { read_alone(node.client().await?, key, options).await };
            let problem = match tokio::time::timeout(PATIENCE, ask).await {
                Ok(Ok(answer)) if answer.header().map_or(0, ResponseHeader::revision) >= seen => {
                    self.nodes.answers(&node);
                    return Ok(answer);
                }
                Ok(Ok(_)) => "it has not heard of all that was written".into(),
                Ok(Err(error)) => {
                    Operation::READ.failed(&error);
                    client::explained(&error).0
                }
                Err(_) => {
                    Operation::READ.unanswered();
                    format!("no answer within {} s", PATIENCE.as_secs())
                }
            };
            self.nodes.fails(&node);
            why.push_str(&format!("; {}: {problem}", node.endpoint));
        }
        Err(RegistryError::Unavailable(format!(
            "etcd at {} has no majority or does not answer, and no node says what was last known{why}",
            self.endpoints
        )))
    }

    /// The refusal of a write where only what is known can be read.
    fn reads_only(&self) -> RegistryError {
        let at = &self.endpoints;
        RegistryError::Unavailable(format!(
            "etcd at {at} has no majority or does not answer: nothing is written"
        ))
    }
}

/// What a node knows by itself.
async fn read_alone(
    client: Client,
    key: &[u8],
    options: &GetOptions,
) -> std::result::Result<GetResponse, Error> {
    let mut client = client.kv_client().max_decoding_message_size(64 << 20);
    client.get(key, Some(options.clone().with_serializable())).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::etcd::EtcdOptions;

    /// A node that has not heard of all that was seen here would tell of a time before.
    #[tokio::test]
    async fn a_node_that_lags_does_not_say_what_was_last_known() {
        let dir = tempfile::tempdir().unwrap();
        let Some(node) = ::tests::etcd::Etcd::start(dir.path()) else { return };
        let etcd = Etcd::connect(&EtcdOptions::new(vec![node.endpoint.clone()])).await.unwrap();
        let last_known = etcd.last_known();
        let revision = etcd.seen.load(Relaxed);
        assert!(revision > 0, "an answer has a revision");
        for (seen, want) in [(revision, Ok(0)), (revision + 1, Err("it has not heard of all"))] {
            etcd.seen.store(seen, Relaxed);
            let found = last_known.get("nothing", GetOptions::new()).await.map(|found| found.len());
            let found = found.map_err(|error| error.to_string());
            match want {
                Ok(count) => assert_eq!(found, Ok(count)),
                Err(why) => assert!(found.as_ref().is_err_and(|said| said.contains(why)), "{found:?}"),
            }
        }
    }
}
