//! A trial's trace, told from what a change of its record shows: what waited, and what was tried. Each span is told once the
//! change that ends it is durable, from hours that are in the record, so that another coordinator goes on with it.

use crate::store::{LogEntry, SweepRecord, TrialRecord};
use domain::trial::{Severity, Trial, TrialState};
use domain::{Attempt, Timestamp};
use serde::{Deserialize, Serialize};
use telemetry::metrics;
use telemetry::record::{self, Record};
use telemetry::trace::{Place, Span, TrialTrace};

/// What a trial does, since when. It is in the trial's record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Waits for a device.
    Waits(Timestamp),
    /// Holds one.
    Holds(Timestamp),
}

/// What is told once its change is durable. A leader that is replaced before tells nothing of what the next one sees anew.
pub(super) enum Untold {
    /// A span.
    Span {
        own: Option<Place>,
        parent: Option<Place>,
        span: Span,
        /// Whether it ends when the change is durable.
        until_durable: bool,
    },
    /// What the metrics count.
    Count(Box<dyn FnOnce() + Send>),
}

impl Untold {
    pub(super) fn count(count: impl FnOnce() + Send + 'static) -> Self {
        Self::Count(Box::new(count))
    }

    pub(super) fn tell(self, now: Timestamp) {
        match self {
            Self::Count(count) => count(),
            Self::Span { own, parent, mut span, until_durable } => {
                if until_durable {
                    span.end_ms = now.0;
                }
                match (own, parent) {
                    (Some(own), parent) => span.tell_at(own, parent),
                    (None, Some(parent)) => {
                        span.tell(parent);
                    }
                    (None, None) => {}
                }
            }
        }
    }
}

/// A trial's trace; none of one from before there were traces.
pub(super) fn trace(trial: &Trial) -> Option<TrialTrace> {
    trial.trace_id.as_deref().and_then(|id| TrialTrace::parse(id).ok())
}

/// The place of a trial's attempt in its trace.
pub(super) fn attempt_of(trial: &Trial, attempt: Attempt) -> Option<Place> {
    trace(trial).map(|trace| trace.attempt(attempt.0))
}

/// What news of a trial end, and the stage that it is in then. `granted` is when the device was decided that it was
/// assigned, `why` what put it back into the queue.
pub(super) fn follow(
    sweep: &SweepRecord,
    record: &TrialRecord,
    news: &[LogEntry],
    granted: Option<Timestamp>,
    why: Option<&str>,
) -> (Option<Stage>, Vec<Untold>) {
    let mut stage = record.stage;
    let mut untold = Vec::new();
    let trace = trace(&record.trial);
    for entry in news {
        let now = entry.time;
        match entry.event.as_str() {
            "proposed" | "queued_again" => stage = Some(Stage::Waits(now)),
            "assigned" => {
                let granted = granted.unwrap_or(now).min(now);
                if let Some(Stage::Waits(since)) = stage {
                    let seconds = granted.since(since).as_secs_f64();
                    untold.push(Untold::count(move || metrics::TRIAL_QUEUE_DURATION.record(seconds, &[])));
                    let attempt = entry.attempt.0;
                    untold.extend(trace.map(|trace| queue(trace, attempt, since, granted)));
                }
                stage = Some(Stage::Holds(granted));
                untold.extend(trace.map(|trace| place(trace, record, granted)));
            }
            "queued" => {
                untold.extend(attempt(trace, record, stage, "queued", why, now));
                stage = Some(Stage::Waits(now));
            }
            state if state == record.trial.state.as_str() && record.trial.state.is_terminal() => {
                match stage {
                    Some(Stage::Waits(since)) => {
                        let next = record.next_attempt().0;
                        untold.extend(trace.map(|trace| queue(trace, next, since, now)));
                    }
                    _ => {
                        let failure = record.trial.failure.as_ref().map(|failure| failure.message.as_str());
                        untold.extend(attempt(trace, record, stage, state, failure, now));
                    }
                }
                untold.push(ended(record));
                untold.extend(trace.map(|trace| whole(trace, sweep, record, now)));
                stage = None;
            }
            _ => {}
        }
    }
    (stage, untold)
}

fn queue(trace: TrialTrace, attempt: u32, since: Timestamp, until: Timestamp) -> Untold {
    let attributes = vec![("lorafleet.trial.attempt", i64::from(attempt).into())];
    let span = Span { name: "queue", start_ms: since.0, end_ms: until.0, attributes, ..Span::default() };
    Untold::Span { own: None, parent: Some(trace.whole()), span, until_durable: false }
}

fn place(trace: TrialTrace, record: &TrialRecord, granted: Timestamp) -> Untold {
    let span = Span { name: "place", start_ms: granted.0, attributes: of_place(record), ..Span::default() };
    let parent = Some(trace.attempt(record.trial.attempt.0));
    Untold::Span { own: None, parent, span, until_durable: true }
}

/// Where a trial trains, as attributes.
fn of_place(record: &TrialRecord) -> Vec<(&'static str, telemetry::trace::Value)> {
    let place = record.placement.as_ref();
    let mut attributes = vec![("lorafleet.trial.id", record.trial.id.to_string().into())];
    attributes.push(("lorafleet.trial.attempt", i64::from(record.trial.attempt.0).into()));
    // Its placement is gone when it is over; its agent is not.
    if let Some(agent) = &record.trial.agent {
        attributes.push(("lorafleet.agent.id", agent.clone().into()));
    }
    if let Some(place) = place {
        attributes.push(("lorafleet.device.id", place.device.to_string().into()));
    }
    attributes
}

/// The attempt that ended, if the trial held a device.
fn attempt(
    trace: Option<TrialTrace>,
    record: &TrialRecord,
    stage: Option<Stage>,
    outcome: &str,
    why: Option<&str>,
    now: Timestamp,
) -> Vec<Untold> {
    let Some(Stage::Holds(since)) = stage else { return Vec::new() };
    let counted = outcome.to_string();
    let count = Untold::count(move || metrics::ATTEMPTS.add(1.0, &[("outcome", counted.as_str())]));
    let Some(trace) = trace else { return vec![count] };
    let mut attributes = of_place(record);
    attributes.push(("lorafleet.trial.outcome", outcome.to_string().into()));
    let error = why.map(String::from);
    let span =
        Span { name: "attempt", start_ms: since.0, end_ms: now.0, attributes, error, ..Span::default() };
    let own = Some(trace.attempt(record.trial.attempt.0));
    vec![count, Untold::Span { own, parent: Some(trace.whole()), span, until_durable: false }]
}

/// The whole trial. One that is tried again is told of again, with its longer life.
fn whole(trace: TrialTrace, sweep: &SweepRecord, record: &TrialRecord, now: Timestamp) -> Untold {
    let trial = &record.trial;
    let attributes = vec![
        ("lorafleet.trial.id", trial.id.to_string().into()),
        ("lorafleet.sweep.id", sweep.sweep.id.to_string().into()),
        ("lorafleet.trial.state", trial.state.as_str().into()),
        ("lorafleet.trial.attempts", i64::from(trial.attempt.0).into()),
    ];
    let span = Span {
        name: "trial",
        start_ms: trial.created_at.0,
        end_ms: now.0,
        attributes,
        link: sweep.submitted_by.as_deref().and_then(|place| place.parse().ok()),
        error: trial.failure.as_ref().map(|failure| failure.message.clone()),
        ..Span::default()
    };
    Untold::Span { own: Some(trace.whole()), parent: None, span, until_durable: false }
}

/// Tells of an entry of a trial's log that is durable.
pub(super) fn log(sweep: &SweepRecord, trial: &Trial, entry: LogEntry) {
    let LogEntry { time, event, severity, attempt, step, message } = entry;
    let record = Record {
        name: "lorafleet.trial.log",
        time_ms: time.0,
        severity: match severity {
            Severity::Info => record::Severity::Info,
            Severity::Warning => record::Severity::Warning,
            Severity::Error => record::Severity::Error,
        },
        text: message,
        attributes: vec![
            ("lorafleet.trial.id", trial.id.to_string().into()),
            ("lorafleet.sweep.id", sweep.sweep.id.to_string().into()),
            ("lorafleet.trial.attempt", i64::from(attempt.0).into()),
            ("lorafleet.trial.step", (step as i64).into()),
            ("lorafleet.trial.event", event.into()),
        ],
    };
    record.tell(attempt_of(trial, attempt));
}

/// What the metrics keep of a trial that is over.
fn ended(record: &TrialRecord) -> Untold {
    let trial = &record.trial;
    let loss = trial.eval_loss.filter(|_| trial.state != TrialState::Diverged);
    let summary = trial.summary.as_ref();
    let peak = summary.and_then(|summary| summary.peak_memory_bytes);
    let predicted = summary.and_then(|summary| summary.predicted_peak_memory_bytes);
    Untold::count(move || {
        if let Some(loss) = loss {
            metrics::TRIAL_EVAL_LOSS.record(loss, &[]);
        }
        if let (Some(peak), Some(predicted @ 1..)) = (peak, predicted) {
            metrics::TRIAL_MEMORY_PEAK.record(peak as f64, &[]);
            metrics::TRIAL_MEMORY_PREDICTED.record(predicted as f64, &[]);
            metrics::TRIAL_MEMORY_QUOTIENT.record(peak as f64 / predicted as f64, &[]);
        }
    })
}
