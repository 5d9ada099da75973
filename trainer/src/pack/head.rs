//! The last norm and the output head: logits, and the loss with its gradient.
//!
//! The rows go through the head in blocks, so that `[targets, vocab]` never exists for long targets. Where a
//! trial adapts the head, each block has its low-rank product, and adds to its gradients, for the trial's rows.

use super::linear::{linear, linear_backward};
use super::segment::{Norm, Segment};
use crate::error::Result;
use crate::lora::Adapter;
use crate::model::Base;
use crate::ops;
use crate::saved::Kind;
use candle_core::{DType, Tensor};
use domain::footprint::logits_block;
use std::borrow::Borrow;
use std::ops::Range;

/// The head's number among the linear layers: it comes last.
fn number(base: &Base) -> usize {
    base.layers.iter().map(|layer| layer.linears.len()).sum()
}

/// The norm before the head.
fn norm(base: &Base) -> Norm<'_> {
    let (weight, number, eps) = (&base.norm, base.last_norm(), base.config.rms_norm_eps);
    Norm { weight, number, eps, of_heads: false }
}

/// The logits `[rows, vocab]` of `hidden` `[rows, hidden]`, the states before the last norm.
pub(super) fn logits<A: Borrow<Adapter>>(
    base: &Base,
    hidden: &Tensor,
    segments: &[Segment<A>],
) -> Result<Tensor> {
    let normed = norm(base).forward(hidden, 0, segments)?;
    linear(&base.head, number(base), &normed, 0, DType::F32, segments)
}

/// The targets of a pass, in blocks.
fn blocks<'a>(base: &Base, targets: &'a [u32]) -> impl Iterator<Item = (usize, &'a [u32])> {
    let block = logits_block(base.config.vocab_size as u64) as usize;
    targets.chunks(block).enumerate().map(move |(i, targets)| (i * block, targets))
}

/// The most bytes that a block holds: its logits and the states around them, and where a trial's head of its own
/// `is_trained` the transpose of the gradient by the logits.
pub(super) fn working_bytes<A: Borrow<Adapter>>(
    base: &Base,
    targets: &[u32],
    segments: &[Segment<A>],
    is_trained: bool,
) -> u64 {
    let largest = blocks(base, targets).next().map_or(0, |(_, block)| block.len());
    let turned = is_trained && segments.iter().any(|segment| segment.has(Kind::Linear(number(base))));
    let logits = (1 + usize::from(turned)) * base.config.vocab_size;
    (4 * largest * (logits + 2 * base.config.hidden_size)) as u64
}

/// Each target's negative log-likelihood; `hidden` `[targets, hidden]` are the states that predict them, before
/// the last norm.
pub(super) fn nll<A: Borrow<Adapter>>(
    base: &Base,
    hidden: &Tensor,
    targets: &[u32],
    segments: &[Segment<A>],
) -> Result<Vec<f32>> {
    let mut nll = Vec::new();
    for (first, targets) in blocks(base, targets) {
        let x = hidden.narrow(0, first, targets.len())?;
        let normed = norm(base).forward(&x, first, segments)?;
        let logits = linear(&base.head, number(base), &normed, first, DType::F32, segments)?;
        nll.push(ops::nll_and_gradient(logits, targets)?.0);
    }
    values(&nll)
}

/// [`nll`], and whether each target is the likeliest token (the first of several as likely).
pub(super) fn nll_and_greedy<A: Borrow<Adapter>>(
    base: &Base,
    hidden: &Tensor,
    targets: &[u32],
    segments: &[Segment<A>],
) -> Result<(Vec<f32>, Vec<bool>)> {
    let (mut nll, mut best) = (Vec::new(), Vec::new());
    for (first, targets) in blocks(base, targets) {
        let x = hidden.narrow(0, first, targets.len())?;
        let normed = norm(base).forward(&x, first, segments)?;
        let logits = linear(&base.head, number(base), &normed, first, DType::F32, segments)?;
        best.extend(logits.argmax(1)?.to_vec1::<u32>()?);
        nll.push(ops::nll_and_gradient(logits, targets)?.0);
    }
    let greedy = best.iter().zip(targets).map(|(best, target)| best == target).collect();
    Ok((values(&nll)?, greedy))
}

/// The numbers of some vectors, one after the other. A GPU is waited for.
pub(super) fn values(vectors: &[Tensor]) -> Result<Vec<f32>> {
    if vectors.is_empty() {
        return Ok(Vec::new());
    }
    Ok(Tensor::cat(vectors, 0)?.to_vec1()?)
}

/// [`nll`] block by block, left on the device, and the gradient of the sum by `hidden`; adds the gradients of the adapters of the head. `scales` are
/// ranges of the targets and what the gradients of each are multiplied by.
pub(super) fn nll_backward(
    base: &Base,
    hidden: &Tensor,
    targets: &[u32],
    scales: &[(Range<usize>, f32)],
    segments: &mut [Segment<&mut Adapter>],
) -> Result<(Vec<Tensor>, Tensor)> {
    let mut nll = Vec::new();
    let mut gradients = Vec::new();
    for (first, targets) in blocks(base, targets) {
        let x = hidden.narrow(0, first, targets.len())?;
        let normed = norm(base).forward(&x, first, segments)?;
        let logits = linear(&base.head, number(base), &normed, first, DType::F32, segments)?;
        let (rows, mut d_logits) = ops::nll_and_gradient(logits, targets)?;
        nll.push(rows);
        for (range, scale) in scales.iter().filter(|(_, scale)| *scale != 1.0) {
            let (start, end) = (range.start.max(first), range.end.min(first + targets.len()));
            if start < end {
                d_logits = ops::scale_rows(d_logits, start - first, end - start, *scale)?;
            }
        }
        d_logits = d_logits.to_dtype(normed.dtype())?;
        let d_normed = linear_backward(&base.head, number(base), &normed, first, &d_logits, None, segments)?;
        gradients.push(norm(base).backward(None, &x, first, &d_normed, segments)?);
    }
    let gradient = match gradients.len() {
        0 => Tensor::zeros((0, base.config.hidden_size), hidden.dtype(), hidden.device())?,
        1 => gradients.remove(0),
        _ => Tensor::cat(&gradients, 0)?,
    };
    Ok((nll, gradient))
}
