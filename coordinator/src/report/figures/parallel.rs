//! Parallel coordinates: a line a trial through the values of its parameters, to the metric that they led to.

use super::super::Sources;
use super::super::chart::{Axis, Chart, Mark};
use super::super::document::{Figure, Line};
use super::super::{numbers, series, slice, tables};
use super::parameters::is_logarithmic;
use super::{MOST_LINES, of_how_many};
use domain::sweep::Goal;
use serde_json::Value;

/// Axes that stand beside each other so that their texts do.
const MOST_AXES: usize = 9;
/// Pixels of each, of all together at least, and at most.
const PLACE: u32 = 190;
const NARROWEST: u32 = 900;
const WIDEST: u32 = 1800;
/// The axes' own colour.
const AXIS: &str = "#C0C0C1";

/// An upright axis: where each entry stands on it, from 0 to 1, and what its ends mean.
struct Upright {
    name: String,
    places: Vec<Option<f64>>,
    low: String,
    high: String,
}

/// The figure, if several parameters were searched: those that matter most, by their `parts`, nearest to the metric.
pub(in super::super) fn figure(sources: &Sources, parts: &[(String, f64)]) -> Option<Figure> {
    let mut searched = tables::searched(sources.sweep);
    if searched.len() < 2 {
        return None;
    }
    // Of what nothing is known the order is the sweep's, behind all others.
    searched.sort_by_key(|name| parts.iter().position(|(of, _)| of == name).unwrap_or(parts.len()));
    let mut axes: Vec<_> = searched.into_iter().filter_map(|name| parameter(sources, name)).collect();
    let left_out: Vec<_> = axes.split_off(axes.len().min(MOST_AXES - 1));
    axes.reverse();
    axes.push(metric(sources)?);

    let ends = |i: usize| vec![(i as f64, 0.0), (i as f64, 1.0)];
    let mut marks: Vec<_> =
        (0..axes.len()).map(|i| Mark::Line { points: ends(i), colour: AXIS, width: 3 }).collect();
    for (entry, colour) in sources.colours.iter().enumerate().take(MOST_LINES).rev() {
        let points = axes.iter().enumerate();
        let points: Option<Vec<_>> = points.map(|(i, axis)| Some((i as f64, axis.places[entry]?))).collect();
        let width = if entry == 0 { 6 } else { 3 };
        marks.extend(points.map(|points| Mark::Line { points, colour, width }));
    }
    for (i, axis) in axes.iter().enumerate() {
        marks.push(Mark::Text { x: i as f64, y: 1.0, text: axis.high.clone(), below: false });
        marks.push(Mark::Text { x: i as f64, y: 0.0, text: axis.low.clone(), below: true });
        // Names are long: neighbours stand at different heights.
        let y = -0.11 * (1 + i % 3) as f64;
        marks.push(Mark::Text { x: i as f64, y, text: axis.name.clone(), below: true });
    }
    let names: Vec<_> = axes.iter().map(|axis| axis.name.clone()).collect();
    let ordered = if parts.is_empty() { "" } else { ", and what matters more stands nearer to it" };
    let beside = match left_out.iter().map(|axis| axis.name.as_str()).collect::<Vec<_>>().join(", ").as_str()
    {
        "" => String::new(),
        names => format!(" Left out, since they matter least: {names}."),
    };
    let values: Vec<_> = sources.entries.iter().filter_map(|entry| entry.value).collect();
    let beyond = series::beyond(&values, &series::usual(values.clone()));
    let metric = &sources.sweep.spec.search.metric;
    Some(Figure {
        name: "parallel-coordinates".into(),
        description: format!("A line for each trial through {}", names.join(", ")),
        chart: Chart {
            x: Axis::categories(&vec![String::new(); names.len()]).wide(WIDEST.min(PLACE * names.len() as u32).max(NARROWEST)),
            y: Axis::unlabelled(),
            titles: (String::new(), String::new()),
            legend: Vec::new(),
            marks,
        },
        caption: Line::default().strong("All parameters together").text(format!(
            "; {metric} is best at the top{ordered}. Trials that lack a value are left out. The best is thick.{}{beside}{beyond}",
            of_how_many(sources.entries.len())
        )),
        data: None,
    })
}

fn parameter(sources: &Sources, name: &str) -> Option<Upright> {
    let given = || sources.entries.iter().map(|entry| entry.trial.parameters.get(name));
    let values = slice::sorted(given().flatten());
    let (first, last) = (*values.first()?, *values.last()?);
    if first == last {
        return None;
    }
    let distribution = sources.sweep.spec.parameters.iter().find(|(n, _)| n == name).map(|(_, d)| d);
    let logarithmic = distribution.is_some_and(is_logarithmic);
    let scale = |value: f64| if logarithmic && value > 0.0 { value.log10() } else { value };
    let numbers: Option<Vec<f64>> = values.iter().map(|value| value.as_f64().map(scale)).collect();
    let chosen = values.len() <= 10 && !logarithmic;
    let place = |value: &Value| match (&numbers, value.as_f64()) {
        (Some(numbers), Some(value)) if !chosen => {
            Some((scale(value) - numbers[0]) / (numbers[numbers.len() - 1] - numbers[0]))
        }
        // A few values stand at even distances, as they were chosen.
        _ => Some(values.iter().position(|v| *v == value)? as f64 / (values.len() - 1) as f64),
    };
    let places = given().map(|value| value.and_then(place)).collect();
    Some(Upright { name: name.into(), places, low: numbers::value(first), high: numbers::value(last) })
}

/// The sweep's metric, its better end at the top.
fn metric(sources: &Sources) -> Option<Upright> {
    let usual = series::usual(sources.entries.iter().filter_map(|entry| entry.value).collect());
    let (low, high) = (*usual.first()?, *usual.last()?);
    if low >= high {
        return None;
    }
    let search = &sources.sweep.spec.search;
    let (worst, best) = match search.goal {
        Goal::Minimize => (high, low),
        Goal::Maximize => (low, high),
    };
    let place = |value: f64| ((value - worst) / (best - worst)).clamp(0.0, 1.0);
    let places = sources.entries.iter().map(|entry| entry.value.map(place)).collect();
    Some(Upright {
        name: search.metric.clone(),
        places,
        low: numbers::loss(worst),
        high: numbers::loss(best),
    })
}
