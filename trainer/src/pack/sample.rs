//! The next token by a model's logits: the likeliest, or one that is drawn, as transformers' `generate` draws it.

use crate::error::{Result, TrainError};
use candle_core::Tensor;
use domain::rng;

/// How tokens are chosen. By default each is the likeliest (greedy).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// What logits are divided by before they become probabilities: below 1 likely tokens are drawn more often. 0 draws
    /// nothing: it is greedy, transformers' `do_sample=False`.
    pub temperature: f64,
    /// Only the fewest of the likeliest tokens whose probabilities sum up to this are drawn (nucleus sampling, Holtzman et
    /// al. 2020), the temperature applied before: in (0, 1], of which 1 leaves all.
    pub top_p: f64,
    /// The seed of the draws.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.0, top_p: 1.0, seed: 0 }
    }
}

impl Sampling {
    /// Refuses values with which nothing can be drawn.
    ///
    /// # Errors
    /// The temperature is negative or no number, or `top_p` is not in (0, 1].
    pub fn check(&self) -> Result<()> {
        let Self { temperature, top_p, .. } = *self;
        if !(temperature.is_finite() && temperature >= 0.0) {
            let problem = format!("is {temperature}, and logits are divided by it");
            return Err(TrainError::parameter("temperature", problem, "set it to 0 (greedy) or above"));
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            let problem = format!("is {top_p}, and is a probability that tokens have together");
            return Err(TrainError::parameter("top_p", problem, "set it above 0 and at most to 1"));
        }
        Ok(())
    }
}

/// Chooses the tokens of one text.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampler {
    sampling: Sampling,
    /// The text's stream of random numbers: its n-th token is drawn by the n-th of them.
    key: u64,
}

impl Sampler {
    /// One for the text that `name` has among those of a seed: texts of other names are drawn apart.
    ///
    /// # Errors
    /// Those of [`Sampling::check`].
    pub fn new(sampling: Sampling, name: &str) -> Result<Self> {
        sampling.check()?;
        Ok(Self { sampling, key: rng::key(sampling.seed, name) })
    }

    /// One that takes the likeliest token, the first of several as likely.
    pub fn greedy() -> Self {
        Self { sampling: Sampling::default(), key: 0 }
    }

    /// Token `number` of the text, by its logits `[vocab]`.
    pub(super) fn choose(&self, logits: &Tensor, number: usize) -> Result<u32> {
        if self.sampling.temperature == 0.0 {
            return Ok(logits.argmax(0)?.to_scalar()?);
        }
        let weights = weights(&logits.to_vec1()?, &self.sampling);
        Ok(drawn(&weights, rng::uniform(self.key, number as u64)))
    }
}

/// What each token may be drawn with, in proportion: the softmax of the logits by the temperature, 0 outside the nucleus. What
/// is no number is never drawn.
fn weights(logits: &[f32], sampling: &Sampling) -> Vec<f64> {
    // `max` passes over what is no number.
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |logit: &f32| {
        let weight = (f64::from(logit - most) / sampling.temperature).exp();
        // The likeliest has 1, whatever it is divided by, even if it is infinite.
        if *logit == most {
            1.0
        } else if weight.is_finite() {
            weight
        } else {
            0.0
        }
    };
    let mut weights: Vec<f64> = logits.iter().map(weight).collect();
    if sampling.top_p < 1.0 {
        keep_nucleus(&mut weights, sampling.top_p);
    }
    weights
}

/// Sets all to 0 but the fewest of the largest that are `top_p` of the sum; the first of several as large go first.
fn keep_nucleus(weights: &mut [f64], top_p: f64) {
    let mut order: Vec<usize> = (0..weights.len()).filter(|i| weights[*i] > 0.0).collect();
    order.sort_by(|a, b| weights[*b].total_cmp(&weights[*a]));
    let wanted = top_p * order.iter().map(|i| weights[*i]).sum::<f64>();
    let mut mass = 0.0;
    for i in order {
        if mass >= wanted {
            weights[i] = 0.0;
        } else {
            mass += weights[i];
        }
    }
}

/// The number whose share of the weights, laid side by side, holds the point `at` of the way, in [0, 1).
fn drawn(weights: &[f64], at: f64) -> u32 {
    let wanted = at * weights.iter().sum::<f64>();
    let (mut mass, mut last) = (0.0, 0);
    for (i, weight) in weights.iter().enumerate().filter(|(_, weight)| **weight > 0.0) {
        mass += weight;
        // Rounding may leave the end of the way just beyond the last.
        last = i;
        if mass > wanted {
            break;
        }
    }
    last as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn sampling(temperature: f64, top_p: f64) -> Sampling {
        Sampling { temperature, top_p, seed: 7 }
    }

    /// Logits whose softmax is these probabilities.
    fn logits(probabilities: &[f64]) -> Vec<f32> {
        probabilities.iter().map(|p| (p.ln() + 3.0) as f32).collect()
    }

    fn kept(weights: &[f64]) -> Vec<usize> {
        (0..weights.len()).filter(|i| weights[*i] > 0.0).collect()
    }

    #[test]
    fn top_p_keeps_the_nucleus() {
        let uneven = [0.05, 0.5, 0.15, 0.3];
        // (probabilities, temperature, top_p, the tokens that may be drawn)
        for (probabilities, temperature, top_p, want) in [
            (&uneven[..], 1.0, 1.0, &[0, 1, 2, 3][..]),
            (&uneven, 1.0, 0.96, &[0, 1, 2, 3]),
            (&uneven, 1.0, 0.94, &[1, 2, 3]),
            (&uneven, 1.0, 0.79, &[1, 3]),
            (&uneven, 1.0, 0.49, &[1]),
            // The likeliest is always kept.
            (&uneven, 1.0, 1e-9, &[1]),
            // The temperature goes first: 0.5² and 0.3² are 0.68 and 0.25 of all squares, the fourth roots nearly even.
            (&uneven, 0.5, 0.67, &[1]),
            (&uneven, 0.5, 0.92, &[1, 3]),
            (&uneven, 4.0, 0.79, &[1, 2, 3]),
            // Of several as likely the first go first.
            (&[0.25, 0.25, 0.25, 0.25], 1.0, 0.45, &[0, 1]),
            (&[1.0, 0.0], 1.0, 0.99, &[0]),
        ] {
            let weights = weights(&logits(probabilities), &sampling(temperature, top_p));
            assert_eq!(kept(&weights), want, "{probabilities:?} {temperature} {top_p}");
        }
    }

    #[test]
    fn draws_are_as_often_as_they_are_likely() {
        let n = 20_000;
        // (logits, temperature, top_p, probabilities)
        for (logits, temperature, top_p, want) in [
            (logits(&[0.1, 0.6, 0.3]), 1.0, 1.0, [0.1, 0.6, 0.3]),
            // Squares: 0.01, 0.36, 0.09 of 0.46.
            (logits(&[0.1, 0.6, 0.3]), 0.5, 1.0, [0.021_739, 0.782_609, 0.195_652]),
            // Roots: 0.316228, 0.774597, 0.547723 of 1.638547.
            (logits(&[0.1, 0.6, 0.3]), 2.0, 1.0, [0.192_993, 0.472_734, 0.334_273]),
            (logits(&[0.1, 0.6, 0.3]), 1.0, 0.8, [0.0, 0.666_667, 0.333_333]),
            (logits(&[0.1, 0.6, 0.3]), 1e-3, 1.0, [0.0, 1.0, 0.0]),
            // What a broken model gives is drawn as far as there is something to draw.
            (vec![f32::NAN, 1.0, f32::NEG_INFINITY], 1.0, 0.9, [0.0, 1.0, 0.0]),
            (vec![0.0, f32::INFINITY, 0.0], 1.0, 1.0, [0.0, 1.0, 0.0]),
            (vec![f32::NAN; 3], 1.0, 0.9, [1.0, 0.0, 0.0]),
        ] {
            let sampler = Sampler::new(sampling(temperature, top_p), "text").unwrap();
            let tensor = Tensor::new(logits.as_slice(), &Device::Cpu).unwrap();
            let mut counts = [0_u32; 3];
            (0..n).for_each(|i| counts[sampler.choose(&tensor, i).unwrap() as usize] += 1);
            for (count, p) in counts.into_iter().zip(want) {
                let (mean, deviation) = (p * n as f64, (p * (1.0 - p) * n as f64).sqrt());
                let off = (f64::from(count) - mean).abs();
                // Five standard deviations; none where it is certain.
                assert!(off <= 5.0 * deviation + 0.1, "{logits:?} {temperature} {top_p}: {counts:?}");
            }
        }
    }

    #[test]
    fn draws_follow_seed_and_name() {
        let tensor = Tensor::new(&[0.0_f32; 50], &Device::Cpu).unwrap();
        let text = |seed, name: &str| -> Vec<u32> {
            let sampler = Sampler::new(Sampling { seed, ..sampling(1.0, 1.0) }, name).unwrap();
            (0..20).map(|number| sampler.choose(&tensor, number).unwrap()).collect()
        };
        assert_eq!(text(1, "a"), text(1, "a"));
        assert_ne!(text(1, "a"), text(2, "a"));
        assert_ne!(text(1, "a"), text(1, "b"));
    }

    #[test]
    fn greedy_takes_the_first_of_the_likeliest() {
        for (logits, want) in [([0.0_f32, 2.0, 1.0, 2.0], 1), ([-1.0, -2.0, -3.0, -0.5], 3)] {
            let tensor = Tensor::new(&logits, &Device::Cpu).unwrap();
            assert_eq!(Sampler::greedy().choose(&tensor, 0).unwrap(), want);
            let named = Sampler::new(Sampling { top_p: 0.5, ..Sampling::default() }, "text").unwrap();
            assert_eq!(named.choose(&tensor, 0).unwrap(), want);
        }
    }

    #[test]
    fn what_cannot_be_drawn_with_is_refused_by_name() {
        for (temperature, top_p, want) in [
            (0.0, 1.0, None),
            (2.0, 1e-9, None),
            (-0.1, 1.0, Some("temperature: is -0.1")),
            (f64::NAN, 1.0, Some("temperature: is NaN")),
            (f64::INFINITY, 1.0, Some("temperature: is inf")),
            (1.0, 0.0, Some("top_p: is 0,")),
            (1.0, 1.01, Some("top_p: is 1.01")),
            (1.0, f64::NAN, Some("top_p: is NaN")),
        ] {
            let refused = Sampler::new(sampling(temperature, top_p), "text").err().map(|e| e.to_string());
            assert!(
                match (&refused, want) {
                    (Some(refused), Some(want)) => refused.starts_with(want),
                    (refused, want) => refused.is_none() && want.is_none(),
                },
                "{temperature} {top_p}: {refused:?}"
            );
        }
    }
}
