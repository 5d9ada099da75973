//! A base and an adapter as one model in Hugging Face's layout: W + `lora_alpha / lora_rank` · B · A in place of
//! each adapted layer's W.
//!
//! The products are computed in float32 and kept in the type of the base's tensor; all other tensors are the
//! base's bytes. An adapter of a tied head unties it: the embedding stays as it is, and `config.json` says so.

use crate::adapter_file::{self, resolve_targets};
use crate::checkpoint::Checkpoint;
use crate::error::{Result, TrainError};
use crate::files;
use crate::lora::LoraMatrix;
use crate::model::Base;
use crate::new_model::{CONFIG, Entry, NewModel, Writer, copy_companions, read_json, write_json};
use candle_core::{DType, Device, Tensor};
use domain::trial::Precision;
use serde_json::json;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// What to merge, and where to.
#[derive(Debug, Clone)]
pub struct Merge<'a> {
    /// The base model's directory.
    pub base: &'a Path,
    /// The adapter's directory, in PEFT's format.
    pub adapter: &'a Path,
    /// The new model's directory.
    pub to: &'a Path,
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
        if outline.config.quantization.is_some() {
            let remedy = "merge the adapter into the model that it was made of";
            return Err(TrainError::model(self.base, "is quantised in 4 bits", remedy));
        }
        let tied = std::mem::take(&mut outline.config.tie_word_embeddings);
        let targets = resolve_targets(&outline, &adapter_file::PeftConfig::load(self.adapter)?)?;
        let (_, adapter) = adapter_file::load(self.adapter, &targets, 0, &Device::Cpu)?;
        let untie = tied && targets.iter().any(|target| target.module == outline.head_module());
        if untie {
            self.check_untied()?;
        }
        let tensors = Checkpoint::open(self.base)?;
        let sources = sources(&tensors, untie);
        let entry = |(name, source): (&String, &&str)| Ok(vec![Entry::like(&tensors, source, name)?]);
        let entries = sources.iter().map(entry).collect::<Result<_>>()?;
        let mut writer = Writer::new(dir, entries, self.shard_bytes)?;
        let layers: HashMap<String, &LoraMatrix> =
            adapter.modules.iter().map(|m| (format!("{}.weight", m.path), m)).collect();
        for (name, source) in &sources {
            if stop() {
                return Ok(None);
            }
            let mut tensor = tensors.read(source, &Device::Cpu)?;
            if let Some(layer) = layers.get(name) {
                tensor = sum(&tensor, layer)?;
            }
            writer.put(name, &tensor)?;
        }
        let written = writer.finish()?;
        self.write_config(dir, untie)?;
        Ok(Some(Merged { layers: layers.len(), weight_files: written.files, bytes: written.bytes }))
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

    fn write_config(&self, dir: &Path, untie: bool) -> Result<()> {
        copy_companions(self.base, dir)?;
        let from = self.base.join(CONFIG);
        if untie {
            let mut config = read_json(&from)?;
            config["tie_word_embeddings"] = json!(false);
            return write_json(&dir.join(CONFIG), &config);
        }
        let bytes = std::fs::read(&from).map_err(TrainError::io(&from))?;
        files::write_atomically(&dir.join(CONFIG), &bytes)
    }
}

/// The new model's tensors, and the base's tensors that they are made of. A head that comes untied is made of the
/// embedding, whatever the base's files hold under its name.
fn sources(tensors: &Checkpoint, untie: bool) -> BTreeMap<String, &str> {
    let mut sources: BTreeMap<_, _> = tensors.names().map(|name| (name.to_string(), name)).collect();
    if untie {
        sources.insert(HEAD.into(), EMBEDDING);
    }
    sources
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
