//! A trial's run: the events that it lacks, given those that it has.

use super::messages::{
    Content, DataType, Dim, Event, HParams, Metadata, PluginData, SessionEndInfo, SessionLog,
    SessionStartInfo, SessionStatus, Status, SummaryValue, Tensor, TensorShape, What,
};
use super::{TENSOR, event, hparams, meaning};
use crate::Failure;
use crate::export::mirror::Curve;
use domain::Timestamp;
use domain::metric::{self, MetricPoint};
use domain::trial::{TaskScore, Trial, TrialState};
use prost_types::value::Kind;
use serde_json::Value;
use std::collections::{BTreeMap, HashSet};

/// `DataClass`.
const SCALAR: i32 = 1;
/// `DataType` of tensors.
const DT_STRING: i32 = 7;

/// The tag of a trial's parameters.
const CONFIGURATION: &str = "configuration";

/// The tag of what base and adapter say to the sample prompt.
const SAMPLE: &str = "sample";

/// What a run's events amount to.
#[derive(Debug, Default)]
pub(super) struct Run {
    /// Whether a session began: to TensorBoard, the first in a file is no restart.
    session: bool,
    /// Steps of the curve, each with the hour at which it was measured.
    points: Vec<(u64, Timestamp)>,
    /// What was told beside the curve: its first tag, its step, and the hour of which it tells.
    told: HashSet<(String, u64, Timestamp)>,
    /// Metrics that were described.
    described: HashSet<String>,
}

impl Run {
    /// Takes an event in.
    pub(super) fn take(&mut self, event: &Event) {
        let (step, time) = (step_of(event), time_of(event));
        match &event.what {
            Some(What::SessionLog(log)) if log.status() == SessionStatus::Start => {
                if !self.session {
                    self.session = true;
                    return;
                }
                self.points.retain(|(earlier, _)| *earlier < step);
                self.told.retain(|(_, earlier, _)| *earlier < step);
            }
            Some(What::Summary(summary)) => {
                let mut tags = summary.value.iter().map(|value| value.tag.as_str());
                // What a trial comes to at its end is no point of its curve.
                if tags.any(|tag| metric::REPORTED.contains(&tag)) {
                    self.points.push((step, time));
                } else {
                    self.told.extend(name_of(event).map(|tag| (tag.to_string(), step, time)));
                }
                self.described.extend(summary.value.iter().map(|value| value.tag.clone()));
            }
            _ => {}
        }
    }

    /// The events that it lacks of a trial that has begun.
    pub(super) fn lacking(
        &self,
        trial: &Trial,
        types: &BTreeMap<String, DataType>,
        curve: Curve<'_>,
    ) -> Result<Vec<Event>, Failure> {
        let began = trial.created_at;
        let (wrong, new) = news(&self.points, curve);
        // Texts are gone with their steps, which is 0 of most.
        let is_told = |tag: &str, step: u64, time: Timestamp| {
            wrong.is_none_or(|wrong| step < wrong) && self.told.contains(&(tag.to_string(), step, time))
        };
        let mut events = Vec::new();
        if !self.session {
            events.push(session(began, 0));
        }
        if let Some(step) = wrong {
            events.push(session(new.first().map_or(began, |point| point.time), step));
        }
        if !is_told(CONFIGURATION, 0, began) {
            events.push(start(trial, types));
            events.push(text(CONFIGURATION, began, 0, &configuration(trial)?));
        }
        let mut described: HashSet<&str> = self.described.iter().map(String::as_str).collect();
        for point in new {
            let values =
                point.values.iter().map(|(name, value)| scalar(name, *value, described.insert(name)));
            events.push(event(point.time, point.step, values.collect()));
        }
        if trial.state.is_terminal() {
            let last = curve.points.last().map(|point| point.time);
            events.extend(end(trial, trial.finished_at.or(last).unwrap_or(began), &described));
        }
        // One that is tried again ends again, at another hour.
        events
            .retain(|event| !name_of(event).is_some_and(|tag| is_told(tag, step_of(event), time_of(event))));
        Ok(events)
    }
}

/// A session that begins with a step: what was told of it and later ones is gone.
fn session(time: Timestamp, step: u64) -> Event {
    let log = SessionLog { status: SessionStatus::Start.into() };
    Event { what: Some(What::SessionLog(log)), ..event(time, step, Vec::new()) }
}

/// What tells of a trial's beginning.
fn start(trial: &Trial, types: &BTreeMap<String, DataType>) -> Event {
    let chosen =
        |(name, of): (&String, &DataType)| Some((name.clone(), hparam(trial.parameters.get(name)?, *of)));
    let start = SessionStartInfo {
        hparams: types.iter().filter_map(chosen).collect(),
        group_name: trial.id.to_string(),
        start_time_secs: trial.started_at.unwrap_or(trial.created_at).as_secs_f64(),
    };
    hparams("session_start_info", trial.created_at, HParams::SessionStartInfo(start))
}

/// What tells of a trial's end.
fn end(trial: &Trial, ended: Timestamp, described: &HashSet<&str>) -> Vec<Event> {
    let mut events = Vec::new();
    if let Some(cost) = trial.cost_usd {
        let cost = scalar(metric::COST_USD, cost, !described.contains(metric::COST_USD));
        events.push(event(ended, trial.step, vec![cost]));
    }
    let scores = trial.summary.iter().flat_map(|summary| &summary.evaluations);
    let score = |score: &TaskScore| {
        let name = score.name();
        scalar(&name, score.value, !described.contains(name.as_str()))
    };
    let scores: Vec<_> = scores.map(score).collect();
    if !scores.is_empty() {
        events.push(event(ended, trial.step, scores));
    }
    // What was said on the way stays what it was, however often the trial ends.
    let said = trial.summary.iter().flat_map(|summary| {
        let prompt = summary.sample_prompt.as_deref().unwrap_or_default();
        summary.texts().map(move |(step, said)| (step, sample(prompt, said)))
    });
    events.extend(said.map(|(step, sample)| text(SAMPLE, trial.created_at, step, &sample)));
    events.push(text("outcome", ended, 0, &outcome(trial)));
    let status = match trial.state {
        TrialState::Queued | TrialState::Assigned | TrialState::Running => Status::Running,
        TrialState::Completed | TrialState::Stopped => Status::Success,
        TrialState::Diverged | TrialState::Failed | TrialState::Cancelled => Status::Failure,
    };
    let end = SessionEndInfo { status: status.into(), end_time_secs: ended.as_secs_f64() };
    events.push(hparams("session_end_info", ended, HParams::SessionEndInfo(end)));
    events
}

/// The first tag of what an event tells beside the curve.
fn name_of(event: &Event) -> Option<&str> {
    let Some(What::Summary(summary)) = &event.what else { return None };
    let tag = summary.value.first()?.tag.as_str();
    Some(tag).filter(|tag| !metric::REPORTED.contains(tag))
}

fn step_of(event: &Event) -> u64 {
    u64::try_from(event.step).unwrap_or_default()
}

fn time_of(event: &Event) -> Timestamp {
    Timestamp((event.wall_time * 1e3).round() as u64)
}

/// The points of a curve that a run lacks, and the step from which on what it has was made anew since. Points are the same
/// if they were measured at the same time.
fn news<'a>(has: &[(u64, Timestamp)], curve: Curve<'a>) -> (Option<u64>, &'a [MetricPoint]) {
    let has = &has[has.partition_point(|(step, _)| *step < curve.from)..];
    let same =
        has.iter().zip(curve.points).take_while(|(has, point)| **has == (point.step, point.time)).count();
    let new = &curve.points[same..];
    let wrong = has.get(same).map(|(step, _)| new.first().map_or(*step, |first| first.step.min(*step)));
    (wrong, new)
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

/// A text, in Markdown.
fn text(tag: &str, time: Timestamp, step: u64, markdown: &str) -> Event {
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
    event(time, step, vec![SummaryValue { tag: tag.into(), metadata: Some(metadata), content }])
}

/// What is said to a prompt, both as they are: Markdown's code, whose lines are indented.
fn sample(prompt: &str, said: &str) -> String {
    let code = |text: &str| text.split('\n').map(|line| format!("    {line}\n")).collect::<String>();
    format!("Prompt:\n\n{}\nText:\n\n{}", code(prompt), code(said))
}

/// A trial's parameters in force, as a table.
fn configuration(trial: &Trial) -> Result<String, Failure> {
    let config = serde_json::to_value(trial.config_in_force()).map_err(Failure::failed)?;
    let cell = |text: String| text.replace('|', "\\|").replace('\n', " ");
    let simulated = if trial.is_simulated() { " (simulated: nothing was trained)" } else { "" };
    let mut markdown = format!("{}{simulated}\n\n| parameter | value |\n|---|---|\n", trial.id);
    for (name, value) in config.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null()) {
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_string);
        markdown += &format!("| {name} | {} |\n", cell(value));
    }
    Ok(markdown)
}

/// How a trial ended, in Markdown.
fn outcome(trial: &Trial) -> String {
    let failure = trial.failure.as_ref().map_or(String::new(), |failure| format!(": {}", failure.message));
    format!("{}{failure}", trial.state)
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
    use super::super::hparams_of;
    use super::super::messages::HParamsPluginData;
    use super::*;
    use crate::export::tests::{points, trials};
    use domain::trial::SampleText;
    use proptest::prelude::*;
    use prost::Message;

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

    fn string(event: &Event) -> String {
        let Some(Content::Tensor(tensor)) = &values(event)[0].content else { panic!("{event:?}") };
        String::from_utf8(tensor.string_val[0].clone()).unwrap()
    }

    fn types() -> BTreeMap<String, DataType> {
        [
            ("lora_rank", DataType::Float64),
            ("precision_mode", DataType::String),
            ("target_modules", DataType::String),
        ]
        .map(|(name, of)| (name.to_string(), of))
        .into()
    }

    fn events_of(trial: &Trial, points: &[MetricPoint]) -> Vec<Event> {
        Run::default().lacking(trial, &types(), Curve { from: 0, points }).unwrap()
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
        let text = string(&events[2]);
        assert!(text.contains("| lora_rank | 8 |") && text.starts_with("tiny-1/1 (simulated"), "{text}");
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
        assert_eq!(string(&events[events.len() - 2]), "completed");
        let HParams::SessionEndInfo(end) = data(events.last().unwrap()) else { panic!() };
        assert_eq!((end.status(), end.end_time_secs), (Status::Success, 1003.5));
    }

    #[test]
    fn how_a_session_ended() {
        for (trial, want) in trials().iter().zip([Some(Status::Success), None, Some(Status::Failure)]) {
            let ends = events_of(trial, &[]);
            let end = ends.iter().find_map(|event| match hparams_of(event) {
                Some(HParams::SessionEndInfo(end)) => Some(end.status()),
                _ => None,
            });
            assert_eq!(end, want, "{}", trial.id);
        }
    }

    #[test]
    fn a_trial_that_is_tried_again_ends_again() {
        let (mut trial, points) = (trials().remove(0), points());
        let mut run = Run::default();
        let ends = |run: &Run, trial: &Trial| {
            let events = run.lacking(trial, &types(), Curve { from: 4, points: &[] }).unwrap();
            events
                .iter()
                .filter(|event| matches!(hparams_of(event), Some(HParams::SessionEndInfo(_))))
                .count()
        };
        events_of(&trial, &points).iter().for_each(|event| run.take(event));
        assert_eq!(ends(&run, &trial), 0);
        trial.finished_at = Some(Timestamp(1_009_000));
        assert_eq!(ends(&run, &trial), 1);
    }

    /// A text a step, each told once; those of steps that are made again are told again.
    #[test]
    fn samples_stand_at_their_steps() {
        let (mut trial, points) = (trials().remove(0), points());
        let summary = trial.summary.as_mut().unwrap();
        summary.sample_prompt = Some("Say\nit".into());
        (summary.sample_before, summary.sample_after) = (Some("before".into()), Some("*after*".into()));
        summary.samples = [1, 2].map(|step| SampleText { step, text: format!("at {step}") }).into();
        let steps = |events: &[Event]| -> Vec<u64> {
            events.iter().filter(|event| name_of(event) == Some(SAMPLE)).map(step_of).collect()
        };
        let events = events_of(&trial, &points);
        assert_eq!(steps(&events), [0, 1, 2, 3]);
        let last = events.iter().rfind(|event| name_of(event) == Some(SAMPLE)).unwrap();
        assert_eq!(string(last), "Prompt:\n\n    Say\n    it\n\nText:\n\n    *after*\n");
        let mut run = Run::default();
        events.iter().for_each(|event| run.take(event));
        // It is tried again from step 2 on, and ends at another hour.
        let mut again = points.clone();
        for point in again.iter_mut().filter(|point| point.step >= 2) {
            point.time.0 += 9_000;
        }
        trial.finished_at = Some(Timestamp(1_019_000));
        let (whole, made) = (Curve { from: 0, points: &points }, Curve { from: 0, points: &again });
        assert_eq!(steps(&run.lacking(&trial, &types(), whole).unwrap()), Vec::<u64>::new());
        assert_eq!(steps(&run.lacking(&trial, &types(), made).unwrap()), [2, 3]);
    }

    /// What a reader has of a curve who follows the session log, as TensorBoard does.
    fn replayed(events: &[Event]) -> Vec<(u64, Timestamp)> {
        let mut run = Run::default();
        events.iter().for_each(|event| run.take(event));
        run.points
    }

    proptest! {
        /// Attempts that make steps anew at another hour, told at any moment, by a mirror that was started again or not.
        #[test]
        fn a_run_is_the_curve_as_it_is_now(
            attempts in proptest::collection::vec((0..12_u64, 0..12_usize, any::<bool>()), 1..6),
        ) {
            let trial = trials().remove(1);
            let (mut run, mut events, mut curve, mut told) = (Run::default(), Vec::new(), Vec::new(), 0);
            for (hour, (start, made, again)) in attempts.into_iter().enumerate() {
                // It goes on from a step that was made; none is left out.
                let start = start.min(curve.len() as u64);
                curve.truncate(start as usize);
                for step in start..start + made as u64 {
                    let time = Timestamp(1_000 * hour as u64 + step);
                    curve.push(MetricPoint { step, time, values: vec![("loss".into(), 1.0)] });
                }
                if again {
                    run = Run::default();
                    events.iter().for_each(|event| run.take(event));
                }
                let from = if again { 0 } else { told.min(start) };
                let points = &curve[from as usize..];
                for event in run.lacking(&trial, &types(), Curve { from, points }).unwrap() {
                    run.take(&event);
                    events.push(event);
                }
                told = curve.len() as u64;
                let want: Vec<_> = curve.iter().map(|point| (point.step, point.time)).collect();
                prop_assert_eq!(replayed(&events), want);
                // The texts of step 0 are there, once.
                let begins = events.iter().rposition(|event| matches!(event.what, Some(What::SessionLog(_))) && event.step == 0);
                let texts = events[begins.unwrap_or(0)..].iter().filter(|event| name_of(event) == Some(CONFIGURATION));
                prop_assert_eq!(texts.count(), 1);
            }
            let logs = events.iter().filter(|event| matches!(event.what, Some(What::SessionLog(_)))).count();
            let scalars = events.iter().filter(|e| matches!(&e.what, Some(What::Summary(s)) if s.value[0].tag == "loss"));
            let scalars = scalars.count();
            // Without an attempt that makes steps anew, none is written twice.
            prop_assert!(logs > 1 || scalars == curve.len(), "{scalars} of {}", curve.len());
        }
    }
}
