//! Each searched parameter against the sweep's metric, and all of them together.

use super::super::Sources;
use super::super::chart::{Axis, Chart, Mark, PALETTE, Shape};
use super::super::document::{Block, Figure, Line, Table};
use super::super::series::{self, Entry};
use super::super::{importance, numbers, slice, tables};
use super::{file_name, parallel};
use domain::sweep::Distribution;
use domain::trial::TrialState;
use serde_json::Value;

/// A bar's width.
const BAR: u32 = 40;

/// A figure a parameter, the parallel coordinates, and how much each matters.
pub(in super::super) fn blocks(sources: &Sources) -> Vec<Block> {
    let searched = tables::searched(sources.sweep);
    if searched.is_empty() || sources.entries.iter().all(|e| e.value.is_none()) {
        return Vec::new();
    }
    let is_searched = |(name, _): &&(String, Distribution)| searched.contains(&name.as_str());
    let parameters = sources.sweep.spec.parameters.iter().filter(is_searched);
    let figures = parameters.map(|(name, distribution)| figure(sources, name, distribution));
    let figures = figures.chain(parallel::figure(sources)).chain(weights(sources)).collect();
    vec![
        Block::Paragraph(Line::from(
            "A dot a trial, as last measured; a ring was stopped early or did not finish. The best is large.",
        )),
        Block::Figures(figures),
    ]
}

/// How much each parameter matters, if there are trials enough to tell.
fn weights(sources: &Sources) -> Option<Figure> {
    let completed = sources.entries.iter().filter(|entry| entry.trial.state == TrialState::Completed);
    let trials: Vec<_> =
        completed.filter_map(|entry| Some((&entry.trial.parameters, entry.value?))).collect();
    let spec = &sources.sweep.spec;
    let parts = importance(&spec.parameters, &trials, spec.search.goal);
    if parts.is_empty() {
        return None;
    }
    let names: Vec<_> = parts.iter().map(|(name, _)| name.clone()).collect();
    let bar = |(i, (_, part)): (usize, &(String, f64))| {
        let x = i as f64;
        Mark::Line { points: vec![(x, 0.0), (x, *part)], colour: PALETTE[0], width: BAR }
    };
    let metric = &spec.search.metric;
    let mut table = Table::new(["parameter", "part"]);
    parts.iter().for_each(|(name, part)| table.row([name.clone(), format!("{:.1} %", 100.0 * part)]));
    Some(Figure {
        name: "importance".into(),
        description: format!("How much {} matter to {metric}", names.join(", ")),
        chart: Chart {
            x: Axis::categories(&names),
            y: Axis::linear(parts.iter().map(|(_, part)| *part).chain([0.0])),
            titles: (String::new(), "part".into()),
            legend: Vec::new(),
            marks: parts.iter().enumerate().map(bar).collect(),
        },
        caption: Line::default().strong("How much each matters").text(format!(
            " to be among the best tenth of {} completed trials by {metric} (PED-ANOVA). Of parameters that not all trials \
             drew alike, nothing is known.",
            trials.len()
        )),
        data: Some(table),
    })
}

fn figure(sources: &Sources, name: &str, distribution: &Distribution) -> Figure {
    let (entries, metric) = (&sources.entries, &sources.sweep.spec.search.metric);
    let y = Axis::linear(series::usual(entries.iter().filter_map(|e| e.value).collect()).into_iter());
    let (x, places) = axis(name, distribution, entries);
    let dots =
        entries.iter().zip(places).zip(&sources.colours).rev().filter_map(|((entry, place), colour)| {
            let full = entry.trial.state == TrialState::Completed;
            let size = if sources.is_best(entry.trial) { 14 } else { 9 };
            Some(Mark::Dot { x: place?, y: entry.value?, colour, full, size, shape: Shape::Circle })
        });
    Figure {
        name: file_name(&format!("{metric} by {name}")),
        description: format!("{name} against {metric}"),
        chart: Chart {
            x,
            y,
            titles: (name.into(), metric.clone()),
            legend: Vec::new(),
            marks: dots.collect(),
        },
        caption: Line::default().strong(name),
        data: None,
    }
}

/// A parameter's axis, and where each trial stands on it: numbers that are drawn from a range keep their
/// distances (or ratios), everything else is a list of categories.
fn axis(name: &str, distribution: &Distribution, entries: &[Entry]) -> (Axis, Vec<Option<f64>>) {
    let given: Vec<_> = entries.iter().map(|e| e.trial.parameters.get(name)).collect();
    let values: Vec<_> = given.iter().map(|v| v.and_then(Value::as_f64)).collect();
    if is_range(distribution) && values.iter().flatten().count() == given.iter().flatten().count() {
        let numbers = values.iter().flatten().copied();
        let positive = numbers.clone().all(|v| v > 0.0);
        let logarithmic = is_logarithmic(distribution) && positive;
        return (if logarithmic { Axis::logarithmic(numbers) } else { Axis::linear(numbers) }, values);
    }
    let categories = slice::sorted(given.iter().flatten().copied());
    let place = |value: &Value| categories.iter().position(|c| *c == value).map(|i| i as f64);
    let places = given.iter().map(|value| value.and_then(place)).collect();
    let names: Vec<_> = categories.iter().map(|value| numbers::value(value)).collect();
    (Axis::categories(&names), places)
}

fn is_range(distribution: &Distribution) -> bool {
    use Distribution::*;
    match distribution {
        Uniform { .. } | LogUniform { .. } | Integer { .. } => true,
        When { then, otherwise, .. } => is_range(then) || otherwise.as_ref().is_some_and(|d| is_range(d)),
        Constant(_) | Choices(_) => false,
    }
}

pub(super) fn is_logarithmic(distribution: &Distribution) -> bool {
    use Distribution::*;
    match distribution {
        LogUniform { .. } => true,
        When { then, otherwise, .. } => {
            is_logarithmic(then) || otherwise.as_ref().is_some_and(|d| is_logarithmic(d))
        }
        _ => false,
    }
}
