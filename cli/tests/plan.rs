//! `lorafleet plan --model`: what a model takes, from its config.json alone.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use serde_json::{Value, json};
use std::path::Path;
use std::process::{Command, Output};

/// OpenLLaMA 7B's configuration as its authors published it: without num_key_value_heads and rope_theta.
fn write_config(dir: &Path) {
    let config = json!({
        "model_type": "llama", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": false,
    });
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
}

fn plan(dir: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lorafleet"));
    // The prices that come with the program, not those of whoever runs this.
    command.current_dir(dir).env("XDG_CONFIG_HOME", dir);
    command.args(["plan", "--model", "config.json"]).args(arguments).output().unwrap()
}

fn rows(dir: &Path, arguments: &[&str]) -> Vec<Value> {
    let output = plan(dir, &[arguments, &["-o", "json"]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn the_published_table_comes_from_the_configuration() {
    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path());
    let rows = rows(
        dir.path(),
        &["--lora-rank=8,16,32,64", "--precision_mode=float16,4bit", "--device=A100-40GB,v100-16gb,30GB"],
    );
    assert_eq!(rows.len(), 8);
    for (row, (rank, trainable, mib)) in rows.iter().zip(
        [(8, 19_988_480, 76.0), (16, 39_976_960, 152.0), (32, 79_953_920, 305.0), (64, 159_907_840, 610.0)]
            .iter()
            .cycle(),
    ) {
        assert_eq!(
            (&row["parameters"]["lora_rank"], &row["trainable_parameters"]),
            (&json!(rank), &json!(trainable))
        );
        assert_eq!(row["total_parameters"], json!(6_738_415_616u64 + trainable));
        let adapter = row["adapter_bytes"].as_f64().unwrap() / 1_048_576.0;
        assert!((adapter - mib).abs() < 1.0, "{adapter}");
        let peak = &row["peak"];
        let parts = ["weights", "adapter", "activations", "working"].map(|part| peak[part].as_u64().unwrap());
        assert_eq!(json!(parts.iter().sum::<u64>()), row["peak_memory_bytes"]);
        assert!(row["peak_memory_bytes_all_recomputed"].as_u64() < row["peak_memory_bytes"].as_u64());
        // A device that keeps all needs the peak; one that cannot computes some again, or does not fit.
        for device in row["devices"].as_array().unwrap() {
            let fits = device["fits"] == json!(true);
            let within = device["peak_memory_bytes"].as_u64() <= device["memory_bytes"].as_u64();
            assert!(within || !fits, "{device}");
            assert_eq!(fits, device["recomputed_layers"].is_u64());
        }
    }
    // A step in 4 bits takes longer and so costs more, by the catalogue's price.
    let on_a100 = |row: usize| rows[row]["devices"][0].clone();
    let (lora, qlora) = (on_a100(1), on_a100(5));
    for (device, steps) in [(&lora, 500.0), (&qlora, 500.0)] {
        let seconds = device["seconds_per_step"].as_f64().unwrap() * steps;
        assert!((device["seconds"].as_f64().unwrap() - seconds).abs() < 1e-6, "{device}");
        let cost = device["price"]["price_per_hour"].as_f64().unwrap() * seconds / 3600.0;
        assert!((device["cost_usd"].as_f64().unwrap() - cost).abs() < 1e-9, "{device}");
        assert!(device["price"]["source"].is_string() && device["price"]["date"].is_string());
    }
    assert!(qlora["seconds"].as_f64() > lora["seconds"].as_f64());
    // Of bytes alone nothing else is known, and what does not fit takes no time.
    assert!(rows[1]["devices"][2]["seconds"].is_null() && rows[3]["devices"][1]["cost_usd"].is_null());
    // float16 leaves a V100 no room at rank 64; 4 bits do.
    assert_eq!(rows[3]["devices"][1]["fits"], json!(false));
    let v100 = &rows[7]["devices"][1];
    assert_eq!((&v100["device"], &v100["recomputed_layers"]), (&json!("V100-16GB"), &json!(0)));
}

#[test]
fn bfloat16_is_planned_for_gpus_that_have_it() {
    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path());
    let why = "bfloat16 needs compute capability 8.0; V100-32GB has 7.0; use float16";
    for (flags, is_supported) in [
        (&["--precision-mode=float16"][..], true),
        (&["--precision-mode=bfloat16"], false),
        (&["--precision-mode=4bit", "--compute-dtype=bfloat16"], false),
        (&["--precision-mode=4bit", "--compute-dtype=float16"], true),
    ] {
        let flags = [flags, &["--device=V100-32GB,A100-40GB,CPU,40GB"]].concat();
        let devices = rows(dir.path(), &flags).remove(0)["devices"].take();
        let of = |key: &str| devices.as_array().unwrap().iter().map(|d| d[key].clone()).collect::<Vec<_>>();
        let unsupported = if is_supported { json!(null) } else { json!(why) };
        assert_eq!(of("unsupported"), [unsupported, json!(null), json!(null), json!(null)], "{flags:?}");
        assert_eq!(of("fits")[..2], [json!(is_supported), json!(true)], "{flags:?}");
        assert_eq!(of("seconds")[0].is_number(), is_supported, "{flags:?}");
        let table = plan(dir.path(), &[&flags[..], &["-o", "table"]].concat());
        let table = String::from_utf8(table.stdout).unwrap();
        assert_eq!(table.contains("V100-32GB bfloat16 not supported"), !is_supported, "{table}");
        let largest = rows(dir.path(), &[&flags[..], &["--solve=batch_size"]].concat());
        assert_eq!(largest[0]["largest"].is_u64(), is_supported, "{flags:?}");
    }
}

#[test]
fn the_largest_that_fits_fits_and_one_more_does_not() {
    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path());
    for parameter in ["batch_size", "max_sequence_length", "lora_rank"] {
        let solve = format!("--solve={parameter}");
        for row in rows(dir.path(), &[&solve, "--device=A100-40GB,24GB", "--precision-mode=4bit"]) {
            let device = format!("--device={}", row["device"].as_str().unwrap());
            let fits = |value: u64, layers: u64| {
                let flag = format!("--{parameter}={value}");
                let row = rows(dir.path(), &[&flag, &device, "--precision-mode=4bit"]).remove(0);
                row["devices"][0]["recomputed_layers"].as_u64().is_some_and(|needed| needed <= layers)
            };
            let limit = row["limit_of_the_model"].as_u64().unwrap_or(u64::MAX);
            for (key, layers) in [("largest", 0), ("largest_all_recomputed", 32)] {
                let largest = row[key].as_u64().unwrap();
                assert!(fits(largest, layers), "{row}");
                assert!(largest == limit || !fits(largest + 1, layers), "{row}");
            }
        }
    }
}

/// Qwen3 0.6B: heads wider than the hidden size has room for, norms of heads, a tied head.
#[test]
fn a_qwen3_is_planned_with_its_own_heads() {
    let dir = tempfile::tempdir().unwrap();
    let config = json!({
        "model_type": "qwen3", "hidden_act": "silu", "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "vocab_size": 151_936, "max_position_embeddings": 40_960, "rms_norm_eps": 1e-6, "tie_word_embeddings": true,
    });
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let rows = rows(dir.path(), &["--lora-rank=8", "--device=A100-40GB"]);
    let (trainable, base) = (5_046_272u64, 596_049_920u64);
    let want = (json!(trainable), json!(base + trainable));
    assert_eq!((&rows[0]["trainable_parameters"], &rows[0]["total_parameters"]), (&want.0, &want.1));
    // In float16, but for the norms, which are in float32.
    let norms = 28 * (2 * 1024 + 2 * 128) + 1024;
    assert_eq!(rows[0]["peak"]["weights"], json!(2 * base + 2 * norms));
}

/// A model in 4 bits is planned with the magnitudes that it has; in other numbers it is as large as any.
#[test]
fn a_model_in_4_bits_is_planned_as_its_files_have_it() {
    let dir = tempfile::tempdir().unwrap();
    let weights = |double: Option<bool>, mode: &str| {
        write_config(dir.path());
        let path = dir.path().join("config.json");
        let mut config: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
        config["quantization_config"] = double.map_or(Value::Null, |double| {
            json!({
                "quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": double,
            })
        });
        std::fs::write(&path, config.to_string()).unwrap();
        let mode = format!("--precision-mode={mode}");
        rows(dir.path(), &[&mode, "--device=A100-40GB"])[0]["peak"]["weights"].as_u64().unwrap()
    };
    let (double, single) = (weights(Some(true), "4bit"), weights(Some(false), "4bit"));
    assert_eq!(double, weights(None, "4bit"));
    assert!(single > double);
    assert_eq!(weights(Some(false), "float16"), weights(None, "float16"));
    weights(Some(false), "4bit");
    let output = plan(dir.path(), &["--double-quant=true"]);
    let message = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(message.contains("--double-quant: is true, but the model was quantised with"), "{message}");
}

/// Mistral 7B v0.1's window of 4,096 keys saves operations of rows that are longer.
#[test]
fn a_windows_operations_are_planned() {
    let dir = tempfile::tempdir().unwrap();
    let flops = |window: Value, length: u64| {
        let config = json!({
            "model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14_336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32_000,
            "max_position_embeddings": 32_768, "rms_norm_eps": 1e-5, "sliding_window": window,
        });
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let length = format!("--max-sequence-length={length}");
        rows(dir.path(), &[&length, "--device=A100-40GB"])[0]["flops_per_token"].as_f64().unwrap()
    };
    assert_eq!(flops(json!(4096), 4096), flops(Value::Null, 4096));
    // 14 operations a key and element of the 32 layers' queries; 8,192 queries see 3,072.25 keys on average, not 4,096.5.
    let saved = flops(Value::Null, 8192) - flops(json!(4096), 8192);
    let want = 14.0 * 32.0 * 4096.0 * (4096.5 - 3072.25);
    assert!((saved - want).abs() < 1e-6 * want, "{saved}, not {want}");
}

#[test]
fn what_cannot_be_planned_is_named() {
    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path());
    std::fs::write(dir.path().join("bert.json"), r#"{"model_type": "bert"}"#).unwrap();
    for (arguments, fragments) in [
        (&["--device=T5"][..], &["--device T5", "A100-40GB", "24GB"][..]),
        (&["--lora-rank=0"], &["lora_rank", "a whole number from 1"]),
        (&["--precision-mode=8bit"], &["8bit", "4bit"]),
        (&["--solve=seed"], &["seed", "batch_size"]),
        (&["sweep.yaml"], &["--model", "cannot be used with"]),
    ] {
        let output = plan(dir.path(), arguments);
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {message}");
        assert!(fragments.iter().all(|fragment| message.contains(fragment)), "{arguments:?}: {message}");
    }
    for (file, fragment) in [("none.json", "none.json: cannot be read"), ("bert.json", "model_type is bert")]
    {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lorafleet"));
        let output = command.current_dir(dir.path()).args(["plan", "--model", file]).output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(2) && message.contains(fragment), "{message}");
    }
}

/// A sweep's rows are as long as they are: a micro-batch of short ones is one still. Of this model the launches are nearly
/// all that a step takes, 3 layers × 100 × 5 µs a micro-batch.
#[test]
fn a_sweep_takes_the_micro_batches_that_it_has() {
    let sweep = concat!(env!("CARGO_MANIFEST_DIR"), "/../config/sweeps/quickstart.yaml");
    let step = |accumulation: u32| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lorafleet"));
        let set = format!("gradient_accumulation_steps={accumulation}");
        let output = command
            .args(["plan", sweep, "--device=A100-40GB", "-o", "json", "--set", &set])
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let trials: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(trials.len(), 12);
        trials[0]["devices"][0]["seconds_per_step"].as_f64().unwrap()
    };
    for accumulation in [1, 3] {
        let micro_batches = step(accumulation) / 1.5e-3;
        let want = f64::from(accumulation);
        assert!((want..1.3 * want).contains(&micro_batches), "{accumulation}: {micro_batches}");
    }
}
