//! `lorafleet eval` through the real binary: tasks, what it writes, and what it refuses.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;
#[path = "../../trainer/tests/common/mod.rs"]
mod model;

use common::Sandbox;
use serde_json::{Value, json};

/// A model of words, and questions of its words: ARC's layout on the hub and AI2's own.
fn sandbox() -> Sandbox {
    let sandbox = Sandbox::new("");
    model::write_tiny_model(&sandbox.path().join("model"));
    model::write_tokenizer(&sandbox.path().join("model"), 40);
    let hub = |i: usize| {
        let (key, labels) = if i.is_multiple_of(2) { ("A", ["A", "B"]) } else { ("2", ["1", "2"]) };
        let choices = json!({ "text": ["w5", "w6 w7"], "label": labels });
        json!({ "question": format!("w{} w{}", 2 + i, 3 + i), "answerKey": key, "choices": choices })
    };
    let own = |i: usize| {
        let choices = json!([{ "text": "w5", "label": "A" }, { "text": "w6 w7", "label": "B" }]);
        let stem = format!("w{} w{}", 2 + i, 3 + i);
        let key = if i.is_multiple_of(2) { "A" } else { "B" };
        json!({ "question": { "stem": stem, "choices": choices }, "answerKey": key })
    };
    let lines = |row: &dyn Fn(usize) -> Value, rows: std::ops::Range<usize>| -> String {
        rows.map(|i| row(i).to_string() + "\n").collect()
    };
    let write = |name: &str, text: String| {
        let path = sandbox.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    write("hub.jsonl", lines(&hub, 0..8));
    write("own.jsonl", lines(&own, 0..8));
    write("arc/ARC-Challenge/test-0.jsonl", lines(&hub, 0..8));
    write("arc/ARC-Challenge/train-0.jsonl", lines(&own, 8..20));
    write("bad.jsonl", lines(&hub, 0..1) + "{\"question\": \"w2\"}\n");
    write("broken.jsonl", lines(&hub, 0..1) + "{\n");
    write("gsm8k.jsonl", "{\"question\": \"w2\", \"answer\": \"w3\"}\n".into());
    write("book.txt", "w5 w6 w7\nw8 w9".into());
    write("mine.yaml", "include: arc_easy\ntask: mine\nfewshot_config: { sampler: first_n }\n".into());
    sandbox
}

/// The samples of a run.
fn samples(sandbox: &Sandbox, args: &[&str]) -> Vec<Value> {
    sandbox.json(&[&["eval", "--model", "model", "--log-samples", "samples.jsonl"], args].concat());
    let text = std::fs::read_to_string(sandbox.path().join("samples.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn what_it_writes() {
    let sandbox = sandbox();
    let arc = ["--tasks", "arc_challenge", "--task-data"];
    let hub = samples(&sandbox, &[&arc[..], &["arc_challenge=hub.jsonl", "--output-dir", "out"]].concat());
    assert_eq!(hub.len(), 8);
    let keys: Vec<_> = hub[3].as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(keys, ["task", "index", "loglikelihoods", "is_greedy", "metrics"]);
    assert_eq!((&hub[3]["task"], &hub[3]["index"]), (&json!("arc_challenge"), &json!(3)));
    assert_eq!(hub[3]["loglikelihoods"].as_array().unwrap().len(), 2);
    // AI2's own layout is the same.
    assert_eq!(samples(&sandbox, &[&arc[..], &["arc_challenge=own.jsonl"]].concat()), hub);
    // Small passes answer alike, to rounding.
    let small = samples(&sandbox, &[&arc[..], &["arc_challenge=hub.jsonl", "--batch-tokens", "1"]].concat());
    let number = |sample: &Value| sample["loglikelihoods"][1].as_f64().unwrap();
    assert!(small.iter().zip(&hub).all(|(a, b)| (number(a) - number(b)).abs() < 1e-4));

    let results: Value =
        serde_json::from_str(&std::fs::read_to_string(sandbox.path().join("out/results.json")).unwrap())
            .unwrap();
    let task = &results["results"]["arc_challenge"];
    let mean = hub.iter().map(|s| s["metrics"]["acc"].as_f64().unwrap()).sum::<f64>() / 8.0;
    assert_eq!((task["acc,none"].as_f64(), task["sample_len"].as_u64()), (Some(mean), Some(8)));
    assert!(task["acc_norm_stderr,none"].is_number(), "{task}");
    assert_eq!(results["n-samples"]["arc_challenge"], json!({ "original": 8, "effective": 8 }));
    assert_eq!(results["higher_is_better"]["arc_challenge"]["acc"], true);
    assert_eq!(results["n-shot"]["arc_challenge"], 0);

    // Examples: from the split beside the documents, from among them, from a file.
    let shots = |data: &str, more: &[&str]| {
        let data = format!("arc_challenge={data}");
        samples(&sandbox, &[&arc[..], &[data.as_str(), "--num-fewshot", "3", "--limit", "4"], more].concat())
    };
    let of_split = shots("arc", &[]);
    assert_eq!(of_split.len(), 4);
    assert_ne!(of_split, hub[..4]);
    assert_ne!(shots("hub.jsonl", &[]), of_split);
    let train = "arc_challenge=arc/ARC-Challenge/train-0.jsonl";
    assert_eq!(shots("arc/ARC-Challenge/test-0.jsonl", &["--fewshot-data", train]), of_split);
    // The older harness's order of eight documents: `random.Random(42).shuffle`.
    let old = shots("arc", &["--fewshot-order", "v0.3"]);
    let asked: Vec<_> = old.iter().map(|sample| sample["index"].as_u64().unwrap()).collect();
    assert_eq!(asked, [3, 4, 6, 7]);
    // A user's task, and text.
    let mine = ["--tasks", "./mine.yaml,perplexity", "--task-data", "mine=hub.jsonl", "--num-fewshot", "2"];
    let both = samples(&sandbox, &[&mine[..], &["--task-data", "perplexity=book.txt"]].concat());
    assert_eq!(both.len(), 9);
    let text = &both[8];
    assert_eq!(
        (&text["metrics"]["word_perplexity"][1], &text["metrics"]["bits_per_byte"][1]),
        (&json!(5), &json!(14))
    );
    let table = sandbox.lorafleet(&[
        "eval",
        "--model",
        "model",
        "--tasks",
        "perplexity",
        "--task-data",
        "perplexity=book.txt",
    ]);
    let table = String::from_utf8_lossy(&table.stdout).into_owned();
    assert!(table.contains("word_perplexity") && table.contains("TASK"), "{table}");
}

/// A mean by size stands where the harness has a group's: each task counts by its documents.
#[test]
fn a_group_is_a_row() {
    let sandbox = sandbox();
    let preset = "preset: sized
weight_by_size: true
tasks: [{ task: arc_easy, metric: acc }, { task: arc_challenge, metric: acc }]
";
    std::fs::write(sandbox.path().join("sized.yaml"), preset).unwrap();
    let mut arguments = vec!["eval", "--model", "model", "--tasks", "./sized.yaml"];
    arguments.extend(["--task-data", "arc_easy=hub.jsonl"]);
    arguments.extend(["--task-data", "arc_challenge=arc/ARC-Challenge/train-0.jsonl"]);
    let document = sandbox.json(&arguments);
    let of = |task: &str, key: &str| document["results"][task][key].as_f64().unwrap();
    let [easy, challenge] =
        ["arc_easy", "arc_challenge"].map(|task| (of(task, "acc,none"), of(task, "sample_len")));
    assert_eq!((easy.1, challenge.1), (8.0, 12.0));
    let mean = (easy.0 * easy.1 + challenge.0 * challenge.1) / 20.0;
    let square = |task: &str, size: f64| (size - 1.0) * size * of(task, "acc_stderr,none").powi(2);
    let stderr = ((square("arc_easy", 8.0) + square("arc_challenge", 12.0)) / 18.0 / 20.0).sqrt();
    let group = &document["groups"]["sized"];
    for (key, want) in [("acc,none", mean), ("acc_stderr,none", stderr), ("sample_len", 20.0)] {
        assert!((group[key].as_f64().unwrap() - want).abs() < 1e-12, "{key}: {group} {want}");
    }
    assert_eq!((group, &document["means"]["sized"]), (&document["results"]["sized"], &group["acc,none"]));
    assert_eq!(document["group_subtasks"]["sized"], json!(["arc_easy", "arc_challenge"]));
    arguments.extend(["-o", "table"]);
    let table = sandbox.lorafleet(&arguments);
    let table = String::from_utf8_lossy(&table.stdout).into_owned();
    let row = table.lines().find(|line| line.starts_with("sized")).unwrap_or_else(|| panic!("{table}"));
    assert!(row.contains("mean") && row.contains(&format!("{mean:.4}")) && row.contains("± "), "{row}");
}

#[test]
fn what_it_refuses() {
    let sandbox = sandbox();
    let refused = |args: &[&str], want: &str| {
        let output = sandbox.lorafleet(&[&["eval", "--model", "model"], args].concat());
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{args:?}: {message}");
        assert!(message.contains(want), "{args:?}: {message}\nlacks {want}");
    };
    let arc = |data: &'static str| ["--tasks", "arc_easy", "--task-data", data];
    refused(
        &["--tasks", "arc"],
        "arc: is no task; there are arc_challenge, arc_easy, gsm8k, hellaswag, mmlu, mmlu_SUBJECT",
    );
    refused(
        &["--tasks", "perplexity"],
        "perplexity: no documents are given; say where the file or directory is with --task-data perplexity=PATH",
    );
    refused(&["--tasks", "./gone.yaml"], "gone.yaml");
    refused(&arc("mmlu=x"), "mmlu is not among --tasks");
    refused(&arc("arc_easy"), "write TASK=PATH");
    refused(&arc("arc_easy=gone.jsonl"), "gone.jsonl");
    refused(&arc("arc_easy=model"), "has no file of the split `test`; call it test.jsonl");
    refused(&arc("arc_easy=bad.jsonl"), "bad.jsonl: document 2: ");
    refused(&arc("arc_easy=broken.jsonl"), "broken.jsonl:2: is no JSON");
    let gsm8k = ["--tasks", "gsm8k", "--task-data", "gsm8k=gsm8k.jsonl", "--num-fewshot", "0"];
    refused(&gsm8k, "gsm8k: its answers have up to 256 tokens, and prompt and answer may have 64 together");
    refused(&arc("arc_easy=book.txt"), "book.txt: is no .jsonl, .json or .parquet file");
    refused(
        &[&arc("arc_easy=hub.jsonl")[..], &["--num-fewshot", "8"]].concat(),
        "needs 9 documents for 8 examples; there are 8",
    );
    refused(&[&arc("arc_easy=hub.jsonl")[..], &["--adapter", "model"]].concat(), "adapter_config.json");
    refused(&[&arc("arc_easy=hub.jsonl")[..], &["--max-length", "1"]].concat(), "choice 2 has 2 tokens");
    refused(&[&arc("arc_easy=hub.jsonl")[..], &["--precision-mode", "int8"]].concat(), "give float32");
    refused(&[&arc("arc_easy=hub.jsonl")[..], &["--fewshot-order", "v0.2"]].concat(), "give v0.4 or v0.3");
}
