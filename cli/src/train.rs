//! `lorafleet train`: one fine-tuning run in this process, without a coordinator.

mod checkpoints;
mod flags;
mod interrupt;
mod metrics;
pub(crate) mod progress;
mod summary;

use crate::Failure;
use crate::download::Downloads;
use crate::output::{OutputArgs, say};
use checkpoints::Output;
use domain::footprint;
use domain::trial::{Precision, TrialConfig};
use domain::{Clock, SystemClock};
use flags::Parameters;
use gpu_agent::devices::CPU;
use metrics::Metrics;
use progress::Progress;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use trainer::run::{Loaded, Run, step_pack};
use trainer::{Device, TrainError, locate, preflight};

/// Fine-tunes one model with LoRA in this process, without a coordinator.
///
/// The adapter is written to --output-dir in PEFT's format. Ctrl-C writes a checkpoint; the same command with
/// --resume goes on from it. Every flag answers to kebab-case and to snake_case.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  lorafleet train --pretrained-model-id ./models/stories260K --dataset-name rows.jsonl --output-dir ./adapter \\
      --lora-rank 8 --learning-rate 1e-3 --max-steps 200 --metrics metrics.jsonl
  lorafleet train --task=instruct-lora --pretrained_model_id=./models/my-llama --dataset_name=guanaco.jsonl \\
      --instruct_column_in_dataset=text --precision_mode=float32 --output_dir=./adapter --lora_rank=2 \\
      --max_sequence_length=512 --learning_rate=2e-4 --max_steps=50
  lorafleet train --pretrained-model-id openlm-research/open_llama_3b --dataset-name org/rows --output-dir ./adapter

Exit codes: 0 done, 1 the work failed, 2 usage or unusable input, 3 the hub cannot be reached, 130 interrupted.")]
pub(crate) struct Args {
    /// Directory for the adapter and its checkpoints.
    #[arg(long, alias = "output_dir", value_name = "DIR")]
    output_dir: PathBuf,
    /// File for the metrics, one JSON object a line.
    #[arg(long, value_name = "FILE")]
    metrics: Option<PathBuf>,
    /// Goes on from the newest checkpoint in --output-dir.
    #[arg(long)]
    resume: bool,
    /// Starts anew where --output-dir holds an earlier run: its adapter and checkpoints are removed once the new
    /// run is ready to train.
    #[arg(long, alias = "overwrite_output_dir", conflicts_with = "resume")]
    overwrite_output_dir: bool,
    /// The device to train on: auto (the first GPU that can be used, else the CPU), cpu, cuda or cuda:N, counted as
    /// CUDA counts the GPUs that CUDA_VISIBLE_DEVICES leaves.
    #[arg(long, default_value = crate::device::AUTO, value_name = "DEVICE")]
    device: String,
    /// Bytes of tensors that the run may hold, such as 8GB or 6GiB: by it gradient_checkpointing `auto` chooses its
    /// layers. Unless given, seven eighths of the machine's memory, or a GPU's but for 1 GB.
    #[arg(long, alias = "memory_limit", value_name = "BYTES", value_parser = config::size::parse)]
    memory_limit: Option<u64>,
    #[command(flatten)]
    output: OutputArgs,
    #[command(flatten)]
    parameters: Parameters,
}

/// The configuration with its model and rows where a person in this directory has them.
fn found(mut config: TrialConfig) -> TrialConfig {
    let mixed = config.interleave_datasets.iter_mut().flatten();
    let names = [&mut config.pretrained_model_id, &mut config.dataset_name].into_iter();
    for name in names.chain(&mut config.eval_dataset_name).chain(mixed) {
        *name = config::paths::absolute(name);
    }
    config
}

/// Runs the verb.
pub(crate) fn run(args: Args) -> Result<(), Failure> {
    let clock = SystemClock::new();
    let config = &found(args.parameters.0.clone());
    preflight::check_values(config).map_err(unusable)?;
    let placed = crate::device::of(&args.device)?;
    // Before Ctrl-C waits for a step to end: a download goes on where it was stopped.
    Downloads::default().of(config, &str::to_string)?;
    let interrupted = interrupt::flag()?;
    let engine = if placed.id.as_str() == CPU { footprint::Engine::Cpu } else { footprint::Engine::Gpu };
    let plan = preflight::preflight(config, engine).map_err(unusable)?;
    let memory = args.memory_limit.unwrap_or(placed.memory_bytes);
    fits(&plan, memory)?;
    let (mut output, checkpoint) = if args.resume {
        let (output, checkpoint) = Output::resumed(&args.output_dir)?;
        (output, Some(checkpoint))
    } else {
        (Output::fresh(&args.output_dir, args.overwrite_output_dir)?, None)
    };
    let device = trainer::device::open(placed.id.as_str()).map_err(unusable)?;
    let base = config.base_model();
    let dir = locate::model(&base.model).map_err(unusable)?;
    let loaded = load(&dir, base.precision, &device, &clock)?;
    let mut run = match &checkpoint {
        None => Run::new(&loaded, config.clone()),
        Some(dir) => Run::resume(&loaded, config.clone(), dir, dir),
    }
    .map_err(unusable)?;
    run.fit(&loaded, memory);
    output.prepare(checkpoint.is_some())?;
    announce(&plan, &run, checkpoint.as_deref());
    let metrics = args.metrics.as_deref().map(|path| Metrics::open(path, run.step())).transpose()?;
    run.base_eval(&loaded).map_err(failed)?;
    let trained = train(&loaded, &mut run, &mut output, metrics, &interrupted, &clock);
    // However it ended: what is being written becomes a checkpoint.
    let written = output.wait().map_err(failed);
    trained.and(written)?;
    output.finish(&mut run).map_err(failed)?;
    let mut summary = run.summary(&loaded).map_err(failed)?;
    summary.device_seconds = clock.monotonic().as_secs_f64();
    summary::print(args.output.format, &args.output_dir, &run, &summary)
}

/// The base, with progress, and how long it took if that was long.
fn load(dir: &Path, precision: Precision, device: &Device, clock: &SystemClock) -> Result<Loaded, Failure> {
    let started = clock.monotonic();
    let mut progress = progress::Loading::new();
    let loaded = Loaded::load_watched(dir, precision, device, &mut |so_far| progress.watch(so_far));
    progress.finish();
    let loaded = loaded.map_err(unusable)?;
    let seconds = clock.monotonic().saturating_sub(started).as_secs_f64();
    if seconds >= 1.0 {
        let bytes = crate::output::bytes(loaded.base.bytes());
        say!("the base takes {bytes} in {precision}, loaded in {seconds:.1} s");
    }
    Ok(loaded)
}

/// All steps that are left, with metrics, checkpoints and progress.
fn train(
    loaded: &Loaded,
    run: &mut Run,
    output: &mut Output,
    mut metrics: Option<Metrics>,
    interrupted: &AtomicBool,
    clock: &SystemClock,
) -> Result<(), Failure> {
    let mut progress = Progress::new(run.step(), run.total_steps());
    let mut left = run.make_up(loaded, clock);
    while left.is_some() || !run.is_done() {
        let stepped = match left.take() {
            Some(stepped) => stepped,
            None => step_pack(loaded, &mut [&mut *run], clock).map_err(failed)?.remove(0),
        };
        // Why the run ends comes before what became of an earlier checkpoint.
        let ended = match (&stepped.failed, &stepped.diverged) {
            (Some(error), _) => Some(format!("the step is made, and could not be evaluated: {error}")),
            (None, why) => why.as_ref().map(|why| format!("the run diverged: {why}")),
        };
        if let Some(why) = ended {
            progress.finish();
            // An earlier checkpoint that was not written is no reason not to write this one.
            let _ = output.wait();
            let kept = output.checkpoint(run).and_then(|kept| output.wait().map(|()| kept));
            let kept = match kept {
                Ok(kept) => format!("see {}", kept.display()),
                Err(error) => format!("its last good state could not be written: {error}"),
            };
            return Err(Failure::failed(format!("{why}; {kept}")));
        }
        if let (Some(metrics), Some(point)) = (&mut metrics, &stepped.point) {
            metrics.write(point)?;
        }
        output.look().map_err(failed)?;
        progress.step(run.step(), stepped.point.as_ref());
        let stops = interrupted.load(Ordering::Relaxed) && !run.is_done();
        if stops || (stepped.checkpoint_due && run.config().save_steps > 0) {
            output.checkpoint(run).map_err(failed)?;
        }
        if stops {
            output.wait().map_err(failed)?;
            progress.finish();
            return Err(Failure::interrupted(format!(
                "interrupted after step {} of {}; the same command with --resume goes on from there",
                run.step(),
                run.total_steps()
            )));
        }
    }
    progress.finish();
    Ok(())
}

fn announce(plan: &preflight::Preflight, run: &Run, checkpoint: Option<&Path>) {
    let config = run.config();
    say!(
        "{}: {} layers, width {}; {} of {} parameters train",
        config.pretrained_model_id,
        plan.shape.num_hidden_layers,
        plan.shape.hidden_size,
        plan.trainable_parameters,
        plan.total_parameters
    );
    say!("{}", crate::plan::reading(config, plan));
    let layers = run.recomputed_layers();
    if layers > 0 {
        say!("{layers} of {} layers are computed again in the backward pass", plan.shape.num_hidden_layers);
    }
    if let Some(dir) = checkpoint {
        say!("going on from {} after step {} of {}", dir.display(), run.step(), run.total_steps());
    }
}

/// Refuses a run that would not fit, before its base is loaded.
fn fits(plan: &preflight::Preflight, memory: u64) -> Result<(), Failure> {
    if plan.least_memory_bytes <= memory {
        return Ok(());
    }
    let bytes = crate::output::bytes;
    Err(Failure::invalid(format!(
        "the run does not fit: it needs {}, and may hold {}; lower batch_size or max_sequence_length, set \
         gradient_checkpointing to auto, or use precision_mode 4bit",
        bytes(plan.least_memory_bytes),
        bytes(memory)
    )))
}

/// Something that was given cannot be used; only a failed tensor operation is no fault of the input.
fn unusable(error: TrainError) -> Failure {
    match error {
        TrainError::Tensor(_) => Failure::failed(error),
        _ => Failure::invalid(error),
    }
}

fn failed(error: TrainError) -> Failure {
    Failure::failed(error)
}
