//! Adapters on disk in PEFT's format: `adapter_config.json` and `adapter_model.safetensors` (float32), which
//! PEFT loads without missing or unexpected keys; and which layers a configuration means.

mod config;
mod targets;

pub use config::PeftConfig;
pub use targets::{resolve, written_targets};

use crate::checkpoint::safetensors;
use crate::error::{Result, TrainError};
use crate::files::{self, Outlives};
use crate::lora::{Adapter, LoraMatrix, Target};
use crate::new_model::Entry;
use crate::ops;
use crate::saved::{SavedModule, SavedSpec, Trainable};
use candle_core::{DType, Device, Tensor};
use std::collections::BTreeMap;
use std::io::{self, Write};
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
    write(&dir.join(WEIGHTS_FILE), &weights(adapter), outlives)?;
    let text = serde_json::to_string_pretty(&config.as_written().to_json()).unwrap_or_default();
    files::write_atomically(&dir.join(CONFIG_FILE), text.as_bytes(), outlives)
}

/// What a safetensors file in float32 is written of, tensor by tensor, by their names.
pub(crate) type Parts<'a> = BTreeMap<String, Part<'a>>;

/// A tensor of a file.
pub(crate) struct Part<'a> {
    shape: Vec<usize>,
    /// Makes it, once it is its turn: so no more than one is there beside what they are made of.
    make: Box<dyn Fn() -> Result<Tensor> + 'a>,
}

impl<'a> Part<'a> {
    /// One that is there.
    pub(crate) fn of(tensor: &'a Tensor) -> Self {
        Self { shape: tensor.dims().to_vec(), make: Box::new(|| Ok(tensor.clone())) }
    }
}

/// The first bytes of a file, and the bytes of its tensors behind them.
fn header(parts: &Parts) -> Result<(Vec<u8>, u64)> {
    let entry = |(name, part): (&String, &Part)| Entry {
        name: name.clone(),
        dtype: DType::F32,
        shape: part.shape.clone(),
    };
    let entries: Vec<_> = parts.iter().map(entry).collect();
    let (header, _) = safetensors::header(&mut entries.iter().collect::<Vec<_>>())?;
    Ok((header, entries.iter().map(Entry::bytes).sum()))
}

/// Writes tensors as a safetensors file. It is whole or absent.
///
/// # Errors
/// The system refuses a write; a tensor cannot be read from its device.
pub(crate) fn write(path: &Path, parts: &Parts, outlives: Outlives) -> Result<()> {
    let (header, _) = header(parts)?;
    files::write_with(path, outlives, |out| {
        out.write_all(&header)?;
        // All of one type, they stand in the file in the order of their names.
        for part in parts.values() {
            let tensor = (part.make)().and_then(|tensor| on_cpu(&tensor)).map_err(io::Error::other)?;
            safetensors::write_elements(&tensor, out)?;
        }
        Ok(())
    })
}

/// A tensor where the CPU can read it, and where nothing changes it: a GPU changes moments where they lie. On a GPU an
/// adapter's matrices are views of one allocation, of which candle would bring the whole for each of them: so each is
/// copied out of it first.
pub(crate) fn on_cpu(tensor: &Tensor) -> Result<Tensor> {
    Ok(match ops::on_gpu(tensor.device()) {
        false => tensor.clone(),
        true => tensor.force_contiguous()?.to_device(&Device::Cpu)?,
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
/// Two of its tensors have one name.
pub fn size(adapter: &Adapter) -> Result<u64> {
    let (header, tensors) = header(&weights(adapter))?;
    Ok(header.len() as u64 + tensors)
}

/// The file of an adapter's weights, as the adapter is on the whole weights of the base.
fn weights(adapter: &Adapter) -> Parts<'_> {
    let mut parts = Parts::new();
    for module in &adapter.modules {
        let ([mut a, mut b], times) =
            ([&module.a, &module.b].map(|t| t.dims().to_vec()), 1 + usize::from(module.initial.is_some()));
        (a[0], b[1]) = (times * a[0], times * b[1]);
        let a = Part { shape: a, make: Box::new(|| module.a_on_whole_weight()) };
        let b = Part { shape: b, make: Box::new(|| module.b_on_whole_weight()) };
        let keys = LoraMatrix::PARAMETERS.map(|parameter| key(&module.path, parameter));
        parts.extend(keys.into_iter().zip([a, b].into_iter().chain(module.magnitude.as_ref().map(Part::of))));
    }
    for module in &adapter.saved {
        parts.extend(module.parameters().map(|(name, value)| (key(&module.path, name), Part::of(value))));
    }
    parts
}
