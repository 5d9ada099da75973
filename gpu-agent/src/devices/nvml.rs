//! What the driver's management library (NVML) says of this machine's GPUs. It is loaded when asked, so that a machine
//! without a driver is one without GPUs.

use super::choose::{Absent, Facts, Gpu, Slice};
use nvml_wrapper::enum_wrappers::device::{Clock, EccCounter, MemoryError, TemperatureSensor};
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::{Device, Nvml, cuda_driver_version_major, cuda_driver_version_minor};
use nvml_wrapper_sys::bindings::NvmlLib;
use std::sync::OnceLock;
use telemetry::metrics::{self, Reading};

/// The library's name as drivers install it; the one without a number comes with development packages alone.
const LIBRARY: &str = if cfg!(windows) { "nvml.dll" } else { "libnvidia-ml.so.1" };

/// Asks the driver.
pub(super) fn read() -> Result<Facts, Absent> {
    let broken = |error: NvmlError| Absent::Broken(error.to_string());
    let nvml = Nvml::builder().lib_path(LIBRARY.as_ref()).init().map_err(|error| match error {
        NvmlError::LibloadingError(_) => Absent::Missing,
        error => broken(error),
    })?;
    let cuda = nvml.sys_cuda_driver_version().map_err(broken)?;
    let part = |number: i32| u32::try_from(number).unwrap_or_default();
    let mut facts = Facts {
        driver: nvml.sys_driver_version().map_err(broken)?,
        cuda: (part(cuda_driver_version_major(cuda)), part(cuda_driver_version_minor(cuda))),
        ..Facts::default()
    };
    for index in 0..nvml.device_count().map_err(broken)? {
        match nvml.device_by_index(index).and_then(|device| gpu(&nvml, &device)) {
            Ok(gpu) => {
                tracing::info!(
                    name = gpu.name,
                    uuid = gpu.uuid,
                    memory_bytes = gpu.memory_bytes,
                    utilisation_percent = gpu.utilisation,
                    milliwatts = gpu.power,
                    celsius = gpu.temperature,
                    uncorrected_errors = gpu.uncorrected_errors,
                    slices = gpu.slices.as_ref().map(Vec::len),
                    "a GPU"
                );
                facts.gpus.push(gpu);
            }
            Err(error) => {
                facts.silent.push(format!("GPU {index} of this machine: {error}; see what nvidia-smi says"))
            }
        }
    }
    Ok(facts)
}

/// What it says of a GPU. Not every card measures everything; only what is needed must be there.
fn gpu(nvml: &Nvml, device: &Device) -> Result<Gpu, NvmlError> {
    let compute = device.cuda_compute_capability()?;
    let speed = || {
        let cores = u64::from(device.num_cores().ok()?);
        Some(cores * u64::from(device.max_clock_info(Clock::SM).ok()?))
    };
    let sliced = device.mig_mode().is_ok_and(|mode| mode.current == 1);
    Ok(Gpu {
        name: device.name()?,
        uuid: device.uuid()?,
        memory_bytes: device.memory_info()?.total,
        compute: (u32::try_from(compute.major).unwrap_or(0), u32::try_from(compute.minor).unwrap_or(0)),
        speed: speed().unwrap_or_default(),
        uncorrected_errors: device
            .total_ecc_errors(MemoryError::Uncorrected, EccCounter::Volatile)
            .unwrap_or_default(),
        slices: sliced.then(|| slices(nvml, device)).transpose()?,
        utilisation: device.utilization_rates().ok().map(|rates| rates.gpu),
        power: device.power_usage().ok(),
        temperature: device.temperature(TemperatureSensor::Gpu).ok(),
    })
}

/// Has the metrics read the GPUs whenever they are collected. The driver is asked first then.
pub(super) fn observe() {
    use metrics::{GPU_MEMORY_LIMIT, GPU_MEMORY_USAGE, GPU_UTILIZATION, HW_ERRORS, HW_POWER, HW_TEMPERATURE};
    let (plain, typed): (&[_], &[_]) = (&[], &[("hw.type", "gpu")]);
    let memory_errors = &[("hw.type", "gpu"), ("error.type", "uncorrected")];
    GPU_UTILIZATION.observe(each(plain, |gpu| Ok(f64::from(gpu.utilization_rates()?.gpu) / 100.0)));
    GPU_MEMORY_USAGE.observe(each(plain, |gpu| Ok(gpu.memory_info()?.used as f64)));
    GPU_MEMORY_LIMIT.observe(each(plain, |gpu| Ok(gpu.memory_info()?.total as f64)));
    HW_POWER.observe(each(typed, |gpu| Ok(f64::from(gpu.power_usage()?) / 1e3)));
    HW_TEMPERATURE.observe(each(typed, |gpu| Ok(f64::from(gpu.temperature(TemperatureSensor::Gpu)?))));
    HW_ERRORS.observe(each(memory_errors, |gpu| {
        Ok(gpu.total_ecc_errors(MemoryError::Uncorrected, EccCounter::Volatile)? as f64)
    }));
}

/// Reads something of each GPU; not every card measures everything.
fn each(
    attributes: &'static [(&'static str, &'static str)],
    read: impl Fn(&Device) -> Result<f64, NvmlError> + Send + Sync + 'static,
) -> impl Fn() -> Vec<Reading> + Send + Sync + 'static {
    static DRIVER: OnceLock<Option<Nvml>> = OnceLock::new();
    move || {
        let driver = DRIVER.get_or_init(|| Nvml::builder().lib_path(LIBRARY.as_ref()).init().ok());
        let Some(nvml) = driver else { return Vec::new() };
        let count = nvml.device_count().unwrap_or_default();
        let gpus = (0..count).filter_map(|index| nvml.device_by_index(index).ok());
        let reading = |gpu: Device| {
            let (value, id, name) = (read(&gpu).ok()?, gpu.uuid().ok()?, gpu.name().ok()?);
            let own = [("hw.id", id.as_str()), ("hw.name", name.as_str())];
            Some(Reading::new(value, &[&own[..], attributes].concat()))
        };
        gpus.filter_map(reading).collect()
    }
}

/// A GPU's MIG slices, for which the wrapper has no call.
#[allow(unsafe_code, reason = "the driver's library is C")]
fn slices(nvml: &Nvml, device: &Device) -> Result<Vec<Slice>, NvmlError> {
    // SAFETY: the library is loaded and initialised already, by `nvml`; loading it once more runs none of its code.
    let library = unsafe { NvmlLib::new(LIBRARY)? };
    let (Ok(most), Ok(by_index)) =
        (&library.nvmlDeviceGetMaxMigDeviceCount, &library.nvmlDeviceGetMigDeviceHandleByIndex)
    else {
        return Ok(Vec::new());
    };
    let mut count = 0;
    // SAFETY: the handle is alive as long as `device`, and `count` is where the answer is written.
    let status = unsafe { most(device.handle(), &mut count) };
    let mut slices = Vec::new();
    for index in 0..if status == 0 { count } else { 0 } {
        let mut handle = std::ptr::null_mut();
        // SAFETY: as above. Numbers without a slice are answered with a status other than 0.
        if unsafe { by_index(device.handle(), index, &mut handle) } != 0 {
            continue;
        }
        // SAFETY: the driver has just given this handle, and `nvml`, which keeps it valid, outlives `slice`.
        let slice = unsafe { Device::new(handle, nvml) };
        slices.push(Slice {
            name: slice.name()?,
            uuid: slice.uuid()?,
            memory_bytes: slice.memory_info()?.total,
        });
    }
    Ok(slices)
}
