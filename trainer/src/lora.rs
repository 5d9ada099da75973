//! LoRA adapters: the trainable matrices, their initialisation, and the low-rank product with its backward.

use crate::error::Result;
use crate::rng;
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

    /// The mask of a module's input, `[tokens, in_features]`, holding 0 or 1/(1−p); `None` without dropout.
    fn mask(&self, module: usize, x: &Tensor, counter: DropoutCounter) -> Result<Option<Tensor>> {
        if self.dropout <= 0.0 {
            return Ok(None);
        }
        let keep = (1.0 / (1.0 - self.dropout)) as f32;
        let key =
            rng::key(self.seed ^ counter.wrapping_mul(0x9E37_79B9_7F4A_7C15), &self.modules[module].path);
        let values: Vec<f32> = (0..x.elem_count() as u64)
            .map(|i| if rng::uniform(key, i) < self.dropout { 0.0 } else { keep })
            .collect();
        Ok(Some(Tensor::from_vec(values, x.shape(), x.device())?))
    }

    /// The low-rank product of a module for its trial's rows: `x` `[tokens, in]` → `[tokens, out]`.
    /// `counter` is `None` outside training (no dropout).
    pub(crate) fn forward(
        &self,
        module: usize,
        x: &Tensor,
        counter: Option<DropoutCounter>,
    ) -> Result<Tensor> {
        let lora = &self.modules[module];
        let mask = counter.map(|c| self.mask(module, x, c)).transpose()?.flatten();
        let x = match mask {
            Some(mask) => x.mul(&mask)?,
            None => x.clone(),
        };
        Ok((x.matmul(&lora.a.t()?)?.matmul(&lora.b.t()?)? * self.scaling)?)
    }

    /// Adds the module's gradients and returns the gradient by its input.
    ///
    /// With h = A·x and dh = s·Bᵀ·dy: dB += s·dy ⊗ h, dA += dh ⊗ x, dx = Aᵀ·dh (masked as x was).
    pub(crate) fn backward(
        &mut self,
        module: usize,
        x: &Tensor,
        dy: &Tensor,
        counter: Option<DropoutCounter>,
    ) -> Result<Tensor> {
        let mask = counter.map(|c| self.mask(module, x, c)).transpose()?.flatten();
        let scaling = self.scaling;
        let lora = &mut self.modules[module];
        let x = match &mask {
            Some(mask) => x.mul(mask)?,
            None => x.clone(),
        };
        let dy = (dy * scaling)?;
        let h = x.matmul(&lora.a.t()?)?;
        accumulate(&mut lora.grad_b, dy.t()?.matmul(&h)?)?;
        let dh = dy.matmul(&lora.b)?;
        accumulate(&mut lora.grad_a, dh.t()?.matmul(&x)?)?;
        let dx = dh.matmul(&lora.a)?;
        Ok(match mask {
            Some(mask) => dx.mul(&mask)?,
            None => dx,
        })
    }
}

fn accumulate(sum: &mut Option<Tensor>, gradient: Tensor) -> Result<()> {
    *sum = Some(match sum.take() {
        Some(sum) => sum.add(&gradient)?,
        None => gradient,
    });
    Ok(())
}
