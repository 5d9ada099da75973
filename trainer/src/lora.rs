//! LoRA adapters: the trainable matrices, their initialisation, and the low-rank product with its backward.

use crate::error::Result;
use crate::{memory, ops, rng};
use candle_core::{DType, Device, Tensor};

/// A linear layer that can take an adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModuleSpec {
    /// Its path in the model, such as `model.layers.0.self_attn.q_proj`.
    pub path: String,
    /// Width of its input.
    pub in_features: usize,
    /// Width of its output.
    pub out_features: usize,
}

/// The adapter of one linear layer: `y += scaling · B · (A · dropout(x))`. All tensors are float32.
#[derive(Debug, Clone)]
pub struct LoraMatrix {
    /// The layer's path.
    pub path: String,
    /// `[rank, in_features]`.
    pub a: Tensor,
    /// `[out_features, rank]`.
    pub b: Tensor,
    /// Accumulated gradient of the summed loss by `a`.
    pub grad_a: Option<Tensor>,
    /// Accumulated gradient of the summed loss by `b`.
    pub grad_b: Option<Tensor>,
}

/// One trial's adapter.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// Its matrices in model order.
    pub modules: Vec<LoraMatrix>,
    /// `lora_alpha / rank`.
    pub scaling: f64,
    /// Probability of dropping an input element while training.
    pub dropout: f64,
    /// Seed of the dropout masks.
    pub seed: u64,
}

/// Where a dropout mask stands in a run: the micro-batch's running number. With the adapter's seed and the
/// module it names the mask, so that a replayed step sees the same one.
pub type DropoutCounter = u64;

/// Where the mask of some rows of a module's input stands: the micro-batch, and the first of these rows among
/// all that the trial has in it. Rows that come in blocks get the mask that they would get at once.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MaskPlace {
    pub(crate) counter: DropoutCounter,
    pub(crate) first_row: usize,
}

impl Adapter {
    /// A fresh adapter as PEFT initialises it: A uniform in ±1/√in_features (Kaiming with a = √5), B zero.
    /// The values depend on the seed and each module's path alone.
    ///
    /// # Errors
    /// The device runs out of memory.
    pub fn new(
        modules: &[ModuleSpec],
        rank: usize,
        lora_alpha: f64,
        dropout: f64,
        seed: u64,
        device: &Device,
    ) -> Result<Self> {
        let matrix = |module: &ModuleSpec| {
            let bound = 1.0 / (module.in_features as f64).sqrt();
            let key = rng::key(seed, &module.path);
            let values: Vec<f32> = (0..(rank * module.in_features) as u64)
                .map(|i| ((2.0 * rng::uniform(key, i) - 1.0) * bound) as f32)
                .collect();
            Ok(LoraMatrix {
                path: module.path.clone(),
                a: Tensor::from_vec(values, (rank, module.in_features), device)?,
                b: Tensor::zeros((module.out_features, rank), DType::F32, device)?,
                grad_a: None,
                grad_b: None,
            })
        };
        let modules = modules.iter().map(matrix).collect::<Result<_>>()?;
        Ok(Self { modules, scaling: lora_alpha / rank as f64, dropout, seed })
    }

    /// The number of trainable parameters.
    pub fn parameters(&self) -> u64 {
        self.modules.iter().map(|m| (m.a.elem_count() + m.b.elem_count()) as u64).sum()
    }

    /// Forgets the accumulated gradients.
    pub fn zero_grad(&mut self) {
        for module in &mut self.modules {
            module.grad_a = None;
            module.grad_b = None;
        }
    }

    /// The index of a layer's matrix.
    pub fn position(&self, path: &str) -> Option<usize> {
        self.modules.iter().position(|m| m.path == path)
    }

    /// The mask of rows of a module's input; `None` without dropout.
    fn mask(&self, module: usize, place: Option<MaskPlace>) -> Option<Mask> {
        let place = place.filter(|_| self.dropout > 0.0)?;
        let module = &self.modules[module];
        let seed = self.seed ^ place.counter.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let width = module.a.dims()[1];
        Some(Mask {
            key: rng::key(seed, &module.path),
            first: (place.first_row * width) as u64,
            probability: self.dropout,
        })
    }

    /// Adds the low-rank product of a module to its trial's rows: `x` `[tokens, in]`, to rows `start..` of `y`
    /// `[_, out]`. `place` is `None` outside training (no dropout).
    pub(crate) fn forward(
        &self,
        module: usize,
        x: &Tensor,
        y: Tensor,
        start: usize,
        place: Option<MaskPlace>,
    ) -> Result<Tensor> {
        let lora = &self.modules[module];
        let h = match self.mask(module, place) {
            Some(mask) => ops::project(&mask.apply(x)?, &lora.a)?,
            None => ops::project(x, &lora.a)?,
        };
        ops::add_product_transposed(y, start, &h, &lora.b, self.scaling)
    }

    /// Adds the module's gradients, for `x` `[tokens, in]` and the gradient `dy` `[tokens, out]` by what
    /// [`Adapter::forward`] added to. Returns dh `[tokens, rank]`, for [`Adapter::add_input_gradient`].
    ///
    /// With h = A·x and dh = Bᵀ·dy: dB += s·dy ⊗ h, dA += s·dh ⊗ x.
    pub(crate) fn backward(
        &mut self,
        module: usize,
        x: &Tensor,
        dy: &Tensor,
        place: Option<MaskPlace>,
    ) -> Result<Tensor> {
        let masked = self.mask(module, place).map(|mask| mask.apply(x)).transpose()?;
        let x = masked.as_ref().unwrap_or(x);
        let scaling = self.scaling;
        let lora = &mut self.modules[module];
        let h = ops::project(x, &lora.a)?;
        accumulate(&mut lora.grad_b, ops::outer(&h, dy, scaling)?.t()?.contiguous()?)?;
        let dh = ops::project_transposed(dy, &lora.b)?;
        accumulate(&mut lora.grad_a, ops::outer(&dh, x, scaling)?)?;
        Ok(dh)
    }

    /// Adds the gradient by the module's input to rows `start..` of `dx`: s·Aᵀ·dh, masked as the input was.
    pub(crate) fn add_input_gradient(
        &self,
        module: usize,
        dh: &Tensor,
        dx: Tensor,
        start: usize,
        place: Option<MaskPlace>,
    ) -> Result<Tensor> {
        let a = &self.modules[module].a;
        let Some(mask) = self.mask(module, place) else {
            return ops::add_product(dx, start, dh, a, self.scaling);
        };
        let zeros = Tensor::zeros((dh.dims2()?.0, a.dims2()?.1), DType::F32, dx.device())?;
        let part = ops::add_product(zeros, 0, dh, a, self.scaling)?;
        ops::add_rows(dx, start, &mask.apply(&part)?)
    }

    /// Bytes of its matrices and as much again for their gradients.
    pub fn bytes(&self) -> u64 {
        self.modules.iter().map(|m| 2 * (memory::bytes(&m.a) + memory::bytes(&m.b))).sum()
    }
}

/// A dropout mask: each element 0 with a probability, else 1/(1−p).
struct Mask {
    key: u64,
    /// The running number of the first element.
    first: u64,
    probability: f64,
}

impl Mask {
    fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let keep = (1.0 / (1.0 - self.probability)) as f32;
        ops::multiply(
            x,
            |i| if rng::uniform(self.key, self.first + i) < self.probability { 0.0 } else { keep },
        )
    }
}

fn accumulate(sum: &mut Option<Tensor>, gradient: Tensor) -> Result<()> {
    *sum = Some(match sum.take() {
        // The new gradient is changed in place and the old sum left alone: a snapshot may hold it.
        Some(sum) => ops::add(gradient, &sum)?,
        None => gradient,
    });
    Ok(())
}
