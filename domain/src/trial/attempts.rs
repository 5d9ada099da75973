//! How a trial is given to devices, one after the other, and what its record tells of that.

use super::{Trial, TrialPlacement};
use crate::{AgentId, Attempt, DeviceId};

/// Attempts of a trial that its record tells all of, however many come after them.
const FIRST_ATTEMPTS: usize = 8;
/// Attempts of a trial that its record tells all of, however many came before them.
const LAST_ATTEMPTS: usize = 120;

impl Trial {
    /// It is given to an agent's device, under this attempt's number, and goes on from a step. So that the record does not grow with
    /// each of thousands of interruptions: attempts between the first and the last ones are left out of `placements`, and of
    /// `attempts` if a later one started no further than they did, so that they have no part in the curve.
    pub fn assign(&mut self, attempt: Attempt, step: u64, agent: AgentId, device: DeviceId) {
        self.attempt = attempt;
        self.step = step;
        self.attempts.push((attempt, step));
        if self.attempts.len() > FIRST_ATTEMPTS + LAST_ATTEMPTS {
            leave_out_superseded(&mut self.attempts);
        }
        self.placements.push(TrialPlacement::new(attempt, agent, device));
        if self.placements.len() > FIRST_ATTEMPTS + LAST_ATTEMPTS {
            self.placements.remove(FIRST_ATTEMPTS);
        }
    }
}

/// Leaves out the attempts after which another started no further, but for the first and the last ones.
fn leave_out_superseded(attempts: &mut Vec<(Attempt, u64)>) {
    let last = attempts.len().saturating_sub(LAST_ATTEMPTS);
    // From the last one back: `least` is the least start of those after it.
    let (mut least, mut kept) = (u64::MAX, Vec::new());
    for (at, (attempt, start)) in attempts.iter().copied().enumerate().rev() {
        if at < FIRST_ATTEMPTS || at >= last || start < least {
            kept.push((attempt, start));
        }
        least = least.min(start);
    }
    kept.reverse();
    *attempts = kept;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trial::TrialConfig;
    use crate::{SweepId, Timestamp, TrialId};
    use std::collections::BTreeMap;

    fn trial() -> Trial {
        let id = TrialId::of(&SweepId::new("s"), 1);
        Trial::new(id, TrialConfig::default(), BTreeMap::new(), Timestamp(0))
    }

    /// Whether a point that an attempt made behind its start counts, by the rule of curves.
    fn counts(attempts: &[(Attempt, u64)], attempt: Attempt, step: u64) -> bool {
        attempts.iter().any(|(known, start)| *known == attempt && *start < step)
            && attempts.iter().all(|(other, start)| *other <= attempt || step <= *start)
    }

    #[test]
    fn of_very_many_attempts_those_are_told_that_matter() {
        // How far the next attempt starts from the one before, of ten.
        let rows: &[(&str, [i64; 10], usize)] = &[
            ("none gets further", [0; 10], 128),
            ("each gets further", [1; 10], 1000),
            ("one of ten gets further", [0, 0, 0, 7, 0, 0, 0, 0, 0, 0], 100 + 8 + 120),
            ("some begin anew", [3, 3, 3, 3, 3, 3, 3, 3, 3, -1_000_000], 128 + 10),
        ];
        for (what, pattern, most) in rows {
            let (mut trial, mut all, mut step) = (trial(), Vec::new(), 0_u64);
            for number in 1..=1000_u32 {
                let attempt = Attempt(number);
                trial.assign(attempt, step, AgentId::new("a"), DeviceId::new("cpu"));
                all.push((attempt, step));
                step = step.saturating_add_signed(pattern[number as usize % 10]);
            }
            assert!(trial.attempts.len() <= *most, "{what}: {}", trial.attempts.len());
            assert!(trial.attempts.is_sorted(), "{what}");
            assert_eq!((trial.attempt, trial.attempts.last()), (Attempt(1000), all.last()), "{what}");
            assert_eq!(trial.attempts[..8], all[..8], "{what}");
            assert!(trial.attempts.ends_with(&all[880..]), "{what}");
            let placed: Vec<_> = trial.placements.iter().map(|placed| placed.attempt.0).collect();
            assert_eq!(placed, (1..=8).chain(881..=1000).collect::<Vec<_>>(), "{what}");
            for (attempt, start) in all.iter().copied() {
                for behind in [1, 2, 3, 50] {
                    let step = start + behind;
                    let (whole, told) = (counts(&all, attempt, step), counts(&trial.attempts, attempt, step));
                    assert_eq!(told, whole, "{what}: step {step} of attempt {attempt}");
                }
            }
        }
    }
}
