//! Passes and steps of packs on a GPU, or on the CPU in its place, beside those on the CPU.

use super::emulated;
use super::tests::{Pair, Side, gpu, on_gpu, values};
use crate::data::Dataset;
use crate::lora::{Adapter, Target};
use crate::model::{Base, ModelConfig, RopeScaling};
use crate::optim::{AdamW, AdamWConfig};
use crate::pack::{self, Member, Row};
use crate::rng;
use crate::run::{Loaded, Run, step_pack};
use crate::saved::SavedModule;
use crate::weight::Numbers;
use candle_core::{DType, Device, Tensor};
use domain::SystemClock;
use domain::metric;
use domain::trial::{ComputeDtype, Precision, PrecisionMode, TrialConfig};

/// A model of random weights that both sides have: a Llama, or one with all that sets its kin apart.
fn base(side: Side, precision: Precision, kin: bool) -> Base {
    let config = ModelConfig {
        vocab_size: 48,
        hidden_size: 32,
        intermediate_size: 40,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 8,
        max_position_embeddings: 64,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::Default,
        tie_word_embeddings: false,
        query_key_value_bias: kin,
        query_key_norms: kin,
        sliding_windows: if kin { vec![None, Some(6)] } else { Vec::new() },
        quantization: None,
    };
    let mut base = Base::random(config, precision, &Device::Cpu).unwrap();
    let device = if side == Side::Gpu { gpu().unwrap() } else { &Device::Cpu };
    let draw = |dims: &[usize], name: &str, scale: f64| {
        let key = rng::key(3, name);
        let count = dims.iter().product::<usize>() as u64;
        let value = |i| (scale * (2.0 * rng::uniform(key, i) - 1.0)) as f32;
        Tensor::from_vec((0..count).map(value).collect::<Vec<_>>(), dims, device).unwrap()
    };
    let numbers = (Numbers::of_linears(precision), Numbers::of_tables(precision));
    for linear in base.layers.iter_mut().flat_map(|layer| &mut layer.linears) {
        let bias = linear.bias.as_ref().map(|bias| draw(bias.dims(), &format!("{} bias", linear.path), 0.3));
        linear.bias = bias;
        linear.weight = numbers.0.hold(&draw(&linear.weight.dims(), &linear.path, 0.3)).unwrap();
    }
    for (i, layer) in base.layers.iter_mut().enumerate() {
        let norms = [&mut layer.input_norm, &mut layer.post_attention_norm];
        for (j, norm) in norms.into_iter().chain(layer.head_norms.iter_mut().flatten()).enumerate() {
            *norm = (draw(norm.dims(), &format!("norm {i} {j}"), 0.3) + 1.0).unwrap();
        }
    }
    base.norm = (draw(&[32], "norm", 0.3) + 1.0).unwrap();
    base.embedding = numbers.1.hold(&draw(&[48, 32], "embedding", 1.0)).unwrap().dense().unwrap();
    base.head.weight = numbers.1.hold(&draw(&[48, 32], "head", 0.5)).unwrap();
    base
}

/// An adapter on every layer and the head, A and B random.
fn adapter(base: &Base, rank: usize, use_dora: bool, dropout: f64, seed: u64) -> Adapter {
    let modules = [base.linear_modules(), vec![base.head_module()]].concat();
    let mut targets = Target::all(&modules, rank, 2.0 * rank as f64);
    targets.iter_mut().for_each(|target| target.use_dora = use_dora);
    let mut adapter = Adapter::new(base, &targets.into(), dropout, seed).unwrap();
    for module in &mut adapter.modules {
        let b = Pair::random(module.b.dims(), seed, 0.1, DType::F32);
        module.b = b.cpu.to_device(base.device()).unwrap();
    }
    adapter
}

/// An adapter on some layers, with magnitudes and dropout and beside what it began with, and all else trained whole.
fn with_whole_modules(base: &Base, seed: u64) -> Adapter {
    let mut adapter = adapter(base, 4, true, 0.3, seed);
    adapter.modules.retain(|module| module.path.ends_with("q_proj") || module.path.ends_with("up_proj"));
    for module in &mut adapter.modules {
        module.initial = Some([(&module.a * 0.5).unwrap(), module.b.clone()]);
    }
    let rest = base.modules().into_iter().filter(|m| adapter.modules.iter().all(|a| a.path != m.path));
    let saved = rest.map(|spec| SavedModule::of(base, &spec).unwrap()).collect();
    Adapter { saved, ..adapter }
}

/// A pack's step on the GPU against the CPU: losses and every gradient, with dropout, with magnitudes, with modules
/// trained whole, with layers computed again, with the base in 16 and 4 bits.
#[test]
fn a_packs_step() {
    if gpu().is_none() {
        return;
    }
    let rows = |count: u32, seed: u32| -> Vec<Row> {
        let row = |r| Row::whole((0..5 + r * 3).map(|i| (i * 7 + r + seed) % 48).collect());
        (0..count).map(row).collect()
    };
    let four_bit =
        |compute_dtype| Precision { mode: PrecisionMode::FourBit, compute_dtype, double_quant: true };
    let sixteen = |mode| Precision { mode, ..Precision::default() };
    // (precision, layers computed again, whether it has what Llama's kin have, largest error of a gradient relative to
    // its norm)
    for (precision, recomputed_layers, kin, tolerance) in [
        (Precision::default(), 0, false, 2e-5),
        (Precision::default(), 1, false, 2e-5),
        (Precision::default(), 2, false, 2e-5),
        (four_bit(None), 0, false, 2e-5),
        (four_bit(Some(ComputeDtype::Bfloat16)), 2, false, 0.05),
        (sixteen(PrecisionMode::Bfloat16), 0, false, 0.05),
        (sixteen(PrecisionMode::Float16), 0, false, 0.01),
        (Precision::default(), 0, true, 2e-5),
        (Precision::default(), 2, true, 2e-5),
        (four_bit(None), 1, true, 2e-5),
        (sixteen(PrecisionMode::Bfloat16), 0, true, 0.05),
        (sixteen(PrecisionMode::Float16), 0, true, 0.01),
    ] {
        let step = |side: Side| {
            let base = base(side, precision, kin);
            let (mut one, mut two) = (adapter(&base, 4, false, 0.3, 1), adapter(&base, 16, true, 0.0, 2));
            let mut whole = with_whole_modules(&base, 3);
            let (three, two_rows, one_row) = (rows(3, 1), rows(2, 9), rows(2, 20));
            let mut members = [
                Member { recomputed_layers, ..Member::new(&mut one, &three, 5) },
                Member { loss_scale: 64.0, ..Member::new(&mut two, &two_rows, 6) },
                Member::new(&mut whole, &one_row, 7),
            ];
            let outcomes = pack::forward_backward(&base, &mut members).unwrap();
            (outcomes, [one, two, whole])
        };
        let what = format!("{precision}, {recomputed_layers} layers again, kin: {kin}");
        let ((got, got_adapters), (want, want_adapters)) = (on_gpu(|| step(Side::Gpu)), step(Side::Cpu));
        for (got, want) in got.iter().zip(&want) {
            assert!(
                (got.nll - want.nll).abs() < tolerance * want.nll,
                "{what}: {} on the CPU {}",
                got.nll,
                want.nll
            );
        }
        let modules = |adapters: &'_ [Adapter; 3]| -> Vec<Tensor> {
            adapters.iter().flat_map(Adapter::gradients).cloned().collect()
        };
        let (got, want) = (modules(&got_adapters), modules(&want_adapters));
        let whole = got_adapters[2].named().count();
        assert_eq!(got.len(), 2 * 15 + 3 * 15 + whole, "{what}: every matrix and every magnitude");
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            let (got, want) = (values(got), values(want));
            let norm = want.iter().map(|x| x * x).sum::<f32>().sqrt();
            let off = got.iter().zip(&want).map(|(a, b)| (a - b) * (a - b)).sum::<f32>().sqrt();
            assert!(off <= tolerance as f32 * norm, "{what}, gradient {i}: {off} off, norm {norm}");
        }
    }
}

/// Whole steps, the optimizer's among them, with its clipping, decay and LoRA+'s two rates: the weights on the GPU stay
/// those on the CPU, and the same steps again give the same bits.
#[test]
fn a_few_steps() {
    if gpu().is_none() {
        return;
    }
    let config = AdamWConfig {
        beta1: 0.9,
        beta2: 0.999,
        epsilon: 1e-8,
        loraplus_lr_ratio: 4.0,
        weight_decay: 0.1,
        max_grad_norm: 0.5,
    };
    let train = |side: Side| {
        let base = base(side, Precision::default(), false);
        let mut adapter = with_whole_modules(&base, 1);
        let mut optimizer = AdamW::new(&adapter, config).unwrap();
        for step in 0..4 {
            // Two micro-batches: their gradients add up.
            let mut targets = 0;
            for micro in 0..2 {
                let row = Row::whole((0..9 + micro).map(|i| (i * 5 + 3 * step + micro) % 48).collect());
                let mut members =
                    [Member::new(&mut adapter, std::slice::from_ref(&row), u64::from(2 * step + micro))];
                targets += pack::forward_backward(&base, &mut members).unwrap()[0].targets;
            }
            optimizer.step(&mut adapter, 1e-2, targets as f64).unwrap();
        }
        adapter.named().map(|(_, _, t)| values(t)).collect::<Vec<_>>().concat()
    };
    let (got, again, want) = (on_gpu(|| train(Side::Gpu)), on_gpu(|| train(Side::Gpu)), train(Side::Cpu));
    assert!(got == again, "the same steps give other bits");
    let off = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    // A step moves a weight by up to its rate, 1e-2 or four times that, whatever the gradient's size.
    assert!(off < 2e-4, "{off} off");
}

/// A base in float32 on the GPU.
fn loaded() -> Loaded {
    let precision = TrialConfig::default().base_model().precision;
    Loaded::in_memory(base(Side::Gpu, precision, false))
}

/// A run of three steps on it, on rows that are alike in length; `eval` of them are held out.
fn run(loaded: &Loaded, seed: u32, gradient_accumulation_steps: u32, eval: u32) -> Run {
    let row = |r: u32| Row::whole((0..9).map(|i| (i * 5 + r + seed) % 48).collect());
    let data = Dataset {
        train: (0..8).map(row).collect(),
        eval: (8..8 + eval).map(row).collect(),
        ..Dataset::default()
    };
    let config = TrialConfig {
        gradient_accumulation_steps,
        batch_size: 2,
        lora_rank: 4,
        max_sequence_length: 16,
        max_steps: Some(3),
        logging_steps: 1,
        eval_steps: 1,
        seed: seed.into(),
        ..TrialConfig::default()
    };
    Run::with_data(loaded, config, data).unwrap()
}

/// A pack's step waits for the GPU once, for all trials and their micro-batches together.
#[test]
fn a_step_waits_once() {
    if gpu().is_none() {
        return;
    }
    let waits = on_gpu(|| {
        let loaded = loaded();
        let (mut one, mut two) = (run(&loaded, 1, 2, 0), run(&loaded, 2, 3, 0));
        let step = |_| {
            let before = emulated::reads();
            let stepped = step_pack(&loaded, &mut [&mut one, &mut two], &SystemClock::new()).unwrap();
            assert!(stepped.iter().all(|stepped| stepped.diverged.is_none()), "{stepped:?}");
            emulated::reads() - before
        };
        (0..3).map(step).collect::<Vec<_>>()
    });
    assert_eq!(waits, [1, 1, 1]);
}

/// Memory that runs out in the middle of a step, and anywhere from the last pass to the updates of both runs, leaves both
/// as they were: what follows has the same bits.
#[test]
fn a_step_without_memory_changes_nothing() {
    if gpu().is_none() {
        return;
    }
    let train = |fails: bool| {
        let loaded = loaded();
        let (mut one, mut two) = (run(&loaded, 1, 1, 0), run(&loaded, 2, 1, 0));
        let (mut asked, mut losses, clock) = (0, Vec::new(), SystemClock::new());
        for step in 0..3 {
            let last = asked - asked.min(16)..asked;
            for number in [0, asked / 2].into_iter().chain(last).filter(|_| fails && step == 1) {
                emulated::fail_at(emulated::allocations() + number);
                let error = step_pack(&loaded, &mut [&mut one, &mut two], &clock).unwrap_err().to_string();
                assert!(error.contains("out of memory"), "{number} of {asked}: {error}");
                assert_eq!((one.step(), two.step()), (1, 1), "{number} of {asked}");
            }
            let before = emulated::allocations();
            let stepped = step_pack(&loaded, &mut [&mut one, &mut two], &clock).unwrap();
            asked = emulated::allocations() - before;
            losses.extend(stepped.iter().map(|stepped| stepped.point.as_ref().unwrap().get(metric::LOSS)));
        }
        let weights =
            [&one, &two].map(|run| run.adapter().named().map(|(_, _, t)| values(t)).collect::<Vec<_>>());
        (losses, weights)
    };
    let (got, want) = on_gpu(|| (train(true), train(false)));
    assert_eq!(got.0, want.0);
    assert!(got.1 == want.1, "the weights differ");
}

/// Memory that runs out in a run's evaluation, after all have stepped, is that run's failure.
#[test]
fn an_evaluation_without_memory_ends_its_run_alone() {
    if gpu().is_none() {
        return;
    }
    on_gpu(|| {
        let loaded = loaded();
        let (mut one, mut two) = (run(&loaded, 1, 1, 3), run(&loaded, 2, 1, 0));
        let mut step = || step_pack(&loaded, &mut [&mut one, &mut two], &SystemClock::new()).unwrap();
        let before = emulated::allocations();
        assert!(step().iter().all(|stepped| stepped.failed.is_none()));
        // The last allocation of a step is one of the only evaluation.
        emulated::fail_at(2 * emulated::allocations() - before - 1);
        let stepped = step();
        let failed = stepped[0].failed.as_ref().unwrap().to_string();
        assert!(failed.contains("out of memory"), "{failed}");
        assert!(stepped[1].failed.is_none() && stepped[1].point.is_some());
        assert_eq!((one.step(), two.step()), (2, 2));
    });
}

/// More than the device has is an error that says so, and what fits goes on.
#[test]
fn memory_that_runs_out_is_an_error() {
    let Some(gpu) = gpu().filter(|gpu| gpu.is_cuda()) else { return };
    let error = Tensor::zeros(1 << 38, DType::F32, gpu).unwrap_err().to_string().to_lowercase();
    assert!(error.contains("out of memory"), "{error}");
    let base = base(Side::Gpu, Precision::default(), false);
    let mut adapter = adapter(&base, 4, false, 0.0, 1);
    let row = [Row::whole((0..20).collect())];
    let outcome = pack::forward_backward(&base, &mut [Member::new(&mut adapter, &row, 1)]).unwrap()[0];
    assert!(outcome.nll.is_finite() && outcome.targets == 19);
}
