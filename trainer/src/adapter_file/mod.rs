//! Adapters on disk in PEFT's format: `adapter_config.json` and `adapter_model.safetensors` (float32), which
//! PEFT loads without missing or unexpected keys; and which layers a configuration means.

mod config;
mod targets;

pub use config::PeftConfig;
pub use targets::{resolve, written_targets};

use crate::error::{Result, TrainError};
use crate::files::{self, Outlives};
use crate::lora::{Adapter, LoraMatrix, Target};
use crate::saved::{SavedModule, SavedSpec, Trainable};
use candle_core::{DType, Device, Tensor};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

/// The configuration's file name.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// The weights' file name.
pub const WEIGHTS_FILE: &str = "adapter_model.safetensors";

/// PEFT's key of a parameter of the adapter of a layer, or of a module that is trained whole. Of an adapter's, magnitudes
/// alone have no `.weight` behind their name.
fn key(path: &str, parameter: &str) -> String {
    let weight = if LoraMatrix::PARAMETERS[..2].contains(&parameter) { ".weight" } else { "" };
    format!("base_model.model.{path}.{parameter}{weight}")
}

/// Writes an adapter directory. Each file is whole or absent; the weights come first, so that a directory
/// with a configuration is complete.
///
/// # Errors
/// The system refuses a write.
pub fn save(dir: &Path, adapter: &Adapter, config: &PeftConfig, outlives: Outlives) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(TrainError::io(dir))?;
    files::write_atomically(&dir.join(WEIGHTS_FILE), &weights(adapter)?, outlives)?;
    let text = serde_json::to_string_pretty(&config.as_written().to_json()).unwrap_or_default();
    files::write_atomically(&dir.join(CONFIG_FILE), text.as_bytes(), outlives)
}

/// Tensors as a safetensors file, marked as torch's layout as PEFT marks its own.
pub(crate) fn serialize(tensors: BTreeMap<String, &Tensor>) -> Result<Vec<u8>> {
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    let on_cpu = |(name, tensor)| Ok((name, on_cpu(tensor)?));
    let tensors = tensors.into_iter().map(on_cpu).collect::<Result<BTreeMap<_, _>>>()?;
    Ok(safetensors::serialize(tensors, Some(metadata)).map_err(candle_core::Error::from)?)
}

/// A tensor where the CPU can read it. On a GPU an adapter's matrices are views of one allocation, of which candle would
/// bring the whole for each of them: so each is copied out of it first.
fn on_cpu(tensor: &Tensor) -> Result<Tensor> {
    Ok(match tensor.device() {
        Device::Cpu => tensor.clone(),
        _ => tensor.force_contiguous()?.to_device(&Device::Cpu)?,
    })
}

/// Reads an adapter directory for what is `trainable` of a base. `seed` is that of its dropout masks. A target that
/// began as a part of its weight is found as [`save`] wrote it: with the matrices that it began with.
///
/// # Errors
/// A file is missing or broken, the adapter is of an unknown kind, or its layers or shapes are not those asked for.
pub fn load(dir: &Path, trainable: &Trainable, seed: u64, device: &Device) -> Result<(PeftConfig, Adapter)> {
    let config = PeftConfig::load(dir)?;
    let path = dir.join(WEIGHTS_FILE);
    let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu).map_err(|e| {
        TrainError::model(&path, format!("cannot be read ({e})"), "copy the adapter directory again")
    })?;
    let mut take = |module: &str, parameter: &str, shape: &[usize]| -> Result<Tensor> {
        let key = key(module, parameter);
        let tensor = tensors.remove(&key).ok_or_else(|| {
            let remedy = "give target_modules and its kin as the adapter's adapter_config.json does";
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
    let [lora_a, lora_b, magnitude] = LoraMatrix::PARAMETERS;
    let mut matrix = |target: &Target| {
        let (rank, module) = (target.rank, &target.module);
        let held = if target.init.is_pissa() { 2 * rank } else { rank };
        let mut a = take(&module.path, lora_a, &[held, module.in_features])?;
        let mut b = take(&module.path, lora_b, &[module.out_features, held])?;
        let mut initial = None;
        if target.init.is_pissa() {
            let part = |t: &Tensor, dim, start| t.narrow(dim, start, rank)?.force_contiguous();
            initial = Some([part(&a, 0, rank)?, part(&b, 1, rank)?.neg()?]);
            (a, b) = (part(&a, 0, 0)?, part(&b, 1, 0)?);
        }
        let magnitude =
            target.use_dora.then(|| take(&module.path, magnitude, &[module.out_features])).transpose()?;
        Ok(LoraMatrix::new(target, a, b, magnitude, initial))
    };
    let modules = trainable.targets.iter().map(&mut matrix).collect::<Result<Vec<_>>>()?;
    let [weight, bias] = SavedModule::PARAMETERS;
    let whole = |spec: &SavedSpec| {
        let value = take(&spec.path, weight, &spec.shape)?;
        let bias = spec.has_bias.then(|| take(&spec.path, bias, &spec.shape[..1])).transpose()?;
        Ok(SavedModule::new(spec, value, bias))
    };
    let saved = trainable.saved.iter().map(whole).collect::<Result<Vec<_>>>()?;
    if modules.iter().any(|m| m.path == "lm_head") {
        // PEFT writes the frozen head and embedding too where the head has an adapter.
        tensors.remove("base_model.model.lm_head.base_layer.weight");
        tensors.remove("base_model.model.model.embed_tokens.weight");
    }
    if let Some(key) = tensors.keys().min() {
        return Err(TrainError::model(
            &path,
            format!("has {} tensors that no adapted layer uses, {key} first", tensors.len()),
            "give target_modules and its kin as the adapter's adapter_config.json does",
        ));
    }
    let dropout = config.lora_dropout;
    Ok((config, Adapter { modules, saved, dropout, seed }))
}

/// Bytes that the adapter's weights take on disk.
///
/// # Errors
/// A tensor cannot be read from its device.
pub fn size(adapter: &Adapter) -> Result<u64> {
    Ok(weights(adapter)?.len() as u64)
}

/// The file of an adapter's weights, as the adapter is on the whole weights of the base.
fn weights(adapter: &Adapter) -> Result<Vec<u8>> {
    let mut named = BTreeMap::new();
    for module in &adapter.modules {
        let [a, b] = module.on_whole_weight()?;
        let values = [a, b].into_iter().chain(module.magnitude.clone());
        let keys = LoraMatrix::PARAMETERS.map(|parameter| key(&module.path, parameter));
        named.extend(keys.into_iter().zip(values));
    }
    for module in &adapter.saved {
        named.extend(module.parameters().map(|(name, value)| (key(&module.path, name), value.clone())));
    }
    serialize(named.iter().map(|(key, value)| (key.clone(), value)).collect())
}
