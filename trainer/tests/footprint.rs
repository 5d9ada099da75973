//! The footprint model's prediction beside what the engine counts.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use candle_core::Device;
use domain::footprint::{Engine, Load, ModelShape};
use domain::trial::{InitLoraWeights, Precision, PrecisionMode};
use trainer::lora::{Adapter, Target};
use trainer::model::{Base, ModelConfig, RopeScaling};
use trainer::optim::{AdamW, AdamWConfig};
use trainer::pack::{self, Member, Row};

#[test]
fn the_peak_is_predicted() {
    // (hidden, intermediate, layers, heads, (key-value heads, head's width), (bias, norms), vocab, head tied or adapted, rank, rows, length)
    let four_bit = Precision { mode: PrecisionMode::FourBit, compute_dtype: None, double_quant: true };
    let half = Precision { mode: PrecisionMode::Bfloat16, ..Precision::default() };
    let full = Precision::default();
    let (plain, pissa) = (InitLoraWeights::Default, InitLoraWeights::PissaNiter(1));
    for (precision, recomputed, init) in [
        (full, 0, plain),
        (full, 1, pissa),
        (full, 9, plain),
        (half, 0, pissa),
        (four_bit, 0, plain),
        (four_bit, 3, plain),
    ] {
        check(precision, recomputed, init);
    }
}

/// Shapes of every kind with the base in such numbers and so many layers computed again.
fn check(precision: Precision, recomputed: usize, init: InitLoraWeights) {
    let (llama, qwen2) = ((false, false), (true, false));
    let qwen3 = (false, true);
    for (
        hidden,
        inter,
        layers,
        heads,
        (kv, dim),
        (bias, norms),
        vocab,
        (tied, adapted),
        rank,
        rows,
        length,
    ) in [
        (64, 172, 5, 8, (4, 8), llama, 512, (true, false), 4, 4, 64),
        (64, 172, 5, 8, (4, 8), llama, 512, (true, false), 16, 8, 32),
        (64, 176, 4, 4, (2, 16), llama, 512, (false, false), 8, 2, 16),
        (64, 176, 4, 4, (2, 16), llama, 512, (false, true), 8, 2, 16),
        (32, 64, 1, 4, (4, 8), llama, 4096, (false, false), 2, 4, 64),
        (32, 64, 1, 4, (4, 8), llama, 4096, (false, true), 2, 4, 64),
        (128, 512, 2, 4, (1, 32), llama, 300, (true, false), 32, 1, 128),
        (64, 172, 5, 8, (2, 8), qwen2, 512, (true, false), 4, 4, 64),
        (64, 192, 5, 8, (4, 16), qwen3, 512, (true, false), 4, 4, 64),
        (64, 192, 3, 4, (2, 32), qwen3, 300, (false, true), 8, 2, 48),
    ] {
        let config = ModelConfig {
            vocab_size: vocab,
            hidden_size: hidden,
            intermediate_size: inter,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: kv,
            head_dim: dim,
            max_position_embeddings: 256,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: RopeScaling::Default,
            tie_word_embeddings: tied,
            query_key_value_bias: bias,
            query_key_norms: norms,
            sliding_windows: vec![Some(24); layers],
            quantization: None,
        };
        let shape = config.shape();
        let base = Base::random(config, precision, &Device::Cpu).unwrap();
        assert_eq!((base.bytes(), base.parameters()), (shape.base_bytes(precision), shape.parameters()));
        let modules: Vec<_> = base.modules().into_iter().map(|m| (m.parameters(), m.path)).collect();
        let by_shape = shape.modules().into_iter().map(|m| (m.matrix + m.vector, m.path));
        assert_eq!(modules, by_shape.collect::<Vec<_>>());
        let head = adapted.then(|| base.head_module());
        let modules: Vec<_> = base.linear_modules().into_iter().chain(head).collect();
        let mut targets = Target::all(&modules, rank, 2.0 * rank as f64);
        targets.iter_mut().for_each(|target| target.init = init);
        let mut adapter = Adapter::new(&base, &targets.into(), 0.0, 1).unwrap();
        let config = AdamWConfig {
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            loraplus_lr_ratio: 1.0,
            weight_decay: 0.0,
            max_grad_norm: 1.0,
        };
        let moments = AdamW::new(&adapter, config).unwrap().bytes();
        let rows: Vec<_> =
            (0..rows).map(|r| Row::whole((0..length).map(|i| (i + r) % 300).collect())).collect();
        let tokens = rows.iter().map(|row| row.input_ids.len() as u64).sum();
        let trainable = adapter.parameters();
        let counted_by_shape =
            shape.trainable_parameters(rank as u64, |name| adapted || name != ModelShape::HEAD);
        assert_eq!(trainable, counted_by_shape);
        let member = Member { recomputed_layers: recomputed, ..Member::new(&mut adapter, &rows, 1) };
        let outcome = pack::forward_backward(&base, &mut [member]).unwrap()[0];
        // A run also holds the adapter that a divergence falls back to.
        let counted = outcome.peak_bytes + moments + 4 * trainable;
        let load = Load {
            precision,
            engine: Engine::Cpu,
            trainable_parameters: trainable,
            initial_parameters: adapter.initial_parameters(),
            tokens,
            longest: length.into(),
            ..Load::default()
        };
        let predicted = shape.peak_bytes(&load, recomputed as u64).total();
        let ratio = predicted as f64 / counted as f64;
        let what = format!("hidden {hidden}, vocab {vocab}, {precision}, {recomputed} layers again");
        assert!((0.99..1.03).contains(&ratio), "{what}: {predicted} for {counted}");
    }
}
