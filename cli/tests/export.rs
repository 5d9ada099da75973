//! A sweep for others' tools: `lorafleet export --format`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use common::mlflow::Mlflow;
use common::{Sandbox, soon};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A sweep of four trials, of which those with the larger learning rate diverge, and its model.
fn sandbox(max_steps: u32) -> Sandbox {
    let sandbox = Sandbox::new(&format!(
        "name: exported
pretrained_model_id: ./model
dataset_name: nobody/rows
compute_dtype: float16
max_steps: {max_steps}
eval_steps: 5
search: {{ algorithm: grid, metric: eval/loss }}
parameters:
  learning_rate: [0.001, 2]
  precision_mode: [float16, 4bit]
",
    ));
    std::fs::create_dir(sandbox.path().join("model")).unwrap();
    let config = json!({
        "model_type": "llama", "hidden_act": "silu", "hidden_size": 256, "intermediate_size": 512,
        "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 1000, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": false,
    });
    std::fs::write(sandbox.path().join("model/config.json"), config.to_string()).unwrap();
    sandbox
}

/// The same, run on a simulated device.
fn swept() -> (Sandbox, String) {
    let sandbox = sandbox(20);
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
        (&["--format=csv"], &["--to", "csv"]),
        (&["--format=csv", "--to=out", "--follow"], &["--follow", "csv", "optuna, tensorboard or mlflow"]),
        (&["--format=optuna", "--to=out", "-f", "--overwrite"], &["--follow", "--overwrite"]),
        (&["--format=optuna", "--to=folder", "-f"], &["--to folder", "is a directory"]),
        (&["--format=tensorboard", "--to=there", "-f"], &["--to there"]),
        (&["--format=csv", "--to=out", "--experiment=x"], &["--experiment", "csv"]),
        (&["--format=mlflow"], &["--tracking-uri", "MLFLOW_TRACKING_URI"]),
        (&["--format=mlflow", "--tracking-uri=http://h", "--to=out"], &["--to", "mlflow"]),
        (&["--format=mlflow", "--tracking-uri=sqlite:///x.db"], &["sqlite:///x.db", "http://HOST:PORT"]),
    ] {
        let output = sandbox.lorafleet(&[&["export", "x-1"], arguments].concat());
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {message}");
        assert!(fragments.iter().all(|fragment| message.contains(fragment)), "{arguments:?}: {message}");
    }
    assert_eq!(bytes_below(sandbox.path()), before);
}

/// The points of a curve by metric and step, as MLflow has their values.
fn wanted(curve: &Value) -> BTreeMap<(String, u64), Value> {
    let points = curve.as_array().unwrap().iter().flat_map(|point| {
        let values =
            point.as_object().unwrap().iter().filter(|(key, _)| !["step", "time"].contains(&key.as_str()));
        values.map(|(key, value)| ((key.clone(), point["step"].as_u64().unwrap()), value.clone()))
    });
    points.collect()
}

/// That each trial is a run with its parameters and every point once.
fn assert_runs(sandbox: &Sandbox, id: &str, mlflow: &Mlflow) {
    let trials = sandbox.json(&["trials", "list", id]);
    let trials = trials.as_array().unwrap();
    let runs = mlflow.with(|state| state.runs.clone());
    assert_eq!(runs.len(), trials.len());
    for trial in trials {
        let tag = json!({ "key": "lorafleet.trial", "value": trial["id"] });
        let run = runs.iter().find(|run| run["data"]["tags"].as_array().unwrap().contains(&tag)).unwrap();
        let status = if trial["state"] == "completed" { "FINISHED" } else { "FAILED" };
        assert_eq!(run["info"]["status"], status, "{tag}");
        assert!(run["info"]["start_time"].as_u64() <= run["info"]["end_time"].as_u64(), "{}", run["info"]);
        let param = |key: &str| {
            let params = run["data"]["params"].as_array().unwrap();
            params.iter().find(|param| param["key"] == key).map(|param| string(&param["value"]))
        };
        for key in ["lora_rank", "learning_rate", "precision_mode", "max_steps"] {
            assert_eq!(param(key), Some(string(&trial["config"][key])), "{tag} {key}");
        }
        let mut want = wanted(&sandbox.json(&["trials", "metrics", trial["id"].as_str().unwrap()]));
        let step = trial["step"].as_u64().unwrap();
        want.extend(
            (!trial["cost_usd"].is_null()).then(|| (("cost_usd".into(), step), trial["cost_usd"].clone())),
        );
        for metric in run["data"]["metrics"].as_array().unwrap() {
            let at = (string(&metric["key"]), metric["step"].as_u64().unwrap());
            let want =
                want.remove(&at).unwrap_or_else(|| panic!("{metric} of {tag} is there twice, or is none"));
            match want {
                Value::Null => {
                    assert!(["NaN", "Infinity"].map(Value::from).contains(&metric["value"]), "{metric}")
                }
                value => assert_eq!(metric["value"], value, "{metric}"),
            }
            // In milliseconds: since 2020.
            assert!(metric["timestamp"].as_u64() > Some(1_577_836_800_000), "{metric}");
        }
        assert!(want.is_empty(), "{tag} lacks {want:?}");
    }
}

/// Against a fake of MLflow's server.
#[test]
fn an_export_to_mlflow_is_gone_on_with() {
    let (sandbox, id) = swept();
    let mlflow = Mlflow::start();
    let export = ["export", &id, "--format", "mlflow", "--tracking-uri", &mlflow.uri];
    // The second batch of points is stored in part, and the export ends.
    mlflow.with(|state| state.batches = Some(1));
    let cut = sandbox.lorafleet(&export);
    let said = String::from_utf8_lossy(&cut.stderr).into_owned();
    assert_eq!(cut.status.code(), Some(3), "{said}");
    let url = format!("{}/api/2.0/mlflow/runs/log-batch", mlflow.uri);
    for part in [&url, "503", "TEMPORARILY_UNAVAILABLE", "the database is locked", "export again later"] {
        assert!(said.contains(part), "{part} is not in {said}");
    }
    let stored = mlflow.with(|state| {
        state.batches = None;
        state.runs.len()
    });
    assert_eq!(stored, 2);
    let done = sandbox.json(&export);
    assert_eq!(
        (&done["format"], &done["experiment"], &done["experiment_id"], &done["tracking_uri"]),
        (&json!("mlflow"), &json!(id), &json!("0"), &json!(mlflow.uri))
    );
    assert_runs(&sandbox, &id, &mlflow);
    // Again, and followed to an end that is there, nothing is sent.
    for follow in [&[][..], &["--follow"]] {
        mlflow.with(|state| state.calls.clear());
        sandbox.json(&[&export[..], follow].concat());
        let calls = mlflow.with(|state| state.calls.clone());
        let reads = |path: &str| path.contains("experiments/get-by-name") || path.ends_with("runs/search");
        assert!(!calls.is_empty() && calls.iter().all(|(path, _)| reads(path)), "{calls:?}");
    }
    assert_runs(&sandbox, &id, &mlflow);
}

/// Against a fake of MLflow's server.
#[test]
fn what_an_mlflow_server_refuses_is_said_without_secrets() {
    let (sandbox, id) = swept();
    let mlflow = Mlflow::start();
    let export = |uri: &str, answer: Option<(u16, &'static str)>| {
        mlflow.with(|state| state.answer = answer);
        let mut command = sandbox.command(&["export", &id, "--format", "mlflow", "--experiment", "mine"]);
        command.env("MLFLOW_TRACKING_URI", uri).env("MLFLOW_TRACKING_TOKEN", "hush-hush-hush");
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!said.contains("hush"), "{said}");
        (output.status.code(), said)
    };
    let uri = mlflow.uri.as_str();
    for (uri, answer, code, parts) in [
        (uri, Some((401, "who are you")), 1, &["get-by-name", "401", "MLFLOW_TRACKING_TOKEN"][..]),
        (
            uri,
            Some((400, "{\"error_code\":\"INVALID_STATE\",\"message\":\"no\"}")),
            1,
            &["400", "INVALID_STATE: no", "--experiment"],
        ),
        (uri, Some((404, "<html>")), 1, &["404", "no answer of MLflow", "--tracking-uri"]),
        (uri, Some((200, "<html>")), 1, &["200", "no answer of MLflow"]),
        (uri, Some((502, "<html>")), 3, &["502"]),
        // Nobody listens at port 1.
        ("http://127.0.0.1:1", None, 3, &["http://127.0.0.1:1/", "no answer", "--tracking-uri"]),
    ] {
        let (status, said) = export(uri, answer);
        assert_eq!(status, Some(code), "{said}");
        assert!(parts.iter().all(|part| said.contains(part)), "{parts:?}: {said}");
    }
    let called = mlflow.with(|state| state.calls.pop().unwrap());
    assert_eq!(called.1.as_deref(), Some("Bearer hush-hush-hush"));
    let deleted = json!({ "experiment_id": "4", "name": "mine", "lifecycle_stage": "deleted" });
    mlflow.with(|state| state.experiments.insert("mine".into(), deleted));
    let (status, said) = export(uri, None);
    assert_eq!(status, Some(2), "{said}");
    assert!(said.contains("mlflow experiments restore --experiment-id 4"), "{said}");
}

#[test]
fn a_mirror_goes_on_with_what_is_there() {
    let (sandbox, id) = swept();
    let at = |name: &str| sandbox.path().join(name);
    for (format, other) in [("optuna", "tensorboard"), ("tensorboard", "optuna")] {
        sandbox.json(&["export", &id, "--to", format, "--format", format]);
        let whole = bytes_below(&at(format));
        for to in [format, "mirror"] {
            // Whether there is nothing, or all.
            for _ in 0..2 {
                let said = sandbox.json(&["export", &id, "--to", to, "--format", format, "--follow"]);
                assert_eq!(said["path"], to);
                assert_eq!(bytes_below(&at(to)), whole, "{format} to {to}");
            }
        }
        let refused = sandbox.lorafleet(&["export", &id, "--to", "mirror", "--format", other, "--follow"]);
        assert_ne!(refused.status.code(), Some(0), "{other} where {format} is");
        assert_eq!(bytes_below(&at("mirror")), whole, "{other} where {format} is");
        std::fs::remove_dir_all(at("mirror")).or_else(|_| std::fs::remove_file(at("mirror"))).unwrap();
    }
    // Half of a journal, whose last line was cut short.
    let journal = std::fs::read_to_string(at("optuna")).unwrap();
    std::fs::write(at("optuna"), &journal[..journal.len() - 40]).unwrap();
    sandbox.json(&["export", &id, "--to", "optuna", "--format", "optuna", "--follow"]);
    assert_eq!(std::fs::read_to_string(at("optuna")).unwrap(), journal);
    // A run that was cut short anywhere.
    let run = at("tensorboard/trial-1");
    let (name, bytes) = bytes_below(&run).into_iter().next().unwrap();
    for length in [bytes.len() - 1, bytes.len() / 2, bytes.len() / 3, 3] {
        std::fs::write(run.join(&name), &bytes[..length]).unwrap();
        sandbox.json(&["export", &id, "--to", "tensorboard", "--format", "tensorboard", "-f"]);
        assert_eq!(bytes_below(&run)[&name], bytes, "{length} bytes");
    }
}

/// A server of simulated devices on a sandbox's data directory, killed when it is dropped.
struct Server(std::process::Child);

impl Server {
    fn start(sandbox: &Sandbox) -> Self {
        let up = ["up", "--listen=127.0.0.1:0", "--simulate=T4-16GB:2", "--simulate-speed=1"];
        let mut child = sandbox.command(&up).stderr(std::process::Stdio::piped()).spawn().unwrap();
        let mut said = std::io::BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        while !line.contains("serving") {
            line.clear();
            assert!(std::io::BufRead::read_line(&mut said, &mut line).unwrap() > 0, "it ended");
        }
        // Read to its end: a server whose messages nobody reads must not end of it.
        std::thread::spawn(move || std::io::copy(&mut said, &mut std::io::sink()));
        let server = Self(child);
        soon("its agent", || sandbox.json(&["agents", "list"]).as_array().unwrap().first().map(|_| ()));
        server
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Mirrors of a sweep that is followed from its submission on are what an export is of the sweep when it is over.
#[test]
fn a_mirror_of_a_sweep_that_runs_is_the_export_of_one_that_is_over() {
    let sandbox = sandbox(400);
    let _server = Server::start(&sandbox);
    let mlflow = Mlflow::start();
    let id = sandbox.json(&["submit", "sweep.yaml"])["id"].as_str().unwrap().to_string();
    let follow = |arguments: &[&str]| {
        let mut command = sandbox.command(&[&["export", &id, "-f", "-o", "json"], arguments].concat());
        command.stdout(std::process::Stdio::piped()).spawn().unwrap()
    };
    let mirrors = [
        follow(&["--format=optuna", "--to=journal"]),
        follow(&["--format=tensorboard", "--to=log"]),
        follow(&["--format=mlflow", "--tracking-uri", &mlflow.uri]),
    ];
    for mirror in mirrors {
        let output = mirror.wait_with_output().unwrap();
        assert!(output.status.success(), "{:?}", output.status);
    }
    assert_eq!(sandbox.json(&["get", &id])["state"], "completed");
    assert_runs(&sandbox, &id, &mlflow);
    sandbox.json(&["export", &id, "--format=tensorboard", "--to=whole"]);
    assert_eq!(bytes_below(&sandbox.path().join("log")), bytes_below(&sandbox.path().join("whole")));
    // Optuna's journal has other lines of the same trials.
    sandbox.json(&["export", &id, "--format=optuna", "--to=whole.log"]);
    let steps = |name: &str| {
        let text = std::fs::read_to_string(sandbox.path().join(name)).unwrap();
        let (mut trials, mut steps) = (0_u64, Vec::new());
        for line in text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()) {
            for (step, value) in line["intermediate_values"].as_object().into_iter().flatten() {
                steps.push((trials, step.parse::<u64>().unwrap(), value.to_string()));
            }
            if line["op_code"] == 7 {
                let step = line["step"].as_u64().unwrap();
                steps.push((
                    line["trial_id"].as_u64().unwrap(),
                    step,
                    line["intermediate_value"].to_string(),
                ));
            }
            trials += u64::from(line["op_code"] == 4);
        }
        steps.sort();
        steps
    };
    assert_eq!(steps("journal"), steps("whole.log"));
}
