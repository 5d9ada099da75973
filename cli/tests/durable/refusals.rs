//! Data directories that are refused by name before anything in them changes, and torn ends that are told.

use crate::common::Sandbox;
use crate::server::{expect_sound, finish, sweep, up};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

fn sandbox() -> Sandbox {
    let sandbox = Sandbox::new(&sweep(2, "search: { algorithm: grid }\nparameters: { lora_rank: [2] }\n"));
    finish(&sandbox, "a short sweep");
    sandbox
}

fn overwrite(path: &Path, at: u64, bytes: &[u8]) {
    let mut file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    file.seek(SeekFrom::Start(at)).unwrap();
    file.write_all(bytes).unwrap();
}

/// Every file below a directory but the lock, which names its last holder.
fn files(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()) {
        match entry.is_dir() {
            true => found.extend(files(&entry)),
            false if entry.ends_with("lock") => {}
            false => found.push((entry.clone(), std::fs::read(entry).unwrap())),
        }
    }
    found.sort();
    found
}

const VERBS: [&[&str]; 6] = [
    &["up", "--listen", "127.0.0.1:0"],
    &["run", "sweep.yaml"],
    &["fsck", "lorafleet-data"],
    &["list"],
    &["adapters", "list", "small-0000"],
    &["trials", "list", "small-0000"],
];

/// Every verb refuses the directory with exit code 2, says why, and changes nothing.
#[track_caller]
fn refused(sandbox: &Sandbox, says: &[&str]) {
    let data = sandbox.path().join("lorafleet-data");
    let before = files(&data);
    for verb in VERBS {
        let output = sandbox.lorafleet(verb);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{verb:?}: {said}");
        for part in says {
            assert!(said.contains(part), "{verb:?}: {said}");
        }
        assert!(files(&data) == before, "{verb:?} changed something");
    }
}

#[test]
fn a_directory_of_a_newer_version_is_refused_before_it_changes() {
    let sandbox = sandbox();
    let data = sandbox.path().join("lorafleet-data");
    // SQLite's `user_version` stands at byte 60 of its file.
    overwrite(&data.join("coordinator.db"), 60, &999u32.to_be_bytes());
    refused(&sandbox, &["newer LoraFleet", "schema 999", "coordinator.db", "upgrade"]);
    overwrite(&data.join("coordinator.db"), 60, &1u32.to_be_bytes());
    expect_sound(&sandbox, "put back");
    // The format of a metric segment stands behind its eight bytes of magic.
    let segment = data.join("history/segment-00000001.log");
    overwrite(&segment, 8, &7u32.to_le_bytes());
    refused(&sandbox, &["newer LoraFleet", "format 7", "segment-00000001.log", "upgrade"]);
}

#[test]
fn a_directory_in_use_is_refused() {
    let sandbox = sandbox();
    let held = registry::DirectoryLock::acquire(&sandbox.path().join("lorafleet-data")).unwrap();
    refused(&sandbox, &["lorafleet-data` is in use by process", &std::process::id().to_string()]);
    drop(held);
    let server = up(&sandbox, None).unwrap_or_else(|said| panic!("{said}"));
    let output = sandbox.lorafleet(&["fsck", "lorafleet-data"]);
    assert_eq!(output.status.code(), Some(2), "while it is served");
    server.signal("-TERM");
}

#[test]
fn what_is_no_data_directory_is_named_and_not_made() {
    let sandbox = Sandbox::new("");
    for dir in ["none", "."] {
        let output = sandbox.lorafleet(&["fsck", dir]);
        assert_eq!(output.status.code(), Some(2));
        assert!(String::from_utf8_lossy(&output.stderr).contains("is no data directory"), "{output:?}");
    }
    assert_eq!(std::fs::read_dir(sandbox.path()).unwrap().count(), 1);
}

#[test]
fn a_torn_end_is_a_note_and_told_when_it_is_cut() {
    let sandbox = sandbox();
    let segment = sandbox.path().join("lorafleet-data/history/segment-00000001.log");
    let whole = std::fs::metadata(&segment).unwrap().len();
    overwrite(&segment, whole, b"LFGC torn");
    let checked = sandbox.json(&["fsck", "lorafleet-data"]);
    assert_eq!(checked["sound"], true, "{checked:#}");
    let note = checked["notes"][0].to_string();
    assert!(note.contains("segment-00000001.log") && note.contains("9 bytes of a write"), "{note}");
    assert_eq!(std::fs::metadata(&segment).unwrap().len(), whole + 9, "nothing is repaired");
    let server = up(&sandbox, None).unwrap_or_else(|said| panic!("{said}"));
    let (_, said) = server.signal("-TERM");
    for part in ["WARN", "segment-00000001.log", "\"bytes\":9", "never finished"] {
        assert!(said.contains(part), "{said}");
    }
    assert_eq!(std::fs::metadata(&segment).unwrap().len(), whole);
}

#[test]
fn damage_is_exit_code_one() {
    let sandbox = sandbox();
    overwrite(&sandbox.path().join("lorafleet-data/history/segment-00000001.log"), 50, b"damage");
    let output = sandbox.lorafleet(&["fsck", "lorafleet-data", "-o", "json"]);
    assert_eq!(output.status.code(), Some(1));
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["sound"], false);
    // If it is the last write that is damaged, it looks like one that never was whole, and its points are what is missing.
    let (problems, all) = (document["problems"].as_array().unwrap(), document.to_string());
    assert!(!problems.is_empty() && all.contains("segment-00000001.log"), "{document:#}");
}
