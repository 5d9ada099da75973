//! Numbers drawn from a seed.

use domain::rng;
use std::time::Duration;

/// A stream of draws: the same seed and name, the same draws.
pub struct Draws {
    key: u64,
    next: u64,
}

impl Draws {
    pub fn new(seed: u64, name: &str) -> Self {
        Self { key: rng::key(seed, name), next: 0 }
    }

    fn uniform(&mut self) -> f64 {
        self.next += 1;
        rng::uniform(self.key, self.next)
    }

    /// A whole number from `least` to `most`.
    pub fn whole(&mut self, least: u64, most: u64) -> u64 {
        least + (self.uniform() * (most - least + 1) as f64) as u64
    }

    pub fn chance(&mut self, of: f64) -> bool {
        self.uniform() < of
    }

    pub fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.whole(0, from.len() as u64 - 1) as usize].clone()
    }

    pub fn millis(&mut self, least: u64, most: u64) -> Duration {
        Duration::from_millis(self.whole(least, most))
    }

    pub fn seconds(&mut self, least: u64, most: u64) -> Duration {
        self.millis(1000 * least, 1000 * most)
    }
}
