//! The operations on a GPU beside those on the CPU: each and its backward on random inputs, in each kind of numbers,
//! with memory that was filled with NaN before, so that an element that nothing writes shows. The CPU gets the inputs
//! as the GPU's numbers hold them.
//!
//! The GPU is the one that `LORAFLEET_TEST_DEVICE` names; without it the CPU runs the kernels in its place.

use super::{Argument, Grid, Module, emulated, launch, upload};
use crate::ops::{self, AdamWStep, Branch, Branches, Documents, Heads, Parameter, Rotary};
use crate::quant::Nf4;
use crate::rng;
use crate::weight::{Numbers, Weight};
use candle_core::{DType, Device, Tensor};
use std::ops::Range;
use std::sync::OnceLock;

const CPU: Device = Device::Cpu;

/// Runs a test's part that is on the GPU.
pub(super) fn on_gpu<T>(f: impl FnOnce() -> T) -> T {
    if gpu().is_some_and(Device::is_cpu) { emulated::emulated(f) } else { f() }
}

/// The GPU, or the CPU in its place; `None` where that is not possible.
pub(super) fn gpu() -> Option<&'static Device> {
    static DEVICE: OnceLock<Option<Device>> = OnceLock::new();
    let open = || match std::env::var("LORAFLEET_TEST_DEVICE") {
        Ok(name) => Some(crate::device::open(&name).unwrap()),
        Err(_) => emulated::is_possible().then_some(CPU),
    };
    DEVICE.get_or_init(open).as_ref()
}

const TYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// What a result may be off by, as a share of the largest element: a few roundings in the numbers.
fn tolerance(dtype: DType) -> f32 {
    match dtype {
        DType::F32 => 5e-6,
        DType::F16 => 3e-3,
        _ => 2e-2,
    }
}

pub(super) fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_dtype(DType::F32).unwrap().to_device(&CPU).unwrap().to_vec1().unwrap()
}

/// Where a computation runs.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Side {
    Gpu,
    Cpu,
}

/// A tensor in the GPU's numbers, and the same on the CPU in float32.
pub(super) struct Pair {
    gpu: Tensor,
    pub(super) cpu: Tensor,
}

impl Pair {
    /// Numbers uniform in ±scale.
    pub(super) fn random(dims: &[usize], seed: u64, scale: f64, dtype: DType) -> Self {
        let key = rng::key(seed, "gpu");
        let count = dims.iter().product::<usize>() as u64;
        let value = |i| (scale * (2.0 * rng::uniform(key, i) - 1.0)) as f32;
        let rounded = Tensor::from_vec((0..count).map(value).collect(), dims, &CPU).unwrap();
        let rounded = rounded.to_dtype(dtype).unwrap();
        let gpu = rounded.to_device(gpu().unwrap()).unwrap();
        Self { gpu, cpu: rounded.to_dtype(DType::F32).unwrap() }
    }

    fn on(&self, side: Side) -> &Tensor {
        if side == Side::Gpu { &self.gpu } else { &self.cpu }
    }

    /// A tensor of its own, for an operation to change.
    fn copy(&self, side: Side) -> Tensor {
        self.on(side).copy().unwrap()
    }

    fn map(&self, f: impl Fn(&Tensor) -> candle_core::Result<Tensor>) -> Self {
        Self { gpu: f(&self.gpu).unwrap(), cpu: f(&self.cpu).unwrap() }
    }

    fn rows(&self, start: usize, count: usize) -> Self {
        self.map(|t| t.narrow(0, start, count))
    }
}

/// Fills memory that a GPU's next tensors will get with NaN. The CPU in its place does so by itself.
fn poison() {
    let fill = |n: usize| Tensor::full(f32::NAN, n, gpu().unwrap()).unwrap();
    if gpu().unwrap().is_cuda() {
        let sizes = [1usize << 10, 1 << 14, 1 << 18, 1 << 22, 1 << 24];
        drop(sizes.iter().flat_map(|n| [*n; 4]).map(fill).collect::<Vec<_>>());
    }
}

#[track_caller]
fn check(what: &str, dtype: DType, got: &Tensor, want: &Tensor) {
    assert_eq!(got.dims(), want.dims(), "{what}");
    let (got, want) = (values(got), values(want));
    let size = want.iter().fold(0.0, |m: f32, x| m.max(x.abs()));
    let differences = got.iter().zip(&want).map(|(a, b)| (a - b).abs());
    let off = differences.fold(0.0, |m: f32, x| if x > m || x.is_nan() { x } else { m });
    assert!(off <= tolerance(dtype) * size.max(1e-30), "{what} in {dtype:?}: {off} off, largest {size}");
}

/// The same computation on both sides; its results in order, under their names. Where the CPU is in the GPU's place, it comes
/// to the same bits in whichever order threads and blocks come.
#[track_caller]
fn compare(what: &str, dtype: DType, f: impl Fn(Side) -> crate::Result<Vec<Tensor>>) {
    poison();
    let got = on_gpu(|| f(Side::Gpu)).unwrap();
    if gpu().is_some_and(Device::is_cpu) {
        let again = emulated::backwards(|| on_gpu(|| f(Side::Gpu))).unwrap();
        for (i, (got, again)) in got.iter().zip(&again).enumerate() {
            let bits = |t: &Tensor| values(t).into_iter().map(f32::to_bits).collect::<Vec<_>>();
            assert!(bits(got) == bits(again), "{what} in {dtype:?}, result {i}: threads race");
        }
    }
    for (i, (got, want)) in got.iter().zip(f(Side::Cpu).unwrap()).enumerate() {
        check(&format!("{what}, result {i}"), dtype, got, &want);
    }
}

/// A kernel that is called with other arguments than it takes would read whatever lies there. The CPU in a GPU's place
/// refuses it.
#[test]
fn a_kernel_is_called_with_what_it_takes() {
    if !gpu().is_some_and(Device::is_cpu) {
        return;
    }
    let (pointer, count, width) = (Argument::Pointer(0), Argument::Count(0), Argument::Width(0));
    // No element, so that nothing is read or written.
    for (arguments, is_taken) in [
        (vec![pointer, pointer, count], true),
        (vec![pointer, pointer, width], false),
        (vec![pointer, count, count], false),
        (vec![pointer, pointer], false),
    ] {
        let launched = launch(&CPU, Module::Elementwise, "add_f32_single", Grid::elements(1), &arguments);
        assert_eq!(launched.is_ok(), is_taken, "{arguments:?}: {launched:?}");
    }
}

/// A launch that a GPU would refuse is refused by the CPU in its place.
#[test]
fn a_launch_keeps_within_a_gpus_limits() {
    if !gpu().is_some_and(Device::is_cpu) {
        return;
    }
    let grid = |blocks, threads, shared| Grid { blocks, threads, shared };
    // No row of blocks of those that a GPU has is launched here: their number is too large for the CPU.
    for (grid, said) in [
        (grid((1, 1), 32, 0), None),
        (grid((1, 1 << 16), 32, 0), Some("65536 rows of blocks, above 65535")),
        (grid((1 << 31, 1), 32, 0), Some("2147483648 blocks, above 2147483647")),
        (grid((1, 1), 1056, 0), Some("1056 threads, above 1024")),
        (grid((1, 1), 32, 100 << 10), Some("102400 bytes of shared memory, above 101376")),
    ] {
        let arguments = [Argument::Pointer(0), Argument::Pointer(0), Argument::Count(0)];
        let launched = launch(&CPU, Module::Elementwise, "add_f32_single", grid, &arguments);
        let found = launched.err().map(|error| error.to_string());
        let is = match (&found, said) {
            (Some(found), Some(said)) => found.contains(said),
            (found, said) => found.is_none() && said.is_none(),
        };
        assert!(is, "{grid:?}: {found:?}");
    }
}

/// What is too long for a transfer that nobody waits for goes in pieces.
#[test]
fn numbers_for_the_device() {
    let Some(device) = gpu() else { return };
    for count in [1, 16_384, 16_385, 50_000] {
        let numbers: Vec<u32> = (0..count).map(|i| i * 7).collect();
        assert!(upload(&numbers, device).unwrap().to_vec1::<u32>().unwrap() == numbers, "{count}");
    }
}

/// One element, widths that fill no vector, and ones that do. Of 15 rows of 171 the last 8 fill vectors, and begin where
/// none does.
const SHAPES: [(usize, usize); 7] = [(1, 1), (1, 8), (5, 24), (15, 171), (37, 171), (70, 520), (9, 4096)];

#[test]
fn rows_and_elements() {
    if gpu().is_none() {
        return;
    }
    for dtype in TYPES {
        for (rows, width) in SHAPES {
            let draw = |seed: u64, scale: f64| Pair::random(&[rows, width], seed, scale, dtype);
            let (x, y, z) = (draw(1, 1.0), draw(2, 1.0), draw(3, 6.0));
            let weight = Pair::random(&[width], 4, 1.0, DType::F32);
            let half = rows / 2;
            let part = y.rows(0, rows - half);
            let ids: Vec<u32> = (0..rows as u32).rev().filter(|r| r % 3 != 1).collect();
            let some = y.rows(0, ids.len());
            let check = |name: &str, f: &dyn Fn(Side) -> crate::Result<Vec<Tensor>>| {
                compare(&format!("{name} {rows}x{width}"), dtype, f);
            };
            check("rms_norm", &|s| Ok(vec![ops::rms_norm(x.on(s), weight.on(s), 1e-6)?]));
            check("rms_norm_backward", &|s| {
                Ok(vec![ops::add_rms_norm_backward(y.copy(s), x.on(s), weight.on(s), 1e-6, z.on(s))?])
            });
            check("swiglu", &|s| Ok(vec![ops::swiglu(z.on(s), y.on(s))?]));
            check("swiglu_backward", &|s| {
                let (gate, up) = ops::swiglu_backward(z.on(s), y.on(s), y.copy(s), x.copy(s))?;
                Ok(vec![gate, up])
            });
            check("add", &|s| Ok(vec![ops::add(x.copy(s), y.on(s))?]));
            check("add_rows", &|s| Ok(vec![ops::add_rows(x.copy(s), half, part.on(s))?]));
            check("scale_rows", &|s| Ok(vec![ops::scale_rows(x.copy(s), half, rows - half, 0.3)?]));
            check("add_bias", &|s| Ok(vec![ops::add_bias(x.copy(s), weight.on(s))?]));
            check("scale_columns", &|s| {
                Ok(vec![ops::scale_columns(x.copy(s), half, rows - half, weight.on(s))?])
            });
            check("dropout", &|s| Ok(vec![ops::dropout(x.on(s), 7, 1000, 0.3)?]));
            let last = x.rows(half, rows - half);
            check("dropout of some rows", &|s| Ok(vec![ops::dropout(last.on(s), 7, 1000, 0.3)?]));
            check("add to some rows", &|s| Ok(vec![ops::add(part.copy(s), last.on(s))?]));
            check("gather", &|s| Ok(vec![ops::gather(x.on(s), &ids)?]));
            check("scatter", &|s| Ok(vec![ops::scatter(some.on(s), &ids, rows)?]));
        }
    }
}

/// What is made of other operations: norms of heads, the gradients by weights that are trained, and by an embedding.
#[test]
fn norms_of_heads_and_gradients_by_weights() {
    if gpu().is_none() {
        return;
    }
    for dtype in TYPES {
        for (tokens, heads, dim) in [(1, 1, 8), (5, 3, 6), (37, 4, 64), (130, 2, 128)] {
            let draw = |seed: u64| Pair::random(&[tokens, heads * dim], seed, 1.0, dtype);
            let (x, dy) = (draw(1), draw(2));
            let float = |dims: &[usize], seed: u64| Pair::random(dims, seed, 1.0, DType::F32);
            let weight = float(&[dim], 3);
            let check = |name: &str, f: &dyn Fn(Side) -> crate::Result<Vec<Tensor>>| {
                compare(&format!("{name} of {tokens} tokens, {heads} heads of {dim}"), dtype, f);
            };
            check("head_norm", &|s| Ok(vec![ops::head_norm(x.on(s), weight.on(s), 1e-6)?]));
            check("head_norm_backward", &|s| {
                Ok(vec![ops::head_norm_backward(x.on(s), weight.on(s), 1e-6, dy.on(s))?])
            });
            let in_float32 = |t: Tensor| {
                assert_eq!(t.dtype(), DType::F32);
                Ok(vec![t])
            };
            check("head_norm_weight_gradient", &|s| {
                in_float32(ops::head_norm_weight_gradient(x.on(s), weight.on(s), 1e-6, dy.on(s))?)
            });
            check("rms_norm_weight_gradient", &|s| {
                in_float32(ops::rms_norm_weight_gradient(x.on(s), 1e-6, dy.on(s))?)
            });
            let wide = Pair::random(&[tokens, 24], 4, 1.0, dtype);
            let into = float(&[24, heads * dim], 5);
            check("linear_weight_gradient", &|s| {
                let alone = ops::linear_weight_gradient(None, x.on(s), wide.on(s))?;
                let added = ops::linear_weight_gradient(Some(into.copy(s)), x.on(s), wide.on(s))?;
                assert!([&alone, &added].iter().all(|t| t.dtype() == DType::F32));
                Ok(vec![alone, added])
            });
            // Rows that are named several times, once and never.
            let rows: Vec<u32> = (0..tokens as u32).map(|t| t * t % 7).collect();
            let table = float(&[9, heads * dim], 6);
            check("scatter_add", &|s| in_float32(ops::scatter_add(table.copy(s), dy.on(s), &rows)?));
        }
    }
}

#[test]
fn products() {
    if gpu().is_none() {
        return;
    }
    for dtype in TYPES {
        for (tokens, inputs, outputs, rank) in
            [(1, 8, 16, 1), (7, 24, 40, 3), (65, 172, 130, 16), (40, 256, 192, 64)]
        {
            let draw = |dims: &[usize], seed: u64| Pair::random(dims, seed, 1.0, dtype);
            let check = |name: &str, f: &dyn Fn(Side) -> crate::Result<Vec<Tensor>>| {
                compare(&format!("{name} {tokens}x{inputs}x{outputs} rank {rank}"), dtype, f);
            };
            let (x, dy) = (draw(&[tokens, inputs], 1), draw(&[tokens, outputs], 3));
            let (into, drawn) = (draw(&[tokens, inputs], 4), draw(&[outputs, inputs], 2));
            let drawn = drawn.map(|t| t.to_dtype(DType::F32));
            for numbers in [None, Some(false), Some(true)] {
                let hold = |side: Side| match numbers {
                    None if side == Side::Gpu => Weight::Dense(drawn.gpu.to_dtype(dtype).unwrap()),
                    None => Weight::Dense(drawn.cpu.clone()),
                    Some(double_quant) => Numbers::Nf4 { double_quant }.hold(drawn.on(side)).unwrap(),
                };
                let (on_gpu, on_cpu) = (on_gpu(|| hold(Side::Gpu)), hold(Side::Cpu));
                let weight = |side: Side| if side == Side::Gpu { &on_gpu } else { &on_cpu };
                check("linear", &|s| Ok(vec![ops::linear(x.on(s), weight(s), x.on(s).dtype())?]));
                check("linear in float32", &|s| {
                    let y = ops::linear(x.on(s), weight(s), DType::F32)?;
                    assert_eq!(y.dtype(), DType::F32);
                    Ok(vec![y])
                });
                check("linear_backward", &|s| {
                    let alone = ops::linear_backward(dy.on(s), weight(s), None)?;
                    Ok(vec![alone, ops::linear_backward(dy.on(s), weight(s), Some(into.copy(s)))?])
                });
                check("row_squares", &|s| Ok(vec![ops::row_squares(weight(s))?]));
            }
            let (h, a) = (draw(&[tokens, rank], 5), draw(&[rank, inputs], 6));
            let (turned, wider) = (a.map(|a| a.t()?.contiguous()), draw(&[tokens + 3, inputs], 7));
            check("project", &|s| {
                let one = ops::project(x.on(s), a.on(s))?;
                Ok(vec![one, ops::project_transposed(x.on(s), turned.on(s))?])
            });
            check("outer", &|s| {
                let both =
                    [ops::outer(h.on(s), x.on(s), 0.7)?, ops::outer_transposed(h.on(s), x.on(s), 0.7)?];
                assert!(both.iter().all(|t| t.dtype() == DType::F32));
                Ok(both.to_vec())
            });
            check("add_product", &|s| {
                let one = ops::add_product(wider.copy(s), 2, h.on(s), a.on(s), 0.7)?;
                Ok(vec![one, ops::add_product_transposed(wider.copy(s), 2, h.on(s), turned.on(s), 0.7)?])
            });
        }
    }
}

#[test]
fn attention() {
    let Some(gpu) = gpu() else { return };
    // Query heads, key-value heads, their width, rows' lengths: tiles that are full, cut off and single.
    let mut cases = vec![
        (1, 1, 2, None, vec![1]),
        (4, 4, 16, None, vec![5, 1, 70]),
        (4, 2, 64, None, vec![64, 100, 3]),
        (1, 1, 128, None, vec![130]),
        // Windows within a tile, of a tile, over some, and beyond the longest row.
        (4, 4, 16, Some(7), vec![5, 1, 70]),
        (2, 1, 64, Some(2), vec![64, 3]),
        (2, 1, 64, Some(64), vec![200, 3]),
        (1, 1, 128, Some(40), vec![197]),
        (2, 2, 64, Some(101), vec![100, 230]),
    ];
    // More than a block of queries: too much for the CPU.
    if gpu.is_cuda() {
        cases.extend([
            (2, 2, 128, None, vec![512, 512]),
            (4, 2, 128, None, vec![513, 40, 1100]),
            (8, 2, 64, None, vec![700]),
            (4, 2, 128, Some(300), vec![513, 40, 1100]),
        ]);
    }
    for dtype in TYPES {
        for (query, key_value, dim, window, lengths) in &cases {
            let heads = Heads { query: *query, key_value: *key_value, dim: *dim, window: *window };
            let mut documents: Vec<Range<usize>> = Vec::new();
            for length in lengths {
                let start = documents.last().map_or(0, |d| d.end);
                documents.push(start..start + length);
            }
            let tokens = documents.last().unwrap().end;
            let documents = Documents::new(documents);
            let draw = |heads: usize, seed: u64, scale: f64| {
                Pair::random(&[tokens, heads * dim], seed, scale, dtype)
            };
            let (q, k) = (draw(*query, 1, 3.0), draw(*key_value, 2, 1.0));
            let (v, dy) = (draw(*key_value, 3, 1.0), draw(*query, 4, 1.0));
            let check = |name: &str, f: &dyn Fn(Side) -> crate::Result<Vec<Tensor>>| {
                compare(
                    &format!(
                        "{name} of {query} and {key_value} heads of {dim}, window {window:?}, rows of {lengths:?}"
                    ),
                    dtype,
                    f,
                );
            };
            check("attention", &|s| Ok(vec![ops::attention(q.on(s), k.on(s), v.on(s), &documents, heads)?]));
            check("attention_backward", &|s| {
                let (q, k, v, dy) = (q.on(s), k.on(s), v.on(s), dy.on(s));
                let (dq, dk, dv) = ops::attention_backward(q, k, v, &documents, heads, dy)?;
                Ok(vec![dq, dk, dv])
            });
            let positions: Vec<u32> = (0..tokens as u32).map(|p| 5 + p % 40).collect();
            let frequencies: Vec<f32> = (0..dim / 2).map(|i| 0.9f32.powi(i as i32)).collect();
            check("rotary, there and back", &|s| {
                let rotary = Rotary::new(&frequencies, &positions, q.on(s).device())?;
                let there = rotary.forward(q.copy(s), *dim)?;
                Ok(vec![there.copy()?, rotary.backward(there, *dim)?])
            });
        }
    }
}

/// What the kernels are told of a pass's documents goes to the device once, for all layers, forward and backward.
#[test]
fn tiles_are_uploaded_once_a_pass() {
    if !gpu().is_some_and(Device::is_cpu) {
        return;
    }
    let heads = Heads { query: 1, key_value: 1, dim: 64, window: None };
    let (documents, dtype) = (Documents::new(vec![0..70, 70..73]), DType::F16);
    let [q, k, v, dy] = [1, 2, 3, 4].map(|seed| Pair::random(&[73, 64], seed, 1.0, dtype).gpu);
    let layer = || {
        let before = emulated::allocations();
        ops::attention(&q, &k, &v, &documents, heads).unwrap();
        let forward = emulated::allocations() - before;
        ops::attention_backward(&q, &k, &v, &documents, heads, &dy).unwrap();
        [forward, emulated::allocations() - before - forward]
    };
    // Tiles and result; then three gradients, and two numbers for each row.
    assert_eq!(on_gpu(|| [layer(), layer()]), [[2, 5], [1, 5]]);
    let branches =
        [Branch { seen: vec![], own: 0..70 }, Branch { seen: std::iter::once(0..70).collect(), own: 70..73 }];
    let branches = Branches::new(&branches);
    let layer = || {
        let before = emulated::allocations();
        ops::branched_attention(&q, &k, &v, &branches, heads).unwrap();
        emulated::allocations() - before
    };
    let [first, second] = on_gpu(|| [layer(), layer()]);
    assert_eq!(first, second + 1);
}

/// A document of more than a block of queries, with heads narrow enough for the CPU in the GPU's place.
#[test]
fn attention_in_blocks_of_queries() {
    if gpu().is_none() {
        return;
    }
    for window in [None, Some(30), Some(515)] {
        let (heads, dtype) = (Heads { query: 2, key_value: 1, dim: 2, window }, DType::F32);
        let documents = Documents::new(vec![0..520, 520..523]);
        let draw = |heads: usize, seed: u64| Pair::random(&[523, heads * 2], seed, 1.0, dtype);
        let (q, k, v, dy) = (draw(2, 1), draw(1, 2), draw(1, 3), draw(2, 4));
        compare("attention", dtype, |s| {
            let (q, k, v, dy) = (q.on(s), k.on(s), v.on(s), dy.on(s));
            let (dq, dk, dv) = ops::attention_backward(q, k, v, &documents, heads, dy)?;
            Ok(vec![ops::attention(q, k, v, &documents, heads)?, dq, dk, dv])
        });
    }
}

/// What a step of AdamW makes of parameters (weight, gradient, moments) of all sizes, some longer than a chunk, with three
/// rates and decays: the new weights, then the first moments, then the second. On a GPU `sums` stand for the gradients'
/// squares and the losses'.
fn updated(
    all: &[[Pair; 4]],
    side: Side,
    max_norm: f64,
    sums: Option<[f64; 2]>,
) -> crate::Result<Vec<Tensor>> {
    let (rate, decay) = (1e-2, 0.99);
    let step = AdamWStep { beta1: 0.9, beta2: 0.999, correction2: 0.2, epsilon: 1e-8, decay, rate };
    let faster = AdamWStep { rate: 0.1, decay: 0.9, ..step };
    let steps = [step, faster, AdamWStep { decay: 1.0, ..faster }];
    let held: Vec<[Tensor; 4]> = all.iter().map(|four| [0, 1, 2, 3].map(|j| four[j].copy(side))).collect();
    let parameters: Vec<Parameter> = held
        .iter()
        .zip(steps.iter().cycle())
        .map(|([weight, gradient, first, second], step)| Parameter { weight, gradient, first, second, step })
        .collect();
    let gradients: Vec<&Tensor> = parameters.iter().map(|p| p.gradient).collect();
    let divisor = 3.0;
    if side == Side::Cpu {
        let norm = ops::sum_of_squares(&gradients)?.sqrt() / divisor;
        let clip = if max_norm > 0.0 { (max_norm / (norm + 1e-6)).min(1.0) } else { 1.0 };
        let new =
            parameters.iter().map(|p| ops::adamw(p, clip / divisor)).collect::<crate::Result<Vec<_>>>()?;
        return Ok([0, 1, 2].iter().flat_map(|j| new.iter().map(move |new| new[*j].clone())).collect());
    }
    let sum = |sum: f64| Tensor::new(&[sum], gpu().unwrap());
    let squares = sums.map_or_else(|| ops::squares(&gradients), |[squares, _]| Ok(sum(squares)?))?;
    let losses = sum(sums.map_or(1.0, |[_, losses]| losses))?;
    let ahead = ops::adamw_ahead(&parameters, [&squares, &losses], divisor, max_norm)?.unwrap();
    (ahead.launch)()?;
    let moments = [2, 3].iter().flat_map(|j| held.iter().map(move |four| four[*j].clone()));
    Ok(ahead.weights.iter().cloned().chain(moments).collect())
}

#[test]
fn losses_and_updates() {
    if gpu().is_none() {
        return;
    }
    let dtype = DType::F32;
    for (rows, width) in SHAPES.into_iter().chain([(3, 32_000)]) {
        let logits = Pair::random(&[rows, width], 1, 8.0, dtype);
        let targets: Vec<u32> = (0..rows).map(|i| (i * 7 % width) as u32).collect();
        compare(&format!("nll_and_gradient {rows}x{width}"), dtype, |s| {
            let (nll, gradient) = ops::nll_and_gradient(logits.copy(s), &targets)?;
            Ok(vec![nll, gradient])
        });
    }
    let dims = [[1, 1], [16, 2048], [3, 7], [1100, 16], [5, 16_384]];
    let draw = |i: usize| {
        [0, 1, 2, 3].map(|j| Pair::random(&dims[i], 10 * i as u64 + j, 1.0, dtype).map(Tensor::sqr))
    };
    let all: Vec<[Pair; 4]> = (0..dims.len()).map(draw).collect();
    // Without clipping, clipped, and below what is clipped.
    for max_norm in [0.0, 0.5, 1e9] {
        compare(&format!("adamw clipped to {max_norm}"), dtype, |s| updated(&all, s, max_norm, None));
    }
    let (nan, infinite) = (f64::NAN, f64::INFINITY);
    for sums in [[nan, 1.0], [infinite, 1.0], [4.0, nan], [4.0, infinite]] {
        let left = on_gpu(|| updated(&all, Side::Gpu, 1.0, Some(sums))).unwrap();
        let moments = [2, 3].into_iter().flat_map(|j| all.iter().map(move |four| &four[j].gpu));
        for (got, want) in left[all.len()..].iter().zip(moments) {
            assert!(values(got) == values(want), "{sums:?}: a step that is left out changes a moment");
        }
    }
    let pick = |side: Side| all.iter().map(|four| four[1].on(side)).collect::<Vec<_>>();
    let (got, want) = (
        on_gpu(|| ops::sum_of_squares(&pick(Side::Gpu))).unwrap(),
        ops::sum_of_squares(&pick(Side::Cpu)).unwrap(),
    );
    assert!((got - want).abs() < 1e-6 * want, "{got}, on the CPU {want}");
    for dtype in [DType::BF16, DType::F16] {
        let copies = on_gpu(|| ops::cast(&pick(Side::Gpu), dtype)).unwrap();
        for (got, want) in copies.iter().zip(pick(Side::Cpu)) {
            assert_eq!(values(got), values(&want.to_dtype(dtype).unwrap()), "casts round alike");
        }
    }
    assert_eq!(on_gpu(|| ops::sum_of_squares(&[])).unwrap(), 0.0);
}

#[test]
fn nf4_has_the_same_bits() {
    if gpu().is_none() {
        return;
    }
    // A scale of 0 makes each magnitude 0. The last has more blocks of magnitudes than a block of threads sums.
    for (rows, columns, scale) in [
        (1, 1, 0.1),
        (3, 21, 0.1),
        (64, 64, 0.1),
        (33, 70, 0.1),
        (33, 70, 0.0),
        (256, 200, 0.1),
        (2080, 2048, 0.1),
    ] {
        for double_quant in [false, true] {
            let what = format!("{rows}x{columns} of {scale}, double quantisation {double_quant}");
            let matrix = Pair::random(&[rows, columns], 1, scale, DType::F32);
            poison();
            let got = on_gpu(|| Nf4::quantize(&matrix.gpu, double_quant)).unwrap();
            let want = Nf4::quantize(&matrix.cpu, double_quant).unwrap();
            assert_eq!(got.parts().unwrap(), want.parts().unwrap(), "{what}");
            assert_eq!(got.bytes(), want.bytes(), "{what}");
            let back = on_gpu(|| got.dequantize()).unwrap();
            assert_eq!(values(&back), values(&want.dequantize().unwrap()), "{what}");
        }
    }
}
