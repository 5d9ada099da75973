//! Segments in a directory: one file is written on, with an fsync after each frame, until it is long enough.

use super::HistoryError;
use super::recovery::End;
use super::segment::{self, HEADER};
use super::writer::Segments;
use domain::crash;
use futures::future::{BoxFuture, FutureExt};
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};

/// Bytes after which a new segment is begun.
const ROLL: u64 = 64 * 1024 * 1024;

/// The file operations of a history; tests make them fail.
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

/// Where the next frame goes.
pub(super) struct Files {
    dir: PathBuf,
    disk: Box<dyn Disk>,
    /// The last segment, and how much of it is acknowledged.
    pub(super) end: End,
    /// The last segment, if it can be written on: this process made it and no write to it has failed.
    file: Option<Box<dyn SegmentFile>>,
    /// If this process made the last segment: how much of the one before is acknowledged.
    before: Option<u64>,
    /// Bytes after which a new segment is begun.
    pub(super) roll: u64,
}

impl Segments for Files {
    /// Writes before the first poll returns, and never waits: for a thread of its own.
    fn append<'a>(&'a mut self, frame: &'a [u8]) -> BoxFuture<'a, Result<(), HistoryError>> {
        async move { self.write(frame) }.boxed()
    }
}

impl Files {
    pub(super) fn new(dir: &Path, end: End, disk: Box<dyn Disk>) -> Self {
        Self { dir: dir.to_path_buf(), disk, end, file: None, before: None, roll: ROLL }
    }

    fn write(&mut self, frame: &[u8]) -> Result<(), HistoryError> {
        if self.end.length >= self.roll {
            self.file = None;
        }
        // It is put back only after success: what a file holds after a failed fsync, nobody knows.
        let mut file = match self.file.take() {
            Some(file) => file,
            None => self.begin_segment()?,
        };
        let path = segment::path(&self.dir, self.end.number);
        let write = file.append(frame).and_then(|()| {
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
