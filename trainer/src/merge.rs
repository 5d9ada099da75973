//! A base and an adapter as one model in Hugging Face's layout: W + `lora_alpha / lora_rank` · B · A in place of
//! each adapted layer's W, and the adapter's own copy in place of a module that was trained whole.
//!
//! The products are computed in float32 and kept in the type of the base's tensor; all other tensors are the
//! base's bytes. An adapter of a tied head unties it, as does a copy of head or embedding: the other stays as it is, and `config.json` says so.

use crate::adapter_file::{self, resolve};
use crate::checkpoint::Checkpoint;
use crate::error::{Result, TrainError};
use crate::files;
use crate::lora::{LoraMatrix, Target};
use crate::model::Base;
use crate::saved::{Kind, SavedSpec};
use candle_core::{DType, Device, Tensor};
use domain::trial::Precision;
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::path::Path;

/// Bytes of tensors in a file at most, as the hub's tools write them.
pub const SHARD_BYTES: u64 = 5_000_000_000;

const CONFIG: &str = "config.json";
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
    /// Bytes of tensors in a file at most ([`SHARD_BYTES`] unless a test wants less). A tensor above that has a
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

/// A tensor of the new model.
struct Entry {
    name: String,
    /// The base's tensor that it is made of.
    source: String,
    bytes: u64,
}

impl Merge<'_> {
    /// Refuses a target that is not empty, but for a model that may be replaced.
    ///
    /// # Errors
    /// The target holds something, or the base or the adapter lie in it.
    pub fn check_target(&self) -> Result<()> {
        let wrong = |problem: &str, remedy: &str| Err(TrainError::model(self.to, problem, remedy));
        if self.to.file_name().is_none() {
            return wrong("is no name for a new directory", "name one that can be made");
        }
        let Ok(mut entries) = std::fs::read_dir(self.to) else {
            return match self.to.exists() {
                true => wrong("is no directory that can be read", "name another"),
                false => Ok(()),
            };
        };
        if entries.next().is_none() {
            return Ok(());
        }
        if !self.overwrite {
            return wrong(
                "is not empty",
                "name another directory, or replace the model in it with --overwrite",
            );
        }
        if !self.to.join(CONFIG).is_file() {
            return wrong("is not empty and no model, which alone is overwritten", "name another directory");
        }
        let real = |path: &Path| std::fs::canonicalize(path).map_err(TrainError::io(path));
        let to = real(self.to)?;
        if real(self.base)?.starts_with(&to) || real(self.adapter)?.starts_with(&to) {
            return wrong("holds what is to be merged", "name another directory");
        }
        Ok(())
    }

    /// Writes the new model to a directory beside `to`, and renames that once it is whole and durable. At most one
    /// file's tensors are held. `stop` is asked between two tensors; where it says so, nothing is left behind, and
    /// the answer is `None`.
    ///
    /// # Errors
    /// Those of [`Merge::check_target`]; a file of base or adapter is missing, broken or not of the other's model;
    /// the system refuses a write.
    pub fn run(&self, stop: &mut dyn FnMut() -> bool) -> Result<Option<Merged>> {
        self.check_target()?;
        let parent = match self.to.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let beside = |what: &str| {
            let name = self.to.file_name().unwrap_or_default().to_string_lossy();
            parent.join(format!(".{name}.{what}"))
        };
        let (partial, replaced) = (beside("partial"), beside("replaced"));
        // What an earlier call that was killed left there.
        remove(&partial)?;
        std::fs::create_dir_all(&partial).map_err(TrainError::io(&partial))?;
        let written = self.write(&partial, stop);
        let Ok(Some(merged)) = written else {
            remove(&partial)?;
            return written;
        };
        files::sync_directory(&partial)?;
        remove(&replaced)?;
        if self.to.exists() {
            std::fs::rename(self.to, &replaced).map_err(TrainError::io(self.to))?;
        }
        std::fs::rename(&partial, self.to).map_err(TrainError::io(self.to))?;
        files::sync_directory(parent)?;
        remove(&replaced)?;
        Ok(Some(merged))
    }

    fn write(&self, dir: &Path, stop: &mut dyn FnMut() -> bool) -> Result<Option<Merged>> {
        let mut outline = Base::outline(self.base, Precision::default())?;
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
        let shards = shards(entries(&tensors, untie)?, self.shard_bytes);
        let layers: HashMap<String, &LoraMatrix> =
            adapter.modules.iter().map(|m| (format!("{}.weight", m.path), m)).collect();
        let saved =
            adapter.saved.iter().flat_map(|m| m.parameters().map(move |(name, value)| (m, name, value)));
        let saved: HashMap<String, &Tensor> =
            saved.map(|(m, name, value)| (format!("{}.{name}", m.path), value)).collect();
        let (mut places, mut bytes) = (BTreeMap::new(), 0);
        for (index, shard) in shards.iter().enumerate() {
            let file = match shards.len() {
                1 => "model.safetensors".to_string(),
                count => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
            };
            let mut held = BTreeMap::new();
            for Entry { name, source, bytes: size } in shard {
                if stop() {
                    return Ok(None);
                }
                let mut tensor = tensors.read(source, &Device::Cpu)?;
                if let Some(layer) = layers.get(name.as_str()) {
                    tensor = sum(&tensor, layer)?;
                }
                if let Some(value) = saved.get(name.as_str()) {
                    tensor = value.to_dtype(tensor.dtype())?;
                }
                held.insert(name.clone(), tensor);
                places.insert(name.clone(), file.clone());
                bytes += size;
            }
            let path = dir.join(file);
            let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
            safetensors::serialize_to_file(held, Some(metadata), &path).map_err(candle_core::Error::from)?;
            File::open(&path).and_then(|file| file.sync_all()).map_err(TrainError::io(&path))?;
        }
        if shards.len() > 1 {
            let index = json!({ "metadata": { "total_size": bytes }, "weight_map": places });
            write_json(&dir.join("model.safetensors.index.json"), &index)?;
        }
        self.write_companions(dir, untie)?;
        Ok(Some(Merged { layers: layers.len() + adapter.saved.len(), weight_files: shards.len(), bytes }))
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

    fn write_companions(&self, dir: &Path, untie: bool) -> Result<()> {
        for name in hub::COMPANIONS {
            let from = self.base.join(name);
            if from.exists() {
                let bytes = std::fs::read(&from).map_err(TrainError::io(&from))?;
                files::write_atomically(&dir.join(name), &bytes)?;
            }
        }
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

/// The new model's tensors in the order of their names. A head that comes untied is made of the embedding, whatever
/// the base's files hold under its name.
fn entries(tensors: &Checkpoint, untie: bool) -> Result<Vec<Entry>> {
    let mut entries = BTreeMap::new();
    for source in tensors.names() {
        let bytes = tensors.bytes(source)?;
        let mut insert = |name: &str| {
            entries.insert(name.to_string(), Entry { name: name.into(), source: source.into(), bytes })
        };
        if untie && source == EMBEDDING {
            insert(HEAD);
        }
        if !(untie && source == HEAD) {
            insert(source);
        }
    }
    Ok(entries.into_values().collect())
}

/// Tensors in files of `most` bytes each, in order.
fn shards(entries: Vec<Entry>, most: u64) -> Vec<Vec<Entry>> {
    let mut shards: Vec<Vec<Entry>> = Vec::new();
    let mut room = 0;
    for entry in entries {
        match shards.last_mut() {
            Some(shard) if entry.bytes <= room => {
                room -= entry.bytes;
                shard.push(entry);
            }
            _ => {
                room = most.saturating_sub(entry.bytes);
                shards.push(vec![entry]);
            }
        }
    }
    shards
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

fn remove(dir: &Path) -> Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(TrainError::io(dir)(error)),
        _ => Ok(()),
    }
}

fn read_json(path: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(path).map_err(TrainError::io(path))?;
    serde_json::from_str(&text)
        .map_err(|e| TrainError::model(path, format!("is no JSON ({e})"), "restore the file"))
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    let text = serde_json::to_string_pretty(value).unwrap_or_default();
    files::write_atomically(path, (text + "\n").as_bytes())
}
