//! Products of matrices, with sums in float32 whatever the operands are held in.

use super::{pointer, problem};
use crate::error::Result;
use candle_core::{DType, Device, Tensor};

/// Matrices by rows in a tensor, one for each member of a batch.
#[derive(Debug, Clone, Copy)]
pub(super) struct Matrix {
    /// Where the first one's elements begin.
    pub(super) start: u64,
    pub(super) dtype: DType,
    /// Elements from one row to the next.
    pub(super) stride: usize,
    /// Elements from one matrix to the next.
    pub(super) step: usize,
    /// Whether the transposes are meant.
    pub(super) transposed: bool,
}

impl Matrix {
    /// A contiguous `[rows, columns]` tensor as it is. It has to live until the product is launched.
    pub(super) fn whole(t: &Tensor) -> Result<Self> {
        Self::within(t, 0, t.dims2()?.1, 0)
    }

    /// Matrices in a contiguous tensor: the first begins at element `offset`, the next ones `step` elements on; their
    /// rows are `stride` elements apart.
    pub(super) fn within(t: &Tensor, offset: usize, stride: usize, step: usize) -> Result<Self> {
        let start = pointer(t)? + (offset * t.dtype().size_in_bytes()) as u64;
        Ok(Self { start, dtype: t.dtype(), stride, step, transposed: false })
    }

    /// The transpose.
    pub(super) fn t(self) -> Self {
        Self { transposed: !self.transposed, ..self }
    }
}

/// `c = alpha · a · b + beta · c` for each of `batches` matrices: `a` `[m, k]`, `b` `[k, n]`, `c` `[m, n]`. With
/// `beta` 0 nothing of `c` is read.
#[derive(Debug, Clone, Copy)]
pub(super) struct Product {
    /// m, n, k.
    pub(super) size: [usize; 3],
    pub(super) a: Matrix,
    pub(super) b: Matrix,
    pub(super) c: Matrix,
    pub(super) alpha: f32,
    pub(super) beta: f32,
    pub(super) batches: usize,
}

/// The side up to which a product counts as narrow: an adapter's are.
#[cfg(feature = "cuda")]
const NARROW: usize = 256;

#[cfg(feature = "cuda")]
impl Product {
    /// What it is called in a profile.
    fn kind(&self) -> &'static str {
        match self {
            Self { batches: 2.., .. } => "products of attention",
            Self { size, .. } if size.iter().any(|side| *side <= NARROW) => "narrow products",
            _ => "wide products",
        }
    }
}

/// Makes a product.
///
/// Each caller's matrices lie within tensors that it holds: size, strides and steps are those of the tensors' shapes,
/// and [`pointer`] has checked device and contiguity.
pub(super) fn gemm(
    device: &Device,
    size: [usize; 3],
    (a, b): (Matrix, Matrix),
    c: Matrix,
    (alpha, beta): (f32, f32),
    batches: usize,
) -> Result<()> {
    if size[0] == 0 || size[1] == 0 || batches == 0 {
        return Ok(());
    }
    if a.dtype != b.dtype {
        return Err(problem(format!("a product on the GPU of {:?} by {:?}", a.dtype, b.dtype)));
    }
    let product = Product { size, a, b, c, alpha, beta, batches };
    #[cfg(test)]
    if device.is_cpu() {
        super::emulated::gemm(&product);
        return Ok(());
    }
    #[cfg(feature = "cuda")]
    if device.is_cuda() {
        return super::timed::launched(
            device,
            || product.kind().into(),
            || super::cuda::gemm(device, &product),
        );
    }
    Err(problem(format!("{product:?}: {device:?} is no GPU")))
}
