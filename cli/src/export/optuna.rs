//! A sweep as Optuna's journal: the JSON lines that its `JournalFileBackend` reads, a line a study, an attribute and a
//! trial. `optuna/storages/journal/_storage.py` defines them.
//!
//! What Optuna has no word for is a user attribute. A value that is no finite number is left out, as JSON has none. Runs of
//! a trial with other seeds are left out too: no sampler proposed them, and Optuna would take each for a trial of its own
//! and a lucky one for the study's best.

use super::{Source, place};
use crate::{Failure, view};
use domain::Timestamp;
use domain::metric::MetricPoint;
use domain::sweep::{Distribution, Goal, SweepSpec};
use domain::trial::{Trial, TrialState};
use serde_json::{Map, Value, json};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

/// `JournalOperation.CREATE_STUDY`, …
const CREATE_STUDY: u8 = 0;
const SET_STUDY_USER_ATTR: u8 = 2;
const SET_STUDY_SYSTEM_ATTR: u8 = 3;
const CREATE_TRIAL: u8 = 4;

/// Who is said to have written the lines: no process of Optuna's.
const WORKER: &str = "lorafleet";

/// The study attribute under which Optuna keeps what the objective is called.
const METRIC_NAMES: &str = "study:metric_names";

/// Writes the journal.
pub(super) async fn write(source: &Source<'_>, to: &Path) -> Result<(), Failure> {
    let spec = source.spec()?;
    let mut file = BufWriter::new(File::create(to).map_err(place::at(to))?);
    let mut line = |value: &Value| writeln!(file, "{value}").map_err(place::at(to));
    for entry in study(&source.document, &spec) {
        line(&entry)?;
    }
    for of in source.trials.iter().filter(|trial| trial.replicate_of.is_none()) {
        line(&trial(&spec, of, &source.points(of).await?))?;
    }
    file.flush().map_err(place::at(to))
}

/// The lines that make the study: its id is 0, the first in the file.
fn study(sweep: &Value, spec: &SweepSpec) -> Vec<Value> {
    let direction = match spec.search.goal {
        Goal::Minimize => 1,
        Goal::Maximize => 2,
    };
    let mut lines = vec![json!({
        "op_code": CREATE_STUDY, "worker_id": WORKER, "study_name": sweep["id"], "directions": [direction],
    })];
    lines.push(json!({
        "op_code": SET_STUDY_SYSTEM_ATTR, "worker_id": WORKER, "study_id": 0,
        "system_attr": { METRIC_NAMES: [spec.search.metric] },
    }));
    for key in ["name", "state", "cost_usd", "best_trial", "spec"] {
        lines.push(json!({
            "op_code": SET_STUDY_USER_ATTR, "worker_id": WORKER, "study_id": 0, "user_attr": { key: sweep[key] },
        }));
    }
    lines
}

/// The line that makes a trial as it stands.
fn trial(spec: &SweepSpec, trial: &Trial, points: &[MetricPoint]) -> Value {
    let values = |point: &MetricPoint| point.get(&spec.search.metric).filter(|value| value.is_finite());
    let reported = points.iter().filter_map(|point| Some((point.step.to_string(), json!(values(point)?))));
    // Step 0 is the base without an adapter.
    let last = points.iter().rev().filter(|point| point.step > 0).find_map(values);
    let value = last.or_else(|| trial.recorded(&spec.search.metric).filter(|value| value.is_finite()));
    let state = match trial.state {
        TrialState::Queued => WAITING,
        TrialState::Assigned | TrialState::Running => RUNNING,
        // Optuna's completed trials have a value.
        TrialState::Completed if value.is_some() => COMPLETE,
        TrialState::Stopped => PRUNED,
        TrialState::Completed | TrialState::Diverged | TrialState::Failed | TrialState::Cancelled => FAIL,
    };
    let (mut distributions, mut params) = (Map::new(), Map::new());
    for (name, value) in &trial.parameters {
        let (distribution, internal) = parameter(spec, trial, name, value);
        distributions.insert(name.clone(), Value::String(distribution.to_string()));
        params.insert(name.clone(), json!(internal));
    }
    let mut line = json!({
        "op_code": CREATE_TRIAL,
        "worker_id": WORKER,
        "study_id": 0,
        "state": state,
        "value": value.filter(|_| [COMPLETE, PRUNED].contains(&state)),
        "values": null,
        "datetime_start": trial.started_at.or((state != WAITING).then_some(trial.created_at)).map(time),
        "distributions": distributions,
        "params": params,
        "user_attrs": attributes(trial),
        "system_attrs": {},
        "intermediate_values": Map::from_iter(reported),
    });
    if let Some(finished) = trial.finished_at {
        line["datetime_complete"] = json!(time(finished));
    }
    line
}

/// `optuna.trial.TrialState`.
const RUNNING: u8 = 0;
const COMPLETE: u8 = 1;
const PRUNED: u8 = 2;
const FAIL: u8 = 3;
const WAITING: u8 = 4;

/// A time as Optuna writes it: ISO 8601 with microseconds, UTC.
fn time(time: Timestamp) -> String {
    chrono::DateTime::from_timestamp_millis(time.0 as i64)
        .map_or_else(String::new, |t| t.format("%Y-%m-%dT%H:%M:%S%.6f+00:00").to_string())
}

/// The trial's record, flat: figures of the summary by their own names, digests, the failure.
fn attributes(trial: &Trial) -> Map<String, Value> {
    let document = view::trial_document(trial);
    let mut attributes = Map::new();
    for key in ["id", "state", "attempt", "step", "total_steps", "agent", "adapter", "cost_usd", "simulated"]
    {
        attributes.insert(key.into(), document[key].clone());
    }
    let summary = document["summary"].as_object().into_iter().flatten();
    for (key, value) in summary.filter(|(key, _)| *key != "evaluations") {
        attributes.insert(key.clone(), value.clone());
    }
    for score in trial.summary.iter().flat_map(|summary| &summary.evaluations) {
        attributes.insert(score.name(), json!(score.value));
    }
    for (key, value) in document["digests"].as_object().into_iter().flatten() {
        attributes.insert(format!("{key}_digest"), value.clone());
    }
    attributes.insert("failure".into(), document["failure"]["message"].clone());
    attributes.retain(|_, value| !value.is_null());
    attributes
}

/// A parameter's distribution in Optuna's words, and its value as Optuna keeps it: of a choice, its number.
fn parameter(spec: &SweepSpec, trial: &Trial, name: &str, value: &Value) -> (Value, f64) {
    let config = serde_json::to_value(trial.config_in_force()).unwrap_or_default();
    let holds = |name: &str, wanted: &Value| equal(&config[name], wanted);
    let distribution = spec.distribution(name).and_then(|distribution| distribution.resolve(&holds));
    let number = value.as_f64();
    // Optuna rounds a range's end down to a step and says so each time; here it is rounded already.
    let end = |distribution: &Distribution| {
        let last = distribution.count().and_then(|count| distribution.nth(count - 1));
        last.and_then(|last| last.as_f64())
    };
    match (distribution, number) {
        (Some(d @ Distribution::Uniform { low, high, step }), Some(number)) => {
            (float(*low, end(d).unwrap_or(*high), *step, false), number)
        }
        // Optuna's have no steps.
        (Some(Distribution::LogUniform { low, high, .. }), Some(number)) => {
            (float(*low, *high, None, true), number)
        }
        (Some(d @ Distribution::Integer { low, high, step }), Some(number)) => {
            let high = end(d).map_or(*high, |high| high as i64);
            let attributes = json!({ "log": false, "step": step.unwrap_or(1), "low": low, "high": high });
            (json!({ "name": "IntDistribution", "attributes": attributes }), number)
        }
        (Some(Distribution::Choices(choices)), _) if choices.iter().any(|choice| equal(choice, value)) => {
            let at = choices.iter().position(|choice| equal(choice, value)).unwrap_or_default();
            (categorical(choices), at as f64)
        }
        // A constant, or a value that the space has no more since it was changed.
        _ => (categorical(std::slice::from_ref(value)), 0.0),
    }
}

fn float(low: f64, high: f64, step: Option<f64>, log: bool) -> Value {
    let attributes = json!({ "step": step, "low": low, "high": high, "log": log });
    json!({ "name": "FloatDistribution", "attributes": attributes })
}

/// Choices are scalars in Optuna: lists and mappings are texts of JSON.
fn categorical(choices: &[Value]) -> Value {
    let choice = |choice: &Value| match choice {
        Value::Array(_) | Value::Object(_) => Value::String(choice.to_string()),
        scalar => scalar.clone(),
    };
    let choices: Vec<_> = choices.iter().map(choice).collect();
    json!({ "name": "CategoricalDistribution", "attributes": { "choices": choices } })
}

/// Whether two values are the same; 8 is 8.0.
fn equal(a: &Value, b: &Value) -> bool {
    a == b || a.as_f64().is_some_and(|a| Some(a) == b.as_f64())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]
mod tests {
    use super::super::tests::{points, spec, sweep, trials};
    use super::*;

    #[test]
    fn a_study() {
        let lines = study(&sweep(), &spec());
        assert_eq!(lines[0]["study_name"], "tiny-1");
        assert_eq!(lines[0]["directions"], json!([1]));
        assert_eq!(lines[1]["system_attr"][METRIC_NAMES], json!(["eval/loss"]));
        assert!(lines.iter().skip(1).all(|line| line["study_id"] == 0 && line["worker_id"] == WORKER));
    }

    #[test]
    fn trials_with_their_states() {
        let made: Vec<_> = trials().iter().map(|t| trial(&spec(), t, &points())).collect();
        let first = &made[0];
        assert_eq!((&first["state"], &first["value"]), (&json!(COMPLETE), &json!(1.25)));
        assert_eq!(first["intermediate_values"], json!({ "0": 2.0, "2": 1.5, "3": 1.25 }));
        assert_eq!(first["datetime_start"], "1970-01-01T00:16:41.000000+00:00");
        assert_eq!(first["datetime_complete"], "1970-01-01T00:16:43.500000+00:00");
        let attributes = &first["user_attrs"];
        assert_eq!((&attributes["id"], &attributes["cost_usd"]), (&json!("tiny-1/1"), &json!(0.25)));
        assert_eq!(attributes["peak_memory_bytes"], 5_000);
        assert_eq!(attributes["base_model_digest"], "simulated:a");
        assert_eq!(made[1]["state"], RUNNING);
        assert_eq!((&made[1]["value"], made[1].get("datetime_complete")), (&Value::Null, None));
        assert_eq!(made[2]["state"], FAIL);
        let without = trial(&spec(), &trials()[0], &[]);
        assert_eq!((&without["state"], &without["value"]), (&json!(COMPLETE), &json!(1.25)));
        let mut stopped = trials().remove(0);
        (stopped.state, stopped.eval_loss) = (TrialState::Stopped, None);
        let stopped = trial(&spec(), &stopped, &points()[..2]);
        assert_eq!((&stopped["state"], &stopped["value"]), (&json!(PRUNED), &json!(null)));
    }

    #[test]
    fn distributions_as_optuna_has_them() {
        let trials = trials();
        for (of, name, want, internal) in [
            (0, "lora_rank", json!({"choices": [4, 8]}), 1.0),
            (0, "learning_rate", json!({"step": null, "low": 1e-4, "high": 1e-2, "log": true}), 0.001),
            (0, "lora_dropout", json!({"step": 0.3, "low": 0.0, "high": 0.9, "log": false}), 0.3),
            (0, "batch_size", json!({"log": false, "step": 3, "low": 2, "high": 8}), 2.0),
            (0, "precision_mode", json!({"choices": ["float16", "4bit"]}), 0.0),
            // A condition decides which choices a trial had.
            (0, "max_sequence_length", json!({"choices": [512]}), 0.0),
            (1, "max_sequence_length", json!({"choices": [512, 1024]}), 1.0),
            (0, "target_modules", json!({"choices": ["[\"q_proj\",\"v_proj\"]", "all-linear"]}), 0.0),
            // Not a value of the space any more.
            (2, "lora_rank", json!({"choices": [99]}), 0.0),
        ] {
            let trial = &trials[of];
            let (distribution, got) = parameter(&spec(), trial, name, &trial.parameters[name]);
            assert_eq!((&distribution["attributes"], got), (&want, internal), "{name} of {of}");
        }
    }
}
