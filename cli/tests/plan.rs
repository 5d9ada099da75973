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
    command.current_dir(dir).args(["plan", "--model", "config.json"]).args(arguments).output().unwrap()
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
    // float16 leaves a V100 no room at rank 64; 4 bits do.
    assert_eq!(rows[3]["devices"][1]["fits"], json!(false));
    let v100 = &rows[7]["devices"][1];
    assert_eq!((&v100["device"], &v100["recomputed_layers"]), (&json!("V100-16GB"), &json!(0)));
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
