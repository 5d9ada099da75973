//! `lorafleet eval`: a model, or one with an adapter, on evaluation tasks.

mod progress;

use crate::download::Downloads;
use crate::model::{Loaded, of_trainer, precision};
use crate::output::{self, OutputArgs, say};
use crate::{Failure, evaluations};
use ::eval::EvalError;
use ::eval::data::Data;
use ::eval::exam::{self, Places};
use ::eval::results;
use ::eval::run::{self, Model, Options, Outcome};
use ::eval::task::{self, Chosen, Preset, Selection};
use domain::sweep::FewshotOrder;
use domain::trial::PrecisionMode;
use domain::{Clock, SystemClock};
use progress::Progress;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use trainer::files::Outlives;
use trainer::locate;
use trainer::model::ModelConfig;

/// Evaluates a model, or one with an adapter, as lm-evaluation-harness 0.4 does.
///
/// Tasks: arc_easy, arc_challenge, hellaswag, truthfulqa_mc1, truthfulqa_mc2, mmlu_SUBJECT, mmlu (all its subjects), gsm8k, perplexity, and task files
/// of your own by their paths. The preset open-llm-leaderboard-v1 runs three of them with pinned examples and shows their
/// mean.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  lorafleet eval --model ./models/my-llama --adapter ./adapter --tasks arc_challenge,hellaswag \\
      --task-data arc_challenge=ARC-Challenge-Test.jsonl --task-data hellaswag=hellaswag_val.jsonl
  lorafleet eval --model ./models/my-llama --tasks arc_challenge --num-fewshot 25 \\
      --task-data arc_challenge=./ai2_arc --log-samples samples.jsonl --output-dir results
  lorafleet eval --model ./models/my-llama --tasks perplexity --task-data perplexity=book.txt -o json
  lorafleet eval --model openlm-research/open_llama_3b --tasks open-llm-leaderboard-v1
  lorafleet eval --model openlm-research/open_llama_3b --tasks ./my-task.yaml --task-data my-task=questions.parquet

A directory given to --task-data holds files called after splits (test.jsonl, train-00000-of-00001.parquet), at its top, in
data/ or in the folder of the task's part of the data set. docs/evaluation.md has the rest.

Exit codes: 0 done, 1 the work failed, 2 usage or unusable input, 3 the hub cannot be reached, 130 interrupted.")]
pub(crate) struct Args {
    /// The model: a directory in Hugging Face's layout, or a name on its hub.
    #[arg(long, value_name = "DIR|ID")]
    model: String,
    /// An adapter of the model, in PEFT's format.
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Tasks and presets by name, and task files by path.
    #[arg(long, value_name = "TASK,…", value_delimiter = ',', required = true)]
    tasks: Vec<String>,
    /// Examples before each question, where neither task nor preset pin their number.
    #[arg(long, alias = "num_fewshot", value_name = "N")]
    num_fewshot: Option<usize>,
    /// Whose order documents are asked in, and examples drawn: v0.4, or v0.3 as the first Open LLM Leaderboard ran the
    /// harness, which shuffles the documents (--limit takes the first of that order).
    #[arg(long, alias = "fewshot_order", value_name = "VERSION", default_value = "v0.4", value_parser = fewshot_order)]
    fewshot_order: FewshotOrder,
    /// Only the first N documents of each task.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    limit: Option<u32>,
    /// Where a task's documents lie, if they are not to come from its data set on the hub; may be repeated.
    #[arg(long, alias = "task_data", value_name = "TASK=PATH", value_parser = named_path)]
    task_data: Vec<(String, PathBuf)>,
    /// Where a task's examples lie, if not in the split beside its documents or among them; may be repeated.
    #[arg(long, alias = "fewshot_data", value_name = "TASK=PATH", value_parser = named_path)]
    fewshot_data: Vec<(String, PathBuf)>,
    /// File for one JSON line an item: task, index, loglikelihoods, is_greedy, metrics; of generated answers also generated and
    /// filtered_resps.
    #[arg(long, alias = "log_samples", value_name = "FILE")]
    log_samples: Option<PathBuf>,
    /// Directory for results.json, in the harness's layout.
    #[arg(long, alias = "output_dir", alias = "output_path", value_name = "DIR")]
    output_dir: Option<PathBuf>,
    /// Tokens that go through the model at once; beginnings that texts share count once.
    #[arg(long, alias = "batch_tokens", value_name = "N", default_value_t = Options::default().batch_tokens as u32,
        value_parser = clap::value_parser!(u32).range(1..))]
    batch_tokens: u32,
    /// The most tokens that the model reads, if not those that it knows; longer texts are cut on the left.
    #[arg(long, alias = "max_length", value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_length: Option<u32>,
    /// Whether the tokenizer may put BOS in front of texts, as it does by itself.
    #[arg(long, alias = "add_bos_token", value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    add_bos_token: bool,
    /// The numbers that the base is held in: float32, bfloat16, float16 or 4bit.
    #[arg(long, alias = "precision_mode", value_name = "MODE", default_value = "float32", value_parser = precision)]
    precision_mode: PrecisionMode,
    /// The device: auto (the first GPU that can be used, else the CPU), cpu, cuda or cuda:N.
    #[arg(long, default_value = crate::device::AUTO, value_name = "DEVICE")]
    device: String,
    #[command(flatten)]
    output: OutputArgs,
}

fn named_path(text: &str) -> Result<(String, PathBuf), String> {
    match text.split_once('=') {
        Some((task, path)) if !task.is_empty() && !path.is_empty() => Ok((task.into(), path.into())),
        _ => Err("write TASK=PATH".into()),
    }
}

fn fewshot_order(text: &str) -> Result<FewshotOrder, String> {
    FewshotOrder::parse(text).ok_or_else(|| "give v0.4 or v0.3".into())
}

/// Runs the verb.
pub(crate) fn run(args: Args) -> Result<(), Failure> {
    let clock = SystemClock::new();
    let selection = task::select(&args.tasks).map_err(unusable)?;
    let options = Options {
        num_fewshot: args.num_fewshot,
        fewshot_order: args.fewshot_order,
        limit: args.limit.map(|limit| limit as usize),
        batch_tokens: args.batch_tokens as usize,
        max_length: args.max_length.map(|length| length as usize),
        add_bos: args.add_bos_token,
    };
    // All that can be wrong is found before the model is loaded.
    let mut downloads = Downloads::default();
    let data = all_data(&args, &selection, &options, &mut downloads)?;
    let mut log = args.log_samples.as_deref().map(Log::create).transpose()?;
    if let Some(dir) = &args.output_dir {
        std::fs::create_dir_all(dir).map_err(|e| Failure::invalid(format!("{}: {e}", dir.display())))?;
    }
    let placed = crate::device::of(&args.device)?;
    let model = config::paths::absolute(&args.model);
    downloads.model(&model, "--model")?;
    let dir = locate::model(&model).map_err(of_trainer)?;
    let config = ModelConfig::load(&dir).map_err(of_trainer)?;
    let fits = |chosen: &Chosen| run::fits(&chosen.task, &config, &options);
    selection.tasks.iter().try_for_each(fits).map_err(unusable)?;
    let device = trainer::device::open(placed.id.as_str()).map_err(of_trainer)?;
    let loaded = Loaded::new(&dir, args.precision_mode, args.adapter.as_deref(), &device)?;
    let model = Model { base: &loaded.base, adapter: loaded.adapter.as_ref(), tokenizer: &loaded.tokenizer };
    let started = clock.monotonic();
    let mut outcomes = Vec::new();
    for (chosen, data) in selection.tasks.iter().zip(&data) {
        let mut progress = Progress::new(&chosen.task.task);
        let outcome = run::evaluate(model, chosen, data, &options, &mut |done, of| progress.show(done, of));
        progress.finish();
        let outcome = outcome.map_err(unusable)?;
        if let Some(log) = &mut log {
            log.write(&outcome)?;
        }
        outcomes.push(outcome);
    }
    let seconds = clock.monotonic().saturating_sub(started).as_secs_f64();
    finish(&args, &selection, &outcomes, seconds)
}

/// The documents and examples of each task.
fn all_data(
    args: &Args,
    selection: &Selection,
    options: &Options,
    downloads: &mut Downloads,
) -> Result<Vec<Data>, Failure> {
    let by_task = |paths: &[(String, PathBuf)], flag: &str| {
        let paths: BTreeMap<String, PathBuf> = paths.iter().cloned().collect();
        match paths.keys().find(|name| !selection.tasks.iter().any(|chosen| chosen.task.task == **name)) {
            Some(name) => {
                Err(Failure::invalid(format!("{flag} {name}=…: {name} is not among --tasks; add it there")))
            }
            None => Ok(paths),
        }
    };
    let documents = by_task(&args.task_data, "--task-data")?;
    let examples = by_task(&args.fewshot_data, "--fewshot-data")?;
    let mut load = |chosen: &Chosen| {
        let name = &chosen.task.task;
        let places = Places {
            documents: evaluations::place(&chosen.task, documents.get(name), downloads)?,
            fewshot: examples.get(name).cloned(),
        };
        exam::read(chosen, &places, options).map_err(unusable)
    };
    selection.tasks.iter().map(&mut load).collect()
}

/// The file of samples.
struct Log {
    path: PathBuf,
    file: BufWriter<File>,
}

impl Log {
    fn create(path: &Path) -> Result<Self, Failure> {
        let file = File::create(path).map_err(|e| Failure::invalid(format!("{}: {e}", path.display())))?;
        Ok(Self { path: path.to_owned(), file: BufWriter::new(file) })
    }

    fn write(&mut self, outcome: &Outcome) -> Result<(), Failure> {
        let failed =
            |error: &dyn std::fmt::Display| Failure::failed(format!("{}: {error}", self.path.display()));
        for sample in &outcome.samples {
            let line = serde_json::to_string(sample).map_err(|e| failed(&e))?;
            writeln!(self.file, "{line}").map_err(|e| failed(&e))?;
        }
        self.file.flush().map_err(|e| failed(&e))
    }
}

/// Writes and prints what came out.
fn finish(args: &Args, selection: &Selection, outcomes: &[Outcome], seconds: f64) -> Result<(), Failure> {
    let document = results::document(outcomes, &selection.presets, settings(args, outcomes, seconds));
    if let Some(dir) = &args.output_dir {
        let path = dir.join("results.json");
        let text = serde_json::to_string_pretty(&document).map_err(Failure::failed)?;
        trainer::files::write_atomically(&path, text.as_bytes(), Outlives::Machine)
            .map_err(Failure::failed)?;
        say!("wrote {}", path.display());
    }
    output::print(args.output.format, &document, || table(outcomes, &selection.presets))
}

/// What the figures were made with, under the harness's names where it has them.
fn settings(args: &Args, outcomes: &[Outcome], seconds: f64) -> Value {
    let peft = args.adapter.as_ref().map_or(String::new(), |dir| format!(",peft={}", dir.display()));
    let dtype = json!(args.precision_mode);
    let dtype = dtype.as_str().unwrap_or_default();
    json!({
        "model": "lorafleet",
        "model_args": format!(
            "pretrained={}{peft},dtype={dtype},add_bos_token={}", args.model, args.add_bos_token
        ),
        "lorafleet_version": env!("CARGO_PKG_VERSION"),
        "max_length": args.max_length,
        "batch_tokens": args.batch_tokens,
        "limit": args.limit,
        "fewshot_order": args.fewshot_order,
        "fewshot_seed": ::eval::prompt::fewshot_seed(args.fewshot_order),
        "requests": outcomes.iter().map(|outcome| outcome.requests).sum::<usize>(),
        "evaluation_seconds": seconds,
    })
}

fn table(outcomes: &[Outcome], presets: &[Preset]) -> String {
    let mut rows = Vec::new();
    for outcome in outcomes {
        for figure in &outcome.figures {
            rows.push(vec![
                outcome.task.task.clone(),
                outcome.num_fewshot.to_string(),
                outcome.samples.len().to_string(),
                figure.measure.to_string(),
                format!("{:.4}", figure.value),
                figure.stderr.map_or_else(|| "-".into(), |stderr| format!("± {stderr:.4}")),
            ]);
        }
    }
    for preset in presets {
        let mean = results::mean(preset, outcomes);
        let or_none = |text: Option<String>| text.unwrap_or_else(|| "-".into());
        rows.push(vec![
            preset.preset.clone(),
            or_none(None),
            or_none(mean.map(|mean| mean.documents.to_string())),
            "mean".into(),
            or_none(mean.map(|mean| format!("{:.4}", mean.value))),
            or_none(mean.and_then(|mean| mean.stderr).map(|stderr| format!("± {stderr:.4}"))),
        ]);
    }
    output::table(&["task", "examples", "items", "metric", "value", "stderr"], &rows, &["examples", "items"])
}

/// Something that was given cannot be used; only a failed tensor operation is no fault of the input.
fn unusable(error: EvalError) -> Failure {
    match error {
        EvalError::Trainer(error) => of_trainer(error),
        error => Failure::invalid(error),
    }
}
