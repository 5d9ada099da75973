//! Reading the segments back. `segment.rs` says what is a torn tail and what is damage.

use super::HistoryError;
use super::segment::{self, FORMAT, FRAME_HEAD, HEADER, Head, Headless, Record};
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

/// Where the segments end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct End {
    /// The last segment's number; 0 if there is none.
    pub(super) number: u64,
    /// Its whole bytes, all on disk.
    pub(super) length: u64,
}

/// The rest of a write that never was acknowledged, at the end of the last segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Torn {
    /// The segment's file.
    pub path: PathBuf,
    /// Its whole bytes, which stay; 0 if not even its header is whole, so that the file goes.
    pub whole: u64,
    /// Bytes behind them.
    pub bytes: u64,
}

/// Hands on every record of a directory's segments with its segment's number, in the order in which they were written.
/// Nothing is changed. Answers with where the segments end, and what is torn there.
pub(super) fn read_all(
    dir: &Path,
    mut each: impl FnMut(u64, Record),
) -> Result<(End, Vec<Torn>), HistoryError> {
    let mut torn = Vec::new();
    let mut last = last_number(dir)?;
    if let Some(stillborn) = stillborn(dir, last)? {
        torn.push(stillborn);
        last -= 1;
    }
    let mut end = End { number: last, length: 0 };
    for number in 1..=last {
        let read = read_one(dir, number, last, &mut |record| each(number, record))?;
        if number == last {
            end.length = read.whole;
            if read.torn > 0 {
                let path = segment::path(dir, number);
                torn.push(Torn { path, whole: read.whole, bytes: read.torn });
            }
        }
    }
    Ok((end, torn))
}

/// What was read of one segment.
pub(super) struct Segment {
    pub(super) head: Head,
    /// Its bytes that count.
    whole: u64,
    /// The bytes behind them, if it is the last.
    torn: u64,
}

/// Hands on the records of a compacted segment, which is `bytes`; `path` names it.
pub(super) fn read_compacted(
    path: &Path,
    bytes: &[u8],
    each: &mut impl FnMut(Record),
) -> Result<(), HistoryError> {
    if !header(path, bytes)?.compacted {
        return Err(damaged(path, 0, "it is no whole segment"));
    }
    read_acknowledged(path, bytes, bytes.len() as u64, each)
}

/// Hands on the records of segment `number` of `last`.
pub(super) fn read_one(
    dir: &Path,
    number: u64,
    last: u64,
    each: &mut impl FnMut(Record),
) -> Result<Segment, HistoryError> {
    let path = segment::path(dir, number);
    let bytes = std::fs::read(&path).map_err(|error| missing(&path, error))?;
    let length = bytes.len() as u64;
    let head = header(&path, &bytes)?;
    let (whole, torn) = if head.compacted {
        read_acknowledged(&path, &bytes, length, each)?;
        (length, 0)
    } else if number < last {
        let acknowledged = head_of(&segment::path(dir, number + 1))?.acknowledged_before;
        read_acknowledged(&path, &bytes, acknowledged, each)?;
        (acknowledged, 0)
    } else {
        let whole = read_last(&path, &bytes, each)? as u64;
        (whole, length - whole)
    };
    Ok(Segment { head, whole, torn })
}

/// Cuts off what [`read_all`] found torn, and brings the last segment to the disk: the process that wrote the last
/// of it may have died before its fsync.
pub(super) fn mend(dir: &Path, end: End, torn: &[Torn]) -> Result<(), HistoryError> {
    for Torn { path, whole, bytes } in torn {
        tracing::warn!(file = %path.display(), bytes, "cut off a write of metrics that never finished");
        let cut = match whole {
            0 => std::fs::remove_file(path),
            _ => OpenOptions::new().write(true).open(path).and_then(|file| file.set_len(*whole)),
        };
        cut.map_err(HistoryError::io(path))?;
    }
    if end.number == 0 {
        return Ok(());
    }
    let path = segment::path(dir, end.number);
    let synced = OpenOptions::new().write(true).open(&path).and_then(|file| file.sync_all());
    synced.map_err(HistoryError::io(&path))
}

/// Refuses a directory of which a later version wrote a part, before anything in it is read or changed.
pub(super) fn refuse_newer(dir: &Path) -> Result<(), HistoryError> {
    for number in 1..=last_number(dir)? {
        // What is damaged or missing is told when it is read.
        if let Err(newer @ HistoryError::Newer { .. }) = head_of(&segment::path(dir, number)) {
            return Err(newer);
        }
    }
    Ok(())
}

/// The highest number of a segment in a directory; 0 if there is none. Other files are none of ours.
fn last_number(dir: &Path) -> Result<u64, HistoryError> {
    let mut last = 0;
    let entries = match std::fs::read_dir(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(0),
        entries => entries.map_err(HistoryError::io(dir))?,
    };
    for entry in entries {
        let name = entry.map_err(HistoryError::io(dir))?.file_name();
        let number =
            name.to_str().and_then(|n| n.strip_prefix("segment-")?.strip_suffix(".log")?.parse().ok());
        last = last.max(number.unwrap_or(0));
    }
    Ok(last)
}

/// The last segment, if its maker died before its header was on disk; nothing in it was acknowledged.
fn stillborn(dir: &Path, last: u64) -> Result<Option<Torn>, HistoryError> {
    if last == 0 {
        return Ok(None);
    }
    let path = segment::path(dir, last);
    let bytes = std::fs::read(&path).map_err(HistoryError::io(&path))?;
    if segment::read_header(&bytes) != Err(Headless::Damaged) || segment::holds_whole_frame(&bytes) {
        return Ok(None);
    }
    Ok(Some(Torn { path, whole: 0, bytes: bytes.len() as u64 }))
}

fn header(path: &Path, bytes: &[u8]) -> Result<Head, HistoryError> {
    segment::read_header(bytes).map_err(|headless| match headless {
        Headless::Newer(found) => HistoryError::Newer { path: path.into(), found, known: FORMAT },
        Headless::Damaged => damaged(path, 0, "its header is not whole"),
    })
}

/// The header of a segment.
fn head_of(path: &Path) -> Result<Head, HistoryError> {
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(|error| missing(path, error))?;
    file.take(HEADER as u64).read_to_end(&mut bytes).map_err(HistoryError::io(path))?;
    header(path, &bytes)
}

/// Reads a segment of which `acknowledged` bytes count.
fn read_acknowledged(
    path: &Path,
    bytes: &[u8],
    acknowledged: u64,
    each: &mut impl FnMut(Record),
) -> Result<(), HistoryError> {
    let counted = usize::try_from(acknowledged).ok().and_then(|length| bytes.get(..length));
    let counted = counted.ok_or_else(|| damaged(path, bytes.len(), "the file ends too early"))?;
    let whole = read_frames(path, counted, each)?;
    if whole < counted.len() {
        return Err(damaged(path, whole, "the checksum does not match"));
    }
    Ok(())
}

/// Reads the last segment up to its torn tail. Returns the whole bytes.
fn read_last(path: &Path, bytes: &[u8], each: &mut impl FnMut(Record)) -> Result<usize, HistoryError> {
    let whole = read_frames(path, bytes, each)?;
    if segment::holds_whole_frame(&bytes[whole..]) {
        return Err(damaged(path, whole, "the checksum does not match, and whole frames follow"));
    }
    Ok(whole)
}

/// Reads whole frames up to the first that is not. Returns where that begins, or the end.
fn read_frames(path: &Path, bytes: &[u8], each: &mut impl FnMut(Record)) -> Result<usize, HistoryError> {
    let mut at = HEADER;
    while let Some(payload) = segment::whole_frame(&bytes[at..]) {
        let records = segment::records(payload);
        let records = records.ok_or_else(|| damaged(path, at, "its records cannot be read"))?;
        records.into_iter().for_each(&mut *each);
        at += FRAME_HEAD + payload.len();
    }
    Ok(at)
}

fn missing(path: &Path, error: std::io::Error) -> HistoryError {
    match error.kind() {
        ErrorKind::NotFound => damaged(path, 0, "the file is missing"),
        _ => HistoryError::io(path)(error),
    }
}

fn damaged(path: &Path, offset: usize, what: &'static str) -> HistoryError {
    HistoryError::Damaged { path: PathBuf::from(path), offset: offset as u64, what }
}
