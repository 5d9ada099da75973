//! What came out: a table's rows, and `results.json` in the harness's layout.

use crate::metric::Figure;
use crate::run::Outcome;
use crate::task::{Preset, PresetTask};
use serde_json::{Map, Value, json};

/// The mean of a preset: of each of its tasks the metric that it names. `None` where one of them was not run.
pub fn mean(preset: &Preset, outcomes: &[Outcome]) -> Option<f64> {
    let figure = |entry: &PresetTask| {
        let outcome = outcomes.iter().find(|outcome| outcome.task.task == entry.task)?;
        outcome.figures.iter().find(|figure| figure.measure == entry.metric).map(|figure| figure.value)
    };
    let figures = preset.tasks.iter().map(figure).collect::<Option<Vec<_>>>()?;
    Some(figures.iter().sum::<f64>() / figures.len() as f64)
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
    let means =
        presets.iter().filter_map(|preset| Some((preset.preset.clone(), json!(mean(preset, outcomes)?))));
    let means: Map<_, _> = means.collect();
    if !means.is_empty() {
        document["means"] = means.into();
    }
    document
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
