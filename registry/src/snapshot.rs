//! All of a SQLite registry as it lies on the disk, without changing a byte of it: the file and its write-ahead log
//! are copied to a temporary folder and read there.

use crate::sqlite::{schema, storage};
use crate::{Entries, RegistryError, Result};
use rusqlite::Connection;
use std::io::ErrorKind;
use std::path::Path;

/// What SQLite adds to a file's name for what belongs to it.
const SUFFIXES: [&str; 3] = ["", "-wal", "-journal"];

/// A registry's content, and what is wrong with its file.
#[derive(Debug, Default)]
pub struct Snapshot {
    /// The version of its tables.
    pub schema: i64,
    /// Every key and its value, in the keys' byte order.
    pub entries: Entries,
    /// What SQLite's integrity check found, if it is not sound.
    pub problems: Vec<String>,
}

impl Snapshot {
    /// Reads a registry that nobody writes: hold a [`crate::DirectoryLock`]. A file that is damaged is no error;
    /// its `problems` say so.
    ///
    /// # Errors
    /// The file cannot be read, is another program's, or was written by a later version.
    pub fn read(path: &Path) -> Result<Self> {
        let failed = |error: std::io::Error| RegistryError::Storage(format!("`{}`: {error}", path.display()));
        let copies = tempfile::tempdir().map_err(failed)?;
        let copy = copies.path().join("registry.db");
        for suffix in SUFFIXES {
            let with = |path: &Path| {
                let mut name = path.as_os_str().to_os_string();
                name.push(suffix);
                name
            };
            match std::fs::copy(with(path), with(&copy)) {
                Err(error) if suffix.is_empty() || error.kind() != ErrorKind::NotFound => {
                    return Err(failed(error));
                }
                _ => {}
            }
        }
        let mut snapshot = Self::default();
        let connection = Connection::open(&copy).map_err(|error| storage(path, &error))?;
        match snapshot.fill(&connection, path) {
            Ok(()) => Ok(snapshot),
            Err(RegistryError::Storage(what)) => {
                snapshot.problems.push(what);
                Ok(snapshot)
            }
            Err(error) => Err(error),
        }
    }

    fn fill(&mut self, connection: &Connection, path: &Path) -> Result<()> {
        let failed = |error| storage(path, &error);
        self.schema = schema::refuse_foreign(connection, path, schema::known())?;
        let mut check = connection.prepare("PRAGMA integrity_check").map_err(failed)?;
        let lines = check.query_map([], |row| row.get::<_, String>(0)).map_err(failed)?;
        for line in lines {
            self.problems.extend(Some(line.map_err(failed)?).filter(|line| line != "ok"));
        }
        let mut all = connection.prepare("SELECT key, value FROM entries ORDER BY key").map_err(failed)?;
        let entries = all.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).map_err(failed)?;
        for entry in entries {
            self.entries.push(entry.map_err(failed)?);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Registry, SqliteRegistry, Write};

    #[tokio::test]
    async fn what_is_only_in_the_log_is_read_and_nothing_changes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("coordinator.db");
        let registry = SqliteRegistry::open(&path).unwrap();
        let fence = registry.lead("test").await.unwrap();
        let put = |key: &str| Write::Put(key.into(), key.as_bytes().to_vec());
        registry.commit(fence, vec![put("a"), put("b")]).await.unwrap();
        // The registry is still open: its writes are in the log alone.
        let files = || {
            let mut files: Vec<_> = std::fs::read_dir(dir.path())
                .unwrap()
                .map(|entry| entry.unwrap().path())
                .filter(|path| !path.to_string_lossy().ends_with("-shm"))
                .map(|path| (path.clone(), std::fs::read(path).unwrap()))
                .collect();
            files.sort();
            files
        };
        let before = files();
        let snapshot = Snapshot::read(&path).unwrap();
        assert_eq!(files(), before);
        let expected: Entries = [("a", b"a"), ("b", b"b")].map(|(k, v)| (k.to_string(), v.to_vec())).to_vec();
        assert_eq!((snapshot.schema, snapshot.entries), (schema::known(), expected));
        assert!(snapshot.problems.is_empty());
    }

    #[test]
    fn a_file_that_is_no_database_is_a_problem() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("coordinator.db");
        std::fs::write(&path, "x".repeat(10_000)).unwrap();
        let problems = Snapshot::read(&path).unwrap().problems;
        assert!(problems.len() == 1 && problems[0].contains("not a database"), "{problems:?}");
        let missing = Snapshot::read(&dir.path().join("none.db")).unwrap_err().to_string();
        assert!(missing.contains("none.db"), "{missing}");
    }
}
