//! How many bytes of tensors a pass holds. On the CPU no allocator can say it, so what is held is counted: a
//! [`Meter`] knows the bytes that are live and the most that ever were, a [`Held`] is a tensor whose bytes count
//! for as long as it lives.
//!
//! What counts: the frozen base, every member's adapter with all its gradients from the pass's begin to its end, and each
//! activation, gradient and block of logits of the pass. What does not: a matrix product's packing buffers, the process
//! itself (the resident set size stands beside this number for that), and what lies outside of a pass, the optimizer's
//! moments, the adapter that a divergence falls back to, and what a checkpoint that is being written holds of earlier states.
//! A run's `peak_memory_bytes` is therefore the largest `Outcome::peak_bytes` of its micro-batches plus these.
//!
//! The prediction ([`domain::footprint::PeakBytes`]) is of more than a pass: of the run's start and of the update too. And
//! it knows that an embedding that is trained whole has its first gradient only when the rest of the pass is gone, so
//! that there it may say less than is counted here.
//!
//! On a GPU the allocator does say it ([`pool()`]): there a solo run's `peak_memory_bytes` is its high-water mark.

pub(crate) mod heap;
#[cfg(feature = "cuda")]
pub(crate) mod pool;

use crate::error::Result;
use candle_core::{Device, Tensor};
use std::cell::Cell;
use std::ops::Deref;
use std::rc::Rc;

/// What a GPU's allocator has handed out, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pool {
    /// Now.
    pub used: u64,
    /// The most since the last optimizer step began.
    pub used_high: u64,
    /// The most that the allocator took from the device since then, what it keeps for later among that.
    pub reserved_high: u64,
    /// What all programs together use of the device, contexts included.
    pub device_used: u64,
}

/// What the allocator of a device counts; `None` on the CPU.
///
/// # Errors
/// The driver refuses.
pub fn pool(device: &Device) -> Result<Option<Pool>> {
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        return Ok(Some(pool::read(device)?));
    }
    let _ = device;
    Ok(None)
}

/// Bytes that cuBLAS takes for itself with its first product, outside of the pool: what NVIDIA recommends for a workspace,
/// by the compute capability that this program was built for (`cublasSetWorkspace` in cuBLAS's manual).
pub fn workspace_bytes() -> u64 {
    let hopper = crate::device::built_for().is_some_and(|built_for| built_for >= (9, 0));
    if hopper { 32 << 20 } else { 4 << 20 }
}

/// Starts the high-water mark of a device's memory anew. On the CPU there is none.
pub(crate) fn start_peak(device: &Device) -> Result<()> {
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        return pool::reset(device);
    }
    let _ = device;
    Ok(())
}

/// Bytes of a tensor's elements.
pub fn bytes(tensor: &Tensor) -> u64 {
    (tensor.elem_count() * tensor.dtype().size_in_bytes()) as u64
}

/// Counts the bytes that a pass holds.
#[derive(Debug, Clone, Default)]
pub(crate) struct Meter(Rc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    live: Cell<u64>,
    peak: Cell<u64>,
}

impl Meter {
    /// A meter on which `resident` bytes are live for good.
    pub(crate) fn new(resident: u64) -> Self {
        let meter = Self::default();
        meter.take(resident);
        meter
    }

    /// The most bytes that were live at once.
    pub(crate) fn peak(&self) -> u64 {
        self.0.peak.get()
    }

    /// Counts a tensor while the result lives.
    pub(crate) fn hold(&self, tensor: Tensor) -> Held {
        self.take(bytes(&tensor));
        Held { tensor, meter: self.clone() }
    }

    /// Notes that `bytes` more were live for a moment.
    pub(crate) fn touch(&self, bytes: u64) {
        self.0.peak.set(self.peak().max(self.0.live.get() + bytes));
    }

    fn take(&self, bytes: u64) {
        self.touch(bytes);
        self.0.live.set(self.0.live.get() + bytes);
    }
}

/// A tensor whose bytes are counted while it lives.
#[derive(Debug)]
pub(crate) struct Held {
    tensor: Tensor,
    meter: Meter,
}

impl Held {
    /// The tensor itself, from here on uncounted.
    pub(crate) fn release(self) -> Tensor {
        self.tensor.clone()
    }
}

impl Deref for Held {
    type Target = Tensor;

    fn deref(&self) -> &Tensor {
        &self.tensor
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let live = &self.meter.0.live;
        live.set(live.get() - bytes(&self.tensor));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::DType;

    #[test]
    fn a_tensor_counts_while_it_lives() {
        let tensor = |n: usize| Tensor::zeros(n, DType::F32, &Device::Cpu).unwrap();
        let meter = Meter::new(1000);
        let first = meter.hold(tensor(25));
        assert_eq!(meter.peak(), 1100);
        let second = meter.hold(tensor(50));
        drop(first);
        let third = meter.hold(tensor(10));
        assert_eq!((meter.0.live.get(), meter.peak()), (1240, 1300));
        meter.touch(100);
        drop((second, third));
        assert_eq!((meter.0.live.get(), meter.peak()), (1000, 1340));
    }
}
