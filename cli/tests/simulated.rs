//! A sweep on devices that are not there: `lorafleet run --simulate`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;
#[path = "../../trainer/tests/common/mod.rs"]
mod model;

use common::Sandbox;
use serde_json::{Value, json};
use std::path::Path;

const A100: &str = "A100-40GB";
const V100: &str = "V100-16GB";
const BENCHMARK: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../config/sweeps/openllama-7b-benchmark.yaml");

/// The published experiment as it ships, all of it on a fleet of both accelerators, with the report that it is for.
#[test]
fn the_published_benchmark() {
    let sandbox = sandbox("max_steps: 1\n");
    let mut arguments = vec!["run", BENCHMARK, "--set", "pretrained_model_id=./model"];
    arguments.extend(["--set", "logging_steps=500", "--set", "evaluations.limit=200"]);
    arguments.extend(["--simulate", "A100-40GB:2,V100-16GB:2", "--simulate-speed", "1000000"]);
    let result = sandbox.json(&arguments);
    let trials = result["trials"].as_array().unwrap();
    // Of each accelerator: none or all layers again, two precisions, and 7 batch sizes, 5 ranks and 4 lengths that share a
    // middle; and that middle in two precisions for longer.
    assert_eq!(trials.len(), 2 * (2 * 2 * (7 + 5 + 4 - 2) + 2));
    let solo: fn(&Value) -> bool = |trial| trial["summary"]["throughput"] == "solo";
    let unfit: fn(&Value) -> bool = |trial| trial["failure"]["class"] == "out_of_memory";
    let mut of_lengths = [0, 0];
    for accelerator in [A100, V100] {
        let on = |trial: &&Value| trial["config"]["accelerator"] == accelerator;
        let here: Vec<_> = trials.iter().filter(on).collect();
        assert_eq!(here.len(), trials.len() / 2, "{accelerator}");
        assert!(here.iter().all(|trial| trial["device"]["accelerator"] == accelerator), "{accelerator}");
        let count = |is: fn(&Value) -> bool| here.iter().filter(|trial| is(trial)).count();
        let (fit, unfit) = (count(solo), count(unfit));
        assert!(unfit > 0 && fit > 0 && fit + unfit == here.len(), "{accelerator}: {fit} {unfit}");
        for trial in here.iter().filter(|trial| solo(trial)) {
            // Those that are trained for long are asked, and no others.
            let long = trial["config"]["max_steps"] == 1875;
            let asked = trial["summary"]["evaluations"].as_array().is_some_and(|scores| !scores.is_empty());
            assert_eq!(asked, long, "{trial:#}");
            of_lengths[usize::from(long)] += 1;
        }
    }
    assert!(of_lengths[0] > of_lengths[1] && of_lengths[1] > 0, "{of_lengths:?}");

    let id = result["sweep"]["id"].as_str().unwrap();
    let report = sandbox.json(&["report", id, "--format", "markdown", "--file", "report"]);
    let folder = sandbox.path().join(report["report"].as_str().unwrap());
    let text = std::fs::read_to_string(folder.join("report.md")).unwrap();
    for figure in [
        "peak-memory-by-batch-size",
        "peak-memory-by-lora-rank",
        "peak-memory-by-max-sequence-length",
        "speed-by-lora-rank",
        "speed-by-max-sequence-length",
        "cost-of-a-run-by-accelerator",
        "accuracy-by-task",
    ] {
        assert!(text.contains(&format!("](figures/{figure}.svg)")), "{figure} is not in\n{text}");
        assert!(folder.join(format!("figures/{figure}.svg")).is_file(), "{figure}");
    }
    for said in [
        "less memory than float16**",
        "slower than float16**",
        "slower than A100-40GB**",
        "gradient\\_checkpointing true needs",
        "4bit, not recomputed, on V100-16GB (lora\\_rank 16, max\\_sequence\\_length 512) fits up to batch\\_size",
        "raises the mean of open-llm-leaderboard-v1 by",
        "| of | eval/loss | mean of open-llm-leaderboard-v1 | arc\\_challenge acc\\_norm | hellaswag acc\\_norm | \
         truthfulqa\\_mc2 acc | trainable parameters | that is |",
        "### More takeaways",
        "4bit, A100-40GB",
        "## Trainable parameters",
        "**Cheapest good**",
        "does not fit: needs",
        "## Beside the published numbers",
        "| LoRA, float16 | lora\\_rank 16, max\\_sequence\\_length 512 | 28.2 GB |",
        "| QLoRA, 4bit | A100-40GB | 32 |",
        "| LoRA, float16 | lora\\_rank 8 | \\~5 rows/s |",
        "| QLoRA, 4bit | V100-16GB | \\$6.75 |",
        "| trainable parameters | lora\\_rank 64 | 1.60e8 |",
        "| LoRA | TruthfulQA | 0.45 |",
        "- \\$1 buys far more samples than 500 steps of batch 2 at 5 samples a second",
    ] {
        assert!(text.contains(said), "{said} is not in\n{text}");
    }
    // What differs in accelerator or recomputing alone is the same result, of which nothing is claimed.
    assert!(!text.contains("eval/loss shown between") && !text.contains("needs as much memory as"), "{text}");
    assert_eq!(text.matches("**Simulated.**").count(), text.matches("](figures/").count());
    // The same numbers for programs: memory, batch sizes, adapters, speed, cost and accuracies, each of ours with the published
    // one.
    let table = std::fs::read_to_string(folder.join("published.csv")).unwrap();
    let lines = |number: &str| table.lines().filter(|line| line.starts_with(number)).count();
    for (number, least) in [
        ("Peak memory,GB,", 8),
        ("Largest batch size,rows,", 4),
        ("Parameters and adapters,", 12),
        ("Speed,rows/s,", 8),
        ("Cost of a run,US dollars,", 4),
        ("Accuracy,,", 16),
    ] {
        assert!(lines(number) >= least, "{number}: {table}");
    }
}

/// What it takes is known before: each configuration is planned for its accelerator alone.
#[test]
fn the_published_benchmark_is_foreseen() {
    let [Some(tokenizer), Some(questions)] =
        ["data/models/llama2-tokenizer/tokenizer.model", "data/eval"].map(model::shared)
    else {
        return;
    };
    let sandbox = sandbox("max_steps: 1\n");
    std::fs::copy(tokenizer, sandbox.path().join("model/tokenizer.model")).unwrap();
    write_outline(&sandbox.path().join("model/model.safetensors"));
    let row = json!({ "text": format!("### Human: w5 w6 ### Assistant: {}", "w7 w8 ".repeat(90)) });
    std::fs::write(sandbox.path().join("rows.jsonl"), format!("{row}\n").repeat(36)).unwrap();
    let data: Vec<_> = [
        ("arc_challenge", "arc_challenge_test_100.jsonl"),
        ("hellaswag", "hellaswag_val_100.jsonl"),
        ("truthfulqa_mc2", "truthfulqa_mc_100.jsonl"),
    ]
    .map(|(task, file)| format!("{task}: {}", questions.join(file).display()))
    .into();
    let data = format!("evaluations.task_data={{ {} }}", data.join(", "));
    let mut arguments = vec!["plan", BENCHMARK, "--set", "pretrained_model_id=./model"];
    arguments.extend(["--set", "dataset_name=./rows.jsonl", "--set", &data]);
    let plan = sandbox.json(&arguments);
    let plan = plan.as_array().unwrap();
    assert_eq!(plan.len(), 116);
    let mut fitting = [0, 0];
    for trial in plan {
        let [device] = trial["devices"].as_array().unwrap().as_slice() else { panic!("{trial:#}") };
        assert_eq!(device["device"], trial["parameters"]["accelerator"], "{trial:#}");
        let asked = trial["parameters"]["max_steps"] == 1875;
        assert_eq!(
            (trial["steps"] == 1875, trial["evaluation_tokens"].is_u64()),
            (asked, asked),
            "{trial:#}"
        );
        fitting[usize::from(device["device"] == V100)] += usize::from(device["fits"] == true);
    }
    assert!(58 > fitting[0] && fitting[0] > fitting[1] && fitting[1] > 0, "{fitting:?}");
    let elsewhere = sandbox.lorafleet(&[&arguments[..], &["--device", "24GB"]].concat());
    let message = String::from_utf8_lossy(&elsewhere.stderr).into_owned();
    assert!(elsewhere.status.code() == Some(2) && message.contains("A100-40GB or V100-16GB"), "{message}");
    // Of one accelerator alone, which a sweep file's choice gives way to.
    let one = sandbox.json(&[&arguments[..], &["--set", "accelerator=V100-16GB"]].concat());
    assert_eq!(one.as_array().unwrap().len(), 58);
}

/// A trial that must run where this machine has no such device would wait for ever.
#[test]
fn an_accelerator_that_is_not_simulated_is_refused() {
    let sandbox = sandbox(
        "max_steps: 1
precision_mode: 4bit
search: { algorithm: grid }
parameters: { accelerator: [A100-40GB, T4-16GB] }
",
    );
    let run = |device: &str| {
        sandbox.lorafleet(&["run", "sweep.yaml", "--simulate-speed=100000", "--simulate", device])
    };
    let refused = run("T4-16GB");
    let message = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(2), "{message}");
    for said in ["sweep.yaml:8:15: accelerator: trials must run on A100-40GB", "--set accelerator=T4-16GB"] {
        assert!(message.contains(said), "{said:?} is not in {message}");
    }
    assert_eq!(run("T4-16GB,A100-40GB").status.code(), Some(0));
}

/// A sweep over OpenLLaMA 7B, of which there is the configuration alone, and of the rows nothing.
fn sandbox(rest: &str) -> Sandbox {
    let sandbox = Sandbox::new(&format!(
        "name: simulated
pretrained_model_id: ./model
dataset_name: nobody/rows
compute_dtype: float16
{rest}"
    ));
    std::fs::create_dir(sandbox.path().join("model")).unwrap();
    let config = json!({
        "model_type": "llama", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": false,
    });
    std::fs::write(sandbox.path().join("model/config.json"), config.to_string()).unwrap();
    sandbox
}

/// A file of weights of OpenLLaMA 7B's shapes, in which nothing stands but what says so, so that it takes no room on the disk.
fn write_outline(file: &Path) {
    let mut tensors = vec![
        ("model.embed_tokens.weight".to_string(), vec![32000, 4096]),
        ("lm_head.weight".to_string(), vec![32000, 4096]),
        ("model.norm.weight".to_string(), vec![4096]),
    ];
    for layer in 0..32 {
        let mut add = |name: &str, shape: &[u64]| {
            tensors.push((format!("model.layers.{layer}.{name}.weight"), shape.to_vec()));
        };
        for name in ["q", "k", "v", "o"] {
            add(&format!("self_attn.{name}_proj"), &[4096, 4096]);
        }
        for name in ["gate", "up"] {
            add(&format!("mlp.{name}_proj"), &[11008, 4096]);
        }
        add("mlp.down_proj", &[4096, 11008]);
        for name in ["input", "post_attention"] {
            add(&format!("{name}_layernorm"), &[4096]);
        }
    }
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for (name, shape) in tensors {
        let (start, bytes) = (end, 2 * shape.iter().product::<u64>());
        end += bytes;
        header.insert(name, json!({ "dtype": "F16", "shape": shape, "data_offsets": [start, end] }));
    }
    let header = Value::Object(header).to_string();
    let length = header.len() as u64;
    std::fs::write(file, [&length.to_le_bytes()[..], header.as_bytes()].concat()).unwrap();
    std::fs::OpenOptions::new().write(true).open(file).unwrap().set_len(8 + length + end).unwrap();
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value}"))
}

#[test]
fn the_published_comparison_without_its_machines() {
    let sandbox = sandbox(
        "max_steps: 100
search: { algorithm: grid }
parameters:
  precision_mode: [float16, 4bit]
  lora_rank: [8, 64]
",
    );
    let speed = 20_000.0;
    let result =
        sandbox.json(&["run", "sweep.yaml", "--simulate", &format!("{A100}:2"), "--simulate-speed", "20000"]);
    assert_eq!(result["sweep"]["state"], "completed");
    let trials = result["trials"].as_array().unwrap();
    assert_eq!(trials.len(), 4);
    let mut total = 0.0;
    for trial in trials {
        assert_eq!((&trial["state"], &trial["simulated"]), (&json!("completed"), &json!(true)), "{trial:#}");
        let digest = trial["digests"]["base_model"].as_str().unwrap();
        assert!(digest.starts_with("simulated:"), "{digest}");
        let summary = &trial["summary"];
        assert_eq!(summary["predicted_peak_memory_bytes"], summary["peak_memory_bytes"]);
        // The device's time is dear, not the short while in which it passed.
        let (seconds, cost) = (number(&summary["device_seconds"]), number(&trial["cost_usd"]));
        let steps = 100.0 * 2.0 / number(&summary["samples_per_second"]);
        assert!(seconds > 0.999 * steps, "{trial:#}");
        let own = number(&summary["simulated_seconds"]);
        assert!(own <= 1.001 * seconds, "{trial:#}");
        assert!((cost / (3.673385 * own / 3600.0) - 1.0).abs() < 1e-6, "{cost} dollars: {trial:#}");
        let predicted = number(&summary["predicted_seconds_per_step"]);
        assert!(own > 99.9 * predicted && predicted <= 1.001 * steps / 100.0, "{trial:#}");
        total += seconds;
    }
    assert!(total / speed < 60.0);
    // The report says it of every figure.
    let report = sandbox.path().join(result["report"].as_str().unwrap());
    let page = std::fs::read_to_string(report).unwrap();
    assert!(page.contains("nothing was trained"));
    assert_eq!(page.matches("<strong>Simulated.</strong>").count(), page.matches("<svg ").count());
    let output = sandbox.lorafleet(&["trials", "list", result["sweep"]["id"].as_str().unwrap()]);
    let table = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(table.matches("(simulated)").count(), 4, "{table}");
}

/// What is trained in a data directory is not gone on with by a device that trains nothing, nor the other way round.
#[test]
fn a_data_directory_is_of_one_kind() {
    let sandbox = sandbox("max_steps: 1\nprecision_mode: 4bit\n");
    let simulated = ["run", "sweep.yaml", "--simulate=T4-16GB", "--simulate-speed=100000", "--data-dir"];
    assert_eq!(sandbox.lorafleet(&[&simulated[..], &["d"]].concat()).status.code(), Some(0));
    let output = sandbox.lorafleet(&["up", "--listen=127.0.0.1:0", "--data-dir", "d"]);
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(message.contains("is the folder of simulated-") && message.contains("--data-dir"), "{message}");
}

/// A trial that no device here computes with would wait for ever.
#[test]
fn bfloat16_where_no_device_has_it() {
    let sandbox = sandbox("max_steps: 1\nprecision_mode: 4bit\n");
    let run = |devices: &str, dtype: &str| {
        let set = format!("compute_dtype={dtype}");
        sandbox.lorafleet(&[
            "run",
            "sweep.yaml",
            "--simulate-speed=100000",
            "--set",
            &set,
            "--simulate",
            devices,
        ])
    };
    let refused = run("V100-16GB,T4-16GB", "bfloat16");
    let message = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(2), "{message}");
    let why = "compute_dtype: bfloat16 needs compute capability 8.0; V100-16GB has 7.0; use float16";
    assert!(message.contains(why), "{message}");
    // Some of these trials may run on an accelerator alone that has it not.
    let set =
        ["--set", "compute_dtype=bfloat16", "--set", "parameters={accelerator: [A100-40GB, V100-16GB]}"];
    let each = ["run", "sweep.yaml", "--simulate=V100-16GB,A100-40GB", "--set", "search={algorithm: grid}"];
    let refused = sandbox.lorafleet(&[&each[..], &set].concat());
    let message = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(2) && message.contains(why), "{message}");
    for (devices, dtype) in [("V100-16GB", "float16"), ("V100-16GB,A100-40GB", "bfloat16")] {
        let done = run(devices, dtype);
        assert_eq!(done.status.code(), Some(0), "{}", String::from_utf8_lossy(&done.stderr));
    }
}

/// What does not fit is a result, and nobody is kept waiting for a device that would hold it.
#[test]
fn what_does_not_fit() {
    let sandbox = sandbox(
        "max_steps: 20
gradient_checkpointing: false
search: { algorithm: grid }
parameters:
  precision_mode: [float16, 4bit]
",
    );
    let output = sandbox.lorafleet(&[
        "run",
        "sweep.yaml",
        "--simulate",
        V100,
        "--simulate-speed",
        "100000",
        "-o",
        "json",
    ]);
    let result: Value = serde_json::from_slice(&output.stdout).unwrap();
    let trials = result["trials"].as_array().unwrap();
    let states: Vec<_> = trials.iter().map(|trial| trial["state"].as_str().unwrap()).collect();
    assert_eq!(states, ["failed", "completed"], "{result:#}");
    let failure = &trials[0]["failure"];
    assert_eq!(failure["class"], "out_of_memory");
    assert_eq!((&trials[0]["simulated"], &trials[1]["simulated"]), (&json!(true), &json!(true)));
    assert!(failure["message"].as_str().unwrap().contains("does not fit"), "{failure}");
}

#[test]
fn what_cannot_be_simulated_is_named() {
    let sandbox = sandbox("max_steps: 1\n");
    let check = |arguments: &[&str], fragments: &[&str]| {
        let output = sandbox.lorafleet(&[&["run", "sweep.yaml"], arguments].concat());
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {message}");
        assert!(fragments.iter().all(|fragment| message.contains(fragment)), "{arguments:?}: {message}");
    };
    check(&["--simulate=T5"], &["--simulate T5", "not in the catalogue", A100]);
    check(&["--simulate=A100-40GB:many"], &["A100-40GB:many", "1 to 64"]);
    check(&["--simulate-speed=2"], &["--simulate"]);
    for price in ["-1", "nan", "inf", "1e300", "much"] {
        check(&[&format!("--price-per-hour={price}")], &["--price-per-hour", "from 0 to 1000000"]);
    }
    check(&["--simulate=T4-16GB", "--simulate-speed=0.1"], &["0.1", "from 1 to 1000000"]);
    check(&["--simulate=T4-16GB", "--endpoint=http://127.0.0.1:1"], &["--simulate", "leave --endpoint out"]);
    check(
        &["--simulate=T4-16GB", "--set", "pretrained_model_id=./nothing"],
        &["pretrained_model_id", "nothing"],
    );
}
