//! A frozen matrix in the numbers that it is held in.

use crate::error::Result;
use crate::memory;
use crate::quant::Nf4;
use candle_core::{DType, Device, Tensor};
use domain::trial::{ComputeDtype, Precision, PrecisionMode};

/// The numbers in which a tensor is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Numbers {
    /// 32-bit floating point.
    Float32,
    /// bfloat16.
    Bfloat16,
    /// IEEE half precision.
    Float16,
    /// 4 bits, with or without double quantisation.
    Nf4 {
        /// Whether magnitudes are quantised too.
        double_quant: bool,
    },
}

impl Numbers {
    /// Those of a base's linear layers.
    pub fn of_linears(precision: Precision) -> Self {
        match precision.mode {
            PrecisionMode::FourBit => Self::Nf4 { double_quant: precision.double_quant },
            _ => Self::of_tables(precision),
        }
    }

    /// Those of its embedding and head.
    pub fn of_tables(precision: Precision) -> Self {
        match (precision.mode, precision.compute_dtype) {
            (PrecisionMode::Float32, _) => Self::Float32,
            (PrecisionMode::Bfloat16, _) | (PrecisionMode::FourBit, Some(ComputeDtype::Bfloat16)) => {
                Self::Bfloat16
            }
            (PrecisionMode::Float16, _) | (PrecisionMode::FourBit, Some(ComputeDtype::Float16)) => {
                Self::Float16
            }
            (PrecisionMode::FourBit, _) => Self::Float32,
        }
    }

    /// Of the tensor that is held, or that is quantised.
    pub(crate) fn dtype(self) -> DType {
        match self {
            Self::Float32 | Self::Nf4 { .. } => DType::F32,
            Self::Bfloat16 => DType::BF16,
            Self::Float16 => DType::F16,
        }
    }

    /// A tensor in these numbers.
    ///
    /// # Errors
    /// The device runs out of memory; what is to be quantised is no matrix.
    pub fn hold(self, tensor: &Tensor) -> Result<Weight> {
        let tensor = tensor.to_dtype(self.dtype())?;
        Ok(match self {
            Self::Nf4 { double_quant } => Weight::Nf4(Nf4::quantize(&tensor, double_quant)?),
            _ => Weight::Dense(tensor),
        })
    }

    /// A tensor of that shape that takes no memory: a view of one zero.
    ///
    /// # Errors
    /// What is to be quantised is no matrix.
    pub fn outline(self, shape: &[usize]) -> Result<Weight> {
        let view = Tensor::zeros((), self.dtype(), &Device::Cpu)?.broadcast_as(shape)?;
        Ok(match self {
            Self::Nf4 { double_quant } => Weight::Nf4(Nf4::outline(view.dims2()?.into(), double_quant)?),
            _ => Weight::Dense(view),
        })
    }
}

/// A frozen `[out_features, in_features]` matrix. On the CPU products are made in float32, whatever it is held in; on a
/// GPU in the base's compute type, with sums in float32.
#[derive(Debug, Clone)]
pub enum Weight {
    /// float32, bfloat16 or float16.
    Dense(Tensor),
    /// 4 bits an element.
    Nf4(Nf4),
}

impl From<Tensor> for Weight {
    fn from(tensor: Tensor) -> Self {
        Self::Dense(tensor)
    }
}

impl Weight {
    /// `[out_features, in_features]`
    pub fn dims(&self) -> [usize; 2] {
        match self {
            Self::Dense(tensor) => [tensor.dims()[0], tensor.dims()[1]],
            Self::Nf4(matrix) => matrix.dims(),
        }
    }

    /// Where it lies.
    pub fn device(&self) -> &Device {
        match self {
            Self::Dense(tensor) => tensor.device(),
            Self::Nf4(matrix) => matrix.device(),
        }
    }

    /// Its elements.
    pub fn elem_count(&self) -> usize {
        let [rows, columns] = self.dims();
        rows * columns
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> u64 {
        match self {
            Self::Dense(tensor) => memory::bytes(tensor),
            Self::Nf4(matrix) => matrix.bytes(),
        }
    }

    /// The tensor that holds it; of a quantised one, its numbers in float32.
    ///
    /// # Errors
    /// The device runs out of memory.
    pub fn dense(self) -> Result<Tensor> {
        match self {
            Self::Dense(tensor) => Ok(tensor),
            Self::Nf4(matrix) => matrix.dequantize(),
        }
    }

    /// The matrix in float32, as products see it.
    ///
    /// # Errors
    /// The device runs out of memory.
    pub fn to_float32(&self) -> Result<Tensor> {
        match self {
            Self::Dense(tensor) => Ok(tensor.to_dtype(DType::F32)?),
            Self::Nf4(matrix) => matrix.dequantize(),
        }
    }
}
