//! The metric points of every trial: append-only segment files, fsynced before anyone is told that a point is
//! kept. Points that are sent again (the same trial, attempt and step) are dropped; the first stays.
//!
//! | file | holds |
//! |---|---|
//! | `mod.rs` | [`History`]: open, append, read a curve |
//! | `segment.rs` | the bytes of a segment: header, frames, what a torn tail is |
//! | `recovery.rs` | reading them all back when the history is opened |
//! | `compaction.rs` | taking the points of deleted sweeps out of them |
//! | `writer.rs` | the group commit: one thread, one frame and one fsync for everything that waits |
//! | `inspect.rs` | the same reading for a look at what lies there, without a change |
//! | `index.rs` | the points in memory, and the rule that makes one curve of several attempts |
//!
//! All points are also held in memory, at some 60 bytes and 8 bytes a value: a trial of 500 steps with 7 metrics
//! takes about 60 kB.

mod compaction;
mod index;
mod inspect;
mod recovery;
mod segment;
mod writer;

pub use inspect::{Inspection, inspect};
pub use recovery::Torn;
pub use writer::{Disk, RealDisk, SegmentFile};

use domain::metric::MetricPoint;
use domain::{Attempt, SweepId, TrialId};
use index::Index;
use segment::Record;
use std::collections::{BTreeSet, HashSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread::JoinHandle;
use tokio::sync::{mpsc, oneshot};

/// Why points could not be kept or read.
#[derive(Debug, Clone, thiserror::Error)]
pub enum HistoryError {
    /// A file cannot be read or written. Points of a failed append are not kept; send them again.
    #[error("`{}`: {error}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the operating system said.
        error: Arc<std::io::Error>,
    },
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
    /// The writing thread has stopped.
    #[error("the metric history is closed")]
    Closed,
}

impl HistoryError {
    fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_path_buf();
        move |error| Self::Io { path, error: Arc::new(error) }
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
}

/// Who writes.
enum Writing {
    /// A thread of its own, which groups what waits.
    Thread(Option<mpsc::Sender<writer::Append>>, Option<JoinHandle<()>>),
    /// Whoever appends.
    Here(Mutex<writer::Writer>),
}

impl std::fmt::Debug for Writing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if matches!(self, Self::Here(_)) { "Here" } else { "Thread" })
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
        Ok(Self(Arc::new(Inner { index, writing: Writing::Here(Mutex::new(writer)) })))
    }

    /// Refuses a directory of which a later version wrote a part.
    ///
    /// # Errors
    /// It did, or the directory cannot be read. Damage is no error here.
    pub fn refuse_newer(dir: &Path) -> Result<(), HistoryError> {
        recovery::refuse_newer(dir)
    }

    fn open_on(dir: &Path, disk: Box<dyn Disk>, gone: &HashSet<SweepId>) -> Result<Self, HistoryError> {
        let (index, mut writer) = Self::recover(dir, disk, gone)?;
        let (inbox, appends) = mpsc::channel(WAITING);
        let thread =
            std::thread::Builder::new().name("history-writer".into()).spawn(move || writer.run(appends));
        let thread = thread.map_err(HistoryError::io(dir))?;
        Ok(Self(Arc::new(Inner { index, writing: Writing::Thread(Some(inbox), Some(thread)) })))
    }

    /// Reads what is there, and makes what writes behind it.
    fn recover(
        dir: &Path,
        disk: Box<dyn Disk>,
        gone: &HashSet<SweepId>,
    ) -> Result<(Arc<RwLock<Index>>, writer::Writer), HistoryError> {
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
        let writer = writer::Writer::new(dir, end, disk, index.clone());
        Ok((index, writer))
    }

    /// Keeps points; durable when it returns. Points of (trial, attempt, step) that are there already are
    /// dropped. If the future is dropped before it is done, the points may or may not be kept.
    ///
    /// # Errors
    /// The disk refused. None of the points counts as kept; sending them again is right.
    pub async fn append(
        &self,
        trial: &TrialId,
        attempt: Attempt,
        points: Vec<MetricPoint>,
    ) -> Result<(), HistoryError> {
        let record = Record { trial: trial.clone(), attempt, points };
        let inbox = match &self.0.writing {
            Writing::Here(writer) => {
                return writer.lock().unwrap_or_else(PoisonError::into_inner).keep(vec![record]);
            }
            Writing::Thread(inbox, _) => inbox.as_ref().ok_or(HistoryError::Closed)?,
        };
        let (reply, answer) = oneshot::channel();
        inbox.send(writer::Append { record, reply }).await.map_err(|_| HistoryError::Closed)?;
        answer.await.map_err(|_| HistoryError::Closed)?
    }

    /// Drops the points of sweeps from memory. The segments keep their bytes until [`History::open_without`].
    pub fn forget(&self, gone: impl Fn(&SweepId) -> bool) {
        self.0.index.write().unwrap_or_else(PoisonError::into_inner).forget(gone);
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
        let Writing::Thread(inbox, thread) = &mut self.writing else { return };
        *inbox = None;
        if let Some(thread) = thread.take() {
            // A panic was reported by the thread itself; whoever asked was told that it stopped.
            let _ = thread.join();
        }
    }
}
