//! Trials as a test needs them.

use domain::sweep::{DEFAULT_NAMESPACE, SearchSpec, Sweep, SweepSpec, SweepState};
use domain::trial::{
    Failure, FailureClass, ItemScores, PrecisionMode, Shortage, TaskScore, Throughput, Trial, TrialConfig,
    TrialDevice, TrialState, TrialSummary,
};
use domain::{SweepId, Timestamp, TrialId};

/// A trial that waits, with the defaults.
pub(super) fn trial(number: u32) -> Trial {
    let id = TrialId::of(&SweepId::new("s-0000"), number);
    Trial::new(id, TrialConfig::default(), Default::default(), Timestamp(0))
}

fn config(mode: PrecisionMode, batch_size: u32, lora_rank: u32, max_sequence_length: u32) -> TrialConfig {
    TrialConfig { precision_mode: mode, batch_size, lora_rank, max_sequence_length, ..TrialConfig::default() }
}

/// A configuration: batch size, rank and length.
pub(super) fn float16(batch_size: u32, lora_rank: u32, length: u32) -> TrialConfig {
    config(PrecisionMode::Float16, batch_size, lora_rank, length)
}

/// The same in 4 bits.
pub(super) fn four_bit(batch_size: u32, lora_rank: u32, length: u32) -> TrialConfig {
    config(PrecisionMode::FourBit, batch_size, lora_rank, length)
}

/// A device of so many GB at a price an hour.
pub(super) fn device(accelerator: &str, gigabytes: f64, price_per_hour: f64) -> TrialDevice {
    let memory_bytes = (gigabytes * 1e9) as u64;
    TrialDevice { accelerator: accelerator.into(), memory_bytes, price_per_hour, price_from: None }
}

/// A trial that ran to its end alone on an A100: its peak in GB, and rows a second. It cost 5 dollars divided by those.
pub(super) fn measured(number: u32, config: TrialConfig, gigabytes: f64, speed: f64) -> Trial {
    let trainable_parameters = u64::from(config.lora_rank) * 2_498_560;
    Trial {
        state: TrialState::Completed,
        device: Some(device("A100-40GB", 41.9, 3.67)),
        cost_usd: Some(5.0 / speed),
        summary: Some(TrialSummary {
            steps: 500,
            peak_memory_bytes: Some((gigabytes * 1e9) as u64),
            predicted_peak_memory_bytes: Some((gigabytes * 1e9) as u64),
            samples_per_second: Some(speed),
            trainable_parameters,
            total_parameters: 6_738_415_616 + trainable_parameters,
            adapter_bytes: 4 * trainable_parameters,
            recomputed_layers: Some(0),
            device_seconds: 1000.0,
            ..TrialSummary::default()
        }),
        config,
        finished_at: Some(Timestamp(1000 * u64::from(number))),
        ..trial(number)
    }
}

/// The same in a pack.
pub(super) fn packed(number: u32, config: TrialConfig, gigabytes: f64, speed: f64) -> Trial {
    let mut trial = measured(number, config, gigabytes, speed);
    if let Some(summary) = &mut trial.summary {
        summary.throughput = Throughput::Packed;
        summary.pack_peak_memory_bytes = Some(30_000_000_000);
    }
    trial
}

/// A trial that the A100 refused: it needs so many GB.
pub(super) fn unfit(number: u32, config: TrialConfig, gigabytes: f64) -> Trial {
    let own = (gigabytes * 1e9) as u64;
    let lacked = Shortage { base: 0, own, device: 41_900_000_000 };
    Trial {
        state: TrialState::Failed,
        device: Some(device("A100-40GB", 41.9, 3.67)),
        failure: Some(Failure {
            class: FailureClass::OutOfMemory,
            message: format!("{lacked}; lower batch_size"),
        }),
        config,
        ..trial(number)
    }
}

/// Lets a trial be asked a task: of so many items the first ones are right, and the first half of its base's. Answers with
/// what is kept of them.
pub(super) fn answered(
    trial: &mut Trial,
    task: &str,
    right: usize,
    items: usize,
) -> (TrialId, Vec<ItemScores>) {
    let bytes = |right: usize| (0..items).map(|item| if item < right { 255 } else { 0 }).collect();
    let score = TaskScore {
        task: task.into(),
        metric: "acc".into(),
        value: right as f64 / items as f64,
        stderr: Some(0.01),
        base_value: Some((items / 2) as f64 / items as f64),
        base_stderr: None,
        difference_stderr: Some(0.02),
        num_fewshot: 5,
        documents: items as u64,
    };
    let kept = ItemScores {
        metric: score.name(),
        asked: task.into(),
        scores: bytes(right),
        base: bytes(items / 2),
        ..ItemScores::default()
    };
    if let Some(summary) = &mut trial.summary {
        summary.evaluations.push(score);
    }
    (trial.id.clone(), vec![kept])
}

/// A sweep over nothing, by `eval/loss`.
pub(crate) fn sweep() -> Sweep {
    Sweep {
        id: SweepId::new("s-0000"),
        spec: SweepSpec {
            name: "s".into(),
            search: SearchSpec::default(),
            parameters: Vec::new(),
            base: TrialConfig::default(),
            constraints: Vec::new(),
            budget: Default::default(),
            resources: Default::default(),
            keep_adapters: None,
            evaluations: None,
            replicates: None,
        },
        state: SweepState::Completed,
        request_id: "r".into(),
        namespace: DEFAULT_NAMESPACE.into(),
        proposed: 0,
        max_trials: None,
        best: None,
        cost_usd: 0.0,
        failure: None,
        ended_early: None,
        counts: Default::default(),
        created_at: Timestamp(0),
        finished_at: None,
    }
}
