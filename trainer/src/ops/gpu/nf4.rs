//! NF4 on the device, with the same results to the last bit as on the CPU.

use super::{Argument, Grid, Module, empty, launch, problem, suffix, upload};
use crate::error::Result;
use crate::quant::{Absmax, BLOCK, CODE, Nf4, THRESHOLDS, dynamic};
use candle_core::{DType, Device, Tensor};

const MODULE: Module = Module::Quant;

/// The tables that dequantising reads: the codes' values, then those of the magnitudes' codes.
pub(crate) fn tables(device: &Device) -> Result<Tensor> {
    upload(&[&CODE[..], &dynamic::TABLE[..]].concat(), device)
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

/// The matrix in the numbers of `dtype`.
pub(crate) fn dequantize(matrix: &Nf4, dtype: DType) -> Result<Tensor> {
    let device = matrix.codes.device();
    let [rows, columns] = matrix.dims();
    let (count, out) = (rows * columns, empty((rows, columns), dtype, device)?);
    let tables = matrix.tables.as_ref().ok_or_else(|| problem("a matrix in NF4 was not made for a GPU"))?;
    let none = Argument::Pointer(0);
    let (absmax, scales, nested, offset) = match &matrix.absmax {
        Absmax::Plain(absmax) => (absmax.try_into()?, none, none, 0.0),
        Absmax::Nested { codes, absmax, offset } => {
            let nested = tables.narrow(0, CODE.len(), dynamic::TABLE.len())?;
            (absmax.try_into()?, codes.try_into()?, (&nested).try_into()?, *offset)
        }
    };
    let single = !count.is_multiple_of(16);
    let arguments = [
        (&matrix.codes).try_into()?,
        tables.try_into()?,
        absmax,
        scales,
        nested,
        Argument::Number(offset),
        (&out).try_into()?,
        Argument::Count(count as u64),
    ];
    let kernel = format!("nf4_dequantize{}", suffix(dtype, single)?);
    launch(device, MODULE, &kernel, Grid::elements(count / if single { 1 } else { 16 }), &arguments)?;
    Ok(out)
}
