//! Adapters on disk in PEFT's format: `adapter_config.json` and `adapter_model.safetensors` (float32), which
//! PEFT loads without missing or unexpected keys; and which layers a `target_modules` means.

use crate::error::{Result, TrainError};
use crate::files;
use crate::lora::{Adapter, LoraMatrix, ModuleSpec};
use crate::model::Base;
use candle_core::{DType, Device, Tensor};
use domain::trial::TargetModules;
use hub::Located;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::Path;

/// The configuration's file name.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// The weights' file name.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// What `adapter_config.json` says about an adapter.
#[derive(Debug, Clone, PartialEq)]
pub struct PeftConfig {
    /// The base that it was trained on.
    pub base_model_name_or_path: String,
    /// Rank.
    pub r: usize,
    /// The adapter's output is scaled by `lora_alpha / r`.
    pub lora_alpha: f64,
    /// Dropout in training.
    pub lora_dropout: f64,
    /// The layers that have an adapter, as [`TargetModules`] says; never `all-linear`, which PEFT expands.
    pub target_modules: TargetModules,
}

impl PeftConfig {
    /// The file's content, with the keys that PEFT 0.17 and later write.
    pub fn to_json(&self) -> Value {
        let whole = self.lora_alpha.fract() == 0.0 && self.lora_alpha.abs() < 1e15;
        // PEFT keeps a hub's revision apart from the name.
        let (base, revision) = match hub::locate(&self.base_model_name_or_path) {
            Located::Repo(id) => (id.name().to_string(), id.named_revision().map(Into::into)),
            Located::Path(_) => (self.base_model_name_or_path.clone(), None::<String>),
        };
        json!({
            "alpha_pattern": {},
            "auto_mapping": null,
            "base_model_name_or_path": base,
            "bias": "none",
            "corda_config": null,
            "eva_config": null,
            "exclude_modules": null,
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "layer_replication": null,
            "layers_pattern": null,
            "layers_to_transform": null,
            "loftq_config": {},
            "lora_alpha": if whole { json!(self.lora_alpha as i64) } else { json!(self.lora_alpha) },
            "lora_bias": false,
            "lora_dropout": self.lora_dropout,
            "megatron_config": null,
            "megatron_core": "megatron.core",
            "modules_to_save": null,
            "peft_type": "LORA",
            "qalora_group_size": 16,
            "r": self.r,
            "rank_pattern": {},
            "revision": revision,
            "target_modules": self.target_modules,
            "target_parameters": null,
            "task_type": "CAUSAL_LM",
            "trainable_token_indices": null,
            "use_dora": false,
            "use_qalora": false,
            "use_rslora": false,
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
            TrainError::model(&path, format!("{key} is {value}"), "only plain LoRA adapters can be used")
        })?;
        let number = |key: &str| {
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
            r: number("r")? as usize,
            lora_alpha: number("lora_alpha")?,
            lora_dropout: value["lora_dropout"].as_f64().unwrap_or(0.0),
            target_modules: targets,
        })
    }
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
        "use_dora",
        "use_rslora",
        "use_qalora",
        "use_bdlora",
        "fan_in_fan_out",
        "lora_bias",
        "modules_to_save",
        "rank_pattern",
        "alpha_pattern",
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
    match off.into_iter().find(|key| !plain(key)) {
        Some(key) => Err((key, config[key].to_string())),
        None => Ok(()),
    }
}

/// The linear layers of `base` that `targets` means, in model order.
///
/// # Errors
/// The pattern is no regular expression; a name or the pattern matches no layer, or the head where it is tied.
pub fn resolve_targets(base: &Base, targets: &TargetModules) -> Result<Vec<ModuleSpec>> {
    let wrong = |problem: String, remedy: String| TrainError::parameter("target_modules", problem, remedy);
    let decoder = base.linear_modules();
    let tied = base.config.tie_word_embeddings;
    let known: BTreeSet<_> = decoder.iter().map(|m| short_name(&m.path)).collect();
    let mut known = known.into_iter().collect::<Vec<_>>().join(", ");
    if !tied {
        known.push_str(", and the head lm_head");
    }
    let all = || decoder.iter().cloned().chain([base.head_module()]);
    let matched: Vec<ModuleSpec> = match targets {
        TargetModules::Pattern(word) if word == TargetModules::ALL_LINEAR => decoder.clone(),
        TargetModules::Pattern(pattern) => {
            let matches = whole_path(pattern)?;
            let matched: Vec<_> = all().filter(|m| matches(&m.path)).collect();
            if matched.is_empty() {
                let problem = format!("no linear layer's whole path is {pattern:?}");
                return Err(wrong(problem, format!("{}; this model has {known}", as_list(pattern))));
            }
            matched
        }
        TargetModules::Names(names) => {
            let named = |m: &ModuleSpec, name: &str| m.path == name || m.path.ends_with(&format!(".{name}"));
            if let Some(name) = names.iter().find(|name| !all().any(|m| named(&m, name))) {
                let remedy = format!("this model has {known}; all-linear means all but the head");
                return Err(wrong(format!("{name:?} matches no linear layer"), remedy));
            }
            all().filter(|m| names.iter().any(|name| named(m, name))).collect()
        }
    };
    let head = base.head_module().path;
    if tied && matched.iter().any(|m| m.path == head) {
        let problem = format!("{head} is tied: this model's head is its embedding, which takes no adapter");
        return Err(wrong(problem, format!("leave {head} out")));
    }
    Ok(matched)
}

/// What to write instead of a text that is no layer's whole path: a list, if it looks like names.
fn as_list(pattern: &str) -> String {
    let names: Vec<_> = pattern.split(',').map(str::trim).collect();
    let is_name = |c: char| c.is_ascii_alphanumeric() || "_.".contains(c);
    if !names.iter().all(|name| !name.is_empty() && name.chars().all(is_name)) {
        return "a text is a regular expression of whole paths, such as .*q_proj".into();
    }
    let pattern = match names.as_slice() {
        [name] => format!(".*{name}"),
        names => format!(".*({})", names.join("|")),
    };
    // Under `parameters` a list is one of choices, of which each may be a list.
    let list = names.join(", ");
    format!("write a list, [{list}] (among choices [[{list}]]), or a pattern of whole paths, {pattern}")
}

/// Whether a regular expression matches a whole path, as PEFT has it (Python's `re.fullmatch`).
fn whole_path(pattern: &str) -> Result<impl Fn(&str) -> bool> {
    // Alone first, so that a place in the message is one in the pattern.
    let compiled = fancy_regex::Regex::new(pattern)
        .and_then(|_| fancy_regex::Regex::new(&format!(r"\A(?:{pattern})\z")));
    let regex = compiled.map_err(|error| {
        // The parser's own message draws the pattern on several lines; the last says what is wrong.
        let text = error.to_string();
        let why = text.lines().last().unwrap_or_default().trim().trim_start_matches("error: ");
        TrainError::parameter(
            "target_modules",
            format!("{pattern:?} is no regular expression: {why}"),
            "give all-linear, a list of names, or a pattern of whole module paths",
        )
    })?;
    // A path is short; only a pattern that backtracks without end gives up on one, and so does not match it.
    Ok(move |path: &str| regex.is_match(path).unwrap_or(false))
}

/// `targets` as PEFT writes it: `all-linear` becomes the sorted list of names.
pub fn written_targets(base: &Base, targets: &TargetModules) -> TargetModules {
    match targets {
        TargetModules::Pattern(word) if word == TargetModules::ALL_LINEAR => {
            let names: BTreeSet<_> =
                base.linear_modules().iter().map(|m| short_name(&m.path).to_string()).collect();
            TargetModules::Names(names.into_iter().collect())
        }
        other => other.clone(),
    }
}

fn short_name(path: &str) -> &str {
    path.rsplit('.').next().unwrap_or(path)
}

fn key(path: &str, part: char) -> String {
    format!("base_model.model.{path}.lora_{part}.weight")
}

/// Writes an adapter directory. Each file is whole or absent; the weights come first, so that a directory
/// with a configuration is complete.
///
/// # Errors
/// The system refuses a write.
pub fn save(dir: &Path, adapter: &Adapter, config: &PeftConfig) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(TrainError::io(dir))?;
    files::write_atomically(&dir.join(WEIGHTS_FILE), &serialize(named(adapter))?)?;
    let text = serde_json::to_string_pretty(&config.to_json()).unwrap_or_default();
    files::write_atomically(&dir.join(CONFIG_FILE), text.as_bytes())
}

/// Tensors as a safetensors file, marked as torch's layout as PEFT marks its own.
pub(crate) fn serialize(tensors: BTreeMap<String, &Tensor>) -> Result<Vec<u8>> {
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    Ok(safetensors::serialize(tensors, Some(metadata)).map_err(candle_core::Error::from)?)
}

/// Reads an adapter directory for the layers `modules` of a base. `seed` is that of its dropout masks.
///
/// # Errors
/// A file is missing or broken, the adapter is no plain LoRA, or its layers or shapes are not those asked for.
pub fn load(dir: &Path, modules: &[ModuleSpec], seed: u64, device: &Device) -> Result<(PeftConfig, Adapter)> {
    let config = PeftConfig::load(dir)?;
    let path = dir.join(WEIGHTS_FILE);
    let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).map_err(|e| {
        TrainError::model(&path, format!("cannot be read ({e})"), "copy the adapter directory again")
    })?;
    let mut take = |module: &ModuleSpec, part: char, shape: [usize; 2]| -> Result<Tensor> {
        let key = key(&module.path, part);
        let tensor = tensors.remove(&key).ok_or_else(|| {
            let remedy = "give target_modules as the adapter's adapter_config.json does";
            TrainError::model(&path, format!("lacks {key}"), remedy)
        })?;
        if tensor.dims() != shape {
            return Err(TrainError::model(
                &path,
                format!("{key} has shape {:?}, not {shape:?}", tensor.dims()),
                "use an adapter that was trained on this base model",
            ));
        }
        Ok(tensor.to_dtype(DType::F32)?.to_device(device)?)
    };
    let matrix = |module: &ModuleSpec| {
        Ok(LoraMatrix {
            path: module.path.clone(),
            a: take(module, 'A', [config.r, module.in_features])?,
            b: take(module, 'B', [module.out_features, config.r])?,
            grad_a: None,
            grad_b: None,
        })
    };
    let modules = modules.iter().map(matrix).collect::<Result<Vec<_>>>()?;
    if modules.iter().any(|m| m.path == "lm_head") {
        // PEFT writes the frozen head and embedding too where the head has an adapter.
        tensors.remove("base_model.model.lm_head.base_layer.weight");
        tensors.remove("base_model.model.model.embed_tokens.weight");
    }
    if let Some(key) = tensors.keys().min() {
        return Err(TrainError::model(
            &path,
            format!("has {} tensors that no adapted layer uses, {key} first", tensors.len()),
            "give target_modules as the adapter's adapter_config.json does",
        ));
    }
    let scaling = config.lora_alpha / config.r as f64;
    let dropout = config.lora_dropout;
    Ok((config, Adapter { modules, scaling, dropout, seed }))
}

/// Bytes that the adapter's weights take on disk.
///
/// # Errors
/// A tensor cannot be read from its device.
pub fn size(adapter: &Adapter) -> Result<u64> {
    Ok(serialize(named(adapter))?.len() as u64)
}

fn named(adapter: &Adapter) -> BTreeMap<String, &Tensor> {
    adapter.modules.iter().flat_map(|m| [(key(&m.path, 'A'), &m.a), (key(&m.path, 'B'), &m.b)]).collect()
}
