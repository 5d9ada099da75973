//! A GPU's memory pool: candle takes device memory from the driver's stream-ordered pool, which counts it.

use super::Pool;
use crate::error::Result;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::sys::{self, CUmemPool_attribute, CUmemoryPool};
use candle_core::{CudaDevice, Device};

/// Makes a device's pool keep what is given back to it, and switches off the events by which candle would order
/// several streams: all work on tensors goes through the device's one stream.
///
/// # Errors
/// The driver refuses.
pub(crate) fn keep(device: &Device) -> Result<()> {
    let device = device.as_cuda_device()?;
    // SAFETY: the device has one stream, which all its tensors are made, used and freed on. What else of its memory a
    // second stream uses while a base is loaded, `ops::gpu::slots` orders.
    #[allow(unsafe_code, reason = "candle leaves the promise to us")]
    unsafe {
        device.disable_event_tracking();
    }
    set(device, CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD, u64::MAX)
}

/// Starts the high-water marks anew.
///
/// # Errors
/// The driver refuses.
pub(super) fn reset(device: &Device) -> Result<()> {
    let device = device.as_cuda_device()?;
    set(device, CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH, 0)?;
    set(device, CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH, 0)
}

/// What the pool counts.
///
/// # Errors
/// The driver refuses.
pub(super) fn read(device: &Device) -> Result<Pool> {
    let device = device.as_cuda_device()?;
    let (free, total) = device.cuda_stream().context().mem_get_info().w()?;
    Ok(Pool {
        used: get(device, CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)?,
        used_high: get(device, CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)?,
        reserved_high: get(device, CUmemPool_attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH)?,
        device_used: (total - free) as u64,
    })
}

fn pool(device: &CudaDevice) -> Result<CUmemoryPool> {
    let mut pool = std::ptr::null_mut();
    // SAFETY: `pool` is valid for the one write, and the context's device exists as long as the context.
    #[allow(unsafe_code, reason = "the driver's interface is raw pointers")]
    unsafe { sys::cuDeviceGetDefaultMemPool(&mut pool, device.cuda_stream().context().cu_device()) }
        .result()
        .w()?;
    Ok(pool)
}

fn set(device: &CudaDevice, attribute: CUmemPool_attribute, mut value: u64) -> Result<()> {
    let pool = pool(device)?;
    // SAFETY: the attributes that this is called with are 64-bit numbers, and the driver only reads them.
    #[allow(unsafe_code, reason = "the driver's interface is raw pointers")]
    Ok(unsafe { sys::cuMemPoolSetAttribute(pool, attribute, (&raw mut value).cast()) }.result().w()?)
}

fn get(device: &CudaDevice, attribute: CUmemPool_attribute) -> Result<u64> {
    let (pool, mut value) = (pool(device)?, 0u64);
    // SAFETY: the attributes that this is called with are 64-bit numbers, which `value` has room for.
    #[allow(unsafe_code, reason = "the driver's interface is raw pointers")]
    unsafe { sys::cuMemPoolGetAttribute(pool, attribute, (&raw mut value).cast()) }.result().w()?;
    Ok(value)
}
