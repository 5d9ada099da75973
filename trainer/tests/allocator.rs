//! The footprint model's prediction beside what the program's allocator hands out: the whole of a step, with what no
//! tensor count sees, the buffers of matrix products and the rows themselves.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use candle_core::DType;
use domain::SystemClock;
use domain::footprint::Engine;
use domain::trial::{GradientCheckpointing, InitLoraWeights, Precision, PrecisionMode, TrialConfig};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use trainer::data::Dataset;
use trainer::lora::{ModuleSpec, Target};
use trainer::model::{Base, ModelConfig, RopeScaling};
use trainer::pack::Row;
use trainer::pissa::principal;
use trainer::run::{Loaded, Run, step_pack};
use trainer::weight::Weight;
use trainer::{Device, Tensor, rng};

/// The system's allocator, counted.
struct Counting;

static LIVE: AtomicU64 = AtomicU64::new(0);
static PEAK: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call goes to the system's allocator as it came; counting allocates nothing.
#[allow(unsafe_code, reason = "an allocator is")]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size() as u64, Ordering::Relaxed) + layout.size() as u64;
        PEAK.fetch_max(live, Ordering::Relaxed);
        // SAFETY: as the caller promised.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size() as u64, Ordering::Relaxed);
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Rows that a buffer holds; the same as in the CPU's frozen products.
const PANEL: usize = 256;

/// One test at a time allocates.
static ALONE: Mutex<()> = Mutex::new(());

/// What PiSSA's start of a layer takes beside its weight: of squares, of long weights, of either numbers.
#[test]
fn the_start_of_a_layer_is_predicted() {
    let _alone = ALONE.lock();
    let mut off = Vec::new();
    // The first of a process also makes what its thread keeps for matrix products for good.
    for (round, (rows, columns, rank)) in
        [(512, 512, 8), (512, 512, 8), (640, 480, 8), (300, 1200, 8), (1200, 300, 32)].into_iter().enumerate()
    {
        let values = Tensor::randn(0f32, 1.0, (rows, columns), &Device::Cpu).unwrap();
        for (mode, dtype) in [(PrecisionMode::Float32, DType::F32), (PrecisionMode::Bfloat16, DType::BF16)] {
            let weight = Weight::from(values.to_dtype(dtype).unwrap());
            for iterations in [None, Some(2)] {
                let module = ModuleSpec { path: "layer".into(), in_features: columns, out_features: rows };
                let mut target = Target::all(&[module], rank, 2.0 * rank as f64).remove(0);
                target.init = iterations.map_or(InitLoraWeights::Pissa, InitLoraWeights::PissaNiter);
                let before = LIVE.load(Ordering::Relaxed);
                PEAK.store(before, Ordering::Relaxed);
                let adapter = principal(&weight, &target, iterations, 5).unwrap();
                let measured = PEAK.load(Ordering::Relaxed) - before;
                drop(adapter);
                let predicted = target.start_bytes(Engine::Cpu, Precision { mode, ..Precision::default() });
                let ratio = predicted as f64 / measured as f64;
                let what =
                    format!("{rows} x {columns}, rank {rank}, {mode:?}, {}: ratio {ratio:.3}", target.init);
                println!("{what}, {predicted} predicted, {measured} handed out");
                // A few vectors more or less are a part of what a subspace takes.
                let tolerance = if iterations.is_some() { 0.2 } else { 0.05 };
                if round > 0 && (ratio - 1.0).abs() > tolerance {
                    off.push(what);
                }
            }
        }
    }
    assert!(off.is_empty(), "{off:#?}");
}

/// Ten shapes, drawn: model, its family's own, rank, batch, length, numbers, layers computed again.
#[test]
fn the_peak_of_the_allocator_is_predicted() {
    let _alone = ALONE.lock();
    let (clock, mut buffers, mut ratios) = (SystemClock::new(), 0, Vec::new());
    // The first trial of a process also makes what each thread keeps for matrix products for good, which is as large as
    // a part of the processor's cache and not as the trial: it is not counted.
    for (round, seed) in [2u64].into_iter().chain(0..10).enumerate() {
        let key = rng::key(seed, "shape");
        let pick = |i: u64, choices: &[usize]| choices[(rng::bits(key, i) % choices.len() as u64) as usize];
        let heads = pick(0, &[4, 8]);
        let hidden = heads * pick(1, &[32, 48, 64]);
        let layers = pick(2, &[3, 4, 6]);
        let intermediate = hidden * pick(4, &[2, 3]);
        let config = ModelConfig {
            vocab_size: pick(3, &[600, 2000, 5000]),
            hidden_size: hidden,
            intermediate_size: intermediate,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: heads / pick(5, &[1, 2]),
            head_dim: hidden / heads * pick(12, &[1, 2]),
            max_position_embeddings: 512,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: RopeScaling::Default,
            tie_word_embeddings: pick(6, &[0, 1]) == 1,
            query_key_value_bias: pick(13, &[0, 1]) == 1,
            query_key_norms: pick(14, &[0, 1]) == 1,
            sliding_windows: vec![[None, Some(48)][pick(15, &[0, 1])]; layers],
            quantization: None,
        };
        let (batch, length) = (pick(7, &[4, 8]), pick(8, &[64, 128, 256]));
        let numbers =
            [PrecisionMode::Float32, PrecisionMode::Bfloat16, PrecisionMode::FourBit][pick(9, &[0, 1, 2])];
        let trial = TrialConfig {
            precision_mode: numbers,
            gradient_checkpointing: match pick(10, &[0, 1, 2]) {
                0 => GradientCheckpointing::On,
                _ => GradientCheckpointing::Off,
            },
            // Gradients count from the start, which for ranks near the width says too much.
            lora_rank: pick(11, &[4, 8]) as u32,
            init_lora_weights: match pick(16, &[0, 1]) {
                1 if numbers != PrecisionMode::FourBit => InitLoraWeights::PissaNiter(1),
                _ => InitLoraWeights::Default,
            },
            modules_to_save: match pick(17, &[0, 1, 2]) {
                0 => None,
                1 => Some(vec!["lm_head".into(), "embed_tokens".into(), "norm".into()]),
                _ if numbers == PrecisionMode::FourBit => Some(vec!["norm".into()]),
                _ => Some(vec!["down_proj".into(), "v_proj".into()]),
            },
            lora_dropout: [0.0, 0.1][pick(18, &[0, 1])],
            use_dora: pick(19, &[0, 1]) == 1,
            batch_size: batch as u32,
            gradient_accumulation_steps: pick(20, &[1, 2]) as u32,
            max_sequence_length: length as u32,
            max_steps: Some(4),
            eval_steps: 0,
            save_steps: pick(21, &[0, 1]) as u32,
            ..TrialConfig::default()
        };
        let row = |r: usize| {
            let id =
                |i: usize| (rng::bits(key, (1000 + 300 * r + i) as u64) % config.vocab_size as u64) as u32;
            Row::whole((0..length).map(id).collect())
        };
        let rows = batch * trial.gradient_accumulation_steps as usize;
        let data = Dataset { train: (0..rows).map(row).collect(), ..Dataset::default() };
        let before = LIVE.load(Ordering::Relaxed);
        let base = Base::random(config, trial.base_model().precision, &Device::Cpu).unwrap();
        let loaded = Loaded::in_memory(base);
        let mut run = Run::with_data(&loaded, trial.clone(), data).unwrap();
        let mut on_its_way = None;
        for step in 0..4 {
            // The adapter that a divergence falls back to is there from the second step on. Of the first step's state a
            // checkpoint is being written meanwhile, all of which is beside the run's own from the fourth step on.
            PEAK.store(LIVE.load(Ordering::Relaxed), Ordering::Relaxed);
            step_pack(&loaded, &mut [&mut run], &clock).unwrap();
            if step == 0 && trial.save_steps > 0 {
                on_its_way = Some(run.snapshot().unwrap());
            }
        }
        let measured = PEAK.load(Ordering::Relaxed) - before;
        drop(on_its_way);
        let predicted = run.predicted_peak_bytes(&loaded).total();
        // Each thread keeps a buffer for as many rows of a matrix in fewer bits, which grows with the widest of them.
        let widest = (hidden.max(intermediate) * PANEL * 4 * trainer::threads()) as u64;
        let grown = match trial.precision_mode {
            PrecisionMode::Float32 => 0,
            _ => widest.saturating_sub(buffers),
        };
        buffers += grown;
        let ratio = (predicted + grown) as f64 / measured as f64;
        println!(
            "seed {seed}: {predicted} predicted and {grown} of buffers, {measured} handed out, ratio {ratio:.3}; \
             hidden {hidden}, {layers} layers, batch {batch} x {length} x {}, rank {}, {}, {:?}, dropout {}, dora {}, {:?}, {:?}, saves {}",
            trial.gradient_accumulation_steps,
            trial.lora_rank,
            trial.init_lora_weights,
            trial.modules_to_save,
            trial.lora_dropout,
            trial.use_dora,
            trial.precision_mode,
            trial.gradient_checkpointing,
            trial.save_steps,
        );
        if round > 0 {
            ratios.push(ratio);
        }
    }
    assert!(
        ratios.iter().all(|ratio| (0.95..1.05).contains(ratio)),
        "predicted beside handed out: {ratios:?}"
    );
}
