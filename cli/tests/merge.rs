//! `adapters merge` through the real binary: of a trial and of a directory, and what it refuses.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use common::Sandbox;
use std::path::Path;

/// A sweep of one short trial, on a copy of the quickstart's base.
fn sandbox() -> Sandbox {
    let quickstart = concat!(env!("CARGO_MANIFEST_DIR"), "/../config/quickstart");
    let sandbox = Sandbox::new(&format!(
        "name: small
pretrained_model_id: base
dataset_name: {quickstart}/instruct.jsonl
eval_size: 2
batch_size: 1
max_sequence_length: 32
max_steps: 2
learning_rate: 0.01
"
    ));
    copy(&Path::new(quickstart).join("base"), &sandbox.path().join("base"));
    sandbox
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

fn weights(sandbox: &Sandbox, dir: &str) -> Vec<u8> {
    std::fs::read(sandbox.path().join(dir).join("model.safetensors")).unwrap()
}

#[test]
fn a_trials_adapter_becomes_a_model() {
    let sandbox = sandbox();
    let result = sandbox.json(&["run", "sweep.yaml"]);
    let trial = result["trials"][0]["id"].as_str().unwrap();
    let merged = sandbox.json(&["adapters", "merge", trial, "--to", "model"]);
    assert_eq!((&merged["model"], merged["layers"].as_u64()), (&"model".into(), Some(21)));
    assert_ne!(weights(&sandbox, "model"), weights(&sandbox, "base"));
    // A model like any other: a sweep can start from it.
    let plan = sandbox.lorafleet(&["plan", "sweep.yaml", "--set", "pretrained_model_id=model"]);
    assert!(plan.status.success(), "{}", String::from_utf8_lossy(&plan.stderr));
    // A directory's adapter gives the same, with the base that it names and with one that is named.
    sandbox.json(&["adapters", "pull", trial, "--to", "adapter"]);
    sandbox.json(&["adapters", "merge", "adapter", "--to", "model-2"]);
    assert_eq!(weights(&sandbox, "model-2"), weights(&sandbox, "model"));
    sandbox.json(&["adapters", "merge", "adapter", "--model", "model", "--to", "model-2", "--overwrite"]);
    assert_ne!(weights(&sandbox, "model-2"), weights(&sandbox, "model"));

    let refused = |args: &[&str], want: &str| {
        let output = sandbox.lorafleet(&[&["adapters", "merge"], args].concat());
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{args:?}: {message}");
        assert!(message.contains(want), "{args:?}: {message}\nlacks {want}");
    };
    refused(&[trial, "--to", "model"], "model: is not empty");
    refused(
        &["nothing", "--to", "new"],
        "nothing is neither a directory with an adapter_config.json nor a trial's id",
    );
    refused(&["small-0000/1", "--to", "new"], "there is no trial small-0000/1");
    refused(&[trial, "--to", "new", "--model", "gone"], "gone");
    refused(&[trial, "--to", "new", "--model", "model"], "model is not the base that");
    std::fs::rename(sandbox.path().join("base"), sandbox.path().join("moved")).unwrap();
    refused(
        &[trial, "--to", "new"],
        "is no directory of this machine and not in the hub's cache; say with --model where it is",
    );
    refused(
        &["adapter", "--to", "new"],
        "is no directory of this machine and not in the hub's cache; say with --model where it is",
    );
    assert!(!sandbox.path().join("new").exists());
    sandbox.json(&["adapters", "merge", trial, "--model", "moved", "--to", "new"]);
    assert_eq!(weights(&sandbox, "new"), weights(&sandbox, "model"));
}
