//! What lies in a spool's folder, read without a change.

use super::{ACKNOWLEDGED, HEAD, LAST, MESSAGE, NAME, record};
use crate::Assignment;
use prost::Message;
use proto::v1::SessionRequest;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

/// A file of a spool.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Inspected {
    /// The file.
    pub path: PathBuf,
    /// Messages in it that are not acknowledged.
    pub unacknowledged: usize,
    /// Bytes at its end that are no whole record: of a write that was cut off, or damaged.
    pub torn: usize,
    /// What is wrong with its whole records.
    pub problems: Vec<String>,
}

/// Reads the files of a spool that nobody writes, in the order of their names. The folder need not be there.
///
/// # Errors
/// The folder or a file in it cannot be read.
pub fn inspect(dir: &Path) -> io::Result<Vec<Inspected>> {
    let entries = match std::fs::read_dir(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<io::Result<Vec<_>>>()?;
    paths.sort_unstable();
    paths.into_iter().map(file).collect()
}

fn file(path: PathBuf) -> io::Result<Inspected> {
    let bytes = std::fs::read(&path)?;
    let (mut rest, mut problems, mut waiting) = (bytes.as_slice(), Vec::new(), Vec::new());
    let (mut first, mut newest) = (true, 0);
    while let Some((kind, sequence, payload)) = record(rest) {
        match kind {
            NAME if first => {
                let of = Assignment::new(String::from_utf8_lossy(payload), sequence as u32);
                if path.file_name().and_then(|name| name.to_str()) != Some(&of.file_name()) {
                    problems.push(format!("its first record names {of}"));
                }
            }
            MESSAGE | LAST if !first => {
                if SessionRequest::decode(payload).is_err() {
                    problems.push(format!("message {sequence} cannot be read"));
                }
                if sequence <= newest {
                    problems.push(format!("message {sequence} comes after {newest}"));
                }
                newest = sequence;
                waiting.push(sequence);
            }
            ACKNOWLEDGED if !first => {
                waiting.retain(|waits| *waits > sequence);
                newest = newest.max(sequence);
            }
            _ => problems.push(format!("a record of kind {kind} where none belongs")),
        }
        first = false;
        rest = &rest[HEAD + payload.len()..];
    }
    Ok(Inspected { path, unacknowledged: waiting.len(), torn: rest.len(), problems })
}
