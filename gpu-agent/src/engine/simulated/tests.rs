//! What a simulated device says of time, memory and losses.

use super::*;
use crate::Assignment;
use crate::engine::pack::Pack;
use crate::engine::{Ending, Engine as _, Event, Happening};
use config::machines;
use domain::SystemClock;
use serde_json::json;

/// OpenLLaMA 7B's config.json, and nothing else.
fn open_llama(dir: &Path) -> String {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": false,
    });
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    dir.display().to_string()
}

/// How a trial on a device goes: its points' steps and losses, and its last word.
fn run(name: &str, speed: f64, config: &TrialConfig, dir: &Path) -> (Vec<(u64, f64)>, Happening) {
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
    let accelerator = machines::accelerator(name).unwrap();
    let memory = accelerator.memory_bytes - crate::devices::choose::RESERVE;
    let hurried = Arc::new(Hurried { clock: clock.clone(), speed });
    let mut pack = Pack::new(Simulated::of(accelerator, speed, clock), memory, hurried);
    pack.admit(Admission {
        assignment: Assignment::new("s/1", 1),
        config: config.clone(),
        resume: None,
        digests: None,
        evaluations: None,
        places: Default::default(),
        cache: None,
        work_dir: dir.join("work"),
        belongs: None,
    });
    let (mut points, mut last) = (Vec::new(), None);
    while !pack.is_idle() {
        pack.step(&mut |event| match event {
            Event::Trial(_, Happening::Points(new)) => {
                let loss = |point: &MetricPoint| {
                    point.values.iter().find(|(name, _)| name == metric::LOSS).map(|v| v.1)
                };
                points.extend(new.iter().filter_map(|point| Some((point.step, loss(point)?))));
            }
            Event::Trial(_, happening) if happening.is_last() => last = Some(happening),
            _ => {}
        });
    }
    (points, last.unwrap())
}

fn summary(last: Happening) -> TrialSummary {
    match last {
        Happening::Finished { ending: Ending::Completed, summary, .. } => *summary,
        other => panic!("{other:?}"),
    }
}

fn published(dir: &Path, mode: PrecisionMode) -> TrialConfig {
    TrialConfig {
        pretrained_model_id: open_llama(dir),
        precision_mode: mode,
        compute_dtype: Some(domain::trial::ComputeDtype::Float16),
        max_steps: Some(100),
        logging_steps: 1,
        gradient_checkpointing: GradientCheckpointing::Off,
        ..TrialConfig::default()
    }
}

/// The published report's finding, by the models alone: LoRA in 16 bits that keeps all fits an A100 and no V100; QLoRA
/// fits both, takes less and is slower.
#[test]
fn the_published_finding() {
    let dir = tempfile::tempdir().unwrap();
    let on = |name: &str, mode| run(name, 1e4, &published(dir.path(), mode), dir.path()).1;
    let lora = summary(on("A100-40GB", PrecisionMode::Float16));
    let qlora = summary(on("A100-40GB", PrecisionMode::FourBit));
    let peak = |summary: &TrialSummary| summary.peak_memory_bytes.unwrap();
    assert!(peak(&qlora) < peak(&lora), "{} {}", peak(&qlora), peak(&lora));
    assert_eq!(lora.predicted_peak_memory_bytes, lora.peak_memory_bytes);
    assert_eq!((lora.trainable_parameters, lora.recomputed_layers), (39_976_960, Some(0)));
    let speed = |summary: &TrialSummary| summary.tokens_per_second.unwrap();
    assert!(speed(&qlora) < speed(&lora));
    // Its seconds are those of its steps and of reading its base, whatever a sleep of this machine takes.
    let told = 100.0 * 2.0 / lora.samples_per_second.unwrap() + 13.5;
    assert!((lora.device_seconds / told - 1.0).abs() < 0.01, "{} {told}", lora.device_seconds);
    assert_eq!(lora.simulated_seconds, Some(lora.device_seconds), "it had the device for itself");
    let predicted = lora.predicted_seconds_per_step.unwrap() * lora.samples_per_second.unwrap();
    assert!((predicted - 2.0).abs() < 1e-9, "{predicted}");
    assert!(matches!(on("V100-16GB", PrecisionMode::Float16),
        Happening::Failed(Failure { class: FailureClass::OutOfMemory, message }) if message.contains("does not fit")));
    summary(on("V100-16GB", PrecisionMode::FourBit));
}

#[test]
fn losses_follow_the_formula() {
    let dir = tempfile::tempdir().unwrap();
    let with = |rank, seed, learning_rate| {
        let config = TrialConfig {
            lora_rank: rank,
            seed,
            learning_rate,
            ..published(dir.path(), PrecisionMode::Float16)
        };
        run("H200-141GB", 1e5, &config, dir.path())
    };
    let (points, _) = with(16, 1, 1e-3);
    assert_eq!(points.iter().map(|(step, _)| *step).collect::<Vec<_>>(), (1..=100).collect::<Vec<_>>());
    for (step, loss) in &points {
        let want = 1.05 + 3.95 * (-(*step as f64) / 50.0).exp();
        assert!((loss / want - 1.0).abs() <= 0.002, "{step}: {loss}, not {want}");
    }
    assert_eq!(with(16, 1, 1e-3).0, points, "the same again");
    assert_ne!(with(16, 2, 1e-3).0, points, "another seed");
    let last = |(points, _): (Vec<(u64, f64)>, Happening)| points.last().unwrap().1;
    assert!(last(with(64, 1, 1e-3)) < last(with(4, 1, 1e-3)), "more rank");
    assert!(last(with(16, 1, 1e-5)) > last(with(16, 1, 1e-3)), "too small a rate");
    assert!(matches!(with(16, 1, 2.0).1, Happening::Finished { ending: Ending::Diverged, .. }));
}

#[test]
fn a_model_is_its_configuration() {
    let dir = tempfile::tempdir().unwrap();
    let error = shape(&dir.path().join("none").display().to_string()).unwrap_err();
    assert_eq!(error.class, FailureClass::User);
    assert!(error.message.contains("none"), "{}", error.message);
    assert_eq!(shape(&open_llama(dir.path())).unwrap().parameters(), 6_738_415_616);
}
