//! `lorafleet export`: a sweep as files, for people and for others' tools.
//!
//! | module | holds |
//! |---|---|
//! | [`files`] | everything about a sweep; its tables |
//! | [`table`] | the tables of trials and of points |
//! | [`csv`], [`parquet`] | a table as a file |
//! | [`mirror`] | a sweep in another tool, told piece by piece, also as it comes |
//! | [`optuna`] | Optuna's journal |
//! | [`tensorboard`] | TensorBoard's event files |
//! | [`mlflow`] | MLflow's tracking server |
//! | [`place`] | where an export appears |

mod csv;
mod files;
mod mirror;
mod mlflow;
mod optuna;
mod parquet;
mod place;
mod table;
mod tensorboard;

use crate::client::{Connection, ServerArgs};
use crate::follow::{self, Follow};
use crate::output::{self, OutputArgs};
use crate::{Failure, sweeps, trials, view};
use clap::ValueEnum;
use domain::metric::MetricPoint;
use domain::sweep::SweepSpec;
use domain::trial::Trial;
use mirror::{Live, Mirror};
use mlflow::Tracking;
use optuna::Journal;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::Duration;
use tensorboard::Log;

/// Writes a sweep as files, for people and for other tools, or to an MLflow server.
///
/// A sweep that still runs is written as it stands, or with --follow as it comes. Without it, files appear when they are
/// whole.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  lorafleet export quickstart-3fa2 --to ./quickstart
  lorafleet export quickstart-3fa2 --to ./quickstart --adapters --overwrite
  lorafleet export quickstart-3fa2 --to ./tables --format parquet
  lorafleet export quickstart-3fa2 --to quickstart.log --format optuna && optuna-dashboard quickstart.log
  lorafleet export quickstart-3fa2 --to ./runs --format tensorboard && tensorboard --logdir runs
  lorafleet export quickstart-3fa2 --to ./runs --format tensorboard --follow
  lorafleet export quickstart-3fa2 --format mlflow --tracking-uri http://localhost:5000 --follow

An MLflow server that asks who calls is told MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN.")]
pub(crate) struct Args {
    /// The sweep's id, as `lorafleet list` shows it.
    #[arg(value_name = "SWEEP_ID")]
    sweep: String,
    /// The directory to make; with --format optuna, the file; with --format mlflow, nothing.
    #[arg(long, value_name = "PATH")]
    to: Option<PathBuf>,
    /// What is written.
    #[arg(long, value_enum, default_value = "files")]
    format: Format,
    /// Fetches adapters too, into adapters/NUMBER.
    #[arg(long)]
    adapters: bool,
    /// Replaces a file that is there, or a directory that is not empty, with all that is in it.
    #[arg(long)]
    overwrite: bool,
    /// Goes on until the sweep is over, over restarts of its server; with --format optuna, tensorboard or mlflow. Given
    /// again, it goes on with what is there.
    #[arg(short = 'f', long, conflicts_with = "overwrite")]
    follow: bool,
    /// How long a server that is gone is looked for with --follow: 10m, 1h30m or seconds.
    #[arg(long, alias = "reconnect_for", value_name = "TIME", default_value = "10m", value_parser = follow::duration)]
    reconnect_for: Duration,
    /// With --format mlflow, the tracking server's address.
    #[arg(
        long,
        alias = "tracking_uri",
        env = "MLFLOW_TRACKING_URI",
        hide_env_values = true,
        value_name = "URL"
    )]
    tracking_uri: Option<String>,
    /// With --format mlflow, the experiment: called as the sweep is unless given.
    #[arg(long, value_name = "NAME")]
    experiment: Option<String>,
    #[command(flatten)]
    server: ServerArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// What an export can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// Everything: spec.yaml, sweep.json, trials.json, trials.csv, metrics.csv (a line a trial and step), report.html;
    /// published.csv where the base is one of which numbers were published.
    Files,
    /// trials.csv, and points.csv with a line a trial, step and metric.
    Csv,
    /// The same tables as Parquet files.
    Parquet,
    /// Optuna's journal: one file for optuna.load_study and optuna-dashboard.
    Optuna,
    /// TensorBoard's log directory: scalars, hyperparameters, text.
    Tensorboard,
    /// An experiment of an MLflow server: a run a trial.
    Mlflow,
}

impl Format {
    fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().into())
    }

    /// Whether it can grow.
    fn can_follow(self) -> bool {
        matches!(self, Self::Optuna | Self::Tensorboard | Self::Mlflow)
    }
}

/// What is exported.
struct Source<'a> {
    connection: &'a Connection,
    /// The sweep's id.
    id: String,
    /// The sweep as `lorafleet get` shows it.
    document: Value,
    /// In the order of their numbers.
    trials: Vec<Trial>,
}

impl<'a> Source<'a> {
    async fn read(connection: &'a Connection, sweep: &str) -> Result<Self, Failure> {
        let document = view::sweep(&sweeps::get(connection, sweep).await?);
        let trials = trials::list(connection, sweep).await?;
        Ok(Self { connection, id: sweep.into(), document, trials })
    }

    fn spec(&self) -> Result<SweepSpec, Failure> {
        spec(&self.id, &self.document)
    }

    /// A trial's curve.
    async fn points(&self, trial: &Trial) -> Result<Vec<MetricPoint>, Failure> {
        trials::points(self.connection, trial.id.as_str()).await
    }
}

/// The spec of a sweep's document.
fn spec(id: &str, document: &Value) -> Result<SweepSpec, Failure> {
    let problem = |problem: String| Failure::failed(format!("{id}: its spec cannot be read: {problem}"));
    let document = document["spec"].as_object().ok_or_else(|| problem("there is none".into()))?;
    SweepSpec::from_document(document)
        .map_err(|problems| problem(problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")))
}

/// Whether a trial is to be seen in tools that know of no trial that waits: their runs have a beginning that does not
/// change.
fn has_begun(trial: &Trial) -> bool {
    trial.started_at.is_some() || trial.state.is_terminal()
}

/// Runs the verb.
pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    let format = args.format.name();
    let refused = |flag: &str, why: &str| Err(Failure::invalid(format!("{flag}: --format {format} {why}")));
    if args.adapters && args.format != Format::Files {
        return refused("--adapters", "has no place for them; leave one of the two out");
    }
    if args.follow && !args.format.can_follow() {
        let why = "does not grow; write it when the sweep is over, or take optuna, tensorboard or mlflow";
        return refused("--follow", why);
    }
    if args.experiment.is_some() && args.format != Format::Mlflow {
        return refused("--experiment", "has none; leave one of the two out");
    }
    match (args.format, &args.to) {
        (Format::Mlflow, None) => to_mlflow(&args).await,
        (Format::Mlflow, Some(_)) => refused("--to", "makes no files; leave --to out"),
        (_, None) => refused("--to", "makes files; name where with --to PATH"),
        (_, Some(to)) if args.follow => {
            match args.format {
                Format::Optuna => place::refuse_file(to, true)?,
                _ => place::refuse_full(to, true)?,
            }
            Connection::with(&args.server, async |c| match args.format {
                Format::Optuna => live(c, &args, Journal::new(to)).await,
                _ => live(c, &args, Log::open(to, &args.sweep)?).await,
            })
            .await?;
            said(&args, to)
        }
        (_, Some(to)) => {
            to_files(&args, to).await?;
            said(&args, to)
        }
    }
}

/// Tells where files were written.
fn said(args: &Args, path: &Path) -> Result<(), Failure> {
    let mut document = json!({ "sweep": args.sweep, "format": args.format.name(), "path": path });
    if args.format != Format::Optuna {
        document["directory"] = json!(path);
    }
    output::print(args.output.format, &document, || path.display().to_string())
}

/// Follows a sweep to its end with a mirror beside.
async fn live(connection: &Connection, args: &Args, mirror: impl Mirror) -> Result<(), Failure> {
    sweeps::refuse_untrained(connection, &args.sweep, &args.server).await?;
    let follow = Follow {
        server: &args.server,
        sweep: &args.sweep,
        quiet: args.output.format != output::Format::Table,
        reconnect_for: args.reconnect_for,
    };
    follow.with(connection, &mut Live::new(mirror, args.reconnect_for)).await?;
    Ok(())
}

/// Exports to an MLflow server.
async fn to_mlflow(args: &Args) -> Result<(), Failure> {
    let uri = args.tracking_uri.as_deref().filter(|uri| !uri.is_empty()).ok_or_else(|| {
        Failure::invalid(
            "--tracking-uri: name the MLflow server, or set MLFLOW_TRACKING_URI; `mlflow server` starts one",
        )
    })?;
    let experiment = args.experiment.as_deref().unwrap_or(&args.sweep);
    let mut tracking = Tracking::new(uri, &args.sweep)?;
    let uri = tracking.uri().to_string();
    let id = Connection::with(&args.server, async |connection| {
        // Nothing is made there for a sweep that is not.
        sweeps::get(connection, &args.sweep).await?;
        tracking.open(experiment).await?;
        let id = tracking.experiment().to_string();
        if args.follow {
            live(connection, args, tracking).await?;
        } else {
            mirror::write(&Source::read(connection, &args.sweep).await?, &mut tracking).await?;
        }
        Ok(id)
    })
    .await?;
    let document = json!({
        "sweep": args.sweep, "format": args.format.name(), "tracking_uri": uri, "experiment": experiment,
        "experiment_id": id,
    });
    output::print(args.output.format, &document, || format!("{uri}/#/experiments/{id}"))
}

/// Writes files, which appear when they are whole.
async fn to_files(args: &Args, to: &Path) -> Result<(), Failure> {
    match args.format {
        Format::Optuna => place::refuse_file(to, args.overwrite)?,
        _ => place::refuse_full(to, args.overwrite)?,
    }
    // A link leads to where it is wanted: that is replaced, and not the link.
    let to = std::fs::canonicalize(to).unwrap_or_else(|_| to.to_path_buf());
    let draft = place::beside(&to, "part")?;
    // Of an earlier process of the same number.
    place::discard(&draft);
    let written = Connection::with(&args.server, async |c| write(c, args, &draft).await).await;
    if let Err(failure) = written.and_then(|()| place::publish(&draft, &to, args.overwrite)) {
        // A half export is of no use.
        place::discard(&draft);
        return Err(failure);
    }
    Ok(())
}

async fn write(connection: &Connection, args: &Args, draft: &Path) -> Result<(), Failure> {
    let source = Source::read(connection, &args.sweep).await?;
    if args.format != Format::Optuna {
        std::fs::create_dir_all(draft).map_err(place::at(draft))?;
    }
    match args.format {
        Format::Files => files::write(&source, draft, args.adapters).await,
        Format::Csv => tables::<csv::Csv>(&source, draft).await,
        Format::Parquet => tables::<parquet::Parquet>(&source, draft).await,
        Format::Optuna => mirror::write(&source, &mut Journal::new(draft)).await,
        Format::Tensorboard => mirror::write(&source, &mut Log::open(draft, &args.sweep)?).await,
        // It is no files.
        Format::Mlflow => Ok(()),
    }
}

async fn tables<S: table::Sheet>(source: &Source<'_>, draft: &Path) -> Result<(), Failure> {
    files::trials::<S>(source, draft)?;
    files::points::<S>(source, draft).await
}

/// A sweep for the tests of the formats.
#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use domain::Timestamp;

    /// The spec of the trials.
    pub(super) fn spec() -> SweepSpec {
        let document = json!({
            "name": "tiny",
            "pretrained_model_id": "./model",
            "dataset_name": "rows.jsonl",
            "search": { "algorithm": "random", "max_trials": 3, "metric": "eval/loss" },
            "parameters": {
                "lora_rank": [4, 8],
                "learning_rate": { "log_uniform": [1e-4, 1e-2] },
                "lora_dropout": { "uniform": [0.0, 0.95], "step": 0.3 },
                "batch_size": { "integer": [2, 10], "step": 3 },
                "precision_mode": ["float16", "4bit"],
                "max_sequence_length": {
                    "when": { "precision_mode": "4bit" }, "choices": [512, 1024], "otherwise": 512,
                },
                "target_modules": [["q_proj", "v_proj"], "all-linear"],
            },
        });
        SweepSpec::from_document(document.as_object().unwrap()).unwrap()
    }

    /// The sweep's document.
    pub(super) fn sweep() -> Value {
        json!({ "id": "tiny-1", "name": "tiny", "state": "running", "cost_usd": 0.5, "spec": spec().to_document() })
    }

    /// A completed trial in its second attempt, one that trains, one that failed.
    pub(super) fn trials() -> Vec<Trial> {
        let parameters = |rank: u64, precision: &str, length: u64| {
            json!({
                "lora_rank": rank, "learning_rate": 0.001, "lora_dropout": 0.3, "batch_size": 2,
                "precision_mode": precision, "max_sequence_length": length, "target_modules": ["q_proj", "v_proj"],
            })
        };
        let trial = |number: u32, state: &str, parameters: Value, rest: Value| {
            let mut config = serde_json::to_value(spec().base).unwrap();
            config.as_object_mut().unwrap().extend(parameters.as_object().unwrap().clone());
            let mut record = json!({
                "id": format!("tiny-1/{number}"), "config": config, "parameters": parameters, "state": state,
                "attempt": 1, "step": 0, "total_steps": 3, "agent": null, "adapter": null, "resume": null,
                "attempts": [[1, 0]], "eval_loss": null, "cost_usd": null, "summary": null, "failure": null,
                "digests": null, "created_at": 1_000_000, "started_at": null, "finished_at": null,
            });
            record.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
            serde_json::from_value(record).unwrap()
        };
        vec![
            trial(
                1,
                "completed",
                parameters(8, "float16", 512),
                json!({
                    "attempt": 2, "attempts": [[1, 0], [2, 2]], "agent": "a",
                    "placements": [{
                        "attempt": 2, "agent": "a", "device": "cuda:1", "started_at": 1_001_000, "ended_at": 1_003_500,
                    }],
                    "device": { "accelerator": "T4-16GB", "memory_bytes": 15_000_000_000_u64, "price_per_hour": 0.5 },
                    "step": 3, "eval_loss": 1.25, "cost_usd": 0.25,
                    "summary": { "steps": 3, "loss": 1.5, "peak_memory_bytes": 5_000, "device_seconds": 2.5 },
                    "digests": {
                        "base_model": "simulated:a", "dataset": "sha256:b", "tokenizer": "sha256:c", "spec": "sha256:d",
                    },
                    "started_at": 1_001_000, "finished_at": 1_003_500,
                }),
            ),
            trial(
                2,
                "running",
                parameters(4, "4bit", 1024),
                json!({ "agent": "b", "started_at": 1_002_000 }),
            ),
            trial(
                3,
                "failed",
                parameters(99, "4bit", 512),
                json!({
                    "failure": { "class": "user", "message": "no, \"really\"\nnot" },
                }),
            ),
        ]
    }

    /// A curve of three steps and the base's point.
    pub(super) fn points() -> Vec<MetricPoint> {
        let point = |step: u64, values: &[(&str, f64)]| MetricPoint {
            step,
            time: Timestamp(1_000_000 + step * 1_000),
            values: values.iter().map(|(name, value)| ((*name).into(), *value)).collect(),
        };
        vec![
            point(0, &[("eval/loss", 2.0)]),
            point(1, &[("loss", 1.75), ("learning_rate", 0.1)]),
            point(2, &[("loss", 1.5), ("eval/loss", 1.5)]),
            point(3, &[("loss", f64::NAN), ("eval/loss", 1.25)]),
        ]
    }

    #[test]
    fn the_samples_are_of_their_space() {
        let spec = spec();
        assert!(
            trials().iter().all(|t| spec.parameters.iter().all(|(name, _)| t.parameters.contains_key(name)))
        );
        assert_eq!(Format::Tensorboard.name(), "tensorboard");
    }
}
