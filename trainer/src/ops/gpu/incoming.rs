//! A weight that comes in pieces, which kernels bring into the numbers that it is held in.

use super::elementwise::convert;
use super::staging;
pub(crate) use super::staging::{Emptying, Filling};
use super::{empty, nf4};
use crate::error::Result;
use crate::quant::BLOCK;
use crate::weight::{Numbers, Weight};
use candle_core::{DType, Device, Tensor};
use std::path::Path;

/// Bytes of a piece, of which three are pinned and three on the device while a base is loaded. Whole blocks of NF4, whichever
/// the numbers are.
pub(crate) const PIECE: usize = 16 << 20;

/// Has `read` fill pieces of that many bytes on a thread of its own, and `work` take them, in the same order. An error of
/// `read` is that of the piece which `work` then takes.
///
/// # Errors
/// Those of `work`; there is no memory for the pieces; the system gives no thread, of which `dir` is told.
pub(crate) fn pieces<T>(
    device: &Device,
    piece: usize,
    dir: &Path,
    read: impl FnOnce(&Filling) -> Result<()> + Send,
    work: impl FnOnce(&Emptying) -> Result<T>,
) -> Result<T> {
    staging::through(staging::slots(device, piece)?, dir, read, work)
}

/// What is made of a weight's pieces.
pub(crate) struct Incoming {
    /// The numbers that come.
    from: DType,
    /// Elements that came.
    count: usize,
    made: Made,
}

enum Made {
    Dense(Tensor),
    Nf4(nf4::Quantising, bool),
}

impl Incoming {
    /// A weight of that shape, to be held in `held`, of which elements of `from` (float32, float16 or bfloat16) come.
    ///
    /// # Errors
    /// The device runs out of memory; what is to be quantised is no matrix.
    pub(crate) fn new(shape: &[usize], from: DType, held: Numbers, device: &Device) -> Result<Self> {
        let made = match (held, shape) {
            (Numbers::Nf4 { double_quant }, [rows, columns]) => {
                Made::Nf4(nf4::Quantising::new([*rows, *columns], device)?, double_quant)
            }
            (Numbers::Nf4 { .. }, _) => return Err(super::problem(format!("{shape:?} in NF4 is no matrix"))),
            _ => Made::Dense(empty(shape, held.dtype(), device)?),
        };
        Ok(Self { from, count: 0, made })
    }

    /// Takes its next bytes, which lie at that place on the device. All but the last are whole blocks of NF4.
    ///
    /// # Errors
    /// There are more than it has elements; the device fails.
    pub(crate) fn piece(&mut self, at: u64, bytes: usize) -> Result<()> {
        let (first, count) = (self.count, bytes / self.from.size_in_bytes());
        self.count += count;
        match &self.made {
            Made::Dense(tensor) => convert((at, self.from), tensor, first..self.count),
            Made::Nf4(matrix, _) => matrix.elements((at, self.from), first..self.count),
        }
    }

    /// The weight, of which all has come.
    ///
    /// # Errors
    /// Not all has; the device runs out of memory.
    pub(crate) fn finish(self) -> Result<Weight> {
        let weight = match self.made {
            Made::Dense(tensor) => Weight::Dense(tensor),
            Made::Nf4(matrix, double_quant) => Weight::Nf4(matrix.finish(double_quant)?),
        };
        let elements = match &weight {
            Weight::Dense(tensor) => tensor.elem_count(),
            Weight::Nf4(matrix) => matrix.dims().iter().product(),
        };
        match self.count == elements {
            true => Ok(weight),
            false => Err(super::problem(format!("{} elements came of {elements}", self.count))),
        }
    }
}

// A piece that fits three kinds of numbers ends where a block does.
const _: () = assert!(PIECE.is_multiple_of(4 * BLOCK));
