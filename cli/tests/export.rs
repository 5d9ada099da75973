//! A sweep for others' tools: `lorafleet export --format`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use common::Sandbox;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Four simulated trials, of which those with the larger learning rate diverge.
fn swept() -> (Sandbox, String) {
    let sandbox = Sandbox::new(
        "name: exported
pretrained_model_id: ./model
dataset_name: nobody/rows
compute_dtype: float16
max_steps: 20
eval_steps: 5
search: { algorithm: grid, metric: eval/loss }
parameters:
  learning_rate: [0.001, 2]
  precision_mode: [float16, 4bit]
",
    );
    std::fs::create_dir(sandbox.path().join("model")).unwrap();
    let config = json!({
        "model_type": "llama", "hidden_act": "silu", "hidden_size": 256, "intermediate_size": 512,
        "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 1000, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": false,
    });
    std::fs::write(sandbox.path().join("model/config.json"), config.to_string()).unwrap();
    let run = ["run", "sweep.yaml", "--simulate=T4-16GB", "--simulate-speed=100000"];
    let result = sandbox.json(&run);
    let id = result["sweep"]["id"].as_str().unwrap().to_string();
    (sandbox, id)
}

/// Every file below a path with its bytes.
fn bytes_below(path: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let (mut found, mut left) = (BTreeMap::new(), vec![path.to_path_buf()]);
    while let Some(next) = left.pop() {
        if next.is_dir() {
            left.extend(std::fs::read_dir(&next).unwrap().map(|entry| entry.unwrap().path()));
        } else {
            found.insert(next.strip_prefix(path).unwrap().to_path_buf(), std::fs::read(&next).unwrap());
        }
    }
    found
}

fn rows(path: &Path) -> Vec<BTreeMap<String, String>> {
    csv::Reader::from_path(path).unwrap().deserialize().map(Result::unwrap).collect()
}

#[test]
fn every_format_says_what_the_server_says() {
    let (sandbox, id) = swept();
    let at = |name: &str| sandbox.path().join(name);
    let trials = sandbox.json(&["trials", "list", &id]);
    let trials = trials.as_array().unwrap();
    let curves: Vec<Value> = trials
        .iter()
        .map(|trial| sandbox.json(&["trials", "metrics", trial["id"].as_str().unwrap()]))
        .collect();
    let states: Vec<_> = trials.iter().map(|trial| trial["state"].as_str().unwrap()).collect();
    assert_eq!(states, ["completed", "completed", "diverged", "diverged"]);
    for format in ["files", "csv", "parquet", "optuna", "tensorboard"] {
        let said = sandbox.json(&["export", &id, "--to", format, "--format", format]);
        assert_eq!((&said["path"], &said["format"]), (&json!(format), &json!(format)));
        // The same sweep is the same bytes; the report tells when it was made.
        sandbox.json(&["export", &id, "--to", "again", "--format", format, "--overwrite"]);
        let without_report = |path: PathBuf| {
            let mut files = bytes_below(&path);
            files.remove(Path::new("report.html"));
            files
        };
        assert_eq!(without_report(at(format)), without_report(at("again")), "{format}");
        std::fs::remove_dir_all(at("again")).or_else(|_| std::fs::remove_file(at("again"))).unwrap();
    }

    // A row a trial, a row a metric at a step.
    for table in [rows(&at("csv/trials.csv")), rows(&at("files/trials.csv"))] {
        assert_eq!(table.len(), trials.len());
        for (row, trial) in table.iter().zip(trials) {
            assert_eq!((&row["id"], &row["state"]), (&string(&trial["id"]), &string(&trial["state"])));
            assert_eq!(row["learning_rate"].parse().ok(), trial["parameters"]["learning_rate"].as_f64());
            assert_eq!(row["lora_rank"], string(&trial["config"]["lora_rank"]));
            assert_eq!(row["cost_usd"], string(&trial["cost_usd"]));
            assert_eq!(row["peak_memory_bytes"], string(&trial["summary"]["peak_memory_bytes"]));
            assert_eq!(row["base_model_digest"], string(&trial["digests"]["base_model"]));
            assert_eq!(row["simulated"], "true");
            assert_eq!(row["agent"], string(&trial["agent"]));
            assert_eq!(row["device_id"], string(&trial["placements"][0]["device"]));
        }
    }
    let points = rows(&at("csv/points.csv"));
    let mut seen = points.iter();
    for (trial, curve) in trials.iter().zip(&curves) {
        for point in curve.as_array().unwrap() {
            let values = point
                .as_object()
                .unwrap()
                .iter()
                .filter(|(key, _)| !["step", "time"].contains(&key.as_str()));
            for (metric, value) in values {
                let row = seen.next().unwrap();
                let want =
                    [string(&trial["id"]), "1".into(), string(&point["step"]), metric.clone(), string(value)];
                let got = ["trial", "attempt", "step", "metric", "value"].map(|key| row[key].clone());
                assert_eq!(got, want);
                // To the millisecond.
                assert_eq!(row["time"][..19], point["time"].as_str().unwrap()[..19]);
            }
        }
    }
    assert!(seen.next().is_none() && points.len() > 8, "{}", points.len());
    // A row a step, a column a metric.
    let mut steps = rows(&at("files/metrics.csv")).into_iter();
    for (trial, curve) in trials.iter().zip(&curves) {
        for point in curve.as_array().unwrap() {
            let row = steps.next().unwrap();
            assert_eq!((&row["trial"], &row["step"]), (&string(&trial["id"]), &string(&point["step"])));
            for (column, value) in &row {
                let is_metric = !["trial", "step", "time"].contains(&column.as_str());
                assert!(!is_metric || *value == string(&point[column]), "{column}: {row:?} of {point}");
            }
        }
    }
    assert!(steps.next().is_none());

    // Parquet has the same rows.
    for (name, want) in [("trials", rows(&at("csv/trials.csv"))), ("points", points)] {
        let file = std::fs::File::open(at("parquet").join(format!("{name}.parquet"))).unwrap();
        let reader = SerializedFileReader::new(file).unwrap();
        let got: Vec<_> = reader.get_row_iter(None).unwrap().map(Result::unwrap).collect();
        assert_eq!(got.len(), want.len());
        for (got, want) in got.iter().zip(&want) {
            assert_eq!(got.get_column_iter().count(), want.len());
            for (column, field) in got.get_column_iter() {
                let want = &want[column];
                match field {
                    Field::Null => assert_eq!(want, "", "{column}"),
                    Field::Str(text) => assert_eq!(text, want, "{column}"),
                    Field::Long(number) => assert_eq!(&number.to_string(), want, "{column}"),
                    Field::Double(number) => assert_eq!(*number, want.parse::<f64>().unwrap(), "{column}"),
                    Field::Bool(flag) => assert_eq!(&flag.to_string(), want, "{column}"),
                    Field::TimestampMillis(ms) => {
                        let want = chrono::DateTime::parse_from_rfc3339(want).unwrap();
                        assert_eq!(*ms, want.timestamp_millis(), "{column}")
                    }
                    other => panic!("{column}: {other:?}"),
                }
            }
        }
    }

    // Optuna's journal: a line a trial behind those of the study.
    let journal = std::fs::read_to_string(at("optuna")).unwrap();
    let lines: Vec<Value> = journal.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!((&lines[0]["study_name"], &lines[0]["op_code"]), (&json!(id), &json!(0)));
    let made: Vec<_> = lines.iter().filter(|line| line["op_code"] == 4).collect();
    assert_eq!(made.len(), trials.len());
    for (line, trial) in made.iter().zip(trials) {
        let completed = trial["state"] == "completed";
        assert_eq!(line["state"], if completed { 1 } else { 3 });
        assert_eq!(line["value"], if completed { trial["eval_loss"].clone() } else { Value::Null });
        // Of steps 0, which is the base's, 5, 10, 15 and 20.
        let reported = line["intermediate_values"].as_object().unwrap().len();
        assert_eq!(reported, if completed { 5 } else { 1 });
        assert_eq!(line["user_attrs"]["id"], trial["id"]);
        assert_eq!(line["user_attrs"]["cost_usd"], trial["cost_usd"]);
    }

    // TensorBoard's log: a run a trial beside the experiment.
    let runs = bytes_below(&at("tensorboard"));
    assert_eq!(runs.len(), 1 + trials.len());
    for name in ["", "trial-1", "trial-2", "trial-3", "trial-4"] {
        let of = |path: &PathBuf| path.parent() == Some(Path::new(name));
        let (path, bytes) = runs.iter().find(|(path, _)| of(path)).unwrap();
        assert!(path.file_name().unwrap().to_str().unwrap().starts_with("events.out.tfevents."), "{path:?}");
        assert!(bytes.windows(b"_hparams_/".len()).any(|part| part == b"_hparams_/"), "{path:?}");
    }
}

/// A value as CSV has it.
fn string(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

#[test]
fn what_cannot_be_exported_is_refused() {
    let sandbox = Sandbox::new("name: x\n");
    std::fs::write(sandbox.path().join("there"), "x").unwrap();
    std::fs::create_dir(sandbox.path().join("folder")).unwrap();
    std::fs::write(sandbox.path().join("folder/x"), "x").unwrap();
    let before = bytes_below(sandbox.path());
    for (arguments, fragments) in [
        (&["--format=csv", "--adapters", "--to=out"][..], &["--adapters", "csv"][..]),
        (&["--format=optuna", "--to=there"], &["--to there", "--overwrite"]),
        (&["--format=optuna", "--to=folder", "--overwrite"], &["--to folder", "is a directory"]),
        (&["--format=tensorboard", "--to=folder"], &["--to folder", "--overwrite"]),
        (&["--format=parquet", "--to=there"], &["--to there"]),
        (&["--format=excel", "--to=out"], &["excel", "parquet"]),
    ] {
        let output = sandbox.lorafleet(&[&["export", "x-1"], arguments].concat());
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {message}");
        assert!(fragments.iter().all(|fragment| message.contains(fragment)), "{arguments:?}: {message}");
    }
    assert_eq!(bytes_below(sandbox.path()), before);
}
