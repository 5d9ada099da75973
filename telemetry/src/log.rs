//! How a line of the log looks: for people on a terminal, JSON elsewhere; with the ids of the trace that it belongs to, and
//! without secrets.

use crate::secrets;
use opentelemetry::trace::TraceContextExt;
use std::fmt::{self, Write};
use std::io::IsTerminal;
use std::sync::{LazyLock, OnceLock};
use tokio::sync::watch;
use tracing::{Event, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, JsonFields, Writer};
use tracing_subscriber::fmt::{FmtContext, format};
use tracing_subscriber::layer::Filter;
use tracing_subscriber::registry::LookupSpan;

/// How the log looks on standard error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// Text on a terminal, JSON elsewhere.
    Auto,
    /// Text.
    Text,
    /// One JSON object a line.
    Json,
}

/// Changes what every layer logs.
type Change = Box<dyn Fn(&str) -> Result<(), String> + Send + Sync>;

/// How it is changed, and what was asked for at the start.
static CHANGE: OnceLock<(Change, String)> = OnceLock::new();

/// What is logged, once that was changed.
static CHANGED: LazyLock<watch::Sender<Option<String>>> = LazyLock::new(|| watch::channel(None).0);

/// What is logged by this process and is to be by those that it starts: directives, or nothing as long as what was asked
/// for at the start holds.
pub fn changes() -> watch::Receiver<Option<String>> {
    CHANGED.subscribe()
}

/// Lets it be changed while the program runs. Once a process.
pub(crate) fn changeable(change: Change, from: String) {
    let _ = CHANGE.set((change, from));
}

/// Logs what these directives say from now on; without any, what was asked for at the start. Returns which hold.
///
/// # Errors
/// They are no directives, or there is no log: in words for people.
pub fn change(directives: &str) -> Result<&str, String> {
    let Some((change, from)) = CHANGE.get() else { return Err("there is no log to change".into()) };
    let directives = if directives.is_empty() { from } else { directives };
    // Before it holds, too: it may be that nothing is logged from then on.
    let told = || tracing::warn!("what is logged is changed to {directives}");
    let refused = |error: String| {
        format!(
            "{directives:?}: {error}; write LEVEL or MODULE=LEVEL with commas between them, as in info,coordinator=debug"
        )
    };
    if let Some(word) = no_level(directives) {
        return Err(refused(format!("{word:?} is no level")));
    }
    told();
    change(directives).map_err(refused)?;
    CHANGED.send_replace(Some(directives.into()));
    told();
    Ok(directives)
}

/// A word that stands alone among directives and is no level: a module of that name, of which all would be logged, and of
/// all others nothing.
fn no_level(directives: &str) -> Option<&str> {
    let words = directives.split(',').map(str::trim).filter(|word| !word.is_empty());
    let mut alone = words.filter(|word| !word.contains(['=', '[']));
    alone.find(|word| word.parse::<LevelFilter>().is_err())
}

/// The layer that writes to standard error.
pub(crate) fn layer<S>(
    how: LogFormat,
    filter: impl Filter<S> + Send + Sync + 'static,
) -> Box<dyn Layer<S> + Send + Sync>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
{
    let terminal = std::io::stderr().is_terminal();
    let layer = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    if how == LogFormat::Text || (how == LogFormat::Auto && terminal) {
        let line = Line { inner: format().with_ansi(terminal), json: false };
        layer.with_ansi(terminal).event_format(line).with_filter(filter).boxed()
    } else {
        let line = Line { inner: format().json().flatten_event(true), json: true };
        layer.fmt_fields(JsonFields::new()).event_format(line).with_filter(filter).boxed()
    }
}

/// A line of another form, with the trace's ids at its end.
struct Line<F> {
    inner: F,
    json: bool,
}

impl<S, N, F> FormatEvent<S, N> for Line<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut out: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut line = String::new();
        self.inner.format_event(context, Writer::new(&mut line), event)?;
        out.write_str(&secrets::redact(&with_ids(line, self.json)))
    }
}

/// Puts the ids of the current trace at a line's end.
fn with_ids(mut line: String, json: bool) -> String {
    let current = opentelemetry::Context::current();
    let span = current.span();
    let ids = span.span_context();
    if !ids.is_valid() {
        return line;
    }
    let (trace, span) = (ids.trace_id(), ids.span_id());
    line.truncate(line.trim_end_matches('\n').len());
    if json {
        line.pop();
    }
    // Writing to a text does not fail.
    let _ = match json {
        true => writeln!(line, ",\"trace_id\":\"{trace}\",\"span_id\":\"{span}\"}}"),
        false => writeln!(line, " trace_id={trace} span_id={span}"),
    };
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use opentelemetry::trace::{SpanContext, SpanId, TraceFlags, TraceId, TraceState};

    #[test]
    fn a_line_names_its_trace() {
        assert_eq!(with_ids("plain\n".into(), false), "plain\n");
        let ids = SpanContext::new(
            TraceId::from(0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c),
            SpanId::from(0xb7ad_6b71_6920_3331),
            TraceFlags::SAMPLED,
            true,
            TraceState::NONE,
        );
        let _current = opentelemetry::Context::new().with_remote_span_context(ids).attach();
        let (trace, span) = ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331");
        assert_eq!(with_ids("plain\n".into(), false), format!("plain trace_id={trace} span_id={span}\n"));
        assert_eq!(
            with_ids("{\"a\":{\"b\":1}}\n".into(), true),
            format!("{{\"a\":{{\"b\":1}},\"trace_id\":\"{trace}\",\"span_id\":\"{span}\"}}\n")
        );
    }
}
