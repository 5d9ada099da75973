//! Models and rows by their names on the hub, through the real binary.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;
#[path = "../../hub/tests/common/mod.rs"]
mod local_hub;
#[path = "../../trainer/tests/common/mod.rs"]
mod model;

use common::Sandbox;
use local_hub::{COMMIT, LocalHub, sha256};
use serde_json::{Value, json};
use std::process::{Command, Output, Stdio};

/// A hub with a model and rows, and a directory to work in.
struct Fixture {
    hub: LocalHub,
    sandbox: Sandbox,
}

const SWEEP: &str = "name: from-the-hub
pretrained_model_id: org/tiny
dataset_name: org/rows
max_sequence_length: 32
max_steps: 4
search: { algorithm: grid }
parameters: { lora_rank: [2, 4] }
";

impl Fixture {
    fn new() -> Self {
        let (hub, files) = (LocalHub::start(), tempfile::tempdir().unwrap());
        model::write_tiny_model(files.path());
        model::write_tokenizer(files.path(), 40);
        for entry in std::fs::read_dir(files.path()).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            hub.put("models/org/tiny", name, std::fs::read(&path).unwrap());
        }
        model::write_texts(&files.path().join("rows.jsonl"), 24);
        hub.put("datasets/org/rows", "rows.jsonl", std::fs::read(files.path().join("rows.jsonl")).unwrap());
        Self { hub, sandbox: Sandbox::new(SWEEP) }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.sandbox.command(arguments);
        for name in ["HF_TOKEN", "HF_TOKEN_PATH", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE"] {
            command.env_remove(name);
        }
        let home = self.sandbox.path().join("hf");
        command.env("HF_HOME", home).env("HF_ENDPOINT", self.hub.endpoint());
        command
    }

    fn train(&self, arguments: &[&str]) -> Command {
        let flags = [
            "train",
            "--dataset-name=org/rows",
            "--output-dir=out",
            "--overwrite-output-dir",
            "--lora-rank=2",
            "--max-sequence-length=32",
            "--max-steps=3",
        ];
        self.command(&[&flags, arguments].concat())
    }

    fn blob(&self) -> std::path::PathBuf {
        let weights = self.hub.state().repos["models/org/tiny"]["model.safetensors"].clone();
        self.sandbox.path().join("hf/hub/models--org--tiny/blobs").join(sha256(&weights))
    }
}

fn expect(output: &Output, code: i32, fragments: &[&str]) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{said}");
    for fragment in fragments {
        assert!(said.contains(fragment), "{said}\nlacks {fragment}");
    }
}

#[test]
fn train_takes_a_model_and_rows_of_the_hub() {
    let fixture = Fixture::new();
    let pinned = format!("--pretrained-model-id=org/tiny@{COMMIT}");
    expect(&fixture.train(&[&pinned]).output().unwrap(), 0, &["org/rows: "]);
    let config = model::json_file(&fixture.sandbox.path().join("out/adapter_config.json"));
    assert_eq!(
        [&config["base_model_name_or_path"], &config["revision"]],
        [&json!("org/tiny"), &json!(COMMIT)]
    );
    // Without a network, out of the cache; the adapter's base is found there too.
    fixture.hub.seen();
    let offline = |mut command: Command| command.env("HF_HUB_OFFLINE", "1").output().unwrap();
    expect(
        &offline(fixture.train(&["--pretrained-model-id=org/tiny"])),
        3,
        &["pretrained_model_id: org/tiny: is neither a path", "HF_HUB_OFFLINE is set"],
    );
    expect(&offline(fixture.train(&[&pinned])), 0, &[]);
    expect(&offline(fixture.command(&["adapters", "merge", "out", "--to", "merged"])), 0, &[]);
    assert_eq!(fixture.hub.seen(), []);
}

#[test]
fn a_sweep_names_a_model_and_rows_of_the_hub() {
    let fixture = Fixture::new();
    let json = |command: &mut Command| -> Value {
        let output = command.output().unwrap();
        expect(&output, 0, &[]);
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let plan = json(&mut fixture.command(&["plan", "sweep.yaml", "-o", "json"]));
    assert_eq!(plan.as_array().unwrap().len(), 2);
    fixture.hub.seen();
    let result = json(&mut fixture.command(&["run", "sweep.yaml", "-o", "json"]));
    for trial in result["trials"].as_array().unwrap() {
        assert_eq!(trial["state"], "completed", "{trial:#}");
        assert_eq!(trial["config"]["pretrained_model_id"], "org/tiny", "{trial:#}");
    }
    // The command and its agent each ask once what the two names are at; no file comes again.
    let seen = fixture.hub.seen();
    assert!(seen.len() == 4 && seen.iter().all(|seen| seen.path.starts_with("/api/")), "{seen:#?}");
}

/// A shipped task's documents come from its data set, of which one part is downloaded: for `eval`, and for a sweep.
#[test]
fn tasks_read_their_documents_from_the_hub() {
    let fixture = Fixture::new();
    let document = |i: u64| {
        let choices = json!({ "text": ["w5", "w6 w7"], "label": ["A", "B"] });
        json!({ "question": format!("w{} w3", 2 + i), "answerKey": if i.is_multiple_of(2) { "A" } else { "B" }, "choices": choices })
    };
    let documents: String = (0..6).map(|i| document(i).to_string() + "\n").collect();
    for part in ["ARC-Easy", "ARC-Challenge"] {
        let file = format!("{part}/test.jsonl");
        fixture.hub.put("datasets/allenai/ai2_arc", &file, documents.clone());
    }
    std::fs::write(fixture.sandbox.path().join("here.jsonl"), &documents).unwrap();
    let json = |command: &mut Command| -> Value {
        let output = command.output().unwrap();
        expect(&output, 0, &[]);
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let eval = |more: &[&str]| {
        let arguments = ["eval", "--model", "org/tiny", "--tasks", "arc_easy", "-o", "json"];
        json(&mut fixture.command(&[&arguments, more].concat()))["results"]["arc_easy"].clone()
    };
    let from_hub = eval(&[]);
    assert_eq!(
        (&from_hub["sample_len"], &from_hub),
        (&json!(6), &eval(&["--task-data", "arc_easy=here.jsonl"]))
    );

    let set = "evaluations={tasks: [arc_easy], limit: 4}";
    let result = json(&mut fixture.command(&["run", "sweep.yaml", "--set", set, "-o", "json"]));
    let scores = &result["trials"][0]["summary"]["evaluations"];
    assert_eq!((&scores[0]["task"], &scores[0]["documents"]), (&json!("arc_easy"), &json!(4)), "{result:#}");
    let snapshot = format!("hf/hub/datasets--allenai--ai2_arc/snapshots/{COMMIT}");
    let parts = std::fs::read_dir(fixture.sandbox.path().join(snapshot)).unwrap();
    let parts: Vec<_> = parts.map(|part| part.unwrap().file_name()).collect();
    assert_eq!(parts, ["ARC-Easy"]);
}

#[test]
fn what_cannot_be_had_is_named_with_its_place() {
    let fixture = Fixture::new();
    expect(
        &fixture.train(&["--pretrained-model-id=org/tiny", "--lora-dropout=2"]).output().unwrap(),
        2,
        &["lora_dropout"],
    );
    assert!(!fixture.blob().exists(), "wrong values are found before a download");
    let run = |set: &str| fixture.command(&["plan", "sweep.yaml", "--set", set]).output().unwrap();
    expect(
        &run("pretrained_model_id=org/tinny"),
        2,
        &["org/tinny: is neither a path on this machine nor a model"],
    );
    expect(
        &run("dataset_name=org/row"),
        2,
        &["dataset_name: org/row: is neither a path on this machine nor a data set"],
    );
    expect(
        &run("pretrained_model_id=org/tiny@v7"),
        2,
        &["pretrained_model_id: org/tiny@v7: has no revision v7"],
    );
    fixture.hub.state().refuse = Some((403, "GatedRepo"));
    expect(&run("seed=1"), 2, &["sweep.yaml:2:1: pretrained_model_id: org/tiny: is gated", "set HF_TOKEN"]);
    let away = fixture
        .command(&["plan", "sweep.yaml"])
        .env("HF_ENDPOINT", "http://127.0.0.1:1")
        .env("HF_HOME", fixture.sandbox.path().join("empty"))
        .output()
        .unwrap();
    expect(&away, 3, &["org/tiny: http://127.0.0.1:1 cannot be reached", "name a model's directory"]);
    let odd = fixture.command(&["plan", "sweep.yaml"]).env("HF_ENDPOINT", "hub").output().unwrap();
    expect(&odd, 2, &["HF_ENDPOINT: \"hub\" is no address"]);
}

/// A process that is killed in a download leaves what it has; the next one goes on from there.
#[test]
fn a_killed_download_goes_on() {
    let fixture = Fixture::new();
    const HELD: usize = 3000;
    fixture.hub.state().stall_after = Some(("model.safetensors".into(), HELD));
    let mut train = fixture.train(&["--pretrained-model-id=org/tiny"]);
    let mut child = train.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let partial = fixture.blob().with_extension("incomplete");
    while partial.metadata().map_or(0, |about| about.len()) < HELD as u64 {
        assert!(child.try_wait().unwrap().is_none(), "it ended by itself");
        std::thread::yield_now();
    }
    // SIGKILL.
    child.kill().unwrap();
    child.wait().unwrap();
    fixture.hub.state().stall_after = None;
    fixture.hub.seen();
    expect(&train.stderr(Stdio::piped()).output().unwrap(), 0, &[]);
    let ranges: Vec<_> = fixture.hub.seen().into_iter().filter(|s| s.large).map(|seen| seen.range).collect();
    assert_eq!(ranges, [Some(format!("bytes={HELD}-"))]);
    assert!(fixture.blob().exists() && !partial.exists());
}
