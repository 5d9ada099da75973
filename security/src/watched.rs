//! What files say, read again when they change. There is no thread: whoever asks for the value looks whether its files
//! are still those that were read. A change that cannot be used is said once, and the value stays as it was.

use crate::FileError;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// What tells one content of a file from another without reading it: device, inode, bytes, and the times of its last
/// change in seconds and nanoseconds. `None`: it is not there.
type Stamp = Option<(u64, u64, u64, [i64; 4])>;

/// A value that files hold.
pub struct Watched<T> {
    paths: Vec<PathBuf>,
    load: Box<dyn Fn() -> Result<T, FileError> + Send + Sync>,
    current: Mutex<(Vec<Stamp>, Arc<T>)>,
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
        let stamps = stamps(&paths);
        let value = load()?;
        Ok(Self { paths, load: Box::new(load), current: Mutex::new((stamps, Arc::new(value))) })
    }

    /// What the files say now, or said when they could be used last.
    pub fn current(&self) -> Arc<T> {
        // A value is put in whole, so that a panic of `load` leaves a sound one.
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let found = stamps(&self.paths);
        if found != current.0 {
            current.0 = found;
            match (self.load)() {
                Ok(value) => {
                    current.1 = Arc::new(value);
                    tracing::info!(files = %list(&self.paths), "read again");
                }
                Err(error) => tracing::error!(%error, "not taken over; what was read before stays in force"),
            }
        }
        current.1.clone()
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

    fn number(path: &Path) -> Result<u32, FileError> {
        let text = std::fs::read_to_string(path).map_err(|error| FileError::new(path, error))?;
        text.trim().parse().map_err(|_| FileError::new(path, "is no number"))
    }

    #[test]
    fn a_change_is_seen_and_a_bad_one_is_not_taken_over() {
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
            match text {
                Some(text) => std::fs::write(&path, text).unwrap(),
                None => std::fs::remove_file(&path).unwrap(),
            }
            assert_eq!(*watched.current(), want, "after {text:?}");
        }
    }
}
