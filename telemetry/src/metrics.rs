//! Every metric: its name, unit, meaning, and the attributes that it may have. Names and units are OpenTelemetry's where it
//! has them (semantic conventions 1.41: `rpc`, `process`, `hw`), and begin with `lorafleet.` otherwise.
//!
//! No attribute names a trial or a sweep: a series has no end, and there are more and more trials. What one trial did is in
//! its trace and its curve.

use opentelemetry::metrics as otel;
use opentelemetry::{KeyValue, global};
use std::sync::OnceLock;

/// The meter's name.
const SCOPE: &str = "lorafleet";

/// How a metric adds up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Only grows.
    Counter,
    /// Grows and shrinks; over processes it adds up.
    UpDownCounter,
    /// A value as it is now.
    Gauge,
    /// Values, counted by size.
    Histogram,
}

/// What a metric is.
#[derive(Debug)]
pub struct Definition {
    /// Its name.
    pub name: &'static str,
    /// How it adds up.
    pub kind: Kind,
    /// Its unit in UCUM notation.
    pub unit: &'static str,
    /// What it counts or measures.
    pub meaning: &'static str,
    /// The attributes that it may have, each of few values.
    pub attributes: &'static [&'static str],
}

/// Attributes of a value.
type Attributes<'a> = &'a [(&'static str, &'a str)];

impl Definition {
    const fn new(
        name: &'static str,
        kind: Kind,
        unit: &'static str,
        meaning: &'static str,
        attributes: &'static [&'static str],
    ) -> Self {
        Self { name, kind, unit, meaning, attributes }
    }

    fn values(&self, attributes: Attributes<'_>) -> Vec<KeyValue> {
        let known = attributes.iter().filter(|(key, _)| {
            let known = self.attributes.contains(key);
            debug_assert!(known, "{} has no attribute {key}", self.name);
            known
        });
        known.map(|(key, value)| KeyValue::new(*key, value.to_string())).collect()
    }
}

/// A counter. Where metrics are not collected, adding to it costs nothing.
#[derive(Debug)]
pub struct Counter(Definition, OnceLock<otel::Counter<f64>>);

impl Counter {
    /// Adds.
    pub fn add(&self, value: f64, attributes: Attributes<'_>) {
        let Self(definition, instrument) = self;
        let make = || {
            let meter = global::meter(SCOPE);
            let builder = meter.f64_counter(definition.name);
            builder.with_unit(definition.unit).with_description(definition.meaning).build()
        };
        instrument.get_or_init(make).add(value, &definition.values(attributes));
    }
}

/// Something of which there is more or less.
#[derive(Debug)]
pub struct UpDownCounter(Definition, OnceLock<otel::UpDownCounter<i64>>);

impl UpDownCounter {
    fn add(&self, value: i64, attributes: Attributes<'_>) {
        let Self(definition, instrument) = self;
        let make = || {
            let meter = global::meter(SCOPE);
            let builder = meter.i64_up_down_counter(definition.name);
            builder.with_unit(definition.unit).with_description(definition.meaning).build()
        };
        instrument.get_or_init(make).add(value, &definition.values(attributes));
    }

    /// One part of the sum: what its owner has of it. It goes with its owner.
    pub fn part(&'static self, attributes: &[(&'static str, &str)]) -> Part {
        let attributes = attributes.iter().map(|(key, value)| (*key, value.to_string())).collect();
        Part { of: self, attributes, value: 0 }
    }
}

/// A part of an [`UpDownCounter`]'s sum.
#[derive(Debug)]
pub struct Part {
    of: &'static UpDownCounter,
    attributes: Vec<(&'static str, String)>,
    value: i64,
}

impl Part {
    /// So much it is now.
    pub fn set(&mut self, value: i64) {
        if value != self.value {
            let attributes: Vec<_> =
                self.attributes.iter().map(|(key, value)| (*key, value.as_str())).collect();
            self.of.add(value - self.value, &attributes);
            self.value = value;
        }
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        self.set(0);
    }
}

/// A histogram.
#[derive(Debug)]
pub struct Histogram(Definition, &'static [f64], OnceLock<otel::Histogram<f64>>);

impl Histogram {
    /// Records a value. One that is no number is left out.
    pub fn record(&self, value: f64, attributes: Attributes<'_>) {
        if !value.is_finite() {
            return;
        }
        let Self(definition, bounds, instrument) = self;
        let make = || {
            let meter = global::meter(SCOPE);
            let builder = meter.f64_histogram(definition.name).with_boundaries(bounds.to_vec());
            builder.with_unit(definition.unit).with_description(definition.meaning).build()
        };
        instrument.get_or_init(make).record(value, &definition.values(attributes));
    }
}

/// A value of a metric that is read when it is collected.
#[derive(Debug, Clone)]
pub struct Reading {
    value: f64,
    attributes: Vec<(&'static str, String)>,
}

impl Reading {
    /// A value.
    pub fn new(value: f64, attributes: &[(&'static str, &str)]) -> Self {
        let attributes = attributes.iter().map(|(key, value)| (*key, value.to_string())).collect();
        Self { value, attributes }
    }
}

/// A metric that is read when it is collected.
#[derive(Debug)]
pub struct Observed(Definition, OnceLock<()>);

impl Observed {
    /// Reads it so from now on; who asks first decides how.
    pub fn observe(&'static self, read: impl Fn() -> Vec<Reading> + Send + Sync + 'static) {
        let definition = &self.0;
        if self.1.set(()).is_err() {
            return;
        }
        let tell = move |observer: &dyn otel::AsyncInstrument<f64>| {
            for Reading { value, attributes } in read() {
                let attributes: Vec<_> =
                    attributes.iter().map(|(key, value)| (*key, value.as_str())).collect();
                observer.observe(value, &definition.values(&attributes));
            }
        };
        let (meter, unit, meaning) = (global::meter(SCOPE), definition.unit, definition.meaning);
        // The provider keeps the callback.
        match definition.kind {
            Kind::Counter => {
                let builder = meter.f64_observable_counter(definition.name).with_unit(unit);
                let _kept = builder.with_description(meaning).with_callback(tell).build();
            }
            Kind::UpDownCounter => {
                let builder = meter.f64_observable_up_down_counter(definition.name).with_unit(unit);
                let _kept = builder.with_description(meaning).with_callback(tell).build();
            }
            Kind::Gauge | Kind::Histogram => {
                let builder = meter.f64_observable_gauge(definition.name).with_unit(unit);
                let _kept = builder.with_description(meaning).with_callback(tell).build();
            }
        }
    }
}

/// Bounds of durations in seconds, from a millisecond to a day.
const SECONDS: &[f64] =
    &[0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0, 300.0, 1800.0, 7200.0, 28800.0, 86400.0];
/// Bounds of a step's duration in seconds: fine where steps lie, so that one device that is slow shows.
const STEP_SECONDS: &[f64] = &[
    0.005, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 30.0,
    60.0, 300.0,
];
/// OpenTelemetry's bounds of a call's duration.
const CALL_SECONDS: &[f64] =
    &[0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0];
/// Bounds of bytes, from a megabyte to a terabyte.
const BYTES: &[f64] = &[1e6, 1e7, 1e8, 1e9, 2e9, 4e9, 8e9, 16e9, 24e9, 32e9, 48e9, 80e9, 160e9, 1e12];
/// Bounds of a loss in nats.
const NATS: &[f64] = &[0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0, 12.0];
/// Bounds of a quotient that should be somewhat below 1.
const QUOTIENT: &[f64] = &[0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.25, 1.5, 2.0];
/// Bounds of tokens a second.
const TOKENS: &[f64] = &[10.0, 50.0, 100.0, 250.0, 500.0, 1e3, 2.5e3, 5e3, 1e4, 2.5e4, 5e4, 1e5, 2.5e5];

/// Bounds of rows a second: of a large model there is less than one.
const ROWS: &[f64] = &[0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0, 500.0, 1e3];

macro_rules! metrics {
    ($( $const:ident: $type:ident($($bounds:expr)?) $kind:ident $name:literal, $unit:literal, [$($attribute:literal),*], $meaning:literal; )*) => {
        $(
            #[doc = $meaning]
            pub static $const: $type = metrics!(@ $type, Definition::new($name, Kind::$kind, $unit, $meaning, &[$($attribute),*]) $(, $bounds)?);
        )*

        /// Every metric.
        pub fn definitions() -> Vec<&'static Definition> {
            vec![$( &$const.0 ),*]
        }
    };
    (@ Histogram, $definition:expr, $bounds:expr) => { Histogram($definition, $bounds, OnceLock::new()) };
    (@ $type:ident, $definition:expr) => { $type($definition, OnceLock::new()) };
}

metrics! {
    TRIALS: UpDownCounter() UpDownCounter "lorafleet.trials", "{trial}", ["state"],
        "Trials of the sweeps that run, by state.";
    SWEEPS: UpDownCounter() UpDownCounter "lorafleet.sweeps", "{sweep}", ["budget"],
        "Sweeps that run, by what is spent of their budget: unlimited, below_half, above_half, or nearly_spent from 90 % on.";
    TRIAL_QUEUE_DURATION: Histogram(SECONDS) Histogram "lorafleet.trial.queue.duration", "s", [],
        "Time for which a trial waited for a device, for each attempt.";
    PLACEMENT_DURATION: Histogram(SECONDS) Histogram "lorafleet.placement.duration", "s", [],
        "Time that one decision took which trial goes to which device.";
    ATTEMPTS: Counter() Counter "lorafleet.trial.attempts", "{attempt}", ["outcome"],
        "Attempts that ended, by how: the state that the trial went into.";
    TRIAL_COST: Counter() Counter "lorafleet.trial.cost", "{USD}", [],
        "US dollars that attempts cost, once they are charged.";
    TRIAL_EVAL_LOSS: Histogram(NATS) Histogram "lorafleet.trial.eval_loss", "{nat}", [],
        "Held-out loss of trials that ended with one.";
    TRIAL_LOSS: Histogram(NATS) Histogram "lorafleet.trial.loss", "{nat}", ["device"],
        "Training loss of each point that a trial reported.";
    TRIAL_MEMORY_PREDICTED: Histogram(BYTES) Histogram "lorafleet.trial.memory.predicted", "By", [],
        "Peak bytes that the footprint model predicted, of trials that ended with a measurement.";
    TRIAL_MEMORY_PEAK: Histogram(BYTES) Histogram "lorafleet.trial.memory.peak", "By", [],
        "Peak bytes measured, of trials that ended with a prediction.";
    TRIAL_MEMORY_QUOTIENT: Histogram(QUOTIENT) Histogram "lorafleet.trial.memory.measured_to_predicted", "{quotient}", [],
        "Peak bytes measured divided by those predicted; above 1 the prediction was too low.";
    AGENTS: UpDownCounter() UpDownCounter "lorafleet.agents", "{agent}", ["state"],
        "Agents by state: connected, drained, or gone with trials in their hands.";
    AGENT_BEGINNING: Histogram(SECONDS) Histogram "lorafleet.agent.beginning.duration", "s", ["part"],
        "Time of an agent from when it joined to its first trial (wait), and from there to its first training step (prepare).";
    LEASE_RENEWALS: Counter() Counter "lorafleet.lease.renewals", "{lease}", [],
        "Assignments renewed by a sign of life.";
    LEASE_EXPIRATIONS: Counter() Counter "lorafleet.lease.expirations", "{lease}", [],
        "Assignments that ended without a sign of life.";
    STORE_TRANSACTION_DURATION: Histogram(SECONDS) Histogram "lorafleet.store.transaction.duration", "s", ["outcome"],
        "Time until a transaction of the state was durable, or failed.";
    ETCD_ERRORS: Counter() Counter "lorafleet.etcd.errors", "{call}", ["operation", "rpc.response.status_code"],
        "Calls to etcd that failed, each try of one that is made again, by etcd's name of the operation.";
    STEP_DURATION: Histogram(STEP_SECONDS) Histogram "lorafleet.step.duration", "s", ["device"],
        "Time of one optimizer step of all trials of a pack.";
    TOKENS_PER_SECOND: Histogram(TOKENS) Histogram "lorafleet.trial.throughput.tokens", "{token}/s", ["device"],
        "Unpadded tokens trained a second, of each point that a trial reported.";
    SAMPLES_PER_SECOND: Histogram(ROWS) Histogram "lorafleet.trial.throughput.samples", "{row}/s", ["device"],
        "Rows trained a second, of each point that a trial reported.";
    PHASE_DURATION: Histogram(SECONDS) Histogram "lorafleet.trial.phase.duration", "s", ["phase"],
        "Time of a phase of training other than steps: load, prepare, evaluate, checkpoint.";
    CHECKPOINT_SIZE: Histogram(BYTES) Histogram "lorafleet.checkpoint.size", "By", [],
        "Bytes of a checkpoint that was uploaded: adapter and resume state.";
    CHECKPOINT_UPLOAD_DURATION: Histogram(SECONDS) Histogram "lorafleet.checkpoint.upload.duration", "s", ["outcome"],
        "Time of an upload of a checkpoint.";
    SPOOL_MESSAGES: UpDownCounter() UpDownCounter "lorafleet.spool.messages", "{message}", [],
        "Messages that the coordinator has not acknowledged.";
    ACKNOWLEDGEMENT_LAG: Histogram(SECONDS) Histogram "lorafleet.spool.acknowledgement.lag", "s", [],
        "Time from when a message was spooled until it was acknowledged.";
    SESSIONS_LOST: Counter() Counter "lorafleet.session.losses", "{session}", [],
        "Times that an agent's stream to the coordinator ended or could not be opened.";
    TELEMETRY_EXPORTED: Counter() Counter "lorafleet.telemetry.exported", "{item}", ["signal", "outcome"],
        "Spans, log records and batches of metrics that were given to their collector; failed ones are lost.";
    RPC_SERVER_DURATION: Histogram(CALL_SECONDS) Histogram "rpc.server.call.duration", "s",
        ["rpc.system.name", "rpc.method", "rpc.response.status_code", "error.type"],
        "Duration of calls, of streams until they are open.";
    RPC_CLIENT_DURATION: Histogram(CALL_SECONDS) Histogram "rpc.client.call.duration", "s",
        ["rpc.system.name", "rpc.method", "rpc.response.status_code", "error.type"],
        "Duration of calls made, of streams until they are open.";
    PROCESS_CPU_TIME: Observed() Counter "process.cpu.time", "s", ["cpu.mode"],
        "CPU seconds of the process.";
    PROCESS_MEMORY_USAGE: Observed() UpDownCounter "process.memory.usage", "By", [],
        "Resident bytes of the process.";
    PROCESS_THREAD_COUNT: Observed() UpDownCounter "process.thread.count", "{thread}", [],
        "Threads of the process.";
    PROCESS_OPEN_FILES: Observed() UpDownCounter "process.unix.file_descriptor.count", "{file_descriptor}", [],
        "Open files of the process.";
    RUNTIME_WORKERS: Observed() UpDownCounter "lorafleet.tokio.workers", "{thread}", [],
        "Worker threads of the tokio runtime.";
    RUNTIME_TASKS: Observed() UpDownCounter "lorafleet.tokio.tasks", "{task}", [],
        "Tasks of the tokio runtime that have not ended.";
    RUNTIME_QUEUE: Observed() UpDownCounter "lorafleet.tokio.global_queue.depth", "{task}", [],
        "Tasks that wait for a worker of the tokio runtime.";
    GPU_UTILIZATION: Observed() Gauge "hw.gpu.utilization", "1", ["hw.id", "hw.name"],
        "Share of the time in which something ran on the GPU.";
    GPU_MEMORY_USAGE: Observed() UpDownCounter "hw.gpu.memory.usage", "By", ["hw.id", "hw.name"],
        "Bytes of the GPU that are in use.";
    GPU_MEMORY_LIMIT: Observed() UpDownCounter "hw.gpu.memory.limit", "By", ["hw.id", "hw.name"],
        "Bytes that the GPU has.";
    HW_POWER: Observed() Gauge "hw.power", "W", ["hw.id", "hw.name", "hw.type"],
        "Power that the GPU draws.";
    HW_TEMPERATURE: Observed() Gauge "hw.temperature", "Cel", ["hw.id", "hw.name", "hw.type"],
        "Temperature of the GPU.";
    HW_ERRORS: Observed() Counter "hw.errors", "{error}", ["hw.id", "hw.name", "hw.type", "error.type"],
        "Memory errors of the GPU that it could not correct.";
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn bounds_rise() {
        for bounds in [SECONDS, STEP_SECONDS, CALL_SECONDS, BYTES, NATS, QUOTIENT, TOKENS, ROWS] {
            assert!(bounds.is_sorted_by(|a, b| a < b), "{bounds:?}");
        }
    }

    #[test]
    fn definitions_are_sound() {
        let mut names = BTreeSet::new();
        for Definition { name, unit, meaning, attributes, .. } in definitions() {
            assert!(names.insert(name), "{name} is defined twice");
            let ours = name.starts_with("lorafleet.");
            assert!(ours || ["rpc.", "process.", "hw."].iter().any(|of| name.starts_with(of)), "{name}");
            assert!(!unit.is_empty() && meaning.ends_with('.'), "{name}");
            let endless = ["trial", "sweep", "trace", "request", "path"];
            let bad = attributes
                .iter()
                .find(|key| endless.iter().any(|word| key.split('.').any(|part| part == *word)));
            assert_eq!(bad, None, "{name}: a series for each would have no end");
        }
    }
}
