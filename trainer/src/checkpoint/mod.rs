//! A model directory's weights on disk: which tensors there are, and any one of them at a time.
//!
//! | module | holds |
//! |---|---|
//! | here | a directory's tensors, read in pieces into memory of their own |
//! | `ahead` | the next tensor read while one is worked on |
//! | `pieces` | a tensor's bytes for a GPU, which brings them into other numbers itself |
//! | `index` | which files make a checkpoint |
//! | `safetensors` | a safetensors file: its header, and how its tensors are written |
//! | `torch` | torch's zip archive (`pytorch_model.bin`) |
//! | `pickle` | the tensors that an archive's pickle describes; it runs no code |
//! | `bitsandbytes` | matrices that were quantised before they were written |
//!
//! Opening reads names, types and shapes alone. Whatever is found wrong is an error: no tensor is passed over.

mod ahead;
pub(crate) mod bitsandbytes;
mod index;
mod pickle;
#[cfg(any(feature = "cuda", test))]
mod pieces;
pub(crate) mod safetensors;
mod torch;

pub use bitsandbytes::Quantized;

use crate::error::{Result, TrainError};
use crate::files;
use candle_core::{DType, Device, Tensor, WithDType};
use half::{bf16, f16};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// Bytes of a file that are held at once beside the tensor that is made of them, or that they are made of.
const PIECE: usize = 8 << 20;

/// A model directory's tensors.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    files: Vec<PathBuf>,
    /// Each with its file's place in `files`.
    tensors: BTreeMap<String, (usize, Stored)>,
}

/// Where a tensor lies in its file.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Stored {
    /// The type of its elements, or the file's name for one that cannot be read.
    dtype: std::result::Result<DType, String>,
    shape: Vec<usize>,
    /// Elements from one index to the next, an axis each. `None` stands for rows one after the other.
    strides: Option<Vec<usize>>,
    /// The byte of its first element.
    start: u64,
}

impl Stored {
    fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Elements from its first to its last, with those between that are not its own.
    fn span(&self) -> usize {
        match &self.strides {
            None => self.elements(),
            Some(_) if self.elements() == 0 => 0,
            Some(strides) => {
                self.shape.iter().zip(strides).map(|(n, stride)| (n - 1) * stride).sum::<usize>() + 1
            }
        }
    }
}

impl Checkpoint {
    /// Finds a directory's weights: `model.safetensors`, else the shards of `model.safetensors.index.json`, else
    /// `pytorch_model.bin`, else the shards of `pytorch_model.bin.index.json`. Reads what is said about tensors,
    /// not the tensors.
    ///
    /// # Errors
    /// There are no weights, a file is missing, cut off or broken, or a pickle asks for more than tensors.
    pub fn open(dir: &Path) -> Result<Self> {
        let index = index::find(dir)?;
        let mut contents = Vec::with_capacity(index.files.len());
        for file in &index.files {
            contents.push(match index.format {
                index::Format::Safetensors => safetensors::tensors(file)?,
                index::Format::Torch => torch::tensors(file)?,
            });
        }
        let mut tensors = BTreeMap::new();
        for (name, place) in index.places {
            let Some(stored) = contents[place].remove(&name) else {
                return Err(TrainError::model(
                    &index.files[place],
                    format!("lacks the tensor {name}, which the index places there"),
                    "download index and shards again",
                ));
            };
            tensors.insert(name, (place, stored));
        }
        for (place, contents) in contents.into_iter().enumerate() {
            for (name, stored) in contents {
                tensors.entry(name).or_insert((place, stored));
            }
        }
        Ok(Self { dir: dir.into(), files: index.files, tensors })
    }

    /// The model's directory.
    #[cfg(any(feature = "cuda", test))]
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// The tensors' names, in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// A tensor's shape.
    ///
    /// # Errors
    /// There is no such tensor.
    pub fn shape(&self, name: &str) -> Result<&[usize]> {
        Ok(&self.get(name)?.1.shape)
    }

    /// The type that a tensor has on disk.
    ///
    /// # Errors
    /// There is no such tensor, or it has a type that cannot be read.
    pub fn dtype(&self, name: &str) -> Result<DType> {
        let (file, stored) = self.get(name)?;
        stored.dtype.clone().map_err(|kind| {
            TrainError::model(
                file,
                format!("{name} is of type {kind}, which cannot be read"),
                "use a checkpoint of the model in float32, float16 or bfloat16",
            )
        })
    }

    /// Bytes of a tensor.
    ///
    /// # Errors
    /// Those of [`Checkpoint::dtype`].
    pub fn bytes(&self, name: &str) -> Result<u64> {
        let size = self.dtype(name)?.size_in_bytes();
        Ok((self.get(name)?.1.elements() * size) as u64)
    }

    /// Reads a tensor, in the type that it has on disk. Beside it at most [`PIECE`] bytes of a file are held; of a
    /// view whose elements do not stand one after the other, the elements between them too.
    ///
    /// # Errors
    /// Those of [`Checkpoint::dtype`]; the file was cut off since it was opened, or cannot be read; the device
    /// has no room.
    pub fn read(&self, name: &str, device: &Device) -> Result<Tensor> {
        let dtype = self.dtype(name)?;
        let (path, stored) = self.get(name)?;
        let at = Place { name, path, stored, device };
        match dtype {
            DType::U8 => at.tensor(u8::from_le_bytes),
            DType::U32 => at.tensor(u32::from_le_bytes),
            DType::I16 => at.tensor(i16::from_le_bytes),
            DType::I32 => at.tensor(i32::from_le_bytes),
            DType::I64 => at.tensor(i64::from_le_bytes),
            DType::BF16 => at.tensor(bf16::from_le_bytes),
            DType::F16 => at.tensor(f16::from_le_bytes),
            DType::F32 => at.tensor(f32::from_le_bytes),
            DType::F64 => at.tensor(f64::from_le_bytes),
            other => Err(TrainError::model(
                path,
                format!("{name} is of type {other:?}, which cannot be read"),
                "use a checkpoint of the model in float32, float16 or bfloat16",
            )),
        }
    }

    fn get(&self, name: &str) -> Result<(&Path, &Stored)> {
        let found = self.tensors.get(name).map(|(place, stored)| (self.files[*place].as_path(), stored));
        found.ok_or_else(|| {
            TrainError::model(&self.dir, format!("lacks the tensor {name}"), "download the checkpoint again")
        })
    }
}

/// Digest of a model directory's configuration and of the weight files that are used.
///
/// # Errors
/// A file is missing or cannot be read.
pub fn digest(dir: &Path) -> Result<String> {
    let mut paths = vec![dir.join("config.json")];
    paths.extend(index::find(dir)?.files);
    files::digest_files(paths.iter().map(PathBuf::as_path))
}

/// The files that decide what a model directory's weights are: its configuration, indexes of shards, and the weight files
/// that are used.
///
/// # Errors
/// There are no weights, or a shard is missing.
pub fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let indexes = index::CHOICES.iter().map(|(_, _, index)| dir.join(index)).filter(|index| index.is_file());
    Ok([dir.join("config.json")].into_iter().chain(indexes).chain(index::find(dir)?.files).collect())
}

/// A tensor to be read.
struct Place<'a> {
    name: &'a str,
    path: &'a Path,
    stored: &'a Stored,
    device: &'a Device,
}

impl Place<'_> {
    fn tensor<T: WithDType, const N: usize>(&self, from: fn([u8; N]) -> T) -> Result<Tensor> {
        let span = self.values(from)?;
        let values = match &self.stored.strides {
            None => span,
            Some(strides) => gather(&span, &self.stored.shape, strides),
        };
        Ok(Tensor::from_vec(values, self.stored.shape.as_slice(), self.device)?)
    }

    /// The elements of its span.
    fn values<T, const N: usize>(&self, from: fn([u8; N]) -> T) -> Result<Vec<T>> {
        let count = self.stored.span();
        let mut values = Vec::with_capacity(count);
        let mut file = File::open(self.path).map_err(TrainError::io(self.path))?;
        file.seek(SeekFrom::Start(self.stored.start)).map_err(TrainError::io(self.path))?;
        let mut piece = vec![0; PIECE.min(count * N)];
        while values.len() < count {
            let take = piece.len().min((count - values.len()) * N);
            let piece = &mut piece[..take];
            let read = file.read_exact(piece);
            read.map_err(|error| unread(self.name, self.path, self.stored.start, error))?;
            values.extend(piece.as_chunks::<N>().0.iter().map(|bytes| from(*bytes)));
        }
        Ok(values)
    }
}

/// Why a tensor's bytes could not be read.
fn unread(name: &str, path: &Path, start: u64, error: std::io::Error) -> TrainError {
    if error.kind() != std::io::ErrorKind::UnexpectedEof {
        return TrainError::io(path)(error);
    }
    let problem = format!("was cut off while it was used: {name} starts at byte {start}");
    TrainError::model(path, problem, "download the file again")
}

/// The elements of a view, row after row. Every index lies within `span`, as [`Stored::span`] counts it.
fn gather<T: Copy>(span: &[T], shape: &[usize], strides: &[usize]) -> Vec<T> {
    let count = shape.iter().product();
    let mut values = Vec::with_capacity(count);
    let (mut index, mut at) = (vec![0; shape.len()], 0);
    while values.len() < count {
        values.push(span[at]);
        for axis in (0..shape.len()).rev() {
            index[axis] += 1;
            at += strides[axis];
            if index[axis] < shape[axis] {
                break;
            }
            at -= shape[axis] * strides[axis];
            index[axis] = 0;
        }
    }
    values
}
