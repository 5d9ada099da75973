//! The device: the driver, which launches kernels, and cuBLAS.

use super::gemm::Product;
use super::{Argument, Grid, Module, problem};
use crate::error::Result;
use candle_core::cuda_backend::CudaStorageSlice;
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::cublas::{result, sys};
use candle_core::cuda_backend::cudarc::driver::sys::CUfunction_attribute;
use candle_core::cuda_backend::cudarc::driver::{DevicePtr, LaunchConfig, PushKernelArg};
use candle_core::{DType, Device, Storage, Tensor};

/// The kernels of `trainer/kernels`, as PTX.
mod ptx {
    include!(concat!(env!("OUT_DIR"), "/ptx.rs"));
}

impl Module {
    /// The name under which the device keeps it, and its code.
    fn code(self) -> (&'static str, &'static str) {
        match self {
            Self::Attention => ("lorafleet_attention", ptx::ATTENTION),
            Self::Elementwise => ("lorafleet_elementwise", ptx::ELEMENTWISE),
            Self::Flash => ("lorafleet_flash", ptx::FLASH),
            Self::Loss => ("lorafleet_loss", ptx::LOSS),
            Self::Optimizer => ("lorafleet_optimizer", ptx::OPTIMIZER),
            Self::Quant => ("lorafleet_quant", ptx::QUANT),
        }
    }
}

pub(super) fn pointer(t: &Tensor) -> Result<u64> {
    let (storage, layout) = t.storage_and_layout();
    let Storage::Cuda(cuda) = &*storage else {
        return Err(problem("a GPU kernel got a tensor of another device"));
    };
    let stream = cuda.device.cuda_stream();
    let start = match &cuda.slice {
        CudaStorageSlice::U8(x) => x.device_ptr(&stream).0,
        CudaStorageSlice::U32(x) => x.device_ptr(&stream).0,
        CudaStorageSlice::I64(x) => x.device_ptr(&stream).0,
        CudaStorageSlice::F16(x) => x.device_ptr(&stream).0,
        CudaStorageSlice::BF16(x) => x.device_ptr(&stream).0,
        CudaStorageSlice::F32(x) => x.device_ptr(&stream).0,
        CudaStorageSlice::F64(x) => x.device_ptr(&stream).0,
        _ => return Err(problem(format!("no GPU kernel takes {:?}", t.dtype()))),
    };
    Ok(start + (layout.start_offset() * t.dtype().size_in_bytes()) as u64)
}

/// Shared memory that a launch gets without the function being told.
const SHARED_UNASKED: u32 = 48 * 1024;

pub(super) fn launch(
    device: &Device,
    module: Module,
    kernel: &str,
    grid: Grid,
    arguments: &[Argument],
) -> Result<()> {
    let (name, ptx) = module.code();
    let function = device.as_cuda_device()?.get_or_load_custom_func(kernel, name, ptx)?;
    if grid.shared > SHARED_UNASKED {
        let most = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        function.set_attribute(most, grid.shared as i32).w()?;
    }
    let mut builder = function.builder();
    for argument in arguments {
        match argument {
            Argument::Pointer(value) | Argument::Count(value) => builder.arg(value),
            Argument::Width(value) => builder.arg(value),
            Argument::Number(value) => builder.arg(value),
            Argument::Double(value) => builder.arg(value),
        };
    }
    let config = LaunchConfig {
        grid_dim: (grid.blocks.0, grid.blocks.1, 1),
        block_dim: (grid.threads, 1, 1),
        shared_mem_bytes: grid.shared,
    };
    // SAFETY: `super::launch` says what its callers have made sure of.
    #[allow(unsafe_code, reason = "a kernel's arguments are untyped")]
    unsafe { builder.launch(config) }.w()?;
    Ok(())
}

fn data_type(dtype: DType) -> Result<sys::cudaDataType_t> {
    Ok(match dtype {
        DType::F32 => sys::cudaDataType_t::CUDA_R_32F,
        DType::F16 => sys::cudaDataType_t::CUDA_R_16F,
        DType::BF16 => sys::cudaDataType_t::CUDA_R_16BF,
        other => return Err(problem(format!("no product on the GPU in {other:?}"))),
    })
}

fn operation(transposed: bool) -> sys::cublasOperation_t {
    match transposed {
        true => sys::cublasOperation_t::CUBLAS_OP_T,
        false => sys::cublasOperation_t::CUBLAS_OP_N,
    }
}

/// cuBLAS's own choice. It takes tensor cores for 16 bits by itself; `CUBLAS_GEMM_DEFAULT_TENSOR_OP`, the older way to
/// ask for them, also lets products of float32 be made with operands that are rounded to 16 bits.
const ALGORITHM: sys::cublasGemmAlgo_t = sys::cublasGemmAlgo_t::CUBLAS_GEMM_DFALT;

/// Has cuBLAS add up in float32 alone. Where it splits a sum, it may by itself round the parts of a product in 16 bits to
/// these.
///
/// # Errors
/// The device is no GPU.
pub(crate) fn sum_in_float32(device: &Device) -> Result<()> {
    let blas = device.as_cuda_device()?.cublas_handle();
    let mode = sys::cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
    // SAFETY: the handle is the device's own, which `blas` keeps alive.
    #[allow(unsafe_code, reason = "cuBLAS's interface is raw pointers")]
    Ok(unsafe { sys::cublasSetMathMode(*blas.handle(), mode) }.result().w()?)
}

/// cuBLAS works by columns, and so sees each matrix as its transpose: cᵀ = bᵀ · aᵀ.
pub(super) fn gemm(device: &Device, product: &Product) -> Result<()> {
    let Product { size: [m, n, k], a, b, c, alpha, beta, batches } = product;
    let blas = device.as_cuda_device()?.cublas_handle();
    // SAFETY: `super::gemm::gemm` says what its callers have made sure of.
    #[allow(unsafe_code, reason = "cuBLAS's interface is raw pointers")]
    unsafe {
        result::gemm_strided_batched_ex(
            *blas.handle(),
            operation(b.transposed),
            operation(a.transposed),
            *n as i32,
            *m as i32,
            *k as i32,
            std::ptr::from_ref(alpha).cast(),
            b.start as *const _,
            data_type(b.dtype)?,
            b.stride as i32,
            b.step as i64,
            a.start as *const _,
            data_type(a.dtype)?,
            a.stride as i32,
            a.step as i64,
            std::ptr::from_ref(beta).cast(),
            c.start as *mut _,
            data_type(c.dtype)?,
            c.stride as i32,
            c.step as i64,
            *batches as i32,
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            ALGORITHM,
        )
    }
    .w()?;
    Ok(())
}
