//! Runs from files to files: the reference's runs on real text, resuming, packs, divergence.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use common::{CPU, flat, json_file, shared, tiny_run};
use domain::SystemClock;
use domain::metric::REPORTED;
use domain::trial::{EvalSplit, LrSchedulerType, Throughput, TrialConfig};
use std::path::Path;
use trainer::run::{Loaded, Run, Stepped, step_pack};

fn load(config: &TrialConfig) -> Loaded {
    Loaded::load(Path::new(&config.pretrained_model_id), &CPU).unwrap()
}

fn steps(loaded: &Loaded, run: &mut Run, count: u64) -> Vec<Stepped> {
    let clock = SystemClock::new();
    (0..count).map(|_| step_pack(loaded, &mut [&mut *run], &clock).unwrap().remove(0)).collect()
}

/// The configuration of the reference's runs on the pretrained 260K-parameter model.
fn stories(rank: u32) -> Option<TrialConfig> {
    let (model, data) =
        (shared("data/models/stories260K-hf")?, shared("data/instruct/instruct_500_guanaco.jsonl")?);
    let init = shared(&format!("reference/stories260k/init_r{rank}"))?;
    Some(TrialConfig {
        pretrained_model_id: model.display().to_string(),
        dataset_name: data.display().to_string(),
        eval_size: 50.0,
        eval_split: EvalSplit::Last,
        shuffle: false,
        batch_size: 4,
        max_sequence_length: 256,
        lora_rank: rank,
        init_adapter: Some(init.display().to_string()),
        learning_rate: 1e-3,
        lr_scheduler_type: LrSchedulerType::ConstantWithWarmup,
        warmup_steps: 10,
        max_steps: Some(200),
        ..TrialConfig::default()
    })
}

/// A run against the reference's log: its first steps, and with `LORAFLEET_FULL` all 200. The reference's step
/// 112 wraps around to the first rows where ours ends the epoch with two rows, so that steps are compared up
/// to there, and the end more loosely.
fn check_stories(name: &str, config: TrialConfig, base_eval: Option<f64>, compared: usize) {
    let Some(reference) = shared(&format!("reference/stories260k/{name}.json")) else { return };
    let want = json_file(&reference);
    let full = std::env::var_os("LORAFLEET_FULL").is_some();
    let loaded = load(&config);
    let mut run = Run::new(&loaded, config).unwrap();
    if let Some(want) = base_eval {
        let got = run.base_eval(&loaded).unwrap().unwrap();
        assert!((got - want).abs() < 1e-5, "{name}: base eval/loss {got}, reference {want}");
    }
    let compared = if full { compared } else { 20 };
    let stepped = steps(&loaded, &mut run, if full { 200 } else { compared as u64 });
    for (step, stepped) in stepped.iter().take(compared).enumerate() {
        let point = stepped.point.as_ref().unwrap();
        assert_eq!(point.step, step as u64 + 1);
        for (ours, theirs, tolerance) in
            [("loss", "loss", 1e-4), ("grad_norm", "grad_norm", 1e-3), ("learning_rate", "lr", 1e-9)]
        {
            let (got, want) = (point.get(ours).unwrap(), want[theirs][step].as_f64().unwrap());
            let off = (got - want).abs();
            assert!(off <= tolerance * want.abs().max(1e-3), "{name} step {step} {ours}: {got}, not {want}");
        }
        assert_eq!(point.get("tokens"), want["tokens"][step].as_f64(), "{name} step {step}");
    }
    if full {
        let want = want["final"]["eval/loss"].as_f64().unwrap();
        let got = stepped[199].point.as_ref().unwrap().get("eval/loss").unwrap();
        println!("{name}: final eval/loss {got}, reference {want}");
        assert!((got / want - 1.0).abs() < 0.01, "{name}: final eval/loss {got}, reference {want}");
    }
}

#[test]
fn runs_on_real_text_are_the_references() {
    let (Some(r4), Some(r16)) = (stories(4), stories(16)) else { return };
    check_stories("r4_lr1e-3", r4, Some(5.063520), 112);
    check_stories("r16_lr1e-3", r16.clone(), Some(5.063520), 112);
    let completion = TrialConfig { assistant_only_loss: true, learning_rate: 5e-3, ..r16 };
    check_stories("r16_lr5e-3_completion", completion, Some(4.650969), 50);
}

#[test]
fn a_resumed_run_is_the_uninterrupted_one_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let config = tiny_run(dir.path());
    let loaded = load(&config);
    let mut whole = Run::new(&loaded, config.clone()).unwrap();
    let all = steps(&loaded, &mut whole, 20);

    let (adapter, resume) = (dir.path().join("adapter"), dir.path().join("resume"));
    let mut first = Run::new(&loaded, config.clone()).unwrap();
    steps(&loaded, &mut first, 7);
    first.save(&adapter, &resume).unwrap();
    let mut second = Run::resume(&load(&config), config, &adapter, &resume).unwrap();
    assert_eq!(second.step(), 7);
    let rest = steps(&loaded, &mut second, 13);

    assert!(whole.is_done() && second.is_done());
    assert_eq!(flat(whole.adapter()), flat(second.adapter()));
    for (a, b) in all[7..].iter().zip(&rest) {
        let (a, b) = (a.point.as_ref().unwrap(), b.point.as_ref().unwrap());
        assert_eq!(a.step, b.step);
        for name in ["loss", "grad_norm", "learning_rate", "tokens", "eval/loss"] {
            assert_eq!(a.get(name), b.get(name), "step {} {name}", a.step);
        }
    }
    // What a sweep can compare trials by.
    let last = all[19].point.as_ref().unwrap();
    let missing: Vec<_> = REPORTED.iter().filter(|name| last.get(name).is_none()).collect();
    assert!(missing.is_empty(), "not reported: {missing:?}");
    let (a, b) = (whole.summary(&loaded).unwrap(), second.summary(&loaded).unwrap());
    assert_eq!((a.steps, a.loss, a.eval_loss), (b.steps, b.loss, b.eval_loss));
    assert_eq!(a.throughput, Throughput::Solo);
    assert_eq!(a.trainable_parameters, 4 * 2 * (32 + 24 + 24 + 32 + 40 + 40 + 40));
}
