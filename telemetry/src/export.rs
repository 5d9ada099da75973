//! The exporters over OTLP. Each says once that its collector is away, and counts what was lost.

use crate::metrics;
use crate::secrets;
use crate::settings::{Protocol, Settings, SettingsError, Target};
use opentelemetry::logs::{AnyValue, LogRecord, Logger, LoggerProvider, Severity};
use opentelemetry::trace::Status;
use opentelemetry::{InstrumentationScope, KeyValue, Value};
use opentelemetry_http::{Bytes, HttpClient, HttpError, Request, Response};
use opentelemetry_otlp::{
    ExporterBuildError, LogExporter, MetricExporter, SpanExporter, WithHttpConfig, WithTonicConfig,
};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::logs::{
    BatchLogProcessor, LogBatch, LogProcessor, SdkLogRecord, SdkLogger, SdkLoggerProvider,
};
use opentelemetry_sdk::metrics::data::ResourceMetrics;
use opentelemetry_sdk::metrics::exporter::PushMetricExporter;
use opentelemetry_sdk::metrics::{PeriodicReader, Temporality};
use opentelemetry_sdk::trace::{BatchSpanProcessor, SpanData};
use std::borrow::Cow;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;
use tonic::transport::{Certificate, ClientTlsConfig};
use tracing_subscriber::EnvFilter;
use ureq::tls::{RootCerts, TlsConfig};

/// The signals, as their items are counted.
const SPAN: &str = "span";
const LOG: &str = "log";
const METRIC: &str = "metric";
/// The most that a collector's answer is read of.
const LONGEST_ANSWER: u64 = 1 << 20;
/// The time in which a collector answers over HTTP, unless a variable gives another.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

impl From<ExporterBuildError> for SettingsError {
    fn from(error: ExporterBuildError) -> Self {
        Self::Exporter(error.to_string())
    }
}

/// Batches of spans, without secrets and endless texts.
pub(crate) fn spans(target: &Target) -> Result<BatchSpanProcessor, SettingsError> {
    let builder = SpanExporter::builder();
    let inner = match target.protocol {
        Protocol::Grpc => builder.with_tonic().with_tls_config(tls(target)?).build(),
        Protocol::Http => builder.with_http().with_http_client(Http::new(target, "TRACES")?).build(),
    }?;
    Ok(BatchSpanProcessor::builder(Counted::new(inner, SPAN)).build())
}

/// Batches of the log, without secrets and endless texts.
pub(crate) fn logs(target: &Target) -> Result<impl LogProcessor + 'static, SettingsError> {
    let builder = LogExporter::builder();
    let inner = match target.protocol {
        Protocol::Grpc => builder.with_tonic().with_tls_config(tls(target)?).build(),
        Protocol::Http => builder.with_http().with_http_client(Http::new(target, "LOGS")?).build(),
    }?;
    let blank = SdkLoggerProvider::builder().build().logger("");
    Ok(Redacting { inner: BatchLogProcessor::builder(Counted::new(inner, LOG)).build(), blank })
}

/// Metrics, at intervals.
pub(crate) fn metrics(target: &Target) -> Result<PeriodicReader<Counted<MetricExporter>>, SettingsError> {
    let builder = MetricExporter::builder();
    let inner = match target.protocol {
        Protocol::Grpc => builder.with_tonic().with_tls_config(tls(target)?).build(),
        Protocol::Http => builder.with_http().with_http_client(Http::new(target, "METRICS")?).build(),
    }?;
    Ok(PeriodicReader::builder(Counted::new(inner, METRIC)).build())
}

/// Leaves out what the exporters' own libraries say: it would be exported, and said again.
pub(crate) fn without_own_noise(filter: EnvFilter) -> EnvFilter {
    [
        "opentelemetry",
        "opentelemetry_sdk",
        "opentelemetry_otlp",
        "h2",
        "hyper",
        "hyper_util",
        "tonic",
        "tower",
        "ureq",
    ]
    .into_iter()
    .filter_map(|library| format!("{library}=off").parse().ok())
    .fold(filter, EnvFilter::add_directive)
}

fn read(path: &Path) -> Result<Vec<u8>, SettingsError> {
    std::fs::read(path).map_err(|error| SettingsError::Exporter(format!("{}: {error}", path.display())))
}

/// Of an endpoint without `https` it is not used.
fn tls(target: &Target) -> Result<ClientTlsConfig, SettingsError> {
    match &target.certificate {
        None => Ok(ClientTlsConfig::new().with_webpki_roots()),
        Some(path) => Ok(ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(path)?))),
    }
}

/// HTTP by the client that the hub uses, on the exporter's own thread.
#[derive(Debug)]
struct Http(ureq::Agent);

impl Http {
    fn new(target: &Target, signal: &str) -> Result<Self, SettingsError> {
        let mut tls = TlsConfig::builder();
        if let Some(path) = &target.certificate {
            let pem = read(path)?;
            let broken = |error| SettingsError::Exporter(format!("{}: {error}", path.display()));
            let mut certificates = Vec::new();
            for item in ureq::tls::parse_pem(&pem) {
                if let ureq::tls::PemItem::Certificate(certificate) = item.map_err(broken)? {
                    certificates.push(certificate);
                }
            }
            tls = tls.root_certs(RootCerts::new_with_certs(&certificates));
        }
        let limit = [format!("OTEL_EXPORTER_OTLP_{signal}_TIMEOUT"), "OTEL_EXPORTER_OTLP_TIMEOUT".into()]
            .iter()
            .find_map(|name| std::env::var(name).ok()?.parse().ok())
            .map_or(ANSWER_LIMIT, Duration::from_millis);
        let config = ureq::Agent::config_builder()
            .timeout_global(Some(limit))
            .http_status_as_error(false)
            .tls_config(tls.build())
            .build();
        Ok(Self(config.into()))
    }
}

#[tonic::async_trait]
impl HttpClient for Http {
    async fn send_bytes(&self, request: Request<Bytes>) -> Result<Response<Bytes>, HttpError> {
        let (head, body) = request.into_parts();
        let answer = self.0.run(Request::from_parts(head, body.to_vec()))?;
        let (head, mut body) = answer.into_parts();
        let body = body.with_config().limit(LONGEST_ANSWER).read_to_vec()?;
        Ok(Response::from_parts(head, body.into()))
    }
}

/// Has the counts of what is exported begin: what only begins with its first one cannot be seen to grow by it.
pub(crate) fn count_from_zero(settings: &Settings) {
    let signals = [(SPAN, &settings.traces), (LOG, &settings.logs), (METRIC, &settings.metrics)];
    for (signal, _) in signals.into_iter().filter(|(_, target)| target.is_some()) {
        for outcome in ["exported", "failed"] {
            metrics::TELEMETRY_EXPORTED.add(0.0, &[("signal", signal), ("outcome", outcome)]);
        }
    }
}

/// An exporter whose losses are counted and told of: once when they begin, and once when they are over.
#[derive(Debug)]
pub(crate) struct Counted<E> {
    inner: E,
    signal: &'static str,
    away: AtomicBool,
}

impl<E> Counted<E> {
    fn new(inner: E, signal: &'static str) -> Self {
        Self { inner, signal, away: AtomicBool::new(false) }
    }

    fn note(&self, items: usize, result: OTelSdkResult) -> OTelSdkResult {
        let failed = result.is_err();
        match (&result, self.away.swap(failed, Ordering::Relaxed)) {
            (Err(error), false) => {
                let why = secrets::redact(&error.to_string()).into_owned();
                tracing::warn!(
                    signal = self.signal,
                    why,
                    "telemetry does not reach its collector; what is lost is counted"
                );
            }
            (Ok(()), true) => tracing::info!(signal = self.signal, "telemetry reaches its collector again"),
            _ => {}
        }
        let outcome = if failed { "failed" } else { "exported" };
        metrics::TELEMETRY_EXPORTED.add(items as f64, &[("signal", self.signal), ("outcome", outcome)]);
        result
    }
}

impl<E: opentelemetry_sdk::trace::SpanExporter> opentelemetry_sdk::trace::SpanExporter for Counted<E> {
    async fn export(&self, mut batch: Vec<SpanData>) -> OTelSdkResult {
        batch.iter_mut().for_each(clean);
        let items = batch.len();
        self.note(items, self.inner.export(batch).await)
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

impl<E: opentelemetry_sdk::logs::LogExporter> opentelemetry_sdk::logs::LogExporter for Counted<E> {
    async fn export(&self, batch: LogBatch<'_>) -> OTelSdkResult {
        let items = batch.iter().count();
        self.note(items, self.inner.export(batch).await)
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

impl<E: PushMetricExporter> PushMetricExporter for Counted<E> {
    async fn export(&self, batch: &ResourceMetrics) -> OTelSdkResult {
        self.note(1, self.inner.export(batch).await)
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn temporality(&self) -> Temporality {
        self.inner.temporality()
    }
}

/// Characters of a text that is exported, at most. Of more, such as an error that quotes all it was given, a collector
/// would refuse the whole batch.
static LONGEST: AtomicUsize = AtomicUsize::new(0);

/// Lets texts be so long. It is known before the first is exported.
pub(crate) fn longest(characters: usize) {
    LONGEST.store(characters, Ordering::Relaxed);
}

/// A text as it may be exported, without secrets and cut off where it is too long, if it may not as it is.
fn fit(text: &str) -> Option<String> {
    cut(secrets::redact(text), LONGEST.load(Ordering::Relaxed))
}

fn cut(text: Cow<'_, str>, longest: usize) -> Option<String> {
    // A character is a byte or more.
    let end = if text.len() > longest { text.char_indices().nth(longest) } else { None };
    match (end, text) {
        (Some((end, _)), text) => Some(text[..end].to_string()),
        (None, Cow::Owned(clean)) => Some(clean),
        (None, Cow::Borrowed(_)) => None,
    }
}

/// Makes the texts of a span fit: why it failed, and its attributes and its events'.
fn clean(span: &mut SpanData) {
    if let Status::Error { description } = &mut span.status
        && let Some(clean) = fit(description)
    {
        *description = clean.into();
    }
    let of_events = span.events.events.iter_mut().flat_map(|event| &mut event.attributes);
    for KeyValue { value, .. } in span.attributes.iter_mut().chain(of_events) {
        if let Value::String(text) = value
            && let Some(clean) = fit(text.as_str())
        {
            *value = clean.into();
        }
    }
}

/// Makes the texts of what is logged fit before it waits to be exported.
#[derive(Debug)]
struct Redacting<P> {
    inner: P,
    /// Makes records anew.
    blank: SdkLogger,
}

impl<P: LogProcessor> LogProcessor for Redacting<P> {
    fn emit(&self, record: &mut SdkLogRecord, scope: &InstrumentationScope) {
        let text = |value: &AnyValue| match value {
            AnyValue::String(text) => fit(text.as_str()),
            _ => None,
        };
        if let Some(clean) = record.body().and_then(text) {
            record.set_body(AnyValue::from(clean));
        }
        let attributes = record.attributes_iter();
        let clean: Vec<_> = attributes.filter_map(|(key, value)| Some((key.clone(), text(value)?))).collect();
        if clean.is_empty() {
            return self.inner.emit(record, scope);
        }
        // An attribute cannot be replaced: a record with one that did not fit is written again.
        let mut again = self.blank.create_log_record();
        if let Some(body) = record.body() {
            again.set_body(body.clone());
        }
        if let Some(name) = record.event_name() {
            again.set_event_name(name);
        }
        if let (Some(number), Some(text)) = (record.severity_number(), record.severity_text()) {
            again.set_severity_number(number);
            again.set_severity_text(text);
        }
        if let Some(time) = record.timestamp() {
            again.set_timestamp(time);
        }
        if let Some(time) = record.observed_timestamp() {
            again.set_observed_timestamp(time);
        }
        if let Some(target) = record.target() {
            again.set_target(target.clone());
        }
        if let Some(trace) = record.trace_context() {
            again.set_trace_context(trace.trace_id, trace.span_id, trace.trace_flags);
        }
        for (key, value) in record.attributes_iter() {
            match clean.iter().find(|(other, _)| other == key) {
                Some((_, text)) => again.add_attribute(key.clone(), text.clone()),
                None => again.add_attribute(key.clone(), value.clone()),
            }
        }
        self.inner.emit(&mut again, scope);
    }

    fn force_flush(&self) -> OTelSdkResult {
        self.inner.force_flush()
    }

    fn shutdown_with_timeout(&self, timeout: Duration) -> OTelSdkResult {
        self.inner.shutdown_with_timeout(timeout)
    }

    fn event_enabled(&self, level: Severity, target: &str, name: Option<&str>) -> bool {
        self.inner.event_enabled(level, target, name)
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.inner.set_resource(resource);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_too_long_is_cut_off_at_a_character() {
        for (text, longest, want) in [
            ("short", 5, None),
            ("longer", 5, Some("longe")),
            ("größer", 3, Some("grö")),
            // More bytes than characters.
            ("größer", 6, None),
            ("", 0, None),
        ] {
            assert_eq!(cut(Cow::Borrowed(text), longest).as_deref(), want, "{text}");
        }
        assert_eq!(cut(Cow::Owned("clean".into()), 9).as_deref(), Some("clean"));
    }
}
