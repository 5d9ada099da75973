//! The device's own clock around launches, while somebody asks for it.

use crate::error::Result;
use candle_core::Device;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::driver::CudaEvent;
use candle_core::cuda_backend::cudarc::driver::sys::CUevent_flags;
use std::cell::RefCell;

/// What was launched, and the events before and after it.
type Times = Vec<(String, CudaEvent, CudaEvent)>;

thread_local! {
    /// Those so far, while somebody asks for them.
    static TIMES: RefCell<Option<Times>> = const { RefCell::new(None) };
}

fn event(device: &Device) -> Result<CudaEvent> {
    let stream = device.as_cuda_device()?.cuda_stream();
    Ok(stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).w()?)
}

fn seconds(before: &CudaEvent, after: &CudaEvent) -> Result<f64> {
    Ok(f64::from(before.elapsed_ms(after).w()?) / 1e3)
}

/// Launches something, and notes how long it takes if somebody asks.
pub(super) fn launched(
    device: &Device,
    what: impl FnOnce() -> String,
    launch: impl FnOnce() -> Result<()>,
) -> Result<()> {
    if TIMES.with_borrow(Option::is_none) {
        return launch();
    }
    let before = event(device)?;
    launch()?;
    let after = event(device)?;
    TIMES.with_borrow_mut(|times| times.get_or_insert_default().push((what(), before, after)));
    Ok(())
}

/// Does some work of this thread. Also the device's seconds for all of it, and for each launch.
pub(crate) fn timed<T>(
    device: &Device,
    work: impl FnOnce() -> Result<T>,
) -> Result<(T, f64, Vec<(String, f64)>)> {
    let before = event(device)?;
    TIMES.set(Some(Vec::new()));
    let done = work();
    let times = TIMES.take().unwrap_or_default();
    let (done, after) = (done?, event(device)?);
    let each = times.into_iter().map(|(what, before, after)| Ok((what, seconds(&before, &after)?)));
    Ok((done, seconds(&before, &after)?, each.collect::<Result<_>>()?))
}
