//! The bytes of a segment: the file `segment-<number>.log`, numbered from 1, or an object (`objects.rs`), which is always
//! a whole, compacted one. All integers are little-endian.
//!
//! ```text
//! header   "LFMETRIC" | format u32 (1, or 2: compacted) | acknowledged bytes of the segment before u64 | crc32 of these 20 bytes u32
//! frame    "LFGC" | length u32 | crc32 of length and payload u32 | payload        (one group commit each)
//! payload  records: trial text | attempt u32 | points u32, each: step u64 | time u64 | values u32, each: name text | f64
//! text     length u32 | UTF-8
//! ```
//!
//! A frame is written only after the one before it is on disk, and a process writes only to segments that it
//! made. So a write that never finished is the end of the last segment: damage that no whole frame follows. It
//! was not acknowledged and is cut off. How much of an earlier segment was acknowledged stands in the header of
//! the next; all of that must be whole, and what lies behind it (the rest of a write that failed) is ignored.
//! A compacted segment was written anew, whole, without the points of deleted sweeps: all of it counts, whatever the
//! header of the next says of the segment that it was.
//! Values are bits, not text: a loss that is NaN comes back as it was.

use bytes::{Buf, BufMut, TryGetError};
use domain::metric::MetricPoint;
use domain::{Attempt, Timestamp, TrialId};
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 8] = b"LFMETRIC";
/// The latest format that this program knows.
pub(super) const FORMAT: u32 = COMPACTED;
/// The format of a segment as it is written at first.
const AS_WRITTEN: u32 = 1;
/// The format of a compacted segment.
const COMPACTED: u32 = 2;
const MARK: &[u8; 4] = b"LFGC";
/// Records of a frame of a compacted segment.
const GROUP: usize = 256;
/// Bytes of a segment's header.
pub(super) const HEADER: usize = 24;
/// Bytes of a frame before its payload.
pub(super) const FRAME_HEAD: usize = 12;

/// Points of one attempt that were sent together.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Record {
    pub(super) trial: TrialId,
    pub(super) attempt: Attempt,
    pub(super) points: Vec<MetricPoint>,
}

/// The path of a segment.
pub(super) fn path(dir: &Path, number: u64) -> PathBuf {
    dir.join(format!("segment-{number:08}.log"))
}

/// The header of a segment that follows one with `acknowledged` bytes.
pub(super) fn header(acknowledged: u64) -> Vec<u8> {
    header_of(AS_WRITTEN, acknowledged)
}

/// The header of a compacted segment that follows one with `acknowledged` bytes.
pub(super) fn compacted_header(acknowledged: u64) -> Vec<u8> {
    header_of(COMPACTED, acknowledged)
}

fn header_of(format: u32, acknowledged: u64) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.put_u32_le(format);
    bytes.put_u64_le(acknowledged);
    bytes.put_u32_le(crc32fast::hash(&bytes));
    bytes
}

/// A frame of records; none if it would be longer than its length field can say.
pub(super) fn frame(records: &[Record]) -> Option<Vec<u8>> {
    let mut bytes = vec![0; FRAME_HEAD];
    for record in records {
        put_record(&mut bytes, record)?;
    }
    let length = u32::try_from(bytes.len() - FRAME_HEAD).ok()?.to_le_bytes();
    let crc = checksum(length, &bytes[FRAME_HEAD..]).to_le_bytes();
    bytes[..FRAME_HEAD].copy_from_slice([*MARK, length, crc].as_flattened());
    Some(bytes)
}

/// A compacted segment of these records; none if a frame would be longer than its length field can say.
pub(super) fn compacted(acknowledged: u64, records: &[Record]) -> Option<Vec<u8>> {
    let mut bytes = compacted_header(acknowledged);
    for group in records.chunks(GROUP) {
        bytes.extend(frame(group)?);
    }
    Some(bytes)
}

/// Over the length too, so that no other length fits the payload.
fn checksum(length: [u8; 4], payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&length);
    hasher.update(payload);
    hasher.finalize()
}

fn put_record(bytes: &mut Vec<u8>, record: &Record) -> Option<()> {
    put_text(bytes, record.trial.as_str())?;
    bytes.put_u32_le(record.attempt.0);
    bytes.put_u32_le(u32::try_from(record.points.len()).ok()?);
    for point in &record.points {
        bytes.put_u64_le(point.step);
        bytes.put_u64_le(point.time.0);
        bytes.put_u32_le(u32::try_from(point.values.len()).ok()?);
        for (name, value) in &point.values {
            put_text(bytes, name)?;
            bytes.put_f64_le(*value);
        }
    }
    Some(())
}

fn put_text(bytes: &mut Vec<u8>, text: &str) -> Option<()> {
    bytes.put_u32_le(u32::try_from(text.len()).ok()?);
    bytes.put_slice(text.as_bytes());
    Some(())
}

/// The records of a whole frame's payload; none if they do not end where it does.
pub(super) fn records(mut payload: &[u8]) -> Option<Vec<Record>> {
    let mut records = Vec::new();
    while !payload.is_empty() {
        records.push(get_record(&mut payload).ok()?);
    }
    Some(records)
}

fn get_record(bytes: &mut &[u8]) -> Result<Record, TryGetError> {
    let (trial, attempt) = (TrialId::new(get_text(bytes)?), Attempt(bytes.try_get_u32_le()?));
    let mut points = Vec::new();
    for _ in 0..bytes.try_get_u32_le()? {
        let (step, time) = (bytes.try_get_u64_le()?, Timestamp(bytes.try_get_u64_le()?));
        let mut values = Vec::new();
        for _ in 0..bytes.try_get_u32_le()? {
            values.push((get_text(bytes)?, bytes.try_get_f64_le()?));
        }
        points.push(MetricPoint { step, time, values });
    }
    Ok(Record { trial, attempt, points })
}

fn get_text(bytes: &mut &[u8]) -> Result<String, TryGetError> {
    let length = bytes.try_get_u32_le()? as usize;
    let text = bytes.split_off(..length).ok_or(TryGetError { requested: length, available: bytes.len() })?;
    Ok(String::from_utf8_lossy(text).into_owned())
}

/// The payload of the frame that `bytes` begin with, if it is whole.
pub(super) fn whole_frame(bytes: &[u8]) -> Option<&[u8]> {
    let (mark, rest) = bytes.split_first_chunk::<4>()?;
    let (length, rest) = rest.split_first_chunk::<4>()?;
    let (crc, rest) = rest.split_first_chunk::<4>()?;
    let payload = rest.get(..u32::from_le_bytes(*length) as usize)?;
    let whole = mark == MARK && checksum(*length, payload) == u32::from_le_bytes(*crc);
    whole.then_some(payload)
}

/// Whether a whole frame begins anywhere in `bytes`.
pub(super) fn holds_whole_frame(bytes: &[u8]) -> bool {
    (0..bytes.len()).any(|at| bytes[at..].starts_with(MARK) && whole_frame(&bytes[at..]).is_some())
}

/// Why a segment's beginning is no header.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Headless {
    /// A later version of this program wrote it, in this format.
    Newer(u32),
    /// Its bytes are not all there, or not what they were.
    Damaged,
}

/// What a segment's header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Head {
    /// The acknowledged bytes of the segment before.
    pub(super) acknowledged_before: u64,
    /// Whether all of the segment counts.
    pub(super) compacted: bool,
}

/// Reads a segment's header from its first bytes.
pub(super) fn read_header(bytes: &[u8]) -> Result<Head, Headless> {
    let mut fields = bytes.get(MAGIC.len()..HEADER).ok_or(Headless::Damaged)?;
    let format = fields.get_u32_le();
    if bytes.starts_with(MAGIC) && format > FORMAT {
        return Err(Headless::Newer(format));
    }
    let acknowledged_before = fields.get_u64_le();
    let known = format == AS_WRITTEN || format == COMPACTED;
    if !known || bytes[..HEADER] != header_of(format, acknowledged_before) {
        return Err(Headless::Damaged);
    }
    Ok(Head { acknowledged_before, compacted: format == COMPACTED })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(trial: &str, values: &[f64]) -> Record {
        let values = values.iter().enumerate().map(|(i, v)| (format!("métrique/{i}"), *v)).collect();
        let point = MetricPoint { step: u64::MAX, time: Timestamp(1), values };
        let bare = MetricPoint { step: 0, time: Timestamp(0), values: vec![] };
        Record { trial: TrialId::new(trial), attempt: Attempt(7), points: vec![point, bare] }
    }

    #[test]
    fn a_frame_reads_back() {
        let first = record("sweep-00ff/1", &[1.5, f64::INFINITY, -0.0, f64::MIN_POSITIVE]);
        let second = Record { points: vec![], ..record("", &[]) };
        let mut bytes = frame(&[first.clone(), second.clone()]).unwrap();
        bytes.extend(b"what comes after");
        assert_eq!(records(whole_frame(&bytes).unwrap()).unwrap(), [first, second]);
        // A NaN is not equal to itself; its bits are.
        let nan = f64::from_bits(0x7ff8_0000_0000_1234);
        let bytes = frame(&[record("s/1", &[nan])]).unwrap();
        let back = records(whole_frame(&bytes).unwrap()).unwrap();
        assert_eq!(back[0].points[0].values[0].1.to_bits(), nan.to_bits());
    }

    #[test]
    fn no_bit_of_a_frame_can_change_and_no_byte_be_missing() {
        let bytes = frame(&[record("s/1", &[1.0])]).unwrap();
        assert!(whole_frame(&bytes).is_some());
        for length in 0..bytes.len() {
            assert!(whole_frame(&bytes[..length]).is_none(), "{length} bytes");
        }
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(whole_frame(&damaged).is_none(), "bit {bit}");
        }
    }

    #[test]
    fn headers() {
        let good = header(123);
        assert_eq!(good.len(), HEADER);
        let head = |compacted| Ok(Head { acknowledged_before: 123, compacted });
        assert_eq!((read_header(&good), read_header(&compacted_header(123))), (head(false), head(true)));
        for length in 0..HEADER {
            assert_eq!(read_header(&good[..length]), Err(Headless::Damaged));
        }
        for byte in 0..HEADER {
            let mut damaged = good.clone();
            damaged[byte] ^= 0xff;
            assert!(read_header(&damaged).is_err(), "byte {byte}");
        }
        let mut newer = good;
        newer[8] = 3;
        assert_eq!(read_header(&newer), Err(Headless::Newer(3)));
    }
}
