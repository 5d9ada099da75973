//! One fine-tuning run, step by step, alone or in a pack.
//!
//! | file | holds |
//! |---|---|
//! | `mod.rs` | a loaded base, a run and how it starts |
//! | `step.rs` | a pack's optimizer step, divergence, evaluation, metric points |
//! | `resume.rs` | what a checkpoint holds, how it is written beside training, and how a run goes on from it, bit for bit |
//! | `samples.rs` | what base and adapter say to the sample prompt, on the way and at the end |
//! | `summary.rs` | the numbers at the end |

mod resume;
mod samples;
mod step;
mod summary;

pub use resume::{RESUME_FILE, Snapshot};
pub use step::{Stepped, step_pack};
pub use summary::peak_rss_bytes;

use crate::adapter_file::{self, PeftConfig};
use crate::checkpoint;
use crate::data::Dataset;
use crate::error::{Result, TrainError};
use crate::files;
use crate::kept;
use crate::lora::Adapter;
use crate::model::{Base, LoadProgress};
use crate::ops;
use crate::optim::{AdamW, AdamWConfig};
use crate::pack::{self, Outcome, Row};
use crate::preflight;
use crate::saved::Trainable;
use crate::scaler::LossScaler;
use crate::schedule::Schedule;
use crate::tokenizer::Tokenizer;
use candle_core::Device;
use domain::footprint::{Engine, Load};
use domain::metric::MetricPoint;
use domain::trial::{ComputeDtype, Digests, Precision, PrecisionMode, SampleText, TrialConfig};
use resume::OnItsWay;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// Rows of an evaluation's forward pass. Fixed, so that a loss does not depend on a trial's batch size.
const EVAL_ROWS: usize = 8;

/// A frozen base on a device with its tokenizer, shared by the runs of a pack.
pub struct Loaded {
    /// The frozen base.
    pub base: Base,
    /// Its tokenizer; a directory without one can still train on pre-tokenised rows.
    pub tokenizer: Option<Tokenizer>,
    /// Digest of configuration and weights.
    pub digest: String,
    /// The model directory.
    pub dir: PathBuf,
    /// What the base alone makes of prompts and held-out rows: the same for every trial, so asked once.
    alone: Mutex<Alone>,
}

#[derive(Default)]
struct Alone {
    texts: HashMap<Vec<u32>, String>,
    losses: HashMap<String, Outcome>,
}

impl Loaded {
    /// Loads a model directory in Hugging Face's layout onto a device.
    ///
    /// # Errors
    /// A file is missing, cut off or of another model; the tokenizer has more ids than the embedding rows.
    pub fn load(dir: &Path, precision: Precision, device: &Device) -> Result<Self> {
        Self::load_watched(dir, precision, device, &mut |_| ())
    }

    /// [`Loaded::load`]; `watch` is told how far the weights are.
    ///
    /// # Errors
    /// Those of [`Loaded::load`].
    pub fn load_watched(
        dir: &Path,
        precision: Precision,
        device: &Device,
        watch: &mut dyn FnMut(LoadProgress),
    ) -> Result<Self> {
        let base = Base::load_watched(dir, precision, device, watch)?;
        let tokenizer = preflight::tokenizer(dir, &base.config)?;
        let digest = checkpoint::digest(dir)?;
        Ok(Self { base, tokenizer, digest, dir: dir.into(), alone: Mutex::default() })
    }

    /// The model of `dir`, its weights from what [`crate::kept`] wrote of it to `kept`: the same to the last bit.
    ///
    /// # Errors
    /// A file is missing, cut off, or of another model or precision.
    pub fn load_kept(dir: &Path, kept: &Path, precision: Precision, device: &Device) -> Result<Self> {
        let (base, digest) = kept::read(kept, precision, device)?;
        let tokenizer = preflight::tokenizer(dir, &base.config)?;
        Ok(Self { base, tokenizer, digest, dir: dir.into(), alone: Mutex::default() })
    }

    /// A base that no file holds, such as [`Base::random`], without a tokenizer.
    pub fn in_memory(base: Base) -> Self {
        let (digest, dir) = ("in memory".into(), PathBuf::new());
        Self { base, tokenizer: None, digest, dir, alone: Mutex::default() }
    }

    /// The base's loss on `rows`, computed once for each set of rows.
    fn base_loss(&self, rows: &[Row]) -> Result<Outcome> {
        let mut bytes = Vec::new();
        for row in rows {
            bytes.extend((row.input_ids.len() as u64).to_le_bytes());
            bytes.extend(row.input_ids.iter().flat_map(|id| id.to_le_bytes()));
            bytes.extend(row.targets.iter().map(|target| u8::from(*target)));
        }
        let key = files::digest(&bytes);
        if let Some(known) = self.alone().losses.get(&key) {
            return Ok(*known);
        }
        let outcome = evaluate(&self.base, None, rows)?;
        self.alone().losses.insert(key, outcome);
        Ok(outcome)
    }

    fn alone(&self) -> std::sync::MutexGuard<'_, Alone> {
        self.alone.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Negative log-likelihood and targets of all `rows`, a few rows at a time.
fn evaluate(base: &Base, adapter: Option<&Adapter>, rows: &[Row]) -> Result<Outcome> {
    let mut sum = Outcome::default();
    for rows in rows.chunks(EVAL_ROWS) {
        add(&mut sum, pack::evaluate(base, adapter, rows)?);
    }
    Ok(sum)
}

fn add(sum: &mut Outcome, part: Outcome) {
    sum.nll += part.nll;
    sum.targets += part.targets;
    sum.tokens += part.tokens;
    sum.peak_bytes = sum.peak_bytes.max(part.peak_bytes);
    sum.pack_peak_bytes = sum.pack_peak_bytes.max(part.pack_peak_bytes);
}

/// The mean over targets; none without targets.
fn mean(outcome: Outcome) -> Option<f64> {
    (outcome.targets > 0).then(|| outcome.nll / outcome.targets as f64)
}

/// What an optimizer step changes. The adapter's tensors are never written to, so a clone of it costs no memory of its own.
#[derive(Debug)]
struct State {
    step: u64,
    adapter: Adapter,
    optimizer: AdamW,
    /// In float16 alone.
    scaler: Option<LossScaler>,
}

/// What a run falls back to when the weights give no finite loss any more. It goes no further from there, and so its
/// optimizer's moments, two thirds of a state's bytes, are not kept: the checkpoint has those of the last update.
#[derive(Debug, Clone)]
struct Good {
    step: u64,
    adapter: Adapter,
    scaler: Option<LossScaler>,
}

/// Counters that a checkpoint carries on.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
struct Progress {
    /// Loss of the last step that had one.
    loss: Option<f64>,
    eval_loss: Option<f64>,
    base_eval_loss: Option<f64>,
    /// Rows and tokens trained, and the seconds that took, evaluation left out.
    rows: u64,
    tokens: u64,
    training_seconds: f64,
    evaluation_seconds: f64,
    /// Whether any step shared the device.
    packed: bool,
    /// High-water marks of counted tensor bytes: for this trial, and for its whole pack.
    #[serde(default)]
    peak_memory_bytes: u64,
    #[serde(default)]
    pack_peak_memory_bytes: u64,
    /// What it said to the sample prompt on the way.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    samples: Vec<SampleText>,
}

/// A trial being trained: its configuration, data, adapter and optimizer.
pub struct Run {
    config: TrialConfig,
    written: PeftConfig,
    data: Dataset,
    digests: Digests,
    total_steps: u64,
    schedule: Schedule,
    state: State,
    /// The state before the last step: the last whose loss is known to be finite.
    previous: Option<Good>,
    diverged: Option<String>,
    /// The point of the last step, if its evaluation failed, which it lacks.
    owed: Option<MetricPoint>,
    /// What its footprint depends on.
    load: Load,
    /// Layers that are computed again in the backward pass.
    recomputed_layers: usize,
    progress: Progress,
    /// The counters at the last metric point: speeds are measured from there.
    at_last_point: Progress,
    /// The last checkpoint, if it is still being written.
    on_its_way: OnItsWay,
}

impl Run {
    /// Reads the data and makes a fresh adapter, or loads the configuration's `init_adapter`.
    ///
    /// # Errors
    /// A parameter does not fit the model, or a file cannot be used; see [`preflight::preflight`].
    pub fn new(loaded: &Loaded, config: TrialConfig) -> Result<Self> {
        // The values first: rows are cut and batched by them.
        preflight::check(&config, &loaded.base)?;
        let data = preflight::data(&config, loaded.tokenizer.as_ref(), &loaded.base.config)?;
        Self::with_data(loaded, config, data)
    }

    /// A fresh run on rows that are read already.
    ///
    /// # Errors
    /// A parameter does not fit the model.
    pub fn with_data(loaded: &Loaded, config: TrialConfig, data: Dataset) -> Result<Self> {
        let trainable = preflight::check(&config, &loaded.base)?;
        let mut adapter = match &config.init_adapter {
            Some(dir) => initial_adapter(&config, Path::new(dir), &trainable, loaded)?,
            None => {
                // What a step takes at the least is not there yet. Whatever trains, weights are decomposed on the CPU.
                let shape = loaded.base.config.shape();
                let load = trainable.load(&config, Engine::Cpu, &shape, &data);
                let [_, many] = config.gradient_checkpointing.recomputed_layers(shape.num_hidden_layers);
                let (peak, held) = (shape.peak_bytes(&load, many), load.adapter_bytes());
                let room = peak.own().saturating_sub(held);
                Adapter::within(&loaded.base, &trainable, config.lora_dropout, config.seed, room)?
            }
        };
        adapter.dropout = config.lora_dropout;
        let optimizer = AdamW::new(&adapter, optimizer_config(&config))?;
        let scaler = loss_scaler(&config);
        let state = State { step: 0, adapter, optimizer, scaler };
        Ok(Self::start(loaded, config, &trainable, data, state, Progress::default()))
    }

    /// A run at `state`.
    fn start(
        loaded: &Loaded,
        config: TrialConfig,
        trainable: &Trainable,
        data: Dataset,
        state: State,
        progress: Progress,
    ) -> Self {
        let total_steps = config.total_steps(data.len() as u64);
        let schedule = Schedule {
            kind: config.lr_scheduler_type,
            peak: config.learning_rate,
            warmup_steps: config.warmup_steps_in_force(total_steps),
            total_steps,
        };
        let digests = Digests {
            base_model: loaded.digest.clone(),
            dataset: data.digest.clone(),
            tokenizer: loaded.tokenizer.as_ref().map_or("none", Tokenizer::digest).into(),
            spec: spec_digest(&config),
            documents: String::new(),
        };
        let written = PeftConfig {
            target_modules: adapter_file::written_targets(&loaded.base, &config.target_modules),
            ..PeftConfig::of(&config)
        };
        let [recomputed_layers, _] =
            config.gradient_checkpointing.recomputed_layers(loaded.base.layers.len() as u64);
        let engine = if ops::on_gpu(loaded.base.device()) { Engine::Gpu } else { Engine::Cpu };
        let load = trainable.load(&config, engine, &loaded.base.config.shape(), &data);
        Self {
            load,
            config,
            written,
            data,
            digests,
            total_steps,
            schedule,
            state,
            previous: None,
            diverged: None,
            owed: None,
            recomputed_layers: recomputed_layers as usize,
            at_last_point: progress.clone(),
            progress,
            on_its_way: OnItsWay::default(),
        }
    }

    /// The same run under other names for what it has read: checkpoints, the adapter and the digest of its configuration
    /// say these. What lies elsewhere on each machine gets the name that its trial has for it everywhere.
    pub fn named(mut self, config: TrialConfig) -> Self {
        self.written.base_model_name_or_path = config.pretrained_model_id.clone();
        self.digests.spec = spec_digest(&config);
        self.config = config;
        self
    }

    /// Every parameter with the value in force.
    pub fn config(&self) -> &TrialConfig {
        &self.config
    }

    /// The rows it trains on and those held out.
    pub fn data(&self) -> &Dataset {
        &self.data
    }

    /// The adapter as it stands; after a divergence, the last good one.
    pub fn adapter(&self) -> &Adapter {
        &self.state.adapter
    }

    /// Finished optimizer steps; after a divergence, those of the last good state.
    pub fn step(&self) -> u64 {
        self.state.step
    }

    /// Steps of the whole run.
    pub fn total_steps(&self) -> u64 {
        self.total_steps
    }

    /// Whether there is nothing more to train: all steps are made, or it diverged.
    pub fn is_done(&self) -> bool {
        self.diverged.is_some() || self.state.step >= self.total_steps
    }

    /// Why it cannot go on, if its loss became NaN or infinite.
    pub fn diverged(&self) -> Option<&str> {
        self.diverged.as_deref()
    }

    /// What it is trained on.
    pub fn digests(&self) -> &Digests {
        &self.digests
    }

    /// `eval/loss` of the base alone on the held-out rows (the point of step 0); none without such rows.
    ///
    /// # Errors
    /// The device runs out of memory.
    pub fn base_eval(&mut self, loaded: &Loaded) -> Result<Option<f64>> {
        if self.progress.base_eval_loss.is_none() && !self.data.eval.is_empty() {
            self.progress.base_eval_loss = mean(loaded.base_loss(&self.data.eval)?);
        }
        Ok(self.progress.base_eval_loss)
    }

    /// `eval/loss` of the adapter as it stands; none without held-out rows.
    ///
    /// # Errors
    /// The device runs out of memory.
    pub fn evaluate(&mut self, loaded: &Loaded) -> Result<Option<f64>> {
        if !self.data.eval.is_empty() {
            let outcome = evaluate(&loaded.base, Some(&self.state.adapter), &self.data.eval)?;
            self.progress.eval_loss = mean(outcome);
        }
        Ok(self.progress.eval_loss)
    }
}

/// What says whether two configurations are the same, to agents of versions that compare them too.
fn spec_digest(config: &TrialConfig) -> String {
    files::digest(&serde_json::to_vec(config).unwrap_or_default())
}

/// The loss scaler that a run starts with, if its numbers need one.
fn loss_scaler(config: &TrialConfig) -> Option<LossScaler> {
    let precision = config.base_model().precision;
    let half = precision.mode == PrecisionMode::Float16;
    (half || precision.compute_dtype == Some(ComputeDtype::Float16)).then(LossScaler::default)
}

fn optimizer_config(config: &TrialConfig) -> AdamWConfig {
    AdamWConfig {
        beta1: config.adam_beta1,
        beta2: config.adam_beta2,
        epsilon: config.adam_epsilon,
        loraplus_lr_ratio: config.loraplus_lr_ratio.unwrap_or(1.0),
        weight_decay: config.weight_decay,
        max_grad_norm: config.max_grad_norm,
    }
}

/// The adapter that a run starts from; it must be of the shape that the configuration asks for.
fn initial_adapter(
    config: &TrialConfig,
    dir: &Path,
    trainable: &Trainable,
    loaded: &Loaded,
) -> Result<Adapter> {
    let written = PeftConfig::load(dir)?;
    let differs = |key, has: f64, asked: f64| {
        let problem = format!("is {asked}, but the adapter {} has {has}", dir.display());
        TrainError::parameter(key, problem, format!("set {key} to {has}"))
    };
    if written.r != config.lora_rank as usize {
        return Err(differs("lora_rank", written.r as f64, f64::from(config.lora_rank)));
    }
    if written.lora_alpha != config.lora_alpha_in_force() {
        return Err(differs("lora_alpha", written.lora_alpha, config.lora_alpha_in_force()));
    }
    for (key, has, asked) in [
        ("use_rslora", written.use_rslora, config.use_rslora),
        ("use_dora", written.use_dora, config.use_dora),
    ] {
        if has != asked {
            let problem = format!("is {asked}, but for the adapter {} it is {has}", dir.display());
            return Err(TrainError::parameter(key, problem, format!("set {key} to {has}")));
        }
    }
    Ok(adapter_file::load(dir, trainable, config.seed, loaded.base.device())?.1)
}
