//! One launch for many tensors. Their places go to the device as a table of numbers; results of several tensors lie
//! in one allocation, of which each is a view.

use super::{Argument, Grid, Module, THREADS, empty, launch, pointer, problem, suffix, upload};
use crate::error::Result;
use crate::ops::{AdamWStep, Ahead, Parameter};
use candle_core::{DType, Device, Tensor};

const MODULE: Module = Module::Optimizer;

/// Elements that a block works on; the same as in `optimizer.cu`.
const CHUNK: usize = 16_384;

/// Elements to whose multiples a view's place is rounded up.
const ALIGNED: usize = 64;

/// New tensors of those shapes in one allocation.
fn views(shapes: &[&Tensor], dtype: DType, device: &Device) -> Result<Vec<Tensor>> {
    let place = |t: &&Tensor| t.elem_count().next_multiple_of(ALIGNED);
    let all = empty(shapes.iter().map(place).sum::<usize>(), dtype, device)?;
    let mut start = 0;
    let view = |t: &&Tensor| {
        let view = all.narrow(0, start, t.elem_count())?.reshape(t.shape())?;
        start += place(t);
        Ok(view)
    };
    shapes.iter().map(view).collect()
}

/// A table for the kernels: a row for each tensor, ending on its number of elements.
struct Table {
    numbers: Tensor,
    rows: usize,
    blocks: usize,
}

impl Table {
    fn new<const N: usize>(rows: &[[u64; N]], device: &Device) -> Result<Self> {
        let mut numbers: Vec<i64> = rows.iter().flatten().map(|number| *number as i64).collect();
        for (i, row) in rows.iter().enumerate() {
            let chunks = (row[N - 1] as usize).div_ceil(CHUNK);
            numbers.extend((0..chunks).map(|chunk| (i as i64) << 32 | chunk as i64));
        }
        let (rows, count) = (rows.len() * N, numbers.len());
        Ok(Self { numbers: upload(&numbers, device)?, rows, blocks: count - rows })
    }

    fn launch(&self, kernel: &str, arguments: &[Argument]) -> Result<()> {
        let start = pointer(&self.numbers)?;
        let places = [Argument::Pointer(start), Argument::Pointer(start + 8 * self.rows as u64)];
        let grid = Grid { blocks: (self.blocks as u32, 1), threads: THREADS, shared: 0 };
        launch(self.numbers.device(), MODULE, kernel, grid, &[&places, arguments].concat())
    }
}

/// The device and the contiguous forms of some tensors.
fn contiguous<'a>(tensors: impl Iterator<Item = &'a Tensor>) -> Result<Vec<Tensor>> {
    tensors.map(|t| Ok(t.contiguous()?)).collect()
}

/// Decays and rates that the parameters of a step may have; the same as in `optimizer.cu`.
const KINDS: usize = 3;

/// As [`crate::ops::adamw_ahead`] has it.
pub(in crate::ops) fn adamw(
    parameters: &[Parameter],
    sums: [&Tensor; 2],
    divisor: f64,
    max_norm: f64,
) -> Result<Ahead> {
    let Some(one) = parameters.first() else { return Err(problem("a step of nothing")) };
    let device = one.weight.device();
    let olds: Vec<&Tensor> = parameters.iter().map(|p| p.weight).collect();
    let weights = views(&olds, DType::F32, device)?;
    let gradients = contiguous(parameters.iter().map(|p| p.gradient))?;
    let (mut rows, mut kinds) = (Vec::with_capacity(parameters.len()), Vec::<[f64; 2]>::with_capacity(KINDS));
    // What the launch reads and writes is held until then.
    let mut held = Vec::with_capacity(4 * parameters.len());
    for ((p, gradient), new) in parameters.iter().zip(gradients).zip(&weights) {
        let kind = [p.step.decay, p.step.rate];
        let number = kinds.iter().position(|known| *known == kind).unwrap_or(kinds.len());
        if number == kinds.len() {
            kinds.push(kind);
        }
        rows.push([
            pointer(p.weight)?,
            pointer(&gradient)?,
            pointer(p.first)?,
            pointer(p.second)?,
            pointer(new)?,
            number as u64,
            p.weight.elem_count() as u64,
        ]);
        held.extend([p.weight.clone(), gradient, p.first.clone(), p.second.clone()]);
    }
    if kinds.len() > KINDS {
        return Err(problem(format!("a step of AdamW with {} decays and rates", kinds.len())));
    }
    kinds.resize(KINDS, kinds[0]);
    let AdamWStep { beta1, beta2, correction2, epsilon, .. } = *one.step;
    let numbers = [beta1, beta2, 1.0 - beta1, 1.0 - beta2, correction2, epsilon];
    let numbers = numbers.into_iter().chain(kinds.into_iter().flatten());
    let [squares, losses] = sums;
    let mut arguments =
        vec![squares.try_into()?, losses.try_into()?, Argument::Double(divisor), Argument::Double(max_norm)];
    arguments.extend(numbers.map(|x| Argument::Number(x as f32)));
    held.extend([squares.clone(), losses.clone()]);
    held.extend(weights.iter().cloned());
    let table = Table::new(&rows, device)?;
    let launch = move || {
        let _still_held = &held;
        table.launch("adamw", &arguments)
    };
    Ok(Ahead { weights, launch: Box::new(launch) })
}

/// Σ x² over all elements of all tensors, of which there is one or more, in the same order each time: `[1]` in float64.
pub(in crate::ops) fn sum_of_squares(tensors: &[&Tensor]) -> Result<Tensor> {
    let Some(device) = tensors.first().map(|t| t.device()) else {
        return Err(problem("the squares of nothing"));
    };
    let tensors = contiguous(tensors.iter().copied())?;
    let row = |t: &Tensor| Ok([pointer(t)?, t.elem_count() as u64]);
    let table = Table::new(&tensors.iter().map(row).collect::<Result<Vec<_>>>()?, device)?;
    let (sums, out) = (empty(table.blocks, DType::F64, device)?, empty(1, DType::F64, device)?);
    table.launch("squares", &[(&sums).try_into()?])?;
    let arguments = [(&sums).try_into()?, (&out).try_into()?, Argument::Width(table.blocks as u32)];
    launch(device, MODULE, "sum", Grid { blocks: (1, 1), threads: 1024, shared: 0 }, &arguments)?;
    Ok(out)
}

/// float32 tensors in other numbers.
pub(in crate::ops) fn cast(tensors: &[&Tensor], dtype: DType) -> Result<Vec<Tensor>> {
    let Some(device) = tensors.first().map(|t| t.device()) else { return Ok(Vec::new()) };
    let (copies, tensors) = (views(tensors, dtype, device)?, contiguous(tensors.iter().copied())?);
    let row = |(t, copy): (&Tensor, &Tensor)| Ok([pointer(t)?, pointer(copy)?, t.elem_count() as u64]);
    let rows = tensors.iter().zip(&copies).map(row).collect::<Result<Vec<_>>>()?;
    Table::new(&rows, device)?.launch(&format!("cast{}", suffix(dtype, false)?), &[])?;
    Ok(copies)
}
