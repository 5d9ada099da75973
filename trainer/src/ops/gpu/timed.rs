//! The device's own clock around launches, while somebody asks for it.

use crate::error::Result;
use candle_core::Device;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::sys::CUevent_flags;
use candle_core::cuda_backend::cudarc::driver::{CudaEvent, CudaStream};
use std::cell::RefCell;

/// What was launched, and the events before and after it.
type Times = Vec<(String, CudaEvent, CudaEvent)>;

thread_local! {
    /// Those so far, while somebody asks for them.
    static TIMES: RefCell<Option<Times>> = const { RefCell::new(None) };
}

fn event(stream: &CudaStream) -> Result<CudaEvent> {
    Ok(stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).w()?)
}

fn seconds(before: &CudaEvent, after: &CudaEvent) -> Result<f64> {
    Ok(f64::from(before.elapsed_ms(after).w()?) / 1e3)
}

/// Launches something on a device's own stream, and notes how long it takes if somebody asks.
pub(super) fn launched(
    device: &Device,
    what: impl FnOnce() -> String,
    launch: impl FnOnce() -> Result<()>,
) -> Result<()> {
    launched_on(&device.as_cuda_device()?.cuda_stream(), what, launch)
}

/// The same on another of its streams.
pub(super) fn launched_on(
    stream: &CudaStream,
    what: impl FnOnce() -> String,
    launch: impl FnOnce() -> Result<()>,
) -> Result<()> {
    if TIMES.with_borrow(Option::is_none) {
        return launch();
    }
    let before = event(stream)?;
    launch()?;
    let after = event(stream)?;
    TIMES.with_borrow_mut(|times| times.get_or_insert_default().push((what(), before, after)));
    Ok(())
}

/// Does some work of this thread. Also the device's seconds for all of it, and for each launch.
pub(crate) fn timed<T>(
    device: &Device,
    work: impl FnOnce() -> Result<T>,
) -> Result<(T, f64, Vec<(String, f64)>)> {
    let stream = device.as_cuda_device()?.cuda_stream();
    let before = event(&stream)?;
    TIMES.set(Some(Vec::new()));
    let done = work();
    let times = TIMES.take().unwrap_or_default();
    let (done, after) = (done?, event(&stream)?);
    let each = times.into_iter().map(|(what, before, after)| Ok((what, seconds(&before, &after)?)));
    Ok((done, seconds(&before, &after)?, each.collect::<Result<_>>()?))
}
