//! The metric points of every trial: append-only segments, durable before anyone is told that a point is kept. Points
//! that are sent again (the same trial, attempt and step) are dropped; the first stays.
//!
//! | file | holds |
//! |---|---|
//! | `mod.rs` | [`History`]: open, append, read a curve |
//! | `segment.rs` | the bytes of a segment: header, frames, what a torn tail is |
//! | `writer.rs` | the group commit: one frame for everything that waits |
//! | `files.rs` | segments in a directory: frames are written behind each other, with an fsync each |
//! | `objects.rs` | segments in an object store: a frame is an object, small ones become larger ones; who may delete which |
//! | `recovery.rs` | reading segments back when the history is opened |
//! | `compaction.rs` | taking the points of deleted sweeps out of files |
//! | `inspect.rs` | the same reading for a look at what lies there, without a change |
//! | `index.rs` | the points in memory, and the rule that makes one curve of several attempts |
//!
//! All points are also held in memory, at some 60 bytes and 8 bytes a value: a trial of 500 steps with 7 metrics
//! takes about 60 kB.

mod compaction;
mod files;
mod index;
mod inspect;
mod objects;
mod recovery;
mod segment;
mod writer;

pub use files::{Disk, RealDisk, SegmentFile};
pub use inspect::{Inspection, inspect};
pub use recovery::Torn;

use crate::error::said;
use crate::store::Store;
use actor::Scope;
use domain::metric::MetricPoint;
use domain::{Attempt, SweepId, TrialId};
use files::Files;
use index::Index;
use object_store::ObjectStore;
use objects::Objects;
use registry::{DirectoryLock, RegistryError};
use segment::Record;
use std::collections::{BTreeSet, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::thread::JoinHandle;
use tokio::sync::{Mutex, mpsc, oneshot};
use writer::{Append, Writer};

/// Why points could not be kept or read.
#[derive(Debug, Clone, thiserror::Error)]
pub enum HistoryError {
    /// A file or object cannot be read or written. Points of a failed append are not kept; send them again.
    #[error("`{}`: {}", path.display(), said(error))]
    Io {
        /// The file, directory or object.
        path: PathBuf,
        /// What the operating system or the object store said.
        error: Arc<std::io::Error>,
    },
    /// It cannot be told whether this coordinator still leads, or it does not; so nothing counts as kept.
    #[error(transparent)]
    Leader(#[from] RegistryError),
    /// Points that had been acknowledged are damaged or missing. Nothing is dropped silently: the file needs
    /// a look, or to be put back from a copy.
    #[error("`{}` is damaged at byte {offset}: {what}; restore the file from a copy", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where in it, in bytes.
        offset: u64,
        /// What is wrong there.
        what: &'static str,
    },
    /// A later version of this program wrote the file.
    #[error("`{}` was written by a newer LoraFleet (format {found} > {known}); upgrade", path.display())]
    Newer {
        /// The file.
        path: PathBuf,
        /// The file's format.
        found: u32,
        /// The latest format that this program knows.
        known: u32,
    },
    /// The writer has stopped.
    #[error("the metric history is closed")]
    Closed,
}

impl HistoryError {
    fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |error| Self::Io { path, error: Arc::new(error) }
    }

    /// Whether storage refused: sending again may be right.
    pub fn is_storage(&self) -> bool {
        match self {
            Self::Io { .. } => true,
            Self::Leader(error) => error.is_storage(),
            _ => false,
        }
    }
}

/// Appends that may wait; whoever comes later waits for room.
const WAITING: usize = 1024;

/// All trials' metric points. Clones share one store; dropping the last waits for what is being written.
#[derive(Debug, Clone)]
pub struct History(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    index: Arc<RwLock<Index>>,
    writing: Writing,
    /// Dropped after all of the above.
    lock: OnceLock<DirectoryLock>,
}

impl Inner {
    fn new(index: Arc<RwLock<Index>>, writing: Writing) -> Self {
        Self { index, writing, lock: OnceLock::new() }
    }
}

/// Who writes.
enum Writing {
    /// A thread or a task of its own, which groups what waits. A thread is waited for.
    Apart(Option<mpsc::Sender<Append>>, Option<JoinHandle<()>>),
    /// Whoever appends.
    Here(Mutex<Writer>),
}

impl std::fmt::Debug for Writing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if matches!(self, Self::Here(_)) { "Here" } else { "Apart" })
    }
}

impl History {
    /// Reads the segments in `dir`, making it if it is not there. A torn tail, the rest of a write that never
    /// was acknowledged, is cut off and logged.
    ///
    /// # Errors
    /// A file cannot be read or is damaged, or one is missing from the middle.
    pub fn open(dir: &Path) -> Result<Self, HistoryError> {
        Self::open_without(dir, &HashSet::new())
    }

    /// The same without the points of `gone` sweeps, which are taken out of the segments too. A segment out of which
    /// they cannot be taken, on a full disk for one, keeps its bytes until the next time.
    ///
    /// # Errors
    /// As [`History::open`]'s.
    pub fn open_without(dir: &Path, gone: &HashSet<SweepId>) -> Result<Self, HistoryError> {
        Self::open_on(dir, Box::new(RealDisk), gone)
    }

    /// The same without a thread: each append is written, by itself, by whoever polls it. For paused time, which would run
    /// on while a thread writes.
    ///
    /// # Errors
    /// As [`History::open`]'s.
    pub fn open_here(dir: &Path, disk: Box<dyn Disk>, gone: &HashSet<SweepId>) -> Result<Self, HistoryError> {
        let (index, writer) = Self::recover(dir, disk, gone)?;
        Ok(Self(Arc::new(Inner::new(index, Writing::Here(Mutex::new(writer))))))
    }

    /// The same in an object store, where no lock keeps a leader that was replaced away: points count as kept once they
    /// are there and `leader` has been seen to lead after that. Removes the points of `gone` sweeps as
    /// [`History::open_without`] does. Writes until `scope` is cancelled.
    ///
    /// # Errors
    /// The store cannot be read, or a segment is damaged.
    pub async fn open_in(
        store: Arc<dyn ObjectStore>,
        leader: Store,
        gone: &HashSet<SweepId>,
        scope: &Scope,
    ) -> Result<Self, HistoryError> {
        let mut index = Index::default();
        let objects = Objects::open(store, leader, gone, |record| index.insert(record)).await?;
        let index = Arc::new(RwLock::new(index));
        let (inbox, appends) = mpsc::channel(WAITING);
        let writer = Writer::new(Box::new(objects), index.clone());
        scope.spawn("history writer", writer.run(appends, scope.clone()));
        Ok(Self(Arc::new(Inner::new(index, Writing::Apart(Some(inbox), None)))))
    }

    /// Refuses a directory of which a later version wrote a part.
    ///
    /// # Errors
    /// It did, or the directory cannot be read. Damage is no error here.
    pub fn refuse_newer(dir: &Path) -> Result<(), HistoryError> {
        recovery::refuse_newer(dir)
    }

    fn open_on(dir: &Path, disk: Box<dyn Disk>, gone: &HashSet<SweepId>) -> Result<Self, HistoryError> {
        let (index, writer) = Self::recover(dir, disk, gone)?;
        let (inbox, appends) = mpsc::channel(WAITING);
        // A thread of its own, because files keep whoever writes them waiting. It ends with the last sender.
        let write = move || futures::executor::block_on(writer.run(appends, Scope::new()));
        let thread = std::thread::Builder::new().name("history-writer".into()).spawn(write);
        let thread = thread.map_err(HistoryError::io(dir))?;
        Ok(Self(Arc::new(Inner::new(index, Writing::Apart(Some(inbox), Some(thread))))))
    }

    /// Reads what is there, and makes what writes behind it.
    fn recover(
        dir: &Path,
        disk: Box<dyn Disk>,
        gone: &HashSet<SweepId>,
    ) -> Result<(Arc<RwLock<Index>>, Writer), HistoryError> {
        std::fs::create_dir_all(dir).map_err(HistoryError::io(dir))?;
        let (mut index, mut with_gone) = (Index::default(), BTreeSet::new());
        let (mut end, torn) =
            recovery::read_all(dir, |segment, record| match compaction::is_of(&record, gone) {
                true => drop(with_gone.insert(segment)),
                false => index.insert(record),
            })?;
        recovery::mend(dir, end, &torn)?;
        for number in with_gone {
            match compaction::compact(dir, number, end.number, gone) {
                Ok(length) if number == end.number => end.length = length,
                Ok(_) => {}
                Err(error) => tracing::warn!(%error, "metrics of deleted sweeps stay for now"),
            }
        }
        let index = Arc::new(RwLock::new(index));
        let writer = Writer::new(Box::new(Files::new(dir, end, disk)), index.clone());
        Ok((index, writer))
    }

    /// Keeps points; durable when it returns. Points of (trial, attempt, step) that are there already are
    /// dropped. If the future is dropped before it is done, the points may or may not be kept.
    ///
    /// # Errors
    /// The disk or the store refused. None of the points counts as kept; sending them again is right.
    pub async fn append(
        &self,
        trial: &TrialId,
        attempt: Attempt,
        points: Vec<MetricPoint>,
    ) -> Result<(), HistoryError> {
        let record = Record { trial: trial.clone(), attempt, points };
        let inbox = match &self.0.writing {
            Writing::Here(writer) => return writer.lock().await.keep(vec![record]).await,
            Writing::Apart(inbox, _) => inbox.as_ref().ok_or(HistoryError::Closed)?,
        };
        let (reply, answer) = oneshot::channel();
        inbox.send(Append { record, reply }).await.map_err(|_| HistoryError::Closed)?;
        answer.await.map_err(|_| HistoryError::Closed)?
    }

    /// How many different sets of metrics the points of an attempt have, these included.
    pub fn kinds(&self, trial: &TrialId, attempt: Attempt, points: &[MetricPoint]) -> usize {
        self.0.index.read().unwrap_or_else(PoisonError::into_inner).kinds(trial, attempt, points)
    }

    /// Holds the directory until the last clone is gone and what it was told is written: whatever writes to the directory for a
    /// coordinator, checkpoints too, has one. Of two locks the first stays.
    pub fn hold(&self, lock: DirectoryLock) {
        drop(self.0.lock.set(lock));
    }

    /// The points that are in memory, for reading alone.
    pub fn for_reading(&self) -> Self {
        Self(Arc::new(Inner::new(Arc::clone(&self.0.index), Writing::Apart(None, None))))
    }

    /// Drops the points of sweeps from memory. The segments keep their bytes until the history is opened again.
    pub fn forget(&self, gone: impl Fn(&SweepId) -> bool) {
        self.0.index.write().unwrap_or_else(PoisonError::into_inner).forget(gone);
    }

    /// The newest attempt of a trial that there are points of.
    pub fn newest_attempt(&self, trial: &TrialId) -> Option<Attempt> {
        self.0.index.read().unwrap_or_else(PoisonError::into_inner).newest_attempt(trial)
    }

    /// The trial's curve: gap-free, one point a step, in the order of steps. `attempts` are the trial's
    /// attempts, each with the step it started from. A point of an attempt counts from its start step up to
    /// the start step of every later attempt, both included; of two points at one step, the later attempt's.
    ///
    /// # Errors
    /// None today: the points are in memory.
    pub async fn curve(
        &self,
        trial: &TrialId,
        attempts: &[(Attempt, u64)],
    ) -> Result<Vec<MetricPoint>, HistoryError> {
        Ok(self.0.index.read().unwrap_or_else(PoisonError::into_inner).curve(trial, attempts))
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let Writing::Apart(inbox, thread) = &mut self.writing else { return };
        *inbox = None;
        if let Some(thread) = thread.take() {
            // A panic was reported by the thread itself; whoever asked was told that it stopped.
            let _ = thread.join();
        }
    }
}
