//! AdamW with decoupled weight decay (Loshchilov and Hutter 2019) in float32, as torch's: each trial has its
//! own, with its own step count, clipping and loss normalisation.

use crate::error::Result;
use crate::lora::{Adapter, LoraMatrix};
use crate::memory;
use crate::ops::{self, AdamWStep, Parameter};
use candle_core::Tensor;
use domain::footprint::ADAMW_TOGETHER;

/// AdamW's constants.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWConfig {
    /// First moment decay.
    pub beta1: f64,
    /// Second moment decay.
    pub beta2: f64,
    /// Denominator offset.
    pub epsilon: f64,
    /// What B's learning rate is, as a multiple of A's (LoRA+); 1 unless asked for.
    pub loraplus_lr_ratio: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Global L2 norm to which gradients are clipped; 0 clips nothing.
    pub max_grad_norm: f64,
}

/// First and second moment of a matrix.
#[derive(Debug, Clone)]
pub struct Moments {
    /// Running mean of gradients.
    pub first: Tensor,
    /// Running mean of squared gradients.
    pub second: Tensor,
}

/// One trial's optimizer.
#[derive(Debug, Clone)]
pub struct AdamW {
    /// Its constants.
    pub config: AdamWConfig,
    /// Steps made.
    pub step: u64,
    /// Moments of the parameters of each module, in the adapter's order.
    pub moments: Vec<Vec<Moments>>,
}

impl AdamW {
    /// An optimizer whose moments are zero.
    ///
    /// # Errors
    /// The device runs out of memory.
    pub fn new(adapter: &Adapter, config: AdamWConfig) -> Result<Self> {
        let zeros = |t: &Tensor| -> Result<Moments> {
            Ok(Moments { first: t.zeros_like()?, second: t.zeros_like()? })
        };
        let of = |module: &LoraMatrix| module.parameters().map(|(_, value)| zeros(value)).collect();
        let moments = adapter.modules.iter().map(of).collect::<Result<_>>()?;
        Ok(Self { config, step: 0, moments })
    }

    /// Bytes of its moments.
    pub fn bytes(&self) -> u64 {
        let matrices = self.moments.iter().flatten();
        matrices.map(|m| memory::bytes(&m.first) + memory::bytes(&m.second)).sum()
    }

    /// The global L2 norm of the mean gradient: that of the accumulated sums divided by `divisor`, the number of
    /// targets times the loss's scale.
    ///
    /// # Errors
    /// A tensor operation fails.
    pub fn grad_norm(adapter: &Adapter, divisor: f64) -> Result<f64> {
        let gradients: Vec<&Tensor> = adapter.modules.iter().flat_map(LoraMatrix::gradients).collect();
        Ok(ops::sum_of_squares(&gradients)?.sqrt() / divisor)
    }

    /// One step with the accumulated gradients, divided by `divisor` and clipped: `norm` is what
    /// [`AdamW::grad_norm`] said. The gradients are forgotten.
    ///
    /// # Errors
    /// A tensor operation fails.
    pub fn step(&mut self, adapter: &mut Adapter, learning_rate: f64, divisor: f64, norm: f64) -> Result<()> {
        let c = self.config;
        // torch's clip_grad_norm_: factor min(1, max / (norm + 1e-6)).
        let clip = if c.max_grad_norm > 0.0 { (c.max_grad_norm / (norm + 1e-6)).min(1.0) } else { 1.0 };
        self.step += 1;
        // LoRA+ moves B, and what has one dimension, by another rate than A.
        let step = |learning_rate: f64| AdamWStep {
            factor: clip / divisor,
            beta1: c.beta1,
            beta2: c.beta2,
            correction2: (1.0 - c.beta2.powf(self.step as f64)).sqrt(),
            epsilon: c.epsilon,
            decay: 1.0 - learning_rate * c.weight_decay,
            rate: learning_rate / (1.0 - c.beta1.powf(self.step as f64)),
        };
        let (a, others) = (step(learning_rate), step(learning_rate * c.loraplus_lr_ratio));
        let trained = adapter.modules.iter_mut().flat_map(LoraMatrix::trained);
        let mut places = Vec::new();
        for ((name, weight, gradient), moments) in trained.zip(self.moments.iter_mut().flatten()) {
            let Some(gradient) = gradient.take() else { continue };
            let step = if name == LoraMatrix::PARAMETERS[0] { &a } else { &others };
            places.push((weight, gradient, moments, step));
        }
        // A GPU is given many in one launch. No more of the new values than a group's are there beside the old ones.
        let on_gpu = places.first().is_some_and(|(weight, ..)| ops::on_gpu(weight.device()));
        let together = if on_gpu { ADAMW_TOGETHER as usize } else { 1 };
        while !places.is_empty() {
            let group: Vec<_> = places.drain(..places.len().min(together)).collect();
            let parameters: Vec<Parameter> = group
                .iter()
                .map(|(weight, gradient, moments, step)| {
                    let Moments { first, second } = &**moments;
                    Parameter { weight, gradient, first, second, step }
                })
                .collect();
            let results = ops::adamw(&parameters)?;
            for ((weight, _, moments, _), [new, first, second]) in group.into_iter().zip(results) {
                *weight = new;
                *moments = Moments { first, second };
            }
        }
        Ok(())
    }
}
