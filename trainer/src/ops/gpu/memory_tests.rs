//! The footprint model's prediction for a GPU beside what a step asks of the allocator, with the CPU in the GPU's place:
//! the tensors are the same, and they come and go in the same order.

use super::emulated;
use crate::data::Dataset;
use crate::files::Outlives;
use crate::model::{Base, ModelConfig, RopeScaling};
use crate::pack::Row;
use crate::run::{Loaded, Run, step_pack};
use candle_core::Device;
use domain::SystemClock;
use domain::trial::{ComputeDtype, GradientCheckpointing, PrecisionMode, TrialConfig};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// The system's allocator, which counts what each thread holds of allocations as large as tensors are.
struct Counting;

/// What is smaller is a tensor's description, which on a GPU lies in the computer's memory.
const TENSOR: usize = 512;

thread_local! {
    static LIVE: Cell<i64> = const { Cell::new(0) };
    static PEAK: Cell<i64> = const { Cell::new(0) };
}

fn count(bytes: i64) {
    if bytes.unsigned_abs() >= TENSOR as u64 {
        LIVE.set(LIVE.get() + bytes);
        PEAK.set(PEAK.get().max(LIVE.get()));
    }
}

// SAFETY: every call goes to the system's allocator as it came; counting allocates nothing.
#[allow(unsafe_code, reason = "an allocator is")]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as i64);
        // SAFETY: as the caller promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as i64));
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// How far a prediction may be off, as a share of what is asked for.
const WITHIN: f64 = 0.05;

/// What makes a variant of a trial.
type Change<'a> = &'a dyn Fn(&mut TrialConfig);

/// What a checkpoint holds is not changed by a step, although that changes moments where they lie.
fn stays_what_it_was(loaded: &Loaded, run: &mut Run, clock: &SystemClock) {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    run.save(&at("now"), &at("now"), Outlives::Process).unwrap();
    let snapshot = run.snapshot().unwrap();
    step_pack(loaded, &mut [&mut *run], clock).unwrap();
    snapshot.write(&at("later"), &at("later"), Outlives::Process).unwrap();
    run.save(&at("next"), &at("next"), Outlives::Process).unwrap();
    for file in ["adapter_model.safetensors", "resume.safetensors"] {
        let [now, later, next] =
            ["now", "later", "next"].map(|name| std::fs::read(at(name).join(file)).unwrap());
        assert!(now == later, "{file}");
        assert!(now != next, "{file}: the step changes it");
    }
}

#[test]
fn the_peak_is_predicted() {
    if !emulated::is_possible() {
        return;
    }
    let (clock, mut furthest) = (SystemClock::new(), (0.0, String::new()));
    let (lora, qlora) = (PrecisionMode::Bfloat16, PrecisionMode::FourBit);
    let saved = |names: &[&str]| Some(names.iter().map(ToString::to_string).collect());
    let plain: &dyn Fn(&mut TrialConfig) = &|_| ();
    // (numbers, hidden, intermediate, layers, heads, key-value heads, vocab, rank, rows, length, all layers again,
    // wide heads with norms and biases)
    let shapes = [
        (lora, 64, 160, 3, 2, 2, 96, 4, 4, 48, false, false),
        (lora, 64, 160, 3, 2, 2, 96, 4, 4, 48, true, false),
        (qlora, 64, 160, 3, 2, 1, 96, 4, 4, 48, true, false),
        (qlora, 64, 128, 2, 4, 4, 96, 16, 2, 40, false, false),
        (PrecisionMode::Float32, 32, 64, 3, 4, 2, 64, 2, 2, 64, false, false),
        (lora, 32, 64, 1, 2, 2, 1500, 2, 2, 64, false, false),
        (lora, 64, 160, 3, 2, 2, 96, 4, 4, 48, false, true),
        (qlora, 64, 160, 3, 2, 1, 96, 4, 4, 48, true, true),
    ];
    let variants: [(usize, Change); 6] = [
        (0, &|c| c.lora_dropout = 0.1),
        (0, &|c| c.use_dora = true),
        (0, &|c| (c.use_dora, c.lora_dropout) = (true, 0.1)),
        (0, &|c| c.modules_to_save = saved(&["lm_head", "embed_tokens", "norm"])),
        (1, &|c| c.modules_to_save = saved(&["down_proj", "v_proj"])),
        (5, &|c| {
            c.modules_to_save = saved(&["lm_head", "embed_tokens"]);
            c.gradient_accumulation_steps = 2;
        }),
    ];
    let all = shapes.into_iter().map(|shape| (shape, plain));
    for ((mode, hidden, inter, layers, heads, kv, vocab, rank, rows, length, again, kin), change) in
        all.chain(variants.into_iter().map(|(number, change)| (shapes[number], change)))
    {
        let config = ModelConfig {
            vocab_size: vocab,
            hidden_size: hidden,
            intermediate_size: inter,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: kv,
            head_dim: hidden / heads * if kin { 2 } else { 1 },
            max_position_embeddings: 64,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: RopeScaling::Default,
            tie_word_embeddings: false,
            query_key_value_bias: kin,
            query_key_norms: kin,
            sliding_windows: Vec::new(),
            quantization: None,
        };
        let mut trial = TrialConfig {
            precision_mode: mode,
            compute_dtype: (mode == qlora).then_some(ComputeDtype::Bfloat16),
            gradient_checkpointing: if again {
                GradientCheckpointing::On
            } else {
                GradientCheckpointing::Off
            },
            lora_rank: rank,
            batch_size: rows,
            max_sequence_length: length,
            max_steps: Some(3),
            eval_steps: 0,
            ..TrialConfig::default()
        };
        change(&mut trial);
        let variant = format!(
            "dropout {}, dora {}, whole {:?}, {} micro-batches",
            trial.lora_dropout, trial.use_dora, trial.modules_to_save, trial.gradient_accumulation_steps
        );
        let row = |r: u32| Row::whole((0..length).map(|i| (i * 7 + r) % vocab as u32).collect());
        let rows_in_all = rows * trial.gradient_accumulation_steps;
        let data = Dataset { train: (0..rows_in_all).map(row).collect(), ..Dataset::default() };
        let (measured, predicted) = emulated::emulated(|| {
            let before = LIVE.get();
            let base = Base::random(config, trial.base_model().precision, &Device::Cpu).unwrap();
            let loaded = Loaded::in_memory(base);
            let mut run = Run::with_data(&loaded, trial, data).unwrap();
            for _ in 0..2 {
                // The adapter that a divergence falls back to is there from the second step on.
                PEAK.set(LIVE.get());
                step_pack(&loaded, &mut [&mut run], &clock).unwrap();
            }
            let measured = PEAK.get() - before;
            stays_what_it_was(&loaded, &mut run, &clock);
            (measured, run.predicted_peak_bytes(&loaded).total())
        });
        let ratio = predicted as f64 / measured as f64;
        let what = format!(
            "{mode:?}, hidden {hidden}, vocab {vocab}, rank {rank}, {rows} x {length}, again: {again}, kin: {kin}, \
             {variant}"
        );
        let what = format!("{what}: {predicted} predicted, {measured} asked for, ratio {ratio:.3}");
        println!("{what}");
        if (ratio - 1.0).abs() > furthest.0 {
            furthest = ((ratio - 1.0).abs(), what);
        }
    }
    assert!(furthest.0 < WITHIN, "the furthest is {}", furthest.1);
}
