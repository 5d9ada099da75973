//! A tensor's elements, piece by piece, for a device that brings them into other numbers itself.

use super::{Checkpoint, unread};
use crate::error::{Result, TrainError};
use candle_core::{DType, Device};
use safetensors::View;
use std::fs::File;
use std::io::{Cursor, Read, Seek, SeekFrom};
use std::path::Path;

/// What is left of a tensor's elements, row after row, as a little-endian machine has them, which all are that have a GPU.
pub(crate) struct Pieces<'a> {
    name: &'a str,
    path: &'a Path,
    start: u64,
    from: Box<dyn Read>,
    left: usize,
}

impl Checkpoint {
    /// The type of a tensor's elements in pieces, where it is to be held, or quantised, in `held`: the one that it has on disk, if a
    /// device reads that, else `held`.
    ///
    /// # Errors
    /// Those of [`Checkpoint::dtype`].
    pub(crate) fn dtype_in_pieces(&self, name: &str, held: DType) -> Result<DType> {
        let dtype = self.dtype(name)?;
        Ok(if matches!(dtype, DType::F32 | DType::F16 | DType::BF16) { dtype } else { held })
    }

    /// A tensor's elements in that type. They are read from its file as they are asked for, unless they have to be put in
    /// order, or into another type, before.
    ///
    /// # Errors
    /// Those of [`Checkpoint::read`].
    pub(crate) fn pieces<'a>(&'a self, name: &'a str, held: DType) -> Result<Pieces<'a>> {
        let dtype = self.dtype_in_pieces(name, held)?;
        let (path, stored) = self.get(name)?;
        let left = stored.elements() * dtype.size_in_bytes();
        let is_stored_so = stored.strides.is_none() && stored.dtype == Ok(dtype);
        let from: Box<dyn Read> = if is_stored_so {
            let mut file = File::open(path).map_err(TrainError::io(path))?;
            file.seek(SeekFrom::Start(stored.start)).map_err(TrainError::io(path))?;
            Box::new(file)
        } else {
            let tensor = self.read(name, &Device::Cpu)?.to_dtype(dtype)?;
            Box::new(Cursor::new(tensor.data().into_owned()))
        };
        Ok(Pieces { name, path, start: stored.start, from, left })
    }
}

impl Pieces<'_> {
    /// Bytes that are left.
    pub(crate) fn left(&self) -> usize {
        self.left
    }

    /// Reads the next bytes, as many as there is room for; how many that is.
    ///
    /// # Errors
    /// The file was cut off since it was opened, or cannot be read.
    pub(crate) fn read(&mut self, into: &mut [u8]) -> Result<usize> {
        let count = into.len().min(self.left);
        let read = self.from.read_exact(&mut into[..count]);
        read.map_err(|error| unread(self.name, self.path, self.start, error))?;
        self.left -= count;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::super::Stored;
    use super::*;
    use candle_core::Tensor;
    use std::collections::{BTreeMap, HashMap};

    fn all(checkpoint: &Checkpoint, name: &str, held: DType, room: usize) -> Result<Vec<u8>> {
        let (mut pieces, mut piece, mut all) = (checkpoint.pieces(name, held)?, vec![0; room], Vec::new());
        while pieces.left() > 0 {
            let count = pieces.read(&mut piece)?;
            all.extend_from_slice(&piece[..count]);
        }
        Ok(all)
    }

    /// In whatever pieces, a tensor is the one that is read whole.
    #[test]
    fn pieces_are_the_whole() {
        let dir = tempfile::tempdir().unwrap();
        let values = Tensor::arange(0f64, 60.0, &Device::Cpu).unwrap().reshape((5, 12)).unwrap();
        let dtypes = [DType::F64, DType::F32, DType::F16, DType::BF16];
        let name = |dtype: DType| dtype.as_str().to_string();
        let tensors: HashMap<_, _> =
            dtypes.iter().map(|dtype| (name(*dtype), values.to_dtype(*dtype).unwrap())).collect();
        candle_core::safetensors::save(&tensors, dir.path().join("model.safetensors")).unwrap();
        let mut checkpoint = Checkpoint::open(dir.path()).unwrap();
        // Views of the same elements, as a pickle may have them: the transpose, and the same row again and again.
        let views = |(name, (file, stored)): (&String, &(usize, Stored))| {
            let view = |shape: [usize; 2], strides: [usize; 2]| {
                (*file, Stored { shape: shape.into(), strides: Some(strides.into()), ..stored.clone() })
            };
            [
                (format!("{name} turned"), view([12, 5], [1, 12])),
                (format!("{name} again"), view([4, 12], [0, 1])),
            ]
        };
        let views: BTreeMap<_, _> = checkpoint.tensors.iter().flat_map(views).collect();
        checkpoint.tensors.extend(views);
        for name in checkpoint.names() {
            for held in [DType::F32, DType::BF16] {
                let dtype = checkpoint.dtype_in_pieces(name, held).unwrap();
                assert!(dtype == checkpoint.dtype(name).unwrap() || name.starts_with("f64") && dtype == held);
                let want = checkpoint.read(name, &Device::Cpu).unwrap().to_dtype(dtype).unwrap();
                for room in [1, 16, 100, 1000] {
                    let got = all(&checkpoint, name, held, room).unwrap();
                    assert!(got == *want.data(), "{name} for {held:?} by {room}");
                }
            }
        }
    }

    #[test]
    fn a_file_that_is_cut_off_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let tensor = Tensor::zeros(100, DType::F32, &Device::Cpu).unwrap();
        let file = dir.path().join("model.safetensors");
        candle_core::safetensors::save(&HashMap::from([("a", tensor)]), &file).unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        let length = file.metadata().unwrap().len();
        File::options().write(true).open(&file).unwrap().set_len(length - 4).unwrap();
        let message = all(&checkpoint, "a", DType::F32, 64).unwrap_err().to_string();
        assert!(message.contains("model.safetensors: was cut off while it was used: a starts"), "{message}");
    }
}
