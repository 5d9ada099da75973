//! Operations on rows and elements.

use super::{Argument, Grid, Module, VECTOR, empty, launch, pointer, problem, suffix, upload, vector};
use crate::error::Result;
use candle_core::{DType, Device, Tensor};
use std::ops::Range;

const MODULE: Module = Module::Elementwise;

/// Launches the form of a kernel for a tensor's numbers, with a block for each of `rows` rows of `width`.
fn rows(like: &Tensor, name: &str, (rows, width): (usize, usize), arguments: &[Argument]) -> Result<()> {
    let n = vector(like.dtype(), width);
    let kernel = format!("{name}{}", suffix(like.dtype(), n == 1)?);
    launch(like.device(), MODULE, &kernel, Grid::rows(rows, width / n), arguments)
}

/// The same with a thread for each vector of `count` elements, which come in rows of `width`. Some rows of a tensor may
/// begin where no vector does: then each element is a thread's.
fn elements(like: &Tensor, name: &str, (count, width): (usize, usize), arguments: &[Argument]) -> Result<()> {
    let begins = |a: &Argument| !matches!(a, Argument::Pointer(at) if !at.is_multiple_of(VECTOR as u64));
    let n = if arguments.iter().all(begins) { vector(like.dtype(), width) } else { 1 };
    let kernel = format!("{name}{}", suffix(like.dtype(), n == 1)?);
    let mut all = arguments.to_vec();
    all.push(Argument::Count(count as u64));
    launch(like.device(), MODULE, &kernel, Grid::elements(count / n), &all)
}

/// Writes some elements of a tensor, counted row by row, of those that lie at `at` in the numbers of `dtype`.
pub(super) fn convert((at, dtype): (u64, DType), into: &Tensor, range: Range<usize>) -> Result<()> {
    if range.end > into.elem_count() {
        return Err(problem(format!("elements {range:?} of {:?}", into.shape())));
    }
    let out = pointer(into)? + (range.start * into.dtype().size_in_bytes()) as u64;
    let arguments = [Argument::Pointer(at), Argument::Pointer(out), Argument::Count(range.len() as u64)];
    let kernel = format!("convert{}{}", suffix(dtype, false)?, suffix(into.dtype(), false)?);
    launch(into.device(), MODULE, &kernel, Grid::elements(range.len()), &arguments)
}

pub(in crate::ops) fn add_rows(into: Tensor, start: usize, x: &Tensor) -> Result<Tensor> {
    let part = into.narrow(0, start, x.dims()[0])?;
    let count = x.elem_count();
    elements(x, "add", (count, count), &[(&part).try_into()?, (&x.contiguous()?).try_into()?])?;
    Ok(into)
}

pub(in crate::ops) fn scale_rows(x: Tensor, start: usize, rows: usize, factor: f32) -> Result<Tensor> {
    let part = x.narrow(0, start, rows)?;
    let count = part.elem_count();
    elements(&x, "scale", (count, count), &[(&part).try_into()?, Argument::Number(factor)])?;
    Ok(x)
}

pub(in crate::ops) fn scale_columns(
    x: Tensor,
    start: usize,
    count: usize,
    factors: &Tensor,
) -> Result<Tensor> {
    let part = x.narrow(0, start, count)?;
    let width = x.dims2()?.1;
    let arguments = [(&part).try_into()?, factors.try_into()?, Argument::Width(width as u32)];
    rows(&x, "scale_columns", (count, width), &arguments)?;
    Ok(x)
}

pub(in crate::ops) fn add_bias(x: Tensor, bias: &Tensor) -> Result<Tensor> {
    let (count, width) = x.dims2()?;
    let arguments = [(&x).try_into()?, bias.try_into()?, Argument::Width(width as u32)];
    rows(&x, "add_bias", (count, width), &arguments)?;
    Ok(x)
}

pub(in crate::ops) fn dropout(
    x: &Tensor,
    key: u64,
    first: u64,
    probability: f64,
    keep: f32,
) -> Result<Tensor> {
    let (x, y) = (x.contiguous()?, empty(x.shape(), x.dtype(), x.device())?);
    let count = x.elem_count();
    // A number of 53 bits divided by 2⁵³ is below the probability exactly where it is below this.
    let threshold = (probability * (1u64 << 53) as f64).ceil() as u64;
    let arguments = [
        (&x).try_into()?,
        (&y).try_into()?,
        Argument::Count(key),
        Argument::Count(first),
        Argument::Count(threshold),
        Argument::Number(keep),
    ];
    elements(&x, "dropout", (count, count), &arguments)?;
    Ok(y)
}

pub(in crate::ops) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let (x, y) = (x.contiguous()?, empty(x.shape(), x.dtype(), x.device())?);
    let (count, width) = x.dims2()?;
    let arguments = [
        (&x).try_into()?,
        weight.try_into()?,
        (&y).try_into()?,
        Argument::Width(width as u32),
        Argument::Number(eps as f32),
    ];
    rows(&x, "rms_norm", (count, width), &arguments)?;
    Ok(y)
}

pub(in crate::ops) fn add_rms_norm_backward(
    into: Tensor,
    x: &Tensor,
    weight: &Tensor,
    eps: f64,
    dy: &Tensor,
) -> Result<Tensor> {
    let (count, width) = x.dims2()?;
    let arguments = [
        (&into).try_into()?,
        (&x.contiguous()?).try_into()?,
        weight.try_into()?,
        dy.try_into()?,
        Argument::Width(width as u32),
        Argument::Number(eps as f32),
    ];
    rows(x, "rms_norm_backward", (count, width), &arguments)?;
    Ok(into)
}

pub(in crate::ops) fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let y = empty(gate.shape(), gate.dtype(), gate.device())?;
    let count = gate.elem_count();
    elements(gate, "swiglu", (count, count), &[gate.try_into()?, up.try_into()?, (&y).try_into()?])?;
    Ok(y)
}

pub(in crate::ops) fn swiglu_backward(
    gate: &Tensor,
    up: &Tensor,
    activated: Tensor,
    dy: Tensor,
) -> Result<(Tensor, Tensor)> {
    let count = gate.elem_count();
    let arguments = [gate.try_into()?, up.try_into()?, (&activated).try_into()?, (&dy).try_into()?];
    elements(gate, "swiglu_backward", (count, count), &arguments)?;
    Ok((activated, dy))
}

/// Cosines and sines of each token's angles, `[tokens, head_dim / 2]` each.
pub(in crate::ops) fn rotary_table(
    frequencies: &[f32],
    positions: &[u32],
    device: &Device,
) -> Result<(Tensor, Tensor)> {
    let shape = (positions.len(), frequencies.len());
    let (cos, sin) = (empty(shape, DType::F32, device)?, empty(shape, DType::F32, device)?);
    let (positions, frequencies) = (upload(positions, device)?, upload(frequencies, device)?);
    let count = cos.elem_count();
    let arguments = [
        (&positions).try_into()?,
        (&frequencies).try_into()?,
        (&cos).try_into()?,
        (&sin).try_into()?,
        Argument::Width(shape.1 as u32),
        Argument::Count(count as u64),
    ];
    launch(device, MODULE, "rotary_table", Grid::elements(count), &arguments)?;
    Ok((cos, sin))
}

pub(in crate::ops) fn rotate(
    x: Tensor,
    head_dim: usize,
    table: (&Tensor, &Tensor),
    sign: f32,
) -> Result<Tensor> {
    let (tokens, width) = x.dims2()?;
    let arguments = [
        (&x).try_into()?,
        table.0.try_into()?,
        table.1.try_into()?,
        Argument::Width(width as u32),
        Argument::Width(head_dim as u32 / 2),
        Argument::Number(sign),
    ];
    elements(&x, "rotate", (tokens * width / 2, head_dim / 2), &arguments)?;
    Ok(x)
}

pub(in crate::ops) fn gather(x: &Tensor, ids: &[u32]) -> Result<Tensor> {
    let width = x.dims2()?.1;
    let y = empty((ids.len(), width), x.dtype(), x.device())?;
    let places = upload(ids, x.device())?;
    let arguments = [x.try_into()?, (&places).try_into()?, (&y).try_into()?, Argument::Width(width as u32)];
    rows(x, "gather", (ids.len(), width), &arguments)?;
    Ok(y)
}

pub(in crate::ops) fn scatter(zeros: Tensor, x: &Tensor, ids: &[u32]) -> Result<Tensor> {
    let width = x.dims2()?.1;
    let places = upload(ids, x.device())?;
    let arguments =
        [x.try_into()?, (&places).try_into()?, (&zeros).try_into()?, Argument::Width(width as u32)];
    rows(x, "scatter", (ids.len(), width), &arguments)?;
    Ok(zeros)
}

const LOSS: Module = Module::Loss;

/// Threads of a row of logits.
const LOSS_THREADS: u32 = 1024;

pub(in crate::ops) fn nll_and_gradient(logits: Tensor, targets: &[u32]) -> Result<(Tensor, Tensor)> {
    let (count, vocab) = logits.dims2()?;
    let nll = empty(count, DType::F32, logits.device())?;
    let wanted = upload(targets, logits.device())?;
    let arguments =
        [(&logits).try_into()?, (&wanted).try_into()?, (&nll).try_into()?, Argument::Width(vocab as u32)];
    let grid = Grid { blocks: (count as u32, 1), threads: LOSS_THREADS, shared: 0 };
    launch(logits.device(), LOSS, "nll_and_gradient", grid, &arguments)?;
    Ok((nll, logits))
}
