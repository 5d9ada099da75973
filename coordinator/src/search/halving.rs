//! Asynchronous successive halving, the stopping variant (Li et al. 2020, "A System for Massively Parallel
//! Hyperparameter Tuning").

use super::Verdict;
use domain::sweep::{Goal, SweepSpec};
use std::collections::BTreeMap;

/// What the trials have shown at each rung.
#[derive(Debug)]
pub(super) struct Halving {
    goal: Goal,
    reduction_factor: usize,
    /// The rungs' steps, rising.
    rungs: Vec<Rung>,
}

#[derive(Debug)]
struct Rung {
    step: u64,
    /// Each trial's value and what was said to it, by number.
    seen: BTreeMap<u32, (f64, Verdict)>,
}

impl Halving {
    pub(super) fn new(spec: &SweepSpec) -> Self {
        let common = spec.common();
        // Where only epochs are known, a trial ends before the rungs that it cannot reach.
        let last = match common.num_train_epochs {
            Some(_) if common.max_steps.is_none() => u64::MAX,
            _ => common.total_steps(0),
        };
        let factor = u64::from(spec.search.reduction_factor.max(2));
        let first = u64::from(spec.search.min_steps.unwrap_or(1).max(1));
        let steps =
            std::iter::successors(Some(first), |step| step.checked_mul(factor)).take_while(|s| *s < last);
        Self {
            goal: spec.search.goal,
            reduction_factor: spec.search.reduction_factor.max(2) as usize,
            rungs: steps.map(|step| Rung { step, seen: BTreeMap::new() }).collect(),
        }
    }

    /// Adds the rungs that a changed spec has more.
    pub(super) fn extend(&mut self, changed: Self) {
        for rung in changed.rungs {
            if self.rungs.iter().all(|known| known.step != rung.step) {
                self.rungs.push(rung);
            }
        }
        self.rungs.sort_by_key(|rung| rung.step);
    }

    /// The trial is under way again: it counts as worst nowhere any more.
    pub(super) fn again(&mut self, number: u32) {
        for rung in &mut self.rungs {
            if rung.seen.get(&number).is_some_and(|(value, _)| value.is_nan()) {
                rung.seen.remove(&number);
            }
        }
    }

    pub(super) fn report(&mut self, number: u32, step: u64, value: f64) -> Verdict {
        let (goal, factor) = (self.goal, self.reduction_factor);
        let Some(rung) = self.rungs.iter_mut().find(|rung| rung.step == step) else {
            return Verdict::Continue;
        };
        if let Some((_, verdict)) = rung.seen.get(&number) {
            return *verdict;
        }
        let better = rung.seen.values().filter(|(other, _)| goal.better(*other, value)).count();
        let seen = rung.seen.len() + 1;
        let verdict = if seen < factor || better < seen / factor { Verdict::Continue } else { Verdict::Stop };
        rung.seen.insert(number, (value, verdict));
        verdict
    }

    /// The trial ended without a value: it counts as worst where it would have been compared next.
    pub(super) fn infeasible(&mut self, number: u32) {
        let stopped = |rung: &Rung| matches!(rung.seen.get(&number), Some((_, Verdict::Stop)));
        if self.rungs.iter().any(stopped) {
            return;
        }
        if let Some(rung) = self.rungs.iter_mut().find(|rung| !rung.seen.contains_key(&number)) {
            rung.seen.insert(number, (f64::NAN, Verdict::Stop));
        }
    }
}
