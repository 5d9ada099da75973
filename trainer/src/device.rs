//! The device that a run computes on: `cpu`, or `cuda:N` in a build with the feature `cuda`.

use crate::error::{Result, TrainError};
use candle_core::Device;
#[cfg(any(feature = "cuda", test))]
use domain::machine::ComputeCapability;
use domain::trial::Precision;
#[cfg(any(feature = "cuda", test))]
use domain::trial::PrecisionMode;

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
        crate::memory::heap::keep_freed();
        return Ok(Device::Cpu);
    }
    let ordinal = match name.strip_prefix(CUDA).ok_or_else(unknown)? {
        "" => 0,
        rest => rest.strip_prefix(':').and_then(|number| number.parse().ok()).ok_or_else(unknown)?,
    };
    gpu(name, ordinal)
}

/// The compute capability that this program's kernels were compiled for: major, minor. `None` without CUDA.
pub fn built_for() -> Option<(u32, u32)> {
    let capability: u32 = option_env!("LORAFLEET_COMPUTE_CAP")?.parse().ok()?;
    Some((capability / 10, capability % 10))
}

/// Whether kernels that were compiled for one compute capability run on a GPU of another: on a later one too. But from
/// 9.0 on they are compiled with what that very capability has (nvcc's `sm_90a`), and no other GPU runs them.
pub fn runs_on(built_for: (u32, u32), gpu: (u32, u32)) -> bool {
    if built_for >= (9, 0) { gpu == built_for } else { gpu >= built_for }
}

/// Refuses a precision whose numbers a device's kernels do not know.
///
/// # Errors
/// Activations were in bfloat16 on a GPU that is too old for it, or in a program that was built for one.
pub(crate) fn check(device: &Device, precision: Precision) -> Result<()> {
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        return takes(precision, capability(device)?, built_for());
    }
    let _ = (device, precision);
    Ok(())
}

#[cfg(any(feature = "cuda", test))]
fn takes(precision: Precision, gpu: (u32, u32), built_for: Option<(u32, u32)>) -> Result<()> {
    let (has, what) = match built_for.filter(|built_for| *built_for < gpu) {
        Some(built_for) => (built_for, "this program was built for"),
        None => (gpu, "the GPU has"),
    };
    let capability = ComputeCapability { major: has.0, minor: has.1 };
    if precision.compute_capability().is_none_or(|needed| capability >= needed) {
        return Ok(());
    }
    let four_bit = precision.mode == PrecisionMode::FourBit;
    let key = if four_bit { "compute_dtype" } else { "precision_mode" };
    let problem = format!("bfloat16 takes compute capability 8.0, and {what} {}.{}", has.0, has.1);
    Err(TrainError::parameter(key, problem, "set it to float16 (docs/gpu.md)"))
}

#[cfg(not(feature = "cuda"))]
fn gpu(name: &str, _: usize) -> Result<Device> {
    let problem = format!("{name} is a GPU, and this program was built without CUDA");
    Err(TrainError::parameter("device", problem, "build it with --features cuda (docs/gpu.md), or use cpu"))
}

#[cfg(feature = "cuda")]
fn gpu(name: &str, ordinal: usize) -> Result<Device> {
    let failed = |problem: String, remedy: &str| TrainError::parameter("device", problem, remedy);
    // Without one of them, the first call into it would end the process.
    if let Some(error) = missing(&["libcuda.so.1", "libcuda.so"]) {
        let problem = format!("{name}: no NVIDIA driver was found ({error})");
        return Err(failed(problem, "install the driver, or use cpu"));
    }
    let libraries: [&[&str]; 2] =
        [&["libcublas.so", "libcublas.so.13", "libcublas.so.12"], &["libcurand.so", "libcurand.so.10"]];
    if let Some(error) = libraries.into_iter().find_map(missing) {
        let problem = format!("{name}: one of CUDA's libraries was not found ({error})");
        return Err(failed(
            problem,
            "install CUDA's libraries or name their folder in LD_LIBRARY_PATH, or use cpu",
        ));
    }
    let device = Device::new_cuda_with_stream(ordinal).map_err(|error| {
        let problem = format!("{name} cannot be used: {error}");
        failed(problem, "see what nvidia-smi lists, or use cpu")
    })?;
    let compute = capability(&device)?;
    if let Some(built_for) = built_for().filter(|built_for| !runs_on(*built_for, compute)) {
        let problem = format!(
            "{name} has compute capability {}.{}, and this program was built for {}.{}",
            compute.0, compute.1, built_for.0, built_for.1
        );
        let remedy =
            format!("build it with CUDA_COMPUTE_CAP={}{} (docs/gpu.md), or use cpu", compute.0, compute.1);
        return Err(failed(problem, &remedy));
    }
    crate::memory::pool::keep(&device)?;
    crate::ops::sum_in_float32(&device)?;
    Ok(device)
}

/// Why a library cannot be loaded under any of its names, if it cannot. If it can, it stays loaded.
#[cfg(feature = "cuda")]
fn missing(names: &[&str]) -> Option<String> {
    let mut why = None;
    for name in names {
        // SAFETY: CUDA's libraries run no code of their own on being loaded but their initialisers, which cudarc runs too.
        #[allow(unsafe_code, reason = "a library can be looked for only by loading it")]
        let library = unsafe { libloading::Library::new(*name) };
        match library {
            Ok(library) => {
                std::mem::forget(library);
                return None;
            }
            Err(error) => why = Some(error.to_string()),
        }
    }
    why
}

/// A GPU's compute capability: major, minor.
#[cfg(feature = "cuda")]
fn capability(device: &Device) -> Result<(u32, u32)> {
    use candle_core::cuda_backend::WrapErr;
    use candle_core::cuda_backend::cudarc::driver::sys::{self, CUdevice_attribute};
    let cuda = device.as_cuda_device()?.cuda_stream().context().cu_device();
    let ask = |attribute: CUdevice_attribute| -> Result<u32> {
        let mut value = 0;
        // SAFETY: `value` is valid for the one write, and the context's device exists as long as the context.
        #[allow(unsafe_code, reason = "the driver's interface is raw pointers")]
        unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, cuda) }.result().w()?;
        Ok(value as u32)
    };
    Ok((
        ask(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        ask(CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_kernels_run_on() {
        // (compiled for, GPU, whether it runs them)
        for (built_for, gpu, runs) in [
            ((7, 0), (7, 0), true),
            ((7, 0), (9, 0), true),
            ((8, 0), (7, 5), false),
            ((8, 0), (8, 6), true),
            ((8, 6), (8, 0), false),
            ((8, 9), (10, 0), true),
            ((9, 0), (8, 9), false),
            ((9, 0), (9, 0), true),
            ((9, 0), (10, 0), false),
            ((10, 0), (10, 3), false),
        ] {
            assert_eq!(runs_on(built_for, gpu), runs, "{built_for:?} on {gpu:?}");
        }
        assert_eq!(built_for().is_some(), cfg!(feature = "cuda"));
    }

    #[test]
    fn what_bfloat16_takes() {
        use domain::trial::ComputeDtype;
        let of = |mode, compute_dtype| Precision { mode, compute_dtype, double_quant: true };
        let (half, brain) = (of(PrecisionMode::Float16, None), of(PrecisionMode::Bfloat16, None));
        let four = |numbers| of(PrecisionMode::FourBit, Some(numbers));
        // (precision, the GPU's compute capability, that which the kernels were built for, what is said)
        for (precision, gpu, built_for, said) in [
            (half, (7, 0), (7, 0), None),
            (four(ComputeDtype::Float16), (7, 0), (7, 0), None),
            (of(PrecisionMode::FourBit, None), (7, 0), (7, 0), None),
            (brain, (8, 0), (8, 0), None),
            (brain, (9, 0), (8, 0), None),
            (
                brain,
                (7, 0),
                (7, 0),
                Some("precision_mode: bfloat16 takes compute capability 8.0, and the GPU has 7.0"),
            ),
            (four(ComputeDtype::Bfloat16), (7, 5), (7, 5), Some("compute_dtype: bfloat16 takes")),
            (brain, (9, 0), (7, 0), Some("this program was built for 7.0")),
        ] {
            let found = takes(precision, gpu, Some(built_for)).err().map(|error| error.to_string());
            let is = match (&found, said) {
                (Some(found), Some(said)) => found.contains(said),
                (found, said) => found.is_none() && said.is_none(),
            };
            assert!(is, "{precision} on {gpu:?}, built for {built_for:?}: {found:?}");
        }
        assert!(check(&Device::Cpu, brain).is_ok());
    }

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
