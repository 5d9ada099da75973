//! A trial's run: what it is in MLflow's words, and which calls it lacks, given what the server has.

use super::{SWEEP, TRIAL, text};
use crate::Failure;
use crate::export::mirror::Curve;
use domain::Timestamp;
use domain::metric;
use domain::trial::{Trial, TrialState};
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap, HashSet};

/// What MLflow takes at most (`mlflow/utils/validation.py`): metrics of a batch, its parameters and tags, characters of a key,
/// of a parameter's value and of a tag's.
const METRICS: usize = 1000;
const PARAMS: usize = 100;
const KEY: usize = 250;
const PARAM_VALUE: usize = 6000;
const TAG_VALUE: usize = 8000;

/// A call that tells the server something.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Call {
    /// Below `/api/2.0/mlflow/`.
    pub(super) path: &'static str,
    /// What is sent.
    pub(super) document: Value,
}

/// A run as the server has it.
#[derive(Debug, Default)]
pub(super) struct Run {
    id: String,
    status: String,
    ended: Option<u64>,
    params: HashSet<String>,
    tags: HashMap<String, String>,
    /// The last step of each metric.
    steps: HashMap<String, u64>,
}

/// The call that makes a trial's run. It carries the tags by which the run is found, so that there is none without.
pub(super) fn create(experiment: &str, sweep: &str, trial: &Trial) -> Call {
    let tag = |key: &str, value: &str| json!({ "key": key, "value": value });
    let document = json!({
        "experiment_id": experiment,
        "run_name": format!("trial-{}", trial.id.number().unwrap_or_default()),
        "start_time": trial.started_at.unwrap_or(trial.created_at).0,
        "tags": [tag(TRIAL, trial.id.as_str()), tag(SWEEP, sweep), tag("mlflow.source.name", "lorafleet")],
    });
    Call { path: "runs/create", document }
}

impl Run {
    /// The run of an answer.
    pub(super) fn read(document: &Value) -> Self {
        let (info, data) = (&document["info"], &document["data"]);
        let list = |key: &str| data[key].as_array().into_iter().flatten();
        let pair = |item: &Value| (text(&item["key"]), text(&item["value"]));
        // Without one it is 0, which the wire leaves out.
        let step = |item: &Value| (text(&item["key"]), whole(&item["step"]).unwrap_or_default());
        Self {
            id: text(&info["run_id"]),
            status: text(&info["status"]),
            ended: whole(&info["end_time"]),
            params: list("params").map(|item| text(&item["key"])).collect(),
            tags: list("tags").map(pair).collect(),
            steps: list("metrics").map(step).collect(),
        }
    }

    /// A tag's value.
    pub(super) fn tag(&self, key: &str) -> Option<&str> {
        self.tags.get(key).map(String::as_str)
    }

    /// Takes in what is sent.
    pub(super) fn take(&mut self, call: &Call) {
        let document = &call.document;
        let list = |key: &str| document[key].as_array().into_iter().flatten();
        self.params.extend(list("params").map(|item| text(&item["key"])));
        self.tags.extend(list("tags").map(|item| (text(&item["key"]), text(&item["value"]))));
        self.steps.extend(
            list("metrics").map(|item| (text(&item["key"]), whole(&item["step"]).unwrap_or_default())),
        );
        if let Some(status) = document["status"].as_str() {
            self.status = status.into();
            self.ended = whole(&document["end_time"]).or(self.ended);
        }
    }

    /// The calls that tell what the server lacks of a trial that has begun, in an order in which each may be the last.
    pub(super) fn lacking(&self, trial: &Trial, curve: Curve<'_>) -> Result<Vec<Call>, Failure> {
        let mut calls = Vec::new();
        let mut batches = |key: &str, items: Vec<Value>, most: usize| {
            for batch in items.chunks(most) {
                calls.push(Call {
                    path: "runs/log-batch",
                    document: json!({ "run_id": self.id, key: batch }),
                });
            }
        };
        batches("params", self.lacking_params(trial)?, PARAMS);
        batches("metrics", self.lacking_metrics(trial, curve), METRICS);
        batches("tags", self.lacking_tags(trial), PARAMS);
        let status = status(trial.state);
        let ended = ended(trial);
        if self.status != status || ended.is_some_and(|ended| self.ended != Some(ended)) {
            let mut document = json!({ "run_id": self.id, "status": status });
            if let Some(ended) = ended {
                document["end_time"] = json!(ended);
            }
            calls.push(Call { path: "runs/update", document });
        }
        Ok(calls)
    }

    /// MLflow's parameters never change, and neither do those in force of a trial that has begun.
    fn lacking_params(&self, trial: &Trial) -> Result<Vec<Value>, Failure> {
        let config = serde_json::to_value(trial.config_in_force()).map_err(Failure::failed)?;
        let given = config.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null());
        let lacking = given.filter(|(name, _)| !self.params.contains(*name));
        Ok(lacking
            .map(|(name, value)| json!({ "key": name, "value": cut(&text(value), PARAM_VALUE) }))
            .collect())
    }

    /// The points of each metric behind the last step that the server has. A step that a later attempt made again is there
    /// already, and stays as it was.
    fn lacking_metrics(&self, trial: &Trial, curve: Curve<'_>) -> Vec<Value> {
        let mut lacking = Vec::new();
        let mut add = |name: &str, value: f64, time: Timestamp, step: u64| {
            let key = key(name);
            if self.steps.get(&key).is_none_or(|last| *last < step) {
                let value = number(value);
                lacking.push(json!({ "key": key, "value": value, "timestamp": time.0, "step": step }));
            }
        };
        for point in curve.points {
            point.values.iter().for_each(|(name, value)| add(name, *value, point.time, point.step));
        }
        if let Some(ended) = ended(trial).map(Timestamp) {
            if let Some(cost) = trial.cost_usd {
                add(metric::COST_USD, cost, ended, trial.step);
            }
            for score in trial.summary.iter().flat_map(|summary| &summary.evaluations) {
                add(&score.name(), score.value, ended, trial.step);
            }
        }
        lacking
    }

    fn lacking_tags(&self, trial: &Trial) -> Vec<Value> {
        let tags = tags(trial).into_iter().map(|(key, value)| (key, cut(&value, TAG_VALUE)));
        let lacking = tags.filter(|(key, value)| self.tag(key) != Some(value));
        lacking.map(|(key, value)| json!({ "key": key, "value": value })).collect()
    }
}

/// What MLflow has no other place for, as it is while a trial stays in its state.
fn tags(trial: &Trial) -> BTreeMap<String, String> {
    let over = trial.state.is_terminal();
    let digests = trial.digests.as_ref();
    let all = [
        ("state", Some(trial.state.to_string())),
        ("attempt", Some(trial.attempt.0.to_string())),
        ("simulated", Some(trial.is_simulated().to_string())),
        ("agent", trial.agent.clone()),
        ("accelerator", trial.device.as_ref().map(|device| device.accelerator.clone())),
        (
            "price_from",
            trial.device.as_ref().and_then(|device| Some(device.price_from.as_ref()?.to_string())),
        ),
        ("trace_id", trial.trace_id.clone()),
        ("base_model_digest", digests.map(|digests| digests.base_model.clone())),
        ("dataset_digest", digests.map(|digests| digests.dataset.clone())),
        ("tokenizer_digest", digests.map(|digests| digests.tokenizer.clone())),
        ("spec_digest", digests.map(|digests| digests.spec.clone())),
        (
            "documents_digest",
            digests.map(|digests| digests.documents.clone()).filter(|digest| !digest.is_empty()),
        ),
        ("step", over.then(|| trial.step.to_string())),
        ("cost_usd", trial.cost_usd.filter(|_| over).map(|cost| json!(cost).to_string())),
        ("adapter", trial.adapter.clone().filter(|_| over)),
        ("failure", trial.failure.as_ref().map(|failure| failure.message.clone())),
    ];
    all.into_iter().filter_map(|(key, value)| Some((format!("lorafleet.{key}"), value?))).collect()
}

/// `RunStatus`, as MLflow's own storage for Optuna has it of states that Optuna has too: what a search ended early is `KILLED`.
fn status(state: TrialState) -> &'static str {
    match state {
        TrialState::Queued | TrialState::Assigned => "SCHEDULED",
        TrialState::Running => "RUNNING",
        TrialState::Completed => "FINISHED",
        TrialState::Stopped | TrialState::Cancelled => "KILLED",
        TrialState::Diverged | TrialState::Failed => "FAILED",
    }
}

/// When a trial that is over ended, in milliseconds since the epoch.
fn ended(trial: &Trial) -> Option<u64> {
    let at = trial.finished_at.or(trial.started_at).unwrap_or(trial.created_at);
    trial.state.is_terminal().then_some(at.0)
}

/// A number as JSON of protocol messages has it: those that JSON has not, as texts.
fn number(value: f64) -> Value {
    match value {
        _ if value.is_nan() => json!("NaN"),
        f64::INFINITY => json!("Infinity"),
        f64::NEG_INFINITY => json!("-Infinity"),
        finite => json!(finite),
    }
}

/// A whole number, which JSON of protocol messages may have as a text.
fn whole(value: &Value) -> Option<u64> {
    value.as_u64().or_else(|| value.as_str()?.parse().ok())
}

/// A metric's name in the letters that MLflow lets names have.
fn key(name: &str) -> String {
    let fits = |c: char| c.is_ascii_alphanumeric() || "_-. :/".contains(c);
    name.chars().take(KEY).map(|c| if fits(c) { c } else { '_' }).collect()
}

fn cut(text: &str, most: usize) -> String {
    text.chars().take(most).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use crate::export::tests::{points, trials};
    use domain::metric::MetricPoint;
    use proptest::prelude::*;

    fn run() -> Run {
        Run::read(&json!({ "info": { "run_id": "r", "status": "RUNNING" }, "data": {} }))
    }

    /// The items of the calls under a key.
    fn sent<'a>(calls: &'a [Call], key: &str) -> Vec<&'a Value> {
        calls.iter().flat_map(|call| call.document[key].as_array().into_iter().flatten()).collect()
    }

    fn curve(points: &[MetricPoint]) -> Curve<'_> {
        Curve { from: 0, points }
    }

    #[test]
    fn a_trial_as_a_run() {
        let (trials, points) = (trials(), points());
        let made = create("7", "tiny-1", &trials[0]);
        assert_eq!(made.document["start_time"], 1_001_000);
        assert_eq!(
            (&made.document["run_name"], &made.document["experiment_id"]),
            (&json!("trial-1"), &json!("7"))
        );
        assert_eq!(made.document["tags"][0], json!({ "key": "lorafleet.trial", "value": "tiny-1/1" }));
        let mut run = run();
        let calls = run.lacking(&trials[0], curve(&points)).unwrap();
        let metric = |key: &str, value: Value, step: u64, timestamp: u64| json!({ "key": key, "value": value, "timestamp": timestamp, "step": step });
        let want = [
            metric("eval/loss", json!(2.0), 0, 1_000_000),
            metric("loss", json!(1.75), 1, 1_001_000),
            metric("learning_rate", json!(0.1), 1, 1_001_000),
            metric("loss", json!(1.5), 2, 1_002_000),
            metric("eval/loss", json!(1.5), 2, 1_002_000),
            metric("loss", json!("NaN"), 3, 1_003_000),
            metric("eval/loss", json!(1.25), 3, 1_003_000),
            metric("cost_usd", json!(0.25), 3, 1_003_500),
        ];
        assert!(sent(&calls, "metrics").into_iter().eq(&want), "{calls:#?}");
        for (list, key, value) in [
            ("params", "lora_rank", "8"),
            ("params", "learning_rate", "0.001"),
            ("params", "precision_mode", "float16"),
            ("params", "target_modules", "[\"q_proj\",\"v_proj\"]"),
            ("tags", "lorafleet.state", "completed"),
            ("tags", "lorafleet.cost_usd", "0.25"),
            ("tags", "lorafleet.simulated", "true"),
            ("tags", "lorafleet.base_model_digest", "simulated:a"),
        ] {
            let found = sent(&calls, list).into_iter().find(|item| item["key"] == key);
            assert_eq!(found.map(|item| &item["value"]), Some(&json!(value)), "{key}");
        }
        let last = json!({ "run_id": "r", "status": "FINISHED", "end_time": 1_003_500 });
        assert_eq!(calls.last(), Some(&Call { path: "runs/update", document: last }));
        // Again it lacks nothing.
        calls.iter().for_each(|call| run.take(call));
        assert_eq!(run.lacking(&trials[0], curve(&points)).unwrap(), []);
        // Neither does what the server then answers.
        let answer = json!({
            "info": { "run_id": "r", "status": "FINISHED", "end_time": "1003500" },
            "data": {
                "params": sent(&calls, "params"), "tags": sent(&calls, "tags"),
                // The last of each.
                "metrics": [&want[2], &want[5], &want[6], &want[7]],
            },
        });
        assert_eq!(Run::read(&answer).lacking(&trials[0], curve(&points)).unwrap(), []);
    }

    #[test]
    fn statuses() {
        for (state, want) in [
            (TrialState::Queued, "SCHEDULED"),
            (TrialState::Assigned, "SCHEDULED"),
            (TrialState::Running, "RUNNING"),
            (TrialState::Completed, "FINISHED"),
            (TrialState::Stopped, "KILLED"),
            (TrialState::Cancelled, "KILLED"),
            (TrialState::Diverged, "FAILED"),
            (TrialState::Failed, "FAILED"),
        ] {
            let mut trial = trials().remove(0);
            trial.state = state;
            let mut run = run();
            for call in run.lacking(&trial, curve(&[])).unwrap() {
                run.take(&call);
            }
            let ended = state.is_terminal().then_some(1_003_500);
            assert_eq!((run.status.as_str(), run.ended), (want, ended), "{state}");
        }
    }

    #[test]
    fn numbers_keys_and_values_as_mlflow_takes_them() {
        for (value, want) in [
            (1.5, json!(1.5)),
            (f64::NAN, json!("NaN")),
            (f64::INFINITY, json!("Infinity")),
            (f64::NEG_INFINITY, json!("-Infinity")),
        ] {
            assert_eq!(number(value), want);
        }
        for (name, want) in [
            ("eval/arc_challenge/acc_norm", "eval/arc_challenge/acc_norm"),
            ("eval/gsm8k/exact_match,strict", "eval/gsm8k/exact_match_strict"),
            ("größe", "gr__e"),
        ] {
            assert_eq!(key(name), want);
        }
        assert_eq!(
            (key(&"x".repeat(300)).len(), cut(&"ä".repeat(9000), PARAM_VALUE).chars().count()),
            (250, 6000)
        );
    }

    #[test]
    fn batches_are_as_large_as_mlflow_lets_them_be() {
        let mut trial = trials().remove(0);
        trial.config.target_modules = domain::trial::TargetModules::Names(vec!["q".repeat(9_000)]);
        let point = |step| MetricPoint {
            step,
            time: Timestamp(step),
            values: ["loss", "grad_norm", "tokens"].map(|name| (name.to_string(), 1.0)).into(),
        };
        let points: Vec<_> = (1..=700).map(point).collect();
        let calls = run().lacking(&trial, curve(&points)).unwrap();
        let batches: Vec<_> =
            calls.iter().filter_map(|call| Some(call.document["metrics"].as_array()?.len())).collect();
        // With what it cost.
        assert_eq!(batches, [1000, 1000, 101]);
        for call in &calls {
            let items = ["params", "tags"].map(|key| call.document[key].as_array().map_or(0, Vec::len));
            assert!(items.iter().all(|items| *items <= PARAMS), "{items:?}");
        }
        let values = sent(&calls, "params").into_iter().map(|param| param["value"].as_str().unwrap().len());
        assert_eq!(values.max(), Some(PARAM_VALUE));
    }

    proptest! {
        /// Cut off behind any point that the server stored, by an export or a mirror, at any moment of the trial.
        #[test]
        fn no_point_is_sent_twice(sittings in proptest::collection::vec((0..=30_usize, 0..200_usize), 0..6)) {
            let points: Vec<_> = (0..30)
                .map(|step| MetricPoint {
                    step,
                    time: Timestamp(step),
                    values: vec![("loss".into(), step as f64), ("eval/loss".into(), -(step as f64))],
                })
                .collect();
            let (mut running, ended) = (trials().remove(0), trials().remove(0));
            (running.state, running.finished_at) = (TrialState::Running, None);
            // What the server stored of each metric.
            let mut stored: Vec<(String, u64)> = Vec::new();
            let mut upto = 0;
            let told = sittings.into_iter().map(|(step, most)| (step, most, &running));
            for (step, most, trial) in told.chain([(30, usize::MAX, &ended); 2]) {
                upto = step.max(upto);
                let latest = |key: &str| stored.iter().filter(|(k, _)| k == key).map(|(_, step)| *step).max();
                let metrics = ["loss", "eval/loss", "cost_usd"].iter().filter_map(|key| {
                    Some(json!({ "key": key, "step": latest(key)? }))
                });
                let answer = json!({ "info": {}, "data": { "metrics": metrics.collect::<Vec<_>>() } });
                let calls = Run::read(&answer).lacking(trial, curve(&points[..upto])).unwrap();
                for metric in sent(&calls, "metrics").into_iter().take(most) {
                    stored.push((text(&metric["key"]), metric["step"].as_u64().unwrap()));
                }
            }
            stored.sort();
            let both = (0..30).flat_map(|step| ["loss", "eval/loss"].map(|key| (key.to_string(), step)));
            let mut want: Vec<(String, u64)> = both.chain([("cost_usd".to_string(), ended.step)]).collect();
            want.sort();
            prop_assert_eq!(stored, want);
        }
    }
}
