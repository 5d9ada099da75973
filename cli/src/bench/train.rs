//! `lorafleet bench train`: training steps on random weights and random full-length rows, timed one by one.

use crate::Failure;
use domain::trial::{ComputeDtype, GradientCheckpointing, PrecisionMode, TrialConfig};
use domain::{Clock, SystemClock, rng};
use serde_json::{Value, json};
use trainer::TrainError;
use trainer::data::Dataset;
use trainer::model::{Base, ModelConfig, RopeScaling};
use trainer::pack::Row;
use trainer::run::{Loaded, Run, peak_rss_bytes, step_pack};

/// Times training steps of a Llama of random weights.
///
/// A step is what `train` and `run` make of it: forward, backward, gradient norm, clipping, AdamW. All linear
/// layers get an adapter; every row is full, so that all tokens are real. Prints one JSON object.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  lorafleet bench train --hidden 512 --intermediate 1376 --layers 8 --heads 8 --vocab 4096 \\
      --batch 4 --seq 256 --rank 16
  lorafleet bench train --trials 4 --batch 1    # a pack of four trials on one base
  lorafleet bench train --device cuda:0 --precision-mode bfloat16 --hidden 4096 --intermediate 11008 \\
      --layers 32 --heads 32 --vocab 32000 --batch 2 --seq 512    # OpenLLaMA 7B's shape on a GPU")]
pub(crate) struct Args {
    /// Where to train: cpu, cuda or cuda:N.
    #[arg(long, default_value = trainer::device::CPU)]
    device: String,
    /// Width of the residual stream.
    #[arg(long, default_value_t = 512)]
    hidden: usize,
    /// Width of the feed-forward layer.
    #[arg(long, default_value_t = 1376)]
    intermediate: usize,
    /// Decoder layers.
    #[arg(long, default_value_t = 8)]
    layers: usize,
    /// Query heads; they divide --hidden into even parts.
    #[arg(long, default_value_t = 8)]
    heads: usize,
    /// Key and value heads; as many as query heads unless given.
    #[arg(long)]
    kv_heads: Option<usize>,
    /// Rows of the embedding; the output head is not tied to it.
    #[arg(long, default_value_t = 4096)]
    vocab: usize,
    /// Rows of a trial's step.
    #[arg(long, default_value_t = 4)]
    batch: u32,
    /// Tokens of a row.
    #[arg(long, default_value_t = 256)]
    seq: u32,
    /// The adapters' rank.
    #[arg(long, default_value_t = 16)]
    rank: u32,
    /// The frozen base's numbers: float32, bfloat16, float16 or 4bit.
    #[arg(long, default_value = "float32", value_parser = parameter::<PrecisionMode>)]
    precision_mode: PrecisionMode,
    /// With 4bit, the numbers of embedding and head, and on a GPU of activations: float32, bfloat16 or float16.
    #[arg(long, value_parser = parameter::<ComputeDtype>)]
    compute_dtype: Option<ComputeDtype>,
    /// With 4bit, quantise the blocks' magnitudes too.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    double_quant: bool,
    /// Compute each layer again in the backward pass instead of keeping what it needs.
    #[arg(long)]
    gradient_checkpointing: bool,
    /// Trials that share the base and step together.
    #[arg(long, default_value_t = 1)]
    trials: u64,
    /// Steps before the clock counts.
    #[arg(long, default_value_t = 2)]
    warmup: u32,
    /// Steps that are timed.
    #[arg(long, default_value_t = 10)]
    steps: u32,
    /// Seed of rows and adapters.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// After them one more step, of which it tells where a GPU's time went.
    #[arg(long)]
    profile: bool,
}

impl Args {
    /// Steps that are made.
    fn all_steps(&self) -> u32 {
        self.warmup + self.steps + u32::from(self.profile)
    }
}

/// Runs the verb.
pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let shape = shape(args)?;
    let failed = |error: TrainError| match error {
        TrainError::Parameter { .. } => Failure::invalid(error),
        _ => Failure::failed(error),
    };
    let precision = config(args, 0).base_model().precision;
    let device = trainer::device::open(&args.device).map_err(failed)?;
    let opened = trainer::memory::pool(&device).map_err(failed)?;
    let loaded = Loaded::in_memory(Base::random(shape, precision, &device).map_err(failed)?);
    let trial = |number| Run::with_data(&loaded, config(args, number), rows(args, number));
    let mut runs = (0..args.trials).map(trial).collect::<Result<Vec<_>, _>>().map_err(failed)?;
    let clock = SystemClock::new();
    let mut seconds = Vec::with_capacity(args.steps as usize);
    let (mut last, mut profile) = (Vec::new(), None);
    for step in 0..args.all_steps() {
        let mut pack: Vec<&mut Run> = runs.iter_mut().collect();
        let started = clock.monotonic();
        let mut make = || step_pack(&loaded, &mut pack, &clock);
        if step < args.warmup + args.steps {
            last = make().map_err(failed)?;
        } else {
            (last, profile) = trainer::profile::of(&device, make).map_err(failed)?;
        }
        // Whatever a step leaves a GPU to do counts.
        device.synchronize().map_err(|error| failed(error.into()))?;
        let took = clock.monotonic().saturating_sub(started).as_secs_f64();
        if let Some(why) = last.iter().find_map(|stepped| stepped.diverged.as_ref()) {
            return Err(Failure::failed(format!("the benchmark's run diverged: {why}")));
        }
        if step >= args.warmup && step < args.warmup + args.steps {
            seconds.push(took);
        }
    }
    let values = last.iter().filter_map(|stepped| stepped.point.as_ref()).flat_map(|point| &point.values);
    let loss = values.clone().find(|(name, _)| name == domain::metric::LOSS).map(|(_, loss)| *loss);
    let peak = |name: &str| values.clone().filter(|(n, _)| n == name).map(|(_, v)| *v as u64).max();
    let held =
        peak(domain::metric::PACK_PEAK_MEMORY_BYTES).or_else(|| peak(domain::metric::PEAK_MEMORY_BYTES));
    let mut document = document(args, &loaded, &runs, seconds, loss, held);
    if let (Some(opened), Some(pool)) = (opened, trainer::memory::pool(&device).map_err(failed)?) {
        let predicted = document["predicted_peak_memory_bytes"].as_u64();
        let outside = opened.device_used + trainer::memory::workspace_bytes();
        document["gpu"] = json!({
            // The context alone, where no other program uses the device.
            "opened_bytes": opened.device_used,
            "predicted_device_bytes": predicted.map(|predicted| outside + predicted),
            "pool_used_high_bytes": pool.used_high,
            "pool_reserved_high_bytes": pool.reserved_high,
            "device_used_bytes": pool.device_used,
        });
    }
    if let Some(profile) = profile {
        document["profile"] = super::profile(profile);
    }
    crate::output::to_stdout(&format!("{document:#}"))
}

fn shape(args: &Args) -> Result<ModelConfig, Failure> {
    let kv = args.kv_heads.unwrap_or(args.heads);
    let least_one = [
        ("--hidden", args.hidden),
        ("--intermediate", args.intermediate),
        ("--layers", args.layers),
        ("--heads", args.heads),
        ("--kv-heads", kv),
        ("--vocab", args.vocab),
        ("--batch", args.batch as usize),
        ("--rank", args.rank as usize),
        ("--trials", args.trials as usize),
        ("--steps", args.steps as usize),
    ];
    if let Some((flag, _)) = least_one.iter().find(|(_, value)| *value == 0) {
        return Err(Failure::invalid(format!("{flag} is 0; give at least 1")));
    }
    if args.seq < 2 {
        return Err(Failure::invalid(format!(
            "--seq is {}; a row to predict has at least 2 tokens",
            args.seq
        )));
    }
    if !args.hidden.is_multiple_of(2 * args.heads) {
        let problem = "a head's width is --hidden / --heads and must be an even number";
        return Err(Failure::invalid(format!("--hidden {} --heads {}: {problem}", args.hidden, args.heads)));
    }
    if !args.heads.is_multiple_of(kv) {
        return Err(Failure::invalid(format!("--kv-heads {kv} does not divide --heads {}", args.heads)));
    }
    Ok(ModelConfig {
        vocab_size: args.vocab,
        hidden_size: args.hidden,
        intermediate_size: args.intermediate,
        num_hidden_layers: args.layers,
        num_attention_heads: args.heads,
        num_key_value_heads: kv,
        head_dim: args.hidden / args.heads,
        max_position_embeddings: args.seq as usize,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::Default,
        tie_word_embeddings: false,
        query_key_value_bias: false,
        query_key_norms: false,
        sliding_windows: Vec::new(),
        quantization: None,
    })
}

/// A value under the name that it has in sweep files.
pub(super) fn parameter<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_value(json!(text)).map_err(|error| error.to_string())
}

fn config(args: &Args, number: u64) -> TrialConfig {
    TrialConfig {
        precision_mode: args.precision_mode,
        compute_dtype: args.compute_dtype,
        double_quant: args.double_quant,
        gradient_checkpointing: match args.gradient_checkpointing {
            true => GradientCheckpointing::On,
            false => GradientCheckpointing::Off,
        },
        lora_rank: args.rank,
        batch_size: args.batch,
        max_sequence_length: args.seq,
        learning_rate: 1e-4,
        weight_decay: 0.01,
        max_steps: Some(args.all_steps()),
        seed: args.seed + number,
        ..TrialConfig::default()
    }
}

fn rows(args: &Args, number: u64) -> Dataset {
    let key = rng::key(args.seed + number, "bench rows");
    let row = |r: u32| {
        let ids = (0..args.seq).map(|i| rng::bits(key, u64::from(r) * u64::from(args.seq) + u64::from(i)));
        Row::whole(ids.map(|bits| (bits % args.vocab as u64) as u32).collect())
    };
    // No row comes twice.
    let count = args.all_steps() * args.batch;
    Dataset { train: (0..count).map(row).collect(), ..Dataset::default() }
}

fn document(
    args: &Args,
    loaded: &Loaded,
    runs: &[Run],
    mut seconds: Vec<f64>,
    loss: Option<f64>,
    held: Option<u64>,
) -> Value {
    seconds.sort_by(f64::total_cmp);
    let median = (seconds[(seconds.len() - 1) / 2] + seconds[seconds.len() / 2]) / 2.0;
    let shape = loaded.base.config.shape();
    let samples = f64::from(args.batch) * args.trials as f64;
    let tokens = samples * f64::from(args.seq);
    let flops = tokens * shape.flops_per_token(runs[0].load(), u64::from(args.seq));
    let predicted = (args.trials == 1).then(|| runs[0].predicted_peak_bytes(loaded).total());
    json!({
        "benchmark": "train",
        "hidden": args.hidden,
        "intermediate": args.intermediate,
        "layers": args.layers,
        "heads": args.heads,
        "kv_heads": loaded.base.config.num_key_value_heads,
        "vocab": args.vocab,
        "batch": args.batch,
        "seq": args.seq,
        "rank": args.rank,
        "trials": args.trials,
        "device": args.device,
        "precision_mode": args.precision_mode,
        "compute_dtype": args.compute_dtype,
        "double_quant": args.double_quant,
        "gradient_checkpointing": args.gradient_checkpointing,
        "base_bytes": loaded.base.bytes(),
        "threads": trainer::threads(),
        "warmup": args.warmup,
        "steps": args.steps,
        "step_seconds": { "median": median, "min": seconds[0], "max": seconds[seconds.len() - 1] },
        "tokens_per_second": tokens / median,
        "samples_per_second": samples / median,
        "flops_per_second": flops / median,
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_memory_bytes": held,
        "predicted_peak_memory_bytes": predicted,
        "base_parameters": loaded.base.parameters(),
        "trainable_parameters": runs[0].load().trainable_parameters,
        "loss": loss,
    })
}

#[cfg(test)]
mod tests {
    use super::super::load;
    use super::*;
    use clap::Parser;
    use domain::footprint::Engine;

    #[derive(clap::Parser)]
    struct Train {
        #[command(flatten)]
        args: Args,
    }

    #[derive(clap::Parser)]
    struct Load {
        #[command(flatten)]
        _args: load::Args,
    }

    /// The rows of `tests/gpu bench` are flags that the verbs take, and the documentation has the predictions for them.
    #[test]
    fn the_rows_of_the_gpu_benchmark() {
        let table: Value = serde_json::from_str(include_str!("../../../tests/bench/gpu.json")).unwrap();
        let documented = include_str!("../../../docs/benchmarks/gpu.md");
        let mut predicted = 0;
        for row in table["rows"].as_array().unwrap() {
            let name = row["row"].as_str().unwrap();
            let start = format!("| `{name}` |");
            let line = documented.lines().find(|line| line.starts_with(&start));
            let line = line.unwrap_or_else(|| panic!("{name} is not in docs/benchmarks/gpu.md"));
            let words = |flags: &'_ Value| -> Vec<String> {
                flags.as_str().unwrap().split_whitespace().map(String::from).collect()
            };
            let Some(shape) = row["shape"].as_str() else {
                let flags = [vec!["load".into(), "DIR".into()], words(&row["flags"])].concat();
                Load::try_parse_from(flags).unwrap_or_else(|error| panic!("{name}: {error}"));
                continue;
            };
            let flags = [&table["shapes"][shape], &table["timing"], &row["flags"]].map(words).concat();
            let flags = ["train".to_string()].into_iter().chain(flags);
            let args = Train::try_parse_from(flags).unwrap_or_else(|error| panic!("{name}: {error}")).args;
            assert!(args.steps >= 20, "{name}: a median of {} steps", args.steps);
            let shape = super::shape(&args).ok().unwrap().shape();
            let load = shape.load_at_most(&config(&args, 0), Engine::Gpu);
            let again = if args.gradient_checkpointing { shape.num_hidden_layers } else { 0 };
            let peak = format!("| {:.1} GB |", shape.peak_bytes(&load, again).total() as f64 / 1e9);
            if args.trials == 1 {
                predicted += 1;
                assert!(line.contains(&peak), "{name}: {peak} is predicted, but: {line}");
            }
        }
        assert_eq!(predicted, 12);
    }
}
