//! Products with frozen weights, by the gemm that candle multiplies with. candle's own product first fills its
//! result with zeros on one thread, and cannot add to what is there.

use super::{read, update};
use crate::error::Result;
use candle_core::{Device, Tensor};
use gemm::Parallelism;
use rayon::prelude::*;
use std::ops::Range;

/// `x · w`, or with `transposed` `x · wᵀ`, added to `into` if there is one.
pub(in crate::ops) fn product(
    x: &Tensor,
    w: &Tensor,
    transposed: bool,
    into: Option<Tensor>,
) -> Result<Tensor> {
    let ((m, k), (rows, columns)) = (x.dims2()?, w.dims2()?);
    let (inner, n) = if transposed { (columns, rows) } else { (rows, columns) };
    if inner != k || into.as_ref().is_some_and(|into| into.dims() != [m, n]) {
        let shapes = format!("{:?} by {:?}, transposed: {transposed}", x.dims(), w.dims());
        return Err(candle_core::Error::Msg(format!("shapes do not multiply: {shapes}")).into());
    }
    read([x, w], |[x, w]| {
        let operands = Operands { size: [m, n, k], x, w, transposed };
        if let Some(into) = into {
            // SAFETY: `update` hands out all m·n elements of `into`, initialised and referred to by nobody else.
            #[allow(unsafe_code, reason = "gemm's interface is raw pointers")]
            update(&into, |out| unsafe { operands.multiply(out.as_mut_ptr(), true) })?;
            return Ok(into);
        }
        let mut out = Vec::with_capacity(m * n);
        // SAFETY: `out` has room for m·n elements. Nothing of it is read, and all of it is written: gemm sets
        // every element of its destination, also for k = 0.
        #[allow(unsafe_code, reason = "gemm's interface is raw pointers")]
        unsafe {
            operands.multiply(out.as_mut_ptr(), false);
            out.set_len(m * n);
        }
        Ok(Tensor::from_vec(out, (m, n), &Device::Cpu)?)
    })
}

/// `x` `[m, k]` and `w`, `[k, n]` or if `transposed` `[n, k]`, dense by rows; the result is `[m, n]`.
#[derive(Clone, Copy)]
struct Operands<'a> {
    size: [usize; 3],
    x: &'a [f32],
    w: &'a [f32],
    transposed: bool,
}

/// Multiply-adds below which a thread of its own costs more than it saves.
const WORTH_A_THREAD: usize = 1 << 19;

/// Columns of the result that one thread computes are a multiple of this, four vectors of the widest kind.
const COLUMNS: usize = 64;

impl Operands<'_> {
    /// Sets `out` to the product, or adds the product to it. The threads share the columns of the result, so
    /// that each packs its own columns of the weights: left to gemm, one thread packs them for all.
    ///
    /// # Safety
    /// `out` is valid for writes of m·n elements that nothing else refers to, and if `add` for reads.
    #[allow(unsafe_code, reason = "gemm's interface is raw pointers")]
    unsafe fn multiply(self, out: *mut f32, add: bool) {
        let [m, n, k] = self.size;
        assert!(self.x.len() == m * k && self.w.len() == k * n);
        let tasks = crate::threads().min(m * n * k / WORTH_A_THREAD).min(n.div_ceil(COLUMNS)).max(1);
        let share = n.div_ceil(tasks).next_multiple_of(COLUMNS);
        let out = Shared(out);
        let task = |task: usize| {
            let columns = (task * share).min(n)..((task + 1) * share).min(n);
            // SAFETY: as the caller promised; tasks write columns of their own.
            unsafe { self.columns(columns, out.pointer(), add) }
        };
        if tasks == 1 { task(0) } else { (0..tasks).into_par_iter().for_each(task) }
    }

    /// Some columns of [`Operands::multiply`].
    ///
    /// # Safety
    /// The same, for these columns alone; they lie in `0..n`.
    #[allow(unsafe_code, reason = "gemm's interface is raw pointers")]
    unsafe fn columns(self, columns: Range<usize>, out: *mut f32, add: bool) {
        let [m, n, k] = self.size;
        let (w, column_stride, row_stride) = if self.transposed {
            (&self.w[columns.start * k..], k as isize, 1)
        } else {
            (&self.w[columns.start.min(self.w.len())..], 1, n as isize)
        };
        // SAFETY: `x` has m·k elements, and the strides reach no further into `w` than its k·n elements, both
        // asserted by the caller. Of `out`, `columns` of m rows at distance n are touched, which the caller
        // vouches for.
        unsafe {
            gemm::gemm(
                m,
                columns.len(),
                k,
                out.wrapping_add(columns.start),
                1,
                n as isize,
                add,
                self.x.as_ptr(),
                1,
                k as isize,
                w.as_ptr(),
                column_stride,
                row_stride,
                1.0,
                1.0,
                false,
                false,
                false,
                Parallelism::None,
            );
        }
    }
}

/// A destination that several threads write to, each to elements of its own.
#[derive(Clone, Copy)]
struct Shared(*mut f32);

impl Shared {
    fn pointer(self) -> *mut f32 {
        self.0
    }
}

// SAFETY: a pointer is but a number; that no two threads touch one element is proved where it is used.
#[allow(unsafe_code, reason = "gemm's interface is raw pointers")]
unsafe impl Send for Shared {}
// SAFETY: as above.
#[allow(unsafe_code, reason = "gemm's interface is raw pointers")]
unsafe impl Sync for Shared {}
