//! Published numbers beside what a sweep measured, where its base is the one that they are of.

use super::Sources;
use super::document::{Block, Line, Table};
use super::evaluations::with_error;
use super::figures::accuracy::method;
use super::numbers::{self, NONE, minus, or_dash};
use super::series::Entry;
use super::slice::{ACCELERATOR, AGAIN, Fact, Facts, PRECISION};
use config::published::{Number, Published, Setting};
use domain::trial::{TaskScore, Trial, TrialState};
use serde_json::Value;
use std::fmt::Display;

/// The file of the same numbers beside a Markdown report.
pub(super) const FILE: &str = "published.csv";

/// Why published numbers are shown beside a sweep's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Match {
    /// The base's id ends with the same name.
    Name,
    /// The base has as many parameters.
    Shape,
}

/// Published numbers that are of a sweep's base.
#[derive(Debug, Clone, Copy)]
pub(super) struct Beside {
    pub(super) published: &'static Published,
    by: Match,
}

impl Beside {
    /// Those of the base of these trials: of one that has as many parameters, or, where that is not known, as its id's last
    /// part.
    pub(super) fn of(id: &str, facts: &Facts) -> Option<Self> {
        let published = config::published::openllama_7b()?;
        let parameters = facts.facts.iter().find_map(|fact| {
            let summary = fact.trial.summary.as_ref().filter(|s| s.trainable_parameters > 0)?;
            summary.total_parameters.checked_sub(summary.trainable_parameters)
        });
        let name = id.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
        let is_named = name.eq_ignore_ascii_case(&published.base.name);
        match parameters {
            Some(parameters) if parameters != published.base.parameters => None,
            _ if is_named => Some(Self { published, by: Match::Name }),
            Some(_) => Some(Self { published, by: Match::Shape }),
            None => None,
        }
    }

    fn why(&self) -> String {
        let base = &self.published.base;
        match self.by {
            Match::Name => format!("Shown because the base is called {}.", base.name),
            Match::Shape => format!(
                "Shown because the base has {} parameters, as {} has. What else has that shape has the same bytes and seconds, \
                 and may have another accuracy.",
                numbers::count(base.parameters),
                base.name
            ),
        }
    }
}

/// What is compared, with its unit in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Topic {
    Memory,
    Batch,
    Parameters,
    Size,
    Speed,
    Cost,
    Accuracy,
}

impl Topic {
    fn name(self) -> &'static str {
        match self {
            Self::Memory => "Peak memory",
            Self::Batch => "Largest batch size",
            Self::Parameters | Self::Size => "Parameters and adapters",
            Self::Speed => "Speed",
            Self::Cost => "Cost of a run",
            Self::Accuracy => "Accuracy",
        }
    }

    fn unit(self) -> &'static str {
        match self {
            Self::Memory => "GB",
            Self::Batch => "rows",
            Self::Parameters => "parameters",
            Self::Size => "MB",
            Self::Speed => "rows/s",
            Self::Cost => "US dollars",
            Self::Accuracy => "",
        }
    }

    fn show(self, value: f64) -> String {
        let plain = numbers::number(value);
        match self {
            Self::Batch => plain,
            Self::Parameters => numbers::count(value.round() as u64),
            Self::Cost => numbers::usd(value),
            Self::Accuracy => format!("{value:.2}"),
            Self::Memory | Self::Size | Self::Speed => format!("{plain} {}", self.unit()),
        }
    }

    /// `ours` against `published`; of batches and accuracies what lies between them.
    fn difference(self, published: Option<f64>, ours: Option<f64>) -> String {
        match (published, ours) {
            (Some(published), Some(ours)) => match self {
                Self::Batch => minus(&format!("{:+}", ours - published)),
                Self::Accuracy => minus(&format!("{:+.2}", ours - published)),
                _ => numbers::signed_change(ours / published),
            },
            (None, Some(_)) => "fits here".into(),
            (Some(_), None) => "does not fit here".into(),
            (None, None) => "the same".into(),
        }
    }
}

/// What a sweep found of a published number.
#[derive(Debug, Clone, PartialEq)]
struct Ours {
    /// `None` where it does not fit.
    value: Option<f64>,
    text: String,
}

/// A published number beside the sweep's.
#[derive(Debug)]
struct Row {
    topic: Topic,
    method: String,
    at: String,
    published: Option<f64>,
    about: bool,
    /// Without layers that were computed again, and with them.
    ours: [Option<Ours>; 2],
}

impl Row {
    fn published(&self) -> String {
        let value = match self.topic {
            Topic::Batch => or_dash(self.published, |value| self.topic.show(value)).replace(NONE, "none"),
            Topic::Parameters => or_dash(self.published, |value| format!("{value:.2e}")),
            // As many digits as were published.
            Topic::Size => or_dash(self.published, |value| format!("{value} {}", self.topic.unit())),
            _ => self.published.map_or_else(|| "does not fit".into(), |value| self.topic.show(value)),
        };
        if self.about { format!("~{value}") } else { value }
    }
}

/// The section: how the two were matched, a table for each number, and where the published ones disagree among themselves.
pub(super) fn blocks(sources: &Sources) -> Vec<Block> {
    let Some(beside) = sources.published else { return Vec::new() };
    let rows = rows(sources, beside.published);
    if rows.is_empty() {
        return Vec::new();
    }
    let Published { title, by, usual, notes, .. } = beside.published;
    let said = Line::from(by).text(", ").strong(title).text(format!(". {}", beside.why()));
    let mut blocks = vec![
        Block::Paragraph(said),
        Block::Note(Line::from(format!(
            "Of {}, and runs of {} steps, unless a row says otherwise. Ours are of trials that agree in these, each alone on its \
             device: the most of their bytes, the mean of their speeds and costs. ~ is told as about that. GB is 10⁹ bytes.",
            full(usual),
            usual.max_steps
        ))),
    ];
    for part in rows.chunk_by(|a, b| a.topic.name() == b.topic.name()) {
        let Some(first) = part.first() else { continue };
        blocks.push(Block::Subheading(first.topic.name().into()));
        blocks.push(Block::Table(table(part)));
    }
    blocks.push(Block::Subheading("Where the published numbers do not agree with each other".into()));
    blocks.push(Block::List(notes.iter().map(Line::from).collect()));
    blocks
}

fn table(rows: &[Row]) -> Table {
    let again = rows.iter().any(|row| row.ours[1].is_some());
    let mut head = vec!["of", "at", "published", "ours", "difference"];
    head.extend(again.then_some(["ours, recomputed", "difference, recomputed"]).into_iter().flatten());
    let mut table = Table::new(head);
    for row in rows {
        let cells = row.ours[..if again { 2 } else { 1 }].iter().flat_map(|ours| {
            let difference = ours.as_ref().map(|ours| row.topic.difference(row.published, ours.value));
            [or_dash(ours.as_ref(), |ours| ours.text.clone()), or_dash(difference, |text| text)]
        });
        table.row([row.method.clone(), row.at.clone(), row.published()].into_iter().chain(cells));
    }
    table
}

/// The same as a file for programs: a line for each number of the sweep's; an empty cell does not fit.
pub(super) fn file(sources: &Sources) -> Option<(String, String)> {
    let rows = rows(sources, sources.published?.published);
    let mut text = "number,unit,of,at,recomputed,published,ours,ratio\n".to_string();
    for row in &rows {
        for (ours, again) in row.ours.iter().zip([false, true]) {
            let Some(ours) = ours else { continue };
            let ratio = row.published.zip(ours.value).map(|(published, ours)| ours / published);
            let cell = |value: Option<f64>| value.map_or_else(String::new, |value| value.to_string());
            let cells = [
                quoted(row.topic.name()),
                quoted(row.topic.unit()),
                quoted(&row.method),
                quoted(&row.at),
                again.to_string(),
                cell(row.published),
                cell(ours.value),
                cell(ratio),
            ];
            text += &(cells.join(",") + "\n");
        }
    }
    (!rows.is_empty()).then(|| (FILE.to_string(), text))
}

/// A cell of a CSV file (RFC 4180).
fn quoted(text: &str) -> String {
    if text.contains(['"', ',', '\n']) { format!("\"{}\"", text.replace('"', "\"\"")) } else { text.into() }
}

/// Every published number of which the sweep has one.
fn rows(sources: &Sources, published: &Published) -> Vec<Row> {
    let of_numbers = |topic: Topic, numbers: &[Number]| -> Vec<Row> {
        numbers.iter().map(|number| of_number(&sources.facts, topic, number, &published.usual)).collect()
    };
    let mut rows = of_numbers(Topic::Memory, &published.peak_memory);
    rows.extend(of_numbers(Topic::Batch, &published.largest_batch_size));
    rows.extend(of_adapters(&sources.facts, published));
    rows.extend(of_numbers(Topic::Speed, &published.speed));
    rows.extend(of_numbers(Topic::Cost, &published.cost));
    rows.extend(of_tasks(sources, published));
    rows.retain(|row| row.ours.iter().any(Option::is_some));
    rows
}

fn of_number(facts: &Facts, topic: Topic, number: &Number, usual: &Setting) -> Row {
    let setting = number.setting(usual);
    let ours = [false, true].map(|again| {
        let here = facts.facts.iter().filter(|fact| is_of(fact, number, &setting, again));
        let here: Vec<_> = here.collect();
        if topic == Topic::Batch { largest(&here) } else { found(&here, topic, &setting) }
    });
    Row {
        topic,
        method: method(&number.precision_mode),
        at: at(topic, number, usual),
        published: number.value,
        about: number.about,
        ours,
    }
}

/// Whether a trial is of a published number but for its batch size and its steps: alone on its device, and with layers that were
/// computed again, or without. One that did not fit and whose device might have chosen is of both.
fn is_of(fact: &Fact, number: &Number, setting: &Setting, again: bool) -> bool {
    let recomputed = match fact.recomputed_layers() {
        Some(layers) => (layers > 0) == again,
        None => fact.get(AGAIN).as_bool().is_none_or(|asked| asked == again),
    };
    let on = fact.get(ACCELERATOR).as_str().is_some_and(|on| on.eq_ignore_ascii_case(&setting.accelerator));
    fact.is_solo()
        && recomputed
        && on
        && fact.get(PRECISION).as_str() == Some(number.precision_mode.as_str())
        && fact.get("lora_rank").as_u64() == Some(setting.lora_rank)
        && fact.get("max_sequence_length").as_u64() == Some(setting.max_sequence_length)
}

/// What trials of a published number have of it.
fn found(facts: &[&Fact], topic: Topic, setting: &Setting) -> Option<Ours> {
    let counts = |fact: &&&Fact| {
        let as_long = steps(fact.trial) == Some(setting.max_steps);
        fact.get("batch_size").as_u64() == Some(setting.batch_size) && (topic != Topic::Cost || as_long)
    };
    let here: Vec<_> = facts.iter().filter(counts).collect();
    let value = |fact: &&&Fact| match topic {
        Topic::Memory => fact.peak_memory().map(|bytes| bytes / 1e9),
        Topic::Speed => fact.speed(),
        Topic::Cost => fact.cost(),
        _ => None,
    };
    let values: Vec<f64> = here.iter().copied().filter_map(|fact| value(&fact)).collect();
    let value = match topic {
        Topic::Memory => values.iter().copied().reduce(f64::max),
        _ => super::replicates::mean(values.iter().copied()),
    };
    let unfit = || {
        let needed = here.iter().filter_map(|fact| Some(fact.shortage()?.needed())).max()?;
        Some(Ours { value: None, text: format!("does not fit: needs {}", numbers::bytes(needed)) })
    };
    value.map(|value| Ours { value: Some(value), text: topic.show(value) }).or_else(unfit)
}

/// Steps that a trial made, or was to make.
fn steps(trial: &Trial) -> Option<u64> {
    let made = trial.summary.as_ref().map(|summary| summary.steps);
    made.or_else(|| trial.config_in_force().max_steps.map(u64::from))
}

/// The largest batch size of those that fit, with the smallest above it that does not.
fn largest(facts: &[&Fact]) -> Option<Ours> {
    let size = |fact: &&&Fact| fact.get("batch_size").as_u64();
    let fit = facts.iter().filter(|fact| fact.peak_memory().is_some()).filter_map(|fact| size(&fact)).max();
    let unfit = facts.iter().filter(|fact| fact.does_not_fit()).filter_map(|fact| size(&fact));
    let unfit = unfit.filter(|size| fit.is_none_or(|fit| *size > fit)).min();
    let text = match (fit, unfit) {
        (Some(fit), Some(unfit)) => format!("{fit}, not {unfit}"),
        (Some(fit), None) => format!("{fit}, the largest that was tried"),
        (None, Some(unfit)) => format!("none, not even {unfit}"),
        (None, None) => return None,
    };
    Some(Ours { value: fit.map(|size| size as f64), text })
}

fn of_adapters(facts: &Facts, published: &Published) -> Vec<Row> {
    let rows = published.adapters.iter().flat_map(|adapter| {
        let of_rank = |fact: &&Fact| fact.get("lora_rank").as_u64() == Some(adapter.lora_rank);
        let summaries = facts.facts.iter().filter(of_rank).filter_map(|fact| fact.trial.summary.as_ref());
        let summary = summaries.into_iter().find(|summary| summary.trainable_parameters > 0);
        let row = move |topic: Topic, of: &str, value: f64, ours: Option<f64>| Row {
            topic,
            method: of.into(),
            at: format!("lora_rank {}", adapter.lora_rank),
            published: Some(value),
            about: false,
            ours: [ours.map(|ours| Ours { value: Some(ours), text: topic.show(ours) }), None],
        };
        let parameters =
            |of, value, ours: Option<u64>| row(Topic::Parameters, of, value, ours.map(|n| n as f64));
        [
            parameters("trainable parameters", adapter.trainable, summary.map(|s| s.trainable_parameters)),
            parameters("all parameters", adapter.total, summary.map(|s| s.total_parameters)),
            row(
                Topic::Size,
                "adapter",
                adapter.megabytes,
                summary.map(|s| s.adapter_bytes as f64 / 1e6).filter(|megabytes| *megabytes > 0.0),
            ),
        ]
    });
    rows.collect()
}

fn of_tasks(sources: &Sources, published: &Published) -> Vec<Row> {
    let Published { accuracy, usual, .. } = published;
    let mut rows = Vec::new();
    for scores in &accuracy.rows {
        let Some(entry) = asked(sources, scores.precision_mode.as_deref(), accuracy.max_steps, usual) else {
            continue;
        };
        let number = or_dash(entry.trial.id.number(), |number| number.to_string());
        for (metric, value) in accuracy.metrics.iter().zip(&scores.values) {
            let score = entry.trial.summary.as_ref().and_then(|summary| summary.evaluation(&metric.metric));
            let told = |value: f64, stderr: Option<f64>| Ours {
                value: Some(value),
                text: format!("{} (trial {number})", with_error(value, stderr)),
            };
            let ours = score.and_then(|score: &TaskScore| match &scores.precision_mode {
                Some(_) => Some(told(score.value, score.stderr)),
                None => Some(told(score.base_value?, score.base_stderr)),
            });
            rows.push(Row {
                topic: Topic::Accuracy,
                method: scores.of.clone(),
                at: metric.name.clone(),
                published: Some(*value),
                about: false,
                ours: [ours, None],
            });
        }
    }
    rows
}

/// The best trial that was asked tasks as the published ones were trained: of a precision mode, or of any for its base.
fn asked<'a, 's>(
    sources: &'s Sources<'a>,
    mode: Option<&str>,
    max_steps: u64,
    usual: &Setting,
) -> Option<&'s Entry<'a>> {
    let number = |value: u32| u64::from(value);
    sources.entries.iter().find(|entry| {
        let config = &entry.trial.config;
        let is_mode = |mode: &str| {
            let own = serde_json::to_value(config.precision_mode).ok();
            own.as_ref().and_then(Value::as_str) == Some(mode)
        };
        entry.trial.state == TrialState::Completed
            && entry.trial.summary.as_ref().is_some_and(|summary| !summary.evaluations.is_empty())
            && steps(entry.trial) == Some(max_steps)
            && number(config.lora_rank) == usual.lora_rank
            && number(config.max_sequence_length) == usual.max_sequence_length
            && mode.is_none_or(is_mode)
    })
}

/// In what a number is not of the usual configuration.
fn at(topic: Topic, number: &Number, usual: &Setting) -> String {
    let given = |name: &str, value: Option<&dyn Display>| value.map(|value| format!("{name} {value}"));
    let parts = [
        number.accelerator.clone(),
        given("lora_rank", number.lora_rank.as_ref().map(|value| value as &dyn Display)),
        given("max_sequence_length", number.max_sequence_length.as_ref().map(|value| value as &dyn Display)),
    ];
    let parts: Vec<_> = parts.into_iter().flatten().collect();
    match (parts.as_slice(), topic) {
        ([], Topic::Batch | Topic::Cost) => usual.accelerator.clone(),
        ([], _) => {
            format!("lora_rank {}, max_sequence_length {}", usual.lora_rank, usual.max_sequence_length)
        }
        (parts, _) => parts.join(", "),
    }
}

fn full(setting: &Setting) -> String {
    let Setting { accelerator, batch_size, lora_rank, max_sequence_length, .. } = setting;
    format!(
        "{accelerator}, batch_size {batch_size}, lora_rank {lora_rank}, max_sequence_length {max_sequence_length}"
    )
}

#[cfg(test)]
mod tests;
