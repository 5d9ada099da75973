//! Lines of a log that is kept elsewhere, a trial's: each is exported once, whatever is logged of the program itself.

use crate::trace::{self, Place, SCOPE, Value};
use opentelemetry::logs::{AnyValue, LogRecord, Logger, LoggerProvider, Severity as Number};
use opentelemetry_sdk::logs::{SdkLogger, SdkLoggerProvider};
use std::sync::OnceLock;

/// What exports them, once logs are exported.
static EXPORT: OnceLock<SdkLogger> = OnceLock::new();

pub(crate) fn enable(provider: &SdkLoggerProvider) {
    // Once a process.
    let _ = EXPORT.set(provider.logger(SCOPE));
}

/// How much a line matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    /// All goes its way.
    Info,
    /// Something did not.
    Warning,
    /// It does not go on.
    Error,
}

/// A line.
#[derive(Debug)]
pub struct Record {
    /// What kind of line it is, as `lorafleet.trial.log`.
    pub name: &'static str,
    /// When it happened, in milliseconds since the Unix epoch.
    pub time_ms: u64,
    /// How much it matters.
    pub severity: Severity,
    /// What it says.
    pub text: String,
    /// More about it.
    pub attributes: Vec<(&'static str, Value)>,
}

impl Record {
    /// Tells it, as what happened at a place in a trace. Where logs are not exported it costs nothing.
    pub fn tell(self, at: Option<Place>) {
        let Some(logger) = EXPORT.get() else { return };
        let mut record = logger.create_log_record();
        record.set_event_name(self.name);
        record.set_timestamp(trace::at(self.time_ms));
        let (number, text) = match self.severity {
            Severity::Info => (Number::Info, "INFO"),
            Severity::Warning => (Number::Warn, "WARN"),
            Severity::Error => (Number::Error, "ERROR"),
        };
        record.set_severity_number(number);
        record.set_severity_text(text);
        record.set_body(self.text.into());
        record.add_attributes(self.attributes.into_iter().map(|(key, value)| (key, any(value))));
        trace::at_place(at, || logger.emit(record));
    }
}

/// A value as a log has it.
fn any(value: Value) -> AnyValue {
    match value {
        Value::Bool(is) => is.into(),
        Value::I64(number) => number.into(),
        Value::F64(number) => number.into(),
        other => other.as_str().into_owned().into(),
    }
}
