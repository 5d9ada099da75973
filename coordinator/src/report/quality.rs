//! What trials that differ in one parameter alone differ by in the sweep's metric, and how sure that is.

use super::Sources;
use super::evaluations::NORMAL_95;
use super::numbers;
use super::replicates::{mean, score, variance};
use super::slice::Fact;
use super::statistics::{Estimate, holds_zero};
use domain::metric::LOSS;
use domain::trial::TrialState;
use std::collections::BTreeMap;

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

/// What differences are told to: of those that agree to this digit, without an error over items, nothing says how sure they are.
const DIGIT: f64 = 1e-4;

impl Difference {
    /// Over pairs that differ in `parameter` alone, by Student's t, with the error over items where it is known. Pairs that differ
    /// from each other in accelerator or recomputing alone are the same result again and count once, by their mean. Of one
    /// result over its items alone. `None` where nothing says how sure it is.
    pub(super) fn of(sources: &Sources, parameter: &str, pairs: &[(&Fact, &Fact)]) -> Option<Self> {
        let metric = &sources.sweep.spec.search.metric;
        let mut results: BTreeMap<String, Vec<(&Fact, &Fact)>> = BTreeMap::new();
        for (from, to) in pairs {
            results.entry(to.result_key(parameter)).or_default().push((*from, *to));
        }
        let difference = |(from, to): &(&Fact, &Fact)| Some(value(sources, to)? - value(sources, from)?);
        let of_result = |pairs: &Vec<(&Fact, &Fact)>| {
            let values = pairs.iter().map(difference).collect::<Option<Vec<_>>>()?;
            mean(values.into_iter())
        };
        let values = results.values().map(of_result).collect::<Option<Vec<_>>>()?;
        let firsts = || results.values().filter_map(|pairs| pairs.first());
        let paired = sources.items.between(firsts().map(|(from, to)| (to.trial, from.trial)), metric);
        // Where nothing is kept of single items, those of both are taken as independent, which makes it too wide.
        let of_both = |(from, to): &(&Fact, &Fact)| {
            let of = |fact: &Fact| variance(score(fact.trial, metric)?.stderr);
            Some(of(from)? + of(to)?)
        };
        if let [difference] = values.as_slice() {
            let (interval, by) = match paired {
                Some(paired) => {
                    let by =
                        format!("by the paired bootstrap over {} items, one run of each", paired.items());
                    (paired.bootstrap(1), by)
                }
                None => {
                    let reach = NORMAL_95 * firsts().next().and_then(of_both)?.sqrt();
                    let by = "by the normal distribution, from the standard errors of both over items";
                    ((difference - reach, difference + reach), by.into())
                }
            };
            return Some(Self { mean: *difference, interval, by });
        }
        let over_items =
            paired.and_then(|paired| Some((paired.variance()?, format!(" and {} items", paired.items()))));
        let unpaired = || {
            let known = firsts().map(of_both).collect::<Option<Vec<_>>>()?;
            Some((mean(known.into_iter())?, " and items, unpaired".to_string()))
        };
        let (items, also) = over_items.or_else(unpaired).unwrap_or_default();
        let Estimate { mean: of_all, interval, runs, deviation } = Estimate::of(&values, items, 1)?;
        let interval = interval.filter(|_| items > 0.0 || deviation >= DIGIT)?;
        let again = match pairs.len() {
            all if all == runs => format!("{runs} pairs"),
            all => format!("{runs} results ({all} pairs: accelerator and recomputing change none)"),
        };
        Some(Self { mean: of_all, interval, by: format!("by Student's t over {again}{also}") })
    }

    /// Whether there may be none.
    pub(super) fn is_none(&self) -> bool {
        holds_zero(self.interval)
    }

    /// `The mean difference is +0.0120, 95 % interval …`.
    pub(super) fn said(&self) -> String {
        let Self { mean, interval, by } = self;
        let (mean, interval) = (numbers::signed(*mean), numbers::interval(*interval));
        format!("The mean difference is {mean}, 95 % interval {interval} {by}")
    }
}
