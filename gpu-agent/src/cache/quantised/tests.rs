//! Room for bases in 4 bits, whatever becomes of those who write them.

use super::*;
use crate::transfer::TransferError;
use bytes::Bytes;
use domain::data::Reference;
use domain::{Clock, Timestamp};
use futures::StreamExt;
use futures::stream::BoxStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Each look at it is a millisecond later.
#[derive(Default)]
struct Ticking(AtomicU64);

impl Clock for Ticking {
    fn now(&self) -> Timestamp {
        Timestamp(self.0.fetch_add(1, Ordering::Relaxed))
    }

    fn monotonic(&self) -> Duration {
        Duration::ZERO
    }
}

fn open(dir: &Path, limit: u64) -> Cache {
    Cache::open(dir, limit, Arc::new(Ticking::default())).unwrap()
}

fn key(name: &str) -> ContentHash {
    ContentHash::of(name.as_bytes())
}

/// Writes a base of 40 bytes, as an engine does.
fn write(room: &Room) {
    let (root, draft) = (room.cache.root(), room.draft());
    std::fs::write(draft.data(root).join("config.json"), [b'c'; 10]).unwrap();
    std::fs::write(draft.data(root).join("model.safetensors"), [b'm'; 30]).unwrap();
    draft.publish(root).unwrap();
}

fn kept(cache: &Cache, key: ContentHash) -> bool {
    whole(cache.root(), key).unwrap().is_some()
}

/// How many folders lie in the cache.
fn folders(cache: &Cache) -> usize {
    std::fs::read_dir(cache.root()).unwrap().count()
}

/// Uploaded data of one file, of so many bytes.
struct Uploaded(usize);

impl Uploaded {
    fn tree(&self) -> Tree {
        let sha256 = ContentHash::of(&vec![b'u'; self.0]);
        Tree::new(vec![TreeFile { name: "rows.jsonl".into(), bytes: self.0 as u64, sha256 }]).unwrap()
    }

    fn reference(&self) -> Reference {
        Reference { tree: self.tree().id(), name: "rows.jsonl".into(), is_directory: false }
    }
}

impl super::super::Source for Uploaded {
    async fn tree(&self, _: ContentHash) -> Result<Option<Tree>, TransferError> {
        Ok(Some(Uploaded::tree(self)))
    }

    async fn file(
        &self,
        _: ContentHash,
        offset: u64,
    ) -> Result<BoxStream<'static, Result<Bytes, TransferError>>, TransferError> {
        let bytes = Bytes::from(vec![b'u'; self.0 - offset as usize]);
        Ok(futures::stream::iter([Ok(bytes)]).boxed())
    }
}

#[test]
fn what_is_kept_is_there_until_it_is_damaged() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 100);
    assert!(!kept(&cache, key("a")));
    let room = cache.room(key("a"), 50).unwrap();
    assert!(cache.room(key("a"), 50).is_none(), "another engine writes it");
    assert!(!kept(&cache, key("a")), "it is not whole");
    write(&room);
    drop(room);
    assert!(kept(&cache, key("a")) && cache.room(key("a"), 50).is_none(), "it is there");
    // Also for the next agent.
    let cache = open(dir.path(), 100);
    assert!(kept(&cache, key("a")) && cache.room(key("a"), 50).is_none());
    for damaged in [&[b'x'; 30][..], &[b'm'; 29]] {
        let data = whole(cache.root(), key("a")).unwrap().unwrap();
        std::fs::write(data.join("model.safetensors"), damaged).unwrap();
        assert!(!kept(&cache, key("a")), "it is compared with its hash");
        let room = cache.room(key("a"), 50).unwrap();
        write(&room);
        assert!(kept(&cache, key("a")));
        drop(room);
    }
    spoil(cache.root(), key("a"));
    assert!(!kept(&cache, key("a")));
}

#[test]
fn what_is_never_whole_is_never_used() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 100);
    // Its process was killed; it gave up; another base was loaded, and then it comes to its end all the same.
    let room = cache.room(key("a"), 60).unwrap();
    std::fs::write(room.draft().data(cache.root()).join("config.json"), "{}").unwrap();
    std::mem::forget(room);
    let cache = open(dir.path(), 100);
    assert!(!kept(&cache, key("a")) && folders(&cache) == 0, "the next agent removes it");
    let room = cache.room(key("a"), 60).unwrap();
    room.draft().give_up(cache.root());
    assert!(cache.room(key("b"), 60).is_some(), "its room is free at once");
    drop(room);
    let late = cache.room(key("a"), 60).unwrap().draft();
    assert!(late.publish(cache.root()).is_err() && !kept(&cache, key("a")));
    drop(cache.room(key("b"), 100).expect("nothing else takes room"));
    assert_eq!(folders(&cache), 0);
}

/// Devices of one agent quantise the same base one after the other, and what a device says of its own is heard late.
#[test]
fn no_writer_touches_what_another_writes() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 100);
    // The first is whole and removed for another base; its device still has it in memory.
    let first = cache.room(key("a"), 60).unwrap();
    write(&first);
    drop(cache.room(key("b"), 60).unwrap());
    assert!(!kept(&cache, key("a")));
    // The second was given up while it was written; its thread comes to its end.
    let second = cache.room(key("a"), 60).unwrap().draft();
    let third = cache.room(key("a"), 60).unwrap();
    let half = third.draft().data(cache.root()).join("config.json");
    std::fs::write(&half, "{").unwrap();
    for (what, draft) in [("the first", first.draft()), ("the second", second)] {
        assert!(!draft.data(cache.root()).exists(), "{what} has nowhere to write");
        assert!(draft.publish(cache.root()).is_err(), "{what} has nothing to show");
        draft.give_up(cache.root());
    }
    drop(first);
    assert!(half.exists() && cache.room(key("a"), 60).is_none(), "the third is still written");
    write(&third);
    drop(third);
    assert!(kept(&cache, key("a")) && folders(&cache) == 1);
}

#[test]
fn they_share_one_limit_with_uploaded_data() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 100);
    let (small, large) = (Uploaded(40), Uploaded(90));
    // Entered for this alone, so that each call below returns once all that it removes is gone.
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let get = |data: &Uploaded| runtime.block_on(cache.get(data, &data.reference())).unwrap();
    let in_use = get(&small);
    assert!(cache.room(key("a"), 61).is_none(), "a trial uses the rest");
    drop(cache.room(key("a"), 60).unwrap());
    let room = cache.room(key("a"), 60).unwrap();
    // What is being written is not removed, and nothing is promised twice.
    assert!(cache.room(key("b"), 1).is_none());
    write(&room);
    drop((room, in_use));
    cache.used(key("a"));
    // The rows were not used for longest.
    let room = cache.room(key("b"), 40).unwrap();
    write(&room);
    drop(room);
    assert!(kept(&cache, key("a")) && kept(&cache, key("b")) && folders(&cache) == 2);
    // A trial comes before any base in 4 bits.
    let in_use = get(&large);
    assert!(!kept(&cache, key("a")) && !kept(&cache, key("b")) && folders(&cache) == 1);
    drop(in_use);
    let cache = open(dir.path(), 10);
    assert!(folders(&cache) == 0 && cache.room(key("a"), 11).is_none());
}

/// Where others would wait for it, another thread removes it.
#[tokio::test]
async fn what_a_runtime_gives_up_is_removed() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 100);
    drop(cache.room(key("a"), 60).unwrap());
    assert!(cache.room(key("a"), 100).is_some(), "its room is free at once");
    while folders(&cache) > 0 {
        tokio::task::yield_now().await;
    }
}

#[test]
fn what_is_read_stays_longer() {
    let dir = tempfile::tempdir().unwrap();
    let cache = open(dir.path(), 100);
    for name in ["a", "b"] {
        let room = cache.room(key(name), 45).unwrap();
        write(&room);
        drop(room);
    }
    cache.used(key("a"));
    let _room = cache.room(key("c"), 45).unwrap();
    assert!(kept(&cache, key("a")) && !kept(&cache, key("b")));
}
