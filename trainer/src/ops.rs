//! The operations of a training step, each with its backward written by hand. No graph is kept: a backward
//! takes what its forward took and the gradient by the output. Activations are `[tokens, features]`, the rows
//! of all documents one after the other.

use crate::error::Result;
use crate::model::Base;
use candle_core::{D, DType, Device, Tensor};
use std::ops::Range;

/// RMSNorm: `x · w / √(mean(x²) + eps)`; `x` `[tokens, hidden]`, `weight` `[hidden]`.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    Ok(x.broadcast_mul(&inverse_rms(x, eps)?)?.broadcast_mul(weight)?)
}

/// The gradient of [`rms_norm`] by `x`: with r = 1/√(mean(x²)+eps) and g = dy·w,
/// dx = r·g − x·r³·mean(g·x).
pub fn rms_norm_backward(x: &Tensor, weight: &Tensor, eps: f64, dy: &Tensor) -> Result<Tensor> {
    let r = inverse_rms(x, eps)?;
    let g = dy.broadcast_mul(weight)?;
    let mean = g.mul(x)?.mean_keepdim(D::Minus1)?;
    let pull = mean.mul(&r)?.mul(&r)?.mul(&r)?;
    Ok(g.broadcast_mul(&r)?.sub(&x.broadcast_mul(&pull)?)?)
}

fn inverse_rms(x: &Tensor, eps: f64) -> Result<Tensor> {
    Ok((x.sqr()?.mean_keepdim(D::Minus1)? + eps)?.sqrt()?.recip()?)
}

/// SwiGLU: `silu(gate) · up`, all `[tokens, intermediate]`.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    Ok(gate.silu()?.mul(up)?)
}

/// The gradients of [`swiglu`] by `gate` and `up`: with s = σ(gate),
/// dgate = dy·up·s·(1 + gate·(1−s)), dup = dy·gate·s.
pub fn swiglu_backward(gate: &Tensor, up: &Tensor, dy: &Tensor) -> Result<(Tensor, Tensor)> {
    let s = (gate.neg()?.exp()? + 1.0)?.recip()?;
    let slope = ((gate.mul(&(1.0 - &s)?)? + 1.0)?).mul(&s)?;
    let d_up = dy.mul(gate)?.mul(&s)?;
    Ok((dy.mul(up)?.mul(&slope)?, d_up))
}

/// Cosines and sines of the rotary embedding for each token of a step, `[tokens, 1, head_dim / 2]`.
pub struct Rotary {
    cos: Tensor,
    sin: Tensor,
}

impl Rotary {
    /// The angles for tokens at `positions`.
    ///
    /// # Errors
    /// The device runs out of memory.
    pub fn new(inverse_frequencies: &[f32], positions: &[u32], device: &Device) -> Result<Self> {
        let half = inverse_frequencies.len();
        let frequencies = Tensor::from_slice(inverse_frequencies, (1, half), device)?;
        let positions: Vec<f32> = positions.iter().map(|p| *p as f32).collect();
        let tokens = positions.len();
        let angles = Tensor::from_vec(positions, (tokens, 1), device)?.broadcast_mul(&frequencies)?;
        let angles = angles.reshape((tokens, 1, half))?;
        Ok(Self { cos: angles.cos()?, sin: angles.sin()? })
    }

    /// Rotates each head of `x` `[tokens, heads · head_dim]`: its first half against its second.
    pub fn forward(&self, x: &Tensor, head_dim: usize) -> Result<Tensor> {
        self.rotate(x, head_dim, &self.sin)
    }

    /// The gradient by the input of [`Rotary::forward`]: the rotation by the opposite angle.
    pub fn backward(&self, dy: &Tensor, head_dim: usize) -> Result<Tensor> {
        self.rotate(dy, head_dim, &self.sin.neg()?)
    }

    fn rotate(&self, x: &Tensor, head_dim: usize, sin: &Tensor) -> Result<Tensor> {
        let (tokens, width) = x.dims2()?;
        let half = head_dim / 2;
        let heads = x.reshape((tokens, width / head_dim, head_dim))?;
        let (a, b) = (heads.narrow(2, 0, half)?, heads.narrow(2, half, half)?);
        let first = a.broadcast_mul(&self.cos)?.sub(&b.broadcast_mul(sin)?)?;
        let second = b.broadcast_mul(&self.cos)?.add(&a.broadcast_mul(sin)?)?;
        Ok(Tensor::cat(&[first, second], 2)?.reshape((tokens, width))?)
    }
}

/// Head counts and width of an attention layer.
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    /// Query heads.
    pub query: usize,
    /// Key and value heads.
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
            .map(|i| if i % length > i / length { f32::NEG_INFINITY } else { 0.0 })
            .collect();
        let mask = Tensor::from_vec(mask, (1, length, length), q.device())?;
        Ok(candle_nn::ops::softmax_last_dim(&scores.broadcast_add(&mask)?)?)
    }
}

/// Causal attention within each document: `q` `[tokens, query heads · dim]`, `k` and `v`
/// `[tokens, key-value heads · dim]` → `[tokens, query heads · dim]`. No token sees another document.
pub fn attention(
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

/// The gradients of [`attention`] by `q`, `k`, `v`. Probabilities are computed again rather than kept.
pub fn attention_backward(
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

/// Rows that go through the output head at a time: bounds the `[rows, vocab]` tensors of the loss.
const HEAD_CHUNK: usize = 256;

/// Cross-entropy of the next token: `hidden` `[targets, hidden]` are the states that predict `targets`.
/// Returns each target's negative log-likelihood and, if asked, the gradient of their sum by `hidden`.
/// At most 256 rows of logits exist at a time.
pub fn cross_entropy(
    hidden: &Tensor,
    targets: &[u32],
    base: &Base,
    gradient: bool,
) -> Result<(Vec<f32>, Option<Tensor>)> {
    let eps = base.config.rms_norm_eps;
    let mut nll = Vec::with_capacity(targets.len());
    let mut gradients = Vec::new();
    for (i, chunk) in targets.chunks(HEAD_CHUNK).enumerate() {
        let x = hidden.narrow(0, i * HEAD_CHUNK, chunk.len())?;
        let logits = rms_norm(&x, &base.norm, eps)?.matmul(&base.head.t()?)?;
        let wanted = Tensor::from_slice(chunk, (chunk.len(), 1), hidden.device())?;
        let normaliser = logits.log_sum_exp(D::Minus1)?.unsqueeze(1)?;
        let rows = normaliser.sub(&logits.gather(&wanted, 1)?)?.flatten_all()?;
        nll.extend(rows.to_vec1::<f32>()?);
        if gradient {
            let p = logits.broadcast_sub(&normaliser)?.exp()?;
            let minus = Tensor::full(-1f32, (chunk.len(), 1), hidden.device())?;
            let d_logits = p.scatter_add(&wanted, &minus, 1)?;
            gradients.push(rms_norm_backward(&x, &base.norm, eps, &d_logits.matmul(&base.head)?)?);
        }
    }
    let gradient = match (gradient, gradients.is_empty()) {
        (false, _) => None,
        (true, false) => Some(Tensor::cat(&gradients, 0)?),
        (true, true) => Some(Tensor::zeros((0, base.config.hidden_size), DType::F32, hidden.device())?),
    };
    Ok((nll, gradient))
}
