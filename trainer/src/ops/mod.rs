//! The operations of a training step, each with its backward written by hand. No graph is kept: a backward
//! takes what its forward took and the gradient by the output. Activations are `[tokens, features]`, the rows
//! of all documents one after the other.
//!
//! Every operation has up to three forms: `plain`, tensor formulas for any device, which is the definition; `cpu`, the
//! same in one pass over memory; and `gpu`, kernels and cuBLAS. Tests hold the others against the
//! first.
//!
//! On the CPU all numbers are float32. On a GPU activations and the gradients by them are in the base's compute type
//! ([`Base::compute_dtype`]).
//!
//! An argument taken by value may be changed in place and become the result: nobody else may hold its storage.

mod branch;
mod cpu;
#[cfg(any(feature = "cuda", test))]
mod gpu;
mod head_norm;
mod plain;
#[cfg(test)]
mod tests;

pub use head_norm::{head_norm, head_norm_backward, head_norm_weight_gradient};

use crate::error::Result;
use crate::model::Base;
use crate::rng;
use crate::weight::Weight;
use candle_core::{DType, Device, Tensor};
use std::ops::Range;
#[cfg(any(feature = "cuda", test))]
use std::sync::OnceLock;

pub use branch::{Branch, Branches, branched_attention};
#[cfg(any(feature = "cuda", test))]
pub(crate) use gpu::{incoming, nf4};
#[cfg(feature = "cuda")]
pub(crate) use gpu::{sum_in_float32, timed};

/// Whether a device's activations are in the base's numbers and its operations are kernels.
pub(crate) fn on_gpu(device: &Device) -> bool {
    #[cfg(any(feature = "cuda", test))]
    return gpu::runs(device);
    #[cfg(not(any(feature = "cuda", test)))]
    return !device.is_cpu();
}

/// The form of an operation for the device that a tensor is on.
macro_rules! on {
    ($tensor:expr, cpu: $cpu:expr, gpu: $gpu:expr, plain: $plain:expr $(,)?) => {{
        #[cfg(any(feature = "cuda", test))]
        if gpu::has($tensor) {
            return $gpu;
        }
        if cpu::has($tensor) {
            return $cpu;
        }
        $plain
    }};
}

/// `into + x`, same shapes.
pub fn add(into: Tensor, x: &Tensor) -> Result<Tensor> {
    add_rows(into, 0, x)
}

/// `into` with `x` added to its rows from `start` on.
pub fn add_rows(into: Tensor, start: usize, x: &Tensor) -> Result<Tensor> {
    on!(
        &into,
        cpu: cpu::elementwise::add_rows(into, start, x),
        gpu: gpu::elementwise::add_rows(into, start, x),
        plain: plain::add_rows(&into, start, x),
    )
}

/// `x` with `rows` of its rows, from `start` on, multiplied by `factor`.
pub fn scale_rows(x: Tensor, start: usize, rows: usize, factor: f32) -> Result<Tensor> {
    on!(
        &x,
        cpu: cpu::elementwise::scale_rows(x, start, rows, factor),
        gpu: gpu::elementwise::scale_rows(x, start, rows, factor),
        plain: plain::scale_rows(&x, start, rows, factor),
    )
}

/// `x` with `bias` `[width]` added to each of its rows.
pub fn add_bias(x: Tensor, bias: &Tensor) -> Result<Tensor> {
    on!(
        &x,
        cpu: cpu::elementwise::add_bias(x, bias),
        gpu: gpu::elementwise::add_bias(x, bias),
        plain: Ok(x.broadcast_add(bias)?),
    )
}

/// Dropout: `x` with each element 0 with a probability, else times 1/(1 − probability). Element i goes by the number
/// `first + i` of the stream `key` ([`crate::rng`]).
pub fn dropout(x: &Tensor, key: u64, first: u64, probability: f64) -> Result<Tensor> {
    let keep = (1.0 / (1.0 - probability)) as f32;
    let factor = |i: u64| if rng::uniform(key, first + i) < probability { 0.0 } else { keep };
    on!(
        x,
        cpu: cpu::elementwise::multiply(x, factor),
        gpu: gpu::elementwise::dropout(x, key, first, probability, keep),
        plain: plain::multiply(x, factor),
    )
}

/// RMSNorm: `x · w / √(mean(x²) + eps)`; `x` `[tokens, hidden]`, `weight` `[hidden]`.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    on!(
        x,
        cpu: cpu::elementwise::rms_norm(x, weight, eps),
        gpu: gpu::elementwise::rms_norm(x, weight, eps),
        plain: plain::rms_norm(x, weight, eps),
    )
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
    on!(
        x,
        cpu: cpu::elementwise::add_rms_norm_backward(into, x, weight, eps, dy),
        gpu: gpu::elementwise::add_rms_norm_backward(into, x, weight, eps, dy),
        plain: Ok(into.add(&plain::rms_norm_backward(x, weight, eps, dy)?)?),
    )
}

/// The gradient of [`rms_norm`] by `weight`, in float32: Σ dy·x/√(mean(x²) + eps) over the rows.
pub fn rms_norm_weight_gradient(x: &Tensor, eps: f64, dy: &Tensor) -> Result<Tensor> {
    let ones = Tensor::ones(x.dims2()?.1, DType::F32, x.device())?;
    let normed = rms_norm(x, &ones, eps)?.to_dtype(DType::F32)?;
    Ok(normed.mul(&dy.to_dtype(DType::F32)?)?.sum(0)?)
}

/// SwiGLU: `silu(gate) · up`, all `[tokens, intermediate]`.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    on!(
        gate,
        cpu: cpu::elementwise::swiglu(gate, up),
        gpu: gpu::elementwise::swiglu(gate, up),
        plain: plain::swiglu(gate, up),
    )
}

/// The gradients of [`swiglu`] by `gate` and `up`: with s = σ(gate),
/// dgate = dy·up·s·(1 + gate·(1−s)), dup = dy·gate·s. `activated`, what [`swiglu`] returned, gives its memory.
pub fn swiglu_backward(
    gate: &Tensor,
    up: &Tensor,
    activated: Tensor,
    dy: Tensor,
) -> Result<(Tensor, Tensor)> {
    on!(
        gate,
        cpu: cpu::elementwise::swiglu_backward(gate, up, activated, dy),
        gpu: gpu::elementwise::swiglu_backward(gate, up, activated, dy),
        plain: plain::swiglu_backward(gate, up, &dy),
    )
}

/// The rotary embedding of a step's tokens.
pub struct Rotary {
    /// Cosines and sines by position from the first one on, `[positions, head_dim / 2]`; on a GPU by token.
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
        #[cfg(any(feature = "cuda", test))]
        if gpu::runs(device) {
            let (cos, sin) = gpu::elementwise::rotary_table(inverse_frequencies, positions, device)?;
            return Ok(Self { cos, sin, positions: Vec::new() });
        }
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
        on!(
            &x,
            cpu: cpu::elementwise::rotate(x, head_dim, table, &self.positions, sign),
            gpu: gpu::elementwise::rotate(x, head_dim, table, sign),
            plain: plain::rotate(&x, head_dim, table, &self.positions, sign),
        )
    }
}

/// Head counts and width of an attention layer, and how far its queries see.
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    /// Query heads.
    pub query: usize,
    /// Key and value heads; they divide the query heads.
    pub key_value: usize,
    /// Width of a head.
    pub dim: usize,
    /// How many keys a query sees at most, its own among them; `None` for all before it.
    pub window: Option<usize>,
}

impl Heads {
    /// Those of a base's layer.
    pub fn of(base: &Base, layer: usize) -> Self {
        let (c, window) = (&base.config, base.layers[layer].window);
        Self { query: c.num_attention_heads, key_value: c.num_key_value_heads, dim: c.head_dim, window }
    }

    /// The first key that a query sees, both counted from their document's first token.
    fn first_key(&self, query: usize) -> usize {
        self.window.map_or(0, |window| (query + 1).saturating_sub(window))
    }
}

/// The documents of a pass, for all of its layers, forward and backward.
#[derive(Debug)]
pub struct Documents {
    ranges: Vec<Range<usize>>,
    /// What a GPU's kernels are told of them, once one has asked.
    #[cfg(any(feature = "cuda", test))]
    tiles: OnceLock<Tensor>,
}

impl Documents {
    /// Of these ranges of tokens, which cover all tokens, in order.
    pub fn new(ranges: Vec<Range<usize>>) -> Self {
        Self {
            ranges,
            #[cfg(any(feature = "cuda", test))]
            tiles: OnceLock::new(),
        }
    }
}

/// Causal attention within each document, as far back as the heads' window: `q` `[tokens, query heads · dim]`, `k` and `v`
/// `[tokens, key-value heads · dim]` → `[tokens, query heads · dim]`. No token sees another document.
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, documents: &Documents, heads: Heads) -> Result<Tensor> {
    on!(
        q,
        cpu: cpu::attention::forward(q, k, v, &documents.ranges, heads),
        gpu: gpu::attention::forward(q, k, v, documents, heads),
        plain: plain::attention(q, k, v, &documents.ranges, heads),
    )
}

/// Attention of one token, `q` `[1, query heads · dim]`, the last of those whose `k` and `v`
/// `[tokens, key-value heads · dim]` are.
pub fn attention_of_one(q: &Tensor, k: &Tensor, v: &Tensor, heads: Heads) -> Result<Tensor> {
    let tokens = k.dims()[0];
    let first = heads.first_key(tokens - 1);
    let seen = |t: &Tensor| t.narrow(0, first, tokens - first);
    plain::attention_of_one(q, &seen(k)?, &seen(v)?, heads)
}

/// The gradients of [`attention`] by `q`, `k`, `v`. Probabilities are computed again rather than kept.
pub fn attention_backward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    documents: &Documents,
    heads: Heads,
    dy: &Tensor,
) -> Result<(Tensor, Tensor, Tensor)> {
    on!(
        q,
        cpu: cpu::attention::backward(q, k, v, &documents.ranges, heads, dy),
        gpu: gpu::attention::backward(q, k, v, documents, heads, dy),
        plain: plain::attention_backward(q, k, v, &documents.ranges, heads, dy),
    )
}

/// The sum of the squares of each row of a frozen matrix, `[rows]`.
pub fn row_squares(weight: &Weight) -> Result<Tensor> {
    #[cfg(any(feature = "cuda", test))]
    if gpu::runs(weight.device()) {
        return gpu::frozen::row_squares(weight);
    }
    cpu::frozen::row_squares(weight)
}

/// `x` with `rows` of its rows, from `start` on, multiplied column by column by `factors` `[width]`.
pub fn scale_columns(x: Tensor, start: usize, rows: usize, factors: &Tensor) -> Result<Tensor> {
    on!(
        &x,
        cpu: cpu::elementwise::scale_columns(x, start, rows, factors),
        gpu: gpu::elementwise::scale_columns(x, start, rows, factors),
        plain: plain::scale_columns(&x, start, rows, factors),
    )
}

/// A frozen linear layer: `x` `[tokens, in]` · `weight`ᵀ, `weight` `[out, in]`, with results in `dtype`. On the CPU,
/// weights in fewer bits are brought to float32 a few rows at a time; on a GPU, those in 4 bits to the numbers of `x`,
/// a matrix at a time.
pub fn linear(x: &Tensor, weight: &Weight, dtype: DType) -> Result<Tensor> {
    on!(
        x,
        cpu: cpu::frozen::product(x, weight, true, None),
        gpu: gpu::frozen::linear(x, weight, dtype),
        plain: Ok(x.matmul(&weight.to_float32()?.t()?)?.to_dtype(dtype)?),
    )
}

/// The gradient of [`linear`] by `x`: `dy` `[tokens, out]` · `weight`, added to `into` if there is one.
pub fn linear_backward(dy: &Tensor, weight: &Weight, into: Option<Tensor>) -> Result<Tensor> {
    on!(
        dy,
        cpu: cpu::frozen::product(dy, weight, false, into),
        gpu: gpu::frozen::linear_backward(dy, weight, into),
        plain: plain::linear_backward(dy, weight, into),
    )
}

/// The gradient of [`linear`] by a weight that is trained, in float32: `dy`ᵀ` · x`, `[out, in]`, added to `into` if there
/// is one.
pub fn linear_weight_gradient(into: Option<Tensor>, x: &Tensor, dy: &Tensor) -> Result<Tensor> {
    let turned = dy.to_dtype(DType::F32)?.t()?.contiguous()?;
    linear_backward(&turned, &Weight::Dense(x.to_dtype(DType::F32)?), into)
}

/// The gradient of [`gather`] where a row may be named more than once, in float32: each row of `dy` is added to its row
/// of `into`.
pub fn scatter_add(into: Tensor, dy: &Tensor, rows: &[u32]) -> Result<Tensor> {
    let rows = upload(rows, dy.device())?;
    Ok(into.index_add(&rows, &dy.to_dtype(DType::F32)?.contiguous()?, 0)?)
}

/// A vector of numbers on a device. A GPU is not waited for.
fn upload(values: &[u32], device: &Device) -> Result<Tensor> {
    #[cfg(any(feature = "cuda", test))]
    if gpu::runs(device) {
        return gpu::upload(values, device);
    }
    Ok(Tensor::from_slice(values, values.len(), device)?)
}

/// Has `f` read the elements of a float32 tensor on the CPU, where they are.
pub(crate) fn with_elements<T>(t: &Tensor, f: impl FnOnce(&[f32]) -> Result<T>) -> Result<T> {
    cpu::read([t], |[elements]| f(elements))
}

/// The product with an adapter's narrow side: `x` `[tokens, width]` · `a`ᵀ, `a` `[rank, width]`.
pub fn project(x: &Tensor, a: &Tensor) -> Result<Tensor> {
    on!(
        x,
        cpu: cpu::low_rank::project(x, a, true),
        gpu: gpu::low_rank::project(x, a, true),
        plain: Ok(x.matmul(&a.t()?)?),
    )
}

/// [`project`] with `a` given as its transpose, `[width, rank]`.
pub fn project_transposed(x: &Tensor, a: &Tensor) -> Result<Tensor> {
    on!(
        x,
        cpu: cpu::low_rank::project(x, a, false),
        gpu: gpu::low_rank::project(x, a, false),
        plain: Ok(x.matmul(a)?),
    )
}

/// A low-rank product added to some rows: rows `start..start + tokens` of `into` `[_, width]` get
/// `scale · h · w`, `h` `[tokens, rank]`, `w` `[rank, width]`.
pub fn add_product(into: Tensor, start: usize, h: &Tensor, w: &Tensor, scale: f64) -> Result<Tensor> {
    on!(
        &into,
        cpu: cpu::low_rank::add_product(into, start, h, w, false, scale),
        gpu: gpu::low_rank::add_product(into, start, h, w, false, scale),
        plain: plain::add_product(&into, start, h, w, scale),
    )
}

/// [`add_product`] with `w` given as its transpose, `[width, rank]`.
pub fn add_product_transposed(
    into: Tensor,
    start: usize,
    h: &Tensor,
    w: &Tensor,
    scale: f64,
) -> Result<Tensor> {
    on!(
        &into,
        cpu: cpu::low_rank::add_product(into, start, h, w, true, scale),
        gpu: gpu::low_rank::add_product(into, start, h, w, true, scale),
        plain: plain::add_product(&into, start, h, &w.t()?, scale),
    )
}

/// A sum of outer products over tokens: `scale · narrow`ᵀ` · wide`, `[tokens, rank]` and `[tokens, width]` →
/// `[rank, width]`, in float32.
pub fn outer(narrow: &Tensor, wide: &Tensor, scale: f64) -> Result<Tensor> {
    on!(
        wide,
        cpu: cpu::low_rank::outer(narrow, wide, scale),
        gpu: gpu::low_rank::outer(narrow, wide, scale),
        plain: plain::outer(narrow, wide, scale),
    )
}

/// The transpose of [`outer`], `[width, rank]`.
pub fn outer_transposed(narrow: &Tensor, wide: &Tensor, scale: f64) -> Result<Tensor> {
    on!(
        wide,
        cpu: cpu::low_rank::outer_transposed(narrow, wide, scale),
        gpu: gpu::low_rank::outer(wide, narrow, scale),
        plain: plain::outer(wide, narrow, scale),
    )
}

/// The numbers of an AdamW step that are the same for all elements.
#[derive(Debug, Clone, Copy)]
pub struct AdamWStep {
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

/// A parameter in an AdamW step; all tensors are float32.
#[derive(Debug, Clone, Copy)]
pub struct Parameter<'a> {
    /// Its value.
    pub weight: &'a Tensor,
    /// Its accumulated gradient.
    pub gradient: &'a Tensor,
    /// Its first moment.
    pub first: &'a Tensor,
    /// Its second moment.
    pub second: &'a Tensor,
    /// The step's numbers. Among the parameters of a step only decay and rate may differ, and only three of each.
    pub step: &'a AdamWStep,
}

/// One AdamW step of a parameter on the CPU: its new weight, first moment and second moment. With g = factor·gradient,
/// m' = beta1·m + (1−beta1)·g, v' = beta2·v + (1−beta2)·g²,
/// w' = decay·w − rate·m' / (√v' / correction2 + epsilon).
pub fn adamw(parameter: &Parameter, factor: f64) -> Result<[Tensor; 3]> {
    if cpu::has(parameter.weight) {
        return cpu::adamw::adamw(parameter, factor);
    }
    plain::adamw(parameter, factor)
}

/// An AdamW step on a GPU, for which all memory is there.
pub(crate) struct Ahead {
    /// The parameters' new weights, which nothing has written yet.
    pub(crate) weights: Vec<Tensor>,
    /// Has the GPU write them, and change the moments where they lie.
    pub(crate) launch: Box<dyn Fn() -> Result<()>>,
}

/// [`adamw`] of all parameters at once, ahead of what it depends on: their factor is what `divisor` and clipping to
/// `max_norm` (0 clips nothing) make of the first of `sums`, Σ gradient², and unless that and the second are finite,
/// nothing changes and the new weights mean nothing. Both are vectors of one number in float64, which the GPU may still
/// compute. `None` on the CPU, which knows them.
pub(crate) fn adamw_ahead(
    parameters: &[Parameter],
    sums: [&Tensor; 2],
    divisor: f64,
    max_norm: f64,
) -> Result<Option<Ahead>> {
    #[cfg(any(feature = "cuda", test))]
    if parameters.first().is_some_and(|one| gpu::has(one.weight)) {
        return gpu::many::adamw(parameters, sums, divisor, max_norm).map(Some);
    }
    let _ = (parameters, sums, divisor, max_norm);
    Ok(None)
}

/// Σ x² over all elements of some tensors, the partial sums in float64.
pub fn sum_of_squares(tensors: &[&Tensor]) -> Result<f64> {
    Ok(read(join(&[squares(tensors)?])?.as_ref())?[0])
}

/// [`sum_of_squares`] as a vector of one number in float64, which a GPU may still compute.
pub(crate) fn squares(tensors: &[&Tensor]) -> Result<Tensor> {
    let known = |sum: Result<f64>| -> Result<Tensor> { Ok(Tensor::new(&[sum?], &Device::Cpu)?) };
    let Some(one) = tensors.first() else { return known(Ok(0.0)) };
    on!(
        one,
        cpu: known(tensors.iter().map(|x| cpu::adamw::sum_of_squares(x)).sum()),
        gpu: gpu::many::sum_of_squares(tensors),
        plain: known(tensors.iter().map(|x| plain::sum_of_squares(x)).sum()),
    )
}

/// The numbers of some vectors, one after the other, in one vector in float64, which a GPU may still compute. `None` of
/// none.
pub(crate) fn join(vectors: &[Tensor]) -> Result<Option<Tensor>> {
    let Some(one) = vectors.first() else { return Ok(None) };
    let all = vectors.iter().map(|t| t.to_device(one.device())?.to_dtype(DType::F64));
    Ok(Some(Tensor::cat(&all.collect::<candle_core::Result<Vec<_>>>()?, 0)?))
}

/// The numbers that were joined. A GPU is waited for, and asked for no memory.
pub(crate) fn read(joined: Option<&Tensor>) -> Result<Vec<f64>> {
    let Some(all) = joined else { return Ok(Vec::new()) };
    #[cfg(any(feature = "cuda", test))]
    if gpu::has(all) {
        return gpu::read(all);
    }
    Ok(all.to_vec1()?)
}

/// float32 tensors in the numbers of a pass.
pub fn cast(tensors: &[&Tensor], dtype: DType) -> Result<Vec<Tensor>> {
    #[cfg(any(feature = "cuda", test))]
    if dtype != DType::F32 && tensors.first().is_some_and(|t| gpu::has(t)) {
        return gpu::many::cast(tensors, dtype);
    }
    tensors.iter().map(|t| Ok(t.to_dtype(dtype)?)).collect()
}

/// The rows of `x` `[_, width]` that `rows` names, in that order; on the CPU in float32.
pub fn gather(x: &Tensor, rows: &[u32]) -> Result<Tensor> {
    on!(
        x,
        cpu: cpu::elementwise::gather(x, rows),
        gpu: gpu::elementwise::gather(x, rows),
        plain: plain::gather(x, rows),
    )
}

/// The gradient of [`gather`]: `dy`'s rows at their places among `tokens` rows, zeros elsewhere. No row is
/// named twice.
pub fn scatter(dy: &Tensor, rows: &[u32], tokens: usize) -> Result<Tensor> {
    let zeros = Tensor::zeros((tokens, dy.dims2()?.1), dy.dtype(), dy.device())?;
    on!(
        dy,
        cpu: cpu::elementwise::scatter(zeros, dy, rows),
        gpu: gpu::elementwise::scatter(zeros, dy, rows),
        plain: Ok(zeros.index_add(&Tensor::from_slice(rows, rows.len(), dy.device())?, dy, 0)?),
    )
}

/// Each row's negative log-likelihood of its target, and the gradient of their sum by the logits,
/// softmax − one-hot; `logits` `[targets, vocab]` in float32, the first result `[targets]`.
pub fn nll_and_gradient(logits: Tensor, targets: &[u32]) -> Result<(Tensor, Tensor)> {
    on!(
        &logits,
        cpu: cpu::loss::nll_and_gradient(logits, targets),
        gpu: gpu::elementwise::nll_and_gradient(logits, targets),
        plain: plain::nll_and_gradient(&logits, targets),
    )
}
