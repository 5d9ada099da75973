//! Published numbers, the design's goals, and what changes a prediction.

use super::*;
use crate::trial::InitLoraWeights;

/// Plain LoRA without dropout, on so many tokens in all and in the longest row.
fn lora(
    engine: Engine,
    precision: Precision,
    trainable_parameters: u64,
    [tokens, longest]: [u64; 2],
) -> Load {
    Load { precision, engine, trainable_parameters, tokens, longest, ..Load::default() }
}

pub(super) const OPEN_LLAMA_7B: ModelShape = ModelShape {
    vocab_size: 32_000,
    hidden_size: 4096,
    intermediate_size: 11_008,
    num_hidden_layers: 32,
    num_attention_heads: 32,
    num_key_value_heads: 32,
    head_dim: 128,
    tie_word_embeddings: false,
    query_key_value_bias: false,
    query_key_norms: false,
    sliding_window: None,
    sliding_window_layers: 0,
};

/// The published benchmark's table of fine-tuned parameters.
#[test]
fn the_published_table() {
    assert_eq!(OPEN_LLAMA_7B.parameters(), 6_738_415_616);
    let all: u64 = OPEN_LLAMA_7B.modules().iter().map(|module| module.matrix + module.vector).sum();
    assert_eq!(all, OPEN_LLAMA_7B.parameters());
    // (rank, trainable, total in 10⁹, share in per cent, adapter in MiB)
    for (rank, trainable, total, share, mib) in [
        (8, 19_988_480, 6.76, 0.3, 76.4),
        (16, 39_976_960, 6.78, 0.6, 152.65),
        (32, 79_953_920, 6.82, 1.2, 305.15),
        (64, 159_907_840, 6.90, 2.3, 610.15),
    ] {
        let got = OPEN_LLAMA_7B.trainable_parameters(rank, |name| name != ModelShape::HEAD);
        assert_eq!(got, trainable);
        let all = (OPEN_LLAMA_7B.parameters() + got) as f64 / 1e9;
        assert!((all - total).abs() < 0.005, "{all}");
        let percent = 100.0 * trainable_share(got, OPEN_LLAMA_7B.parameters());
        assert!((percent - share).abs() < 0.05, "{percent}");
        let file = adapter_bytes(got, 2 * 7 * 32) as f64 / 1_048_576.0;
        assert!((file - mib).abs() < 0.2, "{file}");
    }
}

/// Operations of plain LoRA.
fn flops(shape: ModelShape, trainable_parameters: u64, length: u64) -> f64 {
    let load = lora(Engine::Cpu, Precision::default(), trainable_parameters, [length, length]);
    shape.flops_per_token(&load, length)
}

/// The design's floor: 26.7 GFLOP a token forward and dX at 7B; and what variants take beside it, in whole products.
#[test]
fn operations_of_a_token() {
    let shape = OPEN_LLAMA_7B;
    let (trainable, whole) = (39_976_960, shape.linear_parameters());
    let plain = flops(shape, trainable, 512);
    assert!((26.0..28.5).contains(&(plain / 1e9)), "{plain}");
    for (init, use_dora, lora_dropout, beside) in [
        (InitLoraWeights::Default, false, 0.1, 0),
        (InitLoraWeights::Pissa, false, 0.0, 4 * trainable),
        (InitLoraWeights::Default, true, 0.0, 2 * whole),
        (InitLoraWeights::Default, true, 0.1, 6 * whole),
    ] {
        let config = TrialConfig {
            init_lora_weights: init,
            use_dora,
            lora_dropout,
            lora_rank: 16,
            ..TrialConfig::default()
        };
        let load = shape.load_at_most(&config, Engine::Cpu);
        assert_eq!(load.adapted, whole);
        let got = shape.flops_per_token(&Load { trainable_parameters: trainable, ..load }, 512);
        assert!(
            (got - plain - beside as f64).abs() < 1e-9 * plain,
            "{init} {use_dora} {lora_dropout}: {got}"
        );
    }
}

/// A start that takes more than a pass is the peak, and gradients of an earlier micro-batch are there throughout.
#[test]
fn starts_and_accumulated_gradients_count() {
    let shape = OPEN_LLAMA_7B;
    let config = |change: &dyn Fn(&mut TrialConfig)| {
        let mut config = TrialConfig {
            batch_size: 1,
            max_sequence_length: 64,
            precision_mode: PrecisionMode::Bfloat16,
            modules_to_save: Some(vec!["embed_tokens".into()]),
            ..TrialConfig::default()
        };
        change(&mut config);
        config
    };
    let load = |engine, change: &dyn Fn(&mut TrialConfig)| shape.load_at_most(&config(change), engine);
    let table = shape.vocab_size * shape.hidden_size;
    let plain = load(Engine::Cpu, &|_| ());
    assert_eq!((plain.start, plain.accumulates), (0, false));
    // Of the largest layers, 4096 x 11008, in float32.
    let (side, long) = (4096 * 4096, 4096 * 11_008);
    for (engine, init, want) in [
        (Engine::Cpu, InitLoraWeights::Pissa, 4 * (3 * long + 9 * side)),
        (Engine::Cpu, InitLoraWeights::PissaNiter(4), 4 * (long + 4 * 11_008 * 8)),
        (Engine::Gpu, InitLoraWeights::Pissa, 4 * long),
    ] {
        let load = load(engine, &|c| (c.init_lora_weights, c.lora_rank) = (init, 8));
        assert_eq!(load.start, want, "{engine:?} {init}");
        let least = shape.base_bytes(load.precision) + 4 * load.trainable_parameters + load.start;
        assert!(shape.peak_bytes(&load, 32).total() >= least, "{engine:?} {init}");
    }
    // Apart from the update, which without it is the peak here.
    let pass = |load: Load| {
        let saved = Saved { largest: 0, ..load.saved };
        shape.peak_bytes(&Load { saved, tokens: 4096, longest: 512, ..load }, 0).total()
    };
    let twice = load(Engine::Cpu, &|c| c.gradient_accumulation_steps = 2);
    assert_eq!(pass(twice) - pass(plain), 4 * table);
    // An earlier adapter and its moments are there while they are written; a GPU's lie in the computer's memory.
    let saves = |engine| load(engine, &|c| c.save_steps = 5);
    assert_eq!(pass(saves(Engine::Cpu)) - pass(plain), 12 * plain.trainable_parameters);
    assert_eq!(pass(saves(Engine::Gpu)), pass(load(Engine::Gpu, &|_| ())));
    let [once, twice] = [1, 2].map(|n| load(Engine::Gpu, &|c| c.gradient_accumulation_steps = n));
    assert_eq!(pass(twice) - pass(once), 4 * once.trainable_parameters);
}

/// A window of as many keys as there are changes nothing; a smaller one counts the keys that are seen.
#[test]
fn operations_within_a_window() {
    let shape = OPEN_LLAMA_7B;
    let windowed =
        |window, layers| ModelShape { sliding_window: Some(window), sliding_window_layers: layers, ..shape };
    // The keys that the queries of a row see, counted one by one.
    let keys = |length: u64, window: u64| (1..=length).map(|query| query.min(window)).sum::<u64>() as f64;
    let attention = |shape: ModelShape, length: u64| {
        let none = ModelShape { num_attention_heads: 0, num_key_value_heads: 0, ..shape };
        let frozen = shape.linear_parameters() - none.linear_parameters();
        flops(shape, 0, length) - flops(none, 0, length) - 4.0 * frozen as f64
    };
    for (length, window, layers) in
        [(512, 4096, 32), (512, 512, 32), (8192, 4096, 32), (100, 7, 3), (64, 1, 32)]
    {
        let seen = layers as f64 * keys(length, window) + (32 - layers) as f64 * keys(length, length);
        let want = 14.0 * 4096.0 * seen / length as f64;
        let got = attention(windowed(window, layers), length);
        assert!((got - want).abs() < 1e-9 * flops(shape, 0, length), "{length} {window} {layers}");
    }
    assert_eq!(flops(windowed(512, 32), 9, 512), flops(shape, 9, 512));
    assert_eq!(flops(windowed(7, 0), 9, 512), flops(shape, 9, 512));
}

/// On a GPU a block's scores are those of the keys that its queries see, if no layer sees more.
#[test]
fn scores_within_a_window() {
    let precision = Precision { mode: PrecisionMode::Bfloat16, ..Precision::default() };
    let shape = |sliding_window, sliding_window_layers| ModelShape {
        intermediate_size: 64,
        sliding_window,
        sliding_window_layers,
        ..OPEN_LLAMA_7B
    };
    let peak = |shape: ModelShape| {
        let (trainable_parameters, tokens) = (1000, 8192);
        let load = lora(Engine::Gpu, precision, trainable_parameters, [tokens, tokens]);
        shape.peak_bytes(&load, 0).total()
    };
    let full = peak(shape(None, 0));
    assert_eq!(peak(shape(Some(1024), 31)), full, "one layer sees all keys");
    assert_eq!(peak(shape(Some(8192), 32)), full);
    // 512 queries of 32 heads see 512 + 1023 keys, in float32 and in 16 bits.
    assert_eq!(full - peak(shape(Some(1024), 32)), 6 * 32 * 512 * (8192 - 1535));
}

/// The design's floors at 7B: 13.48 GB in float16, 3.87 in NF4 with embedding and head in 16 bits, 4.127 bits
/// a quantised parameter.
#[test]
fn bytes_of_the_base() {
    let compute_dtype = Some(ComputeDtype::Float16);
    for (mode, double_quant, gigabytes) in [
        (PrecisionMode::Float32, false, 26.95),
        (PrecisionMode::Float16, false, 13.48),
        (PrecisionMode::FourBit, true, 3.87),
        (PrecisionMode::FourBit, false, 4.17),
    ] {
        let bytes = OPEN_LLAMA_7B.base_bytes(Precision { mode, compute_dtype, double_quant }) as f64 / 1e9;
        assert!((bytes - gigabytes).abs() < 0.01, "{mode:?}: {bytes}");
    }
    let bits = nf4_bytes(4096 * 11_008, true) as f64 * 8.0 / (4096.0 * 11_008.0);
    assert!((bits - 4.127).abs() < 0.0005, "{bits}");
}

/// What OpenLLaMA 7B is to take on a GPU with rank 16 on all linear layers: the published benchmark's rows and beyond.
#[test]
fn goals_on_a_gpu() {
    let sixteen = Precision { mode: PrecisionMode::Bfloat16, ..Precision::default() };
    let compute_dtype = Some(ComputeDtype::Bfloat16);
    let four = Precision { mode: PrecisionMode::FourBit, compute_dtype, double_quant: true };
    // (precision, rows, length, all layers again, gigabytes at most)
    for (precision, rows, longest, again, most) in [
        (sixteen, 2, 512, false, 21.0),
        (sixteen, 2, 512, true, 16.0),
        (sixteen, 1, 512, true, 15.0),
        (sixteen, 2, 1024, false, 38.0),
        (sixteen, 1, 4096, false, 38.0),
        (four, 2, 512, true, 5.3),
        (four, 2, 2048, true, 8.0),
        (four, 64, 512, true, 38.0),
    ] {
        let trainable_parameters = 39_976_960;
        let tokens = rows * longest;
        let load = lora(Engine::Gpu, precision, trainable_parameters, [tokens, longest]);
        let peak = OPEN_LLAMA_7B.peak_bytes(&load, if again { 32 } else { 0 });
        let gigabytes = peak.total() as f64 / 1e9;
        println!("{precision} {rows} x {longest}, layers again: {again}: {gigabytes:.2} GB, {peak:?}");
        assert!(gigabytes <= most, "{precision} {rows} x {longest}: {gigabytes} GB");
    }
}

#[test]
fn as_few_layers_are_computed_again_as_fit() {
    let engine = Engine::Cpu;
    let load = lora(engine, Precision::default(), 1000, [1024, 512]);
    let shape = OPEN_LLAMA_7B;
    let peak = |layers| shape.peak_bytes(&load, layers).total();
    for layers in 0..=32 {
        // The last layer is the first that the backward pass asks for: to compute it again saves nothing.
        assert_eq!(shape.recomputed_layers(&load, peak(layers)), Some(layers.min(31)));
        assert!(layers == 0 || layers == 32 || peak(layers) < peak(layers - 1), "{layers} saves bytes");
    }
    assert_eq!(shape.recomputed_layers(&load, peak(32) - 1), None);
    assert_eq!(shape.recomputed_layers(&load, u64::MAX), Some(0));
}

#[test]
fn targets_are_counted_by_name() {
    let attention = OPEN_LLAMA_7B.trainable_parameters(8, |name| matches!(name, "q_proj" | "v_proj"));
    assert_eq!(attention, 2 * 8 * (4096 + 4096) * 32);
    let head = |shape: ModelShape| shape.trainable_parameters(8, |name| name == ModelShape::HEAD);
    assert_eq!(head(OPEN_LLAMA_7B), 8 * (4096 + 32_000));
    assert_eq!(head(ModelShape { tie_word_embeddings: true, ..OPEN_LLAMA_7B }), 0);
    let adapter = |target_modules| {
        let config = TrialConfig { lora_rank: 8, target_modules, ..TrialConfig::default() };
        OPEN_LLAMA_7B.peak_bytes_at_most(&config)[0].adapter
    };
    let (all, named) = (TargetModules::default(), TargetModules::Names(vec!["lm_head".into()]));
    assert_eq!(adapter(all), 20 * 19_988_480);
    assert_eq!(adapter(named), 20 * (19_988_480 + head(OPEN_LLAMA_7B)));
}
