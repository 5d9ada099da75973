//! `adapter_config.json`: what PEFT says about an adapter, and what of it this engine computes.

use super::CONFIG_FILE;
use crate::error::{Result, TrainError};
use domain::trial::{InitLoraWeights, TargetModules, TrialConfig};
use hub::Located;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// What `adapter_config.json` says about an adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct PeftConfig {
    /// The base that it was trained on.
    pub base_model_name_or_path: String,
    /// Rank.
    pub r: usize,
    /// The adapter's output is scaled by `lora_alpha / r`, or with `use_rslora` by `lora_alpha / √r`.
    pub lora_alpha: f64,
    /// Dropout in training.
    pub lora_dropout: f64,
    /// The layers that have an adapter.
    pub target_modules: TargetModules,
    /// Those of them that have none after all.
    pub exclude_modules: Option<TargetModules>,
    /// The decoder layers that have adapters; all if `None`.
    pub layers_to_transform: Option<Vec<u32>>,
    /// The modules that are trained whole.
    pub modules_to_save: Option<Vec<String>>,
    /// Other ranks, by the end of a path or a regular expression for it.
    pub rank_pattern: BTreeMap<String, usize>,
    /// Other alphas, likewise.
    pub alpha_pattern: BTreeMap<String, f64>,
    /// Whether it is scaled by `lora_alpha / √r`.
    pub use_rslora: bool,
    /// Whether it has magnitudes (DoRA).
    pub use_dora: bool,
    /// How its matrices began.
    pub init_lora_weights: InitLoraWeights,
}

impl Default for PeftConfig {
    fn default() -> Self {
        Self::of(&TrialConfig::default())
    }
}

impl PeftConfig {
    /// The adapter that a trial asks for.
    pub fn of(config: &TrialConfig) -> Self {
        Self {
            base_model_name_or_path: config.pretrained_model_id.clone(),
            r: config.lora_rank as usize,
            lora_alpha: config.lora_alpha_in_force(),
            lora_dropout: config.lora_dropout,
            target_modules: config.target_modules.clone(),
            exclude_modules: config.exclude_modules.clone(),
            layers_to_transform: config.layers_to_transform.clone(),
            modules_to_save: config.modules_to_save.clone(),
            rank_pattern: config.rank_pattern.iter().map(|(k, r)| (k.clone(), *r as usize)).collect(),
            alpha_pattern: config.alpha_pattern.clone(),
            use_rslora: config.use_rslora,
            use_dora: config.use_dora,
            init_lora_weights: config.init_lora_weights,
        }
    }

    /// What the file says of such an adapter: of one that began as a part of the weights, that it is one on the
    /// whole weights, of twice the rank and the same scaling, as PEFT converts it
    /// (`path_initial_model_for_weight_conversion`).
    pub fn as_written(&self) -> Self {
        if !self.init_lora_weights.is_pissa() {
            return self.clone();
        }
        let twice = if self.use_rslora { std::f64::consts::SQRT_2 } else { 2.0 };
        Self {
            r: 2 * self.r,
            lora_alpha: twice * self.lora_alpha,
            rank_pattern: self.rank_pattern.iter().map(|(k, r)| (k.clone(), 2 * r)).collect(),
            alpha_pattern: self.alpha_pattern.iter().map(|(k, a)| (k.clone(), twice * a)).collect(),
            init_lora_weights: InitLoraWeights::Default,
            ..self.clone()
        }
    }

    /// The file's content, with the keys that PEFT 0.17 and later write.
    pub(super) fn to_json(&self) -> Value {
        // PEFT keeps a hub's revision apart from the name.
        let (base, revision) = match hub::locate(&self.base_model_name_or_path) {
            Located::Repo(id) => (id.name().to_string(), id.named_revision().map(Into::into)),
            Located::Path(_) => (self.base_model_name_or_path.clone(), None::<String>),
        };
        json!({
            "alpha_pattern": self.alpha_pattern.iter().map(|(k, a)| (k.clone(), number(*a))).collect::<BTreeMap<_, _>>(),
            "auto_mapping": null,
            "base_model_name_or_path": base,
            "bias": "none",
            "corda_config": null,
            "eva_config": null,
            "exclude_modules": self.exclude_modules,
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": match self.init_lora_weights {
                InitLoraWeights::Default => json!(true),
                how => json!(how),
            },
            "layer_replication": null,
            "layers_pattern": null,
            "layers_to_transform": self.layers_to_transform,
            "loftq_config": {},
            "lora_alpha": number(self.lora_alpha),
            "lora_bias": false,
            "lora_dropout": self.lora_dropout,
            "megatron_config": null,
            "megatron_core": "megatron.core",
            "modules_to_save": self.modules_to_save,
            "peft_type": "LORA",
            "qalora_group_size": 16,
            "r": self.r,
            "rank_pattern": self.rank_pattern,
            "revision": revision,
            "target_modules": self.target_modules,
            "target_parameters": null,
            "task_type": "CAUSAL_LM",
            "trainable_token_indices": null,
            "use_dora": self.use_dora,
            "use_qalora": false,
            "use_rslora": self.use_rslora,
        })
    }

    /// Reads the file of an adapter directory.
    ///
    /// # Errors
    /// The file is missing or no JSON, is no LoRA, or asks for a variant of LoRA that is not supported.
    pub fn load(dir: &Path) -> Result<Self> {
        let path = dir.join(CONFIG_FILE);
        let text = std::fs::read_to_string(&path).map_err(|e| {
            TrainError::model(&path, format!("cannot be read ({e})"), "name a PEFT adapter directory")
        })?;
        let value: Value = serde_json::from_str(&text)
            .map_err(|e| TrainError::model(&path, format!("is no JSON ({e})"), "restore the file"))?;
        check_supported(&value).map_err(|(key, value)| {
            let remedy = match key {
                "init_lora_weights" => {
                    "its base is not the whole one: save it with PEFT's path_initial_model_for_weight_conversion"
                }
                _ => "it changes what the adapter computes, and this engine does not compute it",
            };
            TrainError::model(&path, format!("{key} is {value}"), remedy)
        })?;
        let positive = |key: &str| {
            value[key].as_f64().filter(|n| *n > 0.0).ok_or_else(|| {
                TrainError::model(&path, format!("lacks a positive {key}"), "restore the file")
            })
        };
        let targets = serde_json::from_value(value["target_modules"].clone()).map_err(|_| {
            TrainError::model(&path, "lacks target_modules", "restore the file from who trained the adapter")
        })?;
        let base = value["base_model_name_or_path"].as_str().unwrap_or_default();
        let revision = value["revision"].as_str().map(|revision| format!("@{revision}")).unwrap_or_default();
        Ok(Self {
            base_model_name_or_path: format!("{base}{revision}"),
            r: positive("r")? as usize,
            lora_alpha: positive("lora_alpha")?,
            lora_dropout: value["lora_dropout"].as_f64().unwrap_or(0.0),
            target_modules: targets,
            exclude_modules: optional(&value, "exclude_modules", &path)?,
            layers_to_transform: match &value["layers_to_transform"] {
                // PEFT takes a single number too.
                Value::Number(layer) => layer.as_u64().map(|layer| vec![layer as u32]),
                _ => optional(&value, "layers_to_transform", &path)?,
            },
            modules_to_save: optional(&value, "modules_to_save", &path)?
                .filter(|names: &Vec<String>| !names.is_empty()),
            rank_pattern: optional(&value, "rank_pattern", &path)?.unwrap_or_default(),
            alpha_pattern: optional(&value, "alpha_pattern", &path)?.unwrap_or_default(),
            use_rslora: optional(&value, "use_rslora", &path)?.unwrap_or_default(),
            use_dora: optional(&value, "use_dora", &path)?.unwrap_or_default(),
            init_lora_weights: match value["init_lora_weights"].as_str() {
                Some("gaussian") => InitLoraWeights::Gaussian,
                _ => InitLoraWeights::Default,
            },
        })
    }
}

/// A whole number as one, as Python writes it.
fn number(x: f64) -> Value {
    if x.fract() == 0.0 && x.abs() < 1e15 { json!(x as i64) } else { json!(x) }
}

fn optional<T: DeserializeOwned>(value: &Value, key: &str, path: &Path) -> Result<Option<T>> {
    serde_json::from_value(value[key].clone())
        .map_err(|e| TrainError::model(path, format!("{key} is {} ({e})", value[key]), "restore the file"))
}

/// Settings that change what an adapter computes and that this engine does not compute.
fn check_supported(config: &Value) -> std::result::Result<(), (&'static str, String)> {
    let plain = |key: &str| match &config[key] {
        Value::Null | Value::Bool(false) => true,
        Value::Object(map) => map.is_empty(),
        Value::Array(list) => list.is_empty(),
        _ => false,
    };
    let off = [
        "use_qalora",
        "use_bdlora",
        "fan_in_fan_out",
        "lora_bias",
        "layers_pattern",
        "layer_replication",
        "target_parameters",
        "trainable_token_indices",
        "alora_invocation_tokens",
        "arrow_config",
        "kasa_config",
        "velora_config",
        "monteclora_config",
    ];
    if config["peft_type"].as_str() != Some("LORA") {
        return Err(("peft_type", config["peft_type"].to_string()));
    }
    if config["bias"].as_str().unwrap_or("none") != "none" {
        return Err(("bias", config["bias"].to_string()));
    }
    // The others change the base's weights as they begin: the adapter belongs to that base.
    let init = &config["init_lora_weights"];
    if init.as_str().is_some_and(|how| !["gaussian", "eva", "orthogonal"].contains(&how)) {
        return Err(("init_lora_weights", init.to_string()));
    }
    // PEFT then has one copy for embedding and head.
    if config["ensure_weight_tying"] == json!(true) && !plain("modules_to_save") {
        return Err(("ensure_weight_tying", "true with modules_to_save".into()));
    }
    match off.into_iter().find(|key| !plain(key)) {
        Some(key) => Err((key, config[key].to_string())),
        None => Ok(()),
    }
}
