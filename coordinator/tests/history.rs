//! The metric history over crashes: what is cut, what is refused, what is kept.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use coordinator::history::{History, HistoryError};
use domain::metric::MetricPoint;
use domain::{Attempt, SweepId, Timestamp, TrialId};
use futures::future::join_all;
use registry::{DirectoryLock, RegistryError};
use std::collections::HashSet;
use std::path::Path;

fn point(step: u64) -> MetricPoint {
    MetricPoint { step, time: Timestamp(step), values: vec![("loss".into(), 1.0), ("eval/loss".into(), 2.0)] }
}

fn trial(number: u32) -> TrialId {
    TrialId::new(format!("sweep-00ff/{number}"))
}

async fn append(history: &History, steps: &[u64]) {
    history.append(&trial(1), Attempt(1), steps.iter().map(|s| point(*s)).collect()).await.unwrap();
}

async fn steps(history: &History) -> Vec<u64> {
    let curve = history.curve(&trial(1), &[(Attempt(1), 0)]).await.unwrap();
    curve.iter().map(|point| point.step).collect()
}

fn segment(dir: &Path, number: u32) -> std::path::PathBuf {
    dir.join(format!("segment-{number:08}.log"))
}

/// The bytes of a segment of three frames, with steps 1 to 3; and where the frames begin and end.
async fn three_frames() -> (Vec<u8>, Vec<usize>) {
    let dir = tempfile::tempdir().unwrap();
    let history = History::open(dir.path()).unwrap();
    let mut ends = vec![24];
    for step in 1..=3 {
        append(&history, &[step]).await;
        ends.push(std::fs::metadata(segment(dir.path(), 1)).unwrap().len() as usize);
    }
    (std::fs::read(segment(dir.path(), 1)).unwrap(), ends)
}

/// Opens a directory with the one segment `bytes`, expects the points, adds another, opens it again.
async fn check_kept(bytes: &[u8], expected: &[u64], what: &str) {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(segment(dir.path(), 1), bytes).unwrap();
    let history = History::open(dir.path()).unwrap_or_else(|error| panic!("{what}: {error}"));
    assert_eq!(steps(&history).await, expected, "{what}");
    append(&history, &[9]).await;
    drop(history);
    let reopened = History::open(dir.path()).unwrap_or_else(|error| panic!("{what}, reopened: {error}"));
    assert_eq!(steps(&reopened).await, [expected, &[9]].concat(), "{what}");
}

/// Opens a directory with segments `files`, and expects a refusal that says `expected` and names segment `named`.
#[track_caller]
fn check_refused(files: &[(u32, &[u8])], named: u32, expected: &str) {
    let dir = tempfile::tempdir().unwrap();
    for (number, bytes) in files {
        std::fs::write(segment(dir.path(), *number), bytes).unwrap();
    }
    let error = History::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains(expected), "{error}");
    assert!(error.contains(&format!("segment-{named:08}.log")), "{error}");
}

#[tokio::test]
async fn a_tail_torn_anywhere_is_cut() {
    let (bytes, ends) = three_frames().await;
    for length in 0..bytes.len() {
        let whole = ends[1..].iter().filter(|end| **end <= length).count();
        let expected: Vec<u64> = (1..=whole as u64).collect();
        check_kept(&bytes[..length], &expected, &format!("{length} of {} bytes", bytes.len())).await;
    }
}

#[tokio::test]
async fn a_last_frame_whose_blocks_did_not_all_arrive_is_cut() {
    let (bytes, ends) = three_frames().await;
    for at in ends[2]..ends[3] {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x55;
        check_kept(&damaged, &[1, 2], &format!("byte {at} changed")).await;
    }
    let zeros = vec![0; ends[3] - ends[2]];
    check_kept(&[&bytes[..ends[2]], &zeros].concat(), &[1, 2], "zeros for the last frame").await;
    check_kept(&[&bytes[..], &zeros].concat(), &[1, 2, 3], "zeros after the last frame").await;
    check_kept(&[0; 24], &[], "zeros for the header").await;
}

#[tokio::test]
async fn damage_before_a_whole_frame_is_refused_by_file_and_offset() {
    let (bytes, ends) = three_frames().await;
    for at in 0..ends[2] {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x80;
        let frame = *[0, ends[0], ends[1]].iter().rfind(|begin| **begin <= at).unwrap();
        // A changed format number looks like a later one.
        let expected = if (8..12).contains(&at) {
            "a newer LoraFleet".into()
        } else {
            format!("damaged at byte {frame}: ")
        };
        check_refused(&[(1, &damaged)], 1, &expected);
    }
}

#[tokio::test]
async fn what_an_earlier_segment_acknowledged_must_be_there() {
    let dir = tempfile::tempdir().unwrap();
    for step in 1..=3 {
        append(&History::open(dir.path()).unwrap(), &[step]).await;
    }
    let files: Vec<Vec<u8>> = (1..=3).map(|n| std::fs::read(segment(dir.path(), n)).unwrap()).collect();
    let (first, second, third) = (&files[0][..], &files[1][..], &files[2][..]);
    let cut = &first[..first.len() - 1];
    check_refused(
        &[(1, cut), (2, second), (3, third)],
        1,
        &format!("damaged at byte {}: the file ends", cut.len()),
    );
    check_refused(&[(1, first), (3, third)], 2, "the file is missing");
    check_refused(&[(2, second), (3, third)], 1, "the file is missing");
    check_refused(&[(1, first), (2, &second[..10]), (3, third)], 2, "damaged at byte 0: its header");
    let mut flipped = second.to_vec();
    *flipped.last_mut().unwrap() ^= 1;
    check_refused(&[(1, first), (2, &flipped), (3, third)], 2, "damaged at byte 24: the checksum");
    // A write that failed left something behind what was acknowledged.
    let residue = [first, b"LFGC half a frame"].concat();
    std::fs::write(segment(dir.path(), 1), residue).unwrap();
    assert_eq!(steps(&History::open(dir.path()).unwrap()).await, [1, 2, 3]);
}

#[tokio::test]
async fn a_directory_is_held_until_nobody_writes_there() {
    let dir = tempfile::tempdir().unwrap();
    let history = History::open(&dir.path().join("history")).unwrap();
    history.hold(DirectoryLock::acquire(dir.path()).unwrap());
    let (writes, reads) = (history.clone(), history.for_reading());
    drop(history);
    append(&writes, &[1]).await;
    let refusal = DirectoryLock::acquire(dir.path()).unwrap_err();
    assert!(matches!(refusal, RegistryError::InUse { .. }), "{refusal}");
    drop(writes);
    DirectoryLock::acquire(dir.path()).unwrap();
    assert_eq!(steps(&reads).await, [1]);
}

#[tokio::test]
async fn duplicates_are_dropped_now_and_after_a_reopen() {
    let dir = tempfile::tempdir().unwrap();
    let other = |step| MetricPoint { values: vec![("loss".into(), 99.0)], ..point(step) };
    for _ in 0..2 {
        let history = History::open(dir.path()).unwrap();
        append(&history, &[1, 2, 1]).await;
        history.append(&trial(1), Attempt(1), vec![other(2), point(3)]).await.unwrap();
        history.append(&trial(1), Attempt(2), vec![other(2)]).await.unwrap();
        history.append(&trial(2), Attempt(1), vec![other(2)]).await.unwrap();
        history.append(&trial(1), Attempt(1), vec![]).await.unwrap();
        let curve = history.curve(&trial(1), &[(Attempt(1), 0)]).await.unwrap();
        assert_eq!(curve, [point(1), point(2), point(3)]);
        let curve = history.curve(&trial(1), &[(Attempt(1), 0), (Attempt(2), 1)]).await.unwrap();
        assert_eq!(curve, [point(1), other(2)]);
        assert_eq!(history.curve(&trial(3), &[(Attempt(1), 0)]).await.unwrap(), []);
    }
}

#[tokio::test]
async fn many_trials_append_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let history = History::open(dir.path()).unwrap();
    let appends = (0..1_000_u32).map(|i| {
        let history = history.clone();
        async move { history.append(&trial(i % 10), Attempt(1), vec![point(u64::from(i / 10))]).await }
    });
    assert!(join_all(appends).await.iter().all(Result::is_ok));
    drop(history);
    let history = History::open(dir.path()).unwrap();
    for number in 0..10 {
        let curve = history.curve(&trial(number), &[(Attempt(1), 0)]).await.unwrap();
        assert_eq!(curve, (0..100).map(point).collect::<Vec<_>>());
    }
}

#[test]
fn a_directory_that_cannot_be_made_is_named() {
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("file");
    std::fs::write(&file, "").unwrap();
    let error = History::open(&file).unwrap_err();
    assert!(matches!(&error, HistoryError::Io { path, .. } if *path == file), "{error}");
}

/// Segments lose the bytes of deleted sweeps, and nothing else, whichever of them a segment holds; what is written after
/// is kept beside.
#[tokio::test]
async fn the_points_of_deleted_sweeps_are_taken_out_of_the_segments() {
    let id = |sweep: &str| TrialId::of(&SweepId::new(sweep), 1);
    let curve = async |history: &History, sweep: &str| {
        let curve = history.curve(&id(sweep), &[(Attempt(1), 0)]).await.unwrap();
        curve.iter().map(|point| point.step).collect::<Vec<_>>()
    };
    let dir = tempfile::tempdir().unwrap();
    // A segment each: of both sweeps, of one alone, of the other alone, of both.
    for (number, sweeps) in (1..).zip([&["a", "b"][..], &["b"], &["a"], &["b", "a"]]) {
        let history = History::open(dir.path()).unwrap();
        for sweep in sweeps {
            history.append(&id(sweep), Attempt(1), vec![point(number)]).await.unwrap();
        }
    }
    let sizes = || {
        let size = |number| std::fs::metadata(segment(dir.path(), number)).map_or(0, |m| m.len());
        (1..=6).map(size).collect::<Vec<_>>()
    };
    let before = sizes();
    let none = HashSet::from([SweepId::new("c")]);
    assert_eq!(curve(&History::open_without(dir.path(), &none).unwrap(), "a").await, [1, 3, 4]);
    assert_eq!(sizes(), before, "nothing is written anew for sweeps that are not there");
    let gone = HashSet::from([SweepId::new("b")]);
    let history = History::open_without(dir.path(), &gone).unwrap();
    assert_eq!((curve(&history, "a").await, curve(&history, "b").await), (vec![1, 3, 4], vec![]));
    let after = sizes();
    assert_eq!((after[1], after[2]), (24, before[2]), "a header of the one, all of the other");
    assert!(after[0] < before[0] && after[3] < before[3], "{before:?} {after:?}");
    history.append(&id("a"), Attempt(1), vec![point(5)]).await.unwrap();
    drop(history);
    for _ in 0..2 {
        let history = History::open_without(dir.path(), &gone).unwrap();
        assert_eq!((curve(&history, "a").await, curve(&history, "b").await), (vec![1, 3, 4, 5], vec![]));
    }
    assert_eq!(sizes()[..4], after[..4]);
    // All of a compacted segment counts: no byte of it may change or be missing.
    let whole = std::fs::read(segment(dir.path(), 1)).unwrap();
    for damaged in [&whole[..whole.len() - 1], &[&whole[..30], &[!whole[30]], &whole[31..]].concat()] {
        std::fs::write(segment(dir.path(), 1), damaged).unwrap();
        let error = History::open(dir.path()).unwrap_err();
        assert!(matches!(error, HistoryError::Damaged { .. }), "{error}");
    }
}
