//! The tables: trials, what their numbers mean, the configuration in force.

use super::document::{Block, Line, Row, Table};
use super::numbers::{self, NONE, or_dash};
use super::series::Entry;
use super::slice::{self, Dependence, Facts, PRECISION, named, sorted};
use super::{Sources, chart::OTHERS, evaluations};
use domain::TrialId;
use domain::machine::PriceSource;
use domain::metric;
use domain::sweep::{Distribution, Sweep};
use domain::trial::{Throughput, Trial, TrialSummary};
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
    ("accelerator", |trial, _| or_dash(trial.device.as_ref(), |device| device.accelerator.clone())),
    ("peak memory", |trial, s| match shortage(trial) {
        Some(needed) => needed,
        None => or_dash(s.peak_memory_bytes, |b| with_mark(numbers::bytes(b), memory_mark(s))),
    }),
    ("pack's peak", |_, s| or_dash(s.pack_peak_memory_bytes, numbers::bytes)),
    ("predicted", |_, s| or_dash(s.predicted_peak_memory_bytes, numbers::bytes)),
    ("computed again", |_, s| {
        or_dash(s.recomputed_layers.filter(|layers| *layers > 0), |layers| format!("{layers} layers"))
    }),
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

/// What a trial needs that its device could not hold.
fn shortage(trial: &Trial) -> Option<String> {
    let lacked = domain::trial::Shortage::of(trial.failure.as_ref()?)?;
    Some(format!("does not fit: needs {}", numbers::bytes(lacked.needed())))
}

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

/// The table of all trials, what went wrong, what the numbers mean, and the configuration.
pub(super) fn trials(sources: &Sources) -> Vec<Block> {
    let mut blocks = vec![Block::Table(every_trial(sources))];
    if !searched(sources.sweep).is_empty() {
        blocks.push(Block::Subheading("Their parameters".into()));
        blocks.push(Block::Table(every_configuration(sources)));
    }
    blocks.extend(failures(sources.entries.iter().chain(&sources.replicates)));
    blocks.push(definitions());
    blocks.push(configuration(sources.sweep, sources.best().map(|entry| entry.trial)));
    blocks
}

/// A trial's number, marked if it is the best or runs another again.
fn marked(sources: &Sources, trial: &Trial) -> String {
    let number = |id: &TrialId| or_dash(id.number(), |n| n.to_string());
    let again = trial.replicate_of.as_ref().map(|of| format!(" ({} again)", number(of)));
    number(&trial.id) + &if sources.is_best(trial) { " ★".into() } else { again.unwrap_or_default() }
}

/// What each of the same rows was given of what the search varies: a table of its own, so that each fits a page.
fn every_configuration(sources: &Sources) -> Table {
    let searched = searched(sources.sweep);
    let mut table = Table::new(["trial"].into_iter().chain(searched.iter().copied()));
    for entry in sources.entries.iter().chain(&sources.replicates) {
        let trial = entry.trial;
        let values = searched.iter().map(|name| or_dash(trial.parameters.get(*name), numbers::value));
        let cells = [marked(sources, trial)].into_iter().chain(values).map(Line::from).collect();
        table.rows.push(Row { cells, swatch: None, best: sources.is_best(trial) });
    }
    table
}

/// A row a trial, in rank order, then those that run another again. Columns in which no trial has anything are left out.
fn every_trial(sources: &Sources) -> Table {
    let again = sources.replicates.iter().map(|entry| (entry, OTHERS));
    let entries: Vec<_> = sources.entries.iter().zip(sources.colours.iter().copied()).chain(again).collect();
    let none = TrialSummary::default();
    let cell = |entry: &Entry, column: &Column| {
        (column.1)(entry.trial, entry.trial.summary.as_ref().unwrap_or(&none))
    };
    let searched = searched(sources.sweep);
    // The accelerator that a trial had to run on is the one that it ran on.
    let said = |column: &&Column| !searched.contains(&column.0);
    let shown = COLUMNS.iter().filter(said);
    let shown: Vec<_> = shown.filter(|column| entries.iter().any(|(e, _)| cell(e, column) != NONE)).collect();
    // What a task says of a trial is no column of every sweep; that by which trials are compared is one of this.
    let metric = sources.sweep.spec.search.metric.as_str();
    let compared = metric::task_and_metric(metric).map(|_| metric);
    let head = ["trial", "state"].into_iter().chain(compared);
    let mut table = Table::new(head.chain(shown.iter().map(|column| column.0)));
    for (entry, colour) in &entries {
        let trial = entry.trial;
        let mut cells = vec![Line::from(marked(sources, trial)), Line::default().state(trial.state.as_str())];
        let score = trial.summary.as_ref().and_then(|summary| summary.evaluation(metric));
        let score = or_dash(score, |score| evaluations::with_error(score.value, score.stderr));
        cells.extend(compared.map(|_| Line::from(score)));
        cells.extend(shown.iter().map(|column| Line::from(cell(entry, column))));
        table.rows.push(Row { cells, swatch: Some(colour), best: sources.is_best(trial) });
    }
    table
}

/// Why trials failed.
fn failures<'a>(entries: impl Iterator<Item = &'a Entry<'a>>) -> Vec<Block> {
    let failed: Vec<_> = entries
        .filter_map(|e| {
            Some(Line::default().strong(&e.trial.id).text(": ").text(&e.trial.failure.as_ref()?.message))
        })
        .collect();
    if failed.is_empty() {
        return Vec::new();
    }
    vec![Block::Subheading("What went wrong".into()), Block::List(failed)]
}

/// What adapters of each rank come to, where it differs.
pub(super) fn by_rank(facts: &Facts) -> Option<Block> {
    let known = |fact: &slice::Fact| fact.trial.summary.as_ref().is_some_and(|s| s.trainable_parameters > 0);
    let slice = facts.slice(&["lora_rank"], Dependence::Adapter, known)?;
    let mut head = vec!["lora_rank", "trainable parameters", "all parameters", "share", "adapter"];
    let held = named(&slice.fixed);
    head.extend((!held.is_empty()).then_some("held"));
    let mut table = Table::new(head);
    for rank in sorted(slice.facts.iter().map(|fact| fact.get("lora_rank"))) {
        let of_it = slice.facts.iter().find(|fact| fact.get("lora_rank") == rank);
        let Some(summary) = of_it.and_then(|fact| fact.trial.summary.as_ref()) else { continue };
        let mut cells = vec![
            numbers::value(rank),
            numbers::count(summary.trainable_parameters),
            numbers::count(summary.total_parameters),
            numbers::percent(summary.trainable_parameters, summary.total_parameters),
            numbers::bytes(summary.adapter_bytes),
        ];
        cells.extend((!held.is_empty()).then(|| held.clone()));
        table.row(cells);
    }
    Some(Block::Table(table))
}

/// What the base scores, and the best trial of each precision mode: the held-out loss, and, of the best that were asked, what
/// tasks say, a column for each metric of the sweep's presets.
pub(super) fn accuracy(sources: &Sources) -> Option<Block> {
    let asked = |trial: &Trial| trial.summary.as_ref().is_some_and(|summary| !summary.evaluations.is_empty());
    let of_asked = sources.best_of_modes(asked);
    let best = if of_asked.is_empty() { sources.best_of_modes(|_| true) } else { of_asked };
    let metrics = evaluations::columns(sources.sweep, &best);
    let mut head = vec!["of".to_string(), metric::EVAL_LOSS.into()];
    head.extend(metrics.iter().map(|(heading, _)| heading.clone()));
    head.extend(["trainable parameters".to_string(), "that is".into()]);
    let mut table = Table::new(head);
    let mut has_base = false;
    for (mode, entry) in best {
        let summary = entry.trial.summary.as_ref();
        let scores = |of_base: bool| {
            let cell = |name: &str| {
                let score = summary?.evaluation(name)?;
                let (value, stderr) = match of_base {
                    true => (score.base_value?, score.base_stderr),
                    false => (score.value, score.stderr),
                };
                value.is_finite().then(|| evaluations::with_error(value, stderr))
            };
            metrics.iter().map(|(_, name)| or_dash(cell(name), |text| text)).collect::<Vec<_>>()
        };
        let finite = |loss: Option<f64>| loss.filter(|loss| loss.is_finite());
        let base = finite(summary.and_then(|s| s.base_eval_loss));
        let of_base = scores(true);
        has_base = has_base || base.is_some() || of_base.iter().any(|cell| cell != NONE);
        let row = |of: &str, loss: Option<f64>, scores: Vec<String>, trainable: String, that_is: String| {
            let first = [format!("{of}, {mode}"), or_dash(loss, numbers::loss)];
            first.into_iter().chain(scores).chain([trainable, that_is])
        };
        table.row(row("base", base, of_base, NONE.into(), NONE.into()));
        let number = or_dash(entry.trial.id.number(), |n| n.to_string());
        let chosen = searched(sources.sweep)
            .into_iter()
            .filter(|name| *name != PRECISION)
            .map(|name| format!("{name} {}", or_dash(entry.trial.parameters.get(name), numbers::value)));
        let described = [format!("trial {number}")].into_iter().chain(chosen).collect::<Vec<_>>().join(", ");
        let loss = finite(entry.trial.recorded(metric::EVAL_LOSS));
        let trainable = or_dash(summary.filter(|s| s.trainable_parameters > 0), |s| {
            let share = numbers::percent(s.trainable_parameters, s.total_parameters);
            format!("{}, {share}", numbers::count(s.trainable_parameters))
        });
        table.row(row("adapter", loss, scores(false), trainable, described));
    }
    // Without the base's scores there is nothing to hold the adapters' against.
    has_base.then_some(Block::Table(table))
}

/// What an hour of each accelerator costs, and where that price comes from.
pub(super) fn prices(trials: &[Trial]) -> Option<Line> {
    let devices = trials.iter().filter_map(|trial| trial.device.as_ref()).filter(|d| d.price_per_hour > 0.0);
    let mut prices: Vec<_> =
        devices.map(|d| (d.accelerator.as_str(), d.price_per_hour, d.price_from.as_deref())).collect();
    prices.sort_by(|(a, x, of), (b, y, by)| a.cmp(b).then(x.total_cmp(y)).then(of.cmp(by)));
    prices.dedup();
    if prices.is_empty() {
        return None;
    }
    let price = |(accelerator, price, from): (&str, f64, Option<&PriceSource>)| {
        let from = match from {
            Some(from) => format!("that of {from}"),
            None => "as whoever started its agent said".into(),
        };
        format!("{accelerator} {} an hour, {from}", numbers::usd(price))
    };
    let all: Vec<_> = prices.into_iter().map(price).collect();
    Some(Line::from(format!("Prices: {}.", all.join("; "))))
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
    (
        "computed again",
        "Decoder layers of which the input alone was kept, to fit the device: slower, less memory.",
    ),
    ("trainable, share", "Parameters of the adapter, and their share of base and adapter together."),
    ("adapter", "Size of adapter_model.safetensors in float32."),
];

/// What each number means, in `domain`'s words.
fn definitions() -> Block {
    let metrics = metric::DEFINITIONS.iter().map(|d| (d.name, d.meaning));
    let all = metrics.chain(OTHER_DEFINITIONS.iter().copied());
    let definitions = Block::Definitions(all.map(|(name, meaning)| (name.into(), meaning.into())).collect());
    let gigabyte = Block::Paragraph(Line::from("GB is 10⁹ bytes."));
    Block::Details("What the numbers mean".into(), vec![definitions, gigabyte])
}

/// Every parameter in force: what all trials share or what the search draws from, and the best trial's value.
fn configuration(sweep: &Sweep, best: Option<&Trial>) -> Block {
    let mut table =
        Table::new(["parameter", "the sweep's"].into_iter().chain(best.map(|_| "the best trial's")));
    let best = best.map(|trial| slice::fields(&trial.config_in_force()));
    for (name, shared) in slice::fields(&sweep.spec.base) {
        let distribution = sweep.spec.parameters.iter().find(|(n, _)| *n == name).map(|(_, d)| d);
        let of_sweep = distribution.map_or_else(|| value(&name, &shared), describe);
        let of_best = best.as_ref().map(|best| or_dash(best.get(&name), |v| value(&name, v)));
        table.row([name, of_sweep].into_iter().chain(of_best));
    }
    let mut search = Table::new(["key", "value"]);
    search_rows(sweep).into_iter().for_each(|(name, text)| search.row([name.to_string(), text]));
    Block::Details("The configuration in force".into(), vec![Block::Table(table), Block::Table(search)])
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
    given("replicates", spec.replicates.map(|again| format!("{} of {}", again.runs, again.finalists)));
    given("resources.accelerators", Some(accelerators).filter(|a| !a.is_empty()));
    given("resources.max_pack_size", spec.resources.max_pack_size.map(|n| n.to_string()));
    rows
}
