//! `lorafleet bench` as a process.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use serde_json::Value;
use std::process::{Command, Output};

/// A small step, some of its flags changed.
fn bench_train(flags: &[&str]) -> Output {
    let step = "--hidden 16 --intermediate 24 --layers 2 --heads 4 --vocab 40 --seq 12 --batch 3 --rank 2 \
                --warmup 1 --steps 3";
    let step: Vec<_> = step.split_whitespace().collect();
    let kept = step.chunks(2).filter(|flag| !flags.contains(&flag[0])).flatten();
    let mut command = Command::new(env!("CARGO_BIN_EXE_lorafleet"));
    command.args(["bench", "train"]).args(kept).args(flags).output().unwrap()
}

#[test]
fn a_step_is_timed() {
    for (flags, trials, predicts) in
        [(&[][..], 1.0, true), (&["--trials", "3", "--kv-heads", "2"], 3.0, false)]
    {
        let output = bench_train(flags);
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
        let document: Value = serde_json::from_str(&text).unwrap();
        let number = |pointer: &str| document.pointer(pointer).and_then(Value::as_f64);
        let median = number("/step_seconds/median").unwrap();
        assert!(number("/step_seconds/min").unwrap() <= median, "{document}");
        assert!(number("/step_seconds/max").unwrap() >= median, "{document}");
        let tokens = 3.0 * 12.0 * trials;
        assert!(
            (number("/tokens_per_second").unwrap() * median - tokens).abs() < 1e-6 * tokens,
            "{document}"
        );
        // An untrained model guesses among 40 tokens.
        assert!((number("/loss").unwrap() - 40f64.ln()).abs() < 0.2, "{document}");
        assert!(
            number("/peak_memory_bytes").unwrap() > 4.0 * number("/base_parameters").unwrap(),
            "{document}"
        );
        assert_eq!(number("/predicted_peak_memory_bytes").is_some(), predicts, "{document}");
    }
}

#[test]
fn a_base_is_loaded() {
    let bench_load = |flags: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_lorafleet"));
        command.args(["bench", "load"]).args(flags).output().unwrap()
    };
    let base = concat!(env!("CARGO_MANIFEST_DIR"), "/../config/quickstart/base");
    let [float32, four_bit] = ["float32", "4bit"].map(|mode| {
        let output = bench_load(&[base, "--precision-mode", mode]);
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
        let document: Value = serde_json::from_str(&text).unwrap();
        let number = |key: &str| document[key].as_f64().unwrap();
        let read = number("bytes_per_second") * number("seconds");
        assert!(number("read_bytes") > 0.0 && (read / number("read_bytes") - 1.0).abs() < 1e-6, "{document}");
        (number("read_bytes"), number("base_bytes"))
    });
    assert_eq!(float32.0, four_bit.0, "the same files");
    assert!(four_bit.1 < float32.1, "{four_bit:?}, {float32:?}");
    let output = bench_load(&["/nowhere"]);
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && message.contains("/nowhere"), "{message}");
}

/// With `LORAFLEET_FULL` the fleet that is promised, for five minutes.
#[test]
fn a_fleet_is_timed() {
    let full = std::env::var_os("LORAFLEET_FULL").is_some();
    let (agents, seconds) = if full { (2000, 300) } else { (20, 2) };
    let mut command = Command::new(env!("CARGO_BIN_EXE_lorafleet"));
    command.args(["bench", "fleet", "--agents", &agents.to_string(), "--seconds", &seconds.to_string()]);
    let output = command.output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let document: Value = serde_json::from_str(&text).unwrap();
    let number = |pointer: &str| document.pointer(pointer).and_then(Value::as_f64).unwrap();
    assert_eq!(number("/reports"), f64::from(agents * seconds), "{document}");
    let (median, late) = (number("/acknowledgement_seconds/p50"), number("/acknowledgement_seconds/p99"));
    assert!(0.0 < median && median <= late && late <= number("/acknowledgement_seconds/max"), "{document}");
    assert!(number("/seconds") >= f64::from(seconds), "{document}");
    assert!(number("/coordinator/peak_rss_bytes") < 1e9, "{document}");
    assert!(!full || late < 0.25, "{document}");
}

#[test]
fn shapes_that_cannot_be_are_refused() {
    for (flags, fragment) in [
        (["--heads", "3"], "--hidden 16 --heads 3"),
        (["--kv-heads", "3"], "--kv-heads 3"),
        (["--steps", "0"], "--steps is 0"),
        (["--seq", "1"], "--seq is 1"),
        (["--rank", "17"], "lora_rank"),
    ] {
        let output = bench_train(&flags);
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{flags:?}: {message}");
        assert!(message.contains(fragment), "{flags:?}: {message}");
    }
}
