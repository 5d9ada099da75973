//! A sweep as Optuna's journal: the JSON lines that its `JournalFileBackend` reads, a line a study, an attribute and a
//! trial. `optuna/storages/journal/_storage.py` defines them.
//!
//! What Optuna has no word for is a user attribute. A value that is no finite number is left out, as JSON has none. Runs of
//! a trial with other seeds are left out too: no sampler proposed them, and Optuna would take each for a trial of its own
//! and a lucky one for the study's best.

mod journal;

use super::mirror::{Curve, Mirror, Picture};
use crate::{Failure, view};
use domain::Timestamp;
use domain::metric::MetricPoint;
use domain::sweep::{Distribution, Goal, SweepSpec};
use domain::trial::{Trial, TrialState};
use journal::{File, Kept};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// `JournalOperation.CREATE_STUDY`, …
const CREATE_STUDY: u8 = 0;
const DELETE_STUDY: u8 = 1;
const SET_STUDY_USER_ATTR: u8 = 2;
const SET_STUDY_SYSTEM_ATTR: u8 = 3;
const CREATE_TRIAL: u8 = 4;
const SET_TRIAL_STATE_VALUES: u8 = 6;
const SET_TRIAL_INTERMEDIATE_VALUE: u8 = 7;
const SET_TRIAL_USER_ATTR: u8 = 8;

/// Who is said to have written the lines: no process of Optuna's.
const WORKER: &str = "lorafleet";

/// The study attribute under which Optuna keeps what the objective is called.
const METRIC_NAMES: &str = "study:metric_names";

/// A sweep's journal.
pub(super) struct Journal(File);

impl Journal {
    /// The journal in a file, which is made if it is not there.
    pub(super) fn new(path: &Path) -> Self {
        Self(File::new(path))
    }
}

impl Mirror for Journal {
    async fn sweep(&mut self, picture: &Picture<'_>) -> Result<(), Failure> {
        let lines = study(picture.document, picture.spec);
        let path = self.0.path().display().to_string();
        self.0.add(|kept| lacking_of_study(kept, lines, &path)).await
    }

    async fn trial(&mut self, picture: &Picture<'_>, of: &Trial, curve: Curve<'_>) -> Result<(), Failure> {
        if of.replicate_of.is_some() {
            return Ok(());
        }
        self.0.add(|kept| Ok(lacking_of_trial(kept, picture.spec, of, curve))).await
    }
}

/// Those of a study's lines that its journal lacks. What it cost, which is never the same for long, is told together with
/// something else.
fn lacking_of_study(kept: &Kept, lines: Vec<Value>, path: &str) -> Result<Vec<Value>, Failure> {
    if kept.is_empty() {
        return Ok(lines);
    }
    let id = &lines[0]["study_name"];
    if kept.study() != id.as_str() {
        return Err(Failure::invalid(format!(
            "--to {path}: its first study is not {id}; name the journal of that sweep, or a file that is not there"
        )));
    }
    let lacks = |line: &Value| {
        let attribute = line["user_attr"].as_object().and_then(|attribute| attribute.iter().next());
        attribute.is_some_and(|(key, value)| kept.study_attribute(key) != Some(value))
    };
    let lacking: Vec<_> = lines.into_iter().filter(lacks).collect();
    let only_cost = lacking.iter().all(|line| line["user_attr"].get("cost_usd").is_some());
    Ok(if only_cost { Vec::new() } else { lacking })
}

/// The lines that a journal lacks of a trial.
fn lacking_of_trial(kept: &Kept, spec: &SweepSpec, of: &Trial, curve: Curve<'_>) -> Vec<Value> {
    let new = reported(spec, curve.points);
    let Some((id, have)) = kept.trial(of.id.as_str()) else { return vec![trial(spec, of, &new)] };
    let before = have["intermediate_values"].as_object().into_iter().flatten();
    let before = before.filter_map(|(step, value)| Some((step.parse().ok()?, value.as_f64()?)));
    let mut values: BTreeMap<u64, f64> = before.filter(|(step, _)| *step < curve.from).collect();
    values.extend(new);
    changes(id, have, &trial(spec, of, &values))
}

/// The lines that make a trial, as a journal has it, into what it is wanted to be. A finished one cannot change any more, and
/// a value that was reported can only be replaced.
fn changes(id: usize, have: &Value, want: &Value) -> Vec<Value> {
    let mut lines = Vec::new();
    if is_finished(have) {
        return lines;
    }
    let line = |op: u8| json!({ "op_code": op, "worker_id": WORKER, "trial_id": id });
    for (step, value) in want["intermediate_values"].as_object().into_iter().flatten() {
        if have["intermediate_values"].get(step) != Some(value) {
            let mut line = line(SET_TRIAL_INTERMEDIATE_VALUE);
            line["step"] = json!(step.parse::<u64>().unwrap_or_default());
            line["intermediate_value"] = value.clone();
            lines.push(line);
        }
    }
    if have["state"] == want["state"] {
        return lines;
    }
    for (key, value) in want["user_attrs"].as_object().into_iter().flatten() {
        if have["user_attrs"].get(key) != Some(value) {
            let mut line = line(SET_TRIAL_USER_ATTR);
            line["user_attr"] = json!({ key: value });
            lines.push(line);
        }
    }
    let mut line = line(SET_TRIAL_STATE_VALUES);
    line["state"] = want["state"].clone();
    line["values"] = want["value"].as_f64().map_or(Value::Null, |value| json!([value]));
    if is_finished(want) {
        line["datetime_complete"] = want.get("datetime_complete").unwrap_or(&want["datetime_start"]).clone();
    } else {
        line["datetime_start"] = want["datetime_start"].clone();
    }
    lines.push(line);
    lines
}

/// Whether Optuna lets nothing more happen to a trial.
fn is_finished(trial: &Value) -> bool {
    trial["state"].as_u64().is_some_and(|state| [COMPLETE, PRUNED, FAIL].map(u64::from).contains(&state))
}

/// The finite values of the sweep's metric by step.
fn reported(spec: &SweepSpec, points: &[MetricPoint]) -> BTreeMap<u64, f64> {
    let value = |point: &MetricPoint| point.get(&spec.search.metric).filter(|value| value.is_finite());
    points.iter().filter_map(|point| Some((point.step, value(point)?))).collect()
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

/// The line that makes a trial as it stands, with the values of the metric by step.
fn trial(spec: &SweepSpec, trial: &Trial, reported: &BTreeMap<u64, f64>) -> Value {
    // Step 0 is the base without an adapter.
    let last = reported.last_key_value().filter(|(step, _)| **step > 0).map(|(_, value)| *value);
    let value = last.or_else(|| trial.recorded(&spec.search.metric).filter(|value| value.is_finite()));
    let state = match trial.state {
        TrialState::Queued => WAITING,
        // Optuna has one moment at which a trial began, which does not change.
        TrialState::Assigned | TrialState::Running if trial.started_at.is_none() => WAITING,
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
        "intermediate_values": Map::from_iter(reported.iter().map(|(step, value)| (step.to_string(), json!(value)))),
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
    use proptest::prelude::*;

    fn take(kept: &mut Kept, lines: &[Value]) {
        lines.iter().for_each(|line| kept.apply(line["op_code"].as_u64().unwrap(), line));
    }

    #[test]
    fn a_study_is_told_again_when_more_than_its_cost_changed() {
        let mut kept = Kept::default();
        let lacking =
            |kept: &Kept, sweep: &Value| lacking_of_study(kept, study(sweep, &spec()), "j").unwrap();
        let first = lacking(&kept, &sweep());
        assert_eq!(first, study(&sweep(), &spec()));
        take(&mut kept, &first);
        let mut later = sweep();
        for (key, value, want) in [
            ("state", json!("running"), &[][..]),
            ("cost_usd", json!(0.75), &[]),
            ("best_trial", json!("tiny-1/1"), &["cost_usd", "best_trial"]),
            ("state", json!("completed"), &["state"]),
        ] {
            later[key] = value;
            let lines = lacking(&kept, &later);
            let keys = lines.iter().map(|line| line["user_attr"].as_object().unwrap().keys().next().unwrap());
            assert_eq!(keys.collect::<Vec<_>>(), want, "{key}");
            take(&mut kept, &lines);
        }
        let other = json!({ "id": "tiny-2", "spec": spec().to_document() });
        let refusal = lacking_of_study(&kept, study(&other, &spec()), "j").unwrap_err();
        assert!(refusal.message().contains("its first study is not \"tiny-2\""), "{refusal:?}");
    }

    #[test]
    fn a_trial_that_begins_anew_ends_with_its_own_last_value() {
        let (mut kept, trials, points) = (Kept::default(), trials(), points());
        take(&mut kept, &study(&sweep(), &spec()));
        let mut running = trials[0].clone();
        (running.state, running.finished_at, running.eval_loss) = (TrialState::Running, None, None);
        let told = |from, points| Curve { from, points };
        let lines = lacking_of_trial(&kept, &spec(), &running, told(0, &points[..]));
        take(&mut kept, &lines);
        // It goes on from step 1, and is stopped before it evaluates.
        let mut stopped = running.clone();
        stopped.state = TrialState::Stopped;
        stopped.finished_at = Some(Timestamp(2_000_000));
        let lines = lacking_of_trial(&kept, &spec(), &stopped, told(2, &[]));
        let end = lines.last().unwrap();
        assert_eq!(
            (&end["op_code"], &end["state"], &end["values"]),
            (&json!(6), &json!(PRUNED), &json!(null))
        );
        take(&mut kept, &lines);
        assert!(
            lacking_of_trial(&kept, &spec(), &running, told(0, &points[..])).is_empty(),
            "it is finished"
        );
    }

    proptest! {
        /// However often it is told, and whether the mirror was started again in between or not.
        #[test]
        fn no_step_is_told_twice(mut cuts in proptest::collection::vec((0..=40_usize, any::<bool>()), 0..6)) {
            let points: Vec<_> = (0..40)
                .map(|step| MetricPoint {
                    step,
                    time: Timestamp(step),
                    values: vec![("eval/loss".into(), 1.0 / (step + 1) as f64)],
                })
                .collect();
            cuts.sort_unstable();
            let mut running = trials().remove(0);
            let ended = running.clone();
            (running.state, running.finished_at) = (TrialState::Running, None);
            let (mut kept, mut next, mut lines) = (Kept::default(), 0, Vec::new());
            take(&mut kept, &study(&sweep(), &spec()));
            let told = cuts.iter().map(|cut| (*cut, &running)).chain([((40, false), &ended); 2]);
            for ((cut, anew), trial) in told {
                let from = if anew { 0 } else { next };
                let curve = Curve { from: from as u64, points: &points[from..cut.max(from)] };
                let new = lacking_of_trial(&kept, &spec(), trial, curve);
                take(&mut kept, &new);
                next = cut.max(from);
                lines.extend(new);
            }
            let mut steps: Vec<u64> = Vec::new();
            for line in &lines {
                steps.extend(line["step"].as_u64());
                let made = line["intermediate_values"].as_object().into_iter().flatten();
                steps.extend(made.map(|(step, _)| step.parse::<u64>().unwrap()));
            }
            steps.sort_unstable();
            prop_assert_eq!(steps, (0..40).collect::<Vec<u64>>());
            let end = lines.last().unwrap();
            prop_assert_eq!(&end["state"], &json!(COMPLETE));
            let value = if cuts.is_empty() { &end["value"] } else { &end["values"][0] };
            prop_assert_eq!(value, &json!(1.0 / 40.0));
        }
    }

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
        let made: Vec<_> =
            trials().iter().map(|t| trial(&spec(), t, &reported(&spec(), &points()))).collect();
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
        let without = trial(&spec(), &trials()[0], &BTreeMap::new());
        assert_eq!((&without["state"], &without["value"]), (&json!(COMPLETE), &json!(1.25)));
        let mut stopped = trials().remove(0);
        (stopped.state, stopped.eval_loss) = (TrialState::Stopped, None);
        let stopped = trial(&spec(), &stopped, &reported(&spec(), &points()[..2]));
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
