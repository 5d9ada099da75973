//! A sweep on devices that are not there: `lorafleet run --simulate`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use common::Sandbox;
use serde_json::{Value, json};

const A100: &str = "A100-40GB";
const V100: &str = "V100-16GB";

/// The published experiment as it ships, shorter and faster, with the report that it is for.
#[test]
fn the_published_benchmark() {
    let sandbox = sandbox("max_steps: 1\n");
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../config/sweeps/openllama-7b-benchmark.yaml");
    let mut arguments = vec!["run", file, "--set", "pretrained_model_id=./model", "--set", "max_steps=10"];
    arguments.extend(["--simulate", "A100-40GB:4", "--simulate-speed", "20000"]);
    let result = sandbox.json(&arguments);
    let trials = result["trials"].as_array().unwrap();
    // None or all layers again, two precisions, and 7 batch sizes, 5 ranks and 4 lengths that share a middle.
    assert_eq!(trials.len(), 2 * 2 * (7 + 5 + 4 - 2));
    let solo = |trial: &&Value| trial["summary"]["throughput"] == "solo";
    let unfit = |trial: &&Value| trial["failure"]["class"] == "out_of_memory";
    let (solo, unfit) = (trials.iter().filter(solo).count(), trials.iter().filter(unfit).count());
    assert!(unfit > 0 && solo + unfit == trials.len(), "{solo} {unfit}");

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
        "cost-of-a-run-by-precision-mode",
    ] {
        assert!(text.contains(&format!("](figures/{figure}.svg)")), "{figure} is not in\n{text}");
        assert!(folder.join(format!("figures/{figure}.svg")).is_file(), "{figure}");
    }
    for said in [
        "less memory than float16**",
        "slower than float16**",
        "gradient\\_checkpointing true needs",
        "fits up to batch\\_size",
        "## Trainable parameters",
        "**Cheapest good**",
        "does not fit: needs",
    ] {
        assert!(text.contains(said), "{said} is not in\n{text}");
    }
    assert_eq!(text.matches("**Simulated.**").count(), text.matches("](figures/").count());
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
        assert!(seconds > steps, "{trial:#}");
        assert!(cost > 0.5 * 3.673385 * steps / 3600.0, "{cost} dollars for {steps} s: {trial:#}");
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
