//! Traces, metrics and logs by OpenTelemetry, and the frame that LoraFleet's programs share.
//!
//! | module | holds |
//! |---|---|
//! | [`program`] | how a program begins, says why it ends, and ends |
//! | [`settings`] | what the standard `OTEL_*` variables ask for |
//! | `export` | the exporters over OTLP: gRPC and HTTP |
//! | [`log`] | how a line of the log looks; trace ids in it; what is logged, and how that changes |
//! | [`secrets`] | what no log may show |
//! | [`trace`] | the trace of a trial: its ids, and spans that are told once they are over |
//! | [`record`] | lines of a trial's log |
//! | [`metrics`] | every metric, with its unit and its attributes |
//! | `process` | metrics of the process and of tokio |
//! | [`grpc`] | spans, metrics and context of calls, for clients and servers |
//! | [`http`] | `/metrics`, `/healthz`, `/readyz` |
//!
//! Nothing is exported and no thread runs unless a variable or an argument asks for it. What is exported waits in
//! bounded queues: a collector that is away or stands still costs what does not fit them, which is counted, and no time.

mod export;
pub mod grpc;
pub mod http;
pub mod log;
pub mod metrics;
mod process;
pub mod program;
pub mod record;
pub mod secrets;
pub mod settings;
pub mod trace;

pub use log::LogFormat;
pub use program::End;
pub use settings::{Settings, SettingsError};
pub use tracing::Instrument;

use opentelemetry::Key;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::logs::SdkLoggerProvider;
use opentelemetry_sdk::metrics::SdkMeterProvider;
use opentelemetry_sdk::trace::SdkTracerProvider;
use std::backtrace::{Backtrace, BacktraceStatus};
use std::io::Write;
use std::sync::{Mutex, PoisonError, mpsc};
use std::thread;
use std::time::Duration;
use tracing_subscriber::{EnvFilter, reload};

/// The time in which what was not exported yet is, when a program ends. What takes longer is lost.
pub const FLUSH_LIMIT: Duration = Duration::from_secs(3);

/// The variable that says what is logged, in the form of `tracing_subscriber::EnvFilter`: `warn`, `info,coordinator=debug`.
pub const LOG: &str = "LORAFLEET_LOG";

/// What a program asks for.
#[derive(Debug, Clone)]
pub struct Options {
    /// Its name, unless `OTEL_SERVICE_NAME` or `OTEL_RESOURCE_ATTRIBUTES` name it.
    pub service: &'static str,
    /// Its version.
    pub version: &'static str,
    /// What it logs unless [`LOG`] says otherwise.
    pub level: &'static str,
    /// Whether metrics are to be had at `/metrics`.
    pub scraped: bool,
}

/// What runs while a program does. When it is dropped it is [`flush`]ed: on a return, after a signal, and in a panic.
#[derive(Debug)]
#[must_use = "telemetry ends when it is dropped"]
pub struct Telemetry(());

impl Drop for Telemetry {
    fn drop(&mut self) {
        flush();
    }
}

/// What exports, as long as it does.
static EXPORTING: Mutex<Option<Exporting>> = Mutex::new(None);

/// Exports what was not exported yet, within [`FLUSH_LIMIT`], and nothing after that: at a program's end, and before one on
/// which no [`Telemetry`] is dropped.
pub fn flush() {
    // Held to the end: another one that flushes waits for it, and does not end the program meanwhile.
    let mut exporting = EXPORTING.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(exporting) = exporting.take() {
        exporting.end();
    }
}

#[derive(Debug, Default)]
struct Exporting {
    traces: Option<SdkTracerProvider>,
    metrics: Option<SdkMeterProvider>,
    logs: Option<SdkLoggerProvider>,
    /// Moves the exporters' bytes over gRPC.
    runtime: Option<tokio::runtime::Runtime>,
}

/// Sets up the log, and whatever the settings ask for. Once a process.
///
/// # Errors
/// An exporter cannot be made, or it was called before.
pub fn start(options: &Options, settings: &Settings) -> Result<Telemetry, SettingsError> {
    use tracing_subscriber::layer::SubscriberExt;
    use tracing_subscriber::util::SubscriberInitExt;

    grpc::propagate(settings.propagates);
    export::longest(settings.longest_value);
    let mut exporting = Exporting::default();
    let resource = resource(options);
    if settings.exports_over_grpc() {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("telemetry")
            .enable_all()
            .build()
            .map_err(|error| SettingsError::Exporter(error.to_string()))?;
        exporting.runtime = Some(runtime);
    }
    let handle = exporting.runtime.as_ref().map(|runtime| runtime.handle().clone());
    let within = handle.as_ref().map(|handle| handle.enter());
    // First: the others count with it.
    if settings.metrics.is_some() || options.scraped {
        let mut provider = SdkMeterProvider::builder().with_resource(resource.clone());
        if let Some(target) = &settings.metrics {
            provider = provider.with_reader(export::metrics(target)?);
        }
        if options.scraped && !settings.disabled {
            provider = provider.with_reader(http::scraped().map_err(SettingsError::Exporter)?);
        }
        let provider = provider.build();
        opentelemetry::global::set_meter_provider(provider.clone());
        process::observe();
        export::count_from_zero(settings);
        exporting.metrics = Some(provider);
    }
    if let Some(target) = &settings.traces {
        let provider = SdkTracerProvider::builder()
            .with_resource(resource.clone())
            .with_sampler(settings.sampler.clone())
            .with_id_generator(trace::Ids::default())
            .with_span_processor(export::spans(target)?)
            .build();
        trace::enable(&provider, settings.sampler.clone());
        exporting.traces = Some(provider);
    }
    if let Some(target) = &settings.logs {
        let provider = SdkLoggerProvider::builder()
            .with_resource(resource)
            .with_log_processor(export::logs(target)?)
            .build();
        record::enable(&provider);
        exporting.logs = Some(provider);
    }
    drop(within);
    let spans = exporting.traces.as_ref().map(|provider| {
        use opentelemetry::trace::TracerProvider;
        use tracing_subscriber::Layer;
        let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer(trace::SCOPE));
        // The spans of this crate alone: those of libraries tell of their insides.
        layer.with_location(false).with_threads(false).with_tracked_inactivity(false).with_filter(
            tracing_subscriber::filter::filter_fn(|what| what.is_span() && what.target() == trace::TARGET)
                .with_max_level_hint(tracing::Level::INFO),
        )
    });
    let (asked, filter) = filter(options.level);
    let (written, written_handle) = reload::Layer::new(filter.clone());
    let (sent, sent_handle) = reload::Layer::new(export::without_own_noise(filter));
    let exported = exporting.logs.as_ref().map(|provider| {
        use tracing_subscriber::Layer;
        opentelemetry_appender_tracing::layer::OpenTelemetryTracingBridge::new(provider).with_filter(sent)
    });
    let exports = exported.is_some();
    tracing_subscriber::registry()
        .with(log::layer(settings.log_format, written))
        .with(spans)
        .with(exported)
        .try_init()
        .map_err(|error| SettingsError::Exporter(error.to_string()))?;
    let change = move |directives: &str| {
        let filter = EnvFilter::try_new(directives).map_err(|error| error.to_string())?;
        if exports {
            let sent = export::without_own_noise(filter.clone());
            sent_handle.reload(sent).map_err(|error| error.to_string())?;
        }
        written_handle.reload(filter).map_err(|error| error.to_string())
    };
    log::changeable(Box::new(change), asked);
    log_panics();
    settings.unread.iter().for_each(|unread| tracing::warn!("{unread}"));
    *EXPORTING.lock().unwrap_or_else(PoisonError::into_inner) = Some(exporting);
    Ok(Telemetry(()))
}

/// What is logged at the start, as text and as what filters.
fn filter(level: &str) -> (String, EnvFilter) {
    let asked = std::env::var(LOG).ok().filter(|asked| !asked.is_empty());
    let filter = asked.and_then(|asked| Some((asked.clone(), EnvFilter::try_new(asked).ok()?)));
    filter.unwrap_or_else(|| (level.into(), EnvFilter::new(level)))
}

/// Who tells all this. What the environment says goes before.
fn resource(options: &Options) -> Resource {
    let said = Resource::builder().build();
    let mut resource = Resource::builder().with_attributes([
        opentelemetry::KeyValue::new("service.version", options.version),
        opentelemetry::KeyValue::new("process.pid", i64::from(std::process::id())),
    ]);
    // Of Linux; elsewhere OTEL_RESOURCE_ATTRIBUTES may say it.
    if said.get(&Key::new("host.name")).is_none()
        && let Ok(host) = std::fs::read_to_string("/proc/sys/kernel/hostname")
    {
        resource =
            resource.with_attribute(opentelemetry::KeyValue::new("host.name", host.trim().to_string()));
    }
    let name = said.get(&Key::new("service.name")).map(|name| name.to_string()).unwrap_or_default();
    if name.is_empty() || name.starts_with("unknown_service") {
        resource = resource.with_service_name(options.service);
    }
    if said.get(&Key::new("service.instance.id")).is_none() {
        resource = resource
            .with_attribute(opentelemetry::KeyValue::new("service.instance.id", trace::random_instance()));
    }
    resource.build()
}

/// Panics are logged too, so that they are found where the log is. Neither there nor where they are said anyhow do they
/// show a secret.
fn log_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        let text = panic.payload().downcast_ref::<&str>().copied();
        let text = text.or_else(|| panic.payload().downcast_ref::<String>().map(String::as_str));
        let what = text.unwrap_or("no message");
        tracing::error!(place, "panicked: {what}");
        let thread = thread::current();
        let thread = thread.name().unwrap_or("<unnamed>");
        // Whoever reads it may be gone, and a panic within this would end the process.
        let mut stderr = std::io::stderr();
        let _ = writeln!(stderr, "thread '{thread}' panicked at {place}:\n{}", secrets::redact(what));
        // As RUST_BACKTRACE says.
        let backtrace = Backtrace::capture();
        if backtrace.status() == BacktraceStatus::Captured {
            let _ = writeln!(stderr, "{backtrace}");
        }
    }));
}

impl Exporting {
    fn end(self) {
        // Each by its own thread, so that one that waits for its collector does not cost the others' time.
        let (done, ended) = mpsc::channel();
        let Self { traces, metrics, logs, runtime } = self;
        let mut waiting = 0;
        let mut end = |name: &str, shutdown: Box<dyn FnOnce() + Send>| {
            let done = done.clone();
            let thread = thread::Builder::new().name(name.into()).spawn(move || {
                shutdown();
                // The program may have ended.
                let _ = done.send(());
            });
            waiting += usize::from(thread.is_ok());
        };
        if let Some(traces) = traces {
            end("flush traces", Box::new(move || drop(traces.shutdown_with_timeout(FLUSH_LIMIT))));
        }
        if let Some(logs) = logs {
            end("flush logs", Box::new(move || drop(logs.shutdown_with_timeout(FLUSH_LIMIT))));
        }
        if let Some(metrics) = metrics {
            end("flush metrics", Box::new(move || drop(metrics.shutdown_with_timeout(FLUSH_LIMIT))));
        }
        // A sleeping thread is the clock: the limit is one for all.
        if waiting > 0 {
            let _ = thread::Builder::new().name("flush limit".into()).spawn(move || {
                thread::sleep(FLUSH_LIMIT);
                for _ in 0..waiting {
                    let _ = done.send(());
                }
            });
        }
        for _ in 0..waiting {
            let _ = ended.recv();
        }
        if let Some(runtime) = runtime {
            runtime.shutdown_background();
        }
    }
}
