//! A base that was quantised as it was loaded, kept in files, so that it need not be quantised again.
//!
//! The files are those of a model that [`crate::quantize`] makes, but for two things. What is not quantised has the
//! numbers in which it was held, so that what is read back is what was held, to the last bit. And `base.json` has the
//! digest of the model that it was made of, which is what trials record.

use crate::checkpoint::{self, bitsandbytes};
use crate::error::{Result, TrainError};
use crate::model::{Base, ModelConfig, Quantization};
use crate::new_model::{CONFIG, Entry, SHARD_BYTES, Writer, read_json, write_json};
use crate::quant::{BLOCK, NESTED_BLOCK};
use crate::run::Loaded;
use crate::weight::{Numbers, Weight};
use candle_core::{DType, Device};
use domain::trial::{ComputeDtype, Precision};
use serde_json::{Value, json};
use std::fs::Metadata;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// Version of the files' form: those of another are of another [`Origin`].
const FORMAT: u32 = 2;

/// The file of the model's digest.
const DIGEST: &str = "base.json";

/// Bytes of a tensor's entry in a header and in an index at most, beside its name in both.
const ENTRY_BYTES: u64 = 300;

/// Bytes at most of what is neither a tensor, nor its entry, nor the configuration.
const OTHER_BYTES: u64 = 4096;

/// What a base in 4 bits is made of.
#[derive(Debug, Clone)]
pub struct Origin {
    dir: PathBuf,
    content: Option<String>,
    precision: Precision,
    text: String,
    config: Value,
}

impl Origin {
    /// Of a model directory. `content` names what the directory holds, if there is a name that other bytes do not have;
    /// otherwise each file that counts stands for its bytes by its length and the times at which it was written and its
    /// entry changed, of which no program can set the second. `None` if nothing is quantised in loading it.
    ///
    /// # Errors
    /// A file is missing or cannot be read.
    pub fn of(dir: &Path, content: Option<&str>, precision: Precision) -> Result<Option<Self>> {
        let Numbers::Nf4 { double_quant } = Numbers::of_linears(precision) else { return Ok(None) };
        let nested = if double_quant { NESTED_BLOCK } else { 0 };
        let tables = Numbers::of_tables(precision).dtype().as_str();
        let mut text = format!("quantised base {FORMAT}\nnf4 {BLOCK} {nested} {tables}\n");
        match content {
            Some(content) => text.push_str(content),
            None => {
                text.push_str(&format!("{}\n", dir.display()));
                for file in checkpoint::files(dir)? {
                    text.push_str(&stamp(&file)?);
                }
            }
        }
        // After the files' times: a change in between shows in them later.
        if ModelConfig::load(dir)?.quantization.is_some() {
            return Ok(None);
        }
        let mut config = read_json(&dir.join(CONFIG))?;
        // What the layers are held in is not said by it.
        let quantization = Quantization { double_quant }.to_json(ComputeDtype::Float32);
        if let Some(config) = config.as_object_mut() {
            config.insert("quantization_config".into(), quantization);
        }
        let content = content.map(str::to_string);
        Ok(Some(Self { dir: dir.into(), content, precision, text, config }))
    }

    /// All that the base's numbers depend on: of equal texts, they are equal.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Whether the directory is still what it was.
    pub fn is_unchanged(&self) -> bool {
        let now = Self::of(&self.dir, self.content.as_deref(), self.precision);
        now.is_ok_and(|now| now.is_some_and(|now| now.text == self.text))
    }
}

/// A file's name, its length and its times.
fn stamp(path: &Path) -> Result<String> {
    let about = std::fs::metadata(path).map_err(TrainError::io(path))?;
    let name = path.file_name().unwrap_or_default().display();
    Ok(format!("{name} {} {}\n", about.len(), times(&about)))
}

#[cfg(unix)]
fn times(about: &Metadata) -> String {
    use std::os::unix::fs::MetadataExt;
    format!("{}.{:09} {}.{:09}", about.mtime(), about.mtime_nsec(), about.ctime(), about.ctime_nsec())
}

#[cfg(not(unix))]
fn times(about: &Metadata) -> String {
    format!("{:?}", about.modified().ok())
}

/// A base that is to be written. It shares the tensors of the one in memory, which stay there as long as this lives.
#[derive(Debug)]
pub struct Kept {
    config: Value,
    digest: String,
    tensors: Vec<(String, Weight)>,
}

impl Kept {
    /// Of a base that was loaded from `origin`.
    pub fn of(origin: &Origin, loaded: &Loaded) -> Self {
        let tensors = loaded.base.tensors();
        Self { config: origin.config.clone(), digest: loaded.digest.clone(), tensors }
    }

    /// Bytes of its files at most: some hundreds a tensor more than they have.
    pub fn bytes(&self) -> u64 {
        let entries = self.tensors.iter().flat_map(entries);
        let tensors: u64 = entries.map(|e| e.bytes() + 2 * e.name.len() as u64 + ENTRY_BYTES).sum();
        let config = serde_json::to_string_pretty(&self.config).unwrap_or_default().len() as u64;
        tensors + config + OTHER_BYTES
    }

    /// Writes the files to an empty directory, tensor by tensor; of each, at most its own bytes are held beside it.
    /// False if `stop` was set meanwhile: then they are not whole.
    ///
    /// # Errors
    /// The system refuses a write; the numbers cannot be read from the device.
    pub fn write(&self, dir: &Path, stop: &AtomicBool) -> Result<bool> {
        let mut writer = Writer::new(dir, self.tensors.iter().map(entries).collect(), SHARD_BYTES)?;
        for (name, weight) in &self.tensors {
            if stop.load(Ordering::Relaxed) {
                return Ok(false);
            }
            match weight {
                Weight::Dense(tensor) => writer.put(name, &tensor.to_device(&Device::Cpu)?)?,
                Weight::Nf4(matrix) => {
                    let matrix = matrix.to_device(&Device::Cpu)?;
                    for (name, part) in bitsandbytes::parts(name, &matrix, DType::F32)? {
                        writer.put(&name, &part)?;
                    }
                }
            }
        }
        writer.finish()?;
        write_json(&dir.join(DIGEST), &json!({ "digest": self.digest }))?;
        write_json(&dir.join(CONFIG), &self.config)?;
        Ok(true)
    }
}

/// The tensors that one is written as.
fn entries((name, weight): &(String, Weight)) -> Vec<Entry> {
    match weight {
        Weight::Dense(tensor) => {
            vec![Entry { name: name.clone(), dtype: tensor.dtype(), shape: tensor.dims().to_vec() }]
        }
        Weight::Nf4(matrix) => bitsandbytes::entries(name, matrix.dims(), matrix.double_quant()),
    }
}

/// The base that was written to a directory, and the digest of the model that it was made of.
///
/// # Errors
/// A file is missing, cut off, or of another precision.
pub(crate) fn read(dir: &Path, precision: Precision, device: &Device) -> Result<(Base, String)> {
    let about = read_json(&dir.join(DIGEST))?;
    let Some(digest) = about["digest"].as_str() else {
        return Err(TrainError::model(&dir.join(DIGEST), "has no digest", "remove the directory"));
    };
    let mut base = Base::load(dir, precision, device)?;
    // The model that it was made of was not quantised.
    base.config.quantization = None;
    Ok((base, digest.into()))
}
