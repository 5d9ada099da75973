//! How long it takes from when an agent joins to its first training step.

use domain::Clock;
use domain::fleet::Beginning;
use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use telemetry::metrics::AGENT_BEGINNING;

/// Takes the times, each once. Clones take the same.
#[derive(Clone)]
pub struct Stopwatch(Arc<Times>);

struct Times {
    clock: Arc<dyn Clock>,
    joined: OnceLock<Duration>,
    trial: OnceLock<f64>,
    step: OnceLock<f64>,
}

impl fmt::Debug for Stopwatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Stopwatch").field(&self.read()).finish()
    }
}

impl Stopwatch {
    /// One that waits for the agent to join.
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        let (joined, trial, step) = (OnceLock::new(), OnceLock::new(), OnceLock::new());
        Self(Arc::new(Times { clock, joined, trial, step }))
    }

    /// A coordinator has taken the agent in.
    pub fn joined(&self) {
        self.0.joined.get_or_init(|| self.0.clock.monotonic());
    }

    /// A trial has come.
    pub fn assigned(&self) {
        self.0.trial.get_or_init(|| {
            let seconds = self.since_joined();
            AGENT_BEGINNING.record(seconds, &[("part", "wait")]);
            seconds
        });
    }

    /// A step was made.
    pub fn stepped(&self) {
        self.0.step.get_or_init(|| {
            let seconds = self.since_joined();
            let waited = self.read().first_trial_seconds.unwrap_or_default();
            AGENT_BEGINNING.record(seconds - waited, &[("part", "prepare")]);
            seconds
        });
    }

    /// What was taken until now.
    pub fn read(&self) -> Beginning {
        let Times { trial, step, .. } = &*self.0;
        Beginning { first_trial_seconds: trial.get().copied(), first_step_seconds: step.get().copied() }
    }

    fn since_joined(&self) -> f64 {
        let now = self.0.clock.monotonic();
        now.saturating_sub(self.0.joined.get().copied().unwrap_or(now)).as_secs_f64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hand::Hand;
    use std::sync::atomic::Ordering;

    #[test]
    fn each_time_is_taken_once() {
        let hand = Arc::new(Hand::default());
        let watch = Stopwatch::new(hand.clone());
        type Happens = fn(&Stopwatch);
        let rows: [(u64, Happens, Option<f64>, Option<f64>); 6] = [
            (5, Stopwatch::joined, None, None),
            // It lost its coordinator meanwhile.
            (9, Stopwatch::joined, None, None),
            (7, Stopwatch::assigned, Some(2.0), None),
            (8, Stopwatch::assigned, Some(2.0), None),
            (15, Stopwatch::stepped, Some(2.0), Some(10.0)),
            (16, Stopwatch::stepped, Some(2.0), Some(10.0)),
        ];
        for (at, happens, first_trial_seconds, first_step_seconds) in rows {
            hand.0.store(at, Ordering::Relaxed);
            happens(&watch);
            assert_eq!(watch.read(), Beginning { first_trial_seconds, first_step_seconds }, "at {at}");
        }
    }
}
