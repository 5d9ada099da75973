//! The learning rate of each step, as transformers' `get_scheduler` gives it.

use domain::trial::LrSchedulerType;

/// A learning rate's course.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// Its form.
    pub kind: LrSchedulerType,
    /// Its peak.
    pub peak: f64,
    /// Steps of linear warm-up.
    pub warmup_steps: u64,
    /// Steps of the whole run.
    pub total_steps: u64,
}

impl Schedule {
    /// The learning rate that step `step` (from 0) uses: the first of n warm-up steps uses 0.
    pub fn learning_rate(&self, step: u64) -> f64 {
        let (warmup, total) = (self.warmup_steps as f64, self.total_steps as f64);
        let now = step as f64;
        if self.kind != LrSchedulerType::Constant && step < self.warmup_steps {
            return self.peak * now / warmup.max(1.0);
        }
        let left = (total - warmup).max(1.0);
        self.peak
            * match self.kind {
                LrSchedulerType::Constant | LrSchedulerType::ConstantWithWarmup => 1.0,
                LrSchedulerType::Linear => ((total - now) / left).max(0.0),
                LrSchedulerType::Cosine => {
                    (0.5 * (1.0 + (std::f64::consts::PI * (now - warmup) / left).cos())).max(0.0)
                }
            }
    }
}
