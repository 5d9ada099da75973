//! The registry on SQLite: one file, for a coordinator on one machine.
//!
//! Writes go through one named thread that owns the writing connection. It takes every command that waits and
//! runs them in one SQLite transaction, each under a savepoint of its own: many commits cost one fsync, and one
//! that is refused takes no other with it. Reads have a connection and a thread of their own, so that they do
//! not wait for the disk. WAL with `synchronous=FULL`: what was answered survives a power cut.
//!
//! | file | holds |
//! |---|---|
//! | `mod.rs` | the handle: commands out, replies back |
//! | `writer.rs` | the group commit |
//! | `schema.rs` | opening, the tables and their versions |

pub(crate) mod schema;
mod writer;

use crate::{Entries, Fence, Registry, RegistryError, Result, Write, lower_bound};
use futures::future::{BoxFuture, FutureExt};
use rusqlite::{Connection, OptionalExtension};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use tokio::sync::{mpsc, oneshot};

/// Commands that may wait; whoever comes later waits for room.
const WAITING: usize = 1024;

/// Fenced state in one SQLite file. Dropping it waits for the writes that are under way.
#[derive(Debug)]
pub struct SqliteRegistry {
    // Reader first: the connection that closes last folds the log into the file, which only the writer may do.
    reader: Worker<Read>,
    writer: Worker<writer::Command>,
}

impl SqliteRegistry {
    /// Opens the file, making it and its tables if it is not there, and bringing older tables up to date.
    /// It does not lock the file against other processes: hold a [`crate::DirectoryLock`].
    ///
    /// # Errors
    /// The file cannot be opened, is no registry, or was written by a later version.
    pub fn open(path: &Path) -> Result<Self> {
        let writing = schema::open_writer(path)?;
        let reading = schema::open_reader(path)?;
        let (at_write, at_read) = (path.to_path_buf(), path.to_path_buf());
        Ok(Self {
            writer: Worker::start("registry-writer", path, move |inbox| {
                writer::run(writing, &at_write, inbox)
            })?,
            reader: Worker::start("registry-reader", path, move |inbox| {
                read_loop(&reading, &at_read, inbox)
            })?,
        })
    }
}

impl Registry for SqliteRegistry {
    fn lead(&self, holder: &str) -> BoxFuture<'_, Result<Fence>> {
        let holder = holder.to_string();
        self.writer.ask(|reply| writer::Command::Lead { holder, reply }).boxed()
    }

    fn commit(&self, fence: Fence, batch: Vec<Write>) -> BoxFuture<'_, Result<()>> {
        self.writer.ask(move |reply| writer::Command::Commit { fence, batch, reply }).boxed()
    }

    fn get(&self, key: &str) -> BoxFuture<'_, Result<Option<Vec<u8>>>> {
        let key = key.to_string();
        self.reader.ask(|reply| Read::Get { key, reply }).boxed()
    }

    fn list(&self, prefix: &str, after: Option<&str>, limit: usize) -> BoxFuture<'_, Result<Entries>> {
        let (from, prefix) = (lower_bound(prefix, after), prefix.to_string());
        self.reader.ask(move |reply| Read::List { from, prefix, limit, reply }).boxed()
    }
}

/// Where a command's answer goes. Nobody may be listening any more; the answer is dropped then.
type Reply<T> = oneshot::Sender<Result<T>>;

/// A named thread and the channel to it. Dropping it closes the channel and waits for the thread.
#[derive(Debug)]
struct Worker<C> {
    path: PathBuf,
    inbox: Option<mpsc::Sender<C>>,
    thread: Option<JoinHandle<()>>,
}

impl<C: Send + 'static> Worker<C> {
    fn start(name: &str, path: &Path, run: impl FnOnce(mpsc::Receiver<C>) + Send + 'static) -> Result<Self> {
        let (sender, receiver) = mpsc::channel(WAITING);
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || run(receiver));
        let thread =
            thread.map_err(|error| RegistryError::Storage(format!("cannot start `{name}`: {error}")))?;
        Ok(Self { path: path.to_path_buf(), inbox: Some(sender), thread: Some(thread) })
    }

    async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> C) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        if let Some(inbox) = &self.inbox
            && inbox.send(command(reply)).await.is_ok()
            && let Ok(answer) = answer.await
        {
            return answer;
        }
        Err(RegistryError::Storage(format!("`{}`: its thread has stopped", self.path.display())))
    }
}

impl<C> Drop for Worker<C> {
    fn drop(&mut self) {
        self.inbox = None;
        if let Some(thread) = self.thread.take() {
            // A panic was reported by the thread itself; whoever asked was told that it stopped.
            let _ = thread.join();
        }
    }
}

#[derive(Debug)]
enum Read {
    Get { key: String, reply: Reply<Option<Vec<u8>>> },
    List { from: String, prefix: String, limit: usize, reply: Reply<Entries> },
}

fn read_loop(connection: &Connection, path: &Path, mut inbox: mpsc::Receiver<Read>) {
    while let Some(command) = inbox.blocking_recv() {
        match command {
            Read::Get { key, reply } => {
                let _ = reply.send(get(connection, &key).map_err(|e| storage(path, &e)));
            }
            Read::List { from, prefix, limit, reply } => {
                let _ = reply.send(list(connection, &from, &prefix, limit).map_err(|e| storage(path, &e)));
            }
        }
    }
}

fn get(connection: &Connection, key: &str) -> rusqlite::Result<Option<Vec<u8>>> {
    let mut statement = connection.prepare_cached("SELECT value FROM entries WHERE key = ?1")?;
    statement.query_row([key], |row| row.get(0)).optional()
}

/// Entries from key `from` on, as long as they start with `prefix`. Keys are text in SQLite's binary collation,
/// which is byte order, so the prefix's keys stand together and the first other key ends the listing.
fn list(connection: &Connection, from: &str, prefix: &str, limit: usize) -> rusqlite::Result<Entries> {
    let mut statement =
        connection.prepare_cached("SELECT key, value FROM entries WHERE key >= ?1 ORDER BY key LIMIT ?2")?;
    let mut rows = statement.query((from, i64::try_from(limit).unwrap_or(i64::MAX)))?;
    let mut entries = Vec::new();
    while let Some(row) = rows.next()? {
        let key: String = row.get(0)?;
        if !key.starts_with(prefix) {
            break;
        }
        entries.push((key, row.get(1)?));
    }
    Ok(entries)
}

/// An error of SQLite with the file that it is about.
pub(crate) fn storage(path: &Path, error: &rusqlite::Error) -> RegistryError {
    use rusqlite::ErrorCode::{CannotOpen, PermissionDenied, ReadOnly};
    let remedy = match error.sqlite_error_code() {
        Some(CannotOpen | PermissionDenied | ReadOnly) => crate::NOT_WRITABLE,
        _ => "",
    };
    RegistryError::Storage(format!("`{}`: {error}{remedy}", path.display()))
}
