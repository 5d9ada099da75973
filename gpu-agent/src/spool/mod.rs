//! What the coordinator has not acknowledged yet, on disk: one append-only file an assignment.
//!
//! A file is a sequence of records, each `length (u32) · CRC-32 of the body (u32) · body`; a body is
//! `kind (u8) · sequence (u64) · payload`, all numbers little-endian. The first record names the assignment.
//! A record that was cut off by a crash, and all behind it, is cut from the file when it is opened.
//!
//! Nothing is fsynced: the spool survives the agent, not the machine. It need not: a checkpoint is uploaded
//! only once everything before it is acknowledged, so that what a dead machine takes along lies behind the
//! checkpoint from which the trial goes on.
//!
//! A disk may stall, and a lease must outlast that: which assignments are here is said without waiting for the disk, and what
//! waits for it keeps no other task from running.

mod inspect;

pub use inspect::{Inspected, inspect};

use crate::Assignment;
use domain::crash;
use std::collections::{BTreeMap, VecDeque};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use telemetry::metrics::{self, Part};
use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::sync::watch;
use tokio::time::Instant;

/// Names the assignment; first, and only first.
const NAME: u8 = 0;
/// A message.
const MESSAGE: u8 = 1;
/// A message after which no other comes.
const LAST: u8 = 2;
/// Everything up to the sequence number is acknowledged.
const ACKNOWLEDGED: u8 = 3;
/// Bytes of a record before its payload.
const HEAD: usize = 4 + 4 + 1 + 8;
/// A file of acknowledged records is emptied above this size.
const COMPACT_BYTES: u64 = 256 * 1024;

/// What is not acknowledged. Clones share it.
#[derive(Debug, Clone)]
pub struct Spool(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    /// Held while the disk is written.
    files: Mutex<BTreeMap<Assignment, Entry>>,
    /// Which of them there are, and for how long each was held by a device, once none holds it. Never held while anything is
    /// waited for.
    listed: Mutex<BTreeMap<Assignment, Option<Duration>>>,
    changed: watch::Sender<()>,
    /// How much is not acknowledged, as the metrics have it.
    depth: Mutex<Part>,
}

/// A message's place in its file.
#[derive(Debug, Clone, Copy)]
struct Place {
    sequence: u64,
    offset: u64,
    bytes: usize,
    /// When it was spooled, or found.
    since: Instant,
}

#[derive(Debug)]
struct Entry {
    path: PathBuf,
    file: File,
    end: u64,
    pending: VecDeque<Place>,
    last_sequence: u64,
    acknowledged: u64,
    over: bool,
}

/// A message to send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unsent {
    /// Whose message it is.
    pub assignment: Assignment,
    /// Its number.
    pub sequence: u64,
    /// What was given to [`Spool::append`].
    pub payload: Vec<u8>,
}

impl Spool {
    /// Opens the spool in a folder, which is made if need be.
    ///
    /// # Errors
    /// The folder or a file in it cannot be read or written.
    pub fn open(dir: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(dir)?;
        let mut files = BTreeMap::new();
        for found in std::fs::read_dir(dir)? {
            let path = found?.path();
            match Entry::read(&path)? {
                Some((assignment, entry)) => drop(files.insert(assignment, entry)),
                None => std::fs::remove_file(&path)?,
            }
        }
        let changed = watch::Sender::new(());
        let depth = Mutex::new(metrics::SPOOL_MESSAGES.part(&[]));
        let listed = Mutex::new(files.keys().map(|assignment| (assignment.clone(), None)).collect());
        let spool =
            Self(Arc::new(Inner { dir: dir.into(), files: Mutex::new(files), listed, changed, depth }));
        spool.tell_change(spool.files());
        Ok(spool)
    }

    /// Something was added or went. The table is let go of only once it is counted, so that of two changes the later
    /// one counts.
    fn tell_change(&self, files: MutexGuard<'_, BTreeMap<Assignment, Entry>>) {
        let waiting: usize = files.values().map(|entry| entry.pending.len()).sum();
        self.0.depth.lock().unwrap_or_else(PoisonError::into_inner).set(waiting as i64);
        drop(files);
        self.0.changed.send_replace(());
    }

    fn files(&self) -> MutexGuard<'_, BTreeMap<Assignment, Entry>> {
        // A panic while the lock was held left at worst a record that is on disk and not yet in the table.
        match self.0.files.try_lock() {
            Ok(files) => files,
            Err(_) => blocking(|| self.0.files.lock().unwrap_or_else(PoisonError::into_inner)),
        }
    }

    fn listed(&self) -> MutexGuard<'_, BTreeMap<Assignment, Option<Duration>>> {
        self.0.listed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does what waits for the disk on a thread for that, so that whoever awaits it can do something else meanwhile.
    ///
    /// # Errors
    /// Those of the work.
    pub async fn aside<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let spool = self.clone();
        let done = tokio::task::spawn_blocking(move || work(&spool)).await;
        done.unwrap_or_else(|error| Err(io::Error::other(error)))
    }

    /// Keeps a message until it is acknowledged. `encode` gets its number: 1 for an assignment's first, then
    /// one more each. After a message that is `last`, none is taken any more.
    ///
    /// # Errors
    /// The disk is full or failing.
    pub fn append(
        &self,
        assignment: &Assignment,
        last: bool,
        encode: impl FnOnce(u64) -> Vec<u8>,
    ) -> io::Result<u64> {
        let mut files = self.files();
        let written = blocking(|| match files.get_mut(assignment) {
            Some(entry) => entry.append(last, encode),
            None => {
                let mut entry = Entry::create(&self.0.dir, assignment)?;
                let sequence = entry.append(last, encode)?;
                files.insert(assignment.clone(), entry);
                self.listed().insert(assignment.clone(), None);
                Ok(sequence)
            }
        });
        let sequence = written?;
        self.tell_change(files);
        Ok(sequence)
    }

    /// The next message to send: any whose number is above what `sent` says of its assignment, and at most
    /// `window` above what is acknowledged.
    ///
    /// # Errors
    /// The disk is failing.
    pub fn next(&self, sent: &BTreeMap<Assignment, u64>, window: u64) -> io::Result<Option<Unsent>> {
        for (assignment, entry) in self.files().iter_mut() {
            let after = sent.get(assignment).copied().unwrap_or(0);
            let Some(place) = entry.pending.iter().find(|p| p.sequence > after).copied() else { continue };
            if place.sequence <= entry.acknowledged + window {
                let payload = entry.payload(place)?;
                let assignment = assignment.clone();
                return Ok(Some(Unsent { assignment, sequence: place.sequence, payload }));
            }
        }
        Ok(None)
    }

    /// Forgets what is acknowledged. Returns whether that was all that the assignment had to say.
    ///
    /// # Errors
    /// The disk is failing.
    pub fn acknowledge(&self, assignment: &Assignment, sequence: u64) -> io::Result<bool> {
        let mut files = self.files();
        let Some(entry) = files.get_mut(assignment) else { return Ok(false) };
        entry.acknowledge(assignment, sequence)?;
        let done = entry.over && entry.pending.is_empty();
        if done && let Some(entry) = files.remove(assignment) {
            self.listed().remove(assignment);
            crash::point("spool/before-removal");
            std::fs::remove_file(entry.path)?;
        }
        self.tell_change(files);
        Ok(done)
    }

    /// Forgets an assignment that is not current any more. Returns whether its last word was here.
    pub fn forget(&self, assignment: &Assignment) -> bool {
        let mut files = self.files();
        let entry = files.remove(assignment);
        self.listed().remove(assignment);
        let over = entry.as_ref().is_some_and(|entry| entry.over);
        if let Some(entry) = entry
            && let Err(error) = std::fs::remove_file(&entry.path)
        {
            tracing::warn!(path = %entry.path.display(), %error, "a spool file could not be removed");
        }
        self.tell_change(files);
        over
    }

    /// Assignments that have something unacknowledged, or something yet to say. Waits for no disk.
    pub fn assignments(&self) -> Vec<Assignment> {
        self.listed().keys().cloned().collect()
    }

    /// The same, each with the time for which a device held it, as [`Spool::let_go`] said.
    pub fn holdings(&self) -> BTreeMap<Assignment, Option<Duration>> {
        self.listed().clone()
    }

    /// No device holds an assignment any more, and one did for so long.
    pub fn let_go(&self, assignment: &Assignment, after: Duration) {
        if let Some(held) = self.listed().get_mut(assignment) {
            *held = Some(after);
        }
    }

    /// Those that have something yet to say.
    pub fn unfinished(&self) -> Vec<Assignment> {
        self.files().iter().filter(|(_, entry)| !entry.over).map(|(a, _)| a.clone()).collect()
    }

    /// The number of an assignment's newest message; 0 if it has none.
    pub fn last_sequence(&self, assignment: &Assignment) -> u64 {
        self.files().get(assignment).map_or(0, |entry| entry.last_sequence)
    }

    /// Tells when a message is added, acknowledged or forgotten.
    pub fn changes(&self) -> watch::Receiver<()> {
        self.0.changed.subscribe()
    }

    /// Returns once an assignment's messages up to a number are acknowledged, or it is forgotten. Answers with whether
    /// it still has something to say: what was forgotten has not.
    pub async fn acknowledged(&self, assignment: &Assignment, sequence: u64) -> bool {
        self.when(|files| files.get(assignment).is_none_or(|e| e.acknowledged >= sequence)).await;
        self.files().contains_key(assignment)
    }

    /// Returns once nothing is left in the spool.
    pub async fn drained(&self) {
        self.when(BTreeMap::is_empty).await;
    }

    async fn when(&self, holds: impl Fn(&BTreeMap<Assignment, Entry>) -> bool) {
        // The sender lives as long as `self`, so that waiting for it cannot fail.
        let _ = self.changes().wait_for(|()| holds(&self.files())).await;
    }
}

impl Entry {
    fn create(dir: &Path, assignment: &Assignment) -> io::Result<Self> {
        let path = dir.join(assignment.file_name());
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&path)?;
        let mut entry = Self {
            path,
            file,
            end: 0,
            pending: VecDeque::new(),
            last_sequence: 0,
            acknowledged: 0,
            over: false,
        };
        entry.write(NAME, u64::from(assignment.attempt.0), assignment.trial.as_str().as_bytes())?;
        Ok(entry)
    }

    /// Reads a file; `None` if not even its name was written.
    fn read(path: &Path) -> io::Result<Option<(Assignment, Self)>> {
        let mut file = OpenOptions::new().read(true).write(true).open(path)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        let Some((NAME, attempt, trial)) = record(&bytes) else { return Ok(None) };
        let assignment = Assignment::new(String::from_utf8_lossy(trial), attempt as u32);
        let mut entry = Self {
            path: path.into(),
            file,
            end: (HEAD + trial.len()) as u64,
            pending: VecDeque::new(),
            last_sequence: 0,
            acknowledged: 0,
            over: false,
        };
        while let Some((kind, sequence, payload)) = record(&bytes[entry.end as usize..]) {
            entry.note(kind, sequence, payload.len());
        }
        if entry.end < bytes.len() as u64 {
            tracing::warn!(path = %path.display(), "the spool's torn end is cut off");
            entry.file.set_len(entry.end)?;
        }
        Ok(Some((assignment, entry)))
    }

    /// Enters a record that stands at the file's end into the table.
    fn note(&mut self, kind: u8, sequence: u64, bytes: usize) {
        let offset = self.end + HEAD as u64;
        self.end = offset + bytes as u64;
        if kind == ACKNOWLEDGED {
            self.take_acknowledgement(sequence);
        } else if kind != NAME {
            self.pending.push_back(Place { sequence, offset, bytes, since: Instant::now() });
            self.over |= kind == LAST;
        }
        if kind != NAME {
            self.last_sequence = self.last_sequence.max(sequence);
        }
    }

    fn take_acknowledgement(&mut self, sequence: u64) {
        self.acknowledged = self.acknowledged.max(sequence);
        while self.pending.front().is_some_and(|place| place.sequence <= sequence) {
            self.pending.pop_front();
        }
    }

    fn write(&mut self, kind: u8, sequence: u64, payload: &[u8]) -> io::Result<()> {
        let mut body = vec![kind];
        body.extend(sequence.to_le_bytes());
        body.extend(payload);
        let mut record = (body.len() as u32).to_le_bytes().to_vec();
        record.extend(crc32fast::hash(&body).to_le_bytes());
        record.extend(body);
        self.file.seek(SeekFrom::Start(self.end))?;
        let (first, rest) = record.split_at(HEAD / 2);
        crash::point("spool/before-write");
        self.file.write_all(first)?;
        crash::point("spool/half-written");
        self.file.write_all(rest)?;
        crash::point("spool/after-write");
        self.note(kind, sequence, payload.len());
        Ok(())
    }

    fn append(&mut self, last: bool, encode: impl FnOnce(u64) -> Vec<u8>) -> io::Result<u64> {
        if self.over {
            return Err(io::Error::other(format!("{}: a message behind the last", self.path.display())));
        }
        let sequence = self.last_sequence + 1;
        self.write(if last { LAST } else { MESSAGE }, sequence, &encode(sequence))?;
        Ok(sequence)
    }

    fn payload(&mut self, place: Place) -> io::Result<Vec<u8>> {
        let mut payload = vec![0; place.bytes];
        self.file.seek(SeekFrom::Start(place.offset))?;
        self.file.read_exact(&mut payload)?;
        Ok(payload)
    }

    fn acknowledge(&mut self, assignment: &Assignment, sequence: u64) -> io::Result<()> {
        let sequence = sequence.min(self.last_sequence);
        if sequence <= self.acknowledged {
            return Ok(());
        }
        for place in self.pending.iter().take_while(|place| place.sequence <= sequence) {
            metrics::ACKNOWLEDGEMENT_LAG.record(place.since.elapsed().as_secs_f64(), &[]);
        }
        if let Err(error) = self.write(ACKNOWLEDGED, sequence, &[]) {
            // A full disk is no reason to stop listening: what is not noted is sent again after a restart, and
            // dropped by the coordinator.
            tracing::warn!(path = %self.path.display(), %error, "an acknowledgement could not be noted");
            self.take_acknowledgement(sequence);
        }
        if self.pending.is_empty() && self.end > COMPACT_BYTES {
            // Over the old records, which takes no new space; what is left behind them is torn, and cut off.
            self.end = 0;
            self.write(NAME, u64::from(assignment.attempt.0), assignment.trial.as_str().as_bytes())?;
            self.write(ACKNOWLEDGED, sequence, &[])?;
            self.file.set_len(self.end)?;
        }
        Ok(())
    }
}

/// Does what may wait for the disk. Where other threads serve the runtime too, its tasks are theirs meanwhile.
fn blocking<T>(work: impl FnOnce() -> T) -> T {
    match Handle::try_current().map(|runtime| runtime.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(work),
        _ => work(),
    }
}

/// The record at the front of `bytes`: kind, sequence, payload. `None` if it is cut off or damaged.
fn record(bytes: &[u8]) -> Option<(u8, u64, &[u8])> {
    let (length, rest) = bytes.split_first_chunk::<4>()?;
    let (crc, rest) = rest.split_first_chunk::<4>()?;
    let body = rest.get(..u32::from_le_bytes(*length) as usize)?;
    if crc32fast::hash(body) != u32::from_le_bytes(*crc) {
        return None;
    }
    let (kind, rest) = body.split_first()?;
    let (sequence, payload) = rest.split_first_chunk::<8>()?;
    Some((*kind, u64::from_le_bytes(*sequence), payload))
}

#[cfg(test)]
mod tests;
