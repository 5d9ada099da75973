//! The process ends at every crash point of the source.

use crate::common::Sandbox;
use crate::server::{Trial, expect_sound, finish, sweep, the_sweep, up, watched_to_its_end};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Crashes that are tried at a time.
const AT_A_TIME: usize = 4;

/// The names in the source of every `crash::point("…")`.
pub fn points() -> BTreeSet<String> {
    fn read(dir: &Path, found: &mut BTreeSet<String>) {
        for path in std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                read(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let source = std::fs::read_to_string(&path).unwrap();
                let calls = source.split("crash::point(\"").skip(1);
                found.extend(calls.filter_map(|rest| Some(rest.split_once('"')?.0.to_string())));
            }
        }
    }
    let mut found = BTreeSet::new();
    for folder in ["actor", "cli", "coordinator", "gpu-agent", "registry", "trainer"] {
        read(&Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/..")).join(folder).join("src"), &mut found);
    }
    found
}

fn small() -> Sandbox {
    Sandbox::new(&sweep(
        12,
        "search: { algorithm: grid }\nparameters: { lora_rank: [2, 4] }\nkeep_adapters: 1\n",
    ))
}

/// Expects the one adapter that the sweep keeps, and no leavings.
#[track_caller]
fn expect_one_adapter(sandbox: &Sandbox, when: &str) {
    let found = sandbox.json(&["fsck", "lorafleet-data"]);
    assert_eq!(found["checked"]["checkpoint_parts"], 1, "{when}: {found:#}");
    assert_eq!(found["notes"], serde_json::json!([]), "{when}");
}

/// Runs with a point armed. Whether the process came to it.
fn crashes_at(sandbox: &Sandbox, armed: &str) -> bool {
    let said = match up(sandbox, Some(armed)) {
        Err(said) => said,
        Ok(mut server) => match the_sweep(sandbox) {
            Some(id) if watched_to_its_end(sandbox, &id) => server.signal("-TERM").1,
            _ => server.wait().1,
        },
    };
    said.contains("crash point ")
}

/// A process comes to a point for the n-th time, for each n; for the first time if it never does.
fn check(point: &str, times: &[u32], uninterrupted: &BTreeMap<String, Trial>) {
    let crashed = |hit: u32| {
        let sandbox = small();
        let armed = format!("{point}:{hit}");
        let reached = crashes_at(&sandbox, &armed);
        if reached {
            expect_sound(&sandbox, &armed);
        }
        assert_eq!(&finish(&sandbox, &armed), uninterrupted, "{armed}");
        expect_one_adapter(&sandbox, &armed);
        reached
    };
    let reached = times.iter().filter(|hit| crashed(**hit)).count();
    assert!(reached > 0 || crashed(1), "no process comes to {point}");
}

#[test]
fn a_crash_at_any_durable_write_loses_nothing() {
    // Compaction follows a deletion, and a server writes no model; they have tests of their own.
    let of_a_sweep = |point: &String| !point.starts_with("compaction/") && !point.starts_with("model/");
    let points: Vec<_> = points().into_iter().filter(of_a_sweep).collect();
    assert!(points.len() >= 20, "{points:?}");
    let uninterrupted = finish(&small(), "without a crash");
    assert!(
        uninterrupted.len() == 2
            && uninterrupted.values().all(|t| t.state == "completed" && t.curve.len() == 13)
    );
    let times: &[u32] = if std::env::var_os("LORAFLEET_FULL").is_some() { &[1, 2, 3, 5, 8] } else { &[3] };
    let next = std::sync::atomic::AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..AT_A_TIME {
            scope.spawn(|| {
                while let Some(point) = points.get(next.fetch_add(1, std::sync::atomic::Ordering::Relaxed)) {
                    check(point, times, &uninterrupted);
                }
            });
        }
    });
}

/// The metrics of a deleted sweep are taken out of the segments at the next start; those of the other stay.
#[test]
fn a_crash_while_deleted_metrics_are_taken_out_loses_nothing() {
    let sandbox = small();
    let kept = finish(&sandbox, "before");
    let server = up(&sandbox, None).unwrap_or_else(|said| panic!("{said}"));
    let submitted = sandbox.lorafleet(&["submit", "sweep.yaml"]);
    let other = String::from_utf8(submitted.stdout).unwrap().trim().to_string();
    assert!(watched_to_its_end(&sandbox, &other));
    assert!(sandbox.lorafleet(&["delete", &other]).status.success());
    server.signal("-TERM");
    let bytes = || {
        let files = std::fs::read_dir(sandbox.dir.path().join("lorafleet-data/history")).unwrap();
        files.map(|file| file.unwrap().metadata().unwrap().len()).sum::<u64>()
    };
    let before = bytes();
    let points: Vec<_> = points().into_iter().filter(|point| point.starts_with("compaction/")).collect();
    assert!(points.len() >= 2, "{points:?}");
    // In the order in which they come: a crash at the first leaves the work to the next start.
    let ordered = ["compaction/before-rename", "compaction/after-rename"];
    assert!(points.iter().all(|point| ordered.contains(&point.as_str())), "{points:?}");
    for point in ordered {
        let said = up(&sandbox, Some(&format!("{point}:1"))).err().expect("it crashes");
        assert!(said.contains("crash point "), "{point}: {said}");
        expect_sound(&sandbox, point);
    }
    assert_eq!(finish(&sandbox, "after"), kept);
    assert!(bytes() < before * 2 / 3, "{before} bytes, then {}", bytes());
}

/// The engine's thread panics, and the process goes on.
#[test]
fn an_engine_that_panics_loses_nothing() {
    let uninterrupted = finish(&small(), "without a panic");
    let sandbox = small();
    let server = up(&sandbox, Some("engine/step:7:panic")).unwrap_or_else(|said| panic!("{said}"));
    let id = the_sweep(&sandbox).unwrap();
    assert!(watched_to_its_end(&sandbox, &id));
    let (status, said) = server.signal("-TERM");
    assert_eq!(status.code(), Some(0), "{said}");
    assert!(said.contains("the engine panicked"), "{said}");
    let attempts: Vec<_> = sandbox
        .json(&["trials", "list", &id])
        .as_array()
        .unwrap()
        .iter()
        .map(|t| t["attempt"].clone())
        .collect();
    assert!(attempts.iter().any(|attempt| attempt.as_u64() > Some(1)), "{attempts:?}");
    assert_eq!(finish(&sandbox, "after a panic"), uninterrupted);
}
