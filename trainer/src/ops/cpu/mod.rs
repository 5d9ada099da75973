//! The operations on the CPU in float32, each in one pass over memory: rows in parallel on rayon's threads, each
//! row with the widest vectors that the processor has. The formulas are those of [`super::plain`], which the
//! tests hold these against.

pub(super) mod adamw;
pub(super) mod attention;
pub(super) mod elementwise;
pub(super) mod frozen;
pub(super) mod loss;
pub(super) mod low_rank;
mod product;
pub(super) mod vector;

use crate::error::Result;
use candle_core::{CpuStorage, DType, InplaceOp1, Layout, Storage, Tensor};
use rayon::prelude::*;
use std::cell::Cell;
use std::mem::MaybeUninit;
use vector::widest;

/// Whether a tensor's operations run here.
pub(super) fn has(t: &Tensor) -> bool {
    t.device().is_cpu() && t.dtype() == DType::F32
}

/// Reads the elements of tensors; one that is not contiguous is copied first.
pub(super) fn read<const N: usize, T>(
    tensors: [&Tensor; N],
    f: impl FnOnce([&[f32]; N]) -> Result<T>,
) -> Result<T> {
    let mut whole = Vec::with_capacity(N);
    for t in tensors {
        whole.push(t.contiguous()?);
    }
    let guards: Vec<_> = whole.iter().map(Tensor::storage_and_layout).collect();
    let mut slices: [&[f32]; N] = [&[]; N];
    for (slice, (storage, layout)) in slices.iter_mut().zip(&guards) {
        *slice = match &**storage {
            Storage::Cpu(storage) => elements(storage.as_slice::<f32>()?, layout),
            _ => return Err(candle_core::Error::Msg("a CPU kernel got a tensor of another device".into()))?,
        };
    }
    f(slices)
}

fn elements<'a>(slice: &'a [f32], layout: &Layout) -> &'a [f32] {
    &slice[layout.start_offset()..][..layout.shape().elem_count()]
}

/// Changes the elements of a contiguous tensor in place. Nobody else may hold its storage.
pub(super) fn update(t: &Tensor, f: impl FnOnce(&mut [f32])) -> Result<()> {
    /// candle hands out mutable storage to an operation alone; this one runs a closure, once.
    struct Update<F>(Cell<Option<F>>);
    impl<F: FnOnce(&mut [f32])> InplaceOp1 for Update<F> {
        fn name(&self) -> &'static str {
            "update"
        }

        fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
            let (CpuStorage::F32(all), Some((start, end))) = (storage, layout.contiguous_offsets()) else {
                candle_core::bail!("an update in place needs contiguous float32")
            };
            if let Some(f) = self.0.take() {
                f(&mut all[start..end]);
            }
            Ok(())
        }
    }
    Ok(t.inplace_op1(&Update(Cell::new(Some(f))))?)
}

/// Elements below which the hand-over to another thread costs more than it saves.
const WORTH_A_THREAD: usize = 16 * 1024;

fn rows_per_block(rows: usize, width: usize) -> usize {
    WORTH_A_THREAD.div_ceil(width.max(1)).clamp(1, rows.max(1))
}

/// Calls `f(first row, rows)` on blocks of whole rows of `out`, in parallel where that pays.
pub(super) fn for_rows(out: &mut [f32], width: usize, f: impl Fn(usize, &mut [f32]) + Sync) {
    let block = rows_per_block(out.len() / width.max(1), width);
    if out.len() <= block * width {
        return f(0, out);
    }
    out.par_chunks_mut(block * width).enumerate().for_each(|(i, rows)| f(i * block, rows));
}

/// Memory that nothing has been written to.
pub(super) type Unwritten = [MaybeUninit<f32>];

/// Writes all of `out`.
#[inline(always)]
pub(super) fn write(out: &mut Unwritten, values: impl Iterator<Item = f32>) -> &mut [f32] {
    let mut written = 0;
    for (out, value) in out.iter_mut().zip(values) {
        out.write(value);
        written += 1;
    }
    assert!(written == out.len());
    // SAFETY: as many elements have been written as there are, each once and from the first one on.
    #[allow(unsafe_code, reason = "what was written has another type only in name")]
    unsafe {
        std::slice::from_raw_parts_mut(out.as_mut_ptr().cast::<f32>(), out.len())
    }
}

/// Writes all of `out`: some slices, one after the other.
pub(super) fn write_slices<'o, 's>(
    out: &'o mut Unwritten,
    slices: impl Iterator<Item = &'s [f32]>,
) -> &'o mut [f32] {
    let mut at = 0;
    for slice in slices {
        write(&mut out[at..][..slice.len()], slice.iter().copied());
        at += slice.len();
    }
    assert!(at == out.len());
    // SAFETY: the slices, one after the other, were as long as `out`.
    #[allow(unsafe_code, reason = "as above")]
    unsafe {
        std::slice::from_raw_parts_mut(out.as_mut_ptr().cast::<f32>(), out.len())
    }
}

/// `count` new rows of `width`: `f(row, out)` writes one and gives it back, blocks of them in parallel where that pays. A
/// vector that is made of zeros in one go is filled by one thread while the others wait.
pub(super) fn new_rows(
    count: usize,
    width: usize,
    f: impl for<'o> Fn(usize, &'o mut Unwritten) -> &'o mut [f32] + Sync,
) -> Vec<f32> {
    let n = count * width;
    let mut out: Vec<f32> = Vec::with_capacity(n);
    let block = rows_per_block(count, width);
    let fill = |(i, rows): (usize, &mut Unwritten)| {
        widest(
            #[inline(always)]
            || {
                for (j, row) in rows.chunks_exact_mut(width.max(1)).enumerate() {
                    let place = row.as_ptr_range();
                    let written = f(i * block + j, row).as_ptr_range();
                    assert!(place == (written.start.cast()..written.end.cast()));
                }
            },
        );
    };
    let spare = &mut out.spare_capacity_mut()[..n];
    if n <= block * width {
        fill((0, spare));
    } else {
        spare.par_chunks_mut(block * width).enumerate().for_each(fill);
    }
    // SAFETY: the rows cover all n elements, and of each `f` has given back the same memory as initialised.
    #[allow(unsafe_code, reason = "no safe way to grow a vector from several threads")]
    unsafe {
        out.set_len(n);
    }
    out
}

/// [`for_rows`] for two outputs whose rows belong together.
pub(super) fn for_rows2(
    (a, a_width): (&mut [f32], usize),
    (b, b_width): (&mut [f32], usize),
    f: impl Fn(usize, &mut [f32], &mut [f32]) + Sync,
) {
    let block = rows_per_block(a.len() / a_width.max(1), a_width.max(b_width));
    if a.len() <= block * a_width {
        return f(0, a, b);
    }
    let rows = a.par_chunks_mut(block * a_width).zip(b.par_chunks_mut(block * b_width));
    rows.enumerate().for_each(|(i, (a, b))| f(i * block, a, b));
}
