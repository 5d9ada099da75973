//! How much is kept of a sweep in the registry, which in a fleet is etcd: in paused time, its actors as they are, on the
//! registry's model, with an agent that trains nothing and says as much as one that does.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[path = "common/fleet.rs"]
mod fleet;

use actor::Scope;
use coordinator::actors::message::{Assignment, Ending, Outbox, Outgoing, ToAgent, TrialEvent};
use coordinator::artifacts::Stored;
use domain::AgentId;
use domain::trial::{Digests, SampleText, TrialSummary};
use fleet::{Jumping, LEASE, served, submission};
use registry::{MemoryRegistry, Registry};
use serde_json::{Value, json};
use std::sync::Arc;

/// Trials that are run, of ten thousand.
const TRIALS: usize = 50;
/// Checkpoints of each.
const CHECKPOINTS: u64 = 4;
/// What keys in etcd begin with.
const PREFIX: &str = "/lorafleet/state/";

async fn assigned(told: &mut Outgoing) -> Assignment {
    loop {
        if let ToAgent::Assign(assignment) = told.recv().await.unwrap().unwrap() {
            return *assignment;
        }
    }
}

fn summary() -> TrialSummary {
    TrialSummary {
        steps: 500,
        loss: Some(1.234_567_890_123_4),
        eval_loss: Some(1.234_567_890_123_4),
        base_eval_loss: Some(2.345_678_901_234_5),
        peak_memory_bytes: Some(15_234_567_890),
        pack_peak_memory_bytes: Some(35_234_567_890),
        peak_rss_bytes: Some(4_234_567_890),
        predicted_peak_memory_bytes: Some(15_734_567_890),
        trainable_parameters: 39_976_960,
        total_parameters: 6_778_392_576,
        adapter_bytes: 159_967_880,
        samples_per_second: Some(12.345_678_901_234),
        tokens_per_second: Some(4_567.890_123_456),
        recomputed_layers: Some(32),
        device_seconds: 1_234.567_890_123,
        truncated_rows: 1234,
        sample_prompt: Some(
            "### Human: What colour is the sky, and why is it that colour?### Assistant:".into(),
        ),
        sample_before: Some("a text that a model makes up, of some words ".repeat(4)),
        sample_after: Some("a text that a model makes up, of some words ".repeat(4)),
        // As long as the engine has them.
        samples: [100, 200, 300, 400]
            .map(|step| SampleText { step, text: "a text of words ".repeat(5) })
            .into(),
        ..TrialSummary::default()
    }
}

/// A sweep of ten thousand trials fits, in etcd's terms: below 50 MB, and no value above 64 KiB; also one that asks for as much
/// as a sweep may.
#[tokio::test(start_paused = true)]
async fn ten_thousand_trials_take_less_than_50_mb() {
    let holds = |number: usize| format!("lora_rank <= {}", 1_000_000 + number);
    check(json!([])).await;
    check((0..10_000).map(holds).collect()).await;
}

async fn check(constraints: Value) {
    let (dir, scope) = (tempfile::tempdir().unwrap(), Scope::new());
    let (registry, clock) = (Arc::new(MemoryRegistry::new()), Arc::new(Jumping::new()));
    let (directory, dispatcher) = served(dir.path(), &registry, &clock, &scope).await;
    let uploaded = |name: &str| format!("blob:sha256:{}/{name}", "0123456789abcdef".repeat(4));
    let document = json!({
        "constraints": constraints,
        "name": "openllama-7b-guanaco", "pretrained_model_id": uploaded("open_llama_7b/"),
        "dataset_name": uploaded("openassistant-guanaco.jsonl"), "max_steps": 500, "save_steps": 100,
        "search": { "algorithm": "random", "max_trials": TRIALS },
        "parameters": {
            "precision_mode": ["float16", "4bit"],
            "lora_rank": [8, 32, 64],
            "learning_rate": { "log_uniform": [1e-5, 1e-3] },
        },
    });
    let sweep = directory.submit(submission(&document)).await.unwrap().id;
    let id = AgentId::new("agent-0a1b2c3d");
    let (outbox, mut told) = Outbox::new();
    dispatcher.connect(fleet::agent(id.as_str(), 1, 3.673_385), Vec::new(), outbox).await.unwrap();
    for _ in 0..TRIALS {
        let Assignment { trial, attempt, .. } = assigned(&mut told).await;
        let digest = || format!("sha256:{}", "0123456789abcdef".repeat(4));
        let digests = Digests {
            base_model: digest(),
            dataset: digest(),
            tokenizer: digest(),
            spec: digest(),
            documents: String::new(),
        };
        let started = TrialEvent::Started { total_steps: 500, start_step: 0, digests: Some(digests) };
        directory.event(&trial, attempt, &id, started).await.unwrap();
        for step in (1..=CHECKPOINTS).map(|number| number * 100) {
            let path = |part: &str| Some(format!("sweeps/{trial}/{part}-a{attempt}-s{step}-t1234567"));
            let stored = Stored { adapter: path("adapter"), resume: path("resume"), items: None };
            directory.checkpoint(&trial, attempt, step, stored).await.unwrap();
        }
        let finished = TrialEvent::Finished {
            ending: Ending::Completed,
            summary: Box::new(summary()),
            message: String::new(),
        };
        directory.event(&trial, attempt, &id, finished).await.unwrap();
    }
    assert_eq!(directory.sweep(&sweep).await.unwrap().counts.of(domain::trial::TrialState::Completed), 50);

    let entries = registry.list("", None, usize::MAX).await.unwrap();
    let largest = entries.iter().map(|(_, value)| value.len()).max().unwrap();
    let bytes: usize = entries.iter().map(|(key, value)| PREFIX.len() + key.len() + value.len()).sum();
    let of_each = bytes / TRIALS;
    let asked = document.to_string().len();
    println!("asked in {asked} bytes: {of_each} bytes a trial, the largest value has {largest}");
    assert!(of_each * 10_000 < 50_000_000, "{of_each} bytes a trial");
    assert!(largest < 64 << 10, "{largest}");
    scope.finish(LEASE).await;
}
