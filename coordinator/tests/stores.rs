//! What a coordinator keeps in an object store that it shares with others, over a real protocol that fails: metrics of
//! leaders that follow each other, and checkpoints. `artifacts.rs` and `history.rs` have what holds in any store.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use actor::Scope;
use bytes::Bytes;
use common::client;
use coordinator::artifacts::{ArtifactError, Artifacts, FileSpec, Part, Stored, Upload};
use coordinator::history::{History, HistoryError};
use coordinator::place::{Objects, PlaceError};
use coordinator::store::Store;
use domain::metric::MetricPoint;
use domain::{Attempt, SweepId, Timestamp, TrialId};
use futures::TryStreamExt;
use futures::future::join_all;
use object_store::ObjectStore;
use object_store::memory::InMemory;
use registry::{MemoryRegistry, RegistryError};
use sha2::{Digest, Sha256};
use std::sync::Arc;
use std::time::Duration;
use tests::s3::{Fault, S3};

/// A coordinator's history, as long as it lives.
struct Leader {
    history: History,
    scope: Scope,
}

/// What leaders share.
struct Fleet {
    objects: Arc<dyn ObjectStore>,
    registry: Arc<MemoryRegistry>,
}

impl Fleet {
    fn on(objects: Arc<dyn ObjectStore>) -> Self {
        Self { objects, registry: Arc::default() }
    }

    async fn elect(&self) -> Store {
        Store::lead(self.registry.clone(), "test").await.unwrap()
    }

    async fn open(&self, store: Store, gone: &[&str]) -> Result<Leader, HistoryError> {
        let (scope, gone) = (Scope::new(), gone.iter().map(|sweep| SweepId::new(*sweep)).collect());
        let history = History::open_in(self.objects.clone(), store, &gone, &scope).await?;
        Ok(Leader { history, scope })
    }

    async fn lead(&self) -> Leader {
        self.open(self.elect().await, &[]).await.unwrap()
    }
}

fn trial() -> TrialId {
    TrialId::new("sweep-00ff/1")
}

fn point(step: u64) -> MetricPoint {
    MetricPoint { step, time: Timestamp(step), values: vec![("loss".into(), 1.0 / step as f64)] }
}

impl Leader {
    async fn append(&self, step: u64) -> Result<(), HistoryError> {
        self.history.append(&trial(), Attempt(1), vec![point(step)]).await
    }

    /// The steps that are there.
    async fn steps(&self) -> Vec<u64> {
        let curve = self.history.curve(&trial(), &[(Attempt(1), 0)]).await.unwrap();
        curve.iter().map(|point| point.step).collect()
    }

    async fn end(self) {
        assert!(self.scope.finish(Duration::from_secs(60)).await);
    }
}

/// Runs a test on each store.
async fn each<T: Future<Output = ()>>(test: impl Fn(Fleet) -> T) {
    test(Fleet::on(Arc::new(InMemory::new()))).await;
    let s3 = S3::start();
    test(Fleet::on(client(&s3))).await;
}

#[tokio::test]
async fn points_come_back_once() {
    each(|fleet| async move {
        let first = fleet.lead().await;
        let answers = join_all((1..=300).map(|step| first.append(step))).await;
        assert!(answers.iter().all(Result::is_ok), "{answers:?}");
        first.append(7).await.unwrap();
        assert_eq!(first.steps().await, (1..=300).collect::<Vec<_>>());
        first.end().await;
        let second = fleet.lead().await;
        second.append(300).await.unwrap();
        second.append(301).await.unwrap();
        second.end().await;
        assert_eq!(fleet.lead().await.steps().await, (1..=301).collect::<Vec<_>>());
    })
    .await;
}

/// A registry that was restored from a copy gives a term that leaders had after it was copied.
#[tokio::test]
async fn a_term_that_is_given_again_goes_on_behind_its_objects() {
    each(|fleet| async move {
        let forgotten = fleet.lead().await;
        for step in 1..=10 {
            forgotten.append(step).await.unwrap();
        }
        forgotten.end().await;
        let restored = Fleet::on(fleet.objects.clone());
        let leader = restored.lead().await;
        leader.append(11).await.unwrap();
        leader.end().await;
        let later = restored.lead().await;
        later.append(12).await.unwrap();
        later.end().await;
        assert_eq!(restored.lead().await.steps().await, (1..=12).collect::<Vec<_>>());
    })
    .await;
}

#[tokio::test]
async fn the_points_of_deleted_sweeps_are_taken_out() {
    each(|fleet| async move {
        let leader = fleet.lead().await;
        let gone = TrialId::new("gone/1");
        leader.history.append(&gone, Attempt(1), vec![point(1)]).await.unwrap();
        // With one that stays in the same object.
        let both = futures::join!(
            leader.append(1),
            leader.history.append(&gone, Attempt(1), vec![point(2)]),
            leader.append(2)
        );
        assert!(both.0.is_ok() && both.1.is_ok() && both.2.is_ok());
        leader.end().await;
        let leader = fleet.open(fleet.elect().await, &["gone"]).await.unwrap();
        assert_eq!(leader.steps().await, [1, 2]);
        leader.end().await;
        // They are in no object any more: somebody who does not know that they are gone finds none.
        let leader = fleet.lead().await;
        assert_eq!(leader.history.curve(&gone, &[(Attempt(1), 0)]).await.unwrap(), []);
        assert_eq!(leader.steps().await, [1, 2]);
    })
    .await;
}

/// One object an append, for as many appends as make objects of objects.
#[tokio::test]
async fn small_objects_become_large_ones() {
    let s3 = S3::start();
    let fleet = Fleet::on(client(&s3));
    let leader = fleet.lead().await;
    for step in 1..=100 {
        leader.append(step).await.unwrap();
    }
    leader.end().await;
    let left = s3.keys("history/");
    assert!(left.len() < 40, "{left:?}");
    assert_eq!(fleet.lead().await.steps().await, (1..=100).collect::<Vec<_>>());
}

/// A leader that is replaced while it writes acknowledges nothing that its successor has not read, and nobody ever reads
/// what it writes then.
#[tokio::test]
async fn a_leader_that_was_replaced_acknowledges_nothing() {
    let s3 = S3::start();
    let fleet = Fleet::on(client(&s3));
    let first = fleet.lead().await;
    first.append(1).await.unwrap();
    // As it is stopped with SIGSTOP, the put on its way.
    let held = s3.hold("PUT", "history/");
    let (late, second) = futures::join!(first.append(2), async {
        held.arrived().await;
        let second = fleet.lead().await;
        assert_eq!(second.steps().await, [1]);
        held.release();
        second
    });
    assert!(matches!(late, Err(HistoryError::Leader(RegistryError::Fenced { .. }))), "{late:?}");
    assert!(matches!(first.append(3).await, Err(HistoryError::Leader(RegistryError::Fenced { .. }))));
    assert_eq!(first.steps().await, [1]);
    assert_eq!(s3.keys("history/").len(), 3, "it is there");
    second.append(4).await.unwrap();
    let third = fleet.lead().await;
    assert_eq!((third.steps().await, s3.keys("history/").len()), (vec![1, 4], 2));
    // Agents say it again.
    third.append(2).await.unwrap();
    assert_eq!(fleet.lead().await.steps().await, [1, 2, 4]);
}

/// Objects become one while another leader reads them.
#[tokio::test]
async fn objects_that_are_merged_are_found() {
    let s3 = S3::start();
    let fleet = Fleet::on(client(&s3));
    let first = fleet.lead().await;
    for step in 1..=31 {
        first.append(step).await.unwrap();
    }
    // The 32nd makes them many. It finds that it leads, and then stands still.
    let (deletes, reads) = (s3.hold("POST", "delete"), s3.hold("GET", "-0000000017.seg"));
    first.append(32).await.unwrap();
    // The first to read it is the one that merges.
    reads.arrived().await;
    reads.release();
    deletes.arrived().await;
    let reads = s3.hold("GET", "-0000000017.seg");
    let elected = fleet.elect().await;
    let (second, ()) = futures::join!(fleet.open(elected, &[]), async {
        reads.arrived().await;
        deletes.release();
        first.append(33).await.unwrap_err();
        assert_eq!(s3.keys("history/").len(), 2, "one of all, and one that is late");
        reads.release();
    });
    let second = second.unwrap();
    let found = second.steps().await;
    assert!(found.starts_with(&(1..=32).collect::<Vec<_>>()), "{found:?}");
    second.append(33).await.unwrap();
    second.end().await;
    first.end().await;
    assert_eq!(fleet.lead().await.steps().await, (1..=33).collect::<Vec<_>>());
}

/// A leader that was replaced while it made one object of many deletes none of them: its successor has not read that one.
#[tokio::test]
async fn a_leader_that_was_replaced_while_it_merged_deletes_nothing() {
    let s3 = S3::start();
    let fleet = Fleet::on(client(&s3));
    let first = fleet.lead().await;
    for step in 1..=31 {
        first.append(step).await.unwrap();
    }
    let merged = s3.hold("PUT", "-0000000033.seg");
    first.append(32).await.unwrap();
    merged.arrived().await;
    let second = fleet.lead().await;
    merged.release();
    // It comes behind the merge.
    first.append(33).await.unwrap_err();
    let all: Vec<_> = (1..=32).collect();
    assert_eq!(second.steps().await, all);
    assert_eq!(fleet.lead().await.steps().await, all, "nothing that was acknowledged is gone");
}

/// Whatever the store does to a put: nothing is acknowledged that is not there, and saying it again helps.
#[tokio::test]
async fn puts_that_fail() {
    // (fault, how often, whether the client tries again by itself)
    for (fault, times, helped) in [
        (Fault::Status(500), 2, true),
        (Fault::Status(503), 100, false),
        (Fault::Lost, 1, true),
        (Fault::Status(403), 1, false),
        // Whether it is there is not known: it is asked, and is not.
        (Fault::Status(409), 1, false),
    ] {
        let s3 = S3::start();
        let fleet = Fleet::on(client(&s3));
        let leader = fleet.lead().await;
        leader.append(1).await.unwrap();
        s3.fail("PUT", "history/", fault, times);
        let outcome = leader.append(2).await;
        assert_eq!(outcome.is_ok(), helped, "{fault:?}: {outcome:?}");
        s3.heal();
        if let Err(error) = outcome {
            assert!(error.is_storage() && error.to_string().contains("history/"), "{error}");
            assert!(!error.to_string().contains(tests::s3::KEY), "{error}");
            assert_eq!(leader.steps().await, [1], "{fault:?}");
            leader.append(2).await.unwrap();
        }
        leader.append(3).await.unwrap();
        assert_eq!(leader.steps().await, [1, 2, 3]);
        leader.end().await;
        assert_eq!(fleet.lead().await.steps().await, [1, 2, 3], "{fault:?}");
    }
}

/// An object that is not what was written is told by its name; one whose answer breaks off is read to its end.
#[tokio::test]
async fn reads_that_fail() {
    let s3 = S3::start();
    let fleet = Fleet::on(client(&s3));
    let leader = fleet.lead().await;
    leader.append(1).await.unwrap();
    leader.end().await;
    let key = s3.keys("history/").pop().unwrap();
    s3.fail("GET", &key, Fault::Corrupted, 1);
    let refusal = fleet.open(fleet.elect().await, &[]).await.err().unwrap();
    assert!(
        matches!(refusal, HistoryError::Damaged { .. }) && refusal.to_string().contains(&key),
        "{refusal}"
    );
    for fault in [Fault::Truncated, Fault::Status(500)] {
        s3.fail("GET", &key, fault, 1);
        assert_eq!(fleet.lead().await.steps().await, [1], "{fault:?}");
    }
    s3.fail("GET", "list-type=2", Fault::Status(500), 100);
    assert!(fleet.open(fleet.elect().await, &[]).await.err().unwrap().is_storage());
    s3.heal();
    // Somebody wrote over it.
    s3.set(&key, Some(b"LFMETRIC"));
    assert!(matches!(fleet.open(fleet.elect().await, &[]).await.err(), Some(HistoryError::Damaged { .. })));
}

/// A file and its bytes, as an agent announces them.
fn file(part: Part, name: &str, length: usize) -> (FileSpec, Vec<u8>) {
    let bytes: Vec<u8> = (0..length).map(|i| (i % 251) as u8).collect();
    let sha256 = Sha256::digest(&bytes).into();
    (FileSpec { part, name: name.into(), bytes: length as u64, sha256 }, bytes)
}

/// More bytes than go to the store in one piece.
const LONG: usize = 9_000_000;

fn files(length: usize) -> Vec<(FileSpec, Vec<u8>)> {
    vec![file(Part::Adapter, "adapter_model.safetensors", 1000), file(Part::Resume, "moments", length)]
}

fn begin(artifacts: &Artifacts, files: &[(FileSpec, Vec<u8>)]) -> Upload {
    let specs = files.iter().map(|(spec, _)| spec.clone()).collect();
    artifacts.begin(&trial(), Attempt(1), 10, specs).unwrap()
}

async fn send(artifacts: &Artifacts, files: &[(FileSpec, Vec<u8>)]) -> Result<Stored, ArtifactError> {
    let mut upload = begin(artifacts, files);
    for (_, bytes) in files {
        upload.write(bytes.clone().into()).await?;
    }
    upload.finish().await
}

async fn read(artifacts: &Artifacts, path: &str, name: &str) -> Result<Vec<u8>, ArtifactError> {
    let pieces: Vec<Bytes> = artifacts.read(path, name).await?.try_collect().await?;
    Ok(pieces.concat())
}

/// Each request of an upload fails once in each way: what is reported as stored is there, whole; what is not can be sent
/// again, by an agent that was not told that its trial is over; and nothing stays begun in the store.
#[tokio::test]
async fn uploads_that_fail() {
    for (method, key) in [
        ("POST", "uploads"),
        ("PUT", "partNumber=1"),
        ("PUT", "partNumber=2"),
        ("POST", "uploadId"),
        ("PUT", "manifest.json"),
    ] {
        let files = files(if key == "partNumber=2" { LONG } else { 5000 });
        for (fault, times) in
            [(Fault::Status(500), 1), (Fault::Lost, 1), (Fault::Status(404), 1), (Fault::Status(503), 9)]
        {
            let (s3, scope) = (S3::start(), Scope::new());
            let artifacts = Artifacts::on(client(&s3)).in_term(1, scope.clone());
            s3.fail(method, key, fault, times);
            let first = send(&artifacts, &files).await;
            if let Err(error) = &first {
                let told = matches!(error, ArtifactError::Store { .. });
                assert!(told, "{method} {key} {fault:?}: {error}");
                assert!(!error.to_string().contains(tests::s3::KEY), "{error}");
            }
            s3.heal();
            let stored =
                send(&artifacts, &files).await.unwrap_or_else(|e| panic!("{method} {key} {fault:?}: {e}"));
            for ((spec, bytes), path) in files.iter().zip([stored.adapter, stored.resume]) {
                let found = read(&artifacts, &path.unwrap(), &spec.name).await.unwrap();
                assert!(found == *bytes, "{method} {key} {fault:?}");
            }
            // An upload whose beginning was done and not answered is known to the store alone.
            let unknown = usize::from(method == "POST" && key == "uploads" && fault == Fault::Lost);
            assert!(s3.uploads() <= unknown, "{method} {key} {fault:?}: {}", s3.uploads());
        }
    }
}

/// Whoever sends an upload is gone in the middle of it.
#[tokio::test]
async fn an_upload_that_is_dropped_is_given_up() {
    let (s3, scope) = (S3::start(), Scope::new());
    let artifacts = Artifacts::on(client(&s3)).in_term(1, scope.clone());
    let files = files(LONG);
    let mut upload = begin(&artifacts, &files);
    upload.write(files[0].1.clone().into()).await.unwrap();
    assert!(s3.uploads() > 0);
    drop(upload);
    assert!(scope.finish(Duration::from_secs(60)).await);
    assert_eq!((s3.uploads(), s3.keys("")), (0, vec![]));
}

/// A slow store keeps whoever sends waiting; what has been taken is not piled up.
#[tokio::test]
async fn a_slow_store_is_waited_for() {
    let (s3, scope) = (S3::start(), Scope::new());
    let artifacts = Artifacts::on(client(&s3)).in_term(1, scope.clone());
    let (spec, bytes) = file(Part::Adapter, "a", LONG);
    let mut upload = artifacts.begin(&trial(), Attempt(1), 1, vec![spec]).unwrap();
    let bytes = Bytes::from(bytes);
    let held = s3.hold("PUT", "partNumber=1");
    // The piece is full: nothing more is taken until the store has it.
    tokio::select! {
        done = upload.write(bytes.clone()) => panic!("{done:?}"),
        () = held.arrived() => {}
    }
    held.release();
    drop(upload);
    scope.finish(Duration::from_secs(60)).await;
}

#[tokio::test]
async fn downloads_that_fail() {
    let (s3, scope) = (S3::start(), Scope::new());
    let artifacts = Artifacts::on(client(&s3)).in_term(1, scope);
    let mut files = files(LONG);
    let stored = send(&artifacts, &files).await.unwrap();
    let (path, (spec, bytes)) = (stored.resume.unwrap(), files.swap_remove(1));
    for fault in [Fault::Truncated, Fault::Status(500), Fault::Lost] {
        s3.fail("GET", "moments", fault, 1);
        assert!(read(&artifacts, &path, &spec.name).await.unwrap() == bytes, "{fault:?}");
    }
    s3.fail("GET", "moments", Fault::Corrupted, 1);
    let refusal = read(&artifacts, &path, &spec.name).await.unwrap_err();
    assert!(matches!(&refusal, ArtifactError::Damaged(at) if at.ends_with("/moments")), "{refusal}");
    s3.set(&format!("{path}/moments"), Some(&bytes[..100]));
    assert!(matches!(read(&artifacts, &path, &spec.name).await, Err(ArtifactError::Damaged(_))));
    s3.set(&format!("{path}/moments"), None);
    assert!(matches!(read(&artifacts, &path, &spec.name).await, Err(ArtifactError::NotFound(_))));
}

/// What a store is asked at the start, and what is said if it does not do it.
#[tokio::test]
async fn a_store_that_cannot_be_used_is_refused_in_words() {
    let s3 = S3::start();
    let objects = Objects::on(client(&s3), "s3://fleet");
    objects.probe().await.unwrap();
    assert_eq!(s3.keys(""), [""; 0]);
    for (method, key, status, what, remedy, settled) in [
        ("PUT", "probe/", 403, "writing failed", "credentials", true),
        ("PUT", "probe/", 404, "writing failed", "make the bucket", true),
        ("PUT", "probe/", 503, "writing failed", "can be reached", false),
        ("GET", "probe/", 403, "reading failed", "credentials", true),
        // object_store does not tell why a listing was refused.
        ("GET", "list-type=2", 403, "listing failed", "credentials", false),
        ("POST", "delete", 403, "deleting failed", "credentials", true),
    ] {
        s3.fail(method, key, Fault::Status(status), 9);
        let refusal = objects.probe().await.unwrap_err();
        let text = refusal.to_string();
        for part in ["`s3://fleet`", what, remedy] {
            assert!(text.contains(part), "{method} {key} {status}: {text}");
        }
        assert_eq!(refusal.is_settled(), settled, "{text}");
        assert!(![tests::s3::SECRET, tests::s3::KEY].iter().any(|secret| text.contains(secret)), "{text}");
        s3.heal();
    }
    s3.fail("GET", "probe/", Fault::Corrupted, 1);
    assert!(matches!(objects.probe().await, Err(PlaceError::Other(_))));
    s3.fail("PUT", "probe/", Fault::Replaced, 2);
    assert!(matches!(objects.probe().await, Err(PlaceError::Replaces(_))));
}
