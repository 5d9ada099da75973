//! An event file: TFRecords of events.
//!
//! A record is its length (8 bytes, little end first), the length's checksum, the bytes and their checksum. Checksums
//! are CRC-32C, turned and shifted so that one over data with checksums in them is sound (`tensorflow/core/lib/hash/crc32c.h`).

use super::messages::{Event, What};
use crate::Failure;
use crate::export::place;
use crc::{CRC_32_ISCSI, Crc};
use prost::Message;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

const CRC_32C: Crc<u32> = Crc::<u32>::new(&CRC_32_ISCSI);

/// An event file that is being written.
pub(super) struct Events {
    path: PathBuf,
    file: BufWriter<File>,
}

impl Events {
    /// Begins a file in a run's directory, which is made. `since` are the seconds since the epoch when the run began.
    pub(super) fn create(run: &Path, since: f64) -> Result<Self, Failure> {
        std::fs::create_dir_all(run).map_err(place::at(run))?;
        // TensorBoard reads the files of a run in the order of these names.
        let path = run.join(format!("events.out.tfevents.{:010}.lorafleet", since as u64));
        let file = BufWriter::new(File::create(&path).map_err(place::at(&path))?);
        let mut events = Self { path, file };
        let version = What::FileVersion("brain.Event:2".into());
        events.push(&Event { wall_time: since, step: 0, what: Some(version) })?;
        Ok(events)
    }

    /// Adds an event.
    pub(super) fn push(&mut self, event: &Event) -> Result<(), Failure> {
        write_record(&mut self.file, &event.encode_to_vec()).map_err(place::at(&self.path))
    }

    /// Ends the file.
    pub(super) fn close(mut self) -> Result<(), Failure> {
        self.file.flush().map_err(place::at(&self.path))
    }
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

    /// The events of a file, its checksums checked.
    pub(in super::super) fn read(path: &Path) -> Vec<Event> {
        let bytes = std::fs::read(path).unwrap();
        let (mut rest, mut events) = (bytes.as_slice(), Vec::new());
        while !rest.is_empty() {
            let (head, tail) = rest.split_at(12);
            assert_eq!(masked(&head[..8]).to_le_bytes(), head[8..]);
            let length = u64::from_le_bytes(head[..8].try_into().unwrap()) as usize;
            let (record, tail) = tail.split_at(length);
            assert_eq!(masked(record).to_le_bytes(), tail[..4]);
            events.push(Event::decode(record).unwrap());
            rest = &tail[4..];
        }
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
        Events::create(dir.path(), 12.5).unwrap().close().unwrap();
        let events = read(&dir.path().join("events.out.tfevents.0000000012.lorafleet"));
        assert_eq!(events.len(), 1);
        assert_eq!(events[0].what, Some(What::FileVersion("brain.Event:2".into())));
        assert_eq!(events[0].wall_time, 12.5);
    }
}
