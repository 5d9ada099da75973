//! A sweep as TensorBoard's event files: a run a trial with its metrics by step and its configuration as text, and what
//! the HParams page needs to compare them.
//!
//! TensorBoard's numbers are float32.

mod events;
mod messages;

use super::Source;
use crate::Failure;
use domain::Timestamp;
use domain::metric::{self, MetricPoint};
use domain::sweep::SweepSpec;
use domain::trial::{Trial, TrialState};
use events::Events;
use messages::{
    Content, DataType, Dim, Event, Experiment, HParamInfo, HParams, HParamsPluginData, Metadata, MetricInfo,
    MetricName, PluginData, SessionEndInfo, SessionStartInfo, Status, Summary, SummaryValue, Tensor,
    TensorShape, What,
};
use prost::Message;
use prost_types::value::Kind;
use serde_json::Value;
use std::collections::{BTreeMap, HashSet};
use std::path::Path;

/// `DataClass`.
const SCALAR: i32 = 1;
const TENSOR: i32 = 2;
/// `DataType` of tensors.
const DT_FLOAT: i32 = 1;
const DT_STRING: i32 = 7;

/// Metrics that the HParams page compares trials by, behind the sweep's own.
const COMPARED: &[&str] = &[
    metric::EVAL_LOSS,
    metric::LOSS,
    metric::PEAK_MEMORY_BYTES,
    metric::SAMPLES_PER_SECOND,
    metric::TOKENS_PER_SECOND,
    metric::COST_USD,
];

/// Writes the log directory, which is there.
pub(super) async fn write(source: &Source<'_>, to: &Path) -> Result<(), Failure> {
    let spec = source.spec()?;
    let types = parameter_types(&source.trials);
    let created = source.trials.first().map_or(0.0, |trial| trial.created_at.as_secs_f64());
    let mut file = Events::create(to, created)?;
    file.push(&experiment(&source.id, &spec, &types, created))?;
    file.close()?;
    for trial in &source.trials {
        let name = format!("trial-{}", trial.id.number().unwrap_or_default());
        run(&to.join(name), trial, &types, &source.points(trial).await?)?;
    }
    Ok(())
}

/// Writes a trial's run.
fn run(
    dir: &Path,
    trial: &Trial,
    types: &BTreeMap<String, DataType>,
    points: &[MetricPoint],
) -> Result<(), Failure> {
    let began = trial.created_at;
    let mut file = Events::create(dir, began.as_secs_f64())?;
    let start = SessionStartInfo {
        hparams: types
            .iter()
            .filter_map(|(name, r#type)| Some((name.clone(), hparam(trial.parameters.get(name)?, *r#type))))
            .collect(),
        group_name: trial.id.to_string(),
        start_time_secs: trial.started_at.unwrap_or(began).as_secs_f64(),
    };
    file.push(&hparams("session_start_info", began, HParams::SessionStartInfo(start)))?;
    file.push(&text("configuration", began, &configuration(trial)?))?;
    let mut described = HashSet::new();
    for point in points {
        let values = point.values.iter().map(|(name, value)| scalar(name, *value, described.insert(name)));
        file.push(&event(point.time, point.step, values.collect()))?;
    }
    let ended = trial.finished_at.or(points.last().map(|point| point.time)).unwrap_or(began);
    if let Some(cost) = trial.cost_usd {
        file.push(&event(ended, trial.step, vec![scalar(metric::COST_USD, cost, true)]))?;
    }
    let scores = trial.summary.iter().flat_map(|summary| &summary.evaluations);
    let scores: Vec<_> = scores.map(|score| scalar(&score.name(), score.value, true)).collect();
    if !scores.is_empty() {
        file.push(&event(ended, trial.step, scores))?;
    }
    let status = match trial.state {
        TrialState::Queued | TrialState::Assigned | TrialState::Running => Status::Running,
        TrialState::Completed | TrialState::Stopped => Status::Success,
        TrialState::Diverged | TrialState::Failed | TrialState::Cancelled => Status::Failure,
    };
    let end = SessionEndInfo { status: status.into(), end_time_secs: ended.as_secs_f64() };
    file.push(&hparams("session_end_info", ended, HParams::SessionEndInfo(end)))?;
    file.close()
}

fn event(time: Timestamp, step: u64, value: Vec<SummaryValue>) -> Event {
    Event {
        wall_time: time.as_secs_f64(),
        step: i64::try_from(step).unwrap_or(i64::MAX),
        what: Some(What::Summary(Summary { value })),
    }
}

/// A metric's value; the first of a run says what the metric means.
fn scalar(name: &str, value: f64, described: bool) -> SummaryValue {
    let metadata = described.then(|| Metadata {
        plugin_data: Some(PluginData { plugin_name: "scalars".into(), content: Vec::new() }),
        summary_description: meaning(name),
        data_class: SCALAR,
    });
    SummaryValue { tag: name.into(), metadata, content: Some(Content::SimpleValue(value as f32)) }
}

fn meaning(name: &str) -> String {
    match metric::definition(name) {
        Some(metric) if metric.unit != "1" => format!("{} Unit: {}.", metric.meaning, metric.unit),
        Some(metric) => metric.meaning.into(),
        None => String::new(),
    }
}

/// A text, in Markdown.
fn text(tag: &str, time: Timestamp, markdown: &str) -> Event {
    let metadata = Metadata {
        plugin_data: Some(PluginData { plugin_name: "text".into(), content: Vec::new() }),
        summary_description: String::new(),
        data_class: TENSOR,
    };
    let tensor = Tensor {
        dtype: DT_STRING,
        tensor_shape: Some(TensorShape { dim: vec![Dim { size: 1 }] }),
        string_val: vec![markdown.as_bytes().to_vec()],
        ..Tensor::default()
    };
    let content = Some(Content::Tensor(tensor));
    event(time, 0, vec![SummaryValue { tag: tag.into(), metadata: Some(metadata), content }])
}

/// A trial's parameters in force, and how it ended, as a table.
fn configuration(trial: &Trial) -> Result<String, Failure> {
    let config = serde_json::to_value(trial.config_in_force()).map_err(Failure::failed)?;
    let cell = |text: String| text.replace('|', "\\|").replace('\n', " ");
    let simulated = if trial.is_simulated() { " (simulated: nothing was trained)" } else { "" };
    let failure = trial.failure.as_ref().map_or(String::new(), |failure| format!(": {}", failure.message));
    let mut markdown = format!(
        "{}, {}{simulated}{}\n\n| parameter | value |\n|---|---|\n",
        trial.id,
        trial.state,
        cell(failure)
    );
    for (name, value) in config.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null()) {
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_string);
        markdown += &format!("| {name} | {} |\n", cell(value));
    }
    Ok(markdown)
}

/// What the HParams plugin reads, in the form that it wants: the metadata of a value that says nothing.
fn hparams(what: &str, time: Timestamp, data: HParams) -> Event {
    let content = HParamsPluginData { data: Some(data) }.encode_to_vec();
    let metadata = Metadata {
        plugin_data: Some(PluginData { plugin_name: "hparams".into(), content }),
        summary_description: String::new(),
        data_class: TENSOR,
    };
    let nothing = Tensor {
        dtype: DT_FLOAT,
        tensor_shape: Some(TensorShape::default()),
        float_val: vec![0.0],
        ..Tensor::default()
    };
    let value = SummaryValue {
        tag: format!("_hparams_/{what}"),
        metadata: Some(metadata),
        content: Some(Content::Tensor(nothing)),
    };
    event(time, 0, vec![value])
}

/// Which parameters are compared, and by which metrics.
fn experiment(id: &str, spec: &SweepSpec, types: &BTreeMap<String, DataType>, created: f64) -> Event {
    let own = [spec.search.metric.as_str()];
    let others = COMPARED.iter().copied().filter(|name| *name != spec.search.metric);
    let metric =
        |name: &str| MetricInfo { name: Some(MetricName { tag: name.into() }), description: meaning(name) };
    let experiment = Experiment {
        name: id.into(),
        description: format!("LoraFleet sweep {}", spec.name),
        time_created_secs: created,
        hparam_infos: types
            .iter()
            .map(|(name, r#type)| HParamInfo { name: name.clone(), r#type: (*r#type).into() })
            .collect(),
        metric_infos: own.into_iter().chain(others).map(metric).collect(),
    };
    hparams("experiment", Timestamp((created * 1e3) as u64), HParams::Experiment(experiment))
}

/// The parameters that the search chose, each with the type that all its values have.
fn parameter_types(trials: &[Trial]) -> BTreeMap<String, DataType> {
    let mut types = BTreeMap::new();
    for (name, value) in trials.iter().flat_map(|trial| &trial.parameters) {
        let of = match value {
            Value::Bool(_) => DataType::Bool,
            Value::Number(_) => DataType::Float64,
            _ => DataType::String,
        };
        let known = types.entry(name.clone()).or_insert(of);
        if *known != of {
            *known = DataType::String;
        }
    }
    types
}

fn hparam(value: &Value, r#type: DataType) -> prost_types::Value {
    let kind = match (r#type, value) {
        (DataType::Bool, Value::Bool(value)) => Kind::BoolValue(*value),
        (DataType::Float64, Value::Number(value)) => Kind::NumberValue(value.as_f64().unwrap_or(f64::NAN)),
        (_, Value::String(text)) => Kind::StringValue(text.clone()),
        (_, other) => Kind::StringValue(other.to_string()),
    };
    prost_types::Value { kind: Some(kind) }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]
mod tests {
    use super::super::tests::{points, spec, trials};
    use super::*;

    fn values(event: &Event) -> &[SummaryValue] {
        match &event.what {
            Some(What::Summary(summary)) => &summary.value,
            other => panic!("{other:?}"),
        }
    }

    fn data(event: &Event) -> HParams {
        let metadata = values(event)[0].metadata.clone().unwrap();
        let plugin = metadata.plugin_data.unwrap();
        assert_eq!(plugin.plugin_name, "hparams");
        HParamsPluginData::decode(plugin.content.as_slice()).unwrap().data.unwrap()
    }

    fn events_of(trial: &Trial, points: &[MetricPoint]) -> Vec<Event> {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        super::run(&run, trial, &parameter_types(&trials()), points).unwrap();
        let file = std::fs::read_dir(&run).unwrap().next().unwrap().unwrap();
        events::tests::read(&file.path())
    }

    #[test]
    fn a_run_has_its_metrics_configuration_and_session() {
        let (trials, points) = (trials(), points());
        let events = events_of(&trials[0], &points);
        let HParams::SessionStartInfo(start) = data(&events[1]) else { panic!("{:?}", events[1]) };
        assert_eq!(start.hparams["lora_rank"].kind, Some(Kind::NumberValue(8.0)));
        assert_eq!(start.hparams["precision_mode"].kind, Some(Kind::StringValue("float16".into())));
        assert_eq!(
            start.hparams["target_modules"].kind,
            Some(Kind::StringValue("[\"q_proj\",\"v_proj\"]".into()))
        );
        let Some(Content::Tensor(tensor)) = &values(&events[2])[0].content else { panic!("{:?}", events[2]) };
        let text = String::from_utf8(tensor.string_val[0].clone()).unwrap();
        assert!(
            text.contains("| lora_rank | 8 |") && text.starts_with("tiny-1/1, completed (simulated"),
            "{text}"
        );
        for (event, point) in events[3..].iter().zip(&points) {
            assert_eq!((event.step, event.wall_time), (point.step as i64, point.time.as_secs_f64()));
            for (value, (name, want)) in values(event).iter().zip(&point.values) {
                assert_eq!(&value.tag, name);
                let Some(Content::SimpleValue(got)) = value.content else { panic!("{value:?}") };
                // NaN is NaN.
                assert_eq!(got.to_bits(), (*want as f32).to_bits());
            }
        }
        // A metric is described once.
        let described = |name: &str| {
            let values = events[3..].iter().flat_map(values).filter(|value| value.tag == name);
            values.map(|value| value.metadata.is_some()).collect::<Vec<_>>()
        };
        assert_eq!(described("eval/loss"), [true, false, false]);
        assert_eq!(described("cost_usd"), [true]);
        let HParams::SessionEndInfo(end) = data(events.last().unwrap()) else { panic!() };
        assert_eq!((end.status(), end.end_time_secs), (Status::Success, 1003.5));
    }

    #[test]
    fn how_a_session_ended() {
        for (trial, want) in trials().iter().zip([Status::Success, Status::Running, Status::Failure]) {
            let events = events_of(trial, &[]);
            let HParams::SessionEndInfo(end) = data(events.last().unwrap()) else { panic!() };
            assert_eq!(end.status(), want, "{}", trial.id);
        }
    }

    #[test]
    fn an_experiment_names_what_is_compared() {
        let types = parameter_types(&trials());
        assert_eq!(types["learning_rate"], DataType::Float64);
        assert_eq!(types["target_modules"], DataType::String);
        let HParams::Experiment(experiment) = data(&experiment("tiny-1", &spec(), &types, 1000.0)) else {
            panic!()
        };
        assert_eq!((experiment.name.as_str(), experiment.hparam_infos.len()), ("tiny-1", types.len()));
        let tags: Vec<_> = experiment.metric_infos.iter().map(|m| m.name.clone().unwrap().tag).collect();
        assert_eq!(tags[..2], ["eval/loss", "loss"]);
        assert_eq!(tags.len(), COMPARED.len());
    }
}
