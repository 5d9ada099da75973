//! Segments in an object store: `history/<term>-<number>.seg`, created only, each a whole, compacted segment. A group
//! commit is one of them. While it is on its way the next group gathers, so that a slow store gets fewer and larger ones.
//!
//! **Who leads.** The term in a name is the fence of the leader that made it, so that two leaders never mean the same
//! object. A leader acknowledges a group once it is there *and* a fenced transaction has found, after that, that it still
//! leads. Whoever leads next lists the objects after its election, and so after that transaction: it reads everything
//! that was ever acknowledged. Then it closes the terms before its own: a fenced record says which object it found last
//! of each. What a leader puts after it was replaced is not acknowledged, is in no such record, and never counts; the
//! next leader deletes it.
//!
//! **Who deletes.** Many small objects become a larger one: it is created, a fenced transaction finds that its maker
//! still leads, and then the objects that it was made of, and only these, are deleted. So whenever an object is deleted,
//! however late, the one that all of its points are in was there before any other leader listed, and counts. Only the
//! points of deleted sweeps are left out on the way; their tombstones are fenced and never taken back. Objects that
//! vanish while they are read have gone into another one, which a second look finds. What a crash leaves between the
//! steps are doubles, which the index drops.

use super::segment::{self, Record};
use super::writer::Segments;
use super::{HistoryError, compaction, recovery};
use crate::error::CoordinatorError;
use crate::store::{Batch, Closed, Store};
use bytes::Bytes;
use domain::SweepId;
use futures::future::{BoxFuture, FutureExt};
use futures::stream::{self, StreamExt, TryStreamExt};
use object_store::path::Path as ObjectPath;
use object_store::{ObjectStore, ObjectStoreExt, PutMode};
use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io;
use std::path::Path;
use std::sync::Arc;

/// The first element of every name.
const ROOT: &str = "history";
/// Objects that are read at once.
const READS: usize = 8;
/// As many objects of one class of sizes become one.
const MANY: usize = 32;
/// The classes: below these bytes. What is larger stays as it is.
const CLASSES: [u64; 3] = [16 << 10, 256 << 10, 4 << 20];
/// Bytes that are merged in one go, so that this takes little memory.
const MERGED: u64 = 16 << 20;
/// Names that are tried for one segment. One may be taken by a put of this leader whose answer was lost.
const NAMES: usize = 3;

/// What objects there are, and where the next frame goes.
pub(super) struct Objects {
    store: Arc<dyn ObjectStore>,
    /// Says whether it still leads.
    leader: Store,
    /// The number of the next object of this term.
    next: u64,
    /// The objects that are known, with their bytes.
    known: BTreeMap<ObjectPath, u64>,
    gone: HashSet<SweepId>,
    /// How many objects there are before it merges again: more after it could not.
    merge_from: usize,
}

impl Segments for Objects {
    fn append<'a>(&'a mut self, frame: &'a [u8]) -> BoxFuture<'a, Result<(), HistoryError>> {
        async move {
            let bytes = [&segment::compacted_header(0)[..], frame].concat();
            self.create(bytes).await?;
            self.leader.still_leads().await.map_err(HistoryError::Leader)
        }
        .boxed()
    }

    fn tidy(&mut self) -> BoxFuture<'_, ()> {
        async move {
            if self.known.len() < self.merge_from {
                return;
            }
            match self.merge_many().await {
                Ok(()) => self.merge_from = 0,
                Err(error) => {
                    // Not after each group: it reads a lot.
                    self.merge_from = self.known.len() + MANY;
                    tracing::warn!(%error, "small objects of metrics stay for now");
                }
            }
        }
        .boxed()
    }
}

impl Objects {
    /// Reads every object, and hands on the records but those of `gone` sweeps, which are taken out of the objects too,
    /// where that is possible now. `leader` must lead already.
    pub(super) async fn open(
        store: Arc<dyn ObjectStore>,
        leader: Store,
        gone: &HashSet<SweepId>,
        mut each: impl FnMut(Record),
    ) -> Result<Self, HistoryError> {
        let mut with_gone = BTreeSet::new();
        let closed = leader.closed().await.map_err(unreadable)?;
        let found =
            read_all(&*store, closed.as_ref(), |object, record| match compaction::is_of(&record, gone) {
                true => drop(with_gone.insert(object.clone())),
                false => each(record),
            });
        let Found { known, late } = found.await?;
        close(&leader, &known).await?;
        delete(&*store, late).await;
        // There are none of its own term, unless the registry was restored from a copy and gives the term again.
        let own = known.keys().filter_map(numbers).filter(|(term, _)| *term == leader.term());
        let next = own.map(|(_, number)| number + 1).max().unwrap_or(1);
        let mut objects = Self { store, leader, next, known, gone: gone.clone(), merge_from: 0 };
        for object in with_gone {
            if let Err(error) = objects.merge(vec![object]).await {
                tracing::warn!(%error, "metrics of deleted sweeps stay for now");
            }
        }
        objects.tidy().await;
        Ok(objects)
    }

    /// Creates an object of this term.
    async fn create(&mut self, bytes: Vec<u8>) -> Result<(), HistoryError> {
        let bytes = Bytes::from(bytes);
        let mut taken = None;
        for _ in 0..NAMES {
            let object = name(self.leader.term(), self.next);
            match self.store.put_opts(&object, bytes.clone().into(), PutMode::Create.into()).await {
                Ok(_) => {
                    self.next += 1;
                    self.known.insert(object, bytes.len() as u64);
                    return Ok(());
                }
                // What it holds was not acknowledged, and is sent again or a double. Some stores say so, too, while an
                // earlier try is still on its way: whether that comes to be is not known then.
                Err(error @ object_store::Error::AlreadyExists { .. }) => {
                    match self.store.head(&object).await {
                        Ok(_) => {
                            self.next += 1;
                            taken = Some(failed(&object)(error));
                        }
                        Err(_) => return Err(failed(&object)(error)),
                    }
                }
                // Whether it is there is not known; if it is, the next try finds its name taken.
                Err(error) => return Err(failed(&object)(error)),
            }
        }
        Err(taken.unwrap_or(HistoryError::Closed))
    }

    /// Merges as long as there are many of one class.
    async fn merge_many(&mut self) -> Result<(), HistoryError> {
        while let Some(objects) = to_merge(&self.known) {
            self.merge(objects).await?;
        }
        Ok(())
    }

    /// Makes one object of these, and deletes them.
    async fn merge(&mut self, objects: Vec<ObjectPath>) -> Result<(), HistoryError> {
        let mut kept = Vec::new();
        let mut reads = read(&*self.store, objects.clone());
        while let Some((object, bytes)) = reads.try_next().await? {
            // One that is gone is in another, which its deleter made.
            let Some(bytes) = bytes else { continue };
            recovery::read_compacted(&shown(&object), &bytes, &mut |record| {
                if !compaction::is_of(&record, &self.gone) {
                    kept.push(record);
                }
            })?;
        }
        drop(reads);
        if !kept.is_empty() {
            let too_large = || io::Error::new(io::ErrorKind::InvalidData, "a frame above 4 GiB");
            let bytes = segment::compacted(0, &kept).ok_or_else(too_large);
            self.create(bytes.map_err(HistoryError::io(Path::new(ROOT)))?).await?;
        }
        self.leader.still_leads().await?;
        // Doubles from here on, whether or not they can be deleted now.
        self.known.retain(|object, _| !objects.contains(object));
        delete(&*self.store, objects).await;
        Ok(())
    }
}

/// Records which objects there are of the terms before the leader's.
async fn close(leader: &Store, known: &BTreeMap<ObjectPath, u64>) -> Result<(), HistoryError> {
    let mut closed = Closed { by: leader.term(), last: BTreeMap::new() };
    for (term, number) in known.keys().filter_map(numbers) {
        let last = closed.last.entry(term).or_default();
        *last = number.max(*last);
    }
    let mut batch = Batch::default();
    batch.closed(&closed);
    leader.commit(batch).await.map_err(unreadable)
}

/// Deletes objects that count no more. What cannot be deleted is found by the next leader.
async fn delete(store: &dyn ObjectStore, objects: Vec<ObjectPath>) {
    let mut deleted = store.delete_stream(stream::iter(objects.into_iter().map(Ok)).boxed());
    while let Some(done) = deleted.next().await {
        match done {
            Ok(_) | Err(object_store::Error::NotFound { .. }) => {}
            Err(error) => tracing::warn!(%error, "metrics that are elsewhere too stay for now"),
        }
    }
}

/// What the registry says when it cannot be asked.
fn unreadable(error: CoordinatorError) -> HistoryError {
    match error {
        CoordinatorError::Registry(error) => HistoryError::Leader(error),
        error => HistoryError::io(Path::new(ROOT))(io::Error::other(error)),
    }
}

/// The oldest objects of the first class that has many.
fn to_merge(known: &BTreeMap<ObjectPath, u64>) -> Option<Vec<ObjectPath>> {
    let mut from = 0;
    for below in CLASSES {
        let sizes = std::mem::replace(&mut from, below)..below;
        let class = known.iter().filter(move |(_, bytes)| sizes.contains(*bytes));
        if class.clone().count() < MANY {
            continue;
        }
        let mut sum = 0;
        let fitting = class.take_while(|(_, bytes)| {
            sum += **bytes;
            sum <= MERGED
        });
        return Some(fitting.map(|(object, _)| object.clone()).collect());
    }
    None
}

/// Objects that were found.
struct Found {
    /// Those that count, with their bytes.
    known: BTreeMap<ObjectPath, u64>,
    /// Those that leaders put which had been replaced.
    late: Vec<ObjectPath>,
}

/// Hands on every record that counts, with its object's name.
async fn read_all(
    store: &dyn ObjectStore,
    closed: Option<&Closed>,
    mut each: impl FnMut(&ObjectPath, Record),
) -> Result<Found, HistoryError> {
    let root = ObjectPath::from(ROOT);
    let (mut known, mut missing) = (BTreeMap::new(), BTreeSet::new());
    loop {
        let listed = store.list(Some(&root)).map_ok(|object| object.location).try_collect::<BTreeSet<_>>();
        // Others are none of ours.
        let ours =
            listed.await.map_err(failed(&root))?.into_iter().filter(|object| numbers(object).is_some());
        let (counting, late): (Vec<_>, Vec<_>) = ours.partition(|object| {
            let counts = |(term, number)| closed.is_none_or(|closed| closed.counts(term, number));
            numbers(object).is_some_and(counts)
        });
        let fresh = counting.into_iter().filter(|object| !known.contains_key(object)).collect();
        let mut vanished = false;
        let mut reads = read(store, fresh);
        while let Some((object, bytes)) = reads.try_next().await? {
            let Some(bytes) = bytes else {
                // Merged since it was listed. What is listed once more and is not there never will be.
                if !missing.insert(object.clone()) {
                    let what = io::Error::new(io::ErrorKind::NotFound, "it is listed, and is not there");
                    return Err(HistoryError::io(&shown(&object))(what));
                }
                vanished = true;
                continue;
            };
            recovery::read_compacted(&shown(&object), &bytes, &mut |record| each(&object, record))?;
            known.insert(object, bytes.len() as u64);
        }
        if !vanished {
            return Ok(Found { known, late });
        }
    }
}

/// The bytes of objects in their order; none of one that is not there.
fn read(
    store: &dyn ObjectStore,
    objects: Vec<ObjectPath>,
) -> impl stream::Stream<Item = Result<(ObjectPath, Option<Bytes>), HistoryError>> + Unpin {
    let read = move |object: ObjectPath| async move {
        let bytes = match store.get(&object).await {
            Ok(found) => found.bytes().await,
            Err(error) => Err(error),
        };
        match bytes {
            Ok(bytes) => Ok((object, Some(bytes))),
            Err(object_store::Error::NotFound { .. }) => Ok((object, None)),
            Err(error) => Err(failed(&object)(error)),
        }
    };
    stream::iter(objects).map(read).buffered(READS).boxed()
}

/// The name of a segment. Names sort by term and number.
fn name(term: u64, number: u64) -> ObjectPath {
    ObjectPath::from_iter([ROOT, &format!("{term:020}-{number:010}.seg")])
}

/// The term and the number in what [`name`] made; nothing of any other name.
fn numbers(object: &ObjectPath) -> Option<(u64, u64)> {
    let (term, number) = object.filename()?.strip_suffix(".seg")?.split_once('-')?;
    let numbers = (term.parse().ok()?, number.parse().ok()?);
    (name(numbers.0, numbers.1) == *object).then_some(numbers)
}

/// A name as errors show it.
fn shown(object: &ObjectPath) -> std::path::PathBuf {
    object.as_ref().into()
}

fn failed(object: &ObjectPath) -> impl FnOnce(object_store::Error) -> HistoryError {
    let path = shown(object);
    move |error| HistoryError::io(&path)(io::Error::other(error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn known(sizes: &[u64]) -> BTreeMap<ObjectPath, u64> {
        (1..).zip(sizes).map(|(number, bytes)| (name(7, number), *bytes)).collect()
    }

    #[test]
    fn names_sort_as_they_were_given_and_are_told_from_others() {
        let names = [name(1, 2), name(1, 10), name(2, 1), name(10, 1), name(u64::MAX, 9_999_999_999)];
        assert!(names.is_sorted() && names.iter().all(|name| numbers(name).is_some()), "{names:?}");
        for other in
            ["history/1-1.seg", "history/x.seg", "history", "history/a/00000000000000000001-0000000001.seg"]
        {
            assert_eq!(numbers(&ObjectPath::from(other)), None, "{other}");
        }
    }

    #[track_caller]
    fn check(sizes: &[u64], expected: Option<usize>) {
        assert_eq!(to_merge(&known(sizes)).map(|objects| objects.len()), expected, "{sizes:?}");
    }

    #[test]
    fn many_of_one_class_become_one() {
        check(&[], None);
        check(&[1; MANY - 1], None);
        check(&[1; MANY], Some(MANY));
        // Not of two classes, and not what is large enough.
        check(&[[1; MANY - 1], [16 << 10; MANY - 1]].concat(), None);
        check(&[4 << 20; 4 * MANY], None);
        // No more than may be held.
        check(&[1 << 20; MANY], Some(16));
    }

    proptest! {
        /// However sizes come: merging ends, and leaves few small objects.
        #[test]
        fn merging_ends_and_leaves_few(sizes in prop::collection::vec(1..6_000_000_u64, 0..300)) {
            let mut left = known(&sizes);
            let (mut next, total) = (1_000, sizes.iter().sum::<u64>());
            while let Some(objects) = to_merge(&left) {
                prop_assert!(objects.len() > 1);
                let bytes = objects.iter().filter_map(|object| left.remove(object)).sum();
                prop_assert!(bytes <= MERGED);
                left.insert(name(7, next), bytes);
                next += 1;
            }
            prop_assert_eq!(left.values().sum::<u64>(), total);
            let small = left.values().filter(|bytes| **bytes < CLASSES[2]).count();
            prop_assert!(small < CLASSES.len() * MANY);
        }
    }
}
