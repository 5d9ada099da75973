//! A model in memory, alone or with an adapter: what [`crate::eval`] and [`crate::generate`] work with.

use crate::Failure;
use crate::train::progress::Loading;
use domain::trial::{PrecisionMode, TrialConfig};
use std::path::Path;
use trainer::adapter_file::{self, PeftConfig, resolve};
use trainer::lora::Adapter;
use trainer::model::{Base, ModelConfig};
use trainer::tokenizer::Tokenizer;
use trainer::{Device, TrainError, preflight};

/// A base with its tokenizer and, if there is one, an adapter.
pub(crate) struct Loaded {
    pub(crate) base: Base,
    pub(crate) adapter: Option<Adapter>,
    pub(crate) tokenizer: Tokenizer,
}

impl Loaded {
    /// Loads the model of `dir`, held in `precision_mode`, and the adapter in another directory.
    ///
    /// # Errors
    /// A file of either is missing, broken or of another model; the device's memory runs out.
    pub(crate) fn new(
        dir: &Path,
        precision_mode: PrecisionMode,
        adapter: Option<&Path>,
        device: &Device,
    ) -> Result<Self, Failure> {
        // A model that is quantised already is quantised with or without its magnitudes.
        let quantization = ModelConfig::load(dir).map_err(of_trainer)?.quantization;
        let double_quant = quantization.is_none_or(|quantization| quantization.double_quant);
        let config = TrialConfig { precision_mode, double_quant, ..TrialConfig::default() };
        let mut loading = Loading::new();
        let base = Base::load_watched(dir, config.base_model().precision, device, &mut |so_far| {
            loading.watch(so_far);
        });
        loading.finish();
        let base = base.map_err(of_trainer)?;
        let tokenizer = tokenizer(dir, &base.config)?;
        let adapter = adapter.map(|dir| {
            let trainable = resolve(&base, &PeftConfig::load(dir)?)?;
            Ok(adapter_file::load(dir, &trainable, 0, device)?.1)
        });
        let adapter = adapter.transpose().map_err(of_trainer)?;
        Ok(Self { base, adapter, tokenizer })
    }
}

/// The tokenizer of the model of `dir`.
///
/// # Errors
/// There is none, or one of another model.
pub(crate) fn tokenizer(dir: &Path, config: &ModelConfig) -> Result<Tokenizer, Failure> {
    preflight::tokenizer(dir, config).map_err(of_trainer)?.ok_or_else(|| {
        Failure::invalid(format!(
            "{}: holds neither tokenizer.json nor tokenizer.model; copy one of them there",
            dir.display()
        ))
    })
}

/// The numbers that a base is held in, by their name.
pub(crate) fn precision(text: &str) -> Result<PrecisionMode, String> {
    serde_json::from_value(text.into()).map_err(|_| "give float32, bfloat16, float16 or 4bit".into())
}

/// Something that was given cannot be used; only a failed tensor operation is no fault of the input.
pub(crate) fn of_trainer(error: TrainError) -> Failure {
    match error {
        TrainError::Tensor(_) => Failure::failed(error),
        error => Failure::invalid(error),
    }
}
