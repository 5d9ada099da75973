//! What the coordinator cannot write at the moment, and why: for people, who can make room.

use domain::Clock;
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Time between two tries to write what could not be written.
pub const RETRY: Duration = Duration::from_secs(1);

/// Time after which a failure that did not repeat says nothing any more: whoever retried has gone.
const STALE: Duration = Duration::from_secs(5);

/// The file that [`Trouble::look`] writes.
const PROBE: &str = ".probe";

/// Part of the coordinator's storage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Storage {
    /// Records.
    Registry,
    /// Metric points.
    History,
    /// Checkpoints.
    Artifacts,
    /// Any file: what somebody who asks finds out, while nothing else happens to be written.
    Disk,
}

/// What fails now. Clones share it.
#[derive(Clone)]
pub struct Trouble {
    clock: Arc<dyn Clock>,
    failures: Arc<Mutex<BTreeMap<Storage, (Duration, String)>>>,
}

impl Trouble {
    /// Nothing has failed yet.
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        Self { clock, failures: Arc::default() }
    }

    /// A write failed; it will be tried again.
    pub fn failed(&self, storage: Storage, why: impl ToString) {
        let why = why.to_string();
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        if failures.insert(storage, (self.clock.monotonic(), why.clone())).is_none() {
            tracing::error!(?storage, why, "cannot be written; nothing is acknowledged until it can");
        }
    }

    /// A write succeeded.
    pub fn succeeded(&self, storage: Storage) {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        if failures.remove(&storage).is_some() {
            tracing::warn!(?storage, "can be written again");
        }
    }

    /// [`Trouble::now`]; where nothing fails so far, a file is written to `dir` and removed again. A disk that is full
    /// may keep agents from saying anything, and then nothing else here would be written that could fail.
    pub fn look(&self, dir: &Path) -> Option<String> {
        let file = dir.join(PROBE);
        let written = std::fs::write(&file, [1; 4096]);
        // What part of it was written takes room.
        let removed = std::fs::remove_file(&file);
        let removed = removed.or_else(|error| match error.kind() {
            // Somebody else who asked was quicker.
            ErrorKind::NotFound => Ok(()),
            _ => Err(error),
        });
        match written.and(removed) {
            Ok(()) => self.succeeded(Storage::Disk),
            Err(error) => self.failed(Storage::Disk, format!("{}: {error}", dir.display())),
        }
        self.now()
    }

    /// What fails, if anything does: the operating system's words with the files.
    pub fn now(&self) -> Option<String> {
        let now = self.clock.monotonic();
        let failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        let current = failures.values().filter(|(at, _)| now.saturating_sub(*at) <= STALE);
        let texts: Vec<_> = current.map(|(_, why)| why.as_str()).collect();
        (!texts.is_empty()).then(|| texts.join("; "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use domain::Timestamp;
    use std::sync::atomic::{AtomicU64, Ordering};

    /// Tells the time that it was last given, in milliseconds.
    #[derive(Default)]
    struct Hand(AtomicU64);

    impl Clock for Hand {
        fn now(&self) -> Timestamp {
            Timestamp(self.0.load(Ordering::Relaxed))
        }

        fn monotonic(&self) -> Duration {
            Duration::from_millis(self.0.load(Ordering::Relaxed))
        }
    }

    #[test]
    fn a_look_finds_out_what_nobody_has_tried() {
        let dir = tempfile::tempdir().unwrap();
        let trouble = Trouble::new(Arc::new(Hand::default()));
        assert_eq!(trouble.look(dir.path()), None);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left behind");
        let gone = dir.path().join("gone");
        let why = trouble.look(&gone).unwrap();
        assert!(why.contains("gone: No such file"), "{why}");
        std::fs::create_dir(&gone).unwrap();
        assert_eq!(trouble.look(&gone), None);
    }

    #[test]
    fn a_failure_lasts_until_a_write_succeeds_or_nobody_tries_any_more() {
        let clock = Arc::new(Hand::default());
        let trouble = Trouble::new(clock.clone());
        assert_eq!(trouble.now(), None);
        trouble.failed(Storage::History, "full");
        trouble.failed(Storage::Registry, "broken");
        assert_eq!(trouble.now().as_deref(), Some("broken; full"));
        trouble.succeeded(Storage::Registry);
        assert_eq!(trouble.now().as_deref(), Some("full"));
        clock.0.fetch_add(STALE.as_millis() as u64, Ordering::Relaxed);
        assert!(trouble.now().is_some());
        clock.0.fetch_add(1, Ordering::Relaxed);
        assert_eq!(trouble.now(), None);
    }
}
