//! What the charts and tables show, taken from the records: trials in rank order, curves, smoothing.

use super::numbers;
use domain::TrialId;
use domain::metric::MetricPoint;
use domain::sweep::Sweep;
use domain::trial::{Trial, TrialState};
use std::cmp::Ordering;
use std::collections::BTreeMap;

/// A curve with more points than this is smoothed and thinned before it is drawn.
pub(super) const LONG: usize = 60;
/// Points that a drawn curve has at most.
const DRAWN: usize = 300;

/// A trial with its points and its value of the sweep's metric.
pub(super) struct Entry<'a> {
    pub(super) trial: &'a Trial,
    pub(super) points: &'a [MetricPoint],
    /// The sweep's metric, as last measured.
    pub(super) value: Option<f64>,
}

/// A value of a sweep's metric to the digits in which it is told: values that agree in these are as good as each other.
pub(super) fn told(value: f64) -> f64 {
    numbers::loss(value).parse().unwrap_or(value)
}

/// What it takes to train a trial again: dollars, then seconds, then bytes.
fn price(trial: &Trial) -> [f64; 3] {
    let summary = trial.summary.as_ref();
    let bytes = summary.and_then(|summary| summary.peak_memory_bytes).map(|bytes| bytes as f64);
    let seconds = summary.map(|summary| summary.device_seconds);
    [trial.cost_usd, seconds, bytes].map(|price| price.unwrap_or(f64::INFINITY))
}

/// The trials of a sweep, the best first, of those as good the ones that came to their end, the cheapest first; those without a value of the sweep's metric last, by number.
pub(super) fn ranked<'a>(
    sweep: &Sweep,
    trials: impl IntoIterator<Item = &'a Trial>,
    curves: &'a [(TrialId, Vec<MetricPoint>)],
) -> Vec<Entry<'a>> {
    let curves: BTreeMap<_, _> = curves.iter().map(|(id, points)| (id, points.as_slice())).collect();
    let mut entries: Vec<_> = trials
        .into_iter()
        .map(|trial| {
            let points = curves.get(&trial.id).copied().unwrap_or_default();
            Entry { trial, points, value: last_value(trial, points, &sweep.spec.search.metric) }
        })
        .collect();
    let goal = sweep.spec.search.goal;
    let rank = |e: &Entry| e.value.map_or(f64::NAN, told);
    let is_open = |e: &Entry| e.trial.state != TrialState::Completed;
    entries.sort_by(|a, b| {
        let (x, y) = (rank(a), rank(b));
        let by_value = goal.better(y, x).cmp(&goal.better(x, y));
        let by_price = || {
            let (of_a, of_b) = (price(a.trial), price(b.trial));
            let each = of_a.iter().zip(&of_b).map(|(a, b)| a.total_cmp(b));
            is_open(a).cmp(&is_open(b)).then(each.fold(Ordering::Equal, Ordering::then))
        };
        // Of those without a value the numbers are the order.
        let by_price = if x.is_nan() { Ordering::Equal } else { by_price() };
        by_value.then(by_price).then_with(|| a.trial.id.number().cmp(&b.trial.id.number()))
    });
    entries
}

/// The last finite value of a metric: of the trial's curve, else of its record. Step 0 is the base, not the
/// trial.
fn last_value(trial: &Trial, points: &[MetricPoint], name: &str) -> Option<f64> {
    let from_curve = || points.iter().rev().filter(|p| p.step > 0).find_map(|p| p.get(name));
    from_curve().or_else(|| trial.recorded(name)).filter(|value| value.is_finite())
}

/// The finite points of a metric as `(step, value)`.
pub(super) fn curve(points: &[MetricPoint], name: &str) -> Vec<(f64, f64)> {
    let values = points.iter().filter_map(|p| Some((p.step as f64, p.get(name)?)));
    values.filter(|(_, value)| value.is_finite()).collect()
}

/// A long curve with each point replaced by the mean of the points up to it (a thirtieth of the curve), then
/// thinned to [`DRAWN`] points. A short one stays.
pub(super) fn smooth(curve: Vec<(f64, f64)>) -> Vec<(f64, f64)> {
    if curve.len() <= LONG {
        return curve;
    }
    let window = curve.len().div_ceil(30);
    let stride = curve.len().div_ceil(DRAWN);
    let last = curve.len() - 1;
    (0..curve.len())
        .filter(|i| i % stride == 0 || *i == last)
        .map(|i| {
            let before = &curve[(i + 1).saturating_sub(window)..=i];
            (curve[i].0, before.iter().map(|(_, value)| value).sum::<f64>() / before.len() as f64)
        })
        .collect()
}

/// The values without those far out (Tukey: more than three interquartile ranges beyond the quartiles), so
/// that one diverged trial does not press all others into a line.
pub(super) fn usual(mut values: Vec<f64>) -> Vec<f64> {
    values.sort_by(f64::total_cmp);
    let Some(last) = values.len().checked_sub(1) else { return values };
    let (first, third) = (values[last / 4], values[last - last / 4]);
    let reach = 3.0 * (third - first);
    if reach > 0.0 {
        values.retain(|v| (first - reach..=third + reach).contains(v));
    }
    values
}

/// What a caption says of values that are drawn at a chart's edge, since they lie beyond the `usual` ones.
pub(super) fn beyond(values: &[f64], usual: &[f64]) -> String {
    let (Some(low), Some(high)) = (usual.first(), usual.last()) else { return String::new() };
    let count = |lies: &dyn Fn(f64) -> bool| values.iter().filter(|value| lies(**value)).count();
    let said = [(count(&|value| value > *high), "above"), (count(&|value| value < *low), "below")];
    let said = said.into_iter().filter(|(count, _)| *count > 0);
    let said =
        said.map(|(count, side)| format!("{count} {} {side}", if count == 1 { "lies" } else { "lie" }));
    match said.collect::<Vec<_>>().join(", ").as_str() {
        "" => String::new(),
        said => format!(" At the edge: {said} what is shown."),
    }
}

#[cfg(test)]
mod tests {
    use super::super::made::{self, float16};
    use super::*;
    use domain::metric;

    /// What differs beyond the digits that are told is as good: the cheaper goes first, then what needs less memory.
    #[test]
    fn of_trials_as_good_the_cheapest_is_first() {
        let trial = |number: u32, loss: f64, cost: f64, gigabytes: f64| {
            let mut trial = made::measured(number, float16(2, 16, 512), gigabytes, 5.0);
            (trial.eval_loss, trial.cost_usd) = (Some(loss), Some(cost));
            trial
        };
        let mut trials = vec![
            trial(1, 1.000_01, 2.0, 20.0),
            trial(2, 1.000_03, 1.0, 20.0),
            trial(3, 1.000_02, 1.0, 10.0),
            trial(4, 0.999, 9.0, 40.0),
            trial(5, 1.1, 0.1, 1.0),
            trial(6, 1.0, 0.1, 1.0),
        ];
        trials[5].state = TrialState::Stopped;
        let sweep = made::sweep();
        let order: Vec<_> = ranked(&sweep, &trials, &[]).iter().filter_map(|e| e.trial.id.number()).collect();
        assert_eq!(order, [4, 3, 2, 1, 6, 5]);
    }

    #[test]
    fn a_short_curve_stays_and_a_long_one_is_smoothed_and_thinned() {
        let zigzag = |n: usize| -> Vec<_> { (0..n).map(|i| (i as f64, (i % 2) as f64)).collect() };
        assert_eq!(smooth(zigzag(LONG)), zigzag(LONG));
        assert_eq!(smooth(Vec::new()), Vec::new());

        let long = smooth(zigzag(6000));
        assert!(long.len() <= DRAWN + 1, "{} points", long.len());
        assert_eq!(long.first().map(|p| p.0), Some(0.0));
        assert_eq!(long.last().map(|p| p.0), Some(5999.0));
        assert!(long[5..].iter().all(|(_, v)| (v - 0.5).abs() < 0.01));
    }

    #[test]
    fn what_lies_far_out_is_no_part_of_the_usual() {
        for (values, want) in [
            (vec![], vec![]),
            (vec![3.0], vec![3.0]),
            (vec![4.4, 2.9, 3.0, 3.6, 9e3, 3.3], vec![2.9, 3.0, 3.3, 3.6, 4.4]),
            (vec![2.0, 2.0, 2.0, 7.0], vec![2.0, 2.0, 2.0, 7.0]),
        ] {
            assert_eq!(usual(values), want);
        }
    }

    #[test]
    fn what_lies_beyond_is_counted() {
        for (values, want) in [
            (vec![1.0, 2.0], ""),
            (vec![1.0, 2.0, 9.0], " At the edge: 1 lies above what is shown."),
            (vec![0.0, 0.5, 1.0, 2.0, 9.0], " At the edge: 1 lies above, 2 lie below what is shown."),
        ] {
            assert_eq!(beyond(&values, &[1.0, 2.0]), want);
        }
        assert_eq!(beyond(&[1.0], &[]), "");
    }

    #[test]
    fn values_that_are_no_numbers_are_not_drawn() {
        let point = |step, value| MetricPoint {
            step,
            time: domain::Timestamp(0),
            values: vec![(metric::LOSS.into(), value)],
        };
        let points = [point(1, 3.0), point(2, f64::NAN), point(3, f64::INFINITY), point(4, 2.0)];
        assert_eq!(curve(&points, metric::LOSS), [(1.0, 3.0), (4.0, 2.0)]);
        assert_eq!(curve(&points, metric::EVAL_LOSS), []);
    }
}
