//! A model's directory, written whole or not at all, tensor by tensor.
//!
//! What is written lies in `.NAME.partial` beside the directory until it is whole and durable; a model that it
//! replaces lies in `.NAME.replaced` meanwhile. Whatever an earlier call that was killed left there is removed, but for
//! a replaced model whose successor never came, which is put back.

use crate::checkpoint::Checkpoint;
use crate::error::{Result, TrainError};
use crate::files;
use candle_core::{DType, Tensor};
use safetensors::View;
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Bytes of tensors in a file at most, as the hub's tools write them.
pub const SHARD_BYTES: u64 = 5_000_000_000;

pub(crate) const CONFIG: &str = "config.json";
const INDEX: &str = "model.safetensors.index.json";

/// Where a model is written to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NewModel<'a> {
    /// Its directory.
    pub(crate) to: &'a Path,
    /// Whether a model that is there already is replaced.
    pub(crate) overwrite: bool,
}

impl NewModel<'_> {
    /// Refuses a target that is not empty, but for a model that may be replaced; `sources` are what it is made of.
    ///
    /// # Errors
    /// The target holds something, or a source lies in it.
    pub(crate) fn check(&self, sources: &[&Path]) -> Result<()> {
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
        for source in sources {
            if real(source)?.starts_with(&to) {
                return wrong("holds what the new model is made of", "name another directory");
            }
        }
        Ok(())
    }

    /// Has `write` fill a directory, and gives that its name once it is whole and durable. Where `write` answers
    /// `None` or an error, nothing is left behind.
    ///
    /// # Errors
    /// Those of [`NewModel::check`] and of `write`; the system refuses a write.
    pub(crate) fn create<T>(
        &self,
        sources: &[&Path],
        write: impl FnOnce(&Path) -> Result<Option<T>>,
    ) -> Result<Option<T>> {
        let parent = match self.to.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let beside = |what: &str| {
            let name = self.to.file_name().unwrap_or_default().to_string_lossy();
            parent.join(format!(".{name}.{what}"))
        };
        let (partial, replaced) = (beside("partial"), beside("replaced"));
        if replaced.exists() && !self.to.exists() {
            std::fs::rename(&replaced, self.to).map_err(TrainError::io(self.to))?;
        }
        self.check(sources)?;
        remove(&partial)?;
        std::fs::create_dir_all(&partial).map_err(TrainError::io(&partial))?;
        let written = write(&partial);
        let Ok(Some(written)) = written else {
            remove(&partial)?;
            return written;
        };
        files::sync_directory(&partial)?;
        domain::crash::point("model/whole");
        remove(&replaced)?;
        if self.to.exists() {
            std::fs::rename(self.to, &replaced).map_err(TrainError::io(self.to))?;
            domain::crash::point("model/replaced");
        }
        std::fs::rename(&partial, self.to).map_err(TrainError::io(self.to))?;
        domain::crash::point("model/renamed");
        files::sync_directory(parent)?;
        remove(&replaced)?;
        Ok(Some(written))
    }
}

/// Copies what a model has beside its configuration and weights.
///
/// # Errors
/// A file cannot be read or written.
pub(crate) fn copy_companions(from: &Path, to: &Path) -> Result<()> {
    for name in hub::COMPANIONS {
        let from = from.join(name);
        if from.exists() {
            let bytes = std::fs::read(&from).map_err(TrainError::io(&from))?;
            files::write_atomically(&to.join(name), &bytes)?;
        }
    }
    Ok(())
}

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<usize>,
}

impl Entry {
    /// One that is like a checkpoint's.
    ///
    /// # Errors
    /// There is no such tensor, or it has a type that cannot be read.
    pub(crate) fn like(checkpoint: &Checkpoint, source: &str, name: &str) -> Result<Self> {
        let (dtype, shape) = (checkpoint.dtype(source)?, checkpoint.shape(source)?.to_vec());
        Ok(Self { name: name.into(), dtype, shape })
    }

    fn bytes(&self) -> u64 {
        (self.shape.iter().product::<usize>() * self.dtype.size_in_bytes()) as u64
    }
}

/// Safetensors files whose tensors are all known beforehand and come one at a time, in any order.
#[derive(Debug)]
pub(crate) struct Writer {
    dir: PathBuf,
    files: Vec<String>,
    tensors: BTreeMap<String, Place>,
    left: usize,
    bytes: u64,
}

#[derive(Debug)]
struct Place {
    file: usize,
    /// The byte of its first element.
    start: u64,
    dtype: DType,
    shape: Vec<usize>,
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Written {
    pub(crate) files: usize,
    pub(crate) bytes: u64,
}

impl Writer {
    /// Lays out files of at most `shard_bytes` of tensors each, and writes their headers. What stands in one group
    /// stands in one file; a group above that size has a file of its own.
    ///
    /// # Errors
    /// The system refuses a write.
    pub(crate) fn new(dir: &Path, groups: Vec<Vec<Entry>>, shard_bytes: u64) -> Result<Self> {
        let shards = shards(groups, shard_bytes);
        let mut writer =
            Self { dir: dir.into(), files: Vec::new(), tensors: BTreeMap::new(), left: 0, bytes: 0 };
        for (index, shard) in shards.iter().enumerate() {
            writer.files.push(match shards.len() {
                1 => "model.safetensors".to_string(),
                count => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
            });
            writer.lay_out(index, shard)?;
        }
        Ok(writer)
    }

    /// A file's tensors in the order in which the format's own writer has them: the widest elements first, so that
    /// each tensor is aligned.
    fn lay_out(&mut self, file: usize, shard: &[Entry]) -> Result<()> {
        let mut entries: Vec<_> = shard.iter().collect();
        entries.sort_by(|a, b| {
            let size = |entry: &Entry| entry.dtype.size_in_bytes();
            size(b).cmp(&size(a)).then_with(|| a.name.cmp(&b.name))
        });
        let (mut at, mut infos) = (0, Vec::new());
        for entry in &entries {
            let end = at + entry.bytes() as usize;
            let dtype = Dtype::from(entry.dtype);
            infos.push((
                entry.name.clone(),
                TensorInfo { dtype, shape: entry.shape.clone(), data_offsets: (at, end) },
            ));
            at = end;
        }
        let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
        let header = Metadata::new(Some(metadata), infos.clone()).map_err(candle_core::Error::from)?;
        let mut header = serde_json::to_vec(&header).map_err(candle_core::Error::wrap)?;
        header.resize(header.len().next_multiple_of(8), b' ');
        let path = self.dir.join(&self.files[file]);
        let mut out = File::create(&path).map_err(TrainError::io(&path))?;
        let start = 8 + header.len() as u64;
        out.write_all(&(header.len() as u64).to_le_bytes())
            .and_then(|()| out.write_all(&header))
            .and_then(|()| out.set_len(start + at as u64))
            .map_err(TrainError::io(&path))?;
        for (entry, (_, info)) in entries.iter().zip(infos) {
            let start = start + info.data_offsets.0 as u64;
            let place = Place { file, start, dtype: entry.dtype, shape: info.shape };
            self.tensors.insert(entry.name.clone(), place);
        }
        self.left += entries.len();
        self.bytes += at as u64;
        Ok(())
    }

    /// Writes a tensor to its place.
    ///
    /// # Errors
    /// The system refuses; there is no such place, which is a defect.
    pub(crate) fn put(&mut self, name: &str, tensor: &Tensor) -> Result<()> {
        let place = self
            .tensors
            .get(name)
            .filter(|place| place.dtype == tensor.dtype() && place.shape == tensor.dims());
        let Some(place) = place else {
            let problem =
                format!("{name} of {:?} {:?} has no place in the files", tensor.dtype(), tensor.dims());
            return Err(candle_core::Error::Msg(problem).into());
        };
        let path = self.dir.join(&self.files[place.file]);
        let mut file = OpenOptions::new().write(true).open(&path).map_err(TrainError::io(&path))?;
        file.seek(SeekFrom::Start(place.start))
            .and_then(|_| file.write_all(&tensor.data()))
            .map_err(TrainError::io(&path))?;
        domain::crash::point("model/tensor");
        self.left = self.left.saturating_sub(1);
        Ok(())
    }

    /// Makes the files durable, and writes the index of several.
    ///
    /// # Errors
    /// The system refuses; a tensor is missing, which is a defect.
    pub(crate) fn finish(self) -> Result<Written> {
        if self.left > 0 {
            return Err(candle_core::Error::Msg(format!("{} tensors were not written", self.left)).into());
        }
        for name in &self.files {
            let path = self.dir.join(name);
            File::open(&path).and_then(|file| file.sync_all()).map_err(TrainError::io(&path))?;
        }
        if self.files.len() > 1 {
            let file = |(name, place): (&String, &Place)| (name.clone(), json!(self.files[place.file]));
            let map: serde_json::Map<_, _> = self.tensors.iter().map(file).collect();
            write_json(
                &self.dir.join(INDEX),
                &json!({ "metadata": { "total_size": self.bytes }, "weight_map": map }),
            )?;
        }
        Ok(Written { files: self.files.len(), bytes: self.bytes })
    }
}

/// Groups in files of `most` bytes each, in order.
fn shards(groups: Vec<Vec<Entry>>, most: u64) -> Vec<Vec<Entry>> {
    let mut shards: Vec<Vec<Entry>> = Vec::new();
    let mut room = 0;
    for group in groups {
        let bytes = group.iter().map(Entry::bytes).sum::<u64>();
        match shards.last_mut() {
            Some(shard) if bytes <= room => {
                room -= bytes;
                shard.extend(group);
            }
            _ => {
                room = most.saturating_sub(bytes);
                shards.push(group);
            }
        }
    }
    shards
}

fn remove(dir: &Path) -> Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(TrainError::io(dir)(error)),
        _ => Ok(()),
    }
}

/// A JSON file's content.
///
/// # Errors
/// It cannot be read, or is no JSON.
pub(crate) fn read_json(path: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(path).map_err(TrainError::io(path))?;
    serde_json::from_str(&text)
        .map_err(|e| TrainError::model(path, format!("is no JSON ({e})"), "restore the file"))
}

/// Writes a JSON file.
///
/// # Errors
/// The system refuses.
pub(crate) fn write_json(path: &Path, value: &Value) -> Result<()> {
    let text = serde_json::to_string_pretty(value).unwrap_or_default();
    files::write_atomically(path, (text + "\n").as_bytes())
}
