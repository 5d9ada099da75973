//! What commands print: tables for people, JSON and YAML for programs.

use crate::Failure;
use clap::ValueEnum;
use console::Term;
use saphyr::{MappingOwned, ScalarOwned, YamlEmitter, YamlOwned};
use serde_json::Value;
use std::io::{ErrorKind, Write};
use std::iter::repeat_n;
use unicode_width::UnicodeWidthStr;

/// Prints a line to standard error, as `eprintln!` does. Whoever closed it does not want to hear, and the work
/// goes on without.
macro_rules! say {
    ($($message:tt)*) => { $crate::output::to_stderr(format!($($message)*)) };
}
pub(crate) use say;

/// What [`say!`] does with its line.
pub(crate) fn to_stderr(mut line: String) {
    line.push('\n');
    let _ = std::io::stderr().lock().write_all(line.as_bytes());
}

/// Prints to standard output, with one line break at the end. A reader that closed it (`| head`) has what it
/// wanted, so that is no failure.
///
/// # Errors
/// It cannot be written to for another reason, such as a full disk.
pub(crate) fn to_stdout(text: &str) -> Result<(), Failure> {
    written(&mut std::io::stdout().lock(), text)
}

/// Prints a part of a text to standard output at once, as it is.
///
/// # Errors
/// Those of [`to_stdout`].
pub(crate) fn part(text: &str) -> Result<(), Failure> {
    let mut out = std::io::stdout().lock();
    unless_closed(out.write_all(text.as_bytes()).and_then(|()| out.flush()))
}

fn written(out: &mut impl Write, text: &str) -> Result<(), Failure> {
    unless_closed(writeln!(out, "{}", text.trim_end()).and_then(|()| out.flush()))
}

fn unless_closed(written: std::io::Result<()>) -> Result<(), Failure> {
    match written {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Failure::failed(format!("standard output: {error}")))
        }
        _ => Ok(()),
    }
}

/// The form of a command's output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people.
    Table,
    /// For programs: one JSON document, its keys stable.
    Json,
    /// The same document as YAML.
    Yaml,
}

/// The flag that every listing takes.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct OutputArgs {
    /// Form of the output.
    // Its own id: a verb may have a `--format` of its own.
    #[arg(id = "output", short = 'o', long = "output", value_enum, default_value = "table")]
    pub(crate) format: Format,
}

/// Prints a document in the form asked for; `table` makes the form for people.
pub(crate) fn print(format: Format, document: &Value, table: impl FnOnce() -> String) -> Result<(), Failure> {
    let text = match format {
        Format::Table => table(),
        Format::Json => serde_json::to_string_pretty(document).map_err(Failure::failed)?,
        Format::Yaml => yaml(document)?,
    };
    to_stdout(&text)
}

/// A document as YAML.
pub(crate) fn yaml(document: &Value) -> Result<String, Failure> {
    let owned = to_yaml(document);
    let mut text = String::new();
    YamlEmitter::new(&mut text).dump(&(&owned).into()).map_err(|e| Failure::failed(format!("{e:?}")))?;
    Ok(text.trim_start_matches("---\n").to_string())
}

fn to_yaml(value: &Value) -> YamlOwned {
    match value {
        Value::Null => YamlOwned::Value(ScalarOwned::Null),
        Value::Bool(b) => YamlOwned::Value(ScalarOwned::Boolean(*b)),
        Value::Number(n) => YamlOwned::Value(match n.as_i64() {
            Some(n) => ScalarOwned::Integer(n),
            None => ScalarOwned::FloatingPoint(n.as_f64().unwrap_or(f64::NAN).into()),
        }),
        Value::String(s) => YamlOwned::Value(ScalarOwned::String(s.clone())),
        Value::Array(items) => YamlOwned::Sequence(items.iter().map(to_yaml).collect()),
        Value::Object(object) => {
            let mut mapping = MappingOwned::new();
            for (key, value) in object {
                mapping.insert(YamlOwned::Value(ScalarOwned::String(key.clone())), to_yaml(value));
            }
            YamlOwned::Mapping(mapping)
        }
    }
}

/// A table for people: headings, and rows of cells; columns of numbers stand on the right.
///
/// On a terminal too narrow for it, columns in `spare` are left out, the first of them first, until it fits; a
/// line below names them. A pipe or a file gets all columns.
pub(crate) fn table(headings: &[&str], rows: &[Vec<String>], spare: &[&str]) -> String {
    let terminal = Term::stdout().size_checked().map(|(_, columns)| columns.into());
    fitted(headings, rows, spare, terminal)
}

fn fitted(headings: &[&str], rows: &[Vec<String>], spare: &[&str], room: Option<usize>) -> String {
    let column = |(i, heading): (usize, &&str)| Column::new(heading, rows.iter().map(|row| row.get(i)));
    let columns: Vec<_> = headings.iter().enumerate().map(column).collect();
    let mut shown: Vec<usize> = (0..headings.len()).collect();
    let mut left_out = Vec::new();
    for name in spare {
        let needed =
            shown.iter().map(|i| columns[*i].width + GAP.len()).sum::<usize>().saturating_sub(GAP.len());
        if room.is_none_or(|room| needed <= room) {
            break;
        }
        if let Some(at) = shown.iter().position(|i| headings[*i] == *name) {
            shown.remove(at);
            left_out.push(*name);
        }
    }
    let mut text = String::new();
    draw(&mut text, shown.iter().map(|i| (columns[*i].heading.as_str(), &columns[*i])));
    for row in rows {
        draw(&mut text, shown.iter().map(|i| (row.get(*i).map_or("", String::as_str), &columns[*i])));
    }
    if !left_out.is_empty() {
        text += &format!("no room for {}; a wider terminal or -o json shows them\n", left_out.join(", "));
    }
    text
}

/// What stands between two columns.
const GAP: &str = "  ";

/// A column of a table.
struct Column {
    heading: String,
    width: usize,
    /// Whether its cells stand on the right.
    right: bool,
}

impl Column {
    fn new<'a>(heading: &'a str, cells: impl Iterator<Item = Option<&'a String>> + Clone) -> Self {
        let cells = cells.flatten().map(String::as_str);
        let lines = cells.clone().flat_map(str::lines).chain([heading]);
        let mut values = cells.filter(|cell| *cell != NONE).peekable();
        Self {
            heading: heading.to_uppercase(),
            width: lines.map(UnicodeWidthStr::width).max().unwrap_or_default(),
            right: values.peek().is_some()
                && values.all(|cell| cell.starts_with(|c: char| c.is_ascii_digit() || c == '-')),
        }
    }
}

/// Adds a row to a table; a cell may have several lines.
fn draw<'a>(table: &mut String, cells: impl Iterator<Item = (&'a str, &'a Column)> + Clone) {
    let height = cells.clone().map(|(cell, _)| cell.lines().count()).max().unwrap_or_default().max(1);
    for line in 0..height {
        for (cell, column) in cells.clone() {
            let text = cell.lines().nth(line).unwrap_or_default();
            let room = column.width.saturating_sub(text.width());
            let [left, right] = if column.right { [room, 0] } else { [0, room] };
            table.extend(repeat_n(' ', left));
            *table += text;
            table.extend(repeat_n(' ', right));
            *table += GAP;
        }
        table.truncate(table.trim_end_matches(' ').len());
        table.push('\n');
    }
}

/// What stands where there is no value.
pub(crate) const NONE: &str = "–";

/// A value or [`NONE`].
pub(crate) fn or_none(value: Option<impl ToString>) -> String {
    value.map_or_else(|| NONE.to_string(), |v| v.to_string())
}

/// A number with four digits behind the point, as losses are shown.
pub(crate) fn loss(value: Option<f64>) -> String {
    or_none(value.map(|v| format!("{v:.4}")))
}

/// A number in the shortest form that people read: `0.00037`, `3.7e-6`, `16`.
pub(crate) fn short(value: &Value) -> String {
    match value {
        Value::Number(n) if n.is_f64() => {
            let n = n.as_f64().unwrap_or(f64::NAN);
            let rounded: f64 = format!("{n:.3e}").parse().unwrap_or(n);
            if rounded != 0.0 && !(1e-4..1e6).contains(&rounded.abs()) {
                format!("{rounded:e}")
            } else {
                rounded.to_string()
            }
        }
        Value::String(s) => s.clone(),
        other => other.to_string(),
    }
}

/// Bytes in decimal units: `7.5 GB`.
pub(crate) fn bytes(count: u64) -> String {
    let count = count as f64;
    let (unit, name) =
        [(1e9, "GB"), (1e6, "MB"), (1e3, "kB")].into_iter().find(|(u, _)| count >= *u).unwrap_or((1.0, "B"));
    let value = count / unit;
    if unit == 1.0 || value >= 100.0 { format!("{value:.0} {name}") } else { format!("{value:.1} {name}") }
}

/// A duration in two units: `2 h 05 min`, `1 min 20 s`, `14 s`.
pub(crate) fn duration(seconds: f64) -> String {
    let s = seconds.max(0.0).round() as u64;
    match s {
        0..60 => format!("{s} s"),
        60..3600 => format!("{} min {:02} s", s / 60, s % 60),
        _ => format!("{} h {:02} min", s / 3600, s % 3600 / 60),
    }
}

/// US dollars: more digits where the amount is small.
pub(crate) fn dollars(usd: f64) -> String {
    if usd == 0.0 {
        "$0".into()
    } else if usd < 0.1 {
        format!("${usd:.4}")
    } else {
        format!("${usd:.2}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn numbers_for_people() {
        for (got, want) in [
            (short(&json!(0.000371_234)), "0.0003712"),
            (short(&json!(1.234_567e-6)), "1.235e-6"),
            (short(&json!(16)), "16"),
            (short(&json!("4bit")), "4bit"),
            (bytes(999), "999 B"),
            (bytes(7_500_000_000), "7.5 GB"),
            (bytes(461_664), "462 kB"),
            (duration(14.4), "14 s"),
            (duration(80.0), "1 min 20 s"),
            (duration(7500.0), "2 h 05 min"),
            (dollars(0.0), "$0"),
            (dollars(0.0123), "$0.0123"),
            (dollars(12.3), "$12.30"),
        ] {
            assert_eq!(got, want);
        }
    }

    /// A stream that fails as told.
    struct Failing(ErrorKind);

    impl Write for Failing {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(self.0.into())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Err(self.0.into())
        }
    }

    #[test]
    fn a_closed_pipe_is_no_failure() {
        for (kind, fails) in [(ErrorKind::BrokenPipe, false), (ErrorKind::StorageFull, true)] {
            assert_eq!(written(&mut Failing(kind), "text").is_err(), fails, "{kind:?}");
        }
        let mut out = Vec::new();
        written(&mut out, "text\n\n").unwrap();
        assert_eq!(out, b"text\n");
    }

    #[test]
    fn tables_align_numbers() {
        let rows =
            vec![vec!["a".into(), "1".into()], vec!["bc".into(), "10".into()], vec!["d".into(), NONE.into()]];
        let drawn = fitted(&["name", "n"], &rows, &[], None);
        assert_eq!(drawn, "NAME   N\na      1\nbc    10\nd      –\n");
    }

    #[test]
    fn cells_may_be_wide_and_have_lines() {
        let rows = vec![vec!["名".into(), "x\ny z".into()], vec!["a".into(), String::new()]];
        assert_eq!(fitted(&["k", "value"], &rows, &[], None), "K   VALUE\n名  x\n    y z\na\n");
    }

    #[test]
    fn tables_fit_the_terminal() {
        let rows = vec![vec!["1".into(), "8".into(), "0.5".into(), "7 MB".into()]];
        let all = "TRIAL  RANK  LOSS  MEMORY\n    1     8   0.5    7 MB\n";
        let below = |shown: &str, names: &str| {
            format!("{shown}no room for {names}; a wider terminal or -o json shows them\n")
        };
        for (room, want) in [
            (None, all.to_string()),
            (Some(25), all.to_string()),
            (Some(24), below("TRIAL  RANK  LOSS\n    1     8   0.5\n", "memory")),
            (Some(16), below("TRIAL  LOSS\n    1   0.5\n", "memory, rank")),
            (Some(5), below("TRIAL  LOSS\n    1   0.5\n", "memory, rank")),
        ] {
            let got = fitted(&["trial", "rank", "loss", "memory"], &rows, &["memory", "rank"], room);
            assert_eq!(got, want, "{room:?}");
        }
    }

    #[test]
    fn yaml_reads_back() {
        let text = yaml(&json!({"a": [1, 2.5, "x: y", null, true], "b": {"c": "4"}})).unwrap();
        assert_eq!(text.trim_end(), "a:\n  - 1\n  - 2.5\n  - \"x: y\"\n  - ~\n  - true\nb:\n  c: \"4\"");
    }
}
