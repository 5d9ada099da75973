//! The operations as tensor formulas, for any device: what the fused forms are held against.

use super::{Heads, Parameter};
use crate::error::Result;
use crate::weight::Weight;
use candle_core::{D, DType, Tensor};
use std::ops::Range;

pub(super) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    Ok(x.broadcast_mul(&inverse_rms(x, eps)?)?.broadcast_mul(weight)?)
}

pub(super) fn rms_norm_backward(x: &Tensor, weight: &Tensor, eps: f64, dy: &Tensor) -> Result<Tensor> {
    let r = inverse_rms(x, eps)?;
    let g = dy.broadcast_mul(weight)?;
    let mean = g.mul(x)?.mean_keepdim(D::Minus1)?;
    let pull = mean.mul(&r)?.mul(&r)?.mul(&r)?;
    Ok(g.broadcast_mul(&r)?.sub(&x.broadcast_mul(&pull)?)?)
}

fn inverse_rms(x: &Tensor, eps: f64) -> Result<Tensor> {
    Ok((x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()?)
}

pub(super) fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    Ok(gate.silu()?.mul(up)?)
}

pub(super) fn swiglu_backward(gate: &Tensor, up: &Tensor, dy: &Tensor) -> Result<(Tensor, Tensor)> {
    let s = (gate.neg()?.exp()? + 1.0)?.recip()?;
    let slope = ((gate.mul(&(1.0 - &s)?)? + 1.0)?).mul(&s)?;
    let d_up = dy.mul(gate)?.mul(&s)?;
    Ok((dy.mul(up)?.mul(&slope)?, d_up))
}

/// Rotates each head's first half against its second by `sign` times its position's angle.
pub(super) fn rotate(
    x: &Tensor,
    head_dim: usize,
    (cos, sin): (&Tensor, &Tensor),
    positions: &[u32],
    sign: f32,
) -> Result<Tensor> {
    let (tokens, width) = x.dims2()?;
    let half = head_dim / 2;
    let positions = Tensor::from_slice(positions, tokens, x.device())?;
    let cos = cos.index_select(&positions, 0)?.unsqueeze(1)?;
    let sin = (sin.index_select(&positions, 0)?.unsqueeze(1)? * f64::from(sign))?;
    let heads = x.reshape((tokens, width / head_dim, head_dim))?;
    let (a, b) = (heads.narrow(2, 0, half)?, heads.narrow(2, half, half)?);
    let first = a.broadcast_mul(&cos)?.sub(&b.broadcast_mul(&sin)?)?;
    let second = b.broadcast_mul(&cos)?.add(&a.broadcast_mul(&sin)?)?;
    Ok(Tensor::cat(&[first, second], 2)?.reshape((tokens, width))?)
}

impl Heads {
    /// A document's rows of a `[tokens, heads · dim]` tensor as `[query heads, length, dim]`; key and value
    /// heads are repeated for the query heads that they serve.
    fn split(&self, x: &Tensor, document: &Range<usize>) -> Result<Tensor> {
        let (length, heads) = (document.len(), x.dims()[1] / self.dim);
        let x = x.narrow(0, document.start, length)?.reshape((length, heads, self.dim))?.transpose(0, 1)?;
        if heads == self.query {
            return Ok(x.contiguous()?);
        }
        let group = self.query / heads;
        let x = x.contiguous()?.reshape((heads, 1, length, self.dim))?;
        Ok(x.broadcast_as((heads, group, length, self.dim))?
            .contiguous()?
            .reshape((self.query, length, self.dim))?)
    }

    /// The reverse of [`Heads::split`] for gradients: repeated heads are summed.
    fn join(&self, x: &Tensor, heads: usize) -> Result<Tensor> {
        let length = x.dims()[1];
        let x = if heads == self.query {
            x.clone()
        } else {
            x.reshape((heads, self.query / heads, length, self.dim))?.sum(1)?
        };
        Ok(x.transpose(0, 1)?.contiguous()?.reshape((length, heads * self.dim))?)
    }

    fn probabilities(&self, q: &Tensor, k: &Tensor) -> Result<Tensor> {
        let length = q.dims()[1];
        let scores = (q.matmul(&k.t()?)? * (1.0 / (self.dim as f64).sqrt()))?;
        let mask: Vec<f32> = (0..length * length)
            .map(|i| (i / length, i % length))
            .map(|(query, key)| (self.first_key(query)..=query).contains(&key))
            .map(|sees| if sees { 0.0 } else { f32::NEG_INFINITY })
            .collect();
        let mask = Tensor::from_vec(mask, (1, length, length), q.device())?;
        Ok(candle_nn::ops::softmax_last_dim(&scores.broadcast_add(&mask)?)?)
    }
}

pub(super) fn attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    documents: &[Range<usize>],
    heads: Heads,
) -> Result<Tensor> {
    let outputs = documents.iter().map(|document| {
        let (q, k, v) = (heads.split(q, document)?, heads.split(k, document)?, heads.split(v, document)?);
        heads.join(&heads.probabilities(&q, &k)?.matmul(&v)?, heads.query)
    });
    Ok(Tensor::cat(&outputs.collect::<Result<Vec<_>>>()?, 0)?)
}

pub(super) fn attention_of_one(q: &Tensor, k: &Tensor, v: &Tensor, heads: Heads) -> Result<Tensor> {
    let all = 0..k.dims()[0];
    let (q, k, v) = (heads.split(q, &(0..1))?, heads.split(k, &all)?, heads.split(v, &all)?);
    let scores = (q.matmul(&k.t()?)? * (1.0 / (heads.dim as f64).sqrt()))?;
    heads.join(&candle_nn::ops::softmax_last_dim(&scores)?.matmul(&v)?, heads.query)
}

pub(super) fn attention_backward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    documents: &[Range<usize>],
    heads: Heads,
    dy: &Tensor,
) -> Result<(Tensor, Tensor, Tensor)> {
    let scale = 1.0 / (heads.dim as f64).sqrt();
    let (mut dqs, mut dks, mut dvs) = (Vec::new(), Vec::new(), Vec::new());
    for document in documents {
        let (q, k, v) = (heads.split(q, document)?, heads.split(k, document)?, heads.split(v, document)?);
        let dy = heads.split(dy, document)?;
        let p = heads.probabilities(&q, &k)?;
        let dv = p.t()?.matmul(&dy)?;
        let dp = dy.matmul(&v.t()?)?;
        let mean = dp.mul(&p)?.sum_keepdim(D::Minus1)?;
        let ds = (p.mul(&dp.broadcast_sub(&mean)?)? * scale)?;
        dqs.push(heads.join(&ds.matmul(&k)?, heads.query)?);
        dks.push(heads.join(&ds.t()?.matmul(&q)?, heads.key_value)?);
        dvs.push(heads.join(&dv, heads.key_value)?);
    }
    Ok((Tensor::cat(&dqs, 0)?, Tensor::cat(&dks, 0)?, Tensor::cat(&dvs, 0)?))
}

/// Rows `start..` of `into` plus `scale · h · w`.
pub(super) fn add_product(into: &Tensor, start: usize, h: &Tensor, w: &Tensor, scale: f64) -> Result<Tensor> {
    let part = (h.matmul(w)? * scale)?;
    add_rows(into, start, &part)
}

/// `into` with `x` added to its rows from `start` on.
pub(super) fn add_rows(into: &Tensor, start: usize, x: &Tensor) -> Result<Tensor> {
    let rows = x.dims()[0];
    if rows == into.dims()[0] {
        return Ok(into.add(x)?);
    }
    Ok(into.slice_scatter0(&into.narrow(0, start, rows)?.add(x)?, start)?)
}

/// `x` with `rows` of its rows, from `start` on, multiplied by `factor`.
pub(super) fn scale_rows(x: &Tensor, start: usize, rows: usize, factor: f32) -> Result<Tensor> {
    let scaled = (x.narrow(0, start, rows)? * f64::from(factor))?;
    Ok(x.slice_assign(&[start..start + rows, 0..x.dims2()?.1], &scaled)?)
}

/// The same, column by column.
pub(super) fn scale_columns(x: &Tensor, start: usize, rows: usize, factors: &Tensor) -> Result<Tensor> {
    let scaled = x.narrow(0, start, rows)?.broadcast_mul(factors)?;
    Ok(x.slice_assign(&[start..start + rows, 0..x.dims2()?.1], &scaled)?)
}

/// `x` with its i-th element multiplied by `factor(i)`.
pub(super) fn multiply(x: &Tensor, factor: impl Fn(u64) -> f32) -> Result<Tensor> {
    let factors: Vec<f32> = (0..x.elem_count() as u64).map(factor).collect();
    Ok(x.mul(&Tensor::from_vec(factors, x.shape(), x.device())?)?)
}

pub(super) fn linear_backward(dy: &Tensor, weight: &Weight, into: Option<Tensor>) -> Result<Tensor> {
    let dx = dy.matmul(&weight.to_float32()?)?;
    into.map_or(Ok(dx.clone()), |into| Ok(into.add(&dx)?))
}

pub(super) fn outer(narrow: &Tensor, wide: &Tensor, scale: f64) -> Result<Tensor> {
    Ok((narrow.t()?.matmul(wide)? * scale)?)
}

pub(super) fn gather(x: &Tensor, rows: &[u32]) -> Result<Tensor> {
    let rows = Tensor::from_slice(rows, rows.len(), x.device())?;
    Ok(x.index_select(&rows, 0)?.to_dtype(DType::F32)?)
}

pub(super) fn sum_of_squares(x: &Tensor) -> Result<f64> {
    Ok(f64::from(x.sqr()?.sum_all()?.to_scalar::<f32>()?))
}

/// Each row's negative log-likelihood of its target, and the gradient of their sum by the logits.
pub(super) fn nll_and_gradient(logits: &Tensor, targets: &[u32]) -> Result<(Tensor, Tensor)> {
    let wanted = Tensor::from_slice(targets, (targets.len(), 1), logits.device())?;
    let normaliser = logits.log_sum_exp(D::Minus1)?.unsqueeze(1)?;
    let nll = normaliser.sub(&logits.gather(&wanted, 1)?)?.flatten_all()?;
    let p = logits.broadcast_sub(&normaliser)?.exp()?;
    let minus = Tensor::full(-1f32, (targets.len(), 1), logits.device())?;
    Ok((nll, p.scatter_add(&wanted, &minus, 1)?))
}

pub(super) fn adamw(parameter: &Parameter, factor: f64) -> Result<[Tensor; 3]> {
    let Parameter { weight, gradient, first, second, step } = *parameter;
    let g = (gradient * factor)?;
    let first = ((first * step.beta1)? + (&g * (1.0 - step.beta1))?)?;
    let second = ((second * step.beta2)? + (g.sqr()? * (1.0 - step.beta2))?)?;
    let denominator = ((second.sqrt()? / step.correction2)? + step.epsilon)?;
    let update = (first.div(&denominator)? * step.rate)?;
    Ok([((weight * step.decay)? - update)?, first, second])
}
