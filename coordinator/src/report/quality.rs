//! What trials that differ in one parameter alone differ by in the sweep's metric, and how sure that is.

use super::Sources;
use super::slice::Fact;
use super::statistics::{Estimate, holds_zero};
use domain::metric::LOSS;
use domain::trial::TrialState;

/// A trial's value of the sweep's metric, if that is one of quality and the trial came to its end. Another metric is said as
/// what it is, by its own measure.
pub(super) fn value(sources: &Sources, fact: &Fact) -> Option<f64> {
    let metric = sources.sweep.spec.search.metric.as_str();
    let is_quality = metric.ends_with(LOSS) || metric.starts_with("eval/");
    let value = sources.entry(fact.trial)?.0.value.filter(|_| is_quality);
    value.filter(|value| *value > 0.0 && fact.trial.state == TrialState::Completed)
}

/// By how much the second of each pair differs from the first, on average.
pub(super) struct Difference {
    mean: f64,
    interval: (f64, f64),
    /// How that was found, and of what it is.
    by: String,
}

impl Difference {
    /// Over pairs by Student's t, with the error over items where it is known; of one pair over its items alone. `None` of one
    /// pair of whose items nothing is kept.
    pub(super) fn of(sources: &Sources, pairs: &[(&Fact, &Fact)]) -> Option<Self> {
        let values = pairs.iter().map(|(from, to)| Some(value(sources, to)? - value(sources, from)?));
        let values = values.collect::<Option<Vec<_>>>()?;
        let trials = pairs.iter().map(|(from, to)| (to.trial, from.trial));
        let paired = sources.items.between(trials, &sources.sweep.spec.search.metric);
        if let ([mean], Some(paired)) = (values.as_slice(), &paired) {
            let by = format!("by the paired bootstrap over {} items, one run of each", paired.items());
            return Some(Self { mean: *mean, interval: paired.bootstrap(1), by });
        }
        let over_items = paired.and_then(|paired| Some((paired.variance()?, paired.items())));
        let (variance, items) = over_items.unwrap_or_default();
        let Estimate { mean, interval, runs, .. } = Estimate::of(&values, variance, 1)?;
        let by = match items {
            0 => format!("by Student's t over {runs} pairs"),
            items => format!("by Student's t over {runs} pairs and {items} items"),
        };
        Some(Self { mean, interval, by })
    }

    /// Whether there may be none.
    pub(super) fn is_none(&self) -> bool {
        holds_zero(self.interval)
    }

    /// `The mean difference is +0.0120, 95 % interval …`.
    pub(super) fn said(&self) -> String {
        let Self { mean, interval: (low, high), by } = self;
        format!("The mean difference is {mean:+.4}, 95 % interval {low:+.4} to {high:+.4} {by}")
    }
}
