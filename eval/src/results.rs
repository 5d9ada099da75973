//! What came out: a table's rows, and `results.json` in the harness's layout.

use crate::metric::Figure;
use crate::run::Outcome;
use crate::task::{Preset, PresetTask};
use serde_json::{Map, Value, json};

/// The mean of a preset.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mean {
    /// Of each of its tasks the metric that it names.
    pub value: f64,
    /// The standard error, where all of them have one.
    pub stderr: Option<f64>,
    /// Documents of all of them.
    pub documents: u64,
}

/// The mean of a preset. `None` where one of its tasks was not run.
pub fn mean(preset: &Preset, outcomes: &[Outcome]) -> Option<Mean> {
    let figure = |entry: &PresetTask| {
        let outcome = outcomes.iter().find(|outcome| outcome.task.task == entry.task)?;
        let figure = outcome.figures.iter().find(|figure| figure.measure == entry.metric)?;
        Some((figure.value, figure.stderr, outcome.samples.len() as u64))
    };
    let figures = preset.tasks.iter().map(figure).collect::<Option<Vec<_>>>()?;
    let values: Vec<_> = figures.iter().map(|(value, _, documents)| (*value, *documents)).collect();
    let errors: Option<Vec<_>> =
        figures.iter().map(|(_, error, documents)| Some(((*error)?, *documents))).collect();
    Some(Mean {
        value: preset.mean(&values),
        stderr: errors.and_then(|errors| preset.stderr(&errors)),
        documents: values.iter().map(|(_, documents)| documents).sum(),
    })
}

/// The document that the harness calls `results_….json`: `results` by task with `metric,filter` and
/// `metric_stderr,filter`, and what they were made with. `settings` becomes its `config`.
pub fn document(outcomes: &[Outcome], presets: &[Preset], settings: Value) -> Value {
    let by_task = |value: &dyn Fn(&Outcome) -> Value| -> Value {
        outcomes
            .iter()
            .map(|outcome| (outcome.task.task.clone(), value(outcome)))
            .collect::<Map<_, _>>()
            .into()
    };
    let mut document = json!({
        "results": by_task(&results),
        "group_subtasks": by_task(&|_| json!([])),
        "configs": by_task(&|outcome| {
            let mut config = json!(outcome.task);
            config["num_fewshot"] = outcome.num_fewshot.into();
            config
        }),
        "versions": by_task(&|outcome| json!(outcome.task.version)),
        "n-shot": by_task(&|outcome| json!(outcome.num_fewshot)),
        "higher_is_better": by_task(&|outcome| {
            let metrics = outcome.task.metrics.iter();
            metrics.map(|m| (m.metric.to_string(), json!(m.metric.higher_is_better()))).collect::<Map<_, _>>().into()
        }),
        "n-samples": by_task(&|outcome| {
            json!({ "original": outcome.documents, "effective": outcome.samples.len() })
        }),
        "config": settings,
    });
    let mut means = Map::new();
    for preset in presets {
        let Some(mean) = mean(preset, outcomes) else { continue };
        means.insert(preset.preset.clone(), json!(mean.value));
        if let Some(group) = group(preset, &mean) {
            document["results"][&preset.preset] = group.clone();
            document["groups"][&preset.preset] = group;
            let tasks: Vec<_> = preset.tasks.iter().map(|entry| &entry.task).collect();
            document["group_subtasks"][&preset.preset] = json!(tasks);
        }
    }
    if !means.is_empty() {
        document["means"] = means.into();
    }
    document
}

/// A preset as the harness tells of a group: one metric of all its tasks.
fn group(preset: &Preset, mean: &Mean) -> Option<Value> {
    let (first, others) = preset.tasks.split_first()?;
    if others.iter().any(|entry| entry.metric != first.metric) {
        return None;
    }
    Some(json!({
        "alias": preset.preset,
        "sample_len": mean.documents,
        first.metric.key(""): mean.value,
        first.metric.key("_stderr"): mean.stderr.map_or_else(|| json!("N/A"), |stderr| json!(stderr)),
    }))
}

fn results(outcome: &Outcome) -> Value {
    let mut results = Map::new();
    results.insert("alias".into(), outcome.task.task.clone().into());
    results.insert("sample_len".into(), outcome.samples.len().into());
    for Figure { measure, value, stderr } in &outcome.figures {
        results.insert(measure.key(""), json!(value));
        // The harness's word for what has none.
        results.insert(measure.key("_stderr"), stderr.map_or_else(|| json!("N/A"), |s| json!(s)));
    }
    results.into()
}
