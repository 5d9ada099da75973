//! The writer on a disk that counts, waits and fails as told.

use super::*;
use crate::history::files::Files;
use crate::history::recovery::{self, End};
use crate::history::{Disk, History, RealDisk, SegmentFile};
use domain::metric::MetricPoint;
use domain::{Attempt, Timestamp, TrialId};
use futures::future::join_all;
use std::collections::HashSet;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

/// What the disk is told, and what it counted.
#[derive(Default)]
struct Orders {
    /// Finished syncs of files.
    syncs: AtomicU64,
    /// Operations (create, append, sync, directory sync) so far.
    operations: AtomicU64,
    /// The operations that fail, counted from 0; an append that fails has written half.
    failing: Vec<u64>,
    /// The first sync waits until this can be received from.
    gate: Mutex<Option<std::sync::mpsc::Receiver<()>>>,
}

impl Orders {
    fn operate(&self) -> io::Result<()> {
        let operation = self.operations.fetch_add(1, SeqCst);
        if self.failing.contains(&operation) { Err(io::Error::other("on purpose")) } else { Ok(()) }
    }
}

struct OrderedDisk(Arc<Orders>);
struct OrderedFile(Arc<Orders>, Box<dyn SegmentFile>);

impl Disk for OrderedDisk {
    fn create(&self, path: &Path) -> io::Result<Box<dyn SegmentFile>> {
        self.0.operate()?;
        Ok(Box::new(OrderedFile(self.0.clone(), RealDisk.create(path)?)))
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.0.operate()?;
        RealDisk.sync_dir(dir)
    }
}

impl SegmentFile for OrderedFile {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let done = self.0.operate();
        self.1.append(if done.is_ok() { bytes } else { &bytes[..bytes.len() / 2] })?;
        done
    }

    fn sync(&mut self) -> io::Result<()> {
        if let Some(gate) = self.0.gate.lock().unwrap().take() {
            gate.recv().unwrap();
        }
        self.0.operate()?;
        self.0.syncs.fetch_add(1, SeqCst);
        self.1.sync()
    }
}

fn point(step: u64) -> MetricPoint {
    MetricPoint { step, time: Timestamp(step), values: vec![("loss".into(), 1.0 / step as f64)] }
}

fn trial() -> TrialId {
    TrialId::new("sweep/1")
}

async fn append(history: &History, step: u64) -> Result<(), HistoryError> {
    history.append(&trial(), Attempt(1), vec![point(step)]).await
}

async fn steps(history: &History) -> Vec<u64> {
    let curve = history.curve(&trial(), &[(Attempt(1), 0)]).await.unwrap();
    curve.iter().map(|point| point.step).collect()
}

#[tokio::test]
async fn appends_that_wait_together_share_a_sync() {
    let dir = tempfile::tempdir().unwrap();
    let (open_gate, gate) = std::sync::mpsc::channel();
    let orders = Arc::new(Orders { gate: Mutex::new(Some(gate)), ..Orders::default() });
    let history =
        History::open_on(dir.path(), Box::new(OrderedDisk(orders.clone())), &HashSet::new()).unwrap();
    let appends = join_all((1..=20).map(|step| append(&history, step)));
    // All are in the queue when the gate opens.
    let (answers, ()) = futures::join!(appends, async { open_gate.send(()).unwrap() });
    assert!(answers.iter().all(Result::is_ok));
    // The header's; the frame of those that came while the thread woke up; the frame of all the others.
    assert!(orders.syncs.load(SeqCst) <= 3, "{} syncs", orders.syncs.load(SeqCst));
    assert_eq!(steps(&history).await, (1..=20).collect::<Vec<_>>());
}

#[tokio::test]
async fn points_that_are_kept_cost_no_sync() {
    let dir = tempfile::tempdir().unwrap();
    let orders = Arc::new(Orders::default());
    let history =
        History::open_on(dir.path(), Box::new(OrderedDisk(orders.clone())), &HashSet::new()).unwrap();
    append(&history, 1).await.unwrap();
    let syncs = orders.syncs.load(SeqCst);
    append(&history, 1).await.unwrap();
    assert_eq!(orders.syncs.load(SeqCst), syncs);
}

/// Whichever operation fails: that append is refused and not readable, the next works, and a reader of the
/// directory finds all that was acknowledged.
#[tokio::test]
async fn any_operation_may_fail() {
    // The first append is operations 0 to 5 (create, header, sync, directory, frame, sync), the second 6 and 7.
    for failing in
        [vec![0], vec![1], vec![2], vec![3], vec![4], vec![5], vec![6], vec![7], vec![7, 8], vec![6, 9, 14]]
    {
        let dir = tempfile::tempdir().unwrap();
        let orders = Arc::new(Orders { failing: failing.clone(), ..Orders::default() });
        let history = History::open_on(dir.path(), Box::new(OrderedDisk(orders)), &HashSet::new()).unwrap();
        let (mut kept, mut refused) = (Vec::new(), 0);
        for step in 1..=6 {
            match append(&history, step).await {
                Ok(()) => kept.push(step),
                Err(error) => {
                    assert!(error.to_string().contains("on purpose"), "{error}");
                    refused += 1;
                }
            }
            assert_eq!(steps(&history).await, kept, "{failing:?}");
        }
        assert_eq!(refused, failing.len(), "{failing:?}");
        drop(history);
        let reopened = History::open(dir.path()).unwrap();
        assert_eq!(steps(&reopened).await, kept, "{failing:?}");
    }
}

#[tokio::test]
async fn segments_roll() {
    let dir = tempfile::tempdir().unwrap();
    let mut files = Files::new(dir.path(), End { number: 0, length: 0 }, Box::new(RealDisk));
    files.roll = 150;
    for step in 1..=10 {
        let record = Record { trial: trial(), attempt: Attempt(1), points: vec![point(step)] };
        files.append(&segment::frame(&[record]).unwrap()).await.unwrap();
    }
    assert!(files.end.number > 3, "{:?}", files.end);
    let mut read = Vec::new();
    let end = recovery::read_all(dir.path(), |_, r| read.extend(r.points.iter().map(|p| p.step))).unwrap();
    assert_eq!((end, read), ((files.end, vec![]), (1..=10).collect()));
}
