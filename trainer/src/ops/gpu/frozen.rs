//! Products with frozen weights. One in 4 bits is dequantised for the product, into memory that the pool hands out
//! again for the next one; nothing of it outlives the product.

use super::gemm::{Matrix, gemm};
use super::{empty, nf4};
use crate::error::Result;
use crate::weight::Weight;
use candle_core::{DType, Tensor};

/// A weight in the numbers of what it is multiplied with.
fn values(weight: &Weight, dtype: DType) -> Result<Tensor> {
    Ok(match weight {
        Weight::Dense(tensor) => tensor.to_dtype(dtype)?.contiguous()?,
        Weight::Nf4(matrix) => nf4::dequantize(matrix, dtype)?,
    })
}

/// `x · wᵀ` with results in `dtype`.
pub(in crate::ops) fn linear(x: &Tensor, weight: &Weight, dtype: DType) -> Result<Tensor> {
    let (x, w) = (x.contiguous()?, values(weight, x.dtype())?);
    let ((m, k), n) = (x.dims2()?, weight.dims()[0]);
    let y = empty((m, n), dtype, x.device())?;
    let operands = (Matrix::whole(&x)?, Matrix::whole(&w)?.t());
    gemm(x.device(), [m, n, k], operands, Matrix::whole(&y)?, (1.0, 0.0), 1)?;
    Ok(y)
}

/// `dy · w`, added to `into` if there is one.
pub(in crate::ops) fn linear_backward(dy: &Tensor, weight: &Weight, into: Option<Tensor>) -> Result<Tensor> {
    let (dy, w) = (dy.contiguous()?, values(weight, dy.dtype())?);
    let ((m, k), n) = (dy.dims2()?, weight.dims()[1]);
    let beta = if into.is_some() { 1.0 } else { 0.0 };
    let dx = into.map_or_else(|| empty((m, n), dy.dtype(), dy.device()), Ok)?;
    let operands = (Matrix::whole(&dy)?, Matrix::whole(&w)?);
    gemm(dy.device(), [m, n, k], operands, Matrix::whole(&dx)?, (1.0, beta), 1)?;
    Ok(dx)
}

pub(in crate::ops) fn row_squares(weight: &Weight) -> Result<Tensor> {
    Ok(values(weight, DType::F32)?.sqr()?.sum(1)?)
}
