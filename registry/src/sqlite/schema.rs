//! Opening the file; its tables and their versions.

use super::storage;
use crate::{RegistryError, Result};
use rusqlite::{Connection, OpenFlags};
use std::fs::File;
use std::path::{Path, PathBuf};
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

/// Opens the writing connection and brings the tables up to date. Older tables are backed up before they change.
pub(super) fn open_writer(path: &Path) -> Result<Connection> {
    open_with(path, MIGRATIONS)
}

fn open_with(path: &Path, migrations: &[&str]) -> Result<Connection> {
    let failed = |error| storage(path, &error);
    let mut connection = Connection::open(path).map_err(failed)?;
    connection.busy_timeout(BUSY).map_err(failed)?;
    let version = refuse_foreign(&connection, path, migrations.len() as i64)?;
    let mode: String =
        connection.pragma_update_and_check(None, "journal_mode", "WAL", |row| row.get(0)).map_err(failed)?;
    if mode != "wal" {
        let why = "its file system cannot hold a write-ahead log; choose a data directory on a local disk";
        return Err(RegistryError::Storage(format!("`{}`: {why}", path.display())));
    }
    connection.pragma_update(None, "synchronous", "FULL").map_err(failed)?;
    if 0 < version && version < migrations.len() as i64 {
        back_up(&connection, path, version)?;
    }
    migrate(&mut connection, migrations).map_err(failed)?;
    Ok(connection)
}

/// The latest schema version that this program knows.
pub(crate) fn known() -> i64 {
    MIGRATIONS.len() as i64
}

/// Where the tables of an older version are kept.
fn backup_of(path: &Path, version: i64) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!("{name}.v{version}.backup"))
}

/// Copies the file, whole and on disk, before its tables change. It is never removed: a person does that.
fn back_up(connection: &Connection, path: &Path, version: i64) -> Result<()> {
    let backup = backup_of(path, version);
    let refused = |why: String| {
        let (file, backup) = (path.display(), backup.display());
        RegistryError::Storage(format!(
            "`{file}` has schema {version} and cannot be backed up to `{backup}` before it is brought up to date: \
             {why}; nothing was changed, make room or let it be written"
        ))
    };
    let partial = backup.with_extension("backup.partial");
    match std::fs::remove_file(&partial) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(refused(error.to_string())),
        _ => {}
    }
    let target = partial.to_str().ok_or_else(|| refused("its path is not UTF-8".into()))?;
    connection.execute("VACUUM INTO ?1", [target]).map_err(|error| refused(error.to_string()))?;
    let directory = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(&partial)
        .and_then(|file| file.sync_all())
        .and_then(|()| std::fs::rename(&partial, &backup))
        .and_then(|()| File::open(directory)?.sync_all())
        .map_err(|error| refused(error.to_string()))
}

/// Opens the reading connection of a file that [`open_writer`] has opened.
pub(super) fn open_reader(path: &Path) -> Result<Connection> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(path, flags).map_err(|error| storage(path, &error))?;
    connection.busy_timeout(BUSY).map_err(|error| storage(path, &error))?;
    Ok(connection)
}

/// Refuses a file that a later version wrote, or that is some other program's, before anything changes in it.
/// Answers with its schema version; 0 if it is new.
pub(crate) fn refuse_foreign(connection: &Connection, path: &Path, known: i64) -> Result<i64> {
    let number =
        |sql| connection.query_row(sql, [], |row| row.get::<_, i64>(0)).map_err(|e| storage(path, &e));
    let empty = number("SELECT count(*) FROM sqlite_schema")? == 0;
    if !empty && number("PRAGMA application_id")? != APPLICATION {
        return Err(RegistryError::Foreign { path: path.to_path_buf() });
    }
    let found = number("PRAGMA user_version")?;
    if found > known {
        return Err(RegistryError::Newer { path: path.to_path_buf(), found, known });
    }
    Ok(found)
}

/// Runs what is missing, each step in a transaction of its own.
fn migrate(connection: &mut Connection, migrations: &[&str]) -> rusqlite::Result<()> {
    let found: i64 = connection.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    let done = usize::try_from(found).unwrap_or(0);
    for (index, sql) in migrations.iter().enumerate().skip(done) {
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

    /// A later version that renames nothing and adds a table: what a released migration may look like.
    const NEXT: &str = "CREATE TABLE later (id INTEGER PRIMARY KEY, note TEXT NOT NULL) STRICT;
        INSERT INTO later (note) SELECT key FROM entries;";

    fn entries(connection: &Connection) -> Vec<(String, Vec<u8>)> {
        let mut statement = connection.prepare("SELECT key, value FROM entries ORDER BY key").unwrap();
        statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).unwrap().map(|e| e.unwrap()).collect()
    }

    /// For every earlier version: a file that it wrote, brought up to date, has its content, and so has the backup.
    #[test]
    fn an_older_file_is_backed_up_and_brought_up_to_date() {
        let all: Vec<&str> = MIGRATIONS.iter().copied().chain([NEXT]).collect();
        for version in 1..all.len() {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("registry.db");
            let old = open_with(&path, &all[..version]).unwrap();
            for (key, value) in [("sweeps/a", "{}"), ("trials/a/0000000001", "[1]")] {
                old.execute("INSERT INTO entries VALUES (?1, ?2)", (key, value.as_bytes())).unwrap();
            }
            let before = entries(&old);
            drop(old);
            let new = open_with(&path, &all).unwrap();
            assert_eq!(entries(&new), before);
            let backup = backup_of(&path, version as i64);
            let backed_up = open_reader(&backup).unwrap();
            assert_eq!(entries(&backed_up), before);
            assert_eq!(refuse_foreign(&backed_up, &backup, version as i64).unwrap(), version as i64);
            let length = std::fs::metadata(&backup).unwrap().len();
            drop(new);
            drop(open_with(&path, &all).unwrap());
            assert_eq!(std::fs::metadata(&backup).unwrap().len(), length, "it is made once and kept");
            let names = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name());
            assert!(!names.into_iter().any(|name| name.to_string_lossy().contains("partial")));
        }
    }

    #[test]
    fn without_a_backup_nothing_changes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("registry.db");
        drop(open_writer(&path).unwrap());
        // A folder of that name with something in it cannot be replaced.
        std::fs::create_dir_all(backup_of(&path, 1).join("in the way")).unwrap();
        let all: Vec<&str> = MIGRATIONS.iter().copied().chain([NEXT]).collect();
        let error = open_with(&path, &all).unwrap_err().to_string();
        for part in ["registry.db", "registry.db.v1.backup", "cannot be backed up", "nothing was changed"] {
            assert!(error.contains(part), "{error}");
        }
        assert_eq!(refuse_foreign(&open_reader(&path).unwrap(), &path, 1).unwrap(), 1);
        assert_eq!(known(), MIGRATIONS.len() as i64);
    }
}
