//! Records as commands print them: the documents of `-o json` and the tables for people.

use crate::Failure;
use crate::output::{self, NONE, or_none};
use domain::trial::{TaskScore, Trial};
use domain::{Timestamp, TrialId};
use proto::v1;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// A time in RFC 3339, UTC, to the second.
pub(crate) fn time(time: Timestamp) -> String {
    chrono::DateTime::from_timestamp_millis(time.0 as i64)
        .map_or_else(|| NONE.to_string(), |t| t.format("%Y-%m-%dT%H:%M:%SZ").to_string())
}

pub(crate) fn wire_time(t: Option<prost_types::Timestamp>) -> Value {
    t.map_or(Value::Null, |t| json!(time(proto::convert::from_timestamp(t))))
}

/// A sweep's state as a word: `running`, `completed`, …; `unreadable`, if its server cannot read it.
pub(crate) fn sweep_state(sweep: &v1::Sweep) -> String {
    if sweep.spec.is_none() && sweep.failure.is_some() {
        return "unreadable".into();
    }
    sweep.state().as_str_name().trim_start_matches("SWEEP_STATE_").to_lowercase()
}

fn trial_state(state: i32) -> String {
    let state = v1::TrialState::try_from(state).unwrap_or_default();
    state.as_str_name().trim_start_matches("TRIAL_STATE_").to_lowercase()
}

/// A sweep's document.
pub(crate) fn sweep(sweep: &v1::Sweep) -> Value {
    let counts: Map<String, Value> =
        sweep.counts.iter().map(|c| (trial_state(c.state), json!(c.trials))).collect();
    json!({
        "id": sweep.id,
        "name": sweep.name,
        "state": sweep_state(sweep),
        "created_at": wire_time(sweep.created_at),
        "finished_at": wire_time(sweep.finished_at),
        "max_trials": sweep.max_trials,
        "trials": counts,
        "best_trial": sweep.best_trial_id,
        "best_value": sweep.best_value,
        "cost_usd": sweep.cost_usd,
        "failure": sweep.failure,
        "ended_early": sweep.ended_early,
        "namespace": sweep.namespace,
        "waits_for": sweep.waits_for,
        "spec": sweep.spec.clone().map(|s| Value::Object(proto::convert::from_struct(s))),
    })
}

/// A line about what ended a sweep before its search was through; empty if nothing did.
pub(crate) fn ended_early(sweep: &v1::Sweep) -> String {
    let why = sweep.ended_early.as_ref();
    why.map_or_else(String::new, |why| format!("the budget ended {}: {why}\n", sweep.id))
}

/// Sweeps, one a line.
pub(crate) fn sweep_table(sweeps: &[v1::Sweep]) -> String {
    let row = |s: &v1::Sweep| {
        let done: u32 = s.counts.iter().filter(|c| is_over(c.state)).map(|c| c.trials).sum();
        // Further runs of the best trials come on top of the search's.
        let all = s.counts.iter().map(|c| c.trials).sum::<u32>().max(s.max_trials.unwrap_or_default());
        let created = s.created_at.map(|t| time(proto::convert::from_timestamp(t)));
        vec![
            s.id.clone(),
            sweep_state(s),
            format!("{done}/{all}"),
            output::loss(s.best_value),
            or_none(s.best_trial_id.as_ref()),
            output::dollars(s.cost_usd),
            or_none(created),
        ]
    };
    let rows: Vec<_> = sweeps.iter().map(row).collect();
    let headings = ["sweep", "state", "trials over", "best", "best trial", "cost", "created"];
    output::table(&headings, &rows, &["cost", "created", "best trial"])
}

fn is_over(state: i32) -> bool {
    let state = v1::TrialState::try_from(state).unwrap_or_default();
    domain::trial::TrialState::try_from(state).is_ok_and(|s| s.is_terminal())
}

/// A trial from the wire.
pub(crate) fn trial(trial: v1::Trial) -> Result<Trial, Failure> {
    Trial::try_from(trial).map_err(|e| Failure::failed(format!("the server's answer cannot be read: {e}")))
}

/// A trial that came without its configuration, for tables.
pub(crate) fn trial_of_unknown_config(trial: v1::Trial) -> Result<Trial, Failure> {
    proto::convert::trial_of_unknown_config(trial)
        .map_err(|e| Failure::failed(format!("the server's answer cannot be read: {e}")))
}

/// A trial's document: the domain's record, times in RFC 3339.
pub(crate) fn trial_document(trial: &Trial) -> Value {
    let mut value = serde_json::to_value(trial).unwrap_or_default();
    for key in ["created_at", "started_at", "finished_at"] {
        if let Some(ms) = value[key].as_u64() {
            value[key] = json!(time(Timestamp(ms)));
        }
    }
    for placed in value["placements"].as_array_mut().into_iter().flatten() {
        for key in ["started_at", "ended_at"] {
            placed[key] = json!(placed[key].as_u64().map(|ms| time(Timestamp(ms))));
        }
    }
    value["device_id"] = json!(trial.device_id());
    value["simulated"] = json!(trial.is_simulated());
    value["seconds_per_step"] = json!(trial.seconds_per_step());
    for score in trial.summary.iter().flat_map(|summary| &summary.evaluations) {
        value[score.name().replace('/', "_")] = json!(score.value);
    }
    value
}

/// What the search chose for a trial: `learning_rate 0.00037 · lora_rank 8`.
pub(crate) fn parameters(trial: &Trial) -> String {
    let pairs = trial.parameters.iter().map(|(name, value)| format!("{name} {}", output::short(value)));
    pairs.collect::<Vec<_>>().join(" · ")
}

/// What tasks made of a trial and of its base, a metric a line; empty if nothing was asked.
pub(crate) fn evaluations(trial: &Trial) -> String {
    let scores = trial.summary.iter().flat_map(|summary| &summary.evaluations);
    let with_error = |value: f64, stderr: Option<f64>| {
        format!("{value:.4}{}", stderr.map_or_else(String::new, |stderr| format!(" ± {stderr:.4}")))
    };
    let row = |score: &TaskScore| {
        let difference = score.base_value.map(|base| score.value - base);
        vec![
            score.name(),
            score.num_fewshot.to_string(),
            score.documents.to_string(),
            or_none(score.base_value.map(|base| with_error(base, score.base_stderr))),
            with_error(score.value, score.stderr),
            or_none(difference.map(|difference| {
                let stderr =
                    score.difference_stderr.map_or_else(String::new, |stderr| format!(" ± {stderr:.4}"));
                format!("{difference:+.4}{stderr}")
            })),
        ]
    };
    let rows: Vec<_> = scores.map(row).collect();
    if rows.is_empty() {
        let unasked = trial.summary.as_ref().and_then(|summary| summary.unasked.as_ref());
        return unasked.map_or_else(String::new, |why| format!("not asked   {why}\n"));
    }
    let headings = ["metric", "examples", "items", "base", "adapter", "difference (± standard error)"];
    output::table(&headings, &rows, &["examples", "items"]) + "\n"
}

/// Trials, one a line, with the numbers that the published benchmark reports. Parameters that the search
/// chose have a column each.
pub(crate) fn trial_table(trials: &[Trial]) -> String {
    trial_rows_table(trials.iter().map(TrialRow::of).collect())
}

/// The same of rows that were made as trials came.
pub(crate) fn trial_rows_table(rows: Vec<TrialRow>) -> String {
    let mut names: Vec<String> = Vec::new();
    for name in rows.iter().flat_map(|row| row.parameters.keys()) {
        if !names.contains(name) {
            names.push(name.clone());
        }
    }
    let mut headings = vec!["trial", "state", "step"];
    headings.extend(names.iter().map(String::as_str));
    headings.extend([
        "loss",
        "eval/loss",
        "peak memory",
        "trainable",
        "adapter",
        "samples/s",
        "tokens/s",
        "cost",
    ]);
    let rows: Vec<_> = rows.into_iter().map(|row| row.cells(&names)).collect();
    let mut spare =
        vec!["trainable", "adapter", "samples/s", "loss", "peak memory", "tokens/s", "cost", "step"];
    spare.extend(names.iter().rev().map(String::as_str));
    output::table(&headings, &rows, &spare)
}

/// A trial's cells: those before its parameters, they by their names, and those behind.
pub(crate) struct TrialRow {
    before: [String; 3],
    parameters: BTreeMap<String, String>,
    behind: [String; 8],
}

impl TrialRow {
    fn cells(mut self, names: &[String]) -> Vec<String> {
        let parameters = names.iter().map(|name| or_none(self.parameters.remove(name)));
        self.before.into_iter().chain(parameters).chain(self.behind).collect()
    }

    /// A trial's.
    pub(crate) fn of(trial: &Trial) -> Self {
        let summary = trial.summary.as_ref();
        let number = |id: &TrialId| id.number().map_or_else(|| id.to_string(), |n| n.to_string());
        let again = trial.replicate_of.as_ref().map(|of| format!(" ({} again)", number(of)));
        let step = match trial.total_steps {
            Some(total) => format!("{}/{total}", trial.step),
            None => trial.step.to_string(),
        };
        let state = if trial.is_simulated() { " (simulated)" } else { "" };
        let before =
            [number(&trial.id) + &again.unwrap_or_default(), format!("{}{state}", trial.state), step];
        let parameters =
            trial.parameters.iter().map(|(name, value)| (name.clone(), output::short(value))).collect();
        let packed = summary.is_some_and(|s| s.throughput == domain::trial::Throughput::Packed);
        let speed =
            |v: Option<f64>| or_none(v.map(|v| format!("{v:.1}{}", if packed { " packed" } else { "" })));
        let share = |s: &domain::trial::TrialSummary| {
            let percent = 100.0 * s.trainable_parameters as f64 / s.total_parameters.max(1) as f64;
            format!("{} ({percent:.2} %)", s.trainable_parameters)
        };
        let behind = [
            output::loss(summary.and_then(|s| s.loss)),
            output::loss(trial.eval_loss),
            or_none(summary.and_then(|s| s.peak_memory_bytes).map(output::bytes)),
            or_none(summary.map(share)),
            or_none(summary.map(|s| output::bytes(s.adapter_bytes))),
            speed(summary.and_then(|s| s.samples_per_second)),
            speed(summary.and_then(|s| s.tokens_per_second)),
            or_none(trial.cost_usd.map(output::dollars)),
        ];
        Self { before, parameters, behind }
    }
}
