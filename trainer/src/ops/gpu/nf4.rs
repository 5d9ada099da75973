//! NF4 on the device, with the same results to the last bit as on the CPU.

use super::{Argument, Grid, Module, empty, launch, pointer, problem, suffix, upload};
use crate::error::Result;
use crate::quant::{Absmax, BLOCK, CODE, NESTED_BLOCK, Nf4, THRESHOLDS, dynamic};
use candle_core::{DType, Device, Tensor};
use std::ops::Range;

const MODULE: Module = Module::Quant;

/// The tables that dequantising reads: the codes' values, then those of the magnitudes' codes.
pub(crate) fn tables(device: &Device) -> Result<Tensor> {
    upload(&[&CODE[..], &dynamic::TABLE[..]].concat(), device)
}

/// Of [`tables`], the values of the magnitudes' codes.
fn of_magnitudes(tables: &Tensor) -> Result<Tensor> {
    Ok(tables.narrow(0, CODE.len(), dynamic::TABLE.len())?)
}

/// A matrix that is quantised where it lies.
pub(crate) fn quantize(matrix: &Tensor, double_quant: bool) -> Result<Nf4> {
    let matrix = matrix.contiguous()?;
    let quantising = Quantising::new(matrix.dims2()?.into(), matrix.device())?;
    quantising.elements((pointer(&matrix)?, matrix.dtype()), 0..matrix.elem_count())?;
    quantising.finish(double_quant)
}

/// A matrix that is quantised as its elements come.
pub(crate) struct Quantising {
    shape: [usize; 2],
    tables: Tensor,
    thresholds: Tensor,
    codes: Tensor,
    absmax: Tensor,
}

impl Quantising {
    /// One of that shape.
    pub(crate) fn new(shape: [usize; 2], device: &Device) -> Result<Self> {
        let count = shape[0] * shape[1];
        Ok(Self {
            shape,
            tables: tables(device)?,
            codes: empty(count.div_ceil(2), DType::U8, device)?,
            absmax: empty(count.div_ceil(BLOCK), DType::F32, device)?,
            thresholds: upload(&THRESHOLDS, device)?,
        })
    }

    /// Quantises some elements, counted row by row, which lie at `at` in the numbers of `dtype`. The first begins a block, and the
    /// last ends one or the matrix.
    pub(crate) fn elements(&self, (at, dtype): (u64, DType), range: Range<usize>) -> Result<()> {
        if !range.start.is_multiple_of(BLOCK) || range.end > self.shape[0] * self.shape[1] {
            return Err(problem(format!("elements {range:?} of {:?} for blocks of {BLOCK}", self.shape)));
        }
        let blocks = range.len().div_ceil(BLOCK);
        let (codes, absmax) = (pointer(&self.codes)?, pointer(&self.absmax)?);
        let arguments = [
            Argument::Pointer(at),
            (&self.thresholds).try_into()?,
            Argument::Pointer(codes + (range.start / 2) as u64),
            Argument::Pointer(absmax + (range.start / BLOCK * DType::F32.size_in_bytes()) as u64),
            Argument::Count(range.len() as u64),
        ];
        let kernel = format!("nf4_quantize{}", suffix(dtype, false)?);
        launch(self.codes.device(), MODULE, &kernel, Grid::elements(32 * blocks), &arguments)
    }

    /// The matrix, of which all elements were quantised.
    pub(crate) fn finish(self, double_quant: bool) -> Result<Nf4> {
        let Self { shape, tables, codes, absmax, .. } = self;
        let absmax = match double_quant {
            true => nest(&absmax, &tables)?,
            false => Absmax::Plain(absmax),
        };
        Ok(Nf4 { shape, codes, absmax, tables: Some(tables) })
    }
}

/// Magnitudes in 8 bits each.
fn nest(magnitudes: &Tensor, tables: &Tensor) -> Result<Absmax> {
    let (device, count) = (magnitudes.device(), magnitudes.elem_count());
    let blocks = count.div_ceil(NESTED_BLOCK);
    let (sums, offset) = (empty(blocks, DType::F64, device)?, empty(1, DType::F32, device)?);
    let (codes, absmax) = (empty(count, DType::U8, device)?, empty(blocks, DType::F32, device)?);
    let [all, sums, mean] = [magnitudes.try_into()?, (&sums).try_into()?, (&offset).try_into()?];
    let count = Argument::Count(count as u64);
    launch(device, MODULE, "nf4_sums", Grid::elements(blocks), &[all, sums, count])?;
    let one = Grid { blocks: (1, 1), threads: 1, shared: 0 };
    launch(device, MODULE, "nf4_mean", one, &[sums, mean, Argument::Count(blocks as u64), count])?;
    let table = of_magnitudes(tables)?;
    let arguments = [all, mean, (&table).try_into()?, (&codes).try_into()?, (&absmax).try_into()?, count];
    let grid = Grid { blocks: (blocks as u32, 1), threads: NESTED_BLOCK as u32, shared: 0 };
    launch(device, MODULE, "nf4_nest", grid, &arguments)?;
    Ok(Absmax::Nested { codes, absmax, offset })
}

/// The matrix in the numbers of `dtype`.
pub(crate) fn dequantize(matrix: &Nf4, dtype: DType) -> Result<Tensor> {
    let device = matrix.codes.device();
    let [rows, columns] = matrix.dims();
    let (count, out) = (rows * columns, empty((rows, columns), dtype, device)?);
    let tables = matrix.tables.as_ref().ok_or_else(|| problem("a matrix in NF4 was not made for a GPU"))?;
    let none = Argument::Pointer(0);
    let (absmax, scales, nested, offset) = match &matrix.absmax {
        Absmax::Plain(absmax) => (absmax.try_into()?, none, none, none),
        Absmax::Nested { codes, absmax, offset } => {
            let nested = of_magnitudes(tables)?;
            (absmax.try_into()?, codes.try_into()?, (&nested).try_into()?, offset.try_into()?)
        }
    };
    let single = !count.is_multiple_of(16);
    let arguments = [
        (&matrix.codes).try_into()?,
        tables.try_into()?,
        absmax,
        scales,
        nested,
        offset,
        (&out).try_into()?,
        Argument::Count(count as u64),
    ];
    let kernel = format!("nf4_dequantize{}", suffix(dtype, single)?);
    launch(device, MODULE, &kernel, Grid::elements(count / if single { 1 } else { 16 }), &arguments)?;
    Ok(out)
}
