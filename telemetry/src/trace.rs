//! The trace of a trial. Its ids follow from the trial's id, so that whoever has the trial's record knows them: a
//! coordinator that starts again, or another one that leads, tells the same trace. A span is told once it is over, from the
//! hours in the record, and never lies open in a process that may end.
//!
//! ```text
//! trial                      from when the search proposed it to its end; linked to the command that submitted the sweep
//! ├─ queue                   until a device was granted; one for each attempt
//! └─ attempt                 from the grant to the end of the assignment; carried to the agent
//!    ├─ place                until the assignment was durable, and given to the agent's stream
//!    ├─ data.fetch           of uploaded data, with the calls in it on both sides
//!    ├─ checkpoint.download  of what to go on from
//!    ├─ load                 of the base, unless it was in memory
//!    │  └─ quantise          from its first matrix to its last, unless the agent's cache has it in 4 bits
//!    ├─ evaluate             each
//!    ├─ checkpoint.upload    each
//!    └─ train                from when it was ready to the last that was heard of it; reported steps are its events
//! ```

pub use opentelemetry::Value;
use opentelemetry::trace::{
    Event, Link, SpanContext, SpanId, SpanKind, Status, TraceContextExt, TraceFlags, TraceId, TraceState,
    Tracer, TracerProvider,
};
use opentelemetry::{Context, KeyValue};
use opentelemetry_sdk::trace::{
    IdGenerator, RandomIdGenerator, Sampler, SamplingDecision, SdkTracer, SdkTracerProvider, ShouldSample,
};
use sha2::{Digest, Sha256};
use std::cell::Cell;
use std::fmt;
use std::str::FromStr;
use std::sync::OnceLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tracing::Instrument;

/// The name under which spans are told.
pub(crate) const SCOPE: &str = "lorafleet";
/// The target of the spans of this crate, by which they are told from those of libraries.
pub(crate) const TARGET: &str = "lorafleet_trace";

/// What makes spans, once traces are exported.
static EXPORT: OnceLock<(SdkTracer, Sampler)> = OnceLock::new();

pub(crate) fn enable(provider: &SdkTracerProvider, sampler: Sampler) {
    // Once a process.
    let _ = EXPORT.set((provider.tracer(SCOPE), sampler));
}

/// A name for one run of a program.
pub(crate) fn random_instance() -> String {
    RandomIdGenerator::default().new_trace_id().to_string()
}

thread_local! {
    /// The ids that the next span on this thread gets.
    static NEXT: Cell<Option<(TraceId, SpanId)>> = const { Cell::new(None) };
}

/// Ids that were decided elsewhere, and random ones otherwise.
#[derive(Debug, Default)]
pub(crate) struct Ids(RandomIdGenerator);

impl IdGenerator for Ids {
    fn new_trace_id(&self) -> TraceId {
        // A span id is asked for first.
        NEXT.take().map_or_else(|| self.0.new_trace_id(), |(trace, _)| trace)
    }

    fn new_span_id(&self) -> SpanId {
        NEXT.get().map_or_else(|| self.0.new_span_id(), |(_, span)| span)
    }
}

/// A place in a trace, as it travels: W3C's `traceparent`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    trace: TraceId,
    span: SpanId,
    sampled: bool,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00-{}-{}-{:02x}", self.trace, self.span, u8::from(self.sampled))
    }
}

/// A text that is no `traceparent`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no traceparent")]
pub struct NoPlace(String);

impl FromStr for Place {
    type Err = NoPlace;

    fn from_str(text: &str) -> Result<Self, NoPlace> {
        let bad = || NoPlace(text.chars().take(60).collect());
        let mut parts = text.split('-');
        let (Some(version), Some(trace), Some(span), Some(flags)) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(bad());
        };
        let lower = |part: &str, length| {
            part.len() == length && part.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
        };
        let well_formed =
            lower(version, 2) && version != "ff" && lower(trace, 32) && lower(span, 16) && lower(flags, 2);
        // A later version may have more parts.
        if !well_formed || (version == "00" && parts.next().is_some()) {
            return Err(bad());
        }
        let trace = TraceId::from_hex(trace).map_err(|_| bad())?;
        let span = SpanId::from_hex(span).map_err(|_| bad())?;
        let flags = u8::from_str_radix(flags, 16).map_err(|_| bad())?;
        if trace == TraceId::INVALID || span == SpanId::INVALID {
            return Err(bad());
        }
        Ok(Self { trace, span, sampled: flags & 1 == 1 })
    }
}

impl Place {
    fn span_context(self) -> SpanContext {
        let flags = if self.sampled { TraceFlags::SAMPLED } else { TraceFlags::default() };
        SpanContext::new(self.trace, self.span, flags, true, TraceState::NONE)
    }

    pub(crate) fn context(self) -> Context {
        Context::new().with_remote_span_context(self.span_context())
    }

    /// Where the current span stands, if there is one.
    pub fn current() -> Option<Self> {
        Self::of(Context::current().span().span_context())
    }

    fn of(ids: &SpanContext) -> Option<Self> {
        ids.is_valid().then(|| Self { trace: ids.trace_id(), span: ids.span_id(), sampled: ids.is_sampled() })
    }
}

/// A trial's trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TrialTrace(TraceId);

impl TrialTrace {
    /// The trace of a sweep's trial. `request_id` is the UUID of the sweep's submission: no two sweeps of any fleets have
    /// the same.
    pub fn of(request_id: &str, number: u32) -> Self {
        let digest = Sha256::new().chain_update(request_id).chain_update(number.to_be_bytes()).finalize();
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&digest[..16]);
        Self(TraceId::from_bytes(bytes))
    }

    /// The trace of this id.
    ///
    /// # Errors
    /// It is none.
    pub fn parse(id: &str) -> Result<Self, NoPlace> {
        TraceId::from_hex(id).map(Self).map_err(|_| NoPlace(id.chars().take(60).collect()))
    }

    /// 32 hexadecimal digits.
    pub fn id(self) -> String {
        self.0.to_string()
    }

    /// The span of one attempt; 0 is the whole trial.
    fn span(self, attempt: u32) -> SpanId {
        let digest =
            Sha256::new().chain_update(self.0.to_bytes()).chain_update(attempt.to_be_bytes()).finalize();
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&digest[..8]);
        // No hash that anybody will see is 0; if one were, the span would not be told.
        SpanId::from_bytes(bytes)
    }

    /// Whether it is kept. Where traces are not exported, others may keep theirs.
    fn sampled(self) -> bool {
        EXPORT.get().is_none_or(|(_, sampler)| {
            let result = sampler.should_sample(None, self.0, "trial", &SpanKind::Internal, &[], &[]);
            result.decision == SamplingDecision::RecordAndSample
        })
    }

    /// The whole trial, as the parent of what is told of it.
    pub fn whole(self) -> Place {
        Place { trace: self.0, span: self.span(0), sampled: self.sampled() }
    }

    /// An attempt, as the parent of what its agent tells.
    pub fn attempt(self, attempt: u32) -> Place {
        Place { span: self.span(attempt), ..self.whole() }
    }
}

/// Something that took its time and is over.
#[derive(Debug, Default)]
pub struct Span {
    /// What it was.
    pub name: &'static str,
    /// When it began, in milliseconds since the Unix epoch.
    pub start_ms: u64,
    /// When it ended.
    pub end_ms: u64,
    /// More about it.
    pub attributes: Vec<(&'static str, Value)>,
    /// What happened in it: when, and what.
    pub events: Vec<Happened>,
    /// What else led to it.
    pub link: Option<Place>,
    /// Why it did not end well.
    pub error: Option<String>,
}

/// Something in a span: when, in milliseconds since the Unix epoch, its name, and its numbers by their names.
pub type Happened = (u64, &'static str, Vec<(String, f64)>);

/// An hour, from milliseconds since the Unix epoch.
pub(crate) fn at(ms: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_millis(ms)
}

impl Span {
    /// Tells of it below `parent`; the answer is where it stands, for what is told below it. Where traces are not exported it
    /// costs nothing and stands nowhere.
    pub fn tell(self, parent: Place) -> Option<Place> {
        self.tell_as(None, Some(parent))
    }

    /// Tells of it as the span of a place that others were told of already, below `parent` or at the top of its trace.
    pub fn tell_at(self, own: Place, parent: Option<Place>) {
        self.tell_as(Some(own), parent);
    }

    fn tell_as(self, own: Option<Place>, parent: Option<Place>) -> Option<Place> {
        use opentelemetry::trace::Span as _;
        let (tracer, _) = EXPORT.get()?;
        let attributes = self.attributes.into_iter().map(|(key, value)| KeyValue::new(key, value));
        let events = self.events.into_iter().map(|(time, name, values)| {
            let values = values.into_iter().map(|(name, value)| KeyValue::new(name, value)).collect();
            Event::new(name, at(time), values, 0)
        });
        let links = self.link.map(|place| Link::new(place.span_context(), Vec::new(), 0));
        let builder = tracer
            .span_builder(self.name)
            .with_kind(SpanKind::Internal)
            .with_start_time(at(self.start_ms))
            .with_attributes(attributes)
            .with_events(events.collect())
            .with_links(links.into_iter().collect());
        let parent = parent.map_or_else(Context::new, Place::context);
        NEXT.set(own.map(|own| (own.trace, own.span)));
        let mut span = builder.start_with_context(tracer, &parent);
        NEXT.set(None);
        if let Some(error) = self.error {
            span.set_status(Status::error(error));
        }
        span.end_with_timestamp(at(self.end_ms));
        Place::of(span.span_context())
    }
}

/// Works at a place, if there is one: what is logged meanwhile has its ids.
pub fn at_place<T>(place: Option<Place>, work: impl FnOnce() -> T) -> T {
    let _here = place.map(|place| place.context().attach());
    work()
}

/// The span of a command of a person, which all that it calls belongs to.
pub fn command(name: &'static str) -> tracing::Span {
    tracing::info_span!(target: TARGET, "command", otel.name = name, otel.status_description = tracing::field::Empty)
}

/// A span of something that is about to happen, below a place.
pub fn below(parent: Option<Place>, name: &'static str) -> tracing::Span {
    use tracing_opentelemetry::OpenTelemetrySpanExt;
    let span = tracing::info_span!(target: TARGET, "work", otel.name = name, otel.status_description = tracing::field::Empty);
    if let Some(parent) = parent {
        // Where traces are not exported there is nothing to be set.
        let _ = span.set_parent(parent.context());
    }
    span
}

/// Does work within a span below a place, which its calls belong to and what it logs. Where traces are not exported they
/// belong to the place itself: whom it calls may export theirs.
///
/// # Errors
/// The work's, which the span tells of.
pub async fn within<T, E: fmt::Display>(
    place: Place,
    name: &'static str,
    work: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    use opentelemetry::context::FutureExt;
    let span = below(Some(place), name);
    let done = work.instrument(span.clone()).with_context(place.context()).await;
    if let Err(error) = &done {
        failed(&span, &error.to_string());
    }
    done
}

/// Says that what a span of [`command`] or [`below`] tells of did not end well, and why.
pub fn failed(span: &tracing::Span, why: &str) {
    // It makes the span's status an error.
    span.record("otel.status_description", why);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_travels_as_text() {
        let text = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
        assert_eq!(text.parse::<Place>().unwrap().to_string(), text);
        let later = "01-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00-more";
        assert!(!later.parse::<Place>().unwrap().sampled);
        for bad in [
            "",
            "00",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b716920333é-01",
        ] {
            assert!(bad.parse::<Place>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_trials_trace_is_its_own_and_stays() {
        let (a, b) = (TrialTrace::of("6f1c0c0e", 1), TrialTrace::of("6f1c0c0e", 2));
        assert_ne!(a, b);
        assert_ne!(a, TrialTrace::of("6f1c0c0f", 1));
        assert_eq!(TrialTrace::parse(&a.id()), Ok(a));
        assert_eq!(a.attempt(2), TrialTrace::parse(&a.id()).unwrap().attempt(2));
        assert_ne!(a.attempt(1).span, a.attempt(2).span);
        assert_eq!(a.attempt(1).trace, a.whole().trace);
        assert_eq!(a.attempt(1).to_string().parse(), Ok(a.attempt(1)));
    }
}
