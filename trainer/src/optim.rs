//! AdamW with decoupled weight decay (Loshchilov and Hutter 2019) in float32, as torch's: each trial has its
//! own, with its own step count, clipping and loss normalisation.

use crate::error::Result;
use crate::lora::Adapter;
use crate::memory;
use crate::ops::{self, AdamWStep, Ahead, Parameter};
use candle_core::Tensor;

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

/// First and second moment of a matrix. A GPU changes them in place, so nobody else may hold their storage.
#[derive(Debug)]
pub struct Moments {
    /// Running mean of gradients.
    pub first: Tensor,
    /// Running mean of squared gradients.
    pub second: Tensor,
}

/// One trial's optimizer.
#[derive(Debug)]
pub struct AdamW {
    /// Its constants.
    pub config: AdamWConfig,
    /// Steps made.
    pub step: u64,
    /// Moments of the parameters, in the adapter's order.
    pub moments: Vec<Moments>,
}

/// A step for which a GPU has all the memory that it needs. Nothing has changed yet.
pub(crate) struct Update {
    learning_rate: f64,
    divisor: f64,
    /// What the GPU makes; the CPU makes it at its end.
    ahead: Option<Ahead>,
}

impl Update {
    /// Has a GPU make the step, if the gradients and losses that it computes are finite; they are not waited for.
    ///
    /// # Errors
    /// The device fails. It is asked for no memory.
    pub(crate) fn launch(&self) -> Result<()> {
        self.ahead.as_ref().map_or(Ok(()), |ahead| (ahead.launch)())
    }
}

/// Which of [`AdamW::steps`] a parameter goes by.
fn which(name: &str, weight: &Tensor) -> usize {
    match name {
        "lora_A" => 0,
        "lora_B" | "lora_magnitude_vector" => 1,
        _ if weight.rank() > 1 => 0,
        _ => 2,
    }
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

    /// The sum of the squares of the accumulated gradients as a vector of one number, which a GPU may still compute. Its root
    /// divided by the number of targets times the loss's scale is the global L2 norm of the mean gradient.
    ///
    /// # Errors
    /// A tensor operation fails.
    pub(crate) fn squares(adapter: &Adapter) -> Result<Tensor> {
        let gradients: Vec<&Tensor> = adapter.gradients().collect();
        ops::squares(&gradients)
    }

    /// One step with the accumulated gradients, divided by `divisor` and clipped, if they are finite; they are forgotten in
    /// any case. Returns their global L2 norm, divided and not clipped. [`run::step_pack`](crate::run::step_pack) does the
    /// same in parts, for all runs of a pack together; this is for one adapter by itself.
    ///
    /// # Errors
    /// A tensor operation fails.
    pub fn step(&mut self, adapter: &mut Adapter, learning_rate: f64, divisor: f64) -> Result<f64> {
        let squares = Self::squares(adapter)?;
        let update = self.prepare(adapter, learning_rate, divisor, [&squares, &squares])?;
        let found = ops::join(&[squares])?;
        update.launch()?;
        let norm = ops::read(found.as_ref())?[0].sqrt() / divisor;
        match norm.is_finite() {
            true => self.finish(adapter, update, norm)?,
            false => adapter.zero_grad(),
        }
        Ok(norm)
    }

    /// Prepares a step with the accumulated gradients, divided by `divisor` and clipped. `sums` are [`AdamW::squares`] and
    /// the sum of the losses' squares, both of which a GPU may still compute.
    ///
    /// # Errors
    /// The device runs out of memory.
    pub(crate) fn prepare(
        &self,
        adapter: &mut Adapter,
        learning_rate: f64,
        divisor: f64,
        sums: [&Tensor; 2],
    ) -> Result<Update> {
        let steps = self.steps(learning_rate);
        let mut parameters = Vec::with_capacity(self.moments.len());
        for ((name, weight, gradient), Moments { first, second }) in adapter.trained().zip(&self.moments) {
            let Some(gradient) = gradient else { continue };
            let step = &steps[which(name, weight)];
            parameters.push(Parameter { weight, gradient, first, second, step });
        }
        let ahead = ops::adamw_ahead(&parameters, sums, divisor, self.config.max_grad_norm)?;
        Ok(Update { learning_rate, divisor, ahead })
    }

    /// Ends a step that was launched, and whose gradients and losses turned out finite: `norm` is the global L2 norm of the
    /// divided gradients, which are forgotten. A step that did not turn out so is dropped instead.
    ///
    /// # Errors
    /// A tensor operation of the CPU fails.
    pub(crate) fn finish(&mut self, adapter: &mut Adapter, update: Update, norm: f64) -> Result<()> {
        let (steps, most) = (self.steps(update.learning_rate), self.config.max_grad_norm);
        self.step += 1;
        if let Some(Ahead { weights, .. }) = update.ahead {
            let trained = adapter.trained();
            let moved = trained.filter_map(|(_, weight, gradient)| gradient.take().map(|_| weight));
            moved.zip(weights).for_each(|(weight, new)| *weight = new);
            return Ok(());
        }
        // torch's clip_grad_norm_: factor min(1, max / (norm + 1e-6)).
        let clip = if most > 0.0 { (most / (norm + 1e-6)).min(1.0) } else { 1.0 };
        // One after the other: no more than one parameter's new values are there beside the old ones.
        for ((name, weight, gradient), moments) in adapter.trained().zip(&mut self.moments) {
            let Some(gradient) = gradient.take() else { continue };
            let (step, Moments { first, second }) = (&steps[which(name, weight)], &*moments);
            let parameter = Parameter { weight, gradient: &gradient, first, second, step };
            let [new, first, second] = ops::adamw(&parameter, clip / update.divisor)?;
            *weight = new;
            *moments = Moments { first, second };
        }
        Ok(())
    }

    /// The numbers of the next step. LoRA+ moves B, and what has one dimension, by another rate than other matrices. Norms
    /// and biases do not decay, as with transformers' Trainer.
    fn steps(&self, learning_rate: f64) -> [AdamWStep; 3] {
        let (c, number) = (self.config, (self.step + 1) as f64);
        let step = |learning_rate: f64, weight_decay: f64| AdamWStep {
            beta1: c.beta1,
            beta2: c.beta2,
            correction2: (1.0 - c.beta2.powf(number)).sqrt(),
            epsilon: c.epsilon,
            decay: 1.0 - learning_rate * weight_decay,
            rate: learning_rate / (1.0 - c.beta1.powf(number)),
        };
        let fast = learning_rate * c.loraplus_lr_ratio;
        [step(learning_rate, c.weight_decay), step(fast, c.weight_decay), step(fast, 0.0)]
    }
}
