//! The dynamic loss scaler of float16 (Micikevicius et al. 2018), with torch's `GradScaler` defaults: gradients are
//! computed for a multiple of the loss, so that small ones do not vanish, and divided again before the step. Where one
//! overflows, the step is left out and the multiple halved; after 2000 steps without that it is doubled.

use serde::{Deserialize, Serialize};

/// What the loss is multiplied by, and for how long it has been.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LossScaler {
    scale: f32,
    /// Steps since it last changed.
    steps: u32,
}

/// Steps without overflow after which the multiple grows.
const GROWTH_INTERVAL: u32 = 2000;
/// The multiple below which gradients overflow for another reason than it.
const LEAST: f32 = 1.0 / 16_384.0;

impl Default for LossScaler {
    fn default() -> Self {
        Self { scale: 65_536.0, steps: 0 }
    }
}

impl LossScaler {
    /// What the loss is multiplied by: a power of two.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// After a step whose gradients were finite.
    pub fn stepped(&mut self) {
        self.steps += 1;
        if self.steps >= GROWTH_INTERVAL && self.scale < f32::MAX / 4.0 {
            *self = Self { scale: self.scale * 2.0, steps: 0 };
        }
    }

    /// After a step that was left out. False once a smaller multiple would not help any more.
    #[must_use]
    pub fn overflowed(&mut self) -> bool {
        *self = Self { scale: self.scale / 2.0, steps: 0 };
        self.scale >= LEAST
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_halves_at_once_and_doubles_slowly() {
        let mut scaler = LossScaler::default();
        assert!(scaler.overflowed() && scaler.overflowed());
        assert_eq!(scaler.scale(), 16_384.0);
        (1..GROWTH_INTERVAL).for_each(|_| scaler.stepped());
        assert_eq!(scaler.scale(), 16_384.0, "not yet");
        scaler.stepped();
        assert_eq!(scaler.scale(), 32_768.0);
        (1..GROWTH_INTERVAL).for_each(|_| scaler.stepped());
        assert!(scaler.overflowed(), "an overflow starts the count anew");
        (1..GROWTH_INTERVAL).for_each(|_| scaler.stepped());
        assert_eq!(scaler.scale(), 16_384.0);
        let tries = (0..100).take_while(|_| scaler.overflowed()).count();
        assert_eq!(tries, 28, "from 2^14 down to 2^-14");
        let mut high = LossScaler { scale: f32::MAX / 2.0, steps: 0 };
        (0..10 * GROWTH_INTERVAL).for_each(|_| high.stepped());
        assert!(high.scale().is_finite());
    }
}
