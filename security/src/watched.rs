//! What files say, read again when they change. There is no thread: whoever asks for the value looks whether its files
//! are still those that were read, at most once in [`INTERVAL`]. What cannot be used is said once and tried again at each
//! look, and the value stays as it was.

use crate::FileError;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock, TryLockError};
use std::time::Duration;
use tokio::time::Instant;

/// The time between two looks at the files: a change holds after it at the latest, as soon as somebody asks.
pub const INTERVAL: Duration = Duration::from_secs(1);

/// What tells one content of a file from another without reading it: device, inode, bytes, and the times of its last
/// change in seconds and nanoseconds. `None`: it is not there.
type Stamp = Option<(u64, u64, u64, [i64; 4])>;

/// A value that files hold.
pub struct Watched<T> {
    paths: Vec<PathBuf>,
    load: Box<dyn Fn() -> Result<T, FileError> + Send + Sync>,
    current: RwLock<Arc<T>>,
    /// Held by the one who looks.
    seen: Mutex<Seen>,
}

/// What the last look found.
struct Seen {
    at: Instant,
    stamps: Vec<Stamp>,
    /// Why what the files say is not in force.
    failure: Option<String>,
}

impl<T> std::fmt::Debug for Watched<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watched").field("paths", &self.paths).finish_non_exhaustive()
    }
}

impl<T> Watched<T> {
    /// Reads the files with `load`.
    ///
    /// # Errors
    /// Those of `load`.
    pub fn open(
        paths: Vec<PathBuf>,
        load: impl Fn() -> Result<T, FileError> + Send + Sync + 'static,
    ) -> Result<Self, FileError> {
        // Before they are read: a change in between is read again.
        let seen = Seen { at: Instant::now(), stamps: stamps(&paths), failure: None };
        let value = load()?;
        Ok(Self {
            paths,
            load: Box::new(load),
            current: RwLock::new(Arc::new(value)),
            seen: Mutex::new(seen),
        })
    }

    /// What the files say now, or said when they could be used last.
    pub fn current(&self) -> Arc<T> {
        match self.seen.try_lock() {
            Ok(mut seen) => self.look(&mut seen),
            // A panic of `load` leaves what was found before it.
            Err(TryLockError::Poisoned(seen)) => self.look(&mut seen.into_inner()),
            // Somebody looks: nobody waits for the disk with them.
            Err(TryLockError::WouldBlock) => {}
        }
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn look(&self, seen: &mut Seen) {
        let now = Instant::now();
        if now.duration_since(seen.at) < INTERVAL {
            return;
        }
        seen.at = now;
        let found = stamps(&self.paths);
        let changed = found != seen.stamps;
        if !changed && seen.failure.is_none() {
            return;
        }
        // A panic of `load` leaves what was seen before it, so that it is tried again.
        let loaded = (self.load)();
        seen.stamps = found;
        match loaded {
            Ok(value) => {
                *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(value);
                seen.failure = None;
                tracing::info!(files = %list(&self.paths), "read again");
            }
            Err(error) => {
                let failure = Some(error.to_string());
                if changed || seen.failure != failure {
                    tracing::error!(%error, "not taken over; what was read before stays in force");
                }
                seen.failure = failure;
            }
        }
    }
}

fn stamps(paths: &[PathBuf]) -> Vec<Stamp> {
    paths.iter().map(|path| stamp(path)).collect()
}

fn stamp(path: &Path) -> Stamp {
    let file = std::fs::metadata(path).ok()?;
    let times = [file.mtime(), file.mtime_nsec(), file.ctime(), file.ctime_nsec()];
    Some((file.dev(), file.ino(), file.len(), times))
}

fn list(paths: &[PathBuf]) -> String {
    paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    fn number(path: &Path) -> Result<u32, FileError> {
        let text = std::fs::read_to_string(path).map_err(|error| FileError::new(path, error))?;
        text.trim().parse().map_err(|_| FileError::new(path, "is no number"))
    }

    #[tokio::test(start_paused = true)]
    async fn a_change_is_seen_and_a_bad_one_is_not_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("number");
        let open = || {
            let file = path.clone();
            Watched::open(vec![path.clone()], move || number(&file))
        };
        assert!(open().unwrap_err().to_string().contains("number: "));
        std::fs::write(&path, "1").unwrap();
        let watched = open().unwrap();
        for (text, want) in
            [(Some("1"), 1), (Some("22"), 22), (Some("x"), 22), (None, 22), (Some("333"), 333)]
        {
            let before = *watched.current();
            match text {
                Some(text) => std::fs::write(&path, text).unwrap(),
                None => std::fs::remove_file(&path).unwrap(),
            }
            assert_eq!(*watched.current(), before, "nobody looks all the time");
            tokio::time::advance(INTERVAL).await;
            assert_eq!(*watched.current(), want, "after {text:?}");
        }
    }

    /// What failed for a reason that no file shows, such as too many open ones, is tried again.
    #[tokio::test(start_paused = true)]
    async fn what_failed_is_tried_again_though_no_file_changes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("number");
        std::fs::write(&path, "1").unwrap();
        let fails = Arc::new(AtomicBool::new(false));
        let (file, failing) = (path.clone(), fails.clone());
        let load = move || match failing.load(Ordering::Relaxed) {
            true => Err(FileError::new(&file, "too many open files")),
            false => number(&file),
        };
        let watched = Watched::open(vec![path.clone()], load).unwrap();
        std::fs::write(&path, "22").unwrap();
        for (failing, want) in [(true, 1), (true, 1), (false, 22)] {
            fails.store(failing, Ordering::Relaxed);
            tokio::time::advance(INTERVAL).await;
            assert_eq!(*watched.current(), want);
        }
    }

    /// Whoever asks while another one reads goes on with what is there.
    #[test]
    fn nobody_waits_for_who_reads() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("number");
        std::fs::write(&path, "1").unwrap();
        let file = path.clone();
        let watched = Watched::open(vec![path], move || number(&file)).unwrap();
        let _reads = watched.seen.lock().unwrap();
        assert_eq!(*watched.current(), 1);
    }
}
