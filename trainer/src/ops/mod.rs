//! The operations of a training step, each with its backward written by hand. No graph is kept: a backward
//! takes what its forward took and the gradient by the output. Activations are `[tokens, features]`, the rows
//! of all documents one after the other.
//!
//! Every operation has two forms: [`plain`], tensor formulas for any device, which is the definition, and `cpu`,
//! the same in one pass over memory. Tests hold the second against the first.
//!
//! An argument taken by value may be changed in place and become the result: nobody else may hold its storage.

mod cpu;
mod plain;
#[cfg(test)]
mod tests;

use crate::error::Result;
use crate::model::Base;
use crate::weight::Weight;
use candle_core::{DType, Device, Tensor};
use std::ops::Range;

/// `into + x`, same shapes.
pub fn add(into: Tensor, x: &Tensor) -> Result<Tensor> {
    add_rows(into, 0, x)
}

/// `into` with `x` added to its rows from `start` on.
pub fn add_rows(into: Tensor, start: usize, x: &Tensor) -> Result<Tensor> {
    if cpu::has(&into) {
        cpu::elementwise::add_rows(into, start, x)
    } else {
        plain::add_rows(&into, start, x)
    }
}

/// `x` with `rows` of its rows, from `start` on, multiplied by `factor`.
pub fn scale_rows(x: Tensor, start: usize, rows: usize, factor: f32) -> Result<Tensor> {
    let part = x.narrow(0, start, rows)?;
    if cpu::has(&x) {
        cpu::update(&part, |values| values.iter_mut().for_each(|value| *value *= factor))?;
        return Ok(x);
    }
    let scaled = (&part * f64::from(factor))?;
    Ok(x.slice_assign(&[start..start + rows, 0..x.dims2()?.1], &scaled)?)
}

/// `x` with its i-th element multiplied by `factor(i)`.
pub fn multiply(x: &Tensor, factor: impl Fn(u64) -> f32 + Sync) -> Result<Tensor> {
    if cpu::has(x) {
        return cpu::elementwise::multiply(x, factor);
    }
    let factors: Vec<f32> = (0..x.elem_count() as u64).map(factor).collect();
    Ok(x.mul(&Tensor::from_vec(factors, x.shape(), x.device())?)?)
}

/// RMSNorm: `x · w / √(mean(x²) + eps)`; `x` `[tokens, hidden]`, `weight` `[hidden]`.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    if cpu::has(x) { cpu::elementwise::rms_norm(x, weight, eps) } else { plain::rms_norm(x, weight, eps) }
}

/// `into` plus the gradient of [`rms_norm`] by `x`: with r = 1/√(mean(x²)+eps) and g = dy·w,
/// dx = r·g − x·r³·mean(g·x).
pub fn add_rms_norm_backward(
    into: Tensor,
    x: &Tensor,
    weight: &Tensor,
    eps: f64,
    dy: &Tensor,
) -> Result<Tensor> {
    if cpu::has(x) {
        cpu::elementwise::add_rms_norm_backward(into, x, weight, eps, dy)
    } else {
        Ok(into.add(&plain::rms_norm_backward(x, weight, eps, dy)?)?)
    }
}

/// SwiGLU: `silu(gate) · up`, all `[tokens, intermediate]`.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    if cpu::has(gate) { cpu::elementwise::swiglu(gate, up) } else { plain::swiglu(gate, up) }
}

/// The gradients of [`swiglu`] by `gate` and `up`: with s = σ(gate),
/// dgate = dy·up·s·(1 + gate·(1−s)), dup = dy·gate·s. `activated`, what [`swiglu`] returned, gives its memory.
pub fn swiglu_backward(
    gate: &Tensor,
    up: &Tensor,
    activated: Tensor,
    dy: Tensor,
) -> Result<(Tensor, Tensor)> {
    if cpu::has(gate) {
        cpu::elementwise::swiglu_backward(gate, up, activated, dy)
    } else {
        plain::swiglu_backward(gate, up, &dy)
    }
}

/// The rotary embedding of a step's tokens.
pub struct Rotary {
    /// Cosines and sines by position from the first one on, `[positions, head_dim / 2]`.
    cos: Tensor,
    sin: Tensor,
    /// Each token's row in them.
    positions: Vec<u32>,
}

impl Rotary {
    /// The angles for tokens at `positions`.
    ///
    /// # Errors
    /// The device runs out of memory.
    pub fn new(inverse_frequencies: &[f32], positions: &[u32], device: &Device) -> Result<Self> {
        let first = positions.iter().min().copied().unwrap_or(0);
        let positions: Vec<u32> = positions.iter().map(|p| p - first).collect();
        let count = positions.iter().max().map_or(0, |last| last + 1);
        let shape = (count as usize, inverse_frequencies.len());
        let table = |f: fn(f32) -> f32| -> Result<Tensor> {
            let angles =
                (first..first + count).flat_map(|p| inverse_frequencies.iter().map(move |w| p as f32 * w));
            Ok(Tensor::from_vec(angles.map(f).collect::<Vec<_>>(), shape, device)?)
        };
        Ok(Self { cos: table(f32::cos)?, sin: table(f32::sin)?, positions })
    }

    /// Rotates each head of `x` `[tokens, heads · head_dim]`: its first half against its second.
    pub fn forward(&self, x: Tensor, head_dim: usize) -> Result<Tensor> {
        self.rotate(x, head_dim, 1.0)
    }

    /// The gradient by the input of [`Rotary::forward`]: the rotation by the opposite angle.
    pub fn backward(&self, dy: Tensor, head_dim: usize) -> Result<Tensor> {
        self.rotate(dy, head_dim, -1.0)
    }

    fn rotate(&self, x: Tensor, head_dim: usize, sign: f32) -> Result<Tensor> {
        let table = (&self.cos, &self.sin);
        if cpu::has(&x) {
            cpu::elementwise::rotate(x, head_dim, table, &self.positions, sign)
        } else {
            plain::rotate(&x, head_dim, table, &self.positions, sign)
        }
    }
}

/// Head counts and width of an attention layer.
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    /// Query heads.
    pub query: usize,
    /// Key and value heads; they divide the query heads.
    pub key_value: usize,
    /// Width of a head.
    pub dim: usize,
}

impl Heads {
    /// Those of a base.
    pub fn of(base: &Base) -> Self {
        let c = &base.config;
        Self { query: c.num_attention_heads, key_value: c.num_key_value_heads, dim: c.head_dim }
    }
}

/// Causal attention within each document: `q` `[tokens, query heads · dim]`, `k` and `v`
/// `[tokens, key-value heads · dim]` → `[tokens, query heads · dim]`. No token sees another document.
/// The documents cover all tokens, in order.
pub fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    documents: &[Range<usize>],
    heads: Heads,
) -> Result<Tensor> {
    if cpu::has(q) {
        cpu::attention::forward(q, k, v, documents, heads)
    } else {
        plain::attention(q, k, v, documents, heads)
    }
}

/// Attention of one token, `q` `[1, query heads · dim]`, to all `k` and `v` `[tokens, key-value heads · dim]`.
pub fn attention_of_one(q: &Tensor, k: &Tensor, v: &Tensor, heads: Heads) -> Result<Tensor> {
    plain::attention_of_one(q, k, v, heads)
}

/// The gradients of [`attention`] by `q`, `k`, `v`. Probabilities are computed again rather than kept.
pub fn attention_backward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    documents: &[Range<usize>],
    heads: Heads,
    dy: &Tensor,
) -> Result<(Tensor, Tensor, Tensor)> {
    if cpu::has(q) {
        cpu::attention::backward(q, k, v, documents, heads, dy)
    } else {
        plain::attention_backward(q, k, v, documents, heads, dy)
    }
}

/// The sum of the squares of each row of a frozen matrix, `[rows]`.
pub fn row_squares(weight: &Weight) -> Result<Tensor> {
    match weight {
        Weight::Dense(tensor) if !tensor.device().is_cpu() => {
            Ok(tensor.to_dtype(DType::F32)?.sqr()?.sum(1)?)
        }
        _ => cpu::frozen::row_squares(weight),
    }
}

/// `x` with `rows` of its rows, from `start` on, multiplied column by column by `factors` `[width]`.
pub fn scale_columns(x: Tensor, start: usize, rows: usize, factors: &Tensor) -> Result<Tensor> {
    let part = x.narrow(0, start, rows)?;
    if cpu::has(&x) {
        let width = x.dims2()?.1;
        cpu::read([factors], |[factors]| {
            let scale = |row: &mut [f32]| row.iter_mut().zip(factors).for_each(|(x, factor)| *x *= factor);
            cpu::update(&part, |values| values.chunks_exact_mut(width.max(1)).for_each(scale))
        })?;
        return Ok(x);
    }
    let scaled = part.broadcast_mul(factors)?;
    Ok(x.slice_assign(&[start..start + rows, 0..x.dims2()?.1], &scaled)?)
}

/// A frozen linear layer: `x` `[tokens, in]` · `weight`ᵀ, `weight` `[out, in]`. Weights in fewer bits are brought to
/// float32 a few rows at a time.
pub fn linear(x: &Tensor, weight: &Weight) -> Result<Tensor> {
    if cpu::has(x) {
        return cpu::frozen::product(x, weight, true, None);
    }
    Ok(x.matmul(&weight.to_float32()?.t()?)?)
}

/// The gradient of [`linear`] by `x`: `dy` `[tokens, out]` · `weight`, added to `into` if there is one.
pub fn linear_backward(dy: &Tensor, weight: &Weight, into: Option<Tensor>) -> Result<Tensor> {
    if cpu::has(dy) {
        return cpu::frozen::product(dy, weight, false, into);
    }
    let dx = dy.matmul(&weight.to_float32()?)?;
    into.map_or(Ok(dx.clone()), |into| Ok(into.add(&dx)?))
}

/// The product with an adapter's narrow side: `x` `[tokens, width]` · `a`ᵀ, `a` `[rank, width]`.
pub fn project(x: &Tensor, a: &Tensor) -> Result<Tensor> {
    if cpu::has(x) { cpu::low_rank::project(x, a, true) } else { Ok(x.matmul(&a.t()?)?) }
}

/// [`project`] with `a` given as its transpose, `[width, rank]`.
pub fn project_transposed(x: &Tensor, a: &Tensor) -> Result<Tensor> {
    if cpu::has(x) { cpu::low_rank::project(x, a, false) } else { Ok(x.matmul(a)?) }
}

/// A low-rank product added to some rows: rows `start..start + tokens` of `into` `[_, width]` get
/// `scale · h · w`, `h` `[tokens, rank]`, `w` `[rank, width]`.
pub fn add_product(into: Tensor, start: usize, h: &Tensor, w: &Tensor, scale: f64) -> Result<Tensor> {
    if cpu::has(&into) {
        cpu::low_rank::add_product(into, start, h, w, false, scale)
    } else {
        plain::add_product(&into, start, h, w, scale)
    }
}

/// [`add_product`] with `w` given as its transpose, `[width, rank]`.
pub fn add_product_transposed(
    into: Tensor,
    start: usize,
    h: &Tensor,
    w: &Tensor,
    scale: f64,
) -> Result<Tensor> {
    if cpu::has(&into) {
        cpu::low_rank::add_product(into, start, h, w, true, scale)
    } else {
        plain::add_product(&into, start, h, &w.t()?, scale)
    }
}

/// A sum of outer products over tokens: `scale · narrow`ᵀ` · wide`, `[tokens, rank]` and `[tokens, width]` →
/// `[rank, width]`.
pub fn outer(narrow: &Tensor, wide: &Tensor, scale: f64) -> Result<Tensor> {
    if cpu::has(wide) {
        cpu::low_rank::outer(narrow, wide, scale)
    } else {
        Ok((narrow.t()?.matmul(wide)? * scale)?)
    }
}

/// The numbers of an AdamW step that are the same for all elements.
#[derive(Debug, Clone, Copy)]
pub struct AdamWStep {
    /// What gradients are multiplied by: clipping and the loss's normalisation.
    pub factor: f64,
    /// First moment decay.
    pub beta1: f64,
    /// Second moment decay.
    pub beta2: f64,
    /// √(1 − beta2ᵗ).
    pub correction2: f64,
    /// Denominator offset.
    pub epsilon: f64,
    /// What weights are multiplied by: 1 − learning rate · weight decay.
    pub decay: f64,
    /// learning rate / (1 − beta1ᵗ).
    pub rate: f64,
}

/// One AdamW step: the new weight, first moment and second moment. With g = factor·gradient,
/// m' = beta1·m + (1−beta1)·g, v' = beta2·v + (1−beta2)·g²,
/// w' = decay·w − rate·m' / (√v' / correction2 + epsilon).
pub fn adamw(
    weight: &Tensor,
    gradient: &Tensor,
    first: &Tensor,
    second: &Tensor,
    step: &AdamWStep,
) -> Result<[Tensor; 3]> {
    if cpu::has(weight) {
        cpu::adamw::adamw(weight, gradient, first, second, step)
    } else {
        plain::adamw(weight, gradient, first, second, step)
    }
}

/// Σ x², its partial sums in float64.
pub fn sum_of_squares(x: &Tensor) -> Result<f64> {
    if cpu::has(x) {
        return cpu::adamw::sum_of_squares(x);
    }
    Ok(f64::from(x.sqr()?.sum_all()?.to_scalar::<f32>()?))
}

/// The rows of `x` `[_, width]` that `rows` names, in that order and in float32.
pub fn gather(x: &Tensor, rows: &[u32]) -> Result<Tensor> {
    if cpu::has(x) {
        return cpu::elementwise::gather(x, rows);
    }
    let rows = Tensor::from_slice(rows, rows.len(), x.device())?;
    Ok(x.index_select(&rows, 0)?.to_dtype(DType::F32)?)
}

/// The gradient of [`gather`]: `dy`'s rows at their places among `tokens` rows, zeros elsewhere. No row is
/// named twice.
pub fn scatter(dy: &Tensor, rows: &[u32], tokens: usize) -> Result<Tensor> {
    let zeros = Tensor::zeros((tokens, dy.dims2()?.1), DType::F32, dy.device())?;
    if cpu::has(dy) {
        return cpu::elementwise::scatter(zeros, dy, rows);
    }
    Ok(zeros.index_add(&Tensor::from_slice(rows, rows.len(), dy.device())?, dy, 0)?)
}

/// Each row's negative log-likelihood of its target, and the gradient of their sum by the logits,
/// softmax − one-hot; `logits` `[targets, vocab]`.
pub fn nll_and_gradient(logits: Tensor, targets: &[u32]) -> Result<(Vec<f32>, Tensor)> {
    if cpu::has(&logits) {
        cpu::loss::nll_and_gradient(logits, targets)
    } else {
        plain::nll_and_gradient(&logits, targets)
    }
}
