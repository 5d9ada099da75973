//! Products with adapters. Their matrices come in the numbers of the activations; gradients go out in float32.

use super::empty;
use super::gemm::{Matrix, gemm};
use crate::error::Result;
use candle_core::{DType, Tensor};

/// `x · aᵀ`, or with `a` given as its transpose `x · a`.
pub(in crate::ops) fn project(x: &Tensor, a: &Tensor, transposed: bool) -> Result<Tensor> {
    let (x, (rows, columns)) = (x.contiguous()?, a.dims2()?);
    let (m, k) = x.dims2()?;
    let n = if transposed { rows } else { columns };
    let h = empty((m, n), x.dtype(), x.device())?;
    let a = Matrix::whole(a)?;
    let operands = (Matrix::whole(&x)?, if transposed { a.t() } else { a });
    gemm(x.device(), [m, n, k], operands, Matrix::whole(&h)?, (1.0, 0.0), 1)?;
    Ok(h)
}

/// Rows `start..` of `into` get `scale · h · w`; `w` `[rank, width]`, or if `transposed` `[width, rank]`.
pub(in crate::ops) fn add_product(
    into: Tensor,
    start: usize,
    h: &Tensor,
    w: &Tensor,
    transposed: bool,
    scale: f64,
) -> Result<Tensor> {
    let ((m, k), n) = (h.dims2()?, into.dims2()?.1);
    let w = Matrix::whole(w)?;
    let operands = (Matrix::whole(h)?, if transposed { w.t() } else { w });
    let part = Matrix::whole(&into.narrow(0, start, m)?)?;
    gemm(h.device(), [m, n, k], operands, part, (scale as f32, 1.0), 1)?;
    Ok(into)
}

/// `scale · aᵀ · b`, `[tokens, m]` and `[tokens, n]` → `[m, n]` in float32.
pub(in crate::ops) fn outer(a: &Tensor, b: &Tensor, scale: f64) -> Result<Tensor> {
    let (a, b) = (a.contiguous()?, b.contiguous()?);
    let ((k, m), n) = (a.dims2()?, b.dims2()?.1);
    let out = empty((m, n), DType::F32, a.device())?;
    let operands = (Matrix::whole(&a)?.t(), Matrix::whole(&b)?);
    gemm(a.device(), [m, n, k], operands, Matrix::whole(&out)?, (scale as f32, 0.0), 1)?;
    Ok(out)
}
