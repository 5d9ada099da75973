//! Uploaded data in a local directory and in a store in memory: whole or absent, gone on with after any cut, removed when
//! nobody names it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use bytes::Bytes;
use coordinator::blobs::{self, BlobError, Blobs, Retained};
use domain::data::{ContentHash, MOST_BYTES, Tree, TreeFile};
use domain::{Clock, SystemClock};
use futures::FutureExt;
use futures::TryStreamExt;
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::path::Path as ObjectPath;
use object_store::{ObjectStore, ObjectStoreExt};
use proptest::prelude::*;
use std::collections::BTreeSet;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

/// Bytes of a piece here.
const PIECE: u64 = 100;

/// Runs a test on an empty store of each kind.
async fn each<T: Future<Output = ()>>(test: impl Fn(Arc<dyn ObjectStore>) -> T) {
    let dir = tempfile::tempdir().unwrap();
    test(Arc::new(LocalFileSystem::new_with_prefix(dir.path()).unwrap())).await;
    test(Arc::new(InMemory::new())).await;
}

fn blobs(store: &Arc<dyn ObjectStore>) -> Blobs {
    Blobs::in_pieces(store.clone(), PIECE)
}

/// Bytes that are no others.
fn bytes(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i % 251) as u8).collect()
}

/// Uploads what is missing of a file, up to byte `until`, where the connection breaks, in messages of `message` bytes.
async fn upload(blobs: &Blobs, data: &[u8], until: usize, message: usize) -> Result<(), BlobError> {
    let file = ContentHash::of(data);
    let Some((_, offset)) = blobs.missing([file]).await?.pop() else { return Ok(()) };
    send(blobs, file, data, offset, until, message).await
}

async fn send(
    blobs: &Blobs,
    file: ContentHash,
    data: &[u8],
    offset: u64,
    until: usize,
    message: usize,
) -> Result<(), BlobError> {
    let Some(mut upload) = blobs.begin(file, data.len() as u64, offset).await? else {
        return Ok(());
    };
    let from = (offset as usize).min(until);
    for piece in data[from..until].chunks(message) {
        upload.write(Bytes::copy_from_slice(piece)).await?;
    }
    if until == data.len() { upload.finish().await } else { Ok(()) }
}

async fn read(blobs: &Blobs, file: ContentHash, offset: u64) -> Result<Vec<u8>, BlobError> {
    Ok(blobs.read(file, offset).await?.try_collect::<Vec<_>>().await?.concat())
}

async fn objects(store: &Arc<dyn ObjectStore>) -> Vec<String> {
    let objects: Vec<_> =
        store.list(None).map_ok(|object| object.location.to_string()).try_collect().await.unwrap();
    objects
}

fn tree(files: &[(&str, &[u8])]) -> Tree {
    let file = |(name, data): &(&str, &[u8])| TreeFile {
        name: (*name).into(),
        bytes: data.len() as u64,
        sha256: ContentHash::of(data),
    };
    Tree::new(files.iter().map(file).collect()).unwrap()
}

#[tokio::test]
async fn files_and_trees_read_back() {
    each(|store| async move {
        let blobs = blobs(&store);
        // None, less than a piece, exactly pieces, and more.
        for length in [0, 1, 99, 100, 101, 200, 250] {
            let data = bytes(length);
            let file = ContentHash::of(&data);
            assert!(matches!(read(&blobs, file, 0).await, Err(BlobError::NotFound(_))));
            upload(&blobs, &data, length, 37).await.unwrap();
            assert_eq!(blobs.missing([file, file]).await.unwrap(), []);
            for offset in [0, 1, 99, 100, 101, length].into_iter().filter(|offset| *offset <= length) {
                assert_eq!(
                    read(&blobs, file, offset as u64).await.unwrap(),
                    data[offset..],
                    "{length} {offset}"
                );
            }
            let behind = read(&blobs, file, length as u64 + 1).await;
            assert!(matches!(behind, Err(BlobError::Behind { .. })));
            // Again, it is there.
            assert!(blobs.begin(file, length as u64, 0).await.unwrap().is_none());
        }
        let (a, b, never) = (bytes(250), bytes(99), bytes(300));
        let of = tree(&[("rows.jsonl", &a), ("more.jsonl", &b)]);
        assert_eq!(blobs.commit(&of).await.unwrap(), of.id());
        assert_eq!(blobs.commit(&of).await.unwrap(), of.id());
        assert_eq!(blobs.tree(of.id()).await.unwrap(), of);
        let lacking = tree(&[("a", &a), ("never", &never)]);
        match blobs.commit(&lacking).await {
            Err(BlobError::Missing(names)) => assert_eq!(names, ["never"]),
            other => panic!("{other:?}"),
        }
        assert!(matches!(blobs.tree(lacking.id()).await, Err(BlobError::NotFound(_))));
        let wrong = TreeFile { name: "a".into(), bytes: 1, sha256: ContentHash::of(&a) };
        let wrong = blobs.commit(&Tree::new(vec![wrong]).unwrap()).await;
        assert!(matches!(wrong, Err(BlobError::Length { .. })));
    })
    .await;
}

#[tokio::test]
async fn what_is_not_what_it_says_never_exists() {
    each(|store| async move {
        let blobs = blobs(&store);
        let (data, other) = (bytes(250), vec![7; 250]);
        let file = ContentHash::of(&data);
        // Wrong bytes: found out at the end, and nothing of them stays.
        let wrong = send(&blobs, file, &other, 0, 250, 50).await;
        assert!(matches!(wrong, Err(BlobError::Checksum { found, .. }) if found == ContentHash::of(&other)));
        assert_eq!(objects(&store).await, Vec::<String>::new());
        // Wrong bytes that were cut off: the right ones cannot go on behind them, but once.
        send(&blobs, file, &other, 0, 230, 50).await.unwrap();
        assert_eq!(blobs.missing([file]).await.unwrap(), [(file, 200)]);
        assert!(matches!(upload(&blobs, &data, 250, 50).await, Err(BlobError::Checksum { .. })));
        upload(&blobs, &data, 250, 50).await.unwrap();
        assert_eq!(read(&blobs, file, 0).await.unwrap(), data);

        let next = bytes(300);
        let file = ContentHash::of(&next);
        // Of another announced length: what came of it gives way.
        send(&blobs, file, &next, 0, 290, 50).await.unwrap();
        let Some(mut short) = blobs.begin(file, 150, 0).await.unwrap() else { panic!() };
        let long = short.write(Bytes::from(next[..151].to_vec())).await;
        assert!(matches!(long, Err(BlobError::Length { bytes: 150, .. })));
        drop(short);
        let Some(mut short) = blobs.begin(file, 150, 0).await.unwrap() else { panic!() };
        assert!(matches!(short.finish().await, Err(BlobError::Short { missing: 150, .. })));
        drop(short);
        let behind = blobs.begin(file, 300, 100).await;
        assert!(matches!(behind, Err(BlobError::Behind { at: 0, offset: 100, .. })), "{behind:?}");
        assert!(matches!(blobs.begin(file, MOST_BYTES + 1, 0).await, Err(BlobError::Length { .. })));
        upload(&blobs, &next, 300, 300).await.unwrap();
        assert!(matches!(blobs.begin(file, 299, 0).await, Err(BlobError::Length { .. })));
    })
    .await;
}

/// A crash between the last piece and the word that all are there.
#[tokio::test]
async fn an_end_that_was_stored_is_stored_again() {
    each(|store| async move {
        let blobs = blobs(&store);
        for length in [200, 250] {
            let data = bytes(length);
            let file = ContentHash::of(&data);
            upload(&blobs, &data, length, 64).await.unwrap();
            store.delete(&ObjectPath::from(format!("data/sha256/{file}/whole"))).await.unwrap();
            assert_eq!(blobs.missing([file]).await.unwrap(), [(file, 200)]);
            upload(&blobs, &data, length, 64).await.unwrap();
            assert_eq!(read(&blobs, file, 0).await.unwrap(), data);
        }
    })
    .await;
}

#[tokio::test]
async fn two_who_upload_the_same_take_turns() {
    each(|store| async move {
        let blobs = blobs(&store);
        let data = bytes(450);
        let file = ContentHash::of(&data);
        let (one, other) = tokio::join!(upload(&blobs, &data, 450, 30), upload(&blobs, &data, 450, 70));
        one.unwrap();
        other.unwrap();
        assert_eq!(read(&blobs, file, 0).await.unwrap(), data);
        // Who waits goes on where the other was cut, and sends again what it did not know of.
        let data = bytes(451);
        let file = ContentHash::of(&data);
        let Some(mut first) = blobs.begin(file, 451, 0).await.unwrap() else { panic!() };
        first.write(Bytes::from(data[..330].to_vec())).await.unwrap();
        let mut second = Box::pin(send(&blobs, file, &data, 0, 451, 64));
        assert!(futures::poll!(&mut second).is_pending());
        drop(first);
        second.await.unwrap();
        assert_eq!(read(&blobs, file, 0).await.unwrap(), data);
    })
    .await;
}

#[tokio::test]
async fn what_nobody_names_goes_when_it_is_old() {
    each(|store| async move {
        let blobs = blobs(&store);
        let (shared, used, unused, cut) = (bytes(110), bytes(120), bytes(130), bytes(140));
        for data in [&shared, &used, &unused] {
            upload(&blobs, data, data.len(), 50).await.unwrap();
        }
        upload(&blobs, &cut, 139, 50).await.unwrap();
        let kept = tree(&[("a", &shared), ("b", &used)]);
        let gone = tree(&[("a", &shared), ("c", &unused)]);
        blobs.commit(&kept).await.unwrap();
        blobs.commit(&gone).await.unwrap();
        let named = BTreeSet::from([kept.id()]);
        let (now, hour) = (SystemClock::new().now(), Duration::from_secs(3600));
        let may = || std::future::ready(Ok::<_, BlobError>(())).boxed();
        let all = objects(&store).await;
        let left = |data: &[&Vec<u8>]| -> BTreeSet<ContentHash> {
            data.iter().map(|data| ContentHash::of(data)).collect()
        };
        let (files, removed) = (left(&[&shared, &used, &unused, &cut]), 0);
        let retained = blobs.retain(&BTreeSet::new(), now, hour, may).await.unwrap();
        assert_eq!(retained, Retained { files, removed }, "an upload may be under way");
        assert_eq!(objects(&store).await, all);
        let later = domain::Timestamp(now.0 + 2 * 3_600_000);
        let id = kept.id();
        let replaced = move || std::future::ready(Err(BlobError::NotFound(id))).boxed();
        assert!(blobs.retain(&named, later, hour, replaced).await.is_err());
        assert_eq!(objects(&store).await, all, "who does not lead any more removes nothing");
        let (files, removed) = (left(&[&shared, &used]), 1 + 3 + 1);
        assert_eq!(blobs.retain(&named, later, hour, may).await.unwrap(), Retained { files, removed });
        assert_eq!(blobs.tree(kept.id()).await.unwrap(), kept);
        for (data, is_there) in [(&shared, true), (&used, true), (&unused, false), (&cut, false)] {
            let file = ContentHash::of(data);
            let missing = blobs.missing([file]).await.unwrap();
            assert_eq!(missing, if is_there { vec![] } else { vec![(file, 0)] }, "{}", data.len());
        }
        assert!(matches!(blobs.tree(gone.id()).await, Err(BlobError::NotFound(_))));
        assert_eq!(blobs.retain(&named, later, hour, may).await.unwrap().removed, 0);
        // A tree that cannot be read might need any file.
        store.put(&ObjectPath::from(format!("data/trees/{}", kept.id())), "x".into()).await.unwrap();
        assert!(matches!(blobs.retain(&named, later, hour, may).await, Err(BlobError::Corrupt { .. })));
        assert_eq!(read(&blobs, ContentHash::of(&used), 0).await.unwrap(), used);
    })
    .await;
}

#[tokio::test]
async fn a_look_at_a_directory_finds_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(blobs::inspect(dir.path()).unwrap(), blobs::Inspected::default());
    let store: Arc<dyn ObjectStore> = Arc::new(LocalFileSystem::new_with_prefix(dir.path()).unwrap());
    let blobs = blobs(&store);
    let (sound, broken, cut) = (bytes(250), bytes(260), bytes(270));
    for data in [&sound, &broken] {
        upload(&blobs, data, data.len(), 50).await.unwrap();
    }
    upload(&blobs, &cut, 240, 50).await.unwrap();
    let all = tree(&[("a", &sound), ("b", &broken)]);
    blobs.commit(&all).await.unwrap();
    let path = format!("data/sha256/{}", ContentHash::of(&broken));
    std::fs::write(dir.path().join(&path).join("00000001"), "x").unwrap();
    let found = blobs::inspect(dir.path()).unwrap();
    assert_eq!(found.trees.into_values().collect::<Vec<_>>(), std::slice::from_ref(&all));
    assert_eq!(found.files.into_iter().collect::<Vec<_>>(), [(ContentHash::of(&sound), 250)]);
    assert_eq!(found.unfinished, [format!("data/sha256/{}", ContentHash::of(&cut))]);
    assert!(matches!(&found.problems[..], [(at, what)] if *at == path && what.contains("SHA-256")));
    std::fs::write(dir.path().join(format!("data/trees/{}", all.id())), "lorafleet tree 1\n").unwrap();
    assert_eq!(blobs::inspect(dir.path()).unwrap().problems.len(), 2);
}

proptest! {
    /// However often and wherever it is cut, in whatever messages it comes: the file is whole in the end, and no byte that
    /// was stored is asked for again.
    #[test]
    fn an_upload_goes_on_after_any_cut(
        length in 0_usize..1000,
        cuts in proptest::collection::vec((0.0..1.0, 1_usize..300), 0..6),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let store: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
            let (data, mut before) = (bytes(length), 0);
            let file = ContentHash::of(&data);
            for (cut, message) in cuts {
                let until = (length as f64 * cut) as usize;
                if until < length {
                    upload(&blobs(&store), &data, until, message).await.unwrap();
                    let offset = blobs(&store).missing([file]).await.unwrap()[0].1;
                    assert!(offset >= before && offset % PIECE == 0 && offset <= length as u64);
                    assert!((until as u64).saturating_sub(offset) <= PIECE, "a piece is lost at most");
                    before = offset;
                }
            }
            upload(&blobs(&store), &data, length, 77).await.unwrap();
            assert_eq!(read(&blobs(&store), file, 0).await.unwrap(), data);
        });
    }
}

/// What lost a part of itself is mended by uploading it again.
#[tokio::test]
async fn a_file_that_lost_a_piece_is_not_there() {
    each(|store| async move {
        let (blobs, data) = (blobs(&store), bytes(130));
        let file = ContentHash::of(&data);
        for lost in ["00000000", "00000001"] {
            upload(&blobs, &data, data.len(), 50).await.unwrap();
            assert_eq!(blobs.missing([file]).await.unwrap(), []);
            let path = ObjectPath::from(format!("data/sha256/{file}/{lost}"));
            store.delete(&path).await.unwrap();
            assert_eq!(blobs.missing([file]).await.unwrap().len(), 1, "{lost}");
            upload(&blobs, &data, data.len(), 50).await.unwrap();
            assert_eq!(read(&blobs, file, 0).await.unwrap(), data);
        }
    })
    .await;
}
