//! Checkpoints: what a run needs beside its adapter to go on as if it had never stopped.
//!
//! A checkpoint is a [`Snapshot`] that is written. Taking one costs a step nothing on the CPU, where it shares the run's tensors,
//! which are never written to; on a GPU it is a copy to the computer's memory. Another thread can write it while the run
//! goes on, and until then holds what the run would have let go of.

use super::{Loaded, Progress, Run, State, optimizer_config};
use crate::adapter_file::{self, Part, Parts, PeftConfig, WEIGHTS_FILE, on_cpu};
use crate::error::{Result, TrainError};
use crate::files::{self, Outlives};
use crate::lora::Adapter;
use crate::optim::{AdamW, Moments};
use crate::preflight;
use crate::scaler::LossScaler;
use candle_core::{Device, Tensor};
use domain::footprint::Engine;
use domain::metric::MetricPoint;
use domain::trial::{Digests, TrialConfig, serialize_differing};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Weak};

/// The file of a resume directory that is written last: one that has it is whole.
pub const RESUME_FILE: &str = "resume.json";
const MOMENTS_FILE: &str = "resume.safetensors";
const FORMAT: u32 = 1;

/// Parameters that may differ between a checkpoint and the run that goes on from it: places (the digests
/// guard what lies there), how often something is reported, what is computed twice, and how long the run is.
const MAY_CHANGE: [&str; 11] = [
    "pretrained_model_id",
    "dataset_name",
    "interleave_datasets",
    "eval_dataset_name",
    "init_adapter",
    "gradient_checkpointing",
    "logging_steps",
    "eval_steps",
    "save_steps",
    "max_steps",
    "num_train_epochs",
];

/// `resume.json`.
#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    format: u32,
    step: u64,
    /// Updates of the optimizer: steps without any target make none.
    optimizer_step: u64,
    /// Of the adapter's weights that these moments belong to.
    adapter: String,
    digests: Digests,
    #[serde(serialize_with = "serialize_differing")]
    config: TrialConfig,
    progress: Progress,
    #[serde(default)]
    loss_scaler: Option<LossScaler>,
    /// The point of the step, if its evaluation failed, which it lacks.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    owed: Option<MetricPoint>,
}

fn key(path: &str, parameter: &str, moment: &str) -> String {
    format!("{path}.{parameter}.{moment}")
}

/// What a checkpoint holds of a run at a step, whatever the run does from then on.
#[derive(Debug)]
pub struct Snapshot {
    written: PeftConfig,
    /// All but the digest of the adapter's weights, which are not written yet.
    saved: Saved,
    tensors: Arc<Tensors>,
}

/// A state's tensors, where the CPU can read them.
#[derive(Debug)]
struct Tensors {
    adapter: Adapter,
    moments: Vec<Moments>,
}

impl Snapshot {
    /// Writes a checkpoint: the adapter in PEFT's format into one directory, and what resuming needs into another.
    ///
    /// # Errors
    /// The system refuses a write.
    pub fn write(self, adapter_dir: &Path, resume_dir: &Path, outlives: Outlives) -> Result<()> {
        let Self { written, mut saved, tensors } = self;
        adapter_file::save(adapter_dir, &tensors.adapter, &written, outlives)?;
        std::fs::create_dir_all(resume_dir).map_err(TrainError::io(resume_dir))?;
        let mut parts = Parts::new();
        for ((path, name, _), moments) in tensors.adapter.named().zip(&tensors.moments) {
            parts.insert(key(path, name, "exp_avg"), Part::of(&moments.first));
            parts.insert(key(path, name, "exp_avg_sq"), Part::of(&moments.second));
        }
        adapter_file::write(&resume_dir.join(MOMENTS_FILE), &parts, outlives)?;
        saved.adapter = files::digest_files([adapter_dir.join(WEIGHTS_FILE).as_path()])?;
        let text = serde_json::to_string_pretty(&saved).unwrap_or_default();
        files::write_atomically(&resume_dir.join(RESUME_FILE), text.as_bytes(), outlives)
    }
}

/// What the last snapshot of a run still holds.
#[derive(Debug, Default)]
pub(super) struct OnItsWay(Weak<Tensors>);

impl OnItsWay {
    /// Bytes of it that are no part of the states that the run holds itself, which are `adapters` and the optimizer's.
    pub(super) fn bytes(&self, adapters: &[&Adapter], optimizer: &AdamW) -> u64 {
        let Some(tensors) = self.0.upgrade() else { return 0 };
        // A step makes all of them anew, or none.
        let weights = |adapter: &Adapter| adapter.named().next().map(|(_, _, value)| value.id());
        let moments = |moments: &[Moments]| moments.first().map(|moments| moments.first.id());
        let mut bytes = 0;
        if !adapters.iter().any(|adapter| weights(adapter) == weights(&tensors.adapter)) {
            bytes += tensors.adapter.trained_bytes();
        }
        if moments(&tensors.moments) != moments(&optimizer.moments) {
            bytes += optimizer.bytes();
        }
        bytes
    }
}

impl Run {
    /// What a checkpoint of the run as it stands holds; after a divergence, of its last good state. It holds
    /// memory for as long as it lives, on the CPU beside what the run holds from then on.
    ///
    /// # Errors
    /// A tensor cannot be read from its device.
    pub fn snapshot(&mut self) -> Result<Snapshot> {
        let State { step, adapter, optimizer, scaler } = &self.state;
        let saved = Saved {
            format: FORMAT,
            step: *step,
            optimizer_step: optimizer.step,
            adapter: String::new(),
            digests: self.digests.clone(),
            config: self.config.clone(),
            progress: self.progress.clone(),
            loss_scaler: *scaler,
            owed: self.owed.clone(),
        };
        let moments = |moments: &Moments| -> Result<Moments> {
            Ok(Moments { first: on_cpu(&moments.first)?, second: on_cpu(&moments.second)? })
        };
        let moments = optimizer.moments.iter().map(moments).collect::<Result<_>>()?;
        let mut adapter = adapter.clone();
        adapter.zero_grad();
        for (_, value, _) in adapter.trained() {
            *value = on_cpu(value)?;
        }
        for value in adapter.modules.iter_mut().flat_map(|module| module.initial.iter_mut().flatten()) {
            *value = on_cpu(value)?;
        }
        // No copy from a GPU is still under way when steps change what it is of.
        if let Some((_, _, value)) = self.state.adapter.named().next() {
            value.device().synchronize()?;
        }
        let tensors = Arc::new(Tensors { adapter, moments });
        if self.load.engine == Engine::Cpu {
            self.on_its_way = OnItsWay(Arc::downgrade(&tensors));
        }
        Ok(Snapshot { written: self.written.clone(), saved, tensors })
    }

    /// Writes a checkpoint: [`Run::snapshot`], then [`Snapshot::write`].
    ///
    /// # Errors
    /// Those of both.
    pub fn save(&mut self, adapter_dir: &Path, resume_dir: &Path, outlives: Outlives) -> Result<()> {
        self.snapshot()?.write(adapter_dir, resume_dir, outlives)
    }

    /// The steps that a resume directory has behind it, if it is whole.
    pub fn saved_step(resume_dir: &Path) -> Option<u64> {
        let text = std::fs::read_to_string(resume_dir.join(RESUME_FILE)).ok()?;
        serde_json::from_str::<Saved>(&text).ok().map(|saved| saved.step)
    }

    /// Goes on from a checkpoint that [`Snapshot::write`] wrote, bit for bit as the run would have gone on. What may be left of
    /// its last step is made up for by [`Run::make_up`].
    ///
    /// # Errors
    /// The checkpoint is missing or broken, or belongs to another base, data set, tokenizer or configuration.
    pub fn resume(
        loaded: &Loaded,
        config: TrialConfig,
        adapter_dir: &Path,
        resume_dir: &Path,
    ) -> Result<Self> {
        let path = resume_dir.join(RESUME_FILE);
        let broken = |problem: String| {
            TrainError::model(&path, problem, "go on from another checkpoint, or start anew")
        };
        let text = std::fs::read_to_string(&path).map_err(|e| broken(format!("cannot be read ({e})")))?;
        let saved: Saved =
            serde_json::from_str(&text).map_err(|e| broken(format!("is no resume state ({e})")))?;
        if saved.format != FORMAT {
            return Err(broken(format!("has format {}, not {FORMAT}", saved.format)));
        }
        check_config(&saved.config, &config, &path)?;
        let trainable = preflight::check(&config, &loaded.base)?;
        let device = loaded.base.device();
        let (_, mut adapter) = adapter_file::load(adapter_dir, &trainable, config.seed, device)?;
        adapter.dropout = config.lora_dropout;
        let weights = adapter_dir.join(WEIGHTS_FILE);
        if files::digest_files([weights.as_path()])? != saved.adapter {
            return Err(broken(format!("belongs to other weights than {}", weights.display())));
        }
        let moments = load_moments(&adapter, &resume_dir.join(MOMENTS_FILE), device)?;
        let config_of_optimizer = optimizer_config(&config);
        let optimizer = AdamW { config: config_of_optimizer, step: saved.optimizer_step, moments };
        let state = State { step: saved.step, adapter, optimizer, scaler: saved.loss_scaler };
        let data = preflight::data(&config, loaded.tokenizer.as_ref(), &loaded.base.config)?;
        let run = Self::start(loaded, config, &trainable, data, state, saved.progress);
        check_digests(&saved.digests, run.digests(), &path)?;
        Ok(Self { owed: saved.owed, ..run })
    }
}

fn load_moments(adapter: &Adapter, path: &Path, device: &Device) -> Result<Vec<Moments>> {
    let remedy = "go on from another checkpoint, or start anew";
    let mut tensors: HashMap<String, Tensor> = candle_core::safetensors::load(path, device)
        .map_err(|e| TrainError::model(path, format!("cannot be read ({e})"), remedy))?;
    let mut take = |key: String, like: &Tensor| {
        let found = tensors.remove(&key).filter(|t| t.dims() == like.dims());
        found.ok_or_else(|| TrainError::model(path, format!("lacks {key}, or has another shape"), remedy))
    };
    let mut both = |module: &str, parameter: &str, like: &Tensor| -> Result<Moments> {
        Ok(Moments {
            first: take(key(module, parameter, "exp_avg"), like)?,
            second: take(key(module, parameter, "exp_avg_sq"), like)?,
        })
    };
    adapter.named().map(|(path, name, value)| both(path, name, value)).collect()
}

/// Refuses a configuration under which the run would not go on as it began, naming the parameter.
fn check_config(saved: &TrialConfig, now: &TrialConfig, path: &Path) -> Result<()> {
    let fields = |config: &TrialConfig| serde_json::to_value(config).unwrap_or_default();
    let (saved, now) = (fields(saved), fields(now));
    let empty = serde_json::Map::new();
    let mut fields = saved.as_object().unwrap_or(&empty).iter();
    let differs = |key: &str, value: &Value| !MAY_CHANGE.contains(&key) && now[key] != *value;
    match fields.find(|(key, value)| differs(key, value)) {
        None => Ok(()),
        Some((key, value)) => Err(TrainError::model(
            path,
            format!("was made with {key} = {value}, and now it is {}", now[key]),
            format!("set {key} back to {value}, or start anew"),
        )),
    }
}

/// Refuses other bytes than the run began on.
fn check_digests(saved: &Digests, now: &Digests, path: &Path) -> Result<()> {
    let pairs = [
        ("base model", &saved.base_model, &now.base_model),
        ("data set", &saved.dataset, &now.dataset),
        ("tokenizer", &saved.tokenizer, &now.tokenizer),
    ];
    match pairs.into_iter().find(|(_, saved, now)| saved != now) {
        None => Ok(()),
        Some((what, saved, now)) => Err(TrainError::model(
            path,
            format!("was made with a {what} of digest {saved}, and now it is {now}"),
            "bring the same files back, or start anew",
        )),
    }
}
