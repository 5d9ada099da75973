//! `lorafleet export`: a sweep as files, for people and for others' tools.
//!
//! | module | holds |
//! |---|---|
//! | [`files`] | everything about a sweep; its tables |
//! | [`table`] | the tables of trials and of points |
//! | [`csv`], [`parquet`] | a table as a file |
//! | [`optuna`] | Optuna's journal |
//! | [`tensorboard`] | TensorBoard's event files |
//! | [`place`] | where an export appears |

mod csv;
mod files;
mod optuna;
mod parquet;
mod place;
mod table;
mod tensorboard;

use crate::client::{Connection, ServerArgs};
use crate::output::{self, OutputArgs};
use crate::{Failure, sweeps, trials, view};
use clap::ValueEnum;
use domain::metric::MetricPoint;
use domain::sweep::SweepSpec;
use domain::trial::Trial;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Writes a sweep as files, for people and for other tools.
///
/// A sweep that still runs is written as it stands. What is written appears when it is whole.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  lorafleet export quickstart-3fa2 --to ./quickstart
  lorafleet export quickstart-3fa2 --to ./quickstart --adapters --overwrite
  lorafleet export quickstart-3fa2 --to ./tables --format parquet
  lorafleet export quickstart-3fa2 --to quickstart.log --format optuna && optuna-dashboard quickstart.log
  lorafleet export quickstart-3fa2 --to ./runs --format tensorboard && tensorboard --logdir runs")]
pub(crate) struct Args {
    /// The sweep's id, as `lorafleet list` shows it.
    #[arg(value_name = "SWEEP_ID")]
    sweep: String,
    /// The directory to make; with --format optuna, the file.
    #[arg(long, value_name = "PATH")]
    to: PathBuf,
    /// What is written.
    #[arg(long, value_enum, default_value = "files")]
    format: Format,
    /// Fetches adapters too, into adapters/NUMBER.
    #[arg(long)]
    adapters: bool,
    /// Replaces a file that is there, or a directory that is not empty, with all that is in it.
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    server: ServerArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// What an export can be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// Everything: spec.yaml, sweep.json, trials.json, trials.csv, metrics.csv (a line a trial and step), report.html.
    Files,
    /// trials.csv, and points.csv with a line a trial, step and metric.
    Csv,
    /// The same tables as Parquet files.
    Parquet,
    /// Optuna's journal: one file for optuna.load_study and optuna-dashboard.
    Optuna,
    /// TensorBoard's log directory: scalars, hyperparameters, text.
    Tensorboard,
}

impl Format {
    fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().into())
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
        let problem =
            |problem: String| Failure::failed(format!("{}: its spec cannot be read: {problem}", self.id));
        let document = self.document["spec"].as_object().ok_or_else(|| problem("there is none".into()))?;
        SweepSpec::from_document(document).map_err(|problems| {
            problem(problems.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))
        })
    }

    /// A trial's curve.
    async fn points(&self, trial: &Trial) -> Result<Vec<MetricPoint>, Failure> {
        trials::points(self.connection, trial.id.as_str()).await
    }
}

/// Runs the verb.
pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    if args.adapters && args.format != Format::Files {
        return Err(Failure::invalid(format!(
            "--adapters: --format {} has no place for them; leave one of the two out",
            args.format.name()
        )));
    }
    match args.format {
        Format::Optuna => place::refuse_file(&args.to, args.overwrite)?,
        _ => place::refuse_full(&args.to, args.overwrite)?,
    }
    // A link leads to where it is wanted: that is replaced, and not the link.
    let to = std::fs::canonicalize(&args.to).unwrap_or_else(|_| args.to.clone());
    let draft = place::beside(&to, "part")?;
    let written = Connection::with(&args.server, async |c| write(c, &args, &draft).await).await;
    if let Err(failure) = written.and_then(|()| place::publish(&draft, &to, args.overwrite)) {
        // A half export is of no use.
        place::discard(&draft);
        return Err(failure);
    }
    let mut document = json!({ "sweep": args.sweep, "format": args.format.name(), "path": args.to });
    if args.format != Format::Optuna {
        document["directory"] = json!(args.to);
    }
    output::print(args.output.format, &document, || args.to.display().to_string())
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
        Format::Optuna => optuna::write(&source, draft).await,
        Format::Tensorboard => tensorboard::write(&source, draft).await,
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
