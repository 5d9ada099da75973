//! The report of a sweep: one HTML file that needs nothing else, neither script nor network.
//!
//! | file | holds |
//! |---|---|
//! | this one | the page, section by section |
//! | `tables.rs` | trials, what their numbers mean, the configuration in force |
//! | `chart.rs` | axes and marks → inline SVG |
//! | `series.rs` | rank order, curves, smoothing |
//! | `numbers.rs`, `html.rs`, `style.css` | how numbers read; escaping; how it looks |

mod chart;
mod html;
mod numbers;
mod series;
mod tables;

use chart::{Axis, Mark};
use domain::TrialId;
use domain::data::shown;
use domain::metric::{self, MetricPoint};
use domain::sweep::{Distribution, Sweep};
use domain::trial::{Trial, TrialState};
use html::Html;
use series::Entry;

/// The report of a sweep as a self-contained HTML page. `curves` holds the metric points of each trial in
/// step order; a trial without any may be missing.
pub fn html(sweep: &Sweep, trials: &[Trial], curves: &[(TrialId, Vec<MetricPoint>)]) -> String {
    let entries = series::ranked(sweep, trials, curves);
    let colours = colours(&entries);
    let best = entries.iter().find(|e| sweep.best.as_ref().is_some_and(|(id, _)| *id == e.trial.id));

    let mut page = Html::default();
    page.simulated = trials.iter().any(Trial::is_simulated);
    page.raw("<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">");
    page.raw("<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">");
    page.raw("<meta name=\"color-scheme\" content=\"light dark\">");
    page.raw("<title>").text(&sweep.spec.name).raw(" – LoraFleet</title>\n<style>");
    page.raw(include_str!("style.css")).raw("</style></head><body><main>\n");
    heading(&mut page, sweep, trials);
    if let Some(best) = best {
        the_best(&mut page, sweep, best);
    }
    page.raw("<section><h2>Learning curves</h2>\n<div class=\"charts\">");
    learning_curve(&mut page, metric::EVAL_LOSS, &entries, &colours);
    learning_curve(&mut page, metric::LOSS, &entries, &colours);
    page.raw("</div></section>\n");
    parameters(&mut page, sweep, &entries, &colours);
    page.raw("<section><h2>Trials</h2>\n");
    tables::trials(&mut page, sweep, &entries, &colours);
    tables::definitions(&mut page);
    tables::configuration(&mut page, sweep, best.map(|e| e.trial));
    page.raw("</section>\n</main></body></html>\n");
    page.finish()
}

/// The first trials in rank order have a colour each, the others share grey.
fn colours(entries: &[Entry]) -> Vec<&'static str> {
    let colour = |(i, entry): (usize, &Entry)| match entry.value {
        Some(_) => chart::PALETTE.get(i).copied().unwrap_or(chart::OTHERS),
        None => chart::OTHERS,
    };
    entries.iter().enumerate().map(colour).collect()
}

fn heading(page: &mut Html, sweep: &Sweep, trials: &[Trial]) {
    page.raw("<header><p class=\"eyebrow\">LoraFleet sweep</p><h1>").text(&sweep.spec.name).raw("</h1><p>");
    page.raw("<span class=\"state ").raw(sweep.state.as_str()).raw("\">").text(sweep.state).raw("</span> ");
    page.element("code", &sweep.id).raw(" · submitted ").text(numbers::date(sweep.created_at));
    if let Some(finished) = sweep.finished_at {
        page.raw(" · took ").text(numbers::duration(finished.since(sweep.created_at)));
    }
    page.raw("</p>\n<dl class=\"facts\">");
    let count = |state| trials.iter().filter(|t| t.state == state).count();
    let mut facts = vec![("trials".to_string(), trials.len().to_string())];
    facts.extend(TrialState::ALL.into_iter().filter_map(|state| {
        Some(count(state)).filter(|n| *n > 0).map(|n| (state.to_string(), n.to_string()))
    }));
    facts.push(("cost".into(), numbers::usd(sweep.cost_usd)));
    for (name, value) in facts {
        page.raw("<div>").element("dt", name).element("dd", value).raw("</div>");
    }
    page.raw("</dl>\n<p class=\"paths\">").element("code", shown(&sweep.spec.base.pretrained_model_id));
    page.raw(" on ").element("code", shown(&sweep.spec.base.dataset_name)).raw("</p>");
    let simulated = trials.iter().filter(|trial| trial.is_simulated()).count();
    if simulated > 0 {
        let of =
            if simulated == trials.len() { "All".into() } else { format!("{simulated} of {}", trials.len()) };
        page.raw("<p class=\"failure\">").text(of).raw(
            " trials ran on simulated devices: nothing was trained. Memory and time are what models predict, losses \
             follow a formula.</p>",
        );
    }
    if let Some(failure) = &sweep.failure {
        page.raw("<p class=\"failure\">").text(failure).raw("</p>");
    }
    page.raw("</header>\n");
}

fn the_best(page: &mut Html, sweep: &Sweep, best: &Entry) {
    let trial = best.trial;
    page.raw("<section><h2>Best: trial ").text(numbers::or_dash(trial.id.number(), |n| n.to_string()));
    page.raw("</h2><p class=\"lead\">");
    page.text(&sweep.spec.search.metric).raw(" <strong>");
    page.text(numbers::or_dash(sweep.best.as_ref().map(|(_, value)| *value), numbers::loss));
    page.raw("</strong>");
    let summary = trial.summary.as_ref();
    if sweep.spec.search.metric == metric::EVAL_LOSS
        && let Some(base) = summary.and_then(|s| s.base_eval_loss)
    {
        page.raw(", where the base has ").text(numbers::loss(base));
    }
    for name in tables::searched(sweep) {
        let value = numbers::or_dash(trial.parameters.get(name), numbers::value);
        page.raw(" · ").text(name).raw(" ").element("b", value);
    }
    page.raw("</p>");
    if let Some(adapter) = &trial.adapter {
        page.raw("<p>Its adapter, in PEFT's format: ").element("code", adapter).raw("</p>");
    }
    let sample = summary.and_then(|s| Some((s.sample_before.as_ref()?, s.sample_after.as_ref()?, s)));
    if let Some((before, after, summary)) = sample {
        page.raw("<figure class=\"sample\"><figcaption>What it says to a held-out prompt");
        page.raw("</figcaption>\n<blockquote class=\"prompt\">");
        page.text(summary.sample_prompt.as_deref().unwrap_or_default()).raw("</blockquote><div>");
        page.raw("<blockquote><h3>Before: the base</h3><p>").text(before).raw("</p></blockquote>");
        page.raw("<blockquote class=\"after\"><h3>After: with the adapter</h3><p>").text(after);
        page.raw("</p></blockquote></div></figure>");
    }
    page.raw("</section>\n");
}

/// A metric over the steps, a line a trial; the best lies on top.
fn learning_curve(page: &mut Html, name: &'static str, entries: &[Entry], colours: &[&'static str]) {
    let raw: Vec<_> = entries.iter().map(|e| series::curve(e.points, name)).collect();
    if raw.iter().all(Vec::is_empty) {
        page.raw("<figure><figcaption>").element("b", name).raw(": no points.</figcaption></figure>");
        return;
    }
    let long = raw.iter().any(|curve| curve.len() > series::LONG);
    let drawn: Vec<_> = raw.into_iter().map(series::smooth).collect();
    let x = Axis::linear(drawn.iter().flatten().map(|p| p.0));
    // A trial that diverges must not flatten the others: the chart ends a little above the usual start.
    let mut starts: Vec<_> = drawn.iter().filter_map(|c| c.first()).map(|p| p.1).collect();
    starts.sort_by(f64::total_cmp);
    let ceiling = 1.3 * starts[starts.len() / 2].abs();
    let y = Axis::linear(drawn.iter().flatten().map(|p| p.1.min(ceiling)));

    let base = entries.iter().find_map(|e| e.trial.summary.as_ref()?.base_eval_loss);
    let level = base.filter(|_| name == metric::EVAL_LOSS);
    let lines = drawn.into_iter().zip(colours).enumerate().rev();
    let lines = lines.map(|(rank, (points, colour))| Mark::Line {
        points,
        colour,
        width: if rank == 0 { 6 } else { 3 },
    });
    let marks: Vec<_> = level.map(|y| Mark::Level { y }).into_iter().chain(lines).collect();

    figure(page, &format!("{name} over the steps of each trial"), &x, &y, &marks);
    page.element("b", name).raw(" over steps");
    page.raw(if long { ", smoothed where long" } else { "" });
    page.raw(if level.is_some() { "; dashed: the base without an adapter" } else { "" });
    page.raw(". Colours as in the table; the best is thick.</figcaption></figure>\n");
}

/// Each searched parameter against the sweep's metric.
fn parameters(page: &mut Html, sweep: &Sweep, entries: &[Entry], colours: &[&'static str]) {
    let searched = tables::searched(sweep);
    if searched.is_empty() || entries.iter().all(|e| e.value.is_none()) {
        return;
    }
    page.raw("<section><h2>Parameters against ").text(&sweep.spec.search.metric).raw("</h2>\n");
    page.raw("<p>A dot a trial, as last measured; a ring was stopped early or did not finish.</p>");
    page.raw("<div class=\"charts\">");
    let y = Axis::linear(series::usual(entries.iter().filter_map(|e| e.value).collect()).into_iter());
    for (name, distribution) in &sweep.spec.parameters {
        if !searched.contains(&name.as_str()) {
            continue;
        }
        let (x, places) = parameter_axis(name, distribution, entries);
        let dots = entries.iter().zip(places).zip(colours).rev().filter_map(|((entry, place), colour)| {
            let full = entry.trial.state == TrialState::Completed;
            let best = sweep.best.as_ref().is_some_and(|(id, _)| *id == entry.trial.id);
            let size = if best { 14 } else { 9 };
            Some(Mark::Dot { x: place?, y: entry.value?, colour, full, size })
        });
        figure(
            page,
            &format!("{name} against {}", sweep.spec.search.metric),
            &x,
            &y,
            &dots.collect::<Vec<_>>(),
        );
        page.element("b", name).raw("</figcaption></figure>\n");
    }
    page.raw("</div></section>\n");
}

/// A parameter's axis, and where each trial stands on it: numbers that are drawn from a range keep their
/// distances (or ratios), everything else is a list of categories.
fn parameter_axis(name: &str, distribution: &Distribution, entries: &[Entry]) -> (Axis, Vec<Option<f64>>) {
    let given: Vec<_> = entries.iter().map(|e| e.trial.parameters.get(name)).collect();
    let values: Vec<_> = given.iter().map(|v| v.and_then(|v| v.as_f64())).collect();
    if is_range(distribution) && values.iter().flatten().count() == given.iter().flatten().count() {
        let numbers = values.iter().flatten().copied();
        let positive = numbers.clone().all(|v| v > 0.0);
        let logarithmic = is_logarithmic(distribution) && positive;
        return (if logarithmic { Axis::logarithmic(numbers) } else { Axis::linear(numbers) }, values);
    }
    let mut categories: Vec<_> = given.iter().flatten().collect();
    categories.sort_by(|a, b| match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a.total_cmp(&b),
        _ => a.to_string().cmp(&b.to_string()),
    });
    categories.dedup();
    let place = |value: &serde_json::Value| categories.iter().position(|c| **c == value).map(|i| i as f64);
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

fn is_logarithmic(distribution: &Distribution) -> bool {
    use Distribution::*;
    match distribution {
        LogUniform { .. } => true,
        When { then, otherwise, .. } => {
            is_logarithmic(then) || otherwise.as_ref().is_some_and(|d| is_logarithmic(d))
        }
        _ => false,
    }
}

/// A chart, and the beginning of its caption.
fn figure(page: &mut Html, description: &str, x: &Axis, y: &Axis, marks: &[Mark]) {
    page.raw("<figure>");
    match chart::draw(x, y, marks) {
        Ok(svg) => page.svg(&svg, description),
        Err(error) => page.raw("<p>This chart could not be drawn: ").text(error).raw("</p>"),
    };
    page.raw("<figcaption>");
    if page.simulated {
        page.raw("<strong>Simulated.</strong> ");
    }
}
