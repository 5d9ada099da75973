//! The group commit: everything that waits, in one transaction.

use super::{Reply, storage};
use crate::{Fence, RegistryError, Result, Write};
use rusqlite::{Connection, Row, Transaction, TransactionBehavior};
use std::path::Path;
use tokio::sync::mpsc;

/// The most commands in one transaction, so that the first does not wait without bound for the last.
const GROUP: usize = 256;

#[derive(Debug)]
pub(super) enum Command {
    Lead { holder: String, reply: Reply<Fence> },
    Commit { fence: Fence, batch: Vec<Write>, reply: Reply<()> },
}

/// Serves commands until every sender is gone. Nobody is answered before the whole group is durable.
pub(super) fn run(mut connection: Connection, path: &Path, mut inbox: mpsc::Receiver<Command>) {
    let mut group = Vec::with_capacity(GROUP);
    while inbox.blocking_recv_many(&mut group, GROUP) > 0 {
        match run_group(&mut connection, path, &group) {
            Ok(outcomes) => {
                group.drain(..).zip(outcomes).for_each(|(command, outcome)| command.answer(outcome))
            }
            Err(error) => {
                let error = storage(path, &error).to_string();
                group
                    .drain(..)
                    .for_each(|command| command.answer(Err(RegistryError::Storage(error.clone()))));
            }
        }
    }
}

/// Runs commands in one transaction. The outer error is the transaction's: then none of them had an effect.
fn run_group(
    connection: &mut Connection,
    path: &Path,
    group: &[Command],
) -> rusqlite::Result<Vec<Result<Fence>>> {
    let mut transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let alone = group.len() == 1;
    let outcomes = group
        .iter()
        .map(|command| command.run(&mut transaction, path, alone))
        .collect::<rusqlite::Result<_>>()?;
    domain::crash::point("registry/before-commit");
    transaction.commit()?;
    domain::crash::point("registry/after-commit");
    Ok(outcomes)
}

impl Command {
    /// Runs the command within the group's transaction. The inner error is this command's alone; one that is alone in its
    /// group has the outer.
    fn run(
        &self,
        transaction: &mut Transaction<'_>,
        path: &Path,
        alone: bool,
    ) -> rusqlite::Result<Result<Fence>> {
        match self {
            Self::Lead { holder, .. } => lead(transaction, holder).map(Ok),
            Self::Commit { fence, batch, .. } => {
                if let Err(fenced) = fence.check(current_fence(transaction)?) {
                    return Ok(Err(fenced));
                }
                let applied = match alone {
                    true => apply(transaction, batch),
                    false => apply_beside(transaction, batch),
                };
                match applied {
                    Ok(()) => Ok(Ok(*fence)),
                    Err(error) if alone => Err(error),
                    // On some errors (a full disk) SQLite itself rolls the whole transaction back.
                    Err(error) if transaction.is_autocommit() => Err(error),
                    Err(error) => Ok(Err(storage(path, &error))),
                }
            }
        }
    }

    /// Whoever asked may be gone; then nobody needs the answer.
    fn answer(self, outcome: Result<Fence>) {
        match self {
            Self::Lead { reply, .. } => drop(reply.send(outcome)),
            Self::Commit { reply, .. } => drop(reply.send(outcome.map(|_| ()))),
        }
    }
}

fn current_fence(connection: &Connection) -> rusqlite::Result<u64> {
    connection.prepare_cached("SELECT fence FROM leadership")?.query_row([], fence_of)
}

/// SQLite's integers are signed; the fence counts up from 0.
fn fence_of(row: &Row<'_>) -> rusqlite::Result<u64> {
    row.get::<_, i64>(0).map(i64::cast_unsigned)
}

fn lead(connection: &Connection, holder: &str) -> rusqlite::Result<Fence> {
    let mut statement =
        connection.prepare_cached("UPDATE leadership SET fence = fence + 1, holder = ?1 RETURNING fence")?;
    statement.query_row([holder], fence_of).map(Fence)
}

/// Applies a batch under a savepoint, which an error rolls back when it is dropped, so that others of the group stand.
fn apply_beside(transaction: &mut Transaction<'_>, batch: &[Write]) -> rusqlite::Result<()> {
    let savepoint = transaction.savepoint()?;
    apply(&savepoint, batch)?;
    savepoint.commit()
}

fn apply(connection: &Connection, batch: &[Write]) -> rusqlite::Result<()> {
    const PUT: &str =
        "INSERT INTO entries VALUES (?1, ?2) ON CONFLICT (key) DO UPDATE SET value = excluded.value";
    const DELETE: &str = "DELETE FROM entries WHERE key = ?1";
    for write in batch {
        match write {
            Write::Put(key, value) => connection.prepare_cached(PUT)?.execute((key, value))?,
            Write::Delete(key) => connection.prepare_cached(DELETE)?.execute([key])?,
        };
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sqlite::schema;
    use tokio::sync::oneshot;

    fn commit(fence: u64, writes: Vec<Write>) -> (Command, oneshot::Receiver<Result<()>>) {
        let (reply, answer) = oneshot::channel();
        (Command::Commit { fence: Fence(fence), batch: writes, reply }, answer)
    }

    fn put(key: &str, bytes: usize) -> Write {
        Write::Put(key.into(), vec![1; bytes])
    }

    /// As SQLite says it where the directory cannot be written, too.
    #[test]
    fn a_file_that_cannot_be_made_comes_with_a_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("none/registry.db");
        let error = schema::open_writer(&path).unwrap_err().to_string();
        let want = [
            "unable to open database file",
            "not read-only, or choose another --data-dir",
            "none/registry.db",
        ];
        assert!(want.iter().all(|part| error.contains(part)), "{error}");
    }

    /// Commands of one group, the last two refused for different reasons: the others are there afterwards.
    #[test]
    fn a_refused_batch_takes_no_other_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("registry.db");
        let mut connection = schema::open_writer(&path).unwrap();
        let trap = "CREATE TRIGGER trap BEFORE INSERT ON entries WHEN NEW.key = 'bad'
             BEGIN SELECT RAISE(ABORT, 'on purpose'); END";
        connection.execute_batch(trap).unwrap();
        let (reply, _led) = oneshot::channel();
        let group = vec![
            commit(1, vec![put("before anyone led", 1)]).0,
            Command::Lead { holder: "test".into(), reply },
            commit(1, vec![put("a", 1)]).0,
            commit(2, vec![put("from the future", 1)]).0,
            commit(1, vec![put("half", 1), put("bad", 1)]).0,
            commit(1, vec![put("b", 1)]).0,
        ];
        let outcomes = run_group(&mut connection, &path, &group).unwrap();
        let good: Vec<bool> = outcomes.iter().map(Result::is_ok).collect();
        assert_eq!(good, [false, true, true, false, false, true]);
        let bad = outcomes[4].as_ref().unwrap_err().to_string();
        assert!(bad.contains("registry.db") && bad.contains("on purpose"), "{bad}");
        let mut statement = connection.prepare("SELECT key FROM entries ORDER BY key").unwrap();
        let keys: Vec<String> =
            statement.query_map([], |row| row.get(0)).unwrap().map(|key| key.unwrap()).collect();
        assert_eq!(keys, ["a", "b"]);
    }

    /// With no pages left SQLite rolls the group back; every one in it hears of it, and the next works again.
    #[test]
    fn a_full_disk_fails_the_group_by_name_and_passes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("registry.db");
        let connection = schema::open_writer(&path).unwrap();
        lead(&connection, "test").unwrap();
        let pages: i64 = connection.query_row("PRAGMA page_count", [], |row| row.get(0)).unwrap();
        connection.pragma_update(None, "max_page_count", pages + 4).unwrap();
        let (sender, inbox) = mpsc::channel(8);
        let (large, large_answer) = commit(1, vec![put("large", 1_000_000)]);
        let (small, small_answer) = commit(1, vec![put("small", 10)]);
        sender.try_send(large).unwrap_or_else(|_| panic!("room"));
        sender.try_send(small).unwrap_or_else(|_| panic!("room"));
        let at = path.clone();
        let writer = std::thread::spawn(move || run(connection, &at, inbox));
        let full = large_answer.blocking_recv().unwrap().unwrap_err().to_string();
        assert!(full.contains("registry.db") && full.contains("full"), "{full}");
        // Either it was in the same group, and failed with it, or it was in the next.
        let _ = small_answer.blocking_recv().unwrap();
        let (later, later_answer) = commit(1, vec![put("later", 10)]);
        sender.blocking_send(later).unwrap_or_else(|_| panic!("writer runs"));
        later_answer.blocking_recv().unwrap().unwrap();
        drop(sender);
        writer.join().unwrap();
        let connection = schema::open_writer(&path).unwrap();
        let large: i64 = connection
            .query_row("SELECT count(*) FROM entries WHERE key = 'large'", [], |r| r.get(0))
            .unwrap();
        assert_eq!(large, 0);
    }
}
