//! A sweep as two tables, for CSV and Parquet alike: a row a trial, and a row a trial, step and metric.

use crate::Failure;
use domain::metric::{self, MetricPoint};
use domain::trial::{Trial, TrialConfig};
use domain::{Attempt, Timestamp};
use serde_json::{Value, json};
use std::borrow::Cow;
use std::collections::BTreeSet;
use std::path::Path;

/// What a column holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Text; lists and mappings as JSON.
    Text,
    /// Whole numbers.
    Whole,
    /// Numbers.
    Number,
    /// True or false.
    Flag,
    /// Moments, to the millisecond, UTC.
    Time,
}

/// A column of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Column {
    /// Its heading. A unit other than 1 is part of it.
    pub(super) name: Cow<'static, str>,
    /// What its cells are, those without a value aside.
    pub(super) kind: Kind,
}

/// One value of a table.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Cell<'a> {
    /// There is no value.
    None,
    /// Of [`Kind::Text`].
    Text(Cow<'a, str>),
    /// Of [`Kind::Whole`].
    Whole(i64),
    /// Of [`Kind::Number`]; may be NaN or infinite.
    Number(f64),
    /// Of [`Kind::Flag`].
    Flag(bool),
    /// Of [`Kind::Time`].
    Time(Timestamp),
}

/// A file of one table, written row after row.
pub(super) trait Sheet: Sized {
    /// The ending of the file's name.
    const ENDING: &'static str;

    /// Begins a file. The columns stay as they are.
    fn create(path: &Path, columns: &[Column]) -> Result<Self, Failure>;

    /// Adds a row: a cell a column, of the column's kind.
    fn row(&mut self, cells: &[Cell]) -> Result<(), Failure>;

    /// Ends the file, which is whole then.
    fn close(self) -> Result<(), Failure>;
}

/// What every trial has, in the order of the columns: heading, place in the trial's record, kind.
const LEADING: &[(&str, &str, Kind)] = &[
    ("id", "/id", Kind::Text),
    ("state", "/state", Kind::Text),
    ("attempt", "/attempt", Kind::Whole),
    ("step", "/step", Kind::Whole),
    ("total_steps", "/total_steps", Kind::Whole),
    ("eval_loss", "/eval_loss", Kind::Number),
    ("cost_usd", "/cost_usd", Kind::Number),
];
/// The same, behind the parameters that the search chose.
const TRAILING: &[(&str, &str, Kind)] = &[
    ("loss", "/summary/loss", Kind::Number),
    ("base_eval_loss", "/summary/base_eval_loss", Kind::Number),
    ("peak_memory_bytes", "/summary/peak_memory_bytes", Kind::Whole),
    ("predicted_peak_memory_bytes", "/summary/predicted_peak_memory_bytes", Kind::Whole),
    ("trainable_parameters", "/summary/trainable_parameters", Kind::Whole),
    ("total_parameters", "/summary/total_parameters", Kind::Whole),
    ("adapter_bytes", "/summary/adapter_bytes", Kind::Whole),
    ("samples_per_second", "/summary/samples_per_second", Kind::Number),
    ("tokens_per_second", "/summary/tokens_per_second", Kind::Number),
    ("seconds_per_step", "/seconds_per_step", Kind::Number),
    ("predicted_seconds_per_step", "/summary/predicted_seconds_per_step", Kind::Number),
    ("throughput", "/summary/throughput", Kind::Text),
    ("device_seconds", "/summary/device_seconds", Kind::Number),
    ("created_at", "/created_at", Kind::Time),
    ("started_at", "/started_at", Kind::Time),
    ("finished_at", "/finished_at", Kind::Time),
    ("failure", "/failure/message", Kind::Text),
    ("failure_class", "/failure/class", Kind::Text),
    ("simulated", "/simulated", Kind::Flag),
    ("agent", "/agent", Kind::Text),
    ("device_id", "/device_id", Kind::Text),
    (TrialConfig::ACCELERATOR, "/accelerator", Kind::Text),
    ("pack_peak_memory_bytes", "/summary/pack_peak_memory_bytes", Kind::Whole),
    ("peak_rss_bytes", "/summary/peak_rss_bytes", Kind::Whole),
    ("truncated_rows", "/summary/truncated_rows", Kind::Whole),
    ("skipped_rows", "/summary/skipped_rows", Kind::Whole),
    ("base_model_digest", "/digests/base_model", Kind::Text),
    ("dataset_digest", "/digests/dataset", Kind::Text),
    ("tokenizer_digest", "/digests/tokenizer", Kind::Text),
    ("spec_digest", "/digests/spec", Kind::Text),
    ("documents_digest", "/digests/documents", Kind::Text),
    ("replicate_of", "/replicate_of", Kind::Text),
    ("price_per_hour", "/device/price_per_hour", Kind::Number),
    ("price_machine", "/device/price_from/machine", Kind::Text),
    ("price_provider", "/device/price_from/provider", Kind::Text),
    ("price_region", "/device/price_from/region", Kind::Text),
    ("price_date", "/device/price_from/date", Kind::Text),
    ("price_source", "/device/price_from/source", Kind::Text),
    ("price_spot", "/device/price_from/spot", Kind::Flag),
];

/// The table of trials: where each stands, what the search chose, its numbers, and every other parameter.
#[derive(Debug)]
pub(super) struct Trials {
    /// The columns.
    pub(super) columns: Vec<Column>,
    /// Where in a trial's record a column's value stands (RFC 6901).
    places: Vec<String>,
    records: Vec<Value>,
}

impl Trials {
    /// The table of these trials.
    pub(super) fn new(trials: &[Trial]) -> Self {
        let record = |trial: &Trial| {
            let mut record = serde_json::to_value(trial).unwrap_or_default();
            record["device_id"] = json!(trial.device_id());
            record["simulated"] = json!(trial.is_simulated());
            record["seconds_per_step"] = json!(trial.seconds_per_step());
            record["scores"] = scores(trial);
            // The one that it ran on, or must run on.
            let given = trial.device.as_ref().map(|device| &device.accelerator);
            record[TrialConfig::ACCELERATOR] = json!(given.or(trial.config.accelerator.as_ref()));
            record
        };
        let mut table =
            Self { columns: Vec::new(), places: Vec::new(), records: trials.iter().map(record).collect() };
        // A parameter that has a column of its own is no second one.
        let is_parameter = |name: &&String| *name != TrialConfig::ACCELERATOR;
        let chosen = trials.iter().flat_map(|trial| trial.parameters.keys());
        let chosen: BTreeSet<&String> = chosen.filter(is_parameter).collect();
        let configs = table.records.iter().filter_map(|record| record["config"].as_object());
        let mut others: Vec<String> = Vec::new();
        for name in configs.flat_map(serde_json::Map::keys).filter(is_parameter) {
            if !chosen.contains(name) && !others.contains(name) {
                others.push(name.clone());
            }
        }
        table.fixed(LEADING);
        for name in chosen {
            table.parameter(name, format!("/parameters/{name}"));
        }
        table.fixed(TRAILING);
        let scores = table.records.iter().filter_map(|record| record["scores"].as_object());
        let scores: BTreeSet<_> = scores.flat_map(serde_json::Map::keys).cloned().collect();
        for name in scores {
            table.places.push(format!("/scores/{}", name.replace('~', "~0").replace('/', "~1")));
            table.columns.push(Column { name: name.into(), kind: Kind::Number });
        }
        for name in others {
            table.parameter(&name, format!("/config/{name}"));
        }
        table
    }

    fn fixed(&mut self, columns: &'static [(&'static str, &'static str, Kind)]) {
        for (name, place, kind) in columns {
            self.columns.push(Column { name: Cow::Borrowed(name), kind: *kind });
            self.places.push((*place).into());
        }
    }

    /// A parameter's column is of the kind that all its values are of.
    fn parameter(&mut self, name: &str, place: String) {
        let values = self.records.iter().filter_map(|record| record.pointer(&place));
        let kinds = values.filter(|value| !value.is_null()).map(|value| match value {
            Value::Bool(_) => Kind::Flag,
            Value::Number(number) if number.is_f64() => Kind::Number,
            Value::Number(_) => Kind::Whole,
            _ => Kind::Text,
        });
        let kind = kinds.reduce(|a, b| match (a, b) {
            _ if a == b => a,
            (Kind::Whole, Kind::Number) | (Kind::Number, Kind::Whole) => Kind::Number,
            _ => Kind::Text,
        });
        self.columns.push(Column { name: name.to_string().into(), kind: kind.unwrap_or(Kind::Text) });
        self.places.push(place);
    }

    /// The rows, in the order of the trials.
    pub(super) fn rows(&self) -> impl Iterator<Item = Vec<Cell<'_>>> {
        self.records.iter().map(|record| {
            let columns = self.columns.iter().zip(&self.places);
            columns.map(|(column, place)| cell(record.pointer(place), column.kind)).collect()
        })
    }
}

/// What tasks made of a trial, by column: the value under the metric's name, its standard error, and the base's value.
fn scores(trial: &Trial) -> Value {
    let scores = trial.summary.iter().flat_map(|summary| &summary.evaluations);
    let columns = scores.flat_map(|score| {
        let name = score.name();
        [
            (format!("{name}_stderr"), json!(score.stderr)),
            (format!("base_{name}"), json!(score.base_value)),
            (name, json!(score.value)),
        ]
    });
    Value::Object(columns.collect())
}

fn cell(value: Option<&Value>, kind: Kind) -> Cell<'_> {
    let Some(value) = value.filter(|value| !value.is_null()) else { return Cell::None };
    match kind {
        Kind::Whole => value.as_i64().map_or(Cell::None, Cell::Whole),
        Kind::Number => value.as_f64().map_or(Cell::None, Cell::Number),
        Kind::Flag => value.as_bool().map_or(Cell::None, Cell::Flag),
        Kind::Time => value.as_u64().map_or(Cell::None, |ms| Cell::Time(Timestamp(ms))),
        Kind::Text => Cell::Text(value.as_str().map_or_else(|| value.to_string().into(), Cow::Borrowed)),
    }
}

/// The columns of the table of points.
pub(super) fn point_columns() -> Vec<Column> {
    let columns = [
        ("trial", Kind::Text),
        ("attempt", Kind::Whole),
        ("step", Kind::Whole),
        ("time", Kind::Time),
        ("metric", Kind::Text),
        ("value", Kind::Number),
        ("unit", Kind::Text),
    ];
    columns.map(|(name, kind)| Column { name: name.into(), kind }).into()
}

/// The rows of one trial's curve.
pub(super) fn point_rows<'a>(
    trial: &'a Trial,
    points: &'a [MetricPoint],
) -> impl Iterator<Item = Vec<Cell<'a>>> {
    points.iter().flat_map(move |point| {
        let attempt = attempt_of(&trial.attempts, point.step);
        point.values.iter().map(move |(name, value)| {
            let unit = metric::definition(name).map(|metric| Cell::Text(metric.unit.into()));
            vec![
                Cell::Text(trial.id.as_str().into()),
                attempt.map_or(Cell::None, |attempt| Cell::Whole(attempt.0.into())),
                Cell::Whole(i64::try_from(point.step).unwrap_or(i64::MAX)),
                Cell::Time(point.time),
                Cell::Text(name.as_str().into()),
                Cell::Number(*value),
                unit.unwrap_or(Cell::None),
            ]
        })
    })
}

/// The attempt that made a step: the last of those that started before it. Step 0, the base, is measured by an attempt
/// that starts at it.
fn attempt_of(attempts: &[(Attempt, u64)], step: u64) -> Option<Attempt> {
    let made = attempts.iter().filter(|(_, start)| *start < step || (step, *start) == (0, 0));
    made.map(|(attempt, _)| *attempt).max()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::super::tests::{points, trials};
    use super::*;

    #[test]
    fn a_trial_a_row() {
        let mut trials = trials();
        let must_run_on = "V100-16GB";
        trials[2].config.accelerator = Some(must_run_on.into());
        trials[2].parameters.insert(TrialConfig::ACCELERATOR.into(), must_run_on.into());
        let table = Trials::new(&trials);
        let rows: Vec<_> = table.rows().collect();
        assert_eq!(rows.len(), 3);
        let text = |text: &'static str| Cell::Text(text.into());
        for (row, column, kind, want) in [
            (0, "id", Kind::Text, text("tiny-1/1")),
            (0, "lora_rank", Kind::Whole, Cell::Whole(8)),
            (0, "learning_rate", Kind::Number, Cell::Number(0.001)),
            (1, "precision_mode", Kind::Text, text("4bit")),
            (0, "batch_size", Kind::Whole, Cell::Whole(2)),
            (0, "peak_memory_bytes", Kind::Whole, Cell::Whole(5_000)),
            (1, "peak_memory_bytes", Kind::Whole, Cell::None),
            (0, "cost_usd", Kind::Number, Cell::Number(0.25)),
            (0, "simulated", Kind::Flag, Cell::Flag(true)),
            (1, "simulated", Kind::Flag, Cell::Flag(false)),
            (0, "agent", Kind::Text, text("a")),
            (0, "device_id", Kind::Text, text("cuda:1")),
            (0, "accelerator", Kind::Text, text("T4-16GB")),
            // One that waits for what it must run on.
            (2, "accelerator", Kind::Text, text(must_run_on)),
            // Of an earlier version.
            (1, "agent", Kind::Text, text("b")),
            (1, "device_id", Kind::Text, Cell::None),
            (1, "accelerator", Kind::Text, Cell::None),
            (0, "created_at", Kind::Time, Cell::Time(Timestamp(1_000_000))),
            (1, "finished_at", Kind::Time, Cell::None),
            (2, "failure", Kind::Text, text("no, \"really\"\nnot")),
            (0, "spec_digest", Kind::Text, text("sha256:d")),
            (0, "replicate_of", Kind::Text, Cell::None),
        ] {
            let at = table.columns.iter().position(|c| c.name == column).unwrap();
            assert_eq!((table.columns[at].kind, &rows[row][at]), (kind, &want), "{column} of {row}");
        }
        let mut names: Vec<_> = table.columns.iter().map(|column| &column.name).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), table.columns.len(), "a heading is there twice");
        assert!(domain::trial::PARAMETER_NAMES.iter().all(|name| names.iter().any(|have| have == name)));
    }

    #[test]
    fn a_point_a_metric_and_row() {
        let (trials, points) = (trials(), points());
        let rows: Vec<_> = point_rows(&trials[0], &points).collect();
        assert_eq!(rows.len(), points.iter().map(|point| point.values.len()).sum::<usize>());
        let last = rows.last().unwrap();
        assert_eq!(last.len(), point_columns().len());
        assert_eq!(
            last[..4],
            [Cell::Text("tiny-1/1".into()), Cell::Whole(2), Cell::Whole(3), Cell::Time(Timestamp(1_003_000))]
        );
        assert_eq!(last[6], Cell::Text("1".into()));
    }

    #[test]
    fn steps_belong_to_attempts() {
        let attempts = [(Attempt(1), 0), (Attempt(2), 0), (Attempt(3), 10)];
        for (step, want) in [(0, 2), (1, 2), (10, 2), (11, 3), (99, 3)] {
            assert_eq!(attempt_of(&attempts, step), Some(Attempt(want)), "step {step}");
        }
        assert_eq!(attempt_of(&[], 3), None);
    }
}
