//! Products with frozen weights, by the gemm that candle multiplies with. candle's own product first fills its
//! result with zeros on one thread, and cannot add to what is there. Weights in fewer than 32 bits are brought to
//! float32 a panel of rows at a time, into a buffer that each thread keeps: no more of them ever exists.

use super::{read, update};
use crate::error::Result;
use crate::quant::Nf4View;
use crate::weight::Weight;
use candle_core::{CpuStorage, Device, Storage, Tensor};
use gemm::Parallelism;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;
use std::cell::RefCell;
use std::ops::Range;

/// `x · w`, or with `transposed` `x · wᵀ`, added to `into` if there is one.
pub(in crate::ops) fn product(
    x: &Tensor,
    w: &Weight,
    transposed: bool,
    into: Option<Tensor>,
) -> Result<Tensor> {
    let ((m, k), [rows, columns]) = (x.dims2()?, w.dims());
    let (inner, n) = if transposed { (columns, rows) } else { (rows, columns) };
    if inner != k || into.as_ref().is_some_and(|into| into.dims() != [m, n]) {
        let shapes = format!("{:?} by {:?}, transposed: {transposed}", x.dims(), w.dims());
        return Err(candle_core::Error::Msg(format!("shapes do not multiply: {shapes}")).into());
    }
    let multiply = |x: &[f32], w: Matrix| {
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
    };
    read([x], |[x]| with_matrix(w, |w| multiply(x, w)))
}

/// The sum of the squares of each row, in float64 until the end.
pub(in crate::ops) fn row_squares(w: &Weight) -> Result<Tensor> {
    let [rows, columns] = w.dims();
    with_matrix(w, |matrix| {
        let square = |row: usize| {
            BUFFER.with_borrow_mut(|buffer| {
                let values = panel(buffer, columns);
                matrix.fill(row * columns, values);
                values.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>() as f32
            })
        };
        let squares: Vec<f32> = (0..rows).into_par_iter().map(square).collect();
        Ok(Tensor::from_vec(squares, rows, &Device::Cpu)?)
    })
}

/// A frozen matrix's numbers, row by row.
#[derive(Clone, Copy)]
enum Matrix<'a> {
    Float32(&'a [f32]),
    Bfloat16(&'a [bf16]),
    Float16(&'a [f16]),
    Nf4(Nf4View<'a>),
}

fn with_matrix<T>(weight: &Weight, f: impl FnOnce(Matrix) -> Result<T>) -> Result<T> {
    let dense = match weight {
        Weight::Nf4(matrix) => return matrix.read(|view| f(Matrix::Nf4(view))),
        Weight::Dense(tensor) => tensor.contiguous()?,
    };
    let (storage, layout) = dense.storage_and_layout();
    let range = layout.start_offset()..layout.start_offset() + layout.shape().elem_count();
    match &*storage {
        Storage::Cpu(CpuStorage::F32(all)) => f(Matrix::Float32(&all[range])),
        Storage::Cpu(CpuStorage::BF16(all)) => f(Matrix::Bfloat16(&all[range])),
        Storage::Cpu(CpuStorage::F16(all)) => f(Matrix::Float16(&all[range])),
        _ => Err(candle_core::Error::Msg("frozen weights have to be floating-point and on the CPU".into()))?,
    }
}

impl Matrix<'_> {
    /// Fills `out` with the elements from `start` on.
    fn fill(&self, start: usize, out: &mut [f32]) {
        let range = start..start + out.len();
        match self {
            Self::Float32(all) => out.copy_from_slice(&all[range]),
            Self::Bfloat16(all) => all[range].convert_to_f32_slice(out),
            Self::Float16(all) => all[range].convert_to_f32_slice(out),
            Self::Nf4(view) => view.fill(start, out),
        }
    }
}

/// `x` `[m, k]` and `w`, `[k, n]` or if `transposed` `[n, k]`, dense by rows; the result is `[m, n]`.
#[derive(Clone, Copy)]
struct Operands<'a> {
    size: [usize; 3],
    x: &'a [f32],
    w: Matrix<'a>,
    transposed: bool,
}

/// Rows of a matrix that are brought to float32 at a time.
const PANEL: usize = 256;

thread_local! {
    /// Where a thread brings them to float32.
    static BUFFER: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
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
        assert!(self.x.len() == m * k);
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
        let width = columns.len();
        let out = out.wrapping_add(columns.start);
        let part = |size, x_from: usize| Part { size, x: &self.x[x_from..], x_stride: k, out_stride: n };
        if let Matrix::Float32(w) = self.w {
            assert!(w.len() == k * n);
            let (from, strides) = if self.transposed {
                (columns.start * k, [1, k])
            } else {
                (columns.start.min(w.len()), [n, 1])
            };
            // SAFETY: as the caller promised; the product has these columns of all m rows of `out`.
            unsafe { part([m, width, k], 0).multiply(&w[from..], strides, out, add) };
            return;
        }
        BUFFER.with_borrow_mut(|buffer| {
            if self.transposed {
                // A panel of the matrix's rows makes as many columns of the result.
                for first in columns.clone().step_by(PANEL) {
                    let rows = PANEL.min(columns.end - first);
                    let panel = panel(buffer, rows * k);
                    self.w.fill(first * k, panel);
                    let out = out.wrapping_add(first - columns.start);
                    // SAFETY: as above, for `rows` of the columns.
                    unsafe { part([m, rows, k], 0).multiply(panel, [1, k], out, add) };
                }
                return;
            }
            // A panel of rows adds its share to all columns of the result. Without any row the result is zeros.
            for first in (0..k.max(1)).step_by(PANEL) {
                let rows = PANEL.min(k - first);
                let panel = panel(buffer, rows * width);
                for (row, values) in panel.chunks_exact_mut(width.max(1)).enumerate() {
                    self.w.fill((first + row) * n + columns.start, values);
                }
                let add = add || first > 0;
                // SAFETY: as above.
                unsafe { part([m, width, rows], first).multiply(panel, [width, 1], out, add) };
            }
        });
    }
}

/// The first `length` elements of a buffer, which grows to hold them.
fn panel(buffer: &mut Vec<f32>, length: usize) -> &mut [f32] {
    if buffer.len() < length {
        buffer.resize(length, 0.0);
    }
    &mut buffer[..length]
}

/// A product `[m, n]` of `x` `[m, k]`, by rows that lie `x_stride` apart, and some `[k, n]`.
struct Part<'a> {
    size: [usize; 3],
    x: &'a [f32],
    x_stride: usize,
    out_stride: usize,
}

impl Part<'_> {
    /// Writes the product with `w`, or adds it; `strides` are those of `w`'s rows and columns.
    ///
    /// # Safety
    /// Of `out`, n elements of m rows that lie `out_stride` apart are valid for writes that nothing else refers to,
    /// and if `add` for reads.
    #[allow(unsafe_code, reason = "gemm's interface is raw pointers")]
    unsafe fn multiply(self, w: &[f32], strides: [usize; 2], out: *mut f32, add: bool) {
        let [m, n, k] = self.size;
        let last = |count: usize, stride: usize| count.saturating_sub(1) * stride;
        let reaches = |rows, row_stride, columns, column_stride| {
            if rows == 0 || columns == 0 {
                0
            } else {
                last(rows, row_stride) + last(columns, column_stride) + 1
            }
        };
        assert!(self.x.len() >= reaches(m, self.x_stride, k, 1));
        assert!(w.len() >= reaches(k, strides[0], n, strides[1]));
        // SAFETY: the strides reach no further into `x` and `w` than their ends, as asserted just above; the caller
        // vouches for `out`.
        unsafe {
            gemm::gemm(
                m,
                n,
                k,
                out,
                1,
                self.out_stride as isize,
                add,
                self.x.as_ptr(),
                1,
                self.x_stride as isize,
                w.as_ptr(),
                strides[1] as isize,
                strides[0] as isize,
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
