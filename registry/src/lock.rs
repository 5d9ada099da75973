//! One process a data directory: an advisory lock on a file in it. The operating system releases it when the
//! process ends, however it ends, so a left-over file means nothing.

use crate::{RegistryError, Result};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Seek, Write};
use std::path::Path;

/// The lock file's name within the directory.
const FILE: &str = "lock";

/// The right to work in a data directory, until dropped.
#[derive(Debug)]
pub struct DirectoryLock {
    /// Open for as long as the lock is held. It holds the process id as decimal text, for the message that
    /// another process shows.
    _file: File,
}

impl DirectoryLock {
    /// Takes the directory, making it if it is not there.
    ///
    /// # Errors
    /// Another process (or another part of this one) has it; or the lock file cannot be made or written.
    pub fn acquire(dir: &Path) -> Result<Self> {
        let path = dir.join(FILE);
        let failed = |error: std::io::Error| {
            let denied = matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem);
            let remedy = if denied { crate::NOT_WRITABLE } else { "" };
            RegistryError::Storage(format!("`{}`: {error}{remedy}", path.display()))
        };
        std::fs::create_dir_all(dir).map_err(failed)?;
        let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
        // On a disk that nobody can write to, the lock still keeps others out; whoever wants to write hears of it
        // from what it writes first.
        let read_only = opened.as_ref().is_err_and(|e| e.kind() == ErrorKind::ReadOnlyFilesystem);
        let mut file = if read_only { File::open(&path) } else { opened }.map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(RegistryError::InUse { dir: dir.to_path_buf(), pid: holder(&mut file) });
            }
            Err(TryLockError::Error(error)) => return Err(failed(error)),
        }
        if !read_only {
            record_holder(&mut file).map_err(failed)?;
        }
        Ok(Self { _file: file })
    }
}

/// The process id in a lock file. Its holder may not have written it yet.
fn holder(file: &mut File) -> Option<u32> {
    let mut text = String::new();
    file.read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

fn record_holder(file: &mut File) -> std::io::Result<()> {
    file.set_len(0)?;
    file.rewind()?;
    writeln!(file, "{}", std::process::id())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_has_one_holder() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("data");
        let held = DirectoryLock::acquire(&dir).unwrap();
        let refusal = DirectoryLock::acquire(&dir).unwrap_err().to_string();
        let (shown, pid) = (dir.display(), std::process::id());
        let expected = format!("`{shown}` is in use by process {pid}; stop it or choose another --data-dir");
        assert_eq!(refusal, expected);
        drop(held);
        drop(DirectoryLock::acquire(&dir).unwrap());
    }

    #[test]
    fn a_file_left_by_a_process_that_died_is_no_lock() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(FILE), "4000000000000\n").unwrap();
        drop(DirectoryLock::acquire(dir.path()).unwrap());
        let left = std::fs::read_to_string(dir.path().join(FILE)).unwrap();
        assert_eq!(left, format!("{}\n", std::process::id()));
    }

    #[test]
    fn a_directory_that_cannot_be_made_is_named() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("file");
        std::fs::write(&file, "").unwrap();
        let error = DirectoryLock::acquire(&file).unwrap_err().to_string();
        assert!(error.contains(&file.display().to_string()), "{error}");
    }
}
