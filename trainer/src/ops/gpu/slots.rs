//! A GPU's slots: pinned memory, memory of the device, and the events that order the two streams which use them.
//!
//! cudarc's own events, by which it would order streams, are off (`memory::pool`), so what it leaves to its callers is done
//! here, by hand. With the order that [`super::staging`] keeps:
//!
//! - The device's memory is taken from and given back to its pool on the stream of computations, as a tensor's is. The
//!   stream of copies waits for that once, after all slots are made, and is through when a slot is dropped:
//!   either it never had anything to do with it, or `wait` or `drain` came after.
//! - A copy reads pinned memory and writes the device's. Both are the slot's, the slot is [`super::staging`]'s, and nobody gets it
//!   to fill it again before `wait`: the stream of computations waits for `copied`, and `done` is noted there later, so that past `done`
//!   the copy is over as well as all that reads the piece.
//! - An event is recorded anew only by the next `send` or `mark`, when nobody waits for its earlier place on this side;
//!   waits that a stream was given before are for the place that it had then (CUDA's `cuStreamWaitEvent`).
//! - Tensors are touched on the stream of computations alone, where kernels that write them are launched.

use super::staging::Slot;
use super::timed;
use crate::error::Result;
use candle_core::Device;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::sys::CUevent_flags;
use candle_core::cuda_backend::cudarc::driver::{
    CudaEvent, CudaSlice, CudaStream, DevicePtr, PinnedHostSlice,
};
use std::sync::Arc;

struct CudaSlot {
    /// Dropped first: that makes the device's context the thread's, which giving back `there` needs.
    here: PinnedHostSlice<u8>,
    there: CudaSlice<u8>,
    /// The last copy is over.
    copied: CudaEvent,
    /// What read it is over. The CPU sleeps while it waits for it.
    done: CudaEvent,
    copies: Arc<CudaStream>,
    computations: Arc<CudaStream>,
}

/// So many slots for a device, with a stream of copies of their own.
///
/// # Errors
/// There is no memory for them, pinned or the device's.
pub(super) fn of(device: &Device, count: usize, bytes: usize) -> Result<Vec<Box<dyn Slot>>> {
    let computations = device.as_cuda_device()?.cuda_stream();
    let context = computations.context();
    let copies = context.new_stream().w()?;
    let mut slots: Vec<Box<dyn Slot>> = Vec::with_capacity(count);
    for _ in 0..count {
        // SAFETY: all of it is written by the next line. Without flags the CPU may read it as any other memory.
        #[allow(unsafe_code, reason = "pinned memory comes with whatever lies there")]
        let mut here = unsafe { context.alloc_pinned_with_flags::<u8>(bytes, 0) }.w()?;
        here.as_mut_slice().w()?.fill(0);
        // SAFETY: kernels read of it what was copied before, and no more.
        #[allow(unsafe_code, reason = "zeros would be one more pass over memory")]
        let there = unsafe { computations.alloc::<u8>(bytes) }.w()?;
        slots.push(Box::new(CudaSlot {
            here,
            there,
            copied: context.new_event(None).w()?,
            done: context.new_event(Some(CUevent_flags::CU_EVENT_BLOCKING_SYNC)).w()?,
            copies: copies.clone(),
            computations: computations.clone(),
        }));
    }
    copies.join(&computations).w()?;
    Ok(slots)
}

impl Slot for CudaSlot {
    fn bytes(&mut self) -> Result<&mut [u8]> {
        Ok(self.here.as_mut_slice().w()?)
    }

    fn send(&mut self, count: usize) -> Result<u64> {
        // As a slice, not as pinned memory: all of it would be copied, and an event of cudarc's recorded.
        let bytes = &self.here.as_slice().w()?[..count];
        let copy = || Ok(self.copies.memcpy_htod(bytes, &mut self.there).w()?);
        timed::launched_on(&self.copies, || "copy of weights".into(), copy)?;
        self.copied.record(&self.copies).w()?;
        self.computations.wait(&self.copied).w()?;
        Ok(self.there.device_ptr(&self.computations).0)
    }

    fn mark(&mut self) -> Result<()> {
        Ok(self.done.record(&self.computations).w()?)
    }

    fn wait(&mut self) -> Result<()> {
        Ok(self.done.synchronize().w()?)
    }

    fn drain(&mut self) -> Result<()> {
        self.copies.synchronize().w()?;
        Ok(self.computations.synchronize().w()?)
    }
}
