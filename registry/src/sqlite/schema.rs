//! Opening the file; its tables and their versions.

use super::storage;
use crate::{RegistryError, Result};
use rusqlite::{Connection, OpenFlags};
use std::path::Path;
use std::time::Duration;

/// What takes the tables from version `index` to `index + 1`. A released entry is never edited; a change is a
/// new one at the end. The version is the file's `user_version`.
const MIGRATIONS: &[&str] = &["
    CREATE TABLE entries (key TEXT PRIMARY KEY NOT NULL, value BLOB NOT NULL) STRICT;
    CREATE TABLE leadership (id INTEGER PRIMARY KEY CHECK (id = 1), fence INTEGER NOT NULL, holder TEXT NOT NULL) STRICT;
    INSERT INTO leadership VALUES (1, 0, '');
"];

/// Marks the file as ours (SQLite's `application_id`): "LoRa" in ASCII.
const APPLICATION: i64 = 0x4C6F_5261;

/// How long to wait for another connection's lock, such as that of someone who looks with `sqlite3`.
const BUSY: Duration = Duration::from_secs(10);

/// Opens the writing connection and brings the tables up to date.
pub(super) fn open_writer(path: &Path) -> Result<Connection> {
    let failed = |error| storage(path, &error);
    let mut connection = Connection::open(path).map_err(failed)?;
    connection.busy_timeout(BUSY).map_err(failed)?;
    refuse_foreign(&connection, path)?;
    let mode: String =
        connection.pragma_update_and_check(None, "journal_mode", "WAL", |row| row.get(0)).map_err(failed)?;
    if mode != "wal" {
        let why = "its file system cannot hold a write-ahead log; choose a data directory on a local disk";
        return Err(RegistryError::Storage(format!("`{}`: {why}", path.display())));
    }
    connection.pragma_update(None, "synchronous", "FULL").map_err(failed)?;
    migrate(&mut connection).map_err(failed)?;
    Ok(connection)
}

/// Opens the reading connection of a file that [`open_writer`] has opened.
pub(super) fn open_reader(path: &Path) -> Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags).map_err(|error| storage(path, &error))?;
    connection.busy_timeout(BUSY).map_err(|error| storage(path, &error))?;
    Ok(connection)
}

/// Refuses a file that a later version wrote, or that is some other program's, before anything changes in it.
fn refuse_foreign(connection: &Connection, path: &Path) -> Result<()> {
    let number =
        |sql| connection.query_row(sql, [], |row| row.get::<_, i64>(0)).map_err(|e| storage(path, &e));
    let empty = number("SELECT count(*) FROM sqlite_schema")? == 0;
    if !empty && number("PRAGMA application_id")? != APPLICATION {
        let why = "is another program's database; choose another --data-dir";
        return Err(RegistryError::Storage(format!("`{}` {why}", path.display())));
    }
    let (found, known) = (number("PRAGMA user_version")?, MIGRATIONS.len() as i64);
    if found > known {
        return Err(RegistryError::Newer { path: path.to_path_buf(), found, known });
    }
    Ok(())
}

/// Runs what is missing, each step in a transaction of its own.
fn migrate(connection: &mut Connection) -> rusqlite::Result<()> {
    let found: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    let done = usize::try_from(found).unwrap_or(0);
    for (index, sql) in MIGRATIONS.iter().enumerate().skip(done) {
        let transaction = connection.transaction()?;
        transaction.execute_batch(sql)?;
        transaction.pragma_update(None, "application_id", APPLICATION)?;
        transaction.pragma_update(None, "user_version", index as i64 + 1)?;
        transaction.commit()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Opens a file that `prepare` was run on, and expects a refusal that says `expected`.
    fn check(prepare: &str, expected: &str) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("registry.db");
        Connection::open(&path).unwrap().execute_batch(prepare).unwrap();
        let error = open_writer(&path).unwrap_err().to_string();
        assert!(error.contains(expected), "{prepare}: {error}");
        assert!(error.contains(&path.display().to_string()), "{prepare}: {error}");
    }

    #[test]
    fn foreign_files_are_refused() {
        let newer =
            format!("PRAGMA application_id={APPLICATION}; PRAGMA user_version=3; CREATE TABLE t (x);");
        check(&newer, "data directory was written by a newer LoraFleet (schema 3 > 1); upgrade");
        check("CREATE TABLE t (x);", "another program's database");
        check("PRAGMA user_version=2;", "newer LoraFleet (schema 2 > 1)");
    }

    #[test]
    fn a_file_that_is_no_database_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("registry.db");
        std::fs::write(&path, "x".repeat(10_000)).unwrap();
        let error = open_writer(&path).unwrap_err().to_string();
        assert!(error.contains("not a database") && error.contains("registry.db"), "{error}");
    }

    #[test]
    fn every_migration_leaves_its_version() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("registry.db");
        for _ in 0..2 {
            let connection = open_writer(&path).unwrap();
            let version: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0)).unwrap();
            let full: i64 = connection.query_row("PRAGMA synchronous", [], |row| row.get(0)).unwrap();
            assert_eq!((version, full), (MIGRATIONS.len() as i64, 2));
        }
    }
}
