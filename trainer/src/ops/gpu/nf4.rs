//! NF4 on the device, with the same results to the last bit as on the CPU.

use super::{Argument, Grid, Module, empty, launch, problem, suffix, upload};
use crate::error::Result;
use crate::quant::{Absmax, BLOCK, CODE, NESTED_BLOCK, Nf4, THRESHOLDS, dynamic};
use candle_core::{DType, Device, Tensor};

const MODULE: Module = Module::Quant;

/// The tables that dequantising reads: the codes' values, then those of the magnitudes' codes.
pub(crate) fn tables(device: &Device) -> Result<Tensor> {
    upload(&[&CODE[..], &dynamic::TABLE[..]].concat(), device)
}

/// Of [`tables`], the values of the magnitudes' codes.
fn of_magnitudes(tables: &Tensor) -> Result<Tensor> {
    Ok(tables.narrow(0, CODE.len(), dynamic::TABLE.len())?)
}

/// Codes and magnitudes of a float32 matrix's blocks.
pub(crate) fn quantize(matrix: &Tensor) -> Result<(Tensor, Tensor)> {
    let (matrix, device) = (matrix.contiguous()?, matrix.device());
    let count = matrix.elem_count();
    let blocks = count.div_ceil(BLOCK);
    let codes = empty(count.div_ceil(2), DType::U8, device)?;
    let absmax = empty(blocks, DType::F32, device)?;
    let thresholds = upload(&THRESHOLDS, device)?;
    let arguments = [
        (&matrix).try_into()?,
        (&thresholds).try_into()?,
        (&codes).try_into()?,
        (&absmax).try_into()?,
        Argument::Count(count as u64),
    ];
    launch(device, MODULE, "nf4_quantize", Grid::elements(32 * blocks), &arguments)?;
    Ok((codes, absmax))
}

/// Magnitudes in 8 bits each.
pub(crate) fn nest(magnitudes: &Tensor, tables: &Tensor) -> Result<Absmax> {
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
