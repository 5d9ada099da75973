//! Checkpoints in a local directory, in a store in memory and in one that speaks S3: all or nothing, and never replaced.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[cfg(feature = "object-stores")]
mod common;

use bytes::Bytes;
use coordinator::artifacts::{ArtifactError, Artifacts, FileSpec, Part, Stored};
use domain::trial::ItemScores;
use domain::{Attempt, SweepId, TrialId};
use futures::TryStreamExt;
use object_store::memory::InMemory;
use sha2::{Digest, Sha256};
use std::future::Future;
use std::path::Path;
use std::sync::Arc;

const ADAPTER: &str = "sweeps/quick-start-00ff/3/adapter-a2-s40";
const RESUME: &str = "sweeps/quick-start-00ff/3/resume-a2-s40";

/// Runs a test on an empty store of each kind.
async fn each<T: Future<Output = ()>>(test: impl Fn(Artifacts) -> T) {
    let dir = tempfile::tempdir().unwrap();
    test(Artifacts::local(dir.path()).unwrap()).await;
    test(Artifacts::on(Arc::new(InMemory::new()))).await;
    #[cfg(feature = "object-stores")]
    {
        let s3 = tests::s3::S3::start();
        test(Artifacts::on(common::client(&s3))).await;
        assert_eq!(s3.uploads(), 0, "every upload in parts is completed or given up");
    }
}

/// A file and its bytes.
type File = (FileSpec, Vec<u8>);

fn file(part: Part, name: &str, bytes: &[u8]) -> File {
    let sha256 = Sha256::digest(bytes).into();
    (FileSpec { part, name: name.into(), bytes: bytes.len() as u64, sha256 }, bytes.to_vec())
}

/// A checkpoint with an empty file, and one longer than what is held in memory.
fn checkpoint() -> Vec<File> {
    let long: Vec<u8> = (0..9_000_000_u32).map(|i| (i % 251) as u8).collect();
    vec![
        file(Part::Adapter, "adapter_model.safetensors", b"weights"),
        file(Part::Resume, "empty", b""),
        file(Part::Resume, "moments.safetensors", &long),
        file(Part::Adapter, "adapter_config.json", b"{}"),
        file(Part::Resume, "also_empty", b""),
    ]
}

/// Sends files in pieces of `piece` bytes, which do not care where one ends.
async fn send(artifacts: &Artifacts, files: &[File], piece: usize) -> Result<Stored, ArtifactError> {
    let specs = files.iter().map(|(spec, _)| spec.clone()).collect();
    let mut upload = artifacts.begin(&TrialId::new("quick-start-00ff/3"), Attempt(2), 40, specs)?;
    let bytes: Vec<u8> = files.iter().flat_map(|(_, bytes)| bytes.clone()).collect();
    for piece in bytes.chunks(piece) {
        upload.write(Bytes::copy_from_slice(piece)).await?;
    }
    upload.finish().await
}

async fn contents(artifacts: &Artifacts, path: &str, name: &str) -> Vec<u8> {
    let pieces = artifacts.read(path, name).await.unwrap();
    pieces.try_collect::<Vec<_>>().await.unwrap().concat()
}

async fn is_absent(artifacts: &Artifacts, path: &str) -> bool {
    matches!(artifacts.files(path).await, Err(ArtifactError::NotFound(_)))
}

/// The files under a directory, as paths from there.
fn tree(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap().map(Result::unwrap) {
        let name = entry.file_name().into_string().unwrap();
        if entry.file_type().unwrap().is_dir() {
            found.extend(tree(&entry.path()).into_iter().map(|below| format!("{name}/{below}")));
        } else {
            found.push(name);
        }
    }
    found.sort();
    found
}

#[tokio::test]
async fn a_checkpoint_reads_back() {
    each(|artifacts| async move {
        let stored = send(&artifacts, &checkpoint(), 1_000_003).await.unwrap();
        assert_eq!(
            stored,
            Stored { adapter: Some(ADAPTER.into()), resume: Some(RESUME.into()), items: None }
        );
        for (path, part) in [(ADAPTER, Part::Adapter), (RESUME, Part::Resume)] {
            let mut expected: Vec<File> =
                checkpoint().into_iter().filter(|(spec, _)| spec.part == part).collect();
            expected.sort_by(|a, b| a.0.name.cmp(&b.0.name));
            let specs: Vec<FileSpec> = expected.iter().map(|(spec, _)| spec.clone()).collect();
            assert_eq!(artifacts.files(path).await.unwrap(), specs);
            for (spec, bytes) in expected {
                assert!(contents(&artifacts, path, &spec.name).await == bytes, "{}", spec.name);
            }
        }
        for name in ["none", "manifest.json", "../adapter-a2-s40/adapter_config.json", ""] {
            assert!(matches!(artifacts.read(ADAPTER, name).await, Err(ArtifactError::NotFound(_))), "{name}");
        }
    })
    .await;
}

#[tokio::test]
async fn one_part_alone() {
    each(|artifacts| async move {
        let adapter = [file(Part::Adapter, "adapter_config.json", b"{}")];
        let stored = send(&artifacts, &adapter, 1).await.unwrap();
        assert_eq!(stored, Stored { adapter: Some(ADAPTER.into()), ..Stored::default() });
        assert!(is_absent(&artifacts, RESUME).await);
    })
    .await;
}

/// What single documents made of a trial lies beside its checkpoints, and stays as they do.
#[tokio::test]
async fn scores_of_documents_read_back() {
    each(|artifacts| async move {
        let items = |right: u8| {
            vec![ItemScores {
                metric: "eval/arc_easy/acc".into(),
                asked: "00".into(),
                scores: vec![right; 1000],
                base: vec![0; 1000],
                ..ItemScores::default()
            }]
        };
        let trial = TrialId::new("quick-start-00ff/3");
        let keep = |items: Vec<ItemScores>| {
            let (artifacts, trial) = (artifacts.clone(), trial.clone());
            async move { artifacts.keep_items(&trial, Attempt(2), 40, &items).await }
        };
        send(&artifacts, &checkpoint(), 1_000_000).await.unwrap();
        let path = keep(items(255)).await.unwrap();
        assert_eq!(path, "sweeps/quick-start-00ff/3/items-a2-s40");
        assert_eq!(keep(items(255)).await.unwrap(), path, "the same again");
        assert!(matches!(keep(items(0)).await, Err(ArtifactError::Exists(_))));
        assert_eq!(artifacts.items(&path).await.unwrap(), items(255));
        assert!(matches!(artifacts.items(ADAPTER).await, Err(ArtifactError::NotFound(_))));
        artifacts.delete_all_but(&[path.clone()].into()).await.unwrap();
        assert!(is_absent(&artifacts, ADAPTER).await);
        assert_eq!(artifacts.items(&path).await.unwrap(), items(255));
        artifacts.delete_sweep(&SweepId::new("quick-start-00ff")).await.unwrap();
        assert!(is_absent(&artifacts, &path).await);
    })
    .await;
}

#[tokio::test]
async fn the_same_again_succeeds_and_other_content_does_not() {
    each(|artifacts| async move {
        let first = send(&artifacts, &checkpoint(), 1_000_000).await.unwrap();
        assert_eq!(send(&artifacts, &checkpoint(), 777_777).await.unwrap(), first);
        let mut other = checkpoint();
        other[0] = file(Part::Adapter, "adapter_model.safetensors", b"changed");
        let refusal = send(&artifacts, &other, 1_000_000).await.unwrap_err();
        assert!(matches!(&refusal, ArtifactError::Exists(path) if path == ADAPTER), "{refusal}");
        assert_eq!(contents(&artifacts, ADAPTER, "adapter_model.safetensors").await, b"weights");
    })
    .await;
}

#[tokio::test]
async fn two_uploads_of_one_name_do_not_mix() {
    each(|artifacts| async move {
        let files = |text: &str| {
            vec![file(Part::Adapter, "a", text.as_bytes()), file(Part::Adapter, "b", text.as_bytes())]
        };
        let (one, two) = (files("one"), files("two"));
        let (first, second) = futures::join!(send(&artifacts, &one, 2), send(&artifacts, &two, 2));
        assert!(first.is_ok() != second.is_ok(), "{first:?} {second:?}");
        let kept = if first.is_ok() { "one" } else { "two" };
        for name in ["a", "b"] {
            assert_eq!(contents(&artifacts, ADAPTER, name).await, kept.as_bytes());
        }
    })
    .await;
}

#[tokio::test]
async fn what_is_not_as_announced_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let artifacts = Artifacts::local(dir.path()).unwrap();
    // (index of the announcement that is wrong, by how much its length is, what the refusal says)
    const ROWS: &[(usize, i64, &str)] = &[
        (0, 0, "`adapter_model.safetensors`: SHA-256 is "),
        (3, 0, "`adapter_config.json`: SHA-256 is "),
        (4, 0, "`also_empty`: SHA-256 is "),
        (3, 1, "`adapter_config.json` ended 1 bytes early"),
        (4, 5, "`also_empty` ended 5 bytes early"),
        (4, -1, "more bytes came"),
    ];
    for (index, longer, expected) in ROWS {
        let mut files = checkpoint();
        match longer {
            0 => files[*index].0.sha256[31] ^= 1,
            -1 => files[*index].1.push(0),
            _ => files[*index].0.bytes += *longer as u64,
        }
        let refusal = send(&artifacts, &files, 1_000_000).await.unwrap_err().to_string();
        assert!(refusal.starts_with(expected), "{expected}: {refusal}");
        assert!(is_absent(&artifacts, ADAPTER).await && is_absent(&artifacts, RESUME).await, "{expected}");
        assert_eq!(tree(dir.path()), [""; 0], "{expected}");
    }
    send(&artifacts, &checkpoint(), 1_000_000).await.unwrap();
}

#[tokio::test]
async fn an_upload_that_failed_takes_no_more() {
    each(|artifacts| async move {
        let specs = vec![file(Part::Adapter, "a", b"x").0];
        let mut upload = artifacts.begin(&TrialId::new("s/1"), Attempt(1), 1, specs).unwrap();
        assert!(matches!(upload.write(Bytes::from("y")).await, Err(ArtifactError::Checksum { .. })));
        assert!(matches!(upload.write(Bytes::from("x")).await, Err(ArtifactError::Failed)));
        assert!(matches!(upload.finish().await, Err(ArtifactError::Failed)));
    })
    .await;
}

#[tokio::test]
async fn names_that_lead_elsewhere_are_refused() {
    each(|artifacts| async move {
        for name in ["../x", "/etc/passwd", "", "a/b", "manifest.json"] {
            let refusal = send(&artifacts, &[file(Part::Adapter, name, b"x")], 1).await;
            assert!(matches!(refusal, Err(ArtifactError::Name(_))), "{name:?}");
        }
        for path in ["", "sweeps", "../..", "/"] {
            assert!(matches!(artifacts.files(path).await, Err(ArtifactError::Path(_))), "{path:?}");
            assert!(matches!(artifacts.delete(path).await, Err(ArtifactError::Path(_))), "{path:?}");
            assert_eq!(artifacts.local_path(path), None);
        }
    })
    .await;
}

#[tokio::test]
async fn deleting_takes_one_part() {
    each(|artifacts| async move {
        send(&artifacts, &checkpoint(), 1_000_000).await.unwrap();
        artifacts.delete(RESUME).await.unwrap();
        assert!(is_absent(&artifacts, RESUME).await);
        assert_eq!(artifacts.files(ADAPTER).await.unwrap().len(), 2);
        artifacts.delete(RESUME).await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn deleting_a_sweep_takes_no_other() {
    each(|artifacts| async move {
        send(&artifacts, &checkpoint(), 1_000_000).await.unwrap();
        artifacts.delete_sweep(&SweepId::new("quick-start-00f")).await.unwrap();
        assert_eq!(artifacts.files(ADAPTER).await.unwrap().len(), 2);
        artifacts.delete_sweep(&SweepId::new("quick-start-00ff")).await.unwrap();
        assert!(is_absent(&artifacts, ADAPTER).await && is_absent(&artifacts, RESUME).await);
    })
    .await;
}

#[tokio::test]
async fn only_parts_that_are_used_stay() {
    each(|artifacts| async move {
        send(&artifacts, &checkpoint(), 1_000_000).await.unwrap();
        let both = [ADAPTER, RESUME].map(String::from).into();
        artifacts.delete_all_but(&both).await.unwrap();
        assert_eq!(artifacts.files(RESUME).await.unwrap().len(), 3);
        artifacts.delete_all_but(&[ADAPTER.to_string()].into()).await.unwrap();
        assert!(is_absent(&artifacts, RESUME).await);
        assert_eq!(artifacts.files(ADAPTER).await.unwrap().len(), 2);
        artifacts.delete_all_but(&[].into()).await.unwrap();
        assert!(is_absent(&artifacts, ADAPTER).await);
        artifacts.delete_all_but(&[].into()).await.unwrap();
    })
    .await;
}

/// A coordinator that was replaced and its successor, in one store: neither writes to what is the other's, and what the
/// first removes as unused, however late, is nothing of the second's.
#[tokio::test]
async fn terms_keep_leaders_apart() {
    each(|artifacts| async move {
        let [first, second] = [3, 12].map(|term| artifacts.clone().in_term(term, actor::Scope::new()));
        let old = send(&first, &checkpoint(), 1_000_000).await.unwrap();
        let new = send(&second, &checkpoint(), 1_000_000).await.unwrap();
        assert_eq!((old.adapter.clone(), new.adapter.clone()), (at(ADAPTER, 3), at(ADAPTER, 12)));
        // The first has not heard yet that it is replaced, and knows of no record.
        first.delete_all_but(&[].into()).await.unwrap();
        for path in [&old.adapter, &new.adapter, &new.resume] {
            first.files(path.as_deref().unwrap()).await.unwrap();
        }
        second.delete_all_but(&new.adapter.iter().cloned().collect()).await.unwrap();
        assert!(is_absent(&second, old.adapter.as_deref().unwrap()).await);
        assert_eq!(second.files(new.resume.as_deref().unwrap()).await.unwrap().len(), 3, "of this term");
        // The next leader points at the adapter alone.
        let third = artifacts.in_term(13, actor::Scope::new());
        third.delete_all_but(&new.adapter.iter().cloned().collect()).await.unwrap();
        assert!(is_absent(&third, new.resume.as_deref().unwrap()).await);
        assert_eq!(third.files(new.adapter.as_deref().unwrap()).await.unwrap().len(), 2);
    })
    .await;
}

fn at(path: &str, term: u64) -> Option<String> {
    Some(format!("{path}-t{term}"))
}

/// A process ended between files and manifest.
#[tokio::test]
async fn what_is_left_without_a_manifest_goes() {
    use object_store::{ObjectStore, ObjectStoreExt};
    let store = Arc::new(InMemory::new());
    let artifacts = Artifacts::on(store.clone()).in_term(5, actor::Scope::new());
    for name in ["resume-a1-s1-t4/moments", "resume-a1-s1-t5/moments", "notes/kept"] {
        store.put(&format!("sweeps/s/1/{name}").as_str().into(), "x".into()).await.unwrap();
    }
    artifacts.delete_all_but(&[].into()).await.unwrap();
    let left: Vec<_> =
        store.list(None).map_ok(|object| object.location.to_string()).try_collect().await.unwrap();
    assert_eq!(left, ["sweeps/s/1/notes/kept", "sweeps/s/1/resume-a1-s1-t5/moments"]);
}

#[tokio::test]
async fn a_local_part_is_a_folder_with_its_files() {
    let dir = tempfile::tempdir().unwrap();
    let artifacts = Artifacts::local(&dir.path().join("deep/artifacts")).unwrap();
    send(&artifacts, &checkpoint(), 1_000_000).await.unwrap();
    let folder = artifacts.local_path(ADAPTER).unwrap();
    assert_eq!(tree(&folder), ["adapter_config.json", "adapter_model.safetensors", "manifest.json"]);
    artifacts.delete(ADAPTER).await.unwrap();
    assert!(!folder.exists());
    assert_eq!(Artifacts::on(Arc::new(InMemory::new())).local_path(ADAPTER), None);
}

#[tokio::test]
async fn opening_removes_what_a_crash_left() {
    let dir = tempfile::tempdir().unwrap();
    send(&Artifacts::local(dir.path()).unwrap(), &checkpoint(), 1_000_000).await.unwrap();
    let finished = tree(dir.path());
    for left in [format!("{ADAPTER}/adapter_config.json#1"), "sweeps/s/1/resume-a1-s1/moments".into()] {
        let path = dir.path().join(left);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, "half").unwrap();
    }
    let artifacts = Artifacts::local(dir.path()).unwrap();
    assert_eq!(tree(dir.path()), finished);
    assert_eq!(artifacts.files(ADAPTER).await.unwrap().len(), 2);
}

#[test]
fn a_root_that_cannot_be_made_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let error = Artifacts::local(&file).unwrap_err().to_string();
    assert!(error.contains(&file.display().to_string()), "{error}");
}
