//! The main job through the real binary: a sweep file goes in; trials, adapters and a report come out.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use common::Sandbox;
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The folder of real models and data, if it is on this machine.
fn shared() -> Option<PathBuf> {
    let root = std::env::var_os("LORAFLEET_SHARED")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared"), PathBuf::from);
    if root.exists() {
        return Some(root.canonicalize().unwrap());
    }
    println!("not checked: {} is not on this machine", root.display());
    None
}

/// A sweep on stories260K by the definition of the reference figures.
fn stories(shared: &Path, rest: &str) -> String {
    format!(
        "name: stories
pretrained_model_id: {shared}/data/models/stories260K-hf
dataset_name: {shared}/data/instruct/instruct_500_guanaco.jsonl
eval_size: 50
eval_split: last
shuffle: false
max_sequence_length: 256
batch_size: 4
{rest}",
        shared = shared.display()
    )
}

#[test]
fn a_sweep_becomes_adapters_and_a_report() {
    let Some(shared) = shared() else { return };
    let sandbox = Sandbox::new(&stories(
        &shared,
        "max_steps: 4
search: { algorithm: grid }
parameters:
  lora_rank: [4, 8]
  learning_rate: [1.0e-3, 5.0e-3]
",
    ));
    let result = sandbox.json(&["run", "sweep.yaml"]);
    assert_eq!(result["sweep"]["state"], "completed");
    let trials = result["trials"].as_array().unwrap();
    assert_eq!(trials.len(), 4);
    for trial in trials {
        assert_eq!(trial["state"], "completed", "{trial:#}");
        let summary = &trial["summary"];
        assert!((summary["base_eval_loss"].as_f64().unwrap() - 5.063_520).abs() < 1e-4, "{summary:#}");
        assert!(trial["eval_loss"].as_f64().unwrap() < 5.063_52);
        assert_eq!(summary["steps"], 4);
        for number in [
            "trainable_parameters",
            "total_parameters",
            "adapter_bytes",
            "samples_per_second",
            "tokens_per_second",
            "peak_memory_bytes",
            "device_seconds",
        ] {
            assert!(summary[number].as_f64().unwrap() > 0.0, "{number}: {summary:#}");
        }
        assert!(trial["cost_usd"].as_f64().is_some());
        assert!(trial["digests"]["base_model"].as_str().unwrap().starts_with("sha256:"));
        assert_eq!(trial["config"]["lora_dropout"], 0.0);
    }
    let adapter = sandbox.dir.path().join(result["best_adapter"].as_str().unwrap());
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        assert!(adapter.join(file).is_file(), "{}", adapter.display());
    }
    let report = sandbox.dir.path().join(result["report"].as_str().unwrap());
    assert!(std::fs::read_to_string(report).unwrap().contains("<svg"));

    // The same records are there for the other verbs, from the data directory alone.
    let id = result["sweep"]["id"].as_str().unwrap();
    assert_eq!(sandbox.json(&["list"])[0]["id"], id);
    assert_eq!(sandbox.json(&["get", id])["trials"].as_array().unwrap().len(), 4);
    assert_eq!(sandbox.json(&["trials", "list", id]).as_array().unwrap().len(), 4);
    let curve = sandbox.json(&["trials", "metrics", &format!("{id}/2")]);
    let steps: Vec<_> = curve.as_array().unwrap().iter().map(|p| p["step"].as_u64().unwrap()).collect();
    assert_eq!(steps, [0, 1, 2, 3, 4]);
    let adapters = sandbox.json(&["adapters", "list", id]);
    let losses: Vec<_> =
        adapters.as_array().unwrap().iter().map(|a| a["eval_loss"].as_f64().unwrap()).collect();
    assert!(losses.len() == 4 && losses.is_sorted(), "best first: {losses:?}");
    sandbox.json(&["adapters", "pull", id, "--top", "2", "--to", "pulled"]);
    let best = adapters[0]["trial"].as_str().unwrap().rsplit_once('/').unwrap().1.to_string();
    let pulled =
        std::fs::read(sandbox.dir.path().join("pulled").join(best).join("adapter_model.safetensors"));
    assert_eq!(pulled.unwrap(), std::fs::read(adapter.join("adapter_model.safetensors")).unwrap());
    let report = sandbox.lorafleet(&["report", id, "--file", "again.html"]);
    assert!(report.status.success() && sandbox.dir.path().join("again.html").is_file());
}

/// The sweep that the README starts with, and what it promises.
#[test]
fn the_quickstart() {
    let sandbox = Sandbox::new("");
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../config/sweeps/quickstart.yaml");
    let result = sandbox.json(&["run", file]);
    let trials = result["trials"].as_array().unwrap();
    let ended = |state: &str| trials.iter().filter(|t| t["state"] == state).collect::<Vec<_>>();
    assert_eq!(trials.len(), 12);
    assert_eq!(ended("completed").len() + ended("stopped").len(), 12);
    assert!(ended("stopped").len() >= 3, "successive halving ends the weak ones");
    let best = result["sweep"]["best_value"].as_f64().unwrap();
    for trial in ended("completed") {
        let (loss, summary) = (trial["eval_loss"].as_f64().unwrap(), &trial["summary"]);
        assert!(best <= loss && loss < summary["base_eval_loss"].as_f64().unwrap() / 2.0, "{trial:#}");
        assert_ne!(summary["sample_before"], summary["sample_after"]);
        // What it said after evaluations on the way, as the server keeps it.
        let kept = sandbox.json(&["trials", "get", trial["id"].as_str().unwrap()]);
        assert_eq!(kept["summary"]["samples"], summary["samples"]);
        let samples = summary["samples"].as_array().unwrap();
        let steps: Vec<_> = samples.iter().map(|sample| sample["step"].as_u64().unwrap()).collect();
        assert_eq!(steps, [30, 60, 90, 120], "{summary:#}");
        assert!(samples.iter().all(|sample| sample["text"].is_string()));
    }
}

/// The same sweep file on a real pretrained model and real instructions.
#[test]
fn the_quickstart_on_real_input() {
    let Some(shared) = shared() else { return };
    if std::env::var_os("LORAFLEET_FULL").is_none() {
        println!("not run: minutes long (LORAFLEET_FULL=1 runs it)");
        return;
    }
    let sandbox = Sandbox::new("");
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../config/sweeps/quickstart.yaml");
    let model = format!("pretrained_model_id={}/data/models/stories260K-hf", shared.display());
    let data = format!("dataset_name={}/data/instruct/instruct_500_guanaco.jsonl", shared.display());
    let result = sandbox.json(&["run", file, "--set", &model, "--set", &data]);
    for trial in result["trials"].as_array().unwrap() {
        assert!((trial["summary"]["base_eval_loss"].as_f64().unwrap() - 5.063_520).abs() < 1e-4);
        assert!(trial["eval_loss"].as_f64().unwrap() < 5.063_52, "{trial:#}");
    }
}

/// The rows of the Markdown table that follows a title, without their numbers' thin spaces.
fn table(text: &str, title: &str) -> Vec<Vec<String>> {
    let (_, after) = text.split_once(title).unwrap_or_else(|| panic!("{title} is not in\n{text}"));
    let lines =
        after.lines().skip_while(|line| !line.starts_with('|')).take_while(|line| line.starts_with('|'));
    let cell = |cell: &str| cell.trim().replace(['\u{202f}', '\\'], "");
    lines.skip(2).map(|line| line.trim_matches('|').split(" | ").map(cell).collect()).collect()
}

/// The published benchmark scaled down, in its smallest form: its six figures and both of its tables, of what was measured.
#[test]
fn the_published_benchmark_on_a_cpu() {
    let Some(shared) = shared() else { return };
    let sandbox = Sandbox::new("");
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../config/sweeps/stories260k-benchmark.yaml");
    let data = |path: &str| format!("{}/data/{path}", shared.display());
    let tasks = format!(
        "evaluations.task_data={{ arc_challenge: {}, hellaswag: {}, truthfulqa_mc2: {} }}",
        data("eval/arc_challenge_test_100.jsonl"),
        data("eval/hellaswag_val_100.jsonl"),
        data("eval/truthfulqa_mc_100.jsonl"),
    );
    let model = format!("pretrained_model_id={}", data("models/stories260K-hf"));
    let rows = format!("dataset_name={}", data("instruct/instruct_500_guanaco.jsonl"));
    let set = [
        model.as_str(),
        rows.as_str(),
        tasks.as_str(),
        "batch_size=[2, 4]",
        "lora_rank=[8, 16]",
        "max_sequence_length=[64, 128]",
        "gradient_checkpointing=false",
        "eval_size=4",
        "evaluations.limit=3",
    ];
    let set = set.into_iter().flat_map(|set| ["--set", set]);
    let result =
        sandbox.json(&["run", file, "--price-per-hour=0.1"].into_iter().chain(set).collect::<Vec<_>>());
    let trials = result["trials"].as_array().unwrap();
    // In two precisions a middle, one other value of each of three parameters, and that middle for longer.
    assert_eq!(trials.len(), 2 * (1 + 3 + 1));
    for trial in trials {
        let summary = &trial["summary"];
        assert_eq!((&trial["state"], &trial["simulated"]), (&"completed".into(), &false.into()), "{trial:#}");
        // Its device would take more of them.
        assert_eq!(summary["throughput"], "solo", "{trial:#}");
        assert!(summary["peak_memory_bytes"].as_u64() > Some(0), "{trial:#}");
        let asked = !summary["evaluations"].as_array().unwrap().is_empty();
        assert_eq!(asked, trial["config"]["max_steps"] == 75, "{trial:#}");
    }

    let id = result["sweep"]["id"].as_str().unwrap();
    let report = sandbox.json(&["report", id, "--format", "markdown", "--file", "report"]);
    let folder = sandbox.dir.path().join(report["report"].as_str().unwrap());
    let text = std::fs::read_to_string(folder.join("report.md")).unwrap();
    assert!(!text.contains("Simulated"), "{text}");
    // (figure, the parameter, its middle value and the other one, what is measured)
    for (title, by, values, unit) in [
        ("Peak memory by batch size", "batch_size", ["2", "4"], "MB"),
        ("Peak memory by lora rank", "lora_rank", ["8", "16"], "MB"),
        ("Peak memory by max sequence length", "max_sequence_length", ["128", "64"], "MB"),
        ("Speed by lora rank", "lora_rank", ["8", "16"], "rows/s"),
        ("Speed by max sequence length", "max_sequence_length", ["128", "64"], "rows/s"),
    ] {
        let figure = format!("figures/{}.svg", title.to_lowercase().replace(' ', "-"));
        assert!(text.contains(&format!("]({figure})")) && folder.join(&figure).is_file(), "{figure}");
        let rows = table(&text, &format!("**{title}**"));
        assert_eq!(rows.len(), 4, "{title}: {rows:?}");
        for row in &rows {
            let (value, of) = row[2].split_once(' ').unwrap();
            let value: f64 = value.parse().unwrap();
            assert!(value > 0.0 && of == unit && values.contains(&row[0].as_str()), "{title}: {row:?}");
            // The other value is of one trial alone, whose measured bytes these are.
            if row[0] != values[1] || unit != "MB" {
                continue;
            }
            let is_it = |trial: &&Value| {
                trial["config"][by].as_u64() == row[0].parse().ok()
                    && trial["config"]["precision_mode"] == row[1].as_str()
            };
            let measured =
                trials.iter().find(is_it).unwrap()["summary"]["peak_memory_bytes"].as_f64().unwrap();
            assert!((measured / 1e6 - value).abs() <= 0.051, "{title}: {row:?}, not {measured}");
        }
    }
    let costs = table(&text, "**Cost of a run by precision mode**");
    let costs: Vec<_> = costs.iter().map(|row| (row[0].as_str(), row[1].as_str(), row[2].as_str())).collect();
    let [("4bit", "CPU", a), ("float32", "CPU", b)] = costs[..] else { panic!("{costs:?}") };
    assert!(
        [a, b].iter().all(|cost| cost.trim_start_matches('$').parse::<f64>().unwrap() > 0.0),
        "{costs:?}"
    );

    let parameters = table(&text, "## Trainable parameters");
    let parameters: Vec<_> = parameters.iter().map(|row| (row[0].as_str(), row[1].as_str())).collect();
    assert_eq!(parameters, [("8", "46240"), ("16", "92480")]);
    let losses = table(&text, "## Base against adapters");
    // The published table: eval/loss, the mean of the preset and its three tasks, parameters, which trial it is.
    let cells = |row: &Vec<String>| {
        row.len() == 8 && row[2..6].iter().all(|score| score.parse::<f64>().is_ok() || score.contains('±'))
    };
    assert!(losses.iter().all(cells), "{losses:?}");
    let losses: Vec<(&str, f64)> =
        losses.iter().map(|row| (row[0].as_str(), row[1].parse().unwrap())).collect();
    let [("base, 4bit", base), ("adapter, 4bit", with), ("base, float32", float), ("adapter, float32", best)] =
        losses[..]
    else {
        panic!("{losses:?}")
    };
    assert!(with < base && best < float, "{losses:?}");
    let scores = table(&text, "**Accuracy by task**");
    for precision in ["4bit", "float32"] {
        let mean = |row: &&Vec<String>| row[0] == "eval/open-llm-leaderboard-v1/mean" && row[1] == precision;
        assert!(scores.iter().find(mean).is_some_and(|row| row[5].contains('±')), "{precision}: {scores:?}");
    }
}

#[test]
fn an_interrupted_sweep_goes_on() {
    let Some(shared) = shared() else { return };
    let sandbox = Sandbox::new(&stories(
        &shared,
        "max_steps: 60
search: { algorithm: grid, max_concurrent_trials: 1 }
parameters:
  lora_rank: [4, 8]
",
    ));
    for signal in ["-INT", "-TERM"] {
        let mut child = sandbox.command(&["run", "sweep.yaml"]).stderr(Stdio::piped()).spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (mut said, mut is_told) = (String::new(), false);
        for line in stderr.lines() {
            let line = line.unwrap();
            // Told a second time it would end at once.
            if line.contains("running") && !std::mem::replace(&mut is_told, true) {
                let id = child.id().to_string();
                assert!(Command::new("kill").args([signal, &id]).status().unwrap().success());
            }
            said += &line;
            said.push('\n');
        }
        assert_eq!(child.wait().unwrap().code(), Some(130), "{signal}: {said}");
        let again = "lorafleet run --new sweep.yaml";
        assert!(said.contains("go on with the same command") && said.contains(again), "{signal}: {said}");
        assert!(!sandbox.dir.path().join("lorafleet-data/endpoint").exists(), "{signal}");
    }

    let result = sandbox.json(&["run", "sweep.yaml"]);
    assert_eq!(sandbox.json(&["list"]).as_array().unwrap().len(), 1, "it went on, not anew");
    for trial in result["trials"].as_array().unwrap() {
        assert_eq!(trial["state"], "completed");
        let curve = sandbox.json(&["trials", "metrics", trial["id"].as_str().unwrap()]);
        let steps: Vec<_> = curve.as_array().unwrap().iter().map(|p| p["step"].as_u64().unwrap()).collect();
        assert_eq!(steps, (0..=60).collect::<Vec<_>>(), "gap-free and single-valued");
    }
}

#[test]
fn invalid_input_names_place_and_remedy() {
    let Some(shared) = shared() else { return };
    let good =
        stories(&shared, "max_steps: 2\nsearch: { algorithm: grid }\nparameters: { lora_rank: [4] }\n");
    // (what replaces what in the good file, further arguments, what the message holds)
    let rows: &[(&str, &str, &[&str], &[&str])] = &[
        ("max_steps: 2", "max_stpes: 2", &[], &["sweep.yaml:9:1", "max_stpes", "max_steps"]),
        ("batch_size: 4", "batch_size: four", &[], &["sweep.yaml:8:", "batch_size"]),
        ("[4]", "[]", &[], &["sweep.yaml:11:", "lora_rank", "empty"]),
        ("lora_rank: [4]", "learning_rate: { log_uniform: [0, 1] }", &[], &["sweep.yaml:11:", "log_uniform"]),
        ("[4]", "[0]", &[], &["lora_rank"]),
        ("[4]", "[4096]", &[], &["lora_rank", "4096"]),
        ("stories260K-hf", "no-such-model", &[], &["sweep.yaml:2:", "no-such-model"]),
        ("instruct_500_guanaco.jsonl", "no.jsonl", &[], &["sweep.yaml:3:", "no.jsonl"]),
        ("max_sequence_length: 256", "max_sequence_length: 100000", &[], &["max_sequence_length", "100000"]),
        (
            "eval_size: 50",
            "instruct_column_in_dataset: txet",
            &[],
            &["sweep.yaml:3:1: dataset_name: ", "txet", "text"],
        ),
        ("stories260K-hf", ".", &[], &["sweep.yaml:2:1: pretrained_model_id: ", "config.json"]),
        ("", "", &["--set", "lora_rnk=4"], &["--set", "lora_rnk", "lora_rank"]),
        ("", "", &["--set", "lora_rank"], &["--set", "KEY=VALUE"]),
    ];
    for (from, to, args, fragments) in rows {
        let sandbox = Sandbox::new(&if from.is_empty() { good.clone() } else { good.replace(from, to) });
        let output = sandbox.lorafleet(&[&["run", "sweep.yaml"], *args].concat());
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{from} -> {to} {args:?}: {said}");
        for fragment in *fragments {
            assert!(said.contains(fragment), "{from} -> {to} {args:?} lacks {fragment:?}: {said}");
        }
        assert!(!sandbox.dir.path().join("lorafleet-data").exists(), "nothing was started");
    }
}

#[test]
fn errors_of_use() {
    let sandbox = Sandbox::new("name: x\n");
    for (args, code, fragment) in [
        (vec!["run", "missing.yaml"], 2, "missing.yaml"),
        (vec!["run"], 2, "SWEEP"),
        (vec!["list"], 3, "lorafleet-data"),
        (vec!["list", "--endpoint", "http://127.0.0.1:1"], 3, "127.0.0.1:1"),
        (vec!["list", "--endpoint", "http://["], 2, "--endpoint"),
        (vec!["adapters", "pull", "x/1"], 2, "--to"),
    ] {
        let output = sandbox.lorafleet(&args);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {said}");
        assert!(said.contains(fragment), "{args:?}: {said}");
    }
}

/// A pipe whose reader is gone.
fn closed_pipe() -> Stdio {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    writer.into()
}

/// A sweep on the quickstart's model and rows.
fn tiny(rest: &str) -> String {
    let quickstart = concat!(env!("CARGO_MANIFEST_DIR"), "/../config/quickstart");
    format!(
        "name: tiny
pretrained_model_id: {quickstart}/base
dataset_name: {quickstart}/instruct.jsonl
eval_size: 4
eval_split: last
max_sequence_length: 16
search: {{ algorithm: grid }}
{rest}"
    )
}

#[test]
fn a_closed_pipe_ends_no_work() {
    let sandbox = Sandbox::new(&tiny("max_steps: 2\nparameters: { lora_rank: [4] }\n"));
    let output = sandbox.command(&["completions", "bash"]).stdout(closed_pipe()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut run = sandbox.command(&["run", "sweep.yaml"]);
    assert!(run.stdout(closed_pipe()).stderr(closed_pipe()).status().unwrap().success());
    let sweeps = sandbox.json(&["list"]);
    assert_eq!(sweeps[0]["state"], "completed");
    let id = sweeps[0]["id"].as_str().unwrap();
    assert!(sandbox.dir.path().join(format!("lorafleet-data/reports/{id}.html")).is_file());
    let metrics = ["trials", "metrics", &format!("{id}/1"), "-o", "json"];
    let output = sandbox.command(&metrics).stdout(closed_pipe()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    // A finished sweep is followed to its last trial.
    let watched = sandbox.lorafleet(&["watch", id]);
    let said = String::from_utf8_lossy(&watched.stderr);
    assert!(watched.status.success() && said.contains("1/1 trials over"), "{said}");

    let report = sandbox.json(&["report", id]);
    assert!(report["report"].as_str().unwrap().ends_with(&format!("{id}.html")), "{report}");
}

#[test]
fn a_spent_budget_and_cut_rows_are_told() {
    let sandbox = Sandbox::new(&tiny(
        "max_steps: 1000000
budget: { max_wall_clock: 5s }
parameters: { lora_rank: [4] }
",
    ));
    let output = sandbox.lorafleet(&["run", "sweep.yaml"]);
    let (said, shown) = (String::from_utf8_lossy(&output.stderr), String::from_utf8_lossy(&output.stdout));
    assert!(output.status.success(), "{said}");
    assert!(said.contains("4 held out") && said.contains(" cut to 16 tokens"), "{said}");
    assert!(shown.contains(" cut to 16 tokens"), "{shown}");
    let ended = "max_wall_clock of 5 s is spent";
    assert!(shown.contains(ended), "{shown}");
    let sweep = &sandbox.json(&["list"])[0];
    assert!(sweep["ended_early"].as_str().unwrap().starts_with(ended), "{sweep}");
    let id = sweep["id"].as_str().unwrap();
    for verb in ["get", "watch"] {
        let shown = sandbox.lorafleet(&[verb, id]).stdout;
        assert!(String::from_utf8_lossy(&shown).contains(ended), "{verb}");
    }
    let plan = sandbox.json(&["plan", "sweep.yaml"]);
    assert!(plan[0]["truncated_rows"].as_u64().unwrap() > 0 && plan[0]["skipped_rows"] == 0, "{plan}");
}

#[test]
fn a_verb_that_fails_leaves_no_endpoint_behind() {
    let sandbox = Sandbox::new("");
    let data_dir = sandbox.dir.path().join("lorafleet-data");
    std::fs::create_dir(&data_dir).unwrap();
    for args in [vec!["get", "no-0000"], vec!["trials", "get", "no-0000/1"], vec!["report", "no-0000"]] {
        let output = sandbox.lorafleet(&args);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(2) && said.contains("no-0000"), "{args:?}: {said}");
        assert!(!data_dir.join("endpoint").exists(), "{args:?}");
    }
}
