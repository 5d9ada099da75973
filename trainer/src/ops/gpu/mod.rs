//! The operations on an NVIDIA GPU. Activations and the gradients by them are in the numbers that the base's
//! embedding is held in; sums, the loss, adapters and their gradients are in float32.
//!
//! | file | holds |
//! |---|---|
//! | `mod.rs` | where a tensor lies on the device, and how a kernel is launched |
//! | `cuda.rs` | the device: the driver and cuBLAS |
//! | `emulated.rs` | in tests, the CPU in its place, which runs the same kernels one thread after the other |
//! | `gemm.rs` | products of matrices that lie in larger ones |
//! | `elementwise.rs` | operations on rows and elements |
//! | `frozen.rs`, `low_rank.rs` | products with frozen weights and with adapters |
//! | `attention.rs`, `flash.rs` | causal attention: a block of queries at a time, and on tensor cores without scores |
//! | `many.rs` | one launch for many tensors: AdamW, norms, casts |
//! | `nf4.rs` | quantising and dequantising |
//! | `incoming.rs`, `staging.rs`, `slots.rs` | weights read from files: what is made of them, the order in which pieces go, the device's part of it |
//! | `timed.rs` | how long launches take, while somebody asks |
//!
//! All work of a device goes through one stream: what is launched sees what was launched before, and a tensor may be
//! given back while kernels that read it wait. A launch's failure is reported by this or a later call. While a base is loaded there
//! is a second stream, which copies its bytes to memory that is no tensor's.

pub(super) mod attention;
#[cfg(feature = "cuda")]
mod cuda;
pub(super) mod elementwise;
#[cfg(test)]
mod emulated;
mod flash;
pub(super) mod frozen;
mod gemm;
pub(crate) mod incoming;
#[cfg(test)]
mod load_tests;
pub(super) mod low_rank;
pub(super) mod many;
#[cfg(test)]
mod memory_tests;
pub(crate) mod nf4;
#[cfg(test)]
mod pack_tests;
#[cfg(feature = "cuda")]
mod slots;
mod staging;
#[cfg(test)]
mod tests;
#[cfg(feature = "cuda")]
mod timed;

#[cfg(feature = "cuda")]
pub(crate) use cuda::sum_in_float32;
#[cfg(feature = "cuda")]
pub(crate) use timed::timed;

use crate::error::Result;
use candle_core::{DType, Device, Shape, Tensor, WithDType};

/// Whether a tensor's operations run here.
pub(crate) fn has(t: &Tensor) -> bool {
    runs(t.device())
}

/// Whether a device's operations run here.
pub(crate) fn runs(device: &Device) -> bool {
    #[cfg(test)]
    if emulated::is_on() {
        return true;
    }
    device.is_cuda()
}

/// Reads a vector's numbers from the device, which is waited for.
pub(super) fn read(t: &Tensor) -> Result<Vec<f64>> {
    #[cfg(test)]
    emulated::note_read();
    Ok(t.to_vec1()?)
}

fn problem(text: impl Into<String>) -> crate::error::TrainError {
    candle_core::Error::Msg(text.into()).into()
}

/// A new tensor whose elements are whatever lies there: the caller writes all of them.
fn empty(shape: impl Into<Shape>, dtype: DType, device: &Device) -> Result<Tensor> {
    #[cfg(test)]
    emulated::allocate()?;
    #[cfg(test)]
    if device.is_cpu() {
        return emulated::empty(shape.into(), dtype);
    }
    // SAFETY: each caller hands the tensor to a kernel or product that sets every element before anything reads one.
    #[allow(unsafe_code, reason = "zeros would be one more pass over memory")]
    Ok(unsafe { Tensor::empty(shape, dtype, device)? })
}

/// Bytes of a transfer that the CPU does not wait for: the driver takes a copy of as many at once. Before it takes more, it
/// may have the CPU wait for all that the device was given before (CUDA's programming guide on asynchronous calls).
const TRANSFER: usize = 64 << 10;

/// A vector of numbers that the CPU has, which it does not wait for.
pub(super) fn upload<T: WithDType>(values: &[T], device: &Device) -> Result<Tensor> {
    #[cfg(test)]
    emulated::allocate()?;
    if values.is_empty() {
        return Err(problem("nothing to upload"));
    }
    let piece = |values: &[T]| Tensor::from_slice(values, values.len(), device);
    let most = TRANSFER / size_of::<T>();
    if values.len() <= most {
        return Ok(piece(values)?);
    }
    Ok(Tensor::cat(&values.chunks(most).map(piece).collect::<candle_core::Result<Vec<_>>>()?, 0)?)
}

/// Where a contiguous tensor's elements begin on the device.
fn pointer(t: &Tensor) -> Result<u64> {
    if !t.is_contiguous() {
        return Err(problem("a GPU kernel needs contiguous tensors"));
    }
    #[cfg(test)]
    if t.device().is_cpu() {
        return emulated::pointer(t);
    }
    #[cfg(feature = "cuda")]
    if t.device().is_cuda() {
        return cuda::pointer(t);
    }
    Err(problem("a GPU kernel got a tensor of another device"))
}

/// The files of `trainer/kernels`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Module {
    Attention,
    Elementwise,
    Flash,
    Loss,
    Optimizer,
    Quant,
}

/// What a kernel is called with.
#[derive(Debug, Clone, Copy)]
enum Argument {
    Pointer(u64),
    Count(u64),
    Width(u32),
    Number(f32),
    Double(f64),
}

impl TryFrom<&Tensor> for Argument {
    type Error = crate::error::TrainError;

    fn try_from(t: &Tensor) -> Result<Self> {
        Ok(Self::Pointer(pointer(t)?))
    }
}

/// The blocks of a launch, and the threads of each.
#[derive(Debug, Clone, Copy)]
struct Grid {
    blocks: (u32, u32),
    threads: u32,
    /// Bytes of shared memory that the launch asks for.
    shared: u32,
}

/// Threads of a block where nothing else decides.
const THREADS: u32 = 256;

impl Grid {
    /// A block for each of `rows`, for rows of that many vectors.
    fn rows(rows: usize, vectors: usize) -> Self {
        let threads = (vectors as u32).next_multiple_of(32).clamp(32, 2 * THREADS);
        Self { blocks: (rows as u32, 1), threads, shared: 0 }
    }

    /// A thread for each of `count`.
    fn elements(count: usize) -> Self {
        Self { blocks: (count.div_ceil(THREADS as usize) as u32, 1), threads: THREADS, shared: 0 }
    }
}

/// A kernel's suffix: the numbers that it works in, and whether one by one.
fn suffix(dtype: DType, single: bool) -> Result<&'static str> {
    Ok(match (dtype, single) {
        (DType::F32, false) => "_f32",
        (DType::F16, false) => "_f16",
        (DType::BF16, false) => "_bf16",
        (DType::F32, true) => "_f32_single",
        (DType::F16, true) => "_f16_single",
        (DType::BF16, true) => "_bf16_single",
        _ => return Err(problem(format!("no GPU kernel works in {dtype:?}"))),
    })
}

/// Bytes that a kernel takes at once. They begin at multiples of themselves.
const VECTOR: usize = 16;

/// Elements that a kernel takes at once, where `width` divides into such; else 1.
fn vector(dtype: DType, width: usize) -> usize {
    let most = VECTOR / dtype.size_in_bytes();
    if width.is_multiple_of(most) { most } else { 1 }
}

/// Launches a kernel of a module. No blocks, no launch.
///
/// Each caller passes what the kernel's signature in `trainer/kernels` asks for, with pointers to as many elements as
/// its grid, counts and widths make it touch; [`pointer`] has checked device and contiguity.
fn launch(device: &Device, module: Module, kernel: &str, grid: Grid, arguments: &[Argument]) -> Result<()> {
    if grid.blocks.0 == 0 || grid.blocks.1 == 0 {
        return Ok(());
    }
    #[cfg(test)]
    if device.is_cpu() {
        return emulated::launch(module, kernel, grid, arguments);
    }
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        let launch = || cuda::launch(device, module, kernel, grid, arguments);
        return timed::launched(device, || kernel.to_string(), launch);
    }
    Err(problem(format!("{kernel} of {module:?} with {arguments:?} on {grid:?}: {device:?} is no GPU")))
}
