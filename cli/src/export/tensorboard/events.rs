//! An event file: TFRecords of events.
//!
//! A record is its length (8 bytes, little end first), the length's checksum, the bytes and their checksum. Checksums
//! are CRC-32C, turned and shifted so that one over data with checksums in them is sound (`tensorflow/core/lib/hash/crc32c.h`).

use super::messages::{Event, What};
use crate::Failure;
use crate::export::place;
use crc::{CRC_32_ISCSI, Crc};
use prost::Message;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

const CRC_32C: Crc<u32> = Crc::<u32>::new(&CRC_32_ISCSI);

/// What an event file's name begins with, and what ours end with.
const PREFIX: &str = "events.out.tfevents.";
const ENDING: &str = ".lorafleet";

/// An event file that is being written. What is added is written at once when it is closed.
pub(super) struct Events {
    path: PathBuf,
    file: File,
    new: Vec<u8>,
}

impl Events {
    /// The file of a run, whose directory is made. `since` are the seconds since the epoch when the run began: they name it.
    /// What it has already is given to `each`; of a record that was cut short as it was written nothing stays.
    ///
    /// # Errors
    /// It cannot be read or written, or is damaged.
    pub(super) fn open(run: &Path, since: f64, each: impl FnMut(Event)) -> Result<Self, Failure> {
        std::fs::create_dir_all(run).map_err(place::at(run))?;
        // TensorBoard reads the files of a run in the order of these names.
        let path = run.join(format!("{PREFIX}{:010}{ENDING}", since as u64));
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let mut file = options.open(&path).map_err(place::at(&path))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(place::at(&path))?;
        let whole = read(&path, &bytes, each)?;
        if whole < bytes.len() {
            file.set_len(whole as u64).map_err(place::at(&path))?;
            file.seek(SeekFrom::Start(whole as u64)).map_err(place::at(&path))?;
        }
        let mut events = Self { path, file, new: Vec::new() };
        if whole == 0 {
            let version = What::FileVersion("brain.Event:2".into());
            events.push(&Event { wall_time: since, step: 0, what: Some(version) })?;
        }
        Ok(events)
    }

    /// A new file in the place of a run's, if it has one.
    ///
    /// # Errors
    /// It cannot be written.
    pub(super) fn create(run: &Path, since: f64) -> Result<Self, Failure> {
        let path = run.join(format!("{PREFIX}{:010}{ENDING}", since as u64));
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(place::at(&path)(error)),
            _ => Self::open(run, since, |_| {}),
        }
    }

    /// The same file, of which all is known.
    ///
    /// # Errors
    /// It cannot be written, or is gone.
    pub(super) fn append(run: &Path, since: f64) -> Result<Self, Failure> {
        let path = run.join(format!("{PREFIX}{:010}{ENDING}", since as u64));
        let file = OpenOptions::new().append(true).open(&path).map_err(place::at(&path))?;
        Ok(Self { path, file, new: Vec::new() })
    }

    /// Adds an event.
    pub(super) fn push(&mut self, event: &Event) -> Result<(), Failure> {
        write_record(&mut self.new, &event.encode_to_vec()).map_err(place::at(&self.path))
    }

    /// Ends the file for now.
    pub(super) fn close(mut self) -> Result<(), Failure> {
        self.file.write_all(&self.new).map_err(place::at(&self.path))
    }
}

/// Gives each event of a directory's own file to `each`; whether there is such a file.
///
/// # Errors
/// It cannot be read, or is damaged.
pub(super) fn read_own(dir: &Path, each: impl FnMut(Event)) -> Result<bool, Failure> {
    for entry in std::fs::read_dir(dir).map_err(place::at(dir))? {
        let path = entry.map_err(place::at(dir))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with(PREFIX) && name.ends_with(ENDING) {
            let bytes = std::fs::read(&path).map_err(place::at(&path))?;
            read(&path, &bytes, each)?;
            return Ok(true);
        }
    }
    Ok(false)
}

/// Gives each whole record's event to `each`; the length of them all.
fn read(path: &Path, bytes: &[u8], mut each: impl FnMut(Event)) -> Result<usize, Failure> {
    let mut at = 0;
    let damaged = |at: usize, why: &str| {
        Failure::failed(format!(
            "{}: is damaged at byte {at} ({why}); name another directory with --to",
            path.display()
        ))
    };
    while let Some((head, rest)) = bytes.get(at..).and_then(|rest| rest.split_first_chunk::<12>()) {
        let (length, sum) = head.split_at(8);
        if masked(length).to_le_bytes() != sum {
            return Err(damaged(at, "the checksum of a record's length is another"));
        }
        let length = length.iter().rev().fold(0_u64, |length, byte| (length << 8) | u64::from(*byte));
        let Some(end) = usize::try_from(length).ok().and_then(|length| length.checked_add(4)) else { break };
        let Some(record) = rest.get(..end) else { break };
        let (record, sum) = record.split_at(end - 4);
        if masked(record).to_le_bytes() != sum {
            return Err(damaged(at, "a record's checksum is another"));
        }
        each(Event::decode(record).map_err(|error| damaged(at, &error.to_string()))?);
        at += 12 + end;
    }
    Ok(at)
}

fn write_record(to: &mut impl Write, bytes: &[u8]) -> std::io::Result<()> {
    let length = (bytes.len() as u64).to_le_bytes();
    to.write_all(&length)?;
    to.write_all(&masked(&length).to_le_bytes())?;
    to.write_all(bytes)?;
    to.write_all(&masked(bytes).to_le_bytes())
}

fn masked(bytes: &[u8]) -> u32 {
    CRC_32C.checksum(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
pub(super) mod tests {
    use super::*;

    /// The events of a directory's file.
    pub(in super::super) fn events_in(dir: &Path) -> Vec<Event> {
        let mut events = Vec::new();
        assert!(read_own(dir, |event| events.push(event)).unwrap(), "{}", dir.display());
        events
    }

    #[test]
    fn checksums_are_the_published_ones() {
        // RFC 3720, B.4: 32 bytes of zeros, and 32 rising.
        let rising: Vec<u8> = (0..32).collect();
        for (bytes, want) in [(&[0; 32][..], 0x8a91_36aa), (&rising, 0x46dd_794e)] {
            assert_eq!(CRC_32C.checksum(bytes), want);
            let unmasked = masked(bytes).wrapping_sub(0xa282_ead8).rotate_left(15);
            assert_eq!(unmasked, want);
        }
    }

    #[test]
    fn a_file_begins_with_its_version() {
        let dir = tempfile::tempdir().unwrap();
        Events::open(dir.path(), 12.5, |event| unreachable!("{event:?}")).unwrap().close().unwrap();
        let events = events_in(dir.path());
        assert_eq!(events.len(), 1);
        assert_eq!(events[0].what, Some(What::FileVersion("brain.Event:2".into())));
        assert_eq!(events[0].wall_time, 12.5);
    }

    /// A record that is cut short anywhere is written again; one with a wrong bit is told.
    #[test]
    fn a_file_goes_on_behind_its_last_whole_record() {
        let event = |step: i64| Event { wall_time: 13.0, step, what: None };
        let dir = tempfile::tempdir().unwrap();
        let mut file = Events::open(dir.path(), 12.0, |_| {}).unwrap();
        file.push(&event(1)).unwrap();
        file.close().unwrap();
        let path = dir.path().join("events.out.tfevents.0000000012.lorafleet");
        let one = std::fs::read(&path).unwrap();
        let mut file = Events::append(dir.path(), 12.0).unwrap();
        file.push(&event(2)).unwrap();
        file.close().unwrap();
        let whole = std::fs::read(&path).unwrap();
        for length in one.len()..whole.len() {
            std::fs::write(&path, &whole[..length]).unwrap();
            let mut steps = Vec::new();
            let mut file = Events::open(dir.path(), 12.0, |event| steps.push(event.step)).unwrap();
            assert_eq!(steps, [0, 1], "{length} bytes");
            file.push(&event(2)).unwrap();
            file.close().unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), whole, "{length} bytes");
        }
        for at in [0, one.len() + 12, whole.len() - 1] {
            let mut wrong = whole.clone();
            wrong[at] ^= 1;
            std::fs::write(&path, &wrong).unwrap();
            let failure = Events::open(dir.path(), 12.0, |_| {}).err().unwrap();
            assert!(failure.message().contains("is damaged at byte"), "{failure:?}");
        }
    }
}
