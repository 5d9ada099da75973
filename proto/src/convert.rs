//! Wire ↔ domain. Going out cannot fail; coming in names the field that is wrong. Agents and devices: `fleet.rs`; uploaded
//! data: `data.rs`; what tasks made of trials: `scores.rs`.

mod attempts;
pub mod data;
mod fleet;

pub use fleet::understood;
mod scores;

use crate::limits::{self, cut};
use crate::v1;
use domain::footprint::ModelShape;
use domain::metric::MetricPoint;
use domain::sweep::{Sweep, SweepState};
use domain::trial::{
    Digests, Failure, FailureClass, Note, PARAMETER_NAMES, SampleText, Severity, Throughput, Trial,
    TrialConfig, TrialDevice, TrialState, TrialSummary,
};
use domain::{Attempt, Timestamp, TrialId};
use prost_types::value::Kind;
use serde_json::{Map, Number, Value};

/// A message that came in and cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct ConvertError {
    /// The field's name in the .proto file.
    pub field: &'static str,
    /// What is wrong with it.
    pub problem: String,
}

impl ConvertError {
    /// An error about `field`.
    pub fn new(field: &'static str, problem: impl Into<String>) -> Self {
        Self { field, problem: problem.into() }
    }
}

impl From<ModelShape> for v1::ModelShape {
    fn from(s: ModelShape) -> Self {
        Self {
            vocab_size: s.vocab_size,
            hidden_size: s.hidden_size,
            intermediate_size: s.intermediate_size,
            num_hidden_layers: s.num_hidden_layers,
            num_attention_heads: s.num_attention_heads,
            num_key_value_heads: s.num_key_value_heads,
            head_dim: s.head_dim,
            tie_word_embeddings: s.tie_word_embeddings,
            query_key_value_bias: s.query_key_value_bias,
            query_key_norms: s.query_key_norms,
            sliding_window: s.sliding_window,
            sliding_window_layers: s.sliding_window_layers,
        }
    }
}

/// Above any model's width, depth or vocabulary, and small enough that no prediction from them overflows.
const LARGEST_DIMENSION: u64 = 1 << 24;

impl TryFrom<v1::ModelShape> for ModelShape {
    type Error = ConvertError;

    fn try_from(s: v1::ModelShape) -> Result<Self, ConvertError> {
        let dimensions = [
            ("vocab_size", s.vocab_size),
            ("hidden_size", s.hidden_size),
            ("intermediate_size", s.intermediate_size),
            ("num_hidden_layers", s.num_hidden_layers),
            ("num_attention_heads", s.num_attention_heads),
            ("num_key_value_heads", s.num_key_value_heads),
            ("head_dim", s.head_dim),
            ("sliding_window", s.sliding_window.unwrap_or(1)),
        ];
        for (field, value) in dimensions {
            if !(1..=LARGEST_DIMENSION).contains(&value) {
                return Err(ConvertError::new(field, format!("is {value}, not in 1 to {LARGEST_DIMENSION}")));
            }
        }
        if s.sliding_window_layers > s.num_hidden_layers {
            let problem = format!("is {}, of {} layers", s.sliding_window_layers, s.num_hidden_layers);
            return Err(ConvertError::new("sliding_window_layers", problem));
        }
        Ok(Self {
            vocab_size: s.vocab_size,
            hidden_size: s.hidden_size,
            intermediate_size: s.intermediate_size,
            num_hidden_layers: s.num_hidden_layers,
            num_attention_heads: s.num_attention_heads,
            num_key_value_heads: s.num_key_value_heads,
            head_dim: s.head_dim,
            tie_word_embeddings: s.tie_word_embeddings,
            query_key_value_bias: s.query_key_value_bias,
            query_key_norms: s.query_key_norms,
            sliding_window: s.sliding_window,
            sliding_window_layers: s.sliding_window_layers,
        })
    }
}

/// The value of a message field that must be there.
pub fn required<T>(field: &'static str, value: Option<T>) -> Result<T, ConvertError> {
    value.ok_or_else(|| ConvertError::new(field, "is missing"))
}

/// A JSON object as a protobuf document. Numbers become doubles: integers above 2⁵³ lose digits, so specs
/// refuse them before they come here.
pub fn to_struct(object: &Map<String, Value>) -> prost_types::Struct {
    prost_types::Struct { fields: object.iter().map(|(k, v)| (k.clone(), to_value(v))).collect() }
}

/// Any serialisable type that is a JSON object, as a protobuf document.
pub fn document<T: serde::Serialize>(value: &T) -> prost_types::Struct {
    match serde_json::to_value(value) {
        Ok(Value::Object(object)) => to_struct(&object),
        // Our documents are maps with string keys, which serialise to objects without fail.
        Ok(_) | Err(_) => prost_types::Struct::default(),
    }
}

/// A protobuf document as JSON. Whole numbers become integers again.
pub fn from_struct(document: prost_types::Struct) -> Map<String, Value> {
    document.fields.into_iter().map(|(k, v)| (k, from_value(v))).collect()
}

/// A sweep's document as JSON.
pub fn sweep_document(spec: Option<prost_types::Struct>) -> Result<Map<String, Value>, ConvertError> {
    let spec = required("spec", spec)?;
    let (bytes, most) = (prost::Message::encoded_len(&spec), limits::SPEC_BYTES);
    if bytes > most {
        let problem = format!("has {bytes} bytes, above {most}; name fewer values, or give ranges");
        return Err(ConvertError::new("spec", problem));
    }
    Ok(from_struct(spec))
}

/// A protobuf document as a domain type with the same keys.
pub fn from_document<T: serde::de::DeserializeOwned>(
    field: &'static str,
    document: Option<prost_types::Struct>,
) -> Result<T, ConvertError> {
    let object = Value::Object(from_struct(required(field, document)?));
    serde_json::from_value(object).map_err(|e| ConvertError::new(field, e.to_string()))
}

fn to_value(value: &Value) -> prost_types::Value {
    let kind = match value {
        Value::Null => Kind::NullValue(0),
        Value::Bool(b) => Kind::BoolValue(*b),
        Value::Number(n) => Kind::NumberValue(n.as_f64().unwrap_or(f64::NAN)),
        Value::String(s) => Kind::StringValue(s.clone()),
        Value::Array(items) => {
            Kind::ListValue(prost_types::ListValue { values: items.iter().map(to_value).collect() })
        }
        Value::Object(object) => Kind::StructValue(to_struct(object)),
    };
    prost_types::Value { kind: Some(kind) }
}

fn from_value(value: prost_types::Value) -> Value {
    match value.kind {
        None | Some(Kind::NullValue(_)) => Value::Null,
        Some(Kind::BoolValue(b)) => Value::Bool(b),
        Some(Kind::NumberValue(n)) => number(n),
        Some(Kind::StringValue(s)) => Value::String(s),
        Some(Kind::ListValue(list)) => Value::Array(list.values.into_iter().map(from_value).collect()),
        Some(Kind::StructValue(object)) => Value::Object(from_struct(object)),
    }
}

fn number(n: f64) -> Value {
    const EXACT: f64 = 9_007_199_254_740_992.0; // 2⁵³
    if n.fract() == 0.0 && n.abs() <= EXACT {
        return Value::Number(if n < 0.0 { Number::from(n as i64) } else { Number::from(n as u64) });
    }
    Number::from_f64(n).map_or(Value::Null, Value::Number)
}

/// A wall-clock time on the wire.
pub fn timestamp(time: Timestamp) -> prost_types::Timestamp {
    prost_types::Timestamp { seconds: (time.0 / 1000) as i64, nanos: (time.0 % 1000) as i32 * 1_000_000 }
}

/// A wall-clock time from the wire; times before 1970 become 1970.
pub fn from_timestamp(time: prost_types::Timestamp) -> Timestamp {
    let seconds = (time.seconds.max(0) as u64).saturating_mul(1000);
    Timestamp(seconds.saturating_add((time.nanos.max(0) / 1_000_000) as u64))
}

impl From<TrialState> for v1::TrialState {
    fn from(state: TrialState) -> Self {
        match state {
            TrialState::Queued => Self::Queued,
            TrialState::Assigned => Self::Assigned,
            TrialState::Running => Self::Running,
            TrialState::Completed => Self::Completed,
            TrialState::Stopped => Self::Stopped,
            TrialState::Diverged => Self::Diverged,
            TrialState::Failed => Self::Failed,
            TrialState::Cancelled => Self::Cancelled,
        }
    }
}

impl TryFrom<v1::TrialState> for TrialState {
    type Error = ConvertError;

    fn try_from(state: v1::TrialState) -> Result<Self, ConvertError> {
        Ok(match state {
            v1::TrialState::Queued => Self::Queued,
            v1::TrialState::Assigned => Self::Assigned,
            v1::TrialState::Running => Self::Running,
            v1::TrialState::Completed => Self::Completed,
            v1::TrialState::Stopped => Self::Stopped,
            v1::TrialState::Diverged => Self::Diverged,
            v1::TrialState::Failed => Self::Failed,
            v1::TrialState::Cancelled => Self::Cancelled,
            v1::TrialState::Unspecified => return Err(ConvertError::new("state", "is unspecified")),
        })
    }
}

impl From<Failure> for v1::Failure {
    fn from(failure: Failure) -> Self {
        let class = match failure.class {
            FailureClass::User => v1::FailureClass::User,
            FailureClass::OutOfMemory => v1::FailureClass::OutOfMemory,
            FailureClass::Diverged => v1::FailureClass::Diverged,
            FailureClass::Infrastructure => v1::FailureClass::Infrastructure,
        };
        Self { class: class.into(), message: failure.message }
    }
}

impl TryFrom<v1::Failure> for Failure {
    type Error = ConvertError;

    fn try_from(failure: v1::Failure) -> Result<Self, ConvertError> {
        let class = match failure.class() {
            v1::FailureClass::User => FailureClass::User,
            v1::FailureClass::OutOfMemory => FailureClass::OutOfMemory,
            v1::FailureClass::Diverged => FailureClass::Diverged,
            v1::FailureClass::Infrastructure => FailureClass::Infrastructure,
            v1::FailureClass::Unspecified => return Err(ConvertError::new("class", "is unspecified")),
        };
        Ok(Self { class, message: cut(failure.message, limits::TEXT_BYTES) })
    }
}

impl From<Note> for v1::Note {
    fn from(Note { number, severity, message }: Note) -> Self {
        let severity = match severity {
            Severity::Info => v1::Severity::Info,
            Severity::Warning => v1::Severity::Warning,
            Severity::Error => v1::Severity::Error,
        };
        Self { number, severity: severity.into(), message }
    }
}

impl From<v1::Note> for Note {
    fn from(note: v1::Note) -> Self {
        let severity = match note.severity() {
            v1::Severity::Unspecified | v1::Severity::Info => Severity::Info,
            v1::Severity::Warning => Severity::Warning,
            v1::Severity::Error => Severity::Error,
        };
        Self { number: note.number, severity, message: cut(note.message, limits::TEXT_BYTES) }
    }
}

impl From<Digests> for v1::Digests {
    fn from(d: Digests) -> Self {
        let Digests { base_model, dataset, tokenizer, spec, documents } = d;
        Self { base_model, dataset, tokenizer, spec, documents }
    }
}

impl From<v1::Digests> for Digests {
    fn from(d: v1::Digests) -> Self {
        let short = |digest| cut(digest, limits::NAME_BYTES);
        Self {
            base_model: short(d.base_model),
            dataset: short(d.dataset),
            tokenizer: short(d.tokenizer),
            spec: short(d.spec),
            documents: short(d.documents),
        }
    }
}

impl From<MetricPoint> for v1::MetricPoint {
    fn from(point: MetricPoint) -> Self {
        Self {
            step: point.step,
            time: Some(timestamp(point.time)),
            values: point.values.into_iter().map(|(name, value)| v1::MetricValue { name, value }).collect(),
        }
    }
}

impl TryFrom<v1::MetricPoint> for MetricPoint {
    type Error = ConvertError;

    fn try_from(point: v1::MetricPoint) -> Result<Self, ConvertError> {
        let (count, most) = (point.values.len(), limits::METRICS);
        if count > most {
            return Err(ConvertError::new("values", format!("are {count}, above {most}")));
        }
        if let Some(value) = point.values.iter().find(|v| v.name.len() > limits::NAME_BYTES) {
            return Err(too_long("values.name", &value.name));
        }
        Ok(Self {
            step: point.step,
            time: from_timestamp(required("time", point.time)?),
            values: point.values.into_iter().map(|v| (v.name, v.value)).collect(),
        })
    }
}

impl From<TrialSummary> for v1::TrialSummary {
    fn from(s: TrialSummary) -> Self {
        Self {
            steps: s.steps,
            loss: s.loss,
            eval_loss: s.eval_loss,
            base_eval_loss: s.base_eval_loss,
            peak_memory_bytes: s.peak_memory_bytes,
            pack_peak_memory_bytes: s.pack_peak_memory_bytes,
            peak_rss_bytes: s.peak_rss_bytes,
            predicted_peak_memory_bytes: s.predicted_peak_memory_bytes,
            trainable_parameters: s.trainable_parameters,
            total_parameters: s.total_parameters,
            adapter_bytes: s.adapter_bytes,
            samples_per_second: s.samples_per_second,
            tokens_per_second: s.tokens_per_second,
            packed: s.throughput == Throughput::Packed,
            device_seconds: s.device_seconds,
            truncated_rows: s.truncated_rows,
            skipped_rows: s.skipped_rows,
            sample_prompt: s.sample_prompt,
            sample_before: s.sample_before,
            sample_after: s.sample_after,
            samples: s
                .samples
                .into_iter()
                .map(|sample| v1::SampleText { step: sample.step, text: sample.text })
                .collect(),
            recomputed_layers: s.recomputed_layers,
            evaluations: s.evaluations.into_iter().map(Into::into).collect(),
            unasked: s.unasked,
            item_scores: s.item_scores.into_iter().map(Into::into).collect(),
            predicted_seconds_per_step: s.predicted_seconds_per_step,
            simulated_seconds: s.simulated_seconds,
        }
    }
}

impl From<v1::TrialSummary> for TrialSummary {
    fn from(s: v1::TrialSummary) -> Self {
        let text = |text: Option<String>| text.map(|text| cut(text, limits::TEXT_BYTES));
        // They are multiplied by a price, and the product must stay a number.
        let seconds = |seconds: Option<f64>| seconds.filter(|s| (0.0..=limits::SECONDS).contains(s));
        Self {
            steps: s.steps,
            loss: s.loss,
            eval_loss: s.eval_loss,
            base_eval_loss: s.base_eval_loss,
            peak_memory_bytes: s.peak_memory_bytes,
            pack_peak_memory_bytes: s.pack_peak_memory_bytes,
            peak_rss_bytes: s.peak_rss_bytes,
            predicted_peak_memory_bytes: s.predicted_peak_memory_bytes,
            trainable_parameters: s.trainable_parameters,
            total_parameters: s.total_parameters,
            adapter_bytes: s.adapter_bytes,
            samples_per_second: s.samples_per_second,
            tokens_per_second: s.tokens_per_second,
            throughput: if s.packed { Throughput::Packed } else { Throughput::Solo },
            // A record is JSON, which has no other numbers.
            device_seconds: if s.device_seconds.is_finite() { s.device_seconds } else { 0.0 },
            predicted_seconds_per_step: seconds(s.predicted_seconds_per_step),
            simulated_seconds: seconds(s.simulated_seconds),
            truncated_rows: s.truncated_rows,
            skipped_rows: s.skipped_rows,
            sample_prompt: text(s.sample_prompt),
            sample_before: text(s.sample_before),
            sample_after: text(s.sample_after),
            samples: samples(s.samples),
            recomputed_layers: s.recomputed_layers,
            evaluations: scores::scores(s.evaluations),
            unasked: text(s.unasked),
            item_scores: scores::item_scores(s.item_scores),
            // Where they are kept is the coordinator's to say.
            items: None,
        }
    }
}

/// Texts on the way as they are kept: in order, one a step.
fn samples(samples: Vec<v1::SampleText>) -> Vec<SampleText> {
    let mut kept: Vec<SampleText> = Vec::new();
    for v1::SampleText { step, text } in samples.into_iter().take(limits::SAMPLES) {
        if kept.last().is_none_or(|last| last.step < step) {
            kept.push(SampleText { step, text: cut(text, limits::SAMPLE_BYTES) });
        }
    }
    kept
}

impl From<Trial> for v1::Trial {
    fn from(t: Trial) -> Self {
        let config = Some(document(&t.config_in_force()));
        Self { config, ..trial_without_config(t) }
    }
}

/// A trial on the wire, its `config` left out.
pub fn trial_without_config(t: Trial) -> v1::Trial {
    let (resume, resume_step) = t.resume.unzip();
    v1::Trial {
        sweep_id: t.id.sweep().map(|s| s.to_string()).unwrap_or_default(),
        number: t.id.number().unwrap_or_default(),
        id: t.id.to_string(),
        config: None,
        parameters: Some(document(&t.parameters)),
        state: v1::TrialState::from(t.state).into(),
        attempt: t.attempt.0,
        step: t.step,
        total_steps: t.total_steps,
        agent_id: t.agent,
        device: t.device.map(|d| v1::TrialDevice {
            accelerator: d.accelerator,
            memory_bytes: d.memory_bytes,
            price_per_hour: d.price_per_hour,
            price_from: d.price_from.map(|from| (*from).into()),
        }),
        adapter: t.adapter,
        resume,
        resume_step,
        attempts: attempts::starts(&t.attempts, &t.placements),
        eval_loss: t.eval_loss,
        cost_usd: t.cost_usd,
        summary: t.summary.map(Into::into),
        failure: t.failure.map(Into::into),
        digests: t.digests.map(Into::into),
        created_at: Some(timestamp(t.created_at)),
        started_at: t.started_at.map(timestamp),
        finished_at: t.finished_at.map(timestamp),
        trace_id: t.trace_id,
        replicate_of: t.replicate_of.map(|of| of.to_string()),
    }
}

impl TryFrom<v1::Trial> for Trial {
    type Error = ConvertError;

    fn try_from(mut t: v1::Trial) -> Result<Self, ConvertError> {
        let mut config = t.config.take();
        if let Some(config) = &mut config {
            // What a later version has besides is not for this one.
            config.fields.retain(|name, _| PARAMETER_NAMES.contains(&name.as_str()));
        }
        let config = from_document::<TrialConfig>("config", config)?;
        Ok(Self { config, ..trial_of_unknown_config(t)? })
    }
}

/// A trial whose `config` was left out: the one that it has here is no more than the defaults. For tables that show
/// none of it.
pub fn trial_of_unknown_config(t: v1::Trial) -> Result<Trial, ConvertError> {
    Ok(Trial {
        state: t.state().try_into()?,
        id: TrialId::new(t.id),
        config: TrialConfig::default(),
        parameters: from_document("parameters", t.parameters)?,
        attempt: Attempt(t.attempt),
        step: t.step,
        total_steps: t.total_steps,
        agent: t.agent_id,
        device: t.device.map(|d| TrialDevice {
            accelerator: d.accelerator,
            memory_bytes: d.memory_bytes,
            price_per_hour: d.price_per_hour,
            price_from: d.price_from.map(|from| Box::new(from.into())),
        }),
        adapter: t.adapter,
        resume: t.resume.zip(t.resume_step),
        attempts: t.attempts.iter().map(|a| (Attempt(a.attempt), a.step)).collect(),
        placements: attempts::placements(&t.attempts),
        eval_loss: t.eval_loss,
        cost_usd: t.cost_usd,
        summary: t.summary.map(Into::into),
        failure: t.failure.map(TryInto::try_into).transpose()?,
        digests: t.digests.map(Into::into),
        created_at: from_timestamp(required("created_at", t.created_at)?),
        started_at: t.started_at.map(from_timestamp),
        finished_at: t.finished_at.map(from_timestamp),
        trace_id: t.trace_id,
        replicate_of: t.replicate_of.map(TrialId::new),
    })
}

impl From<SweepState> for v1::SweepState {
    fn from(state: SweepState) -> Self {
        match state {
            SweepState::Running => Self::Running,
            SweepState::Paused => Self::Paused,
            SweepState::Completed => Self::Completed,
            SweepState::Cancelled => Self::Cancelled,
            SweepState::Failed => Self::Failed,
        }
    }
}

impl TryFrom<v1::SweepState> for SweepState {
    type Error = ConvertError;

    fn try_from(state: v1::SweepState) -> Result<Self, ConvertError> {
        Ok(match state {
            v1::SweepState::Running => Self::Running,
            v1::SweepState::Paused => Self::Paused,
            v1::SweepState::Completed => Self::Completed,
            v1::SweepState::Cancelled => Self::Cancelled,
            v1::SweepState::Failed => Self::Failed,
            v1::SweepState::Unspecified => return Err(ConvertError::new("state", "is unspecified")),
        })
    }
}

/// A sweep on the wire, with how many of its trials stand in each state.
pub fn sweep(sweep: &Sweep) -> v1::Sweep {
    let count = |(state, trials)| v1::StateCount { state: v1::TrialState::from(state).into(), trials };
    let (best_trial_id, best_value) =
        sweep.best.as_ref().map(|(trial, value)| (trial.to_string(), *value)).unzip();
    v1::Sweep {
        id: sweep.id.to_string(),
        name: sweep.spec.name.clone(),
        spec: Some(to_struct(&sweep.spec.to_document())),
        state: v1::SweepState::from(sweep.state).into(),
        created_at: Some(timestamp(sweep.created_at)),
        finished_at: sweep.finished_at.map(timestamp),
        max_trials: sweep.max_trials,
        counts: sweep.counts.iter().map(count).collect(),
        best_trial_id,
        best_value,
        cost_usd: sweep.cost_usd,
        failure: sweep.failure.clone(),
        ended_early: sweep.ended_early.clone(),
        namespace: sweep.namespace.clone(),
        // Its record does not know.
        waits_for: None,
    }
}

fn too_long(field: &'static str, name: &str) -> ConvertError {
    ConvertError::new(field, format!("has {} bytes, above {}", name.len(), limits::NAME_BYTES))
}

#[cfg(test)]
mod tests;
