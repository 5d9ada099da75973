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

/// What was trained on 4 bits is merged into what these mean, and the document says so.
#[test]
fn a_trial_in_4_bits_is_merged_into_what_it_was_trained_on() {
    let sandbox = sandbox();
    let quantized = sandbox.json(&["quantize", "base", "--to", "base-4bit", "--double-quant", "false"]);
    assert_eq!((quantized["layers"].as_u64(), &quantized["compute_dtype"]), (Some(21), &"float16".into()));
    assert!(quantized["bytes"].as_u64() < quantized["base_bytes"].as_u64());
    let trained = |id: &str, double_quant: bool| {
        let model = format!("pretrained_model_id={id}");
        let double_quant = format!("double_quant={double_quant}");
        let run =
            ["run", "sweep.yaml", "--set", &model, "--set", "precision_mode=4bit", "--set", &double_quant];
        let result = sandbox.json(&run);
        result["trials"][0]["id"].as_str().unwrap().to_string()
    };
    let merge = |adapter: &str, to: &str, rest: &[&str]| {
        let merged = sandbox.json(&[&["adapters", "merge", adapter, "--to", to], rest].concat());
        (merged["into"].as_str().unwrap().to_string(), merged["double_quant"].as_bool())
    };
    let dequantized = |double_quant| ("dequantized".to_string(), Some(double_quant));
    let trial = trained("base", true);
    assert_eq!(merge(&trial, "a", &[]), dequantized(true));
    assert_eq!(merge(&trial, "b", &["--into", "original"]), ("original".to_string(), None));
    assert_ne!(weights(&sandbox, "a"), weights(&sandbox, "b"));
    // Of an adapter's directory nobody knows on what it was trained.
    sandbox.json(&["adapters", "pull", &trial, "--to", "adapter"]);
    assert_eq!(merge("adapter", "c", &[]), ("original".to_string(), None));
    assert_eq!(weights(&sandbox, "c"), weights(&sandbox, "b"));
    assert_eq!(merge("adapter", "d", &["--into", "dequantized"]), dequantized(true));
    assert_eq!(weights(&sandbox, "d"), weights(&sandbox, "a"));
    // Without double quantisation, a base that is in 4 bits already and one that a trial has in 4 bits are the same.
    let (of_files, of_trial) = (trained("base-4bit", false), trained("base", false));
    assert_eq!(merge(&of_files, "e", &[]), dequantized(false));
    assert_eq!(merge(&of_trial, "f", &[]), dequantized(false));
    assert_eq!(weights(&sandbox, "e"), weights(&sandbox, "f"));

    let refused = |args: &[&str], want: &str| {
        let output = sandbox.lorafleet(args);
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{args:?}: {message}");
        assert!(message.contains(want), "{args:?}: {message}\nlacks {want}");
    };
    refused(&["adapters", "merge", &of_files, "--into", "original", "--to", "g"], "base-4bit: is in 4 bits");
    let double = ["--double-quant", "true", "--to", "g"];
    refused(
        &[&["adapters", "merge", "adapter"], &double[..]].concat(),
        "--double-quant: the adapter is added to",
    );
    refused(&["quantize", "base-4bit", "--to", "g"], "base-4bit: is quantised in 4 bits already");
    refused(&["quantize", "./gone", "--to", "g"], "/gone is no directory");
    let plan =
        ["plan", "sweep.yaml", "--set", "pretrained_model_id=base-4bit", "--set", "precision_mode=4bit"];
    refused(&plan, "was quantised with bnb_4bit_use_double_quant false; set it to false");
    assert!(!sandbox.path().join("g").exists());
}
