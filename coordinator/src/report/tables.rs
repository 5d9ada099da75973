//! The tables: trials, what their numbers mean, the configuration in force.

use super::html::Html;
use super::numbers::{self, NONE, or_dash};
use super::series::Entry;
use domain::metric;
use domain::sweep::{Distribution, Sweep};
use domain::trial::{Throughput, Trial, TrialConfig, TrialSummary};
use serde_json::Value;

/// A column after the searched parameters: its heading, and the cell of a trial.
type Column = (&'static str, fn(&Trial, &TrialSummary) -> String);

const COLUMNS: &[Column] = &[
    ("steps", |trial, _| match trial.total_steps {
        Some(total) => format!("{} / {total}", trial.step),
        None => trial.step.to_string(),
    }),
    (metric::EVAL_LOSS, |trial, s| or_dash(trial.eval_loss.or(s.eval_loss), numbers::loss)),
    ("base eval/loss", |_, s| or_dash(s.base_eval_loss, numbers::loss)),
    ("peak memory", |_, s| or_dash(s.peak_memory_bytes, |b| with_mark(numbers::bytes(b), memory_mark(s)))),
    ("pack's peak", |_, s| or_dash(s.pack_peak_memory_bytes, numbers::bytes)),
    ("predicted", |_, s| or_dash(s.predicted_peak_memory_bytes, numbers::bytes)),
    ("trainable", |_, s| measured(s.trainable_parameters, numbers::count)),
    ("share", |_, s| measured(s.trainable_parameters, |n| numbers::percent(n, s.total_parameters))),
    ("adapter", |_, s| measured(s.adapter_bytes, numbers::bytes)),
    ("samples/s", |_, s| {
        or_dash(s.samples_per_second, |v| with_mark(numbers::number(v), speed_mark(s.throughput)))
    }),
    ("tokens/s", |_, s| {
        or_dash(s.tokens_per_second, |v| {
            with_mark(numbers::count(v.round() as u64), speed_mark(s.throughput))
        })
    }),
    ("cost", |trial, _| or_dash(trial.cost_usd, numbers::usd)),
];

fn with_mark(value: String, mark: &str) -> String {
    format!("{value} {mark}")
}

fn memory_mark(summary: &TrialSummary) -> &'static str {
    if summary.pack_peak_memory_bytes.is_some() { "attributed" } else { "solo" }
}

fn speed_mark(throughput: Throughput) -> &'static str {
    match throughput {
        Throughput::Solo => "solo",
        Throughput::Packed => "packed",
    }
}

fn measured(value: u64, show: impl Fn(u64) -> String) -> String {
    if value == 0 { NONE.into() } else { show(value) }
}

/// A row a trial, in rank order, and below it why trials failed. Columns in which no trial has anything are
/// left out.
pub(super) fn trials(page: &mut Html, sweep: &Sweep, entries: &[Entry], colours: &[&'static str]) {
    let none = TrialSummary::default();
    let cell = |entry: &Entry, column: &Column| {
        (column.1)(entry.trial, entry.trial.summary.as_ref().unwrap_or(&none))
    };
    let shown: Vec<_> =
        COLUMNS.iter().filter(|column| entries.iter().any(|e| cell(e, column) != NONE)).collect();
    let searched = searched(sweep);

    page.raw("<div class=\"wide\"><table class=\"trials\"><thead><tr><th>trial</th><th>state</th>");
    searched.iter().for_each(|name| _ = page.element("th", name));
    shown.iter().for_each(|column| _ = page.element("th", column.0));
    page.raw("</tr></thead><tbody>\n");
    for (entry, colour) in entries.iter().zip(colours) {
        let trial = entry.trial;
        let best = sweep.best.as_ref().is_some_and(|(id, _)| *id == trial.id);
        page.raw(if best { "<tr class=\"best\"><td>" } else { "<tr><td>" });
        page.raw("<i class=\"swatch\" style=\"background:").raw(colour).raw("\"></i>");
        page.text(or_dash(trial.id.number(), |n| n.to_string())).raw(if best {
            " ★</td>"
        } else {
            "</td>"
        });
        page.raw("<td class=\"state ").raw(trial.state.as_str()).raw("\">").text(trial.state).raw("</td>");
        for name in &searched {
            page.element("td", or_dash(trial.parameters.get(*name), numbers::value));
        }
        shown.iter().for_each(|column| _ = page.element("td", cell(entry, column)));
        page.raw("</tr>\n");
    }
    page.raw("</tbody></table></div>\n");
    failures(page, entries);
}

fn failures(page: &mut Html, entries: &[Entry]) {
    let failed: Vec<_> = entries.iter().filter_map(|e| Some((e.trial, e.trial.failure.as_ref()?))).collect();
    if failed.is_empty() {
        return;
    }
    page.raw("<h3>What went wrong</h3><ul>");
    for (trial, failure) in failed {
        page.raw("<li><b>").text(&trial.id).raw("</b>: ").text(&failure.message).raw("</li>");
    }
    page.raw("</ul>\n");
}

/// Names of the parameters that differ between trials.
pub(super) fn searched(sweep: &Sweep) -> Vec<&str> {
    let varies = |d: &Distribution| !matches!(d, Distribution::Constant(_));
    sweep.spec.parameters.iter().filter(|(_, d)| varies(d)).map(|(name, _)| name.as_str()).collect()
}

/// Numbers of the table that are no metric of their own.
const OTHER_DEFINITIONS: &[(&str, &str)] = &[
    ("base eval/loss", "eval/loss of the base model without an adapter, on the same rows."),
    ("predicted", "What the footprint model said before the trial began that its peak memory would be."),
    ("trainable, share", "Parameters of the adapter, and their share of base and adapter together."),
    ("adapter", "Size of adapter_model.safetensors in float32."),
];

/// What each number means, in `domain`'s words.
pub(super) fn definitions(page: &mut Html) {
    page.raw("<details><summary>What the numbers mean</summary><dl>\n");
    let metrics = metric::DEFINITIONS.iter().map(|d| (d.name, d.meaning));
    for (name, meaning) in metrics.chain(OTHER_DEFINITIONS.iter().copied()) {
        page.element("dt", name).element("dd", meaning).raw("\n");
    }
    page.raw("</dl><p>GB is 10⁹ bytes.</p></details>\n");
}

/// Every parameter in force: what all trials share or what the search draws from, and the best trial's value.
pub(super) fn configuration(page: &mut Html, sweep: &Sweep, best: Option<&Trial>) {
    page.raw("<details><summary>The configuration in force</summary><div class=\"wide\">");
    page.raw("<table class=\"config\"><thead><tr><th>parameter</th><th>the sweep's</th>");
    page.raw(if best.is_some() { "<th>the best trial's</th></tr></thead>" } else { "</tr></thead>" });
    let best = best.map(|trial| fields(&trial.config_in_force()));
    for (name, shared) in fields(&sweep.spec.base) {
        page.raw("<tr><th>").text(&name).raw("</th>");
        let distribution = sweep.spec.parameters.iter().find(|(n, _)| *n == name).map(|(_, d)| d);
        page.element("td", distribution.map_or_else(|| value(&name, &shared), describe));
        if let Some(best) = &best {
            page.element("td", or_dash(best.get(&name), |v| value(&name, v)));
        }
        page.raw("</tr>\n");
    }
    page.raw("</table></div>\n<div class=\"wide\"><table class=\"config\">");
    for (name, text) in search_rows(sweep) {
        page.raw("<tr><th>").text(name).raw("</th>").element("td", text).raw("</tr>\n");
    }
    page.raw("</table></div></details>\n");
}

fn fields(config: &TrialConfig) -> serde_json::Map<String, Value> {
    match serde_json::to_value(config) {
        Ok(Value::Object(fields)) => fields,
        _ => serde_json::Map::new(),
    }
}

/// A parameter's value, and for one that is not given, what is in force instead.
fn value(name: &str, value: &Value) -> String {
    match (name, value) {
        ("lora_alpha", Value::Null) => "2 × lora_rank".into(),
        ("eval_dataset_name", Value::Null) => "rows held out of dataset_name".into(),
        ("init_adapter", Value::Null) => "a fresh adapter".into(),
        _ => numbers::value(value),
    }
}

/// What the search draws from, in words.
fn describe(distribution: &Distribution) -> String {
    let stepped = |text: String, step: Option<String>| match step {
        Some(step) => format!("{text}, in steps of {step}"),
        None => text,
    };
    let n = numbers::number;
    match distribution {
        Distribution::Constant(value) => numbers::value(value),
        Distribution::Choices(values) => {
            let values: Vec<_> = values.iter().map(numbers::value).collect();
            format!("one of {}", values.join(" | "))
        }
        Distribution::Uniform { low, high, step } => {
            stepped(format!("uniform {} … {}", n(*low), n(*high)), step.map(n))
        }
        Distribution::LogUniform { low, high, step } => {
            stepped(format!("log-uniform {} … {}", n(*low), n(*high)), step.map(n))
        }
        Distribution::Integer { low, high, step } => {
            stepped(format!("whole {low} … {high}"), step.map(|s| s.to_string()))
        }
        Distribution::When { conditions, then, otherwise } => {
            let conditions: Vec<_> =
                conditions.iter().map(|(name, v)| format!("{name} = {}", numbers::value(v))).collect();
            let otherwise = otherwise.as_ref().map_or_else(|| "its default".into(), |d| describe(d));
            format!("if {}: {}; otherwise: {otherwise}", conditions.join(" and "), describe(then))
        }
    }
}

fn search_rows(sweep: &Sweep) -> Vec<(&'static str, String)> {
    let spec = &sweep.spec;
    let word =
        |value: Result<Value, serde_json::Error>| value.map_or_else(|_| NONE.into(), |v| numbers::value(&v));
    let mut rows = vec![
        ("search.algorithm", word(serde_json::to_value(spec.search.algorithm))),
        (
            "search.metric",
            format!("{}, {}", spec.search.metric, word(serde_json::to_value(spec.search.goal))),
        ),
        ("search.seed", spec.search.seed.to_string()),
    ];
    let mut given = |name, value: Option<String>| rows.extend(value.map(|value| (name, value)));
    given("search.max_trials", spec.search.max_trials.map(|n| n.to_string()));
    if let Some(steps) = spec.search.min_steps {
        given("search.min_steps", Some(steps.to_string()));
        given("search.reduction_factor", Some(spec.search.reduction_factor.to_string()));
    }
    given("search.max_concurrent_trials", spec.search.max_concurrent_trials.map(|n| n.to_string()));
    for constraint in &spec.constraints {
        given("constraint", Some(constraint.0.clone()));
    }
    given("budget.max_cost_usd", spec.budget.max_cost_usd.map(numbers::usd));
    given(
        "budget.max_wall_clock",
        spec.budget.max_wall_clock_seconds.map(|s| format!("{} s", numbers::number(s))),
    );
    let accelerators = spec.resources.accelerators.join(", ");
    given("keep_adapters", spec.keep_adapters.map(|n| n.to_string()));
    given("resources.accelerators", Some(accelerators).filter(|a| !a.is_empty()));
    rows
}
