//! Each searched parameter against the sweep's metric, and all of them together.

use super::super::Sources;
use super::super::chart::{Axis, Chart, Mark, PALETTE, Shape};
use super::super::document::{Block, Figure, Line, Table};
use super::super::series::{self, Entry};
use super::super::{Observed, importance, numbers, slice, tables};
use super::benchmark::axis_name;
use super::{file_name, parallel};
use domain::sweep::Distribution;
use domain::trial::TrialState;
use serde_json::Value;

/// Pixels of a parameter's row, and how much of it its bar fills.
const ROW: u32 = 48;
const FILLED: f64 = 0.6;

/// A figure a parameter, the parallel coordinates, and how much each matters.
pub(in super::super) fn blocks(sources: &Sources) -> Vec<Block> {
    let searched = tables::searched(sources.sweep);
    if searched.is_empty() || sources.entries.iter().all(|e| e.value.is_none()) {
        return Vec::new();
    }
    let is_searched = |(name, _): &&(String, Distribution)| searched.contains(&name.as_str());
    let parameters = sources.sweep.spec.parameters.iter().filter(is_searched);
    let figures = parameters.map(|(name, distribution)| figure(sources, name, distribution));
    let parts = parts(sources);
    let figures = figures.chain(parallel::figure(sources, &parts)).chain(weights(sources, &parts)).collect();
    vec![
        Block::Paragraph(Line::from(
            "A dot a trial, as last measured; a ring was stopped early or did not finish. The best is large.",
        )),
        Block::Figures(figures),
    ]
}

/// Completed trials with a value.
fn completed<'s>(sources: &'s Sources) -> impl Iterator<Item = Observed<'s>> {
    let completed = sources.entries.iter().filter(|entry| entry.trial.state == TrialState::Completed);
    completed.filter_map(|entry| Some((&entry.trial.parameters, entry.value?)))
}

/// How much each parameter matters, the most first; empty if there are too few trials to tell.
fn parts(sources: &Sources) -> Vec<(String, f64)> {
    let spec = &sources.sweep.spec;
    importance(&spec.parameters, &completed(sources).collect::<Vec<_>>(), spec.search.goal)
}

/// How much each parameter matters, if that is known.
fn weights(sources: &Sources, parts: &[(String, f64)]) -> Option<Figure> {
    let spec = &sources.sweep.spec;
    if parts.is_empty() {
        return None;
    }
    let names: Vec<_> = parts.iter().map(|(name, _)| name.clone()).collect();
    // The first on top.
    let bar = |(i, (_, part)): (usize, &(String, f64))| {
        let y = -(i as f64);
        Mark::Bar { x: (0.0, 100.0 * part), y: (y + FILLED / 2.0, y - FILLED / 2.0), colour: PALETTE[0] }
    };
    let rows = names.len() as u32;
    let metric = &spec.search.metric;
    let mut table = Table::new(["parameter", "importance"]);
    parts.iter().for_each(|(name, part)| table.row([name.clone(), format!("{:.1} %", 100.0 * part)]));
    Some(Figure {
        name: "importance".into(),
        description: format!("How much {} matter to {metric}", names.join(", ")),
        chart: Chart {
            x: Axis::from_zero(parts.iter().map(|(_, part)| 100.0 * part)),
            y: Axis::rows(
                names.iter().enumerate().map(|(i, name)| (-(i as f64), name.clone())),
                (0.5 - f64::from(rows), 0.5),
                rows * ROW,
            ),
            titles: ("importance, % of all".into(), String::new()),
            legend: Vec::new(),
            marks: parts.iter().enumerate().map(bar).collect(),
        },
        caption: Line::default().strong("How much each matters").text(format!(
            " to be among the best tenth of {} completed trials by {metric} (PED-ANOVA). Of parameters that not all trials \
             drew alike, nothing is known.",
            completed(sources).count()
        )),
        data: Some(table),
    })
}

fn figure(sources: &Sources, name: &str, distribution: &Distribution) -> Figure {
    let (entries, metric) = (&sources.entries, &sources.sweep.spec.search.metric);
    let values: Vec<_> = entries.iter().filter_map(|e| e.value).collect();
    let usual = series::usual(values.clone());
    let beyond = series::beyond(&values, &usual);
    let y = Axis::linear(usual.into_iter());
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
            titles: (axis_name(name), numbers::titled(metric)),
            legend: Vec::new(),
            marks: dots.collect(),
        },
        caption: Line::default().strong(name).text(beyond),
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
