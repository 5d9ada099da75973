//! A base and an adapter as one model in Hugging Face's layout: W + `lora_alpha / lora_rank` · B · A in place of
//! each adapted layer's W, and the adapter's own copy in place of a module that was trained whole.
//!
//! The products are computed in float32 and kept in the type of the base's tensor; all other tensors are the
//! base's bytes. What was trained on a base in 4 bits belongs to the numbers that these 4 bits mean, not to those that
//! they were made of: [`MergeInto`] says which of them the adapter is added to. An adapter of a tied head unties it, as
//! does a copy of head or embedding: the other stays as it is, and `config.json` says so.

use crate::adapter_file::{self, resolve};
use crate::checkpoint::{Checkpoint, Quantized};
use crate::error::{Result, TrainError};
use crate::files::{self, Outlives};
use crate::lora::{LoraMatrix, Target};
use crate::model::{Base, ModelConfig, Quantization};
use crate::new_model::{CONFIG, Entry, NewModel, Writer, copy_companions, read_json, write_json};
use crate::quant::Nf4;
use crate::saved::{Kind, SavedSpec};
use candle_core::{DType, Device, Tensor};
use domain::trial::{Precision, PrecisionMode};
use serde_json::json;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// The numbers that an adapter is added to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MergeInto {
    /// Those of the base's files.
    Original,
    /// Those that the decoder's linear layers have in 4 bits: of a base whose files are in 4 bits theirs, of another
    /// those that a trial in 4 bits trains on. All of these layers have them then, adapted or not.
    Dequantized {
        /// Whether the blocks' magnitudes are quantised too.
        double_quant: bool,
    },
}

impl MergeInto {
    /// What a trial of that precision was trained on.
    pub fn of(precision: Precision) -> Self {
        match precision.mode {
            PrecisionMode::FourBit => Self::Dequantized { double_quant: precision.double_quant },
            _ => Self::Original,
        }
    }

    /// What is there to add to if nobody says it: of files in 4 bits what these mean.
    ///
    /// # Errors
    /// The base has no configuration that can be read.
    pub fn of_files(base: &Path) -> Result<Self> {
        let quantization = ModelConfig::load(base)?.quantization;
        Ok(quantization.map_or(Self::Original, |q| Self::Dequantized { double_quant: q.double_quant }))
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Original => "original",
            Self::Dequantized { .. } => "dequantized",
        }
    }
}

/// What to merge, and where to.
#[derive(Debug, Clone)]
pub struct Merge<'a> {
    /// The base model's directory.
    pub base: &'a Path,
    /// The adapter's directory, in PEFT's format.
    pub adapter: &'a Path,
    /// The new model's directory.
    pub to: &'a Path,
    /// What the adapter is added to.
    pub into: MergeInto,
    /// Bytes of tensors in a file at most ([`crate::new_model::SHARD_BYTES`] unless a test wants less). A tensor above that has a
    /// file of its own.
    pub shard_bytes: u64,
    /// Whether a model that is in `to` already is replaced.
    pub overwrite: bool,
}

/// The new model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Merged {
    /// Layers that the adapter changed.
    pub layers: usize,
    /// Its files of weights.
    pub weight_files: usize,
    /// Bytes of its tensors.
    pub bytes: u64,
}

impl Merge<'_> {
    /// Writes the new model to a directory beside `to`, and renames that once it is whole and durable. One tensor at a
    /// time is held. `stop` is asked between two tensors; where it says so, nothing is left behind, and the answer is
    /// `None`.
    ///
    /// # Errors
    /// `to` holds something; a file of base or adapter is missing, broken or not of the other's model; the system
    /// refuses a write.
    pub fn run(&self, stop: &mut dyn FnMut() -> bool) -> Result<Option<Merged>> {
        let new = NewModel { to: self.to, overwrite: self.overwrite };
        new.create(&[self.base, self.adapter], |dir| self.write(dir, stop))
    }

    fn write(&self, dir: &Path, stop: &mut dyn FnMut() -> bool) -> Result<Option<Merged>> {
        let mut outline = Base::outline(self.base, Precision::default())?;
        let quantization = outline.config.quantization;
        if let Some(Quantization { double_quant }) = quantization
            && self.into != (MergeInto::Dequantized { double_quant })
        {
            let problem = format!(
                "is in 4 bits (bnb_4bit_use_double_quant {double_quant}), so that its original numbers are not in it"
            );
            let remedy =
                "merge into the dequantised ones, or name the model that it was made of with --model";
            return Err(TrainError::model(self.base, problem, remedy));
        }
        let tied = std::mem::take(&mut outline.config.tie_word_embeddings);
        let trainable = resolve(&outline, &adapter_file::PeftConfig::load(self.adapter)?)?;
        let (_, adapter) = adapter_file::load(self.adapter, &trainable, 0, &Device::Cpu)?;
        let whole = |spec: &SavedSpec| spec.kind == Kind::Embedding || spec.path == outline.head.path;
        let head = |target: &Target| target.module == outline.head_module();
        let untie = tied && (trainable.targets.iter().any(head) || trainable.saved.iter().any(whole));
        if untie {
            self.check_untied()?;
        }
        let tensors = Checkpoint::open(self.base)?;
        let sources = sources(&tensors, untie);
        let linears = outline.linear_modules().into_iter().chain([outline.head_module()]);
        let linears = linears.map(|m| (format!("{}.weight", m.path), [m.out_features, m.in_features]));
        let embedding = (EMBEDDING.to_string(), [outline.config.vocab_size, outline.config.hidden_size]);
        let matrices: HashMap<String, [usize; 2]> = linears.chain([embedding]).collect();
        let mut entries = Vec::with_capacity(sources.len());
        for (name, source) in &sources {
            entries.push(vec![match quantized(&tensors, source, &matrices)? {
                Some(matrix) => {
                    let (dtype, shape) = (matrix.dtype(), matrices[*source].to_vec());
                    Entry { name: name.clone(), dtype, shape }
                }
                None => Entry::like(&tensors, source, name)?,
            }]);
        }
        let mut writer = Writer::new(dir, entries, self.shard_bytes)?;
        // Files in 4 bits are as they were trained on; what they leave in other numbers stays so.
        let to_quantize = match self.into {
            MergeInto::Dequantized { double_quant } if quantization.is_none() => Some(double_quant),
            _ => None,
        };
        let layers: HashMap<String, &LoraMatrix> =
            adapter.modules.iter().map(|m| (format!("{}.weight", m.path), m)).collect();
        let saved =
            adapter.saved.iter().flat_map(|m| m.parameters().map(move |(name, value)| (m, name, value)));
        let saved: HashMap<String, &Tensor> =
            saved.map(|(m, name, value)| (format!("{}.{name}", m.path), value)).collect();
        for (name, source) in &sources {
            if stop() {
                return Ok(None);
            }
            let (mut tensor, dtype) = match quantized(&tensors, source, &matrices)? {
                Some(matrix) => (matrix.read(&Device::Cpu)?.dequantize()?, matrix.dtype()),
                None => {
                    let tensor = tensors.read(source, &Device::Cpu)?;
                    let dtype = tensor.dtype();
                    match to_quantize {
                        Some(double_quant) if in_four_bits(source, &matrices) => {
                            let tensor = tensor.to_dtype(DType::F32)?;
                            (Nf4::quantize(&tensor, double_quant)?.dequantize()?, dtype)
                        }
                        _ => (tensor, dtype),
                    }
                }
            };
            if let Some(layer) = layers.get(name) {
                tensor = sum(&tensor, layer)?;
            }
            if let Some(value) = saved.get(name) {
                tensor = (*value).clone();
            }
            writer.put(name, &tensor.to_dtype(dtype)?)?;
        }
        let written = writer.finish()?;
        self.write_config(dir, untie, quantization.is_some())?;
        Ok(Some(Merged {
            layers: layers.len() + adapter.saved.len(),
            weight_files: written.files,
            bytes: written.bytes,
        }))
    }

    /// PEFT can tie the embedding to the adapter of a tied head; that is another adapter than one of the head alone.
    fn check_untied(&self) -> Result<()> {
        let path = self.adapter.join(adapter_file::CONFIG_FILE);
        if read_json(&path)?["ensure_weight_tying"] != json!(true) {
            return Ok(());
        }
        let problem =
            "ensure_weight_tying is true for an adapter of the tied lm_head, which is not supported";
        Err(TrainError::model(&path, problem, "merge it with the tool that trained it"))
    }

    /// The base's configuration, but for what is no longer true of the new model.
    fn write_config(&self, dir: &Path, untie: bool, dequantized: bool) -> Result<()> {
        copy_companions(self.base, dir)?;
        let from = self.base.join(CONFIG);
        if untie || dequantized {
            let mut config = read_json(&from)?;
            if untie {
                config["tie_word_embeddings"] = json!(false);
            }
            if let Some(keys) = config.as_object_mut().filter(|_| dequantized) {
                keys.remove("quantization_config");
            }
            return write_json(&dir.join(CONFIG), &config);
        }
        let bytes = std::fs::read(&from).map_err(TrainError::io(&from))?;
        files::write_atomically(&dir.join(CONFIG), &bytes, Outlives::Machine)
    }
}

/// The new model's tensors, and the base's tensors that they are made of. A head that comes untied is made of the
/// embedding, whatever the base's files hold under its name.
fn sources(tensors: &Checkpoint, untie: bool) -> BTreeMap<String, &str> {
    let names = tensors.names().filter(|name| !tensors.is_part(name));
    let mut sources: BTreeMap<_, _> = names.map(|name| (name.to_string(), name)).collect();
    if untie {
        sources.insert(HEAD.into(), EMBEDDING);
    }
    sources
}

/// A matrix, if the files have it in 4 bits.
fn quantized<'a>(
    tensors: &'a Checkpoint,
    source: &'a str,
    matrices: &HashMap<String, [usize; 2]>,
) -> Result<Option<Quantized<'a>>> {
    match matrices.get(source) {
        Some(shape) if tensors.is_quantized(source) => tensors.quantized(source, shape),
        _ => Ok(None),
    }
}

/// Whether a tensor is held in 4 bits where the base is: embedding and head are not.
fn in_four_bits(source: &str, matrices: &HashMap<String, [usize; 2]>) -> bool {
    source != HEAD && source != EMBEDDING && matrices.contains_key(source)
}

/// A layer's weight with its adapter in it, in the weight's own type.
fn sum(weight: &Tensor, layer: &LoraMatrix) -> Result<Tensor> {
    let product = (layer.b.matmul(&layer.a)? * layer.scaling)?;
    let mut sum = (weight.to_dtype(DType::F32)? + product)?;
    if let Some(magnitude) = &layer.magnitude {
        let norm = sum.sqr()?.sum(1)?.sqrt()?;
        sum = sum.broadcast_mul(&magnitude.div(&norm)?.unsqueeze(1)?)?;
    }
    Ok(sum.to_dtype(weight.dtype())?)
}
