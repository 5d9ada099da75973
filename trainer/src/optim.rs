//! AdamW with decoupled weight decay (Loshchilov and Hutter 2019) in float32, as torch's: each trial has its
//! own, with its own step count, clipping and loss normalisation.

use crate::error::Result;
use crate::lora::Adapter;
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
    /// Moments of the parameters, in the adapter's order.
    pub moments: Vec<Moments>,
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
        let moments = adapter.named().map(|(_, _, value)| zeros(value)).collect::<Result<_>>()?;
        Ok(Self { config, step: 0, moments })
    }

    /// Bytes of its moments.
    pub fn bytes(&self) -> u64 {
        self.moments.iter().map(|m| memory::bytes(&m.first) + memory::bytes(&m.second)).sum()
    }

    /// The global L2 norm of the mean gradient: that of the accumulated sums divided by `divisor`, the number of
    /// targets times the loss's scale.
    ///
    /// # Errors
    /// A tensor operation fails.
    pub fn grad_norm(adapter: &Adapter, divisor: f64) -> Result<f64> {
        Ok(ops::read(&[Self::squares(adapter)?])?[0].sqrt() / divisor)
    }

    /// The sum of the squares of the accumulated gradients as a vector of one number, which a GPU may still compute: its root
    /// divided by the divisor is [`AdamW::grad_norm`].
    ///
    /// # Errors
    /// A tensor operation fails.
    pub(crate) fn squares(adapter: &Adapter) -> Result<Tensor> {
        let gradients: Vec<&Tensor> = adapter.gradients().collect();
        ops::squares(&gradients)
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
        let step = |learning_rate: f64, weight_decay: f64| AdamWStep {
            factor: clip / divisor,
            beta1: c.beta1,
            beta2: c.beta2,
            correction2: (1.0 - c.beta2.powf(self.step as f64)).sqrt(),
            epsilon: c.epsilon,
            decay: 1.0 - learning_rate * weight_decay,
            rate: learning_rate / (1.0 - c.beta1.powf(self.step as f64)),
        };
        // LoRA+ moves B, and what has one dimension, by another rate than other matrices. Norms and biases do not
        // decay, as with transformers' Trainer.
        let fast = learning_rate * c.loraplus_lr_ratio;
        let steps = [step(learning_rate, c.weight_decay), step(fast, c.weight_decay), step(fast, 0.0)];
        let mut places: Vec<_> = Vec::new();
        for ((name, weight, gradient), moments) in adapter.trained().zip(&mut self.moments) {
            let Some(gradient) = gradient.take() else { continue };
            let which = match name {
                "lora_A" => 0,
                "lora_B" | "lora_magnitude_vector" => 1,
                _ if weight.rank() > 1 => 0,
                _ => 2,
            };
            places.push((which, weight, gradient, moments));
        }
        // A launch has room for two kinds of steps.
        places.sort_by_key(|(which, ..)| *which == 2);
        // A GPU is given many in one launch. No more of the new values than a group's are there beside the old ones.
        let on_gpu = places.first().is_some_and(|(_, weight, ..)| ops::on_gpu(weight.device()));
        let together = if on_gpu { ADAMW_TOGETHER as usize } else { 1 };
        while !places.is_empty() {
            let alike = places.iter().take_while(|(which, ..)| (*which == 2) == (places[0].0 == 2)).count();
            let group: Vec<_> = places.drain(..alike.min(together)).collect();
            let parameters: Vec<Parameter> = group
                .iter()
                .map(|(which, weight, gradient, moments)| {
                    let Moments { first, second } = &**moments;
                    Parameter { weight, gradient, first, second, step: &steps[*which] }
                })
                .collect();
            let results = ops::adamw(&parameters)?;
            for ((_, weight, _, moments), [new, first, second]) in group.into_iter().zip(results) {
                *weight = new;
                *moments = Moments { first, second };
            }
        }
        Ok(())
    }
}
