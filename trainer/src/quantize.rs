//! A model with its linear layers in NF4, in the files that transformers and bitsandbytes read.
//!
//! The layers are those of the decoder; embedding, head, norms and biases stay as they are, which is what transformers
//! does where nothing else is asked for.

use crate::checkpoint::{Checkpoint, bitsandbytes};
use crate::error::{Result, TrainError};
use crate::model::{Base, Quantization};
use crate::new_model::{CONFIG, Entry, NewModel, Writer, copy_companions, read_json, write_json};
use crate::quant::Nf4;
use candle_core::{DType, Device};
use domain::trial::{ComputeDtype, Precision};
use std::collections::BTreeMap;
use std::path::Path;

/// What to quantise, and where to.
#[derive(Debug, Clone)]
pub struct Quantize<'a> {
    /// The model's directory.
    pub model: &'a Path,
    /// The new model's directory.
    pub to: &'a Path,
    /// Whether the blocks' magnitudes are quantised too.
    pub double_quant: bool,
    /// The numbers in which transformers is to compute; those of the model's first linear layer if `None`.
    pub compute_dtype: Option<ComputeDtype>,
    /// Bytes of tensors in a file at most ([`crate::new_model::SHARD_BYTES`] unless a test wants less).
    pub shard_bytes: u64,
    /// Whether a model that is in `to` already is replaced.
    pub overwrite: bool,
}

/// The new model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QuantizedModel {
    /// Layers that were quantised.
    pub layers: usize,
    /// Its files of weights.
    pub weight_files: usize,
    /// Bytes of its tensors.
    pub bytes: u64,
    /// Bytes of the tensors that it was made of.
    pub source_bytes: u64,
    /// The numbers in which transformers is to compute.
    pub compute_dtype: ComputeDtype,
}

impl Quantize<'_> {
    /// Writes the new model to a directory beside `to`, and renames that once it is whole and durable. One tensor at a
    /// time is held. Before each, `watch` is told how many bytes of the model are read and of how many, and answers
    /// whether to stop; then nothing is left behind, and the answer is `None`.
    ///
    /// # Errors
    /// `to` holds something; a file of the model is missing or broken, or it is quantised already; the system refuses
    /// a write.
    pub fn run(&self, watch: &mut dyn FnMut(u64, u64) -> bool) -> Result<Option<QuantizedModel>> {
        let new = NewModel { to: self.to, overwrite: self.overwrite };
        new.create(&[self.model], |dir| self.write(dir, watch))
    }

    fn write(&self, dir: &Path, watch: &mut dyn FnMut(u64, u64) -> bool) -> Result<Option<QuantizedModel>> {
        let outline = Base::outline(self.model, Precision::default())?;
        if outline.config.quantization.is_some() {
            let remedy = "it needs no quantising; to have other numbers, use the model that it was made of";
            return Err(TrainError::model(self.model, "is quantised in 4 bits already", remedy));
        }
        let tensors = Checkpoint::open(self.model)?;
        let layers: BTreeMap<String, [usize; 2]> = outline
            .linear_modules()
            .into_iter()
            .map(|m| (format!("{}.weight", m.path), [m.out_features, m.in_features]))
            .collect();
        let mut groups = Vec::new();
        for name in tensors.names() {
            groups.push(match layers.get(name) {
                Some(shape) => bitsandbytes::entries(name, *shape, self.double_quant),
                None => vec![Entry::like(&tensors, name, name)?],
            });
        }
        let mut writer = Writer::new(dir, groups, self.shard_bytes)?;
        let (mut read, mut source_bytes) = (0, 0);
        for name in tensors.names() {
            source_bytes += tensors.bytes(name)?;
        }
        for name in tensors.names() {
            if watch(read, source_bytes) {
                return Ok(None);
            }
            let tensor = tensors.read(name, &Device::Cpu)?;
            read += tensors.bytes(name)?;
            if !layers.contains_key(name) {
                writer.put(name, &tensor)?;
                continue;
            }
            let matrix = Nf4::quantize(&tensor.to_dtype(DType::F32)?, self.double_quant)?;
            for (name, part) in bitsandbytes::parts(name, &matrix, tensor.dtype())? {
                writer.put(&name, &part)?;
            }
        }
        watch(read, source_bytes);
        let written = writer.finish()?;
        copy_companions(self.model, dir)?;
        let compute_dtype = match (self.compute_dtype, layers.keys().next()) {
            (Some(given), _) => given,
            (None, Some(name)) => match tensors.dtype(name)? {
                DType::BF16 => ComputeDtype::Bfloat16,
                DType::F16 => ComputeDtype::Float16,
                _ => ComputeDtype::Float32,
            },
            (None, None) => ComputeDtype::Float32,
        };
        let mut config = read_json(&self.model.join(CONFIG))?;
        config["quantization_config"] =
            Quantization { double_quant: self.double_quant }.to_json(compute_dtype);
        write_json(&dir.join(CONFIG), &config)?;
        Ok(Some(QuantizedModel {
            layers: layers.len(),
            weight_files: written.files,
            bytes: written.bytes,
            source_bytes,
            compute_dtype,
        }))
    }
}
