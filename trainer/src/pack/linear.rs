//! The linear layers: the frozen products, and for each trial's rows its adapter or its own copy of the layer.

use super::segment::{Segment, Share, part, runs};
use crate::error::Result;
use crate::lora::{Adapter, accumulate};
use crate::model::Linear;
use crate::ops;
use crate::saved::{Kind, Run, by_runs};
use candle_core::{DType, Tensor};
use std::borrow::Borrow;

/// `x · Wᵀ` once for all rows but those of trials with a W of their own, plus each trial's low-rank product for its own
/// rows, plus the bias, which magnitudes leave alone. `number` is the layer's among all
/// linear layers; `x` holds the rows from `first` on of all that go through it. The results are in `dtype`.
pub(super) fn linear<A: Borrow<Adapter>>(
    linear: &Linear,
    number: usize,
    x: &Tensor,
    first: usize,
    dtype: DType,
    segments: &[Segment<A>],
) -> Result<Tensor> {
    let block = first..first + x.dims()[0];
    let runs = runs(segments, Kind::Linear(number), block.clone());
    let mut y =
        by_runs(x, &runs, |x, run| ops::linear(x, run.weight(segments).unwrap_or(&linear.weight), dtype))?;
    for segment in segments {
        let Some(share) = segment.share(number, block.clone()) else { continue };
        let x = x.narrow(0, share.start, share.rows)?;
        let working = &segment.working[share.module];
        let dropped = segment.adapter.borrow().dropped(share.module, &x, share.mask)?;
        y = working.add(false, &x, y, share.start)?;
        y = match (&working.columns, dropped) {
            (None, dropped) => working.add(true, dropped.as_ref().unwrap_or(&x), y, share.start)?,
            (Some(columns), None) => {
                let y = working.add(true, &x, y, share.start)?;
                ops::scale_columns(y, share.start, share.rows, &columns.factor)?
            }
            (Some(columns), Some(dropped)) => {
                let frozen =
                    working.add(false, &dropped, ops::linear(&dropped, &linear.weight, dtype)?, 0)?;
                let product = working.add(true, &dropped, frozen.zeros_like()?, 0)?;
                let frozen = ops::scale_columns(frozen, 0, share.rows, &columns.surplus)?;
                let product = ops::scale_columns(product, 0, share.rows, &columns.factor)?;
                ops::add_rows(ops::add_rows(y, share.start, &frozen)?, share.start, &product)?
            }
        };
    }
    let Some(bias) = &linear.bias else { return Ok(y) };
    if let [Run { owner: None, .. }] = runs.as_slice() {
        return ops::add_bias(y, bias);
    }
    by_runs(&y, &runs, |y, run| {
        let own = run.owner.map(|(trial, copy)| &segments[trial].adapter.borrow().saved[copy]);
        ops::add_bias(y.force_contiguous()?, own.and_then(|module| module.bias.as_ref()).unwrap_or(bias))
    })
}

/// `dy · W` once for all rows (a frozen weight has no gradient of its own), plus each trial's part, added to
/// `into` if there is one.
pub(super) fn linear_backward(
    linear: &Linear,
    number: usize,
    x: &Tensor,
    first: usize,
    dy: &Tensor,
    into: Option<Tensor>,
    segments: &mut [Segment<&mut Adapter>],
) -> Result<Tensor> {
    let (dz, narrow) = adapters_backward(linear, number, x, first, dy, segments)?;
    copies_backward(number, x, first, dy, segments)?;
    let runs = runs(segments, Kind::Linear(number), first..first + x.dims()[0]);
    let mut into = into;
    let mut dx = by_runs(dz.as_ref().unwrap_or(dy), &runs, |dy, run| {
        let weight = run.weight(segments).unwrap_or(&linear.weight);
        ops::linear_backward(dy, weight, part(&mut into, run, runs.len())?)
    })?;
    for Narrow { segment, share, dh, dropped } in narrow {
        let Segment { adapter, working, .. } = &segments[segment];
        let working = &working[share.module];
        dx = adapter.add_input_gradient(share.module, working, &dh, dx, share.start, share.mask)?;
        if let Some(dropped) = dropped {
            let part = adapter.dropped_backward(share.module, dropped, share.mask)?;
            dx = ops::add_rows(dx, share.start, &part)?;
        }
    }
    Ok(dx)
}

/// Adds the gradients by the trials' own copies of linear layer `number`, whose output has the gradient `dy`.
pub(super) fn copies_backward(
    number: usize,
    x: &Tensor,
    first: usize,
    dy: &Tensor,
    segments: &mut [Segment<&mut Adapter>],
) -> Result<()> {
    for Run { rows, owner } in runs(segments, Kind::Linear(number), first..first + x.dims()[0]) {
        let Some((trial, copy)) = owner else { continue };
        let (x, dy) = (x.narrow(0, rows.start, rows.len())?, dy.narrow(0, rows.start, rows.len())?);
        let module = &mut segments[trial].adapter.saved[copy];
        let sum = module.grad_weight.take();
        module.grad_weight = Some(ops::linear_weight_gradient(sum, &x, &dy)?);
        if module.bias.is_some() {
            accumulate(&mut module.grad_bias, dy.to_dtype(DType::F32)?.sum(0)?)?;
        }
    }
    Ok(())
}

/// A gradient on the narrow side of a trial's adapter.
pub(super) struct Narrow {
    segment: usize,
    share: Share,
    /// `[rows, rank]` of each of its products.
    dh: Vec<Tensor>,
    /// `[rows, in]`: with magnitudes and dropout, the gradient by what the frozen product saw of the dropped input.
    dropped: Option<Tensor>,
}

/// Adds the gradients of the trials' adapters of linear layer `number`, whose output has the gradient `dy`. Where a
/// trial has magnitudes and no dropout, the gradient before them comes back too: it is what goes on through the frozen product.
pub(super) fn adapters_backward(
    linear: &Linear,
    number: usize,
    x: &Tensor,
    first: usize,
    dy: &Tensor,
    segments: &mut [Segment<&mut Adapter>],
) -> Result<(Option<Tensor>, Vec<Narrow>)> {
    let mut dz: Option<Tensor> = None;
    let mut narrow = Vec::with_capacity(segments.len());
    let whole_dy = dy;
    let block = first..first + x.dims()[0];
    for (place, segment) in segments.iter_mut().enumerate() {
        let Some(share) = segment.share(number, block.clone()) else { continue };
        let (x, dy) = (x.narrow(0, share.start, share.rows)?, dy.narrow(0, share.start, share.rows)?);
        let working = &segment.working[share.module];
        let (mut d_product, mut d_initial, mut d_dropped) = (dy.clone(), dy.clone(), None);
        let seen = segment.adapter.dropped(share.module, &x, share.mask)?;
        let is_dropped = seen.is_some();
        let seen = seen.unwrap_or(x);
        if let Some(columns) = &working.columns {
            // The outputs before the magnitudes were not kept.
            let z = ops::linear(&seen, &linear.weight, seen.dtype())?;
            let z = working.add(true, &seen, working.add(false, &seen, z, 0)?, 0)?;
            segment.adapter.magnitude_backward(share.module, columns, &z, &dy)?;
            drop(z);
            let scaled = |factors| ops::scale_columns(dy.force_contiguous()?, 0, share.rows, factors);
            if is_dropped {
                d_product = scaled(&columns.factor)?;
                let surplus = scaled(&columns.surplus)?;
                let frozen = ops::linear_backward(&surplus, &linear.weight, None)?;
                d_dropped = Some(working.add_initial_backward(&surplus, frozen)?);
            } else {
                let whole = dz.take().map_or_else(|| whole_dy.copy(), Ok)?;
                let whole = ops::scale_columns(whole, share.start, share.rows, &columns.factor)?;
                d_product = whole.narrow(0, share.start, share.rows)?;
                d_initial = d_product.clone();
                dz = Some(whole);
            }
        }
        let dh = segment.adapter.backward(share.module, working, &seen, &d_product, &d_initial)?;
        narrow.push(Narrow { segment: place, share, dh, dropped: d_dropped });
    }
    Ok((dz, narrow))
}
