//! Records as the page reads them: JSON with the numbers' digits that people can see. It is the page's own form, which
//! changes with it; programs use gRPC, or `-o json`.

use crate::store::TrialRecord;
use domain::metric::MetricPoint;
use domain::trial::{Throughput, Trial};
use domain::{Attempt, TrialId};
use proto::{convert, v1};
use serde::Serialize;
use serde_json::{Map, Number, Value, json};
use std::collections::BTreeMap;

/// Characters of a failure in a table; the trial has all of them.
const FAILURE: usize = 160;

/// A number with six digits: more of it nobody sees, and each costs a byte for each trial.
fn rounded(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() { value } else { format!("{value:.5e}").parse().unwrap_or(value) }
}

fn rounded_value(value: &Value) -> Value {
    match value.as_f64() {
        Some(number) if value.is_f64() => {
            Number::from_f64(rounded(number)).map_or(Value::Null, Value::Number)
        }
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
        "state": word(sweep.state().as_str_name(), "SWEEP_STATE_"),
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
            "resident_base": device.resident_base,
            "simulated_speed": device.simulated_speed,
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

/// A trial in a table. What is not known is left out, and of what stands in a row already the page keeps what is left out.
#[derive(Debug, Serialize)]
pub struct Row {
    n: u32,
    state: &'static str,
    attempt: u32,
    step: u64,
    created_at: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    total_steps: Option<u64>,
    /// By the sweep's metric.
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    eval_loss: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    loss: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cost_usd: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    agent: Option<String>,
    /// The agent's device, while it holds one.
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    accelerator: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    device_memory_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    peak_memory_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tokens_per_second: Option<f64>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    packed: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    simulated: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    adapter: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    started_at: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    finished_at: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    failure: Option<String>,
    parameters: BTreeMap<String, Value>,
}

impl Row {
    /// A trial as it stands.
    pub fn of(trial: &Trial) -> Self {
        let summary = trial.summary.as_ref();
        let device = trial.device.as_ref();
        Self {
            n: trial.id.number().unwrap_or_default(),
            state: trial.state.as_str(),
            attempt: trial.attempt.0,
            step: trial.step,
            created_at: trial.created_at.0,
            total_steps: trial.total_steps,
            value: None,
            eval_loss: trial.eval_loss.map(rounded),
            loss: summary.and_then(|summary| summary.loss).map(rounded),
            cost_usd: trial.cost_usd.map(rounded),
            agent: trial.agent.clone(),
            device: None,
            accelerator: device.map(|device| device.accelerator.clone()),
            device_memory_bytes: device.map(|device| device.memory_bytes),
            peak_memory_bytes: summary.and_then(|summary| summary.peak_memory_bytes),
            tokens_per_second: summary.and_then(|summary| summary.tokens_per_second).map(rounded),
            packed: summary.is_some_and(|summary| summary.throughput == Throughput::Packed),
            simulated: trial.is_simulated(),
            adapter: trial.adapter.is_some(),
            started_at: trial.started_at.map(|time| time.0),
            finished_at: trial.finished_at.map(|time| time.0),
            failure: trial.failure.as_ref().map(|failure| failure.message.chars().take(FAILURE).collect()),
            parameters: trial
                .parameters
                .iter()
                .map(|(name, value)| (name.clone(), rounded_value(value)))
                .collect(),
        }
    }

    /// The same on a device.
    pub fn on(self, device: Option<String>) -> Self {
        Self { device, ..self }
    }

    /// A trial with what only its record tells: where it trains, and how good it is by the sweep's metric.
    pub fn of_record(record: &TrialRecord) -> Self {
        let device = record.placement.as_ref().map(|placement| placement.device.to_string());
        Self { value: record.value.map(rounded), ..Self::of(&record.trial) }.on(device)
    }
}

/// A trial in full: its record, with every parameter that is in force.
pub fn trial(record: &TrialRecord) -> Value {
    let trial = &record.trial;
    let mut value = serde_json::to_value(trial).unwrap_or_default();
    value["config"] = serde_json::to_value(trial.config_in_force()).unwrap_or_default();
    value["simulated"] = json!(trial.is_simulated());
    value["value"] = json!(record.value);
    value["device_id"] = json!(record.placement.as_ref().map(|placement| placement.device.to_string()));
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
        assert_eq!(rounded_value(&json!("all-linear")), json!("all-linear"));
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
