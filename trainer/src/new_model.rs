//! A model's directory, written whole or not at all, tensor by tensor.
//!
//! What is written lies in `.NAME.partial` beside the directory until it is whole and durable; a model that it
//! replaces lies in `.NAME.replaced` while the two change places. `.NAME.lock` is locked meanwhile, so that one call at a
//! time writes there. Whatever an earlier call that was killed left there is removed, but for a replaced model whose
//! successor never came, which is put back: the successor is then still in `.NAME.partial`.

use crate::checkpoint::{Checkpoint, safetensors};
use crate::error::{Result, TrainError};
use crate::files::{self, Outlives};
use candle_core::{DType, Tensor};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions, TryLockError};
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
    fn check(&self, sources: &[&Path]) -> Result<()> {
        let wrong = |problem: &str, remedy: &str| Err(TrainError::model(self.to, problem, remedy));
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
    /// Those of [`NewModel::check`] and of `write`; another call writes there; the system refuses a write.
    pub(crate) fn create<T>(
        &self,
        sources: &[&Path],
        write: impl FnOnce(&Path) -> Result<Option<T>>,
    ) -> Result<Option<T>> {
        let Some(name) = self.to.file_name() else {
            let (problem, remedy) = ("is no name for a new directory", "name one that can be made");
            return Err(TrainError::model(self.to, problem, remedy));
        };
        let parent = match self.to.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let beside = |what: &str| parent.join(format!(".{}.{what}", name.to_string_lossy()));
        let (partial, replaced) = (beside("partial"), beside("replaced"));
        std::fs::create_dir_all(parent).map_err(TrainError::io(parent))?;
        let Some(_lock) = Lock::take(&beside("lock"))? else {
            let (problem, remedy) = ("is being written by another process", "wait for it, or name another");
            return Err(TrainError::model(self.to, problem, remedy));
        };
        if replaced.exists() && partial.exists() && !self.to.exists() {
            std::fs::rename(&replaced, self.to).map_err(TrainError::io(self.to))?;
        }
        // Before there is a new one in `partial`, which would make it one that is to be put back. Where nothing has its place
        // it may be the only one, and stays until the new one is whole.
        if self.to.exists() {
            remove(&replaced)?;
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
        self.swap(&partial, &replaced)?;
        domain::crash::point("model/renamed");
        files::sync_directory(parent)?;
        remove(&replaced)?;
        Ok(Some(written))
    }

    /// Gives `partial` the target's name, and what had it until then that of `replaced`. Where that fails, the target is
    /// what it was, and `partial` is gone.
    fn swap(&self, partial: &Path, replaced: &Path) -> Result<()> {
        let had = self.to.exists();
        if had {
            std::fs::rename(self.to, replaced).map_err(TrainError::io(self.to))?;
            domain::crash::point("model/replaced");
        }
        let Err(error) = std::fs::rename(partial, self.to) else { return Ok(()) };
        // If it cannot be put back either, both stay as they are: the next call puts it back.
        if !had || std::fs::rename(replaced, self.to).is_ok() {
            remove(partial)?;
        }
        Err(TrainError::io(self.to)(error))
    }
}

/// A file that one call at a time has, until dropped.
#[derive(Debug)]
struct Lock {
    path: PathBuf,
    _file: File,
}

impl Lock {
    /// Takes it; `None` if another call has it. What a call that was killed left is no lock.
    fn take(path: &Path) -> Result<Option<Self>> {
        loop {
            let open = OpenOptions::new().write(true).create(true).truncate(false).open(path);
            let file = open.map_err(TrainError::io(path))?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Ok(None),
                Err(TryLockError::Error(error)) => return Err(TrainError::io(path)(error)),
            }
            // Whoever had it may have removed it meanwhile; then another file may have its name.
            if is_at(&file, path) {
                return Ok(Some(Self { path: path.into(), _file: file }));
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Nobody minds a file that stays.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Whether a path names an open file.
#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let place = |data: std::io::Result<std::fs::Metadata>| data.ok().map(|data| (data.dev(), data.ino()));
    let here = place(file.metadata());
    here.is_some() && here == place(std::fs::metadata(path))
}

/// Elsewhere an open file keeps its name.
#[cfg(not(unix))]
fn is_at(_: &File, _: &Path) -> bool {
    true
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
            files::write_atomically(&to.join(name), &bytes, Outlives::Machine)?;
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

    /// Bytes of its elements.
    pub(crate) fn bytes(&self) -> u64 {
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

    /// Writes a file's header, and gives its tensors their places.
    fn lay_out(&mut self, file: usize, shard: &[Entry]) -> Result<()> {
        let mut entries: Vec<_> = shard.iter().collect();
        let (header, infos) = safetensors::header(&mut entries)?;
        let (start, bytes) = (header.len() as u64, entries.iter().map(|entry| entry.bytes()).sum::<u64>());
        let path = self.dir.join(&self.files[file]);
        let mut out = File::create(&path).map_err(TrainError::io(&path))?;
        out.write_all(&header).and_then(|()| out.set_len(start + bytes)).map_err(TrainError::io(&path))?;
        for (entry, info) in entries.iter().zip(infos) {
            let start = start + info.data_offsets.0 as u64;
            let place = Place { file, start, dtype: entry.dtype, shape: info.shape };
            self.tensors.insert(entry.name.clone(), place);
        }
        self.left += entries.len();
        self.bytes += bytes;
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
        file.seek(SeekFrom::Start(place.start)).map_err(TrainError::io(&path))?;
        safetensors::write_elements(tensor, &mut file).map_err(TrainError::io(&path))?;
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
    files::write_atomically(path, (text + "\n").as_bytes(), Outlives::Machine)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder in which some of `new`, `.new.partial` and `.new.replaced` are models, each of its own text.
    fn folder(models: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in models {
            std::fs::create_dir(dir.path().join(name)).unwrap();
            std::fs::write(dir.path().join(name).join(CONFIG), text).unwrap();
        }
        dir
    }

    /// The models of a folder.
    fn models(dir: &Path) -> Vec<(String, String)> {
        let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
        let model = |entry: std::fs::DirEntry| {
            let text = std::fs::read_to_string(entry.path().join(CONFIG)).unwrap();
            (entry.file_name().into_string().unwrap(), text)
        };
        let mut models: Vec<_> = entries.map(model).collect();
        models.sort();
        models
    }

    fn named(models: &[(&str, &str)]) -> Vec<(String, String)> {
        models.iter().map(|(name, text)| (name.to_string(), text.to_string())).collect()
    }

    /// Whatever a call that ended anywhere left, the next one begins with the model that was there or came, or with none.
    #[test]
    fn what_an_earlier_call_left_is_put_in_order() {
        let (new, partial, replaced) = ("new", ".new.partial", ".new.replaced");
        for (left, want) in [
            (vec![], vec![]),
            // While it wrote.
            (vec![(partial, "half")], vec![]),
            (vec![(new, "old"), (partial, "half")], vec![(new, "old")]),
            // Between the two renames.
            (vec![(partial, "next"), (replaced, "old")], vec![(new, "old")]),
            // After them; and where somebody has removed the new one since, so that the old one is the only one.
            (vec![(new, "next"), (replaced, "old")], vec![(new, "next")]),
            (vec![(replaced, "old")], vec![(replaced, "old")]),
            // One that ended after them, and one since that wrote.
            (vec![(new, "next"), (partial, "half"), (replaced, "old")], vec![(new, "next")]),
        ] {
            let dir = folder(&left);
            let model = NewModel { to: &dir.path().join(new), overwrite: true };
            let stopped = model.create(&[], |at| {
                std::fs::write(at.join(CONFIG), "half").unwrap();
                Ok(None::<()>)
            });
            assert_eq!(stopped.unwrap(), None);
            assert_eq!(models(dir.path()), named(&want), "{left:?}");
        }
    }

    #[test]
    fn a_swap_that_fails_changes_nothing() {
        for left in [vec![("new", "old")], vec![]] {
            let dir = folder(&left);
            let at = |name: &str| dir.path().join(name);
            let model = NewModel { to: &at("new"), overwrite: true };
            // What is not there cannot be renamed.
            let message = model.swap(&at("none"), &at(".new.replaced")).unwrap_err().to_string();
            assert!(message.contains(&at("new").display().to_string()), "{message}");
            assert_eq!(models(dir.path()), named(&left));
        }
    }

    #[test]
    fn a_second_writer_is_refused() {
        let dir = folder(&[]);
        // What a call that was killed left.
        std::fs::write(dir.path().join(".new.lock"), "").unwrap();
        let create = |name: &str, write: &mut dyn FnMut()| {
            let model = NewModel { to: &dir.path().join(name), overwrite: true };
            model.create(&[], |at| {
                write();
                std::fs::write(at.join(CONFIG), name).unwrap();
                Ok(Some(()))
            })
        };
        let first = create("new", &mut || {
            let message = create("new", &mut || panic!("two write at once")).unwrap_err().to_string();
            assert!(message.contains("new: is being written by another process; wait for it"), "{message}");
            create("other", &mut || ()).unwrap();
        });
        first.unwrap();
        create("new", &mut || ()).unwrap();
        assert_eq!(models(dir.path()), named(&[("new", "new"), ("other", "other")]));
    }
}
