//! Everything that can be found wrong with a run before it starts: values, the model's files and shapes, the
//! tokenizer, the data. No weight is read.

use crate::adapter_file::{self, PeftConfig};
use crate::data::Dataset;
use crate::error::{Result, TrainError};
use crate::locate;
use crate::lora::Target;
use crate::model::{Base, ModelConfig};
use crate::tokenizer::Tokenizer;
use domain::footprint::{Engine, Load};
use domain::trial::{PARAMETER_NAMES, TrialConfig};
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
    /// Trainable parameters.
    pub trainable_parameters: u64,
    /// Parameters of base and adapter together.
    pub total_parameters: u64,
    /// Tokens of the largest micro-batch that there can be.
    pub batch_tokens: u64,
    /// Most bytes of tensors that the run will hold, alone on a device with room for it.
    pub peak_memory_bytes: u64,
    /// The same with as little as its `gradient_checkpointing` allows it to keep.
    pub least_memory_bytes: u64,
}

/// Tokens of the largest micro-batch that there can be: that of the longest rows.
pub fn batch_tokens(data: &Dataset, batch_size: u32) -> u64 {
    let mut lengths: Vec<_> = data.train.iter().map(|row| row.input_ids.len() as u64).collect();
    lengths.sort_unstable_by(|a, b| b.cmp(a));
    lengths.iter().take(batch_size as usize).sum()
}

/// Checks all that a run needs, without loading weights, and says what it will hold where `engine` computes.
///
/// # Errors
/// The first thing found wrong, with file or parameter, and what to do.
pub fn preflight(config: &TrialConfig, engine: Engine) -> Result<Preflight> {
    check_values(config)?;
    let dir = locate::model(&config.pretrained_model_id)?;
    let base = Base::outline(&dir, config.base_model().precision)?;
    let targets = check(config, &base)?;
    let tokenizer = tokenizer(&dir, &base.config)?;
    let data = data(config, tokenizer.as_ref(), &base.config)?;
    if let Some(dir) = &config.init_adapter {
        adapter_file::load(Path::new(dir), &targets, config.seed, base.device())?;
    }
    let rows = data.train.len() as u64;
    let trainable_parameters = targets.iter().map(Target::parameters).sum();
    let batch_tokens = self::batch_tokens(&data, config.batch_size);
    let load = Load {
        precision: base.precision,
        engine,
        trainable_parameters,
        tokens: batch_tokens,
        longest: self::batch_tokens(&data, 1),
    };
    let [few, many] = config.gradient_checkpointing.recomputed_layers(base.config.num_hidden_layers as u64);
    let peak = |layers| base.config.shape().peak_bytes(&load, layers).total();
    Ok(Preflight {
        batch_tokens,
        peak_memory_bytes: peak(few),
        least_memory_bytes: peak(many),
        rows,
        eval_rows: data.eval.len() as u64,
        truncated_rows: data.truncated_rows,
        skipped_rows: data.skipped_rows,
        total_steps: config.total_steps(rows),
        target_modules: targets.len() as u64,
        trainable_parameters,
        total_parameters: base.parameters() + trainable_parameters,
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

/// Checks a configuration's values, and that they suit `base`. Returns the layers that get an adapter.
///
/// # Errors
/// A parameter is out of its range or above what the model has.
pub fn check(config: &TrialConfig, base: &Base) -> Result<Vec<Target>> {
    check_values(config)?;
    let asked = config.base_model().precision;
    if asked != base.precision {
        let problem = format!("asks for a base in {asked}, but it is loaded in {}", base.precision);
        return Err(TrainError::parameter("precision_mode", problem, "load the base in these numbers"));
    }
    if config.use_dora && config.lora_dropout > 0.0 {
        let problem =
            format!("is {} with use_dora, which would need a second frozen product", config.lora_dropout);
        return Err(TrainError::parameter("lora_dropout", problem, "set it to 0 for DoRA"));
    }
    let targets = adapter_file::resolve_targets(base, &PeftConfig::of(config))?;
    let width = |t: &Target| t.module.in_features.min(t.module.out_features);
    match targets.iter().filter(|t| t.rank > width(t)).min_by_key(|t| width(t)) {
        Some(narrow) => Err(TrainError::parameter(
            if narrow.rank == config.lora_rank as usize { "lora_rank" } else { "rank_pattern" },
            format!("is {}, above the width {} of {}", narrow.rank, width(narrow), narrow.module.path),
            format!("set it to {} or less, or leave the layer out of target_modules", width(narrow)),
        )),
        None => Ok(targets),
    }
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
