//! Everything that can be found wrong with a run before it starts: values, the model's files and shapes, the
//! tokenizer, the data. No weight is read.

use crate::adapter_file::{self, PeftConfig};
use crate::data::Dataset;
use crate::error::{Result, TrainError};
use crate::locate;
use crate::lora::Target;
use crate::model::{Base, ModelConfig};
use crate::saved::Trainable;
use crate::tokenizer::Tokenizer;
use domain::footprint::{Engine, Load};
use domain::trial::{PARAMETER_NAMES, PrecisionMode, TrialConfig};
use std::path::Path;

/// What a run will be.
#[derive(Debug, Clone, PartialEq)]
pub struct Preflight {
    /// The base's shape.
    pub shape: ModelConfig,
    /// Rows to train on.
    pub rows: u64,
    /// Rows held out.
    pub eval_rows: u64,
    /// Rows cut to `max_sequence_length`.
    pub truncated_rows: u64,
    /// Rows that could not be read, with `skip_bad_rows`.
    pub skipped_rows: u64,
    /// Optimizer steps.
    pub total_steps: u64,
    /// Linear layers that get an adapter.
    pub target_modules: u64,
    /// Modules that are trained whole.
    pub saved_modules: u64,
    /// Trainable parameters.
    pub trainable_parameters: u64,
    /// Parameters of base and adapter together.
    pub total_parameters: u64,
    /// What its footprint depends on.
    pub load: Load,
    /// Most bytes of tensors that the run will hold, alone on a device with room for it.
    pub peak_memory_bytes: u64,
    /// The same with as little as its `gradient_checkpointing` allows it to keep.
    pub least_memory_bytes: u64,
}

/// Checks all that a run needs, without loading weights, and says what it will hold where `engine` computes.
///
/// # Errors
/// The first thing found wrong, with file or parameter, and what to do.
pub fn preflight(config: &TrialConfig, engine: Engine) -> Result<Preflight> {
    check_values(config)?;
    let dir = locate::model(&config.pretrained_model_id)?;
    let base = Base::outline(&dir, config.base_model().precision)?;
    let trainable = check(config, &base)?;
    let tokenizer = tokenizer(&dir, &base.config)?;
    let data = data(config, tokenizer.as_ref(), &base.config)?;
    if let Some(dir) = &config.init_adapter {
        adapter_file::load(Path::new(dir), &trainable, config.seed, base.device())?;
    }
    let rows = data.len() as u64;
    let shape = base.config.shape();
    let load = trainable.load(config, engine, &shape, &data);
    let [few, many] = config.gradient_checkpointing.recomputed_layers(shape.num_hidden_layers);
    let peak = |layers| shape.peak_bytes(&load, layers).total();
    Ok(Preflight {
        load,
        peak_memory_bytes: peak(few),
        least_memory_bytes: peak(many),
        rows,
        eval_rows: data.eval.len() as u64,
        truncated_rows: data.truncated_rows,
        skipped_rows: data.skipped_rows,
        total_steps: config.total_steps(rows),
        target_modules: trainable.targets.len() as u64,
        saved_modules: trainable.saved.len() as u64,
        trainable_parameters: load.trainable_parameters,
        total_parameters: base.parameters() + load.trainable_parameters,
        shape: base.config,
    })
}

/// The model directory's tokenizer, if it has one, with no more ids than the embedding has rows.
///
/// # Errors
/// The tokenizer's file is broken or has too many ids.
pub fn tokenizer(dir: &Path, shape: &ModelConfig) -> Result<Option<Tokenizer>> {
    if !["tokenizer.json", "tokenizer.model"].iter().any(|name| dir.join(name).exists()) {
        return Ok(None);
    }
    let tokenizer = Tokenizer::load(dir)?;
    let (ids, rows) = (tokenizer.vocab_size(), shape.vocab_size);
    if ids > rows {
        return Err(TrainError::model(
            dir,
            format!("its tokenizer has {ids} token ids, but the embedding only {rows} rows"),
            "use the tokenizer that the model was trained with",
        ));
    }
    Ok(Some(tokenizer))
}

/// The rows that a configuration names.
///
/// # Errors
/// Those of [`Dataset::load`].
pub fn data(config: &TrialConfig, tokenizer: Option<&Tokenizer>, shape: &ModelConfig) -> Result<Dataset> {
    Dataset::load(config, tokenizer, shape.vocab_size, shape.max_position_embeddings)
}

/// Checks a configuration's values, and that they suit `base`. Returns what is trained.
///
/// # Errors
/// A parameter is out of its range or above what the model has.
pub fn check(config: &TrialConfig, base: &Base) -> Result<Trainable> {
    check_values(config)?;
    let asked = config.base_model().precision;
    if asked != base.precision {
        let problem = format!("asks for a base in {asked}, but it is loaded in {}", base.precision);
        return Err(TrainError::parameter("precision_mode", problem, "load the base in these numbers"));
    }
    check_pissa(config)?;
    let trainable = adapter_file::resolve(base, &PeftConfig::of(config))?;
    let width = |t: &Target| t.module.in_features.min(t.module.out_features);
    match trainable.targets.iter().filter(|t| t.rank > width(t)).min_by_key(|t| width(t)) {
        Some(narrow) => Err(TrainError::parameter(
            if narrow.rank == config.lora_rank as usize { "lora_rank" } else { "rank_pattern" },
            format!("is {}, above the width {} of {}", narrow.rank, width(narrow), narrow.module.path),
            format!("set it to {} or less, or leave the layer out of target_modules", width(narrow)),
        )),
        None => Ok(trainable),
    }
}

/// PiSSA needs the weights themselves, and begins with them.
fn check_pissa(config: &TrialConfig) -> Result<()> {
    let init = config.init_lora_weights;
    let (problem, remedy) = match &config.init_adapter {
        _ if !init.is_pissa() => return Ok(()),
        Some(_) => (
            "with init_adapter, whose matrices it would replace",
            "leave one of them out: an adapter that began so goes on without",
        ),
        None if config.precision_mode == PrecisionMode::FourBit => (
            "with precision_mode 4bit, whose weights have no singular values of their own",
            "set precision_mode to float32, bfloat16 or float16, or init_lora_weights to default",
        ),
        None => return Ok(()),
    };
    Err(TrainError::parameter("init_lora_weights", format!("is {init} {problem}"), remedy))
}

/// Checks what needs no model: each value, by the rules of sweep files.
///
/// # Errors
/// The first parameter that breaks its rule.
pub fn check_values(config: &TrialConfig) -> Result<()> {
    let Err(problems) = domain::sweep::check_config(config) else { return Ok(()) };
    // A base or rows in memory have no name. Whoever reads them by name says what is missing.
    let named = |key: &str| matches!(key, "pretrained_model_id" | "dataset_name");
    let wrong = problems.into_iter().find_map(|problem| {
        let key = PARAMETER_NAMES.iter().find(|key| **key == problem.path && !named(key))?;
        Some(TrainError::parameter(key, problem.problem, problem.remedy))
    });
    wrong.map_or(Ok(()), Err)
}
