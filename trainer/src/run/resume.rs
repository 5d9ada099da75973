//! Checkpoints: what a run needs beside its adapter to go on as if it had never stopped.

use super::{Loaded, Progress, Run, State, optimizer_config};
use crate::adapter_file::{self, WEIGHTS_FILE};
use crate::error::{Result, TrainError};
use crate::files::{self, Outlives};
use crate::lora::Adapter;
use crate::optim::{AdamW, Moments};
use crate::preflight;
use crate::scaler::LossScaler;
use candle_core::{Device, Tensor};
use domain::trial::{Digests, TrialConfig, serialize_differing};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

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
#[derive(Serialize, Deserialize)]
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
}

fn key(path: &str, parameter: &str, moment: &str) -> String {
    format!("{path}.{parameter}.{moment}")
}

impl Run {
    /// Writes a checkpoint: the adapter in PEFT's format into one directory, and what resuming needs into
    /// another. After a divergence it is the last good state.
    ///
    /// # Errors
    /// The system refuses a write.
    pub fn save(&self, adapter_dir: &Path, resume_dir: &Path, outlives: Outlives) -> Result<()> {
        adapter_file::save(adapter_dir, &self.state.adapter, &self.written, outlives)?;
        std::fs::create_dir_all(resume_dir).map_err(TrainError::io(resume_dir))?;
        let State { step, adapter, optimizer, scaler } = &self.state;
        let mut tensors: BTreeMap<String, &Tensor> = BTreeMap::new();
        for ((path, name, _), moments) in adapter.named().zip(&optimizer.moments) {
            tensors.insert(key(path, name, "exp_avg"), &moments.first);
            tensors.insert(key(path, name, "exp_avg_sq"), &moments.second);
        }
        files::write_atomically(
            &resume_dir.join(MOMENTS_FILE),
            &adapter_file::serialize(tensors)?,
            outlives,
        )?;
        let saved = Saved {
            format: FORMAT,
            step: *step,
            optimizer_step: optimizer.step,
            adapter: files::digest_files([adapter_dir.join(WEIGHTS_FILE).as_path()])?,
            digests: self.digests.clone(),
            config: self.config.clone(),
            progress: self.progress.clone(),
            loss_scaler: *scaler,
        };
        let text = serde_json::to_string_pretty(&saved).unwrap_or_default();
        files::write_atomically(&resume_dir.join(RESUME_FILE), text.as_bytes(), outlives)
    }

    /// The steps that a resume directory has behind it, if it is whole.
    pub fn saved_step(resume_dir: &Path) -> Option<u64> {
        let text = std::fs::read_to_string(resume_dir.join(RESUME_FILE)).ok()?;
        serde_json::from_str::<Saved>(&text).ok().map(|saved| saved.step)
    }

    /// Goes on from a checkpoint that [`Run::save`] wrote, bit for bit as the run would have gone on.
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
        Ok(run)
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
