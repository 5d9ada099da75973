//! Takes the points of deleted sweeps out of segments: a segment is written anew beside the old one, brought to the
//! disk, and put in its place. Whenever the process ends, one of the two is there, whole. A segment stays even if
//! nothing is left in it, so that one that is missing is still noticed.

use super::HistoryError;
use super::recovery;
use super::segment::{self, Record};
use domain::{SweepId, crash};
use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

/// Whether a record is of one of these sweeps.
pub(super) fn is_of(record: &Record, sweeps: &HashSet<SweepId>) -> bool {
    !sweeps.is_empty() && record.trial.sweep().is_some_and(|sweep| sweeps.contains(&sweep))
}

/// Writes segment `number` of `last` anew without the records of `gone` sweeps. Nobody may write to it meanwhile, and
/// its torn end is cut off. Answers with its length in bytes.
///
/// # Errors
/// It cannot be read or written. It is then as it was, or as it is to be.
pub(super) fn compact(
    dir: &Path,
    number: u64,
    last: u64,
    gone: &HashSet<SweepId>,
) -> Result<u64, HistoryError> {
    let mut kept = Vec::new();
    let read = recovery::read_one(dir, number, last, &mut |record| {
        if !is_of(&record, gone) {
            kept.push(record);
        }
    })?;
    let path = segment::path(dir, number);
    let too_large = || io::Error::new(io::ErrorKind::InvalidData, "a frame above 4 GiB");
    let bytes = segment::compacted(read.head.acknowledged_before, &kept);
    let bytes = bytes.ok_or_else(too_large).map_err(HistoryError::io(&path))?;
    let beside = path.with_extension("new");
    let replace = || {
        let mut file = File::create(&beside)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        crash::point("compaction/before-rename");
        std::fs::rename(&beside, &path)?;
        crash::point("compaction/after-rename");
        File::open(dir)?.sync_all()
    };
    replace().map_err(|error| {
        // What is beside is no part of the history; the next try writes it anew.
        let _ = std::fs::remove_file(&beside);
        HistoryError::io(&path)(error)
    })?;
    Ok(bytes.len() as u64)
}
