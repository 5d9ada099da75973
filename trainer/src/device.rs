//! The device that a run computes on: `cpu`, or `cuda:N` in a build with the feature `cuda`.

use crate::error::{Result, TrainError};
use candle_core::Device;

/// The name of the CPU as a device.
pub const CPU: &str = "cpu";
/// What the name of an NVIDIA GPU starts with; the driver's number of it follows.
const CUDA: &str = "cuda";

/// Opens a device by its name: `cpu`, `cuda` (the first GPU) or `cuda:N`, counted as the driver counts the GPUs that
/// `CUDA_VISIBLE_DEVICES` leaves visible.
///
/// # Errors
/// The name is no device's; this build has no CUDA; there is no driver, or it has no such GPU.
pub fn open(name: &str) -> Result<Device> {
    let unknown = || {
        let problem = format!("{name:?} is no device");
        TrainError::parameter("device", problem, "give cpu, cuda or cuda:N with N from 0")
    };
    if name == CPU {
        return Ok(Device::Cpu);
    }
    let ordinal = match name.strip_prefix(CUDA).ok_or_else(unknown)? {
        "" => 0,
        rest => rest.strip_prefix(':').and_then(|number| number.parse().ok()).ok_or_else(unknown)?,
    };
    gpu(name, ordinal)
}

#[cfg(not(feature = "cuda"))]
fn gpu(name: &str, _: usize) -> Result<Device> {
    let problem = format!("{name} is a GPU, and this program was built without CUDA");
    Err(TrainError::parameter("device", problem, "build it with --features cuda (docs/gpu.md), or use cpu"))
}

#[cfg(feature = "cuda")]
fn gpu(name: &str, ordinal: usize) -> Result<Device> {
    let failed = |problem: String, remedy: &str| TrainError::parameter("device", problem, remedy);
    // Without a driver, the first call into it would end the process.
    // SAFETY: the driver's library runs no code of its own on being loaded but its initialisers, which cudarc runs too.
    #[allow(unsafe_code, reason = "a library can be looked for only by loading it")]
    let driver = unsafe { libloading::Library::new("libcuda.so.1") };
    if let Err(error) = driver {
        let problem = format!("{name}: no NVIDIA driver was found ({error})");
        return Err(failed(problem, "install the driver, or use cpu"));
    }
    let device = Device::new_cuda_with_stream(ordinal).map_err(|error| {
        let problem = format!("{name} cannot be used: {error}");
        failed(problem, "see what nvidia-smi lists, or use cpu")
    })?;
    crate::memory::pool::keep(&device)?;
    Ok(device)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert!(open("cpu").unwrap().is_cpu());
        // (name, what is said about it)
        for (name, said) in
            [("gpu", "no device"), ("cuda:x", "no device"), ("cuda0", "no device"), ("", "no device")]
        {
            let error = open(name).unwrap_err().to_string();
            assert!(error.contains(said), "{name}: {error}");
        }
        if cfg!(not(feature = "cuda")) {
            for name in ["cuda", "cuda:3"] {
                let error = open(name).unwrap_err().to_string();
                assert!(error.contains("--features cuda"), "{name}: {error}");
            }
        }
    }
}
