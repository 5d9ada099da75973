//! Uploaded data that is fetched before its trial is here.
//!
//! A trial's own fetch goes first: what is fetched ahead then ends with the piece that it is at, and keeps what came, unless
//! the trial wants just that, and waits for it. It removes nothing that trials use or that is wanted too, and where there is
//! no room beside that, it is not fetched.

use super::{Cache, CacheError, Source};
use crate::transfer::TransferError;
use bytes::Bytes;
use domain::data::{ContentHash, Reference, Tree};
use futures::StreamExt;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use tokio::sync::watch;

/// How a fetch ahead went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ahead {
    /// It is here, or a trial sees to it.
    Here,
    /// It gave way to a trial's fetch.
    GaveWay,
}

/// Who fetches.
#[derive(Default)]
pub(super) struct Turns {
    /// What trials fetch or look at, and how many of them.
    first: watch::Sender<BTreeMap<ContentHash, usize>>,
    /// Held by what is fetched ahead.
    ahead: tokio::sync::Mutex<()>,
}

/// A trial's fetch, as long as this lives.
pub(super) struct First {
    turns: Arc<Turns>,
    tree: ContentHash,
}

impl Drop for First {
    fn drop(&mut self) {
        self.turns.first.send_modify(|first| {
            let left = first.get(&self.tree).map_or(0, |trials| trials.saturating_sub(1));
            match left {
                0 => first.remove(&self.tree),
                left => first.insert(self.tree, left),
            };
        });
    }
}

impl Turns {
    /// A trial fetches a tree.
    pub(super) fn first(self: &Arc<Self>, tree: ContentHash) -> First {
        self.first.send_modify(|first| *first.entry(tree).or_default() += 1);
        First { turns: self.clone(), tree }
    }

    /// Ends when what is fetched ahead has ended or given way.
    pub(super) async fn quiet(&self) {
        drop(self.ahead.lock().await);
    }

    /// Ends when a trial fetches something else, which it notes.
    fn disturbed(&self, tree: ContentHash, gave_way: Arc<AtomicBool>) -> BoxFuture<'static, ()> {
        let mut first = self.first.subscribe();
        Box::pin(async move {
            // Without a cache there is nothing to go on with.
            let _ = first.wait_for(|first| first.keys().any(|other| *other != tree)).await;
            gave_way.store(true, Ordering::Relaxed);
        })
    }
}

/// A source that gives out when a trial fetches something else.
struct Yielding<'a, S> {
    source: &'a S,
    turns: &'a Turns,
    tree: ContentHash,
    gave_way: Arc<AtomicBool>,
}

impl<S> Yielding<'_, S> {
    fn disturbed(&self) -> BoxFuture<'static, ()> {
        self.turns.disturbed(self.tree, self.gave_way.clone())
    }
}

fn gives_way() -> TransferError {
    TransferError::Later("a trial fetches its data".into())
}

impl<S: Source + Sync> Source for Yielding<'_, S> {
    async fn tree(&self, id: ContentHash) -> Result<Option<Tree>, TransferError> {
        tokio::select! {
            biased;
            () = self.disturbed() => Err(gives_way()),
            tree = self.source.tree(id) => tree,
        }
    }

    async fn file(
        &self,
        file: ContentHash,
        offset: u64,
    ) -> Result<BoxStream<'static, Result<Bytes, TransferError>>, TransferError> {
        let pieces = tokio::select! {
            biased;
            () = self.disturbed() => return Err(gives_way()),
            pieces = self.source.file(file, offset) => pieces?,
        };
        Ok(pieces.take_until(self.disturbed()).boxed())
    }
}

impl Cache {
    /// Brings data to this machine that a trial will need; `wanted` is all that is to be fetched ahead, and stays. One at a
    /// time.
    ///
    /// # Errors
    /// See [`CacheError`]. What came stays as long as there is room.
    pub async fn fetch_ahead(
        &self,
        source: &(impl Source + Sync),
        reference: &Reference,
        wanted: &BTreeSet<ContentHash>,
    ) -> Result<Ahead, CacheError> {
        let _one = self.turns.ahead.lock().await;
        let (_pinned, turn) = self.pin(reference);
        let Ok(right) = turn.try_lock() else { return Ok(Ahead::Here) };
        let (turns, gave_way) = (&*self.turns, Arc::default());
        let source = Yielding { source, turns, tree: reference.tree, gave_way };
        match self.bring(&source, reference, right, Some(wanted)).await {
            Ok(()) => Ok(Ahead::Here),
            Err(_) if source.gave_way.load(Ordering::Relaxed) => Ok(Ahead::GaveWay),
            Err(error) => Err(error),
        }
    }

    /// Ends when no trial fetches anything.
    pub async fn until_quiet(&self) {
        let _ = self.turns.first.subscribe().wait_for(BTreeMap::is_empty).await;
    }

    /// [`Cache::evict`] for what is fetched ahead: nothing is removed that is used or spared, nor unless that is enough.
    pub(super) fn evict_sparing(
        &self,
        spared: &BTreeSet<ContentHash>,
        (tree, bytes): (ContentHash, u64),
    ) -> (Vec<PathBuf>, bool) {
        let mut state = self.state();
        self.settle_drafts(&mut state);
        let others = state.entries.iter().filter(|(other, _)| **other != tree);
        let stays = others.filter(|(other, entry)| entry.is_in_use() || spared.contains(other));
        let stays = stays.map(|(_, entry)| entry.bytes).fold(bytes, u64::saturating_add);
        match stays > self.limit {
            true => (Vec::new(), false),
            false => self.evict_from(&mut state, spared, Some((tree, bytes))),
        }
    }
}
