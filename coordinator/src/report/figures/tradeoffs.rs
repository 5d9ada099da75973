//! Quality against what it costs: dollars, memory. The front is what no other trial beats in both.

use super::super::Sources;
use super::super::chart::{Axis, Chart, Key, Mark, PALETTE, Shape};
use super::super::document::{Figure, Line, Table};
use super::super::numbers;
use super::super::series::{self, Entry};
use domain::sweep::Goal;
use domain::trial::{Throughput, TrialState};

/// A price of a trial, how it is told, and in which unit it is drawn.
struct Price {
    name: &'static str,
    file: &'static str,
    of: fn(&Entry) -> Option<f64>,
    show: fn(f64) -> String,
    unit: fn(f64) -> (f64, &'static str),
}

fn seconds_of(entry: &Entry) -> Option<f64> {
    entry.trial.summary.as_ref().map(|s| s.device_seconds).filter(|seconds| *seconds > 0.0)
}

const DOLLARS: Price = Price {
    name: "cost",
    file: "quality-against-cost",
    of: |entry| entry.trial.cost_usd.filter(|cost| *cost > 0.0),
    show: numbers::usd,
    unit: |_| (1.0, "US dollars"),
};
/// On a machine of one's own.
const SECONDS: Price = Price {
    name: "device time",
    file: "quality-against-device-time",
    of: seconds_of,
    show: numbers::seconds,
    unit: |_| (1.0, "seconds"),
};
const MEMORY: Price = Price {
    name: "peak memory",
    file: "quality-against-memory",
    of: |entry| {
        let summary = entry.trial.summary.as_ref()?;
        let solo = summary.throughput == Throughput::Solo && summary.pack_peak_memory_bytes.is_none();
        summary.peak_memory_bytes.filter(|_| solo).map(|bytes| bytes as f64)
    },
    show: |bytes| numbers::bytes(bytes as u64),
    unit: numbers::byte_unit,
};

/// The figures for which several trials came to their end.
pub(in super::super) fn figures(sources: &Sources) -> Vec<Figure> {
    let spent = figure(sources, &DOLLARS).or_else(|| figure(sources, &SECONDS));
    [spent, figure(sources, &MEMORY)].into_iter().flatten().collect()
}

fn figure<'a>(sources: &Sources<'a>, price: &Price) -> Option<Figure> {
    let (goal, metric) = (sources.sweep.spec.search.goal, &sources.sweep.spec.search.metric);
    let known = |(entry, colour): (&Entry<'a>, &&'static str)| {
        let completed = entry.trial.state == TrialState::Completed;
        Some((entry.trial, (price.of)(entry).filter(|_| completed)?, entry.value?, *colour))
    };
    let trials: Vec<_> = sources.entries.iter().zip(&sources.colours).filter_map(known).collect();
    if trials.len() < 2 {
        return None;
    }
    // Values that read alike beat nobody.
    let points: Vec<_> = trials.iter().map(|(_, price, value, _)| (*price, series::told(*value))).collect();
    let front = front(&points, goal);
    let (unit, unit_name) = (price.unit)(points.iter().map(|p| p.0).fold(0.0, f64::max));
    let place = |i: usize| (points[i].0 / unit, points[i].1);

    let mut marks =
        vec![Mark::Line { points: front.iter().map(|i| place(*i)).collect(), colour: PALETTE[0], width: 3 }];
    for (i, (trial, .., colour)) in trials.iter().enumerate().rev() {
        let (x, y) = place(i);
        let is_best = sources.is_best(trial);
        let (full, size) = (front.contains(&i) || is_best, if is_best { 14 } else { 9 });
        marks.push(Mark::Dot { x, y, colour, full, size, shape: Shape::Circle });
    }
    let mut data = Table::new(["trial", price.name, metric.as_str()]);
    for i in &front {
        let (trial, cost, value, _) = &trials[*i];
        let number = numbers::or_dash(trial.id.number(), |n| n.to_string());
        data.row([number, (price.show)(*cost), numbers::loss(*value)]);
    }
    let values: Vec<_> = points.iter().map(|p| p.1).collect();
    let usual = series::usual(values.clone());
    let beyond = series::beyond(&values, &usual);
    Some(Figure {
        name: price.file.into(),
        description: format!("{metric} against {} of each completed trial", price.name),
        chart: Chart {
            x: Axis::from_zero(points.iter().map(|p| p.0 / unit)),
            y: Axis::linear(usual.into_iter()),
            titles: (format!("{}, {unit_name}", price.name), numbers::titled(metric)),
            legend: vec![(Key::Line(PALETTE[0]), "Pareto front".into()), (Key::Ring, "beaten".into())],
            marks,
        },
        caption: Line::default().strong(format!("{metric} against {}", price.name)).text(format!(
            ", of completed trials. Full dots on the line are the Pareto front: no other trial is at least as good at \
             as little {}, and better in one of the two. The best is large.{beyond}",
            price.name
        )),
        data: Some(data),
    })
}

/// The points of `(price, value)` that no other beats: none is at most as dear and at least as good, and better in one of
/// the two. Cheapest first.
fn front(points: &[(f64, f64)], goal: Goal) -> Vec<usize> {
    let mut order: Vec<_> = (0..points.len()).filter(|i| !points[*i].1.is_nan()).collect();
    order.sort_by(|a, b| {
        let ((x, v), (y, w)) = (points[*a], points[*b]);
        x.total_cmp(&y).then_with(|| goal.better(w, v).cmp(&goal.better(v, w)))
    });
    let mut front: Vec<usize> = Vec::new();
    for i in order {
        let improves = |last: &usize| goal.better(points[i].1, points[*last].1) || points[i] == points[*last];
        if front.last().is_none_or(improves) {
            front.push(i);
        }
    }
    front
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_front_is_what_nothing_beats(
            points in proptest::collection::vec((0u8..12, 0u8..12), 0..30), up in any::<bool>()
        ) {
            let goal = if up { Goal::Maximize } else { Goal::Minimize };
            let points: Vec<_> = points.iter().map(|(x, y)| (f64::from(*x), f64::from(*y))).collect();
            let beats = |a: (f64, f64), b: (f64, f64)| {
                a.0 <= b.0 && !goal.better(b.1, a.1) && (a.0 < b.0 || goal.better(a.1, b.1))
            };
            let mut got = front(&points, goal);
            prop_assert!(got.windows(2).all(|pair| points[pair[0]].0 <= points[pair[1]].0));
            got.sort_unstable();
            let want: Vec<_> =
                (0..points.len()).filter(|i| !points.iter().any(|p| beats(*p, points[*i]))).collect();
            prop_assert_eq!(got, want);
        }
    }
}
