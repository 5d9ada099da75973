//! What the standard variables ask for (OpenTelemetry specification, "Environment Variable Specification"). What this
//! program lacks is refused by name.
//!
//! | variable | is read by |
//! |---|---|
//! | `OTEL_SDK_DISABLED`, `OTEL_{TRACES,METRICS,LOGS}_EXPORTER`, `OTEL_TRACES_SAMPLER[_ARG]`, `OTEL_PROPAGATORS`, `OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT`, protocols and certificates | here |
//! | endpoints, headers, timeouts, compression, `…_INSECURE`, temporality | `opentelemetry-otlp` |
//! | `OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES`, `OTEL_BSP_*`, `OTEL_BLRP_*`, `OTEL_METRIC_EXPORT_INTERVAL`, span limits | `opentelemetry_sdk` |

use crate::log::LogFormat;
use opentelemetry_sdk::trace::Sampler;
use std::path::PathBuf;

/// Where `LORAFLEET_LOG_FORMAT` is read.
const LOG_FORMAT: &str = "LORAFLEET_LOG_FORMAT";

/// Where it is read how long a text may be that is exported.
const LONGEST_VALUE: &str = "OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT";

/// Characters of such a text unless it is given. The specification has no bound there, but collectors have one for a batch.
const LONGEST: usize = 16 * 1024;

/// What is read as a whole number, here or by the libraries. They take their defaults for what is none, and say nothing.
const NUMBERS: [&str; 17] = [
    LONGEST_VALUE,
    "OTEL_BLRP_EXPORT_TIMEOUT",
    "OTEL_BLRP_MAX_EXPORT_BATCH_SIZE",
    "OTEL_BLRP_MAX_QUEUE_SIZE",
    "OTEL_BLRP_SCHEDULE_DELAY",
    "OTEL_BSP_EXPORT_TIMEOUT",
    "OTEL_BSP_MAX_EXPORT_BATCH_SIZE",
    "OTEL_BSP_MAX_QUEUE_SIZE",
    "OTEL_BSP_SCHEDULE_DELAY",
    "OTEL_EXPORTER_OTLP_LOGS_TIMEOUT",
    "OTEL_EXPORTER_OTLP_METRICS_TIMEOUT",
    "OTEL_EXPORTER_OTLP_TIMEOUT",
    "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT",
    "OTEL_METRIC_EXPORT_INTERVAL",
    "OTEL_SPAN_ATTRIBUTE_COUNT_LIMIT",
    "OTEL_SPAN_EVENT_COUNT_LIMIT",
    "OTEL_SPAN_LINK_COUNT_LIMIT",
];

/// How a signal is exported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// OTLP over gRPC.
    Grpc,
    /// OTLP as protobuf over HTTP.
    Http,
}

/// Where a signal goes; the rest of it is read by the exporter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// How.
    pub protocol: Protocol,
    /// A file of certificates (PEM) that the collector's is signed by, instead of the public ones.
    pub certificate: Option<PathBuf>,
}

/// What the environment asks for.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Whether OpenTelemetry is switched off altogether.
    pub disabled: bool,
    /// Where traces go.
    pub traces: Option<Target>,
    /// Where metrics go.
    pub metrics: Option<Target>,
    /// Where logs go.
    pub logs: Option<Target>,
    /// Which traces are kept.
    pub sampler: Sampler,
    /// Whether calls take their caller's context along.
    pub propagates: bool,
    /// Characters of a text that is exported, at most: of an attribute's value, why a span failed, what a log record says.
    pub longest_value: usize,
    /// What is no number where one is wanted: the default is taken instead, as the specification has it.
    pub unread: Vec<SettingsError>,
    /// How the log looks on standard error.
    pub log_format: LogFormat,
}

/// A setting that cannot be followed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SettingsError {
    /// A variable.
    #[error("{variable}={value}: {problem}")]
    Variable {
        /// Its name.
        variable: String,
        /// What it says.
        value: String,
        /// What is wrong with it, and what it may be.
        problem: String,
    },
    /// An exporter cannot be made.
    #[error("telemetry: {0}")]
    Exporter(String),
}

impl Settings {
    /// Reads the environment.
    ///
    /// # Errors
    /// It asks for what this program lacks.
    pub fn from_env() -> Result<Self, SettingsError> {
        // A variable that is empty counts as none.
        Self::read(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    /// Of what the environment asks for the log alone, exported too. What is odd in it is said by the program that this process
    /// is a part of.
    ///
    /// # Errors
    /// As [`Settings::from_env`]'s.
    pub fn logs_only() -> Result<Self, SettingsError> {
        Ok(Self { traces: None, metrics: None, unread: Vec::new(), ..Self::from_env()? })
    }

    fn with_log(log_format: LogFormat) -> Self {
        Self {
            disabled: true,
            traces: None,
            metrics: None,
            logs: None,
            sampler: Sampler::AlwaysOff,
            propagates: false,
            longest_value: LONGEST,
            unread: Vec::new(),
            log_format,
        }
    }

    /// Reads from anywhere.
    ///
    /// # Errors
    /// As [`Settings::from_env`]'s.
    pub fn read(of: impl Fn(&str) -> Option<String>) -> Result<Self, SettingsError> {
        let log_format = log_format(&of)?;
        if of("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true")) {
            return Ok(Self::with_log(log_format));
        }
        let mut unread = Vec::new();
        for name in NUMBERS {
            if let Some(value) = of(name).filter(|value| value.parse::<u32>().is_err()) {
                unread.push(refused(name, &value, "it is no whole number; the default is taken"));
            }
        }
        Ok(Self {
            disabled: false,
            traces: target(&of, "TRACES")?,
            metrics: target(&of, "METRICS")?,
            logs: target(&of, "LOGS")?,
            sampler: sampler(&of, &mut unread)?,
            propagates: propagates(&of)?,
            longest_value: of(LONGEST_VALUE).and_then(|value| value.parse().ok()).unwrap_or(LONGEST),
            unread,
            log_format,
        })
    }

    /// Whether any signal goes over gRPC.
    pub(crate) fn exports_over_grpc(&self) -> bool {
        let all = [&self.traces, &self.metrics, &self.logs];
        all.into_iter().flatten().any(|target| target.protocol == Protocol::Grpc)
    }
}

/// Where signals go that are exported, each address once.
///
/// # Errors
/// As [`Settings::from_env`]'s.
pub fn endpoints(of: impl Fn(&str) -> Option<String>) -> Result<Vec<String>, SettingsError> {
    let of = |name: &str| of(name).filter(|value| !value.is_empty());
    let mut endpoints = Vec::new();
    if of("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true")) {
        return Ok(endpoints);
    }
    for signal in ["TRACES", "METRICS", "LOGS"] {
        let Some(target) = target(&of, signal)? else { continue };
        // The specification's.
        let usual = match target.protocol {
            Protocol::Grpc => "http://localhost:4317",
            Protocol::Http => "http://localhost:4318",
        };
        let endpoint = either(&of, signal, "ENDPOINT").map_or_else(|| usual.into(), |(_, endpoint)| endpoint);
        if !endpoints.contains(&endpoint) {
            endpoints.push(endpoint);
        }
    }
    Ok(endpoints)
}

fn refused(variable: &str, value: &str, problem: impl Into<String>) -> SettingsError {
    SettingsError::Variable { variable: variable.into(), value: value.into(), problem: problem.into() }
}

fn log_format(of: &impl Fn(&str) -> Option<String>) -> Result<LogFormat, SettingsError> {
    match of(LOG_FORMAT).as_deref() {
        None | Some("auto") => Ok(LogFormat::Auto),
        Some("text") => Ok(LogFormat::Text),
        Some("json") => Ok(LogFormat::Json),
        Some(other) => Err(refused(LOG_FORMAT, other, "it may be auto, text or json")),
    }
}

/// A signal's variable, or the one for all signals.
fn either(of: &impl Fn(&str) -> Option<String>, signal: &str, what: &str) -> Option<(String, String)> {
    let own = format!("OTEL_EXPORTER_OTLP_{signal}_{what}");
    let all = format!("OTEL_EXPORTER_OTLP_{what}");
    [own, all].into_iter().find_map(|name| Some((name.clone(), of(&name)?)))
}

/// Where a signal goes. The specification exports by default to a collector on this machine; here one has to ask, by an
/// endpoint or an exporter.
fn target(of: &impl Fn(&str) -> Option<String>, signal: &str) -> Result<Option<Target>, SettingsError> {
    let exporter = format!("OTEL_{signal}_EXPORTER");
    let asked = match of(&exporter).as_deref() {
        Some("otlp") => true,
        Some("none") => false,
        None => either(of, signal, "ENDPOINT").is_some(),
        Some(other) => {
            let instead =
                if other == "prometheus" { "; metrics are scraped where --http serves them" } else { "" };
            return Err(refused(&exporter, other, format!("it may be otlp or none{instead}")));
        }
    };
    if !asked {
        return Ok(None);
    }
    let protocol = match either(of, signal, "PROTOCOL") {
        None => Protocol::Http,
        Some((name, value)) => match value.as_str() {
            "grpc" => Protocol::Grpc,
            "http/protobuf" => Protocol::Http,
            other => return Err(refused(&name, other, "it may be grpc or http/protobuf")),
        },
    };
    for what in ["CLIENT_CERTIFICATE", "CLIENT_KEY"] {
        if let Some((name, value)) = either(of, signal, what) {
            return Err(refused(&name, &value, "client certificates are not supported"));
        }
    }
    let certificate = either(of, signal, "CERTIFICATE").map(|(_, path)| path.into());
    if let Some((name, value)) = either(of, signal, "COMPRESSION")
        && value != "none"
    {
        return Err(refused(&name, &value, "what is exported is not compressed"));
    }
    Ok(Some(Target { protocol, certificate }))
}

/// Which traces are kept.
fn sampler(
    of: &impl Fn(&str) -> Option<String>,
    unread: &mut Vec<SettingsError>,
) -> Result<Sampler, SettingsError> {
    let (name, argument) = ("OTEL_TRACES_SAMPLER", "OTEL_TRACES_SAMPLER_ARG");
    let mut ratio = || {
        let said = of(argument).unwrap_or_else(|| "1".into());
        let ratio = said.parse::<f64>().ok().filter(|ratio| (0.0..=1.0).contains(ratio));
        if ratio.is_none() {
            unread.push(refused(argument, &said, "it is no number from 0 to 1; all traces are kept"));
        }
        Sampler::TraceIdRatioBased(ratio.unwrap_or(1.0))
    };
    let parent_based = |root: Sampler| Sampler::ParentBased(Box::new(root));
    Ok(match of(name).as_deref() {
        None | Some("parentbased_always_on") => parent_based(Sampler::AlwaysOn),
        Some("parentbased_always_off") => parent_based(Sampler::AlwaysOff),
        Some("parentbased_traceidratio") => parent_based(ratio()),
        Some("always_on") => Sampler::AlwaysOn,
        Some("always_off") => Sampler::AlwaysOff,
        Some("traceidratio") => ratio(),
        Some(other) => {
            let known = "always_on, always_off, traceidratio, or one of these after parentbased_";
            return Err(refused(name, other, format!("it may be {known}")));
        }
    })
}

/// Whether context travels, as W3C's `traceparent`. There is no baggage to travel.
fn propagates(of: &impl Fn(&str) -> Option<String>) -> Result<bool, SettingsError> {
    let Some(value) = of("OTEL_PROPAGATORS") else { return Ok(true) };
    let names: Vec<_> = value.split(',').map(str::trim).collect();
    match names.iter().all(|name| ["tracecontext", "baggage", "none"].contains(name)) {
        true => Ok(names.contains(&"tracecontext")),
        false => Err(refused("OTEL_PROPAGATORS", &value, "it may be tracecontext, baggage or none")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Settings, SettingsError> {
        Settings::read(|name| {
            variables.iter().find(|(other, _)| *other == name).map(|(_, value)| value.to_string())
        })
    }

    #[test]
    fn what_is_exported() {
        let endpoint = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318");
        for (variables, want) in [
            (vec![], [false; 3]),
            (vec![endpoint], [true; 3]),
            (vec![endpoint, ("OTEL_SDK_DISABLED", "true")], [false; 3]),
            (vec![endpoint, ("OTEL_LOGS_EXPORTER", "none")], [true, true, false]),
            (vec![("OTEL_TRACES_EXPORTER", "otlp")], [true, false, false]),
            (vec![("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "http://a")], [false, true, false]),
        ] {
            let found = read(&variables).unwrap();
            let on = [found.traces, found.metrics, found.logs].map(|target| target.is_some());
            assert_eq!(on, want, "{variables:?}");
        }
    }

    #[test]
    fn a_signal_has_its_own_settings() {
        let found = read(&[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4317"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
            ("OTEL_EXPORTER_OTLP_LOGS_PROTOCOL", "http/protobuf"),
            ("OTEL_EXPORTER_OTLP_CERTIFICATE", "ca.pem"),
        ])
        .unwrap();
        let target = |protocol| Some(Target { protocol, certificate: Some("ca.pem".into()) });
        assert_eq!(found.traces, target(Protocol::Grpc));
        assert_eq!(found.logs, target(Protocol::Http));
        assert!(found.exports_over_grpc());
    }

    #[test]
    fn what_is_lacking_is_refused_by_name() {
        let on = ("OTEL_TRACES_EXPORTER", "otlp");
        for variable in [
            ("OTEL_METRICS_EXPORTER", "prometheus"),
            ("OTEL_TRACES_EXPORTER", "zipkin"),
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"),
            ("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip"),
            ("OTEL_EXPORTER_OTLP_CLIENT_KEY", "key.pem"),
            ("OTEL_TRACES_SAMPLER", "xray"),
            ("OTEL_PROPAGATORS", "b3"),
            ("LORAFLEET_LOG_FORMAT", "xml"),
        ] {
            let error = read(&[variable, on]).unwrap_err().to_string();
            assert!(error.starts_with(&format!("{}={}: ", variable.0, variable.1)), "{error}");
        }
    }

    #[test]
    fn what_is_no_number_is_said_and_the_default_taken() {
        let ratio = ("OTEL_TRACES_SAMPLER", "traceidratio");
        for (name, value, good) in [
            ("OTEL_BSP_MAX_QUEUE_SIZE", "lots", false),
            ("OTEL_BSP_MAX_QUEUE_SIZE", "16", true),
            ("OTEL_METRIC_EXPORT_INTERVAL", "60s", false),
            ("OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT", "long", false),
            ("OTEL_EXPORTER_OTLP_LOGS_TIMEOUT", "-1", false),
            ("OTEL_TRACES_SAMPLER_ARG", "2", false),
            ("OTEL_TRACES_SAMPLER_ARG", "0.5", true),
        ] {
            let unread = read(&[(name, value), ratio]).unwrap().unread;
            let said: Vec<_> = unread.iter().map(ToString::to_string).collect();
            assert_eq!(said.is_empty(), good, "{said:?}");
            assert!(said.iter().all(|said| said.starts_with(&format!("{name}={value}: "))), "{said:?}");
        }
    }

    #[test]
    fn context_travels_unless_it_shall_not() {
        for (value, want) in [
            (None, true),
            (Some("tracecontext,baggage"), true),
            (Some("baggage"), false),
            (Some("none"), false),
        ] {
            let variables: Vec<_> = value.map(|value| ("OTEL_PROPAGATORS", value)).into_iter().collect();
            assert_eq!(read(&variables).unwrap().propagates, want, "{value:?}");
        }
    }
}
