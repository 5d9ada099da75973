//! What a device tells of a trial's attempt: spans of its work once it is over, and one of its training, whose events are
//! the points that it reported. Nothing is told from the thread that trains.

use crate::engine::{FourBits, Phase, Quantising, Work};
use domain::Timestamp;
use domain::metric::{self, MetricPoint};
use std::fmt::Display;
use std::future::Future;
use telemetry::metrics;
use telemetry::trace::{Place, Span};
use tokio::time::Instant;

/// Points that are kept of an attempt at most: of more, every second is, and so on.
const EVENTS: usize = 64;

/// An attempt, as far as it is told of.
#[derive(Debug, Default)]
pub(super) struct Traced {
    belongs: Option<Place>,
    /// When the last piece of work before its first step was over, in milliseconds since the Unix epoch.
    ready_ms: Option<u64>,
    /// Whether it trains, or did.
    started: bool,
    /// When the last was heard of it: a point, or a piece of work that was over.
    last: Timestamp,
    points: Vec<MetricPoint>,
    /// Points seen, and of how many one is kept.
    seen: usize,
    stride: usize,
}

impl Traced {
    pub(super) fn new(belongs: Option<Place>) -> Self {
        Self { belongs, stride: 1, ..Self::default() }
    }

    pub(super) fn belongs(&self) -> Option<Place> {
        self.belongs
    }

    /// It trains.
    pub(super) fn started(&mut self) {
        self.started = true;
    }

    /// A piece of work is over.
    pub(super) fn phase(&mut self, phase: &Phase) {
        let name = phase.work.name();
        metrics::PHASE_DURATION.record(phase.took.as_secs_f64(), &[("phase", name)]);
        let Some(belongs) = self.belongs else { return };
        let end_ms = phase.start.0 + phase.took.as_millis() as u64;
        self.last = self.last.max(Timestamp(end_ms));
        match phase.work {
            Work::Load | Work::Prepare => self.ready_ms = Some(end_ms),
            // Of the base alone.
            Work::Evaluate if phase.step == 0 => self.ready_ms = Some(end_ms),
            Work::Evaluate | Work::Checkpoint => {}
        }
        let mut attributes = vec![("lorafleet.trial.step", (phase.step as i64).into())];
        if let Some(four_bits) = phase.four_bits {
            attributes.push(("lorafleet.base.cached", (four_bits == FourBits::Cached).into()));
        }
        let span = Span { name, start_ms: phase.start.0, end_ms, attributes, ..Span::default() };
        if let Some(load) = span.tell(belongs)
            && let Some(FourBits::Quantised(quantising)) = phase.four_bits
        {
            quantise(quantising, end_ms).tell(load);
        }
    }

    /// A point was reported by a device's trial.
    pub(super) fn point(&mut self, point: &MetricPoint, device: &str) {
        for (name, histogram) in [
            (metric::LOSS, &metrics::TRIAL_LOSS),
            (metric::TOKENS_PER_SECOND, &metrics::TOKENS_PER_SECOND),
            (metric::SAMPLES_PER_SECOND, &metrics::SAMPLES_PER_SECOND),
        ] {
            if let Some(value) = point.get(name) {
                histogram.record(value, &[("device", device)]);
            }
        }
        if self.belongs.is_none() {
            return;
        }
        self.last = self.last.max(point.time);
        if self.seen.is_multiple_of(self.stride) {
            self.points.push(point.clone());
        }
        self.seen += 1;
        if self.points.len() > EVENTS {
            let mut kept = 0;
            self.points.retain(|_| {
                kept += 1;
                kept % 2 == 1
            });
            self.stride *= 2;
        }
    }

    /// Nothing more comes of it: tells of its training, once, and why it did not end well if it did not.
    pub(super) fn over(&mut self, error: Option<&str>) {
        if std::mem::take(&mut self.started)
            && let Some(belongs) = self.belongs
        {
            self.training(error).tell(belongs);
        }
    }

    /// Its training: from when it was ready to when the last was heard of it.
    fn training(&self, error: Option<&str>) -> Span {
        let start_ms = self.ready_ms.unwrap_or(self.last.0);
        let events = self.points.iter().map(|point| {
            let mut values = vec![("lorafleet.trial.step".to_string(), point.step as f64)];
            values.extend(
                point
                    .values
                    .iter()
                    .map(|(name, value)| (format!("lorafleet.{}", name.replace('/', ".")), *value)),
            );
            (point.time.0, "step", values)
        });
        let error = error.map(String::from);
        let (events, end_ms) = (events.collect(), self.last.0.max(start_ms));
        Span { name: "train", start_ms, end_ms, events, error, ..Span::default() }
    }
}

/// The quantising of a base, within the load that ended then.
fn quantise(Quantising { start, took, busy, matrices, bytes }: Quantising, load_end_ms: u64) -> Span {
    let attributes = vec![
        ("lorafleet.base.matrices", (matrices as i64).into()),
        ("lorafleet.base.bytes", (bytes as i64).into()),
        ("lorafleet.base.quantising_seconds", busy.as_secs_f64().into()),
    ];
    // Both ends are cut to the millisecond, each for itself.
    let end_ms = (start.0 + took.as_millis() as u64).min(load_end_ms);
    Span { name: "quantise", start_ms: start.0, end_ms, attributes, ..Span::default() }
}

/// An upload, within a span that its calls belong to.
pub(super) async fn upload<E: Display>(
    belongs: Option<Place>,
    work: impl Future<Output = Result<u64, E>>,
) -> Result<(), E> {
    let started = Instant::now();
    let done = within(belongs, "checkpoint.upload", work).await;
    let outcome = if done.is_ok() { "stored" } else { "failed" };
    metrics::CHECKPOINT_UPLOAD_DURATION.record(started.elapsed().as_secs_f64(), &[("outcome", outcome)]);
    if let Ok(bytes) = done {
        metrics::CHECKPOINT_SIZE.record(bytes as f64, &[]);
    }
    done.map(drop)
}

/// A download, within a span that its calls belong to.
pub(super) async fn download<T, E: Display>(
    belongs: Option<Place>,
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    within(belongs, "checkpoint.download", work).await
}

/// A fetch of uploaded data, within a span that its calls belong to.
pub(super) async fn fetch<T, E: Display>(
    belongs: Option<Place>,
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    within(belongs, "data.fetch", work).await
}

async fn within<T, E: Display>(
    belongs: Option<Place>,
    name: &'static str,
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    match belongs {
        Some(belongs) => telemetry::trace::within(belongs, name, work).await,
        // What belongs to no trace would begin one of its own.
        None => work.await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use telemetry::trace::TrialTrace;

    fn phase(work: Work, start: u64, step: u64) -> Phase {
        Phase { work, start: Timestamp(start), took: Duration::from_millis(10), step, four_bits: None }
    }

    #[test]
    fn a_base_is_quantised_within_its_load() {
        let took = Duration::from_micros(1_999_900);
        let busy = Duration::from_millis(1500);
        let quantising = Quantising { start: Timestamp(1000), took, busy, matrices: 21, bytes: 4096 };
        for (load_end_ms, want) in [(5000, 2999), (2998, 2998)] {
            let span = quantise(quantising, load_end_ms);
            assert_eq!((span.name, span.start_ms, span.end_ms), ("quantise", 1000, want));
        }
    }

    #[test]
    fn training_lasts_from_when_it_was_ready_to_the_last_that_was_heard() {
        let point = |time: u64| MetricPoint { step: 1, time: Timestamp(time), values: Vec::new() };
        for (phases, points, want) in [
            // It ended before its first point.
            (vec![(Work::Load, 100, 0), (Work::Prepare, 200, 0)], vec![], (210, 210)),
            (vec![(Work::Prepare, 200, 0), (Work::Evaluate, 300, 0)], vec![400, 500], (310, 500)),
            // Neither a checkpoint nor an evaluation of what was trained is before the first step.
            (
                vec![(Work::Prepare, 200, 4), (Work::Evaluate, 300, 5), (Work::Checkpoint, 600, 5)],
                vec![],
                (210, 610),
            ),
            (vec![(Work::Prepare, 200, 4), (Work::Checkpoint, 600, 5)], vec![300], (210, 610)),
        ] {
            let mut traced = Traced::new(Some(TrialTrace::of("a", 1).attempt(1)));
            phases.iter().for_each(|(work, start, step)| traced.phase(&phase(*work, *start, *step)));
            points.iter().for_each(|time| traced.point(&point(*time), "cpu"));
            let span = traced.training(Some("too much"));
            assert_eq!((span.start_ms, span.end_ms), want, "{phases:?} {points:?}");
            assert_eq!((span.events.len(), span.error.as_deref()), (points.len(), Some("too much")));
        }
    }
}
