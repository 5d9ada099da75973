//! RMSNorm of the heads within a row, by that of whole rows.

use super::{add_rms_norm_backward, rms_norm, rms_norm_weight_gradient};
use crate::error::Result;
use candle_core::Tensor;

/// RMSNorm of each head: `x` `[tokens, heads · dim]`, `weight` `[dim]` the same for all.
pub fn head_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    Ok(rms_norm(&by_head(x, weight)?, weight, eps)?.reshape(x.shape())?)
}

/// The gradient of [`head_norm`] by `x`.
pub fn head_norm_backward(x: &Tensor, weight: &Tensor, eps: f64, dy: &Tensor) -> Result<Tensor> {
    let (heads, dy) = (by_head(x, weight)?, by_head(dy, weight)?);
    let into = Tensor::zeros(heads.shape(), x.dtype(), x.device())?;
    Ok(add_rms_norm_backward(into, &heads, weight, eps, &dy)?.reshape(x.shape())?)
}

/// The gradient of [`head_norm`] by `weight`, in float32.
pub fn head_norm_weight_gradient(x: &Tensor, weight: &Tensor, eps: f64, dy: &Tensor) -> Result<Tensor> {
    rms_norm_weight_gradient(&by_head(x, weight)?, eps, &by_head(dy, weight)?)
}

/// `[tokens · heads, dim]`
fn by_head(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let dim = weight.elem_count();
    Ok(x.reshape((x.elem_count() / dim, dim))?)
}
