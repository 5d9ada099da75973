//! The group commit: what waits becomes one frame, one write and one fsync.

use super::HistoryError;
use super::index::Index;
use super::recovery::End;
use super::segment::{self, HEADER, Record};
use domain::crash;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use tokio::sync::{mpsc, oneshot};

/// The most appends in one frame, so that the first does not wait without bound for the last.
const GROUP: usize = 256;

/// Bytes after which a new segment is begun.
const ROLL: u64 = 64 * 1024 * 1024;

/// Points to keep, and where to say that they are kept.
#[derive(Debug)]
pub(super) struct Append {
    pub(super) record: Record,
    pub(super) reply: oneshot::Sender<Result<(), HistoryError>>,
}

/// The file operations of the writer; tests make them fail.
pub trait Disk: Send {
    /// Makes an empty file, in the place of one that may be there.
    fn create(&self, path: &Path) -> io::Result<Box<dyn SegmentFile>>;
    /// Brings a directory's entries to the disk.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;
}

/// A file that is only written at its end.
pub trait SegmentFile: Send {
    /// Writes these bytes behind what is there.
    fn append(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Brings all that was appended to the disk.
    fn sync(&mut self) -> io::Result<()>;
}

/// The operating system's.
#[derive(Debug)]
pub struct RealDisk;

impl Disk for RealDisk {
    fn create(&self, path: &Path) -> io::Result<Box<dyn SegmentFile>> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        Ok(Box::new(OpenOptions::new().write(true).create_new(true).open(path)?))
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        File::open(dir)?.sync_all()
    }
}

impl SegmentFile for File {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let (first, rest) = bytes.split_at(bytes.len() / 2);
        self.write_all(first)?;
        crash::point("history/half-written");
        self.write_all(rest)
    }

    fn sync(&mut self) -> io::Result<()> {
        self.sync_data()
    }
}

/// The state of the writing thread.
pub(super) struct Writer {
    dir: PathBuf,
    disk: Box<dyn Disk>,
    index: Arc<RwLock<Index>>,
    /// The last segment, and how much of it is acknowledged.
    end: End,
    /// The last segment, if it can be written on: this process made it and no write to it has failed.
    file: Option<Box<dyn SegmentFile>>,
    /// If this process made the last segment: how much of the one before is acknowledged.
    before: Option<u64>,
    /// Bytes after which a new segment is begun.
    roll: u64,
}

impl Writer {
    pub(super) fn new(dir: &Path, end: End, disk: Box<dyn Disk>, index: Arc<RwLock<Index>>) -> Self {
        Self { dir: dir.to_path_buf(), disk, index, end, file: None, before: None, roll: ROLL }
    }

    /// Serves appends until every sender is gone.
    pub(super) fn run(&mut self, mut inbox: mpsc::Receiver<Append>) {
        let mut group = Vec::with_capacity(GROUP);
        while inbox.blocking_recv_many(&mut group, GROUP) > 0 {
            let (records, replies): (Vec<_>, Vec<_>) = group.drain(..).map(|a| (a.record, a.reply)).unzip();
            let outcome = self.keep(records);
            for reply in replies {
                // Whoever asked may be gone; then nobody needs the answer.
                let _ = reply.send(outcome.clone());
            }
        }
    }

    /// Makes new points durable, then readable.
    pub(super) fn keep(&mut self, mut records: Vec<Record>) -> Result<(), HistoryError> {
        self.drop_known(&mut records);
        if records.is_empty() {
            return Ok(());
        }
        self.write(&records)?;
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        records.into_iter().for_each(|record| index.insert(record));
        Ok(())
    }

    /// Drops points that are kept already. Two of one group may still be the same; the index takes the first,
    /// now and when it is read back.
    fn drop_known(&self, records: &mut Vec<Record>) {
        let index = self.index.read().unwrap_or_else(PoisonError::into_inner);
        for Record { trial, attempt, points } in records.iter_mut() {
            points.retain(|point| !index.contains(trial, *attempt, point.step));
        }
        records.retain(|record| !record.points.is_empty());
    }

    fn write(&mut self, records: &[Record]) -> Result<(), HistoryError> {
        let too_large = || io::Error::new(ErrorKind::InvalidInput, "more than 4 GiB of points at once");
        let frame = segment::frame(records).ok_or_else(too_large).map_err(HistoryError::io(&self.dir))?;
        if self.end.length >= self.roll {
            self.file = None;
        }
        // It is put back only after success: what a file holds after a failed fsync, nobody knows.
        let mut file = match self.file.take() {
            Some(file) => file,
            None => self.begin_segment()?,
        };
        let path = segment::path(&self.dir, self.end.number);
        let write = file.append(&frame).and_then(|()| {
            crash::point("history/before-sync");
            file.sync()
        });
        write.map_err(HistoryError::io(&path))?;
        crash::point("history/after-sync");
        self.end.length += frame.len() as u64;
        self.file = Some(file);
        Ok(())
    }

    /// Makes the next segment, durably. After an error the next call makes it anew.
    fn begin_segment(&mut self) -> Result<Box<dyn SegmentFile>, HistoryError> {
        // One of this process in which nothing came to be acknowledged gives way, so that a disk that stays full
        // does not fill a directory with beginnings.
        let empty = self.before.filter(|_| self.end.length == HEADER as u64);
        let (number, before) = match empty {
            Some(before) => (self.end.number, before),
            None => (self.end.number + 1, self.end.length),
        };
        let path = segment::path(&self.dir, number);
        let mut file = self.disk.create(&path).map_err(HistoryError::io(&path))?;
        crash::point("history/segment-made");
        let header = segment::header(before);
        file.append(&header).and_then(|()| file.sync()).map_err(HistoryError::io(&path))?;
        crash::point("history/segment-begun");
        self.disk.sync_dir(&self.dir).map_err(HistoryError::io(&self.dir))?;
        self.end = End { number, length: HEADER as u64 };
        self.before = Some(before);
        Ok(file)
    }
}

#[cfg(test)]
mod tests;
