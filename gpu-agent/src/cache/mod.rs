//! Uploaded data on this machine's disk: fetched once, checked, shared by the trials that name it, and removed when others
//! need the room. What bases become in 4 bits lies beside it, within the same limit ([`quantised`]).
//!
//! | path in the cache | holds |
//! |---|---|
//! | `<tree>/data/<name>` | a file of a tree |
//! | `<tree>/part-<hash>` | a file as far as it came |
//! | `<tree>/tree` | the tree's text, written last; its time is that of the last use |
//! | `<tree>.gone-<n>` | what is being removed |
//!
//! A trial's [`Pinned`] keeps what it reads from being removed. What is whole is compared with its hashes at its first
//! use after a start, and when a file's length or time is another than it was then. What trials will need is fetched ahead
//! while no trial waits for its data ([`Cache::fetch_ahead`]).

mod ahead;
mod disk;
pub mod quantised;

pub use ahead::Ahead;

use crate::transfer::{TransferError, io};
use bytes::Bytes;
use disk::Stamp;
use domain::data::{ContentHash, Reference, Tree, TreeFile};
use domain::trial::{Failure, FailureClass};
use domain::{Clock, Timestamp};
use futures::StreamExt;
use futures::stream::BoxStream;
use sha2::Digest;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::io::AsyncWriteExt;

/// Bytes that are kept at most unless something else is said.
pub const DEFAULT_LIMIT: u64 = 50_000_000_000;

/// Why data is not on this machine.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// Nobody uploaded it, or it was removed since.
    #[error("{0} is not among the uploaded data any more; submit the sweep again")]
    Unknown(Reference),
    /// It is a directory, or a file of another name.
    #[error("{0} is no file of that name; name it as `lorafleet submit` does")]
    Kind(Reference),
    /// It will never fit.
    #[error(
        "{reference} and what its trial needs beside it have {bytes} bytes, and this agent's cache {limit}; give the agent \
         a larger --cache-limit"
    )]
    TooLarge {
        /// The data.
        reference: Reference,
        /// Its bytes, and those of what else the trial needs.
        bytes: u64,
        /// The cache's.
        limit: u64,
    },
    /// All of the cache is in use by trials.
    #[error("no room for {bytes} bytes: other trials use what is in the cache, of {limit} bytes at most")]
    Full {
        /// The bytes that are wanted.
        bytes: u64,
        /// The cache's.
        limit: u64,
    },
    /// It could not be fetched or written now.
    #[error(transparent)]
    Transfer(TransferError),
}

impl CacheError {
    /// The same of a trial that holds so many bytes of the cache itself: what it makes no room for will never be there.
    pub fn beside(self, reference: &Reference, own: u64) -> Self {
        match self {
            Self::Full { bytes, limit } if own.saturating_add(bytes) > limit => {
                Self::TooLarge { reference: reference.clone(), bytes: own.saturating_add(bytes), limit }
            }
            error => error,
        }
    }

    /// The failure of a trial for which trying again is of no use; `None` if it is.
    pub fn failure(&self) -> Option<Failure> {
        let class = match self {
            Self::Unknown(_) | Self::Kind(_) => FailureClass::User,
            // Another agent may have a larger one, or another coordinator.
            Self::TooLarge { .. } | Self::Transfer(TransferError::Refused(_) | TransferError::Io { .. }) => {
                FailureClass::Infrastructure
            }
            Self::Full { .. } | Self::Transfer(_) => return None,
        };
        Some(Failure { class, message: self.to_string() })
    }
}

/// Where data comes from.
pub trait Source {
    /// The files of a tree; `None` if there is none of that id.
    fn tree(&self, id: ContentHash) -> impl Future<Output = Result<Option<Tree>, TransferError>> + Send;
    /// A file's bytes from an offset on.
    fn file(
        &self,
        file: ContentHash,
        offset: u64,
    ) -> impl Future<Output = Result<BoxStream<'static, Result<Bytes, TransferError>>, TransferError>> + Send;
}

/// The cache of an agent. Clones share it.
#[derive(Clone)]
pub struct Cache {
    root: PathBuf,
    limit: u64,
    clock: Arc<dyn Clock>,
    state: Arc<Mutex<State>>,
    turns: Arc<ahead::Turns>,
}

#[derive(Default)]
struct State {
    entries: BTreeMap<ContentHash, Entry>,
    /// Directories removed so far: each gets a name of its own.
    gone: u64,
    /// The number of the last draft of a base in 4 bits.
    drafts: u64,
    /// Whether it was said that there is no room for bases in 4 bits.
    told_of_no_room: bool,
}

#[derive(Default)]
struct Entry {
    /// Bytes that it has, or will have.
    bytes: u64,
    pins: usize,
    /// What an engine was told to write, if it is a base in 4 bits that is not whole.
    draft: Option<quantised::Draft>,
    used: Timestamp,
    /// Held while it is looked at or fetched; with it, what its files looked like when they were right.
    turn: Turn,
}

/// Whose turn it is with a tree, and what its files looked like when they were right.
type Turn = Arc<tokio::sync::Mutex<Option<Vec<Stamp>>>>;

impl Entry {
    fn is_in_use(&self) -> bool {
        self.pins > 0 || self.draft.is_some()
    }
}

/// Data that lies on this machine for as long as this lives.
pub struct Pinned {
    cache: Cache,
    tree: ContentHash,
    /// The file or directory.
    pub path: PathBuf,
}

impl Pinned {
    /// Bytes of the cache that it takes.
    pub fn bytes(&self) -> u64 {
        self.cache.state().entries.get(&self.tree).map_or(0, |entry| entry.bytes)
    }

    /// What it is a part of, or all of.
    pub fn tree(&self) -> ContentHash {
        self.tree
    }
}

impl std::fmt::Debug for Pinned {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pinned").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let now = self.cache.clock.now();
        if let Some(entry) = self.cache.state().entries.get_mut(&self.tree) {
            entry.pins = entry.pins.saturating_sub(1);
            entry.used = now;
        }
    }
}

impl Cache {
    /// The cache in a directory, as the last agent left it, brought down to `limit` bytes.
    ///
    /// # Errors
    /// The directory cannot be made or read.
    pub fn open(root: &Path, limit: u64, clock: Arc<dyn Clock>) -> std::io::Result<Self> {
        let entry = |(tree, bytes, used)| (tree, Entry { bytes, used, ..Entry::default() });
        let entries = disk::entries(root)?.into_iter().map(entry).collect();
        // An engine that outlives its agent for a moment may still write to a draft of that time.
        let drafts = clock.now().0;
        let state = Arc::new(Mutex::new(State { entries, drafts, ..State::default() }));
        let cache = Self { root: root.into(), limit, clock, state, turns: Arc::default() };
        // Nothing is in use yet, so that what is over the limit can go.
        cache.evict(None).0.iter().for_each(|gone| disk::remove(gone));
        Ok(cache)
    }

    /// Brings data to this machine, unless it is here; what others fetch at the moment is waited for.
    ///
    /// # Errors
    /// See [`CacheError`]. What came stays, and the next call goes on behind it.
    pub async fn get(&self, source: &impl Source, reference: &Reference) -> Result<Pinned, CacheError> {
        let _first = self.turns.first(reference.tree);
        let (pinned, turn) = self.pin(reference);
        let right = turn.lock().await;
        self.bring(source, reference, right, None).await?;
        Ok(pinned)
    }

    /// Sees to it that a tree is whole, by whose turn it is. What is fetched ahead spares what is named.
    async fn bring(
        &self,
        source: &impl Source,
        reference: &Reference,
        mut right: tokio::sync::MutexGuard<'_, Option<Vec<Stamp>>>,
        spared: Option<&BTreeSet<ContentHash>>,
    ) -> Result<(), CacheError> {
        let dir = self.root.join(reference.tree.to_string());
        let (looked_at, id, known) = (dir.clone(), reference.tree, right.take());
        let whole = blocking(&dir, move || disk::whole(&looked_at, Some(id), known.as_deref())).await?;
        let (tree, stamps) = match whole {
            Some(whole) => whole,
            None => self.fetch(source, reference, &dir, spared).await?,
        };
        if !reference.fits(&tree) {
            return Err(CacheError::Kind(reference.clone()));
        }
        *right = Some(stamps);
        let now = self.clock.now();
        blocking(&dir, {
            let dir = dir.clone();
            move || {
                disk::touch(&dir, now);
                Ok(())
            }
        })
        .await
    }

    /// Keeps a tree from being removed; with it, the lock of whose turn it is to look at it or to fetch it.
    fn pin(&self, reference: &Reference) -> (Pinned, Turn) {
        let mut state = self.state();
        let entry = state.entries.entry(reference.tree).or_default();
        entry.pins += 1;
        let path = reference.within(&self.root.join(reference.tree.to_string()).join(disk::DATA));
        (Pinned { cache: self.clone(), tree: reference.tree, path }, entry.turn.clone())
    }

    /// Fetches what is missing of a tree.
    async fn fetch(
        &self,
        source: &impl Source,
        reference: &Reference,
        dir: &Path,
        spared: Option<&BTreeSet<ContentHash>>,
    ) -> Result<(Tree, Vec<Stamp>), CacheError> {
        let tree = source.tree(reference.tree).await.map_err(CacheError::Transfer)?;
        let tree = tree.ok_or_else(|| CacheError::Unknown(reference.clone()))?;
        if tree.id() != reference.tree {
            return Err(later(format!("{reference}: the coordinator listed other files than its hash says")));
        }
        if !reference.fits(&tree) {
            return Err(CacheError::Kind(reference.clone()));
        }
        self.make_room(reference, tree.bytes(), spared).await?;
        tracing::info!(data = %reference, bytes = tree.bytes(), "fetching uploaded data");
        let data = dir.join(disk::DATA);
        tokio::fs::create_dir_all(&data).await.map_err(|error| CacheError::Transfer(io(&data)(error)))?;
        for file in tree.files() {
            self.fetch_file(source, dir, file).await?;
        }
        let (of, whole) = (dir.to_path_buf(), tree.clone());
        let stamps = blocking(dir, move || disk::publish(&of, &whole)).await?;
        Ok((tree, stamps))
    }

    async fn fetch_file(&self, source: &impl Source, dir: &Path, file: &TreeFile) -> Result<(), CacheError> {
        let (of, wanted) = (dir.to_path_buf(), file.clone());
        let Some(begun) = blocking(dir, move || disk::begin(&of, &wanted)).await? else { return Ok(()) };
        let disk::Part { path, mut digest, mut bytes } = begun;
        let at = |error| CacheError::Transfer(io(&path)(error));
        let mut part =
            tokio::fs::OpenOptions::new().create(true).append(true).open(&path).await.map_err(at)?;
        let received = async {
            if bytes == file.bytes {
                return Ok(());
            }
            let mut pieces = source.file(file.sha256, bytes).await?;
            while bytes < file.bytes {
                let Some(piece) = pieces.next().await else {
                    return Err(TransferError::Later(format!("{}: cut off at byte {bytes}", file.name)));
                };
                let piece = piece?;
                digest.update(&piece);
                bytes += piece.len() as u64;
                part.write_all(&piece).await.map_err(io(&path))?;
            }
            Ok(())
        };
        let received = received.await;
        // What came stays, whatever came after it.
        part.flush().await.map_err(at)?;
        received.map_err(CacheError::Transfer)?;
        drop(part);
        let found = ContentHash(digest.finalize().into());
        let (of, wanted) = (dir.to_path_buf(), file.clone());
        match bytes == file.bytes && found == file.sha256 {
            true => blocking(dir, move || disk::accept(&of, &wanted)).await,
            false => {
                tokio::fs::remove_file(&path).await.map_err(at)?;
                Err(refused(format!("{}: other bytes came than its SHA-256 says", file.name)))
            }
        }
    }

    /// Sees to it that so many bytes of a tree fit, by removing what was not used for longest.
    async fn make_room(
        &self,
        reference: &Reference,
        bytes: u64,
        spared: Option<&BTreeSet<ContentHash>>,
    ) -> Result<(), CacheError> {
        let limit = self.limit;
        if bytes > limit {
            return Err(CacheError::TooLarge { reference: reference.clone(), bytes, limit });
        }
        let wanted = (reference.tree, bytes);
        let (gone, fits) = match spared {
            Some(spared) => self.evict_sparing(spared, wanted),
            None => match self.evict(Some(wanted)) {
                (mut gone, false) => {
                    // What is fetched ahead gives way, and holds nothing then.
                    self.turns.quiet().await;
                    let (more, fits) = self.evict(Some(wanted));
                    gone.extend(more);
                    (gone, fits)
                }
                evicted => evicted,
            },
        };
        blocking(&self.root, move || {
            gone.iter().for_each(|gone| disk::remove(gone));
            Ok(())
        })
        .await?;
        if fits { Ok(()) } else { Err(CacheError::Full { bytes, limit }) }
    }

    /// Takes out of the cache what is over the limit, least recently used first and nothing that is pinned. With `wanted`, a
    /// tree gets so many bytes. Answers with where what was taken out lies now, and whether all is within the limit.
    fn evict(&self, wanted: Option<(ContentHash, u64)>) -> (Vec<PathBuf>, bool) {
        self.evict_from(&mut self.state(), &BTreeSet::new(), wanted)
    }

    fn evict_from(
        &self,
        state: &mut State,
        spared: &BTreeSet<ContentHash>,
        wanted: Option<(ContentHash, u64)>,
    ) -> (Vec<PathBuf>, bool) {
        self.settle_drafts(state);
        let of_wanted = wanted.map_or(0, |(_, bytes)| bytes);
        let others = |state: &State| {
            let others = state.entries.iter().filter(|(tree, _)| wanted.is_none_or(|(id, _)| id != **tree));
            others.map(|(_, entry)| entry.bytes).fold(0, u64::saturating_add)
        };
        let mut gone = Vec::new();
        while others(state).saturating_add(of_wanted) > self.limit {
            let can_go = |(tree, entry): &(&ContentHash, &Entry)| {
                !entry.is_in_use() && entry.bytes > 0 && !spared.contains(tree)
            };
            let unused = state.entries.iter().filter(can_go);
            let Some(tree) = unused.min_by_key(|(_, entry)| entry.used).map(|(tree, _)| *tree) else {
                return (gone, false);
            };
            state.entries.remove(&tree);
            state.gone += 1;
            // Renamed while nobody else can look, so that nobody finds half of it.
            let (from, to) = (self.root.join(tree.to_string()), disk::gone(&self.root, tree, state.gone));
            match std::fs::rename(&from, &to) {
                Ok(()) => gone.push(to),
                Err(error) => tracing::warn!(path = %from.display(), %error, "cached data cannot be removed"),
            }
            tracing::info!(%tree, "removed from the cache to make room");
        }
        if let Some((tree, bytes)) = wanted {
            state.entries.entry(tree).or_default().bytes = bytes;
        }
        (gone, true)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing that can panic is done while it is held.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn later(why: String) -> CacheError {
    CacheError::Transfer(TransferError::Later(why))
}

fn refused(why: String) -> CacheError {
    CacheError::Transfer(TransferError::Refused(why))
}

/// Does work on the disk where waiting for it keeps nobody.
async fn blocking<T: Send + 'static>(
    path: &Path,
    work: impl FnOnce() -> std::io::Result<T> + Send + 'static,
) -> Result<T, CacheError> {
    let done =
        tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(std::io::Error::other(error)));
    done.map_err(|error| CacheError::Transfer(io(path)(error)))
}

#[cfg(test)]
mod tests;
