//! A frozen matrix in the numbers that it is held in.

use crate::error::Result;
use crate::memory;
use crate::quant::Nf4;
use candle_core::{DType, Tensor};

/// A frozen `[out_features, in_features]` matrix. Products are made in float32, whatever it is held in.
#[derive(Debug, Clone)]
pub enum Weight {
    /// float32, bfloat16 or float16.
    Dense(Tensor),
    /// 4 bits an element.
    Nf4(Nf4),
}

impl Weight {
    /// `[out_features, in_features]`
    pub fn dims(&self) -> [usize; 2] {
        match self {
            Self::Dense(tensor) => [tensor.dims()[0], tensor.dims()[1]],
            Self::Nf4(matrix) => matrix.dims(),
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
