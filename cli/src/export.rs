//! `lorafleet export`: everything about a sweep as files.

use crate::client::{Connection, ServerArgs};
use crate::output::{self, OutputArgs};
use crate::{Failure, adapters, sweeps, trials, view};
use domain::metric::MetricPoint;
use domain::trial::Trial;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Writes everything about a sweep into a directory.
///
/// spec.yaml, sweep.json, trials.json, trials.csv, metrics.csv (a line a trial and step) and report.html; with
/// --adapters the newest adapter of each trial as well. The directory appears when it is whole.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  lorafleet export quickstart-3fa2 --to ./quickstart
  lorafleet export quickstart-3fa2 --to ./quickstart --adapters --overwrite")]
pub(crate) struct Args {
    /// The sweep's id, as `lorafleet list` shows it.
    #[arg(value_name = "SWEEP_ID")]
    sweep: String,
    /// The directory to make.
    #[arg(long, value_name = "DIR")]
    to: PathBuf,
    /// Fetches adapters too, into adapters/NUMBER.
    #[arg(long)]
    adapters: bool,
    /// Replaces a directory that is not empty, with all that is in it.
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    server: ServerArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// Runs the verb.
pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    refuse_full(&args.to, args.overwrite)?;
    let draft = beside(&args.to, "part")?;
    let written = Connection::with(&args.server, async |c| write(c, &args, &draft).await).await;
    if let Err(failure) = written.and_then(|()| publish(&draft, &args.to)) {
        // A half export is of no use; what cannot be removed is named like one.
        let _ = std::fs::remove_dir_all(&draft);
        return Err(failure);
    }
    let document = json!({ "sweep": args.sweep, "directory": args.to });
    output::print(args.output.format, &document, || args.to.display().to_string())
}

fn at(path: &Path) -> impl Fn(std::io::Error) -> Failure {
    move |e| Failure::failed(format!("{}: {e}", path.display()))
}

fn refuse_full(to: &Path, overwrite: bool) -> Result<(), Failure> {
    let full = match std::fs::read_dir(to) {
        Ok(mut entries) => entries.next().is_some(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => false,
        Err(error) => return Err(Failure::invalid(format!("--to {}: {error}", to.display()))),
    };
    if full && !overwrite {
        return Err(Failure::invalid(format!(
            "--to {}: is not empty; name another directory, or give --overwrite to replace it",
            to.display()
        )));
    }
    Ok(())
}

/// A name of this process beside a directory, in the same file system.
fn beside(to: &Path, what: &str) -> Result<PathBuf, Failure> {
    let to = std::path::absolute(to).map_err(at(to))?;
    let name = to.file_name().ok_or_else(|| {
        Failure::invalid(format!("--to {}: name a directory that can be made", to.display()))
    })?;
    Ok(to.with_file_name(format!(".{}.{what}-{}", name.to_string_lossy(), std::process::id())))
}

/// Puts the whole draft in the directory's place.
fn publish(draft: &Path, to: &Path) -> Result<(), Failure> {
    if !to.exists() {
        return std::fs::rename(draft, to).map_err(at(to));
    }
    let old = beside(to, "old")?;
    std::fs::rename(to, &old).map_err(at(to))?;
    if let Err(error) = std::fs::rename(draft, to) {
        let _ = std::fs::rename(&old, to);
        return Err(at(to)(error));
    }
    std::fs::remove_dir_all(&old).map_err(at(&old))
}

async fn write(connection: &Connection, args: &Args, draft: &Path) -> Result<(), Failure> {
    let sweep = view::sweep(&sweeps::get(connection, &args.sweep).await?);
    let trials = trials::list(connection, &args.sweep).await?;
    std::fs::create_dir_all(draft).map_err(at(draft))?;
    let file = |name: &str, text: String| {
        let path = draft.join(name);
        std::fs::write(&path, text).map_err(at(&path))
    };
    let pretty = |value: &Value| serde_json::to_string_pretty(value).map_err(Failure::failed);
    file("spec.yaml", output::yaml(&sweep["spec"])? + "\n")?;
    file("sweep.json", pretty(&sweep)? + "\n")?;
    let documents = Value::Array(trials.iter().map(view::trial_document).collect());
    file("trials.json", pretty(&documents)? + "\n")?;
    file("trials.csv", trial_rows(&trials, &documents))?;
    let mut curves = Vec::new();
    for trial in &trials {
        curves.push((trial.id.to_string(), trials::points(connection, trial.id.as_str()).await?));
    }
    file("metrics.csv", metric_rows(&curves))?;
    sweeps::save_report(connection, &args.sweep, Some(&draft.join("report.html")), draft).await?;
    if args.adapters {
        for trial in trials.iter().filter(|trial| trial.adapter.is_some()) {
            let number = trial.id.number().unwrap_or_default();
            let dir = draft.join("adapters").join(number.to_string());
            adapters::fetch(connection, trial.id.as_str(), &dir).await?;
        }
    }
    Ok(())
}

/// A line a trial: where it stands, what the search chose, its numbers.
fn trial_rows(trials: &[Trial], documents: &Value) -> String {
    let mut parameters: Vec<&str> =
        trials.iter().flat_map(|t| t.parameters.keys()).map(String::as_str).collect();
    parameters.sort_unstable();
    parameters.dedup();
    let own = ["id", "state", "attempt", "step", "total_steps", "eval_loss", "cost_usd"];
    let times = ["created_at", "started_at", "finished_at"];
    let numbers = [
        "loss",
        "base_eval_loss",
        "peak_memory_bytes",
        "predicted_peak_memory_bytes",
        "trainable_parameters",
        "total_parameters",
        "adapter_bytes",
        "samples_per_second",
        "tokens_per_second",
        "throughput",
        "device_seconds",
    ];
    let heading = own.iter().chain(&parameters).chain(&numbers).chain(&times).chain(&["failure"]);
    let mut text = row(heading.map(|name| Value::from(*name)));
    for document in documents.as_array().into_iter().flatten() {
        let of = |object: &Value, name: &str| object.get(name).cloned().unwrap_or_default();
        let cells = own.iter().map(|name| of(document, name));
        let cells = cells.chain(parameters.iter().map(|name| of(&document["parameters"], name)));
        let cells = cells.chain(numbers.iter().map(|name| of(&document["summary"], name)));
        let cells = cells.chain(times.iter().map(|name| of(document, name)));
        text += &row(cells.chain([of(&document["failure"], "message")]));
    }
    text
}

/// A line a trial and step, a column a metric.
fn metric_rows(curves: &[(String, Vec<MetricPoint>)]) -> String {
    let mut names: Vec<&str> = Vec::new();
    for (name, _) in curves.iter().flat_map(|(_, points)| points).flat_map(|point| &point.values) {
        if !names.contains(&name.as_str()) {
            names.push(name);
        }
    }
    let mut text = row(["trial", "step", "time"].iter().chain(&names).map(|name| Value::from(*name)));
    for (trial, points) in curves {
        for point in points {
            let first = [json!(trial), json!(point.step), json!(view::time(point.time))];
            text += &row(first.into_iter().chain(names.iter().map(|name| json!(point.get(name)))));
        }
    }
    text
}

/// A line of comma-separated values (RFC 4180); what has no value is empty.
fn row(cells: impl Iterator<Item = Value>) -> String {
    let cell = |value: Value| {
        let text = match value {
            Value::Null => String::new(),
            Value::String(text) => text,
            other => other.to_string(),
        };
        match text.contains([',', '"', '\n', '\r']) {
            true => format!("\"{}\"", text.replace('"', "\"\"")),
            false => text,
        }
    };
    cells.map(cell).collect::<Vec<_>>().join(",") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_with_commas_are_quoted() {
        let cells = [json!("a,b"), json!(null), json!(1.5), json!("say \"x\"\n"), json!(["q", "v"])];
        assert_eq!(row(cells.into_iter()), "\"a,b\",,1.5,\"say \"\"x\"\"\n\",\"[\"\"q\"\",\"\"v\"\"]\"\n");
    }

    #[test]
    fn a_directory_is_replaced_whole_and_only_when_asked() {
        let dir = tempfile::tempdir().unwrap();
        let to = dir.path().join("out");
        refuse_full(&to, false).unwrap();
        std::fs::create_dir(&to).unwrap();
        refuse_full(&to, false).unwrap();
        std::fs::write(to.join("old"), "x").unwrap();
        assert!(format!("{:?}", refuse_full(&to, false).unwrap_err()).contains("--overwrite"));
        refuse_full(&to, true).unwrap();
        assert!(refuse_full(&to.join("old"), true).is_err(), "a file is no directory");
        let draft = beside(&to, "part").unwrap();
        std::fs::create_dir(&draft).unwrap();
        std::fs::write(draft.join("new"), "y").unwrap();
        publish(&draft, &to).unwrap();
        let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["out"]);
        assert!(to.join("new").exists() && !to.join("old").exists());
    }
}
