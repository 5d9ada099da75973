//! Records as the page reads them: JSON with the numbers' digits that people can see. It is the page's own form, which
//! changes with it; programs use gRPC, or `-o json`.

use crate::actors::sweep::View;
use crate::store::TrialRecord;
use domain::machine::PriceSource;
use domain::metric::MetricPoint;
use domain::trial::{Throughput, Trial};
use domain::{Attempt, DeviceId, Timestamp, TrialId};
use proto::{convert, v1};
use serde::Serialize;
use serde_json::{Map, Number, Value, json};
use std::collections::BTreeMap;

/// Characters of a failure in a table; the trial has all of them.
const FAILURE: usize = 160;

/// A number with six digits, which is as many as people compare trials by.
fn rounded(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() { value } else { format!("{value:.5e}").parse().unwrap_or(value) }
}

/// A number with three digits, which is as many as a table shows. Each one more costs a byte for each trial.
pub fn roughly(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() { value } else { format!("{value:.2e}").parse().unwrap_or(value) }
}

/// A parameter, its fractions with four digits.
fn rounded_value(value: &Value) -> Value {
    match value.as_f64() {
        Some(number) if value.is_f64() => Number::from_f64(format!("{number:.3e}").parse().unwrap_or(number))
            .map_or(Value::Null, Value::Number),
        _ => value.clone(),
    }
}

fn milliseconds(time: Option<prost_types::Timestamp>) -> Option<u64> {
    time.map(|time| convert::from_timestamp(time).0)
}

fn number_of(trial: &str) -> Option<u32> {
    TrialId::new(trial).number()
}

/// A sweep in a list.
pub fn sweep(sweep: &v1::Sweep) -> Value {
    let spec = convert::from_struct(sweep.spec.clone().unwrap_or_default());
    let search = spec.get("search").cloned().unwrap_or_default();
    let word = |name: &str, prefix: &str| name.trim_start_matches(prefix).to_lowercase();
    let count =
        |count: &v1::StateCount| (word(count.state().as_str_name(), "TRIAL_STATE_"), json!(count.trials));
    json!({
        "id": sweep.id,
        "name": sweep.name,
        "namespace": sweep.namespace,
        "waits_for": sweep.waits_for,
        "state": match sweep.spec {
            // It cannot be read, and `failure` says why.
            None => "unreadable".into(),
            Some(_) => word(sweep.state().as_str_name(), "SWEEP_STATE_"),
        },
        "created_at": milliseconds(sweep.created_at),
        "finished_at": milliseconds(sweep.finished_at),
        "max_trials": sweep.max_trials,
        "counts": sweep.counts.iter().map(count).collect::<Map<_, _>>(),
        "best_trial": sweep.best_trial_id.as_deref().and_then(number_of),
        "best_value": sweep.best_value,
        "cost_usd": sweep.cost_usd,
        "failure": sweep.failure,
        "ended_early": sweep.ended_early,
        "metric": search.get("metric"),
        "goal": search.get("goal"),
        "algorithm": search.get("algorithm"),
        "model": spec.get("pretrained_model_id"),
        "accelerators": spec.get("resources").and_then(|resources| resources.get("accelerators")),
        "max_cost_usd": spec.get("budget").and_then(|budget| budget.get("max_cost_usd")),
    })
}

/// A sweep with the document that it follows.
pub fn sweep_in_full(one: v1::Sweep) -> Value {
    let mut value = sweep(&one);
    value["spec"] = Value::Object(convert::from_struct(one.spec.unwrap_or_default()));
    value
}

/// An agent. Its last sign of life is told where it has gone: it would otherwise change all the time.
pub fn agent(agent: &v1::Agent) -> Value {
    let device = |device: &v1::Device| {
        json!({
            "id": device.id,
            "accelerator": device.accelerator,
            "memory_bytes": device.memory_bytes,
            "max_pack_size": device.max_pack_size,
            "price_per_hour": device.price_per_hour,
            "price_from": device.price_from.clone().map(PriceSource::from),
            "resident_base": device.resident_base,
            "simulated_speed": device.simulated_speed,
            "compute_capability": device.compute_capability,
        })
    };
    let labels: BTreeMap<_, _> = agent.labels.iter().collect();
    json!({
        "id": agent.id,
        "version": agent.version,
        "hostname": agent.hostname,
        "devices": agent.devices.iter().map(device).collect::<Vec<_>>(),
        "connected": agent.connected,
        "drained": agent.drained,
        "registered": agent.registered,
        "last_seen": (!agent.connected).then(|| milliseconds(agent.last_seen)).flatten(),
        "labels": labels,
        "trials": agent.trial_ids,
    })
}

/// What a page was told of a sweep's trials: from when on times count, and where they train.
pub struct Table {
    since: Timestamp,
    lanes: Lanes,
}

/// An agent and its device, which is not known of a record of an earlier version.
type Lane = (String, Option<String>);

/// Lanes of the timeline. Each row names its own by a number, which takes a byte where names take twenty.
#[derive(Default)]
struct Lanes {
    numbers: BTreeMap<Lane, usize>,
    list: Vec<Lane>,
    told: usize,
}

impl Lanes {
    fn number(&mut self, agent: &str, device: Option<&DeviceId>) -> usize {
        let lane = (agent.to_string(), device.map(DeviceId::to_string));
        *self.numbers.entry(lane).or_insert_with_key(|lane| {
            self.list.push(lane.clone());
            self.list.len() - 1
        })
    }

    /// That in which a trial trains or trained last.
    fn newest(&mut self, trial: &Trial) -> Option<usize> {
        Some(self.number(trial.agent.as_deref()?, trial.device_id()))
    }
}

/// A lane's number, when training began there in tenths of a second since the sweep was submitted, and for how many of them it
/// went on; nothing of the last while it goes on.
type Stretch = (usize, u64, Option<u64>);

/// A trial in a table. Of what does not stand here, the page keeps what it knew of the same attempt.
#[derive(Debug, Default, Serialize)]
pub struct Row {
    n: u32,
    state: &'static str,
    attempt: u32,
    step: u64,
    total_steps: Option<u64>,
    /// By the sweep's metric.
    value: Option<f64>,
    cost_usd: Option<f64>,
    /// The number of the lane in which it trains or trained last.
    lane: Option<usize>,
    accelerator: Option<String>,
    device_memory_bytes: Option<u64>,
    peak_memory_bytes: Option<u64>,
    /// Whether it shared its device while it was measured; nothing if it did not.
    packed: Option<bool>,
    tokens_per_second: Option<f64>,
    /// When its first step began, in tenths of a second since the sweep was submitted.
    started: Option<u64>,
    /// Tenths of a second from then to its end.
    took: Option<u64>,
    /// Whether nothing was trained; nothing if something was.
    simulated: Option<bool>,
    /// Where and when it trained, unless that is its lane from its first step to its end.
    stretches: Option<Vec<Stretch>>,
    failure: Option<String>,
    /// The trial that it runs again, with another seed.
    replicate_of: Option<u32>,
    parameters: BTreeMap<String, Value>,
}

impl Table {
    /// That of a sweep as it stands, with all of its lanes.
    pub fn of(view: &View) -> Self {
        let mut table = Self { since: view.sweep.created_at, lanes: Lanes::default() };
        for TrialRecord { trial, .. } in &view.trials {
            for stretch in trial.stretches() {
                table.lanes.number(stretch.agent, stretch.device);
            }
            table.lanes.newest(trial);
        }
        table
    }

    /// Those lanes that were not told, if there are some. They stand behind those that were.
    pub fn lanes(&mut self) -> Option<Value> {
        let told = std::mem::replace(&mut self.lanes.told, self.lanes.list.len());
        self.lanes.list.get(told..).filter(|new| !new.is_empty()).map(|new| json!(new))
    }

    /// A trial as it stands, with its value of the sweep's metric.
    pub fn row(&mut self, trial: &Trial, value: Option<f64>) -> Row {
        let since = self.since;
        let summary = trial.summary.as_ref();
        let given = trial.device.as_ref();
        // Beginnings and ends are rounded alike, so that what follows upon another trial does not overlap with it.
        let tenths = |time: Timestamp| ((time.since(since).as_millis() + 50) / 100) as u64;
        let took = |from, to| tenths(to).saturating_sub(tenths(from));
        let stretches = trial.stretches();
        let whole = match stretches.as_slice() {
            [] => trial.started_at.is_none(),
            [one] => (Some(one.from), one.to) == (trial.started_at, trial.finished_at),
            _ => false,
        };
        let mut stretch = |stretch: &domain::trial::Stretch| {
            let lane = self.lanes.number(stretch.agent, stretch.device);
            (lane, tenths(stretch.from), stretch.to.map(|to| took(stretch.from, to)))
        };
        let stretches = (!whole).then(|| stretches.iter().map(&mut stretch).collect());
        Row {
            n: trial.id.number().unwrap_or_default(),
            state: trial.state.as_str(),
            attempt: trial.attempt.0,
            step: trial.step,
            total_steps: trial.total_steps,
            value: value.map(rounded),
            cost_usd: trial.cost_usd.map(roughly),
            lane: self.lanes.newest(trial),
            accelerator: given.map(|given| given.accelerator.clone()),
            device_memory_bytes: given.map(|given| given.memory_bytes),
            peak_memory_bytes: summary
                .and_then(|summary| summary.peak_memory_bytes)
                .map(|bytes| roughly(bytes as f64) as u64),
            packed: summary
                .filter(|s| s.throughput == Throughput::Packed || s.pack_peak_memory_bytes.is_some())
                .map(|_| true),
            tokens_per_second: summary.and_then(|summary| summary.tokens_per_second).map(roughly),
            started: trial.started_at.map(tenths),
            took: trial.started_at.zip(trial.finished_at).map(|(from, to)| took(from, to)),
            simulated: trial.is_simulated().then_some(true),
            stretches,
            failure: trial.failure.as_ref().map(|failure| failure.message.chars().take(FAILURE).collect()),
            replicate_of: trial.replicate_of.as_ref().and_then(TrialId::number),
            parameters: trial
                .parameters
                .iter()
                .map(|(name, value)| (name.clone(), rounded_value(value)))
                .collect(),
        }
    }
}

/// Rows as columns: names once, and values of a kind beside each other, so that little is left when they are compressed.
pub fn columns(rows: &[Row]) -> Value {
    let mut columns: BTreeMap<String, Vec<Value>> = BTreeMap::new();
    let mut parameters: BTreeMap<&str, Vec<Value>> = BTreeMap::new();
    for (at, row) in rows.iter().enumerate() {
        let fields = serde_json::to_value(row).ok();
        for (name, value) in fields.iter().filter_map(Value::as_object).flatten() {
            if name != "parameters" && !value.is_null() {
                put(columns.entry(name.clone()).or_default(), at, value.clone());
            }
        }
        for (name, value) in &row.parameters {
            put(parameters.entry(name).or_default(), at, value.clone());
        }
    }
    columns
        .values_mut()
        .chain(parameters.values_mut())
        .for_each(|column| column.resize(rows.len(), Value::Null));
    json!({ "rows": rows.len(), "columns": columns, "parameters": parameters })
}

fn put(column: &mut Vec<Value>, at: usize, value: Value) {
    column.resize(at, Value::Null);
    column.push(value);
}

/// A trial in full: its record, with every parameter that is in force.
pub fn trial(record: &TrialRecord) -> Value {
    let trial = &record.trial;
    let mut value = serde_json::to_value(trial).unwrap_or_default();
    value["config"] = serde_json::to_value(trial.config_in_force()).unwrap_or_default();
    value["simulated"] = json!(trial.is_simulated());
    value["value"] = json!(record.value);
    // A record of an earlier version says it only while the trial holds its device.
    let placed = record.placement.as_ref().map(|placement| &placement.device);
    value["device_id"] = json!(trial.device_id().or(placed));
    value["checkpoint_step"] = json!(record.checkpoint.as_ref().map(|checkpoint| checkpoint.step));
    value
}

/// A running trial's newest numbers.
pub fn point(trial: &TrialId, attempt: Attempt, point: &MetricPoint) -> Value {
    let values: Map<_, _> =
        point.values.iter().map(|(name, value)| (name.to_string(), json!(rounded(*value)))).collect();
    json!({ "n": trial.number(), "attempt": attempt.0, "step": point.step, "values": values })
}

/// A curve: for each metric a column beside that of the steps, with nothing where it was not measured.
pub fn curve(points: &[v1::MetricPoint]) -> Value {
    let mut columns: BTreeMap<&str, Vec<Option<f64>>> = BTreeMap::new();
    for (at, point) in points.iter().enumerate() {
        for value in &point.values {
            let column = columns.entry(&value.name).or_default();
            column.resize(at, None);
            column.push(Some(rounded(value.value)));
        }
    }
    columns.values_mut().for_each(|column| column.resize(points.len(), None));
    let steps: Vec<_> = points.iter().map(|point| point.step).collect();
    json!({ "step": steps, "values": columns })
}

/// Something that happened to a trial.
pub fn entry(entry: &v1::GetTrialLogResponse) -> Value {
    json!({
        "time": milliseconds(entry.time),
        "event": entry.event,
        "attempt": entry.attempt,
        "step": entry.step,
        "message": entry.message,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Placement;
    use domain::AgentId;
    use domain::trial::{TrialConfig, TrialPlacement};

    #[test]
    fn numbers_have_the_digits_that_people_see() {
        for (value, want) in [
            (0.0, 0.0),
            (1.0, 1.0),
            (0.000_123_456_789, 0.000_123_457),
            (-12_345_678.9, -12_345_700.0),
            (f64::INFINITY, f64::INFINITY),
        ] {
            assert_eq!(rounded(value), want, "{value}");
        }
        assert!(rounded(f64::NAN).is_nan());
        assert_eq!(rounded_value(&json!(1_234_567)), json!(1_234_567), "whole numbers stay as they are");
        assert_eq!(rounded_value(&json!(0.000_123_456)), json!(0.000_123_5));
        assert_eq!(rounded_value(&json!("all-linear")), json!("all-linear"));
    }

    #[test]
    fn rows_are_sent_as_columns() {
        let row = |n, value, parameters: Value| Row {
            n,
            state: "queued",
            value,
            parameters: serde_json::from_value(parameters).unwrap(),
            ..Row::default()
        };
        let rows = [
            row(1, None, json!({ "a": 1 })),
            row(2, Some(0.5), json!({ "b": "x" })),
            row(3, None, json!({})),
        ];
        let value = columns(&rows);
        assert_eq!(value["rows"], json!(3));
        assert_eq!(value["columns"]["n"], json!([1, 2, 3]));
        assert_eq!(value["columns"]["value"], json!([null, 0.5, null]));
        assert_eq!(value["columns"].get("cost_usd"), None, "nothing is said of what no row has");
        assert_eq!(value["parameters"], json!({ "a": [1, null, null], "b": [null, "x", null] }));
    }

    /// A row names its lane by a number; where it trained is told beside it if that is more than its first step and its end.
    #[test]
    fn rows_name_lanes() {
        let placed = |attempt, device: &str, from: Option<u64>, to: Option<u64>| TrialPlacement {
            started_at: from.map(Timestamp),
            ended_at: to.map(Timestamp),
            ..TrialPlacement::new(Attempt(attempt), AgentId::new("a"), DeviceId::new(device))
        };
        let mut table = Table { since: Timestamp(1_000), lanes: Lanes::default() };
        for (what, agent, placements, times, lane, stretches) in [
            ("it waits", None, vec![], (None, None), json!(null), json!(null)),
            ("of an earlier version", Some("a"), vec![], (Some(2_000), Some(4_500)), json!(0), json!(null)),
            (
                "it trained in one place",
                Some("a"),
                vec![placed(1, "cuda:1", Some(2_000), Some(4_500))],
                (Some(2_000), Some(4_500)),
                json!(1),
                json!(null),
            ),
            (
                "it trains",
                Some("a"),
                vec![placed(1, "cuda:1", Some(2_000), None)],
                (Some(2_000), None),
                json!(1),
                json!(null),
            ),
            (
                "it moved",
                Some("a"),
                vec![placed(1, "cuda:1", Some(2_000), Some(3_000)), placed(2, "cuda:0", Some(5_000), None)],
                (Some(2_000), None),
                json!(2),
                json!([[1, 10, 10], [2, 40, null]]),
            ),
            (
                "it waits again",
                Some("a"),
                vec![placed(1, "cuda:1", Some(2_000), Some(3_000))],
                (Some(2_000), None),
                json!(1),
                json!([[1, 10, 10]]),
            ),
            (
                "its second attempt, the first of this version, has not begun",
                Some("a"),
                vec![placed(2, "cuda:0", None, None)],
                (Some(2_000), None),
                json!(2),
                json!([]),
            ),
        ] {
            let id = TrialId::of(&domain::SweepId::new("s"), 1);
            let mut trial = Trial::new(id, TrialConfig::default(), BTreeMap::new(), Timestamp(0));
            (trial.agent, trial.placements) = (agent.map(String::from), placements);
            (trial.started_at, trial.finished_at) = (times.0.map(Timestamp), times.1.map(Timestamp));
            let row = serde_json::to_value(table.row(&trial, Some(1.5))).unwrap();
            assert_eq!((&row["lane"], &row["stretches"]), (&lane, &stretches), "{what}");
            assert_eq!((&row["value"], &row["n"]), (&json!(1.5), &json!(1)), "{what}");
        }
        assert_eq!(table.lanes(), Some(json!([["a", null], ["a", "cuda:1"], ["a", "cuda:0"]])));
        assert_eq!(table.lanes(), None, "they are told once");
        table.lanes.number("b", None);
        assert_eq!(table.lanes(), Some(json!([["b", null]])), "what is new is told alone");
    }

    /// One ends in the millisecond in which the next begins, whatever that is rounded to.
    #[test]
    fn trials_one_after_the_other_do_not_overlap() {
        let mut table = Table { since: Timestamp(7), lanes: Lanes::default() };
        let mut shown = |from: u64, to: u64| {
            let id = TrialId::of(&domain::SweepId::new("s"), 1);
            let mut trial = Trial::new(id, TrialConfig::default(), BTreeMap::new(), Timestamp(0));
            (trial.started_at, trial.finished_at) = (Some(Timestamp(from)), Some(Timestamp(to)));
            let row = table.row(&trial, None);
            (row.started.unwrap(), row.started.unwrap() + row.took.unwrap())
        };
        let mut from = 7;
        for length in (0..2_000).map(|n: u64| (n * 7_919) % 1_777) {
            let (middle, to) = (from + length, from + 2 * length + 3);
            let (first, second) = (shown(from, middle), shown(middle, to));
            assert_eq!(first.1, second.0, "from {from} by {middle} to {to}");
            assert!(first.1.abs_diff((middle - 7) / 100) <= 1 && second.0 <= second.1, "{middle}");
            from = middle + 1;
        }
    }

    #[test]
    fn a_trial_is_on_the_device_of_its_newest_attempt() {
        let id = TrialId::of(&domain::SweepId::new("s"), 1);
        let mut record = TrialRecord::new(id, TrialConfig::default(), BTreeMap::new(), Timestamp(0));
        assert_eq!(trial(&record)["device_id"], json!(null), "it waits");
        let (agent, device) = (AgentId::new("a"), DeviceId::new("cuda:1"));
        record.placement =
            Some(Placement { agent: agent.clone(), device, price_per_hour: 1.0, is: None, before_usd: None });
        assert_eq!(trial(&record)["device_id"], json!("cuda:1"), "an earlier version placed it");
        record.trial.placements = vec![TrialPlacement::new(Attempt(2), agent, DeviceId::new("cuda:0"))];
        assert_eq!(trial(&record)["device_id"], json!("cuda:0"));
    }

    #[test]
    fn a_curve_has_as_many_values_as_steps() {
        let point = |step, values: &[(&str, f64)]| v1::MetricPoint {
            step,
            time: None,
            values: values
                .iter()
                .map(|(name, value)| v1::MetricValue { name: (*name).into(), value: *value })
                .collect(),
        };
        let points = [
            point(0, &[("eval/loss", 3.0)]),
            point(1, &[("loss", 2.0)]),
            point(2, &[("loss", f64::NAN), ("eval/loss", 1.5)]),
            point(3, &[]),
        ];
        let want = json!({
            "step": [0, 1, 2, 3],
            "values": { "eval/loss": [3.0, null, 1.5, null], "loss": [null, 2.0, null, null] },
        });
        assert_eq!(curve(&points), want);
        assert_eq!(curve(&[]), json!({ "step": [], "values": {} }));
    }
}
