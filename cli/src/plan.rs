//! `lorafleet plan`: what a sweep needs, before anything runs; and the check that `run` makes before it starts.

mod device;
mod model;

use crate::download::Downloads;
use crate::evaluations::Reading;
use crate::output::{self, OutputArgs};
use crate::{Failure, evaluations};
use ::eval::exam::Exam;
use config::paths::{self, Named, Place};
use config::sweep_file;
use coordinator::search::{Proposal, Proposed, Searcher};
use device::Device;
use domain::footprint::{self, Engine};
use domain::sweep::Replicates;
use domain::trial::TrialConfig;
use gpu_agent::DeviceOptions;
use gpu_agent::engine::simulated;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::iter;
use std::path::PathBuf;
use trainer::TrainError;
use trainer::preflight::{Preflight, preflight};

/// Shows what each trial of a sweep needs, or what a model needs on each machine, without running anything.
///
/// With --model and a config.json it needs no weights, no data and no network: parameters, adapter size, operations and
/// peak memory of every combination of the values given, on which accelerators each fits, and what its steps take there
/// in seconds and dollars. --solve asks the other way round: the largest value that fits. What a GPU holds and how long
/// it takes is predicted; no GPU has confirmed it yet. What a sweep asks of its adapters (evaluations) is in the seconds, but
/// for answers that are generated; evaluating held-out rows is not.
///
/// Trials are listed as the search would propose them; successive halving may end some early. A trial's
/// operations are those of all its steps at most, with every row as long as max_sequence_length. What all trials take
/// counts the further runs of the best (replicates) as those of the trials that take most.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  lorafleet plan config/sweeps/quickstart.yaml
  lorafleet plan sweep.yaml --set lora_rank=64 -o json
  lorafleet plan --model config.json --lora-rank 8,16,32,64 --precision-mode float16,4bit --device A100-40GB,V100-16GB
  lorafleet plan --model config.json --solve batch_size --device A100-40GB,24GB")]
pub(crate) struct Args {
    /// The sweep file.
    #[arg(value_name = "SWEEP", required_unless_present = "model", conflicts_with = "model")]
    file: Option<PathBuf>,
    /// Sets a key of the sweep file; a dotted key reaches inside. May be given several times.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Accelerators of the catalogue (A100-40GB), CPU, or bytes (24GB). Unless given, those that the sweep names, or all that
    /// can be rented. A trial whose accelerator the sweep chooses is planned for that one alone.
    #[arg(long, value_delimiter = ',')]
    device: Vec<String>,
    #[command(flatten)]
    model: model::Args,
    #[command(flatten)]
    output: OutputArgs,
}

/// Trials that a plan shows at most.
const MOST_TRIALS: usize = 10_000;

/// Runs the verb.
pub(crate) fn run(args: Args) -> Result<(), Failure> {
    let devices = |others: &[String]| match (args.device.as_slice(), others) {
        ([], []) => Device::rented(),
        // A sweep may name others than the catalogue has, of which nothing is known.
        ([], others) => Device::known(others),
        (given, _) => Device::named(given),
    };
    let Some(file) = &args.file else { return model::run(&args.model, &devices(&[])?, args.output.format) };
    let loaded = load(file, &args.set)?;
    let devices = devices(&loaded.spec.named_accelerators())?;
    let may_run = |trial: &Proposed| devices.iter().any(|device| device.may_run(&trial.config));
    if !args.device.is_empty() && !proposals(&loaded)?.iter().any(may_run) {
        return Err(Failure::invalid(format!(
            "--device {}: no trial runs there: the sweep's accelerator is {}; leave --device out, or set accelerator",
            args.device.join(","),
            loaded.spec.accelerators().join(" or ")
        )));
    }
    let (trials, exam) = checked(&loaded)?;
    let mut readings: HashMap<&str, Option<Reading>> = HashMap::new();
    for Planned { trial, preflight } in trials.iter().filter(|_| exam.is_some()) {
        if let (Entry::Vacant(entry), Some(exam)) =
            (readings.entry(trial.config.pretrained_model_id.as_str()), &exam)
        {
            let model = *entry.key();
            entry.insert(evaluations::reading(&loaded, exam, model, &preflight.shape)?);
        }
    }
    let asks = |config: &TrialConfig| loaded.spec.evaluations.as_ref().is_some_and(|e| e.asks(config));
    let of = |Planned { trial, .. }: &Planned| {
        let model = trial.config.pretrained_model_id.as_str();
        readings.get(model).copied().flatten().filter(|_| asks(&trial.config))
    };
    let documents: Vec<_> = trials.iter().map(|trial| document(trial, of(trial), &devices)).collect();
    let generated = if exam.is_some_and(|exam| exam.generates()) {
        "what answers take that are generated is left out of the seconds and dollars\n"
    } else {
        ""
    };
    output::print(args.output.format, &json!(documents), || {
        table(&documents, loaded.spec.replicates) + generated
    })
}

/// Reads a sweep file with `--set KEY=VALUE` overrides.
pub(crate) fn load(file: &std::path::Path, set: &[String]) -> Result<sweep_file::Loaded, Failure> {
    let cwd = std::env::current_dir().map_err(Failure::failed)?;
    let loaded = sweep_file::load(file, &overrides(set)?, &cwd).map_err(Failure::invalid)?;
    evaluations::known(&loaded)?;
    match paths::named(&loaded.document).into_iter().find(|named| named.place == Place::Uploaded) {
        None => Ok(loaded),
        Some(Named { at, name, .. }) => {
            let problem = "is data that a server has; name the server with --endpoint";
            Err(Failure::invalid(format!("{}: {at}: {name} {problem}", loaded.locate(&at))))
        }
    }
}

/// [`load`] for a server, of which `elsewhere` says that its agents may have what is not here.
pub(crate) fn load_for(
    file: &std::path::Path,
    set: &[String],
    elsewhere: bool,
) -> Result<sweep_file::Loaded, Failure> {
    if !elsewhere {
        return load(file, set);
    }
    let cwd = std::env::current_dir().map_err(Failure::failed)?;
    let loaded = sweep_file::load_for_elsewhere(file, &overrides(set)?, &cwd).map_err(Failure::invalid)?;
    evaluations::known(&loaded)?;
    Ok(loaded)
}

/// The keys and values of `--set KEY=VALUE`.
pub(crate) fn overrides(set: &[String]) -> Result<Vec<(String, String)>, Failure> {
    let mut overrides = Vec::new();
    for pair in set {
        let (key, value) = pair.split_once('=').ok_or_else(|| {
            Failure::invalid(format!(
                "--set {pair}: no `=`; write --set KEY=VALUE, as in --set max_steps=100"
            ))
        })?;
        overrides.push((key.trim().to_string(), value.trim().to_string()));
    }
    Ok(overrides)
}

/// A trial to come, and what its model and data say about it.
pub(crate) struct Planned {
    trial: Proposed,
    preflight: Preflight,
}

/// Base models by name, and their shapes.
pub(crate) type BaseModels = HashMap<String, proto::v1::ModelShape>;

/// The trials' base models.
pub(crate) fn base_models(planned: &[Planned]) -> BaseModels {
    let model = |Planned { trial, preflight }: &Planned| {
        (trial.config.pretrained_model_id.clone(), preflight.shape.shape().into())
    };
    planned.iter().map(model).collect()
}

/// The trials that the search would propose, each checked against its model and data as far as that goes
/// without training. Models and data are read once for all trials that share them.
pub(crate) fn check(loaded: &sweep_file::Loaded) -> Result<Vec<Planned>, Failure> {
    checked(loaded).map(|(planned, _)| planned)
}

/// [`check`], with what the sweep asks.
fn checked(loaded: &sweep_file::Loaded) -> Result<(Vec<Planned>, Option<Exam>), Failure> {
    let mut known: Vec<(TrialConfig, Preflight)> = Vec::new();
    let (mut planned, mut downloads) = (Vec::new(), Downloads::default());
    for trial in proposals(loaded)? {
        let key = what_reading_depends_on(&trial.config);
        let preflight = match known.iter().find(|(k, _)| *k == key) {
            Some((_, preflight)) => preflight.clone(),
            None => {
                downloads.of(&trial.config, &|key| format!("{}: {key}", place(loaded, key)))?;
                let found = preflight(&trial.config, Engine::Cpu)
                    .map_err(|error| explain(loaded, &trial.config, &error))?;
                known.push((key, found.clone()));
                found
            }
        };
        planned.push(Planned { trial, preflight });
    }
    let shapes = planned.iter().map(|planned| &planned.preflight.shape);
    let exam = evaluations::documents(loaded, shapes, &mut downloads)?;
    Ok((planned, exam))
}

/// The base models of the trials that the search would propose, by name, from each one's config.json alone.
pub(crate) fn outline(loaded: &sweep_file::Loaded) -> Result<BaseModels, Failure> {
    let mut models = BaseModels::new();
    for trial in proposals(loaded)? {
        let name = trial.config.pretrained_model_id;
        if let Entry::Vacant(entry) = models.entry(name) {
            let shape = simulated::shape(entry.key()).map_err(|failure| {
                let key = "pretrained_model_id";
                Failure::invalid(format!("{}: {key}: {}", place(loaded, key), failure.message))
            })?;
            entry.insert(shape.into());
        }
    }
    Ok(models)
}

/// Refuses a sweep of which a trial would wait for ever, because no device that it may run on computes with its numbers.
pub(crate) fn check_numbers(loaded: &sweep_file::Loaded, devices: &[DeviceOptions]) -> Result<(), Failure> {
    let lacks =
        |device: &DeviceOptions| device.compute_capability?.lacks_bfloat16(device.accelerator.as_str());
    // Most machines have no such device, and none of their sweeps' trials has to be looked at.
    if !devices.iter().any(|device| lacks(device).is_some()) {
        return Ok(());
    }
    for trial in proposals(loaded)? {
        let precision = trial.config.base_model().precision;
        if precision.compute_capability().is_none() {
            continue;
        }
        let named = match &trial.config.accelerator {
            Some(accelerator) => std::slice::from_ref(accelerator),
            None => loaded.spec.resources.accelerators.as_slice(),
        };
        let allowed = |device: &&DeviceOptions| {
            named.is_empty() || named.iter().any(|name| name.eq_ignore_ascii_case(&device.accelerator))
        };
        let problems: Option<Vec<String>> = devices.iter().filter(allowed).map(lacks).collect();
        if let Some(problem) = problems.and_then(|problems| problems.into_iter().next()) {
            let key = if precision.compute_dtype.is_some() { "compute_dtype" } else { "precision_mode" };
            return Err(Failure::invalid(format!("{}: {key}: {problem}", place(loaded, key))));
        }
    }
    Ok(())
}

/// The trials that the search would propose.
fn proposals(loaded: &sweep_file::Loaded) -> Result<Vec<Proposed>, Failure> {
    let mut searcher = Searcher::new(&loaded.spec).map_err(|problems| {
        let lines: Vec<_> = problems.iter().map(|p| format!("{}: {p}", loaded.locate(&p.path))).collect();
        Failure::invalid(lines.join("\n"))
    })?;
    let mut trials = Vec::new();
    while trials.len() < MOST_TRIALS {
        // Each trial ends at once, so that no limit on concurrent trials holds the next one back.
        let Proposal::Trial(trial) = searcher.propose() else { break };
        searcher.ended(trial.number, None);
        trials.push(trial);
    }
    Ok(trials)
}

/// How the rows of the trials are read, each way once, in the order of the trials.
pub(crate) fn readings(planned: &[Planned]) -> Vec<String> {
    let mut readings = Vec::new();
    for Planned { trial, preflight } in planned {
        let reading = reading(&trial.config, preflight);
        if !readings.contains(&reading) {
            readings.push(reading);
        }
    }
    readings
}

/// How a trial's rows are read: how many there are, and what was left out of them.
pub(crate) fn reading(config: &TrialConfig, preflight: &Preflight) -> String {
    let names = iter::once(&config.dataset_name).chain(config.interleave_datasets.iter().flatten());
    let names: Vec<_> = names.map(String::as_str).collect();
    format!(
        "{}: {} rows to train on, {} held out, {} cut to {} tokens, {} skipped as unreadable",
        names.join(", "),
        preflight.rows,
        preflight.eval_rows,
        preflight.truncated_rows,
        config.max_sequence_length,
        preflight.skipped_rows
    )
}

/// A configuration without what changes neither the rows read nor the adapter's shape.
fn what_reading_depends_on(config: &TrialConfig) -> TrialConfig {
    let defaults = TrialConfig::default();
    TrialConfig {
        learning_rate: defaults.learning_rate,
        lr_scheduler_type: defaults.lr_scheduler_type,
        warmup_steps: defaults.warmup_steps,
        warmup_ratio: defaults.warmup_ratio,
        weight_decay: defaults.weight_decay,
        adam_beta1: defaults.adam_beta1,
        adam_beta2: defaults.adam_beta2,
        adam_epsilon: defaults.adam_epsilon,
        max_grad_norm: defaults.max_grad_norm,
        lora_alpha: defaults.lora_alpha,
        lora_dropout: defaults.lora_dropout,
        accelerator: defaults.accelerator,
        ..config.clone()
    }
}

/// Where a sweep file sets a parameter.
pub(crate) fn place(loaded: &sweep_file::Loaded, key: &str) -> String {
    let searched = loaded.spec.parameters.iter().any(|(name, _)| name == key);
    loaded.locate(&if searched { format!("parameters.{key}") } else { key.to_string() })
}

/// A trainer's error, with the place in the sweep file and the key that it comes from.
fn explain(loaded: &sweep_file::Loaded, config: &TrialConfig, error: &TrainError) -> Failure {
    let place = |key: &str| place(loaded, key);
    let at = |key: &str| format!("{}: {key}: {error}", place(key));
    Failure::invalid(match error {
        TrainError::Parameter { key, .. } => format!("{}: {error}", place(key)),
        TrainError::Model { .. } => at("pretrained_model_id"),
        TrainError::Data { path, .. } => match &config.eval_dataset_name {
            Some(name) if is_of(path, name) => at("eval_dataset_name"),
            _ => match config.interleave_datasets.iter().flatten().any(|name| is_of(path, name)) {
                true => at("interleave_datasets"),
                false => at("dataset_name"),
            },
        },
        TrainError::Io { .. } | TrainError::Tensor(_) => error.to_string(),
    })
}

/// Whether a place in a file (`rows.jsonl:6`) is in the file or the folder that a parameter names.
fn is_of(place: &std::path::Path, name: &str) -> bool {
    let Ok(path) = trainer::locate::dataset("eval_dataset_name", name) else { return false };
    let in_file = place
        .to_string_lossy()
        .strip_prefix(&*path.to_string_lossy())
        .is_some_and(|rest| rest.starts_with(':'));
    in_file || place.starts_with(&path)
}

fn document(planned: &Planned, asked: Option<Reading>, devices: &[Device]) -> Value {
    let Planned { trial, preflight } = planned;
    let config = &trial.config;
    let shape = preflight.shape.shape();
    let tokens = footprint::tokens_per_step(config);
    let steps = config.total_steps(preflight.rows);
    let tensors = 2 * preflight.target_modules + preflight.saved_modules;
    let length = u64::from(config.max_sequence_length);
    let flops = shape.flops_per_token(&preflight.load, length);
    let on = |device: &Device| device.document(&shape, config, &preflight.load, steps, asked);
    json!({
        "trial": trial.number,
        "parameters": trial.parameters,
        "steps": steps,
        "rows": preflight.rows,
        "eval_rows": preflight.eval_rows,
        "truncated_rows": preflight.truncated_rows,
        "skipped_rows": preflight.skipped_rows,
        "trainable_parameters": preflight.trainable_parameters,
        "total_parameters": preflight.total_parameters,
        "trainable_share": preflight.trainable_parameters as f64 / preflight.total_parameters as f64,
        "adapter_bytes": footprint::adapter_bytes(preflight.trainable_parameters + preflight.load.initial_parameters, tensors),
        "peak_memory_bytes": preflight.peak_memory_bytes,
        "tokens_at_most": tokens * steps,
        "flops_per_token": flops,
        "flops_at_most": flops * (tokens * steps) as f64,
        "evaluation_tokens": asked.map(|asked| asked.tokens),
        "devices": devices.iter().filter(|device| device.may_run(config)).map(on).collect::<Vec<_>>(),
    })
}

fn table(documents: &[Value], replicates: Option<Replicates>) -> String {
    let row = |d: &Value| {
        let parameters = d["parameters"].as_object().into_iter().flatten();
        let parameters: Vec<_> = parameters.map(|(k, v)| format!("{k} {}", output::short(v))).collect();
        let number = |key: &str| d[key].as_f64().unwrap_or_default();
        vec![
            d["trial"].to_string(),
            parameters.join(" · "),
            d["steps"].to_string(),
            format!("{}/{}", d["truncated_rows"], number("rows") + number("eval_rows")),
            d["skipped_rows"].to_string(),
            format!("{} ({:.2} %)", d["trainable_parameters"], 100.0 * number("trainable_share")),
            output::bytes(number("adapter_bytes") as u64),
            output::bytes(number("peak_memory_bytes") as u64),
            d["tokens_at_most"].to_string(),
            format!("{:.1}", number("flops_at_most") / 1e9),
        ]
    };
    let rows: Vec<_> = documents.iter().map(row).collect();
    let headings = [
        "trial",
        "parameters",
        "steps",
        "rows cut",
        "rows skipped",
        "trainable",
        "adapter",
        "peak memory",
        "tokens ≤",
        "GFLOP ≤",
    ];
    let total = in_all(documents.iter().filter_map(|d| d["flops_at_most"].as_f64()).collect(), replicates);
    let spare = ["tokens ≤", "adapter", "GFLOP ≤", "trainable", "rows skipped", "rows cut"];
    let table = output::table(&headings, &rows, &spare);
    let all = documents.iter().flat_map(|d| d["devices"].as_array()).flatten();
    let again = replicates.map_or_else(String::new, |replicates| {
        let trials = u32::try_from(rows.len()).unwrap_or(u32::MAX);
        let finalists = replicates.finalists.min(trials);
        format!(" and {} more runs of the best {finalists} of them", replicates.on_top_of(trials))
    });
    format!(
        "{table}\n{} trials{again} · {:.1} GFLOP at most\n\n{}{}",
        rows.len(),
        total / 1e9,
        devices_table(documents, replicates),
        device::prices(all)
    )
}

/// What all trials take together, each of which takes one of these, with the further runs of the best: which those will
/// be is not known, so they are taken to be those that take most.
fn in_all(mut each: Vec<f64>, replicates: Option<Replicates>) -> f64 {
    each.sort_by(|a, b| b.total_cmp(a));
    let again = replicates.map_or(0.0, |Replicates { runs, finalists }| {
        f64::from(runs - 1) * each.iter().take(finalists as usize).sum::<f64>()
    });
    each.iter().sum::<f64>() + again
}

/// What the trials take on each device, one after the other, the further runs of the best among them; each device counts the
/// trials that may run there.
fn devices_table(documents: &[Value], replicates: Option<Replicates>) -> String {
    let mut devices: Vec<(&str, Vec<&Value>)> = Vec::new();
    for device in documents.iter().filter_map(|trial| trial["devices"].as_array()).flatten() {
        let name = device["device"].as_str().unwrap_or_default();
        match devices.iter_mut().find(|(known, _)| *known == name) {
            Some((_, trials)) => trials.push(device),
            None => devices.push((name, vec![device])),
        }
    }
    if devices.is_empty() {
        return String::new();
    }
    let row = |(name, trials): &(&str, Vec<&Value>)| {
        let fitting = trials.iter().filter(|d| d["fits"] == json!(true)).count();
        let unsupported = match trials.iter().filter(|d| d["unsupported"].is_string()).count() {
            0 => String::new(),
            count => format!(" ({count}: {})", device::UNSUPPORTED),
        };
        let sum = |key: &str| {
            let each: Vec<_> = trials.iter().filter_map(|d| d[key].as_f64()).collect();
            (!each.is_empty()).then(|| in_all(each, replicates))
        };
        vec![
            (*name).to_string(),
            format!("{fitting} of {}{unsupported}", trials.len()),
            output::bytes(
                trials.iter().filter_map(|d| d["peak_memory_bytes"].as_u64()).max().unwrap_or_default(),
            ),
            output::or_none(sum("seconds").map(output::duration)),
            output::or_none(sum("cost_usd").map(output::dollars)),
        ]
    };
    let rows: Vec<_> = devices.iter().map(row).collect();
    output::table(&["device", "trials that fit", "largest peak", "their time", "their cost"], &rows, &[])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn further_runs_count_as_those_of_the_dearest() {
        let again = |runs, finalists| Some(Replicates { runs, finalists });
        for (each, replicates, want) in [
            (vec![1.0, 4.0, 2.0], None, 7.0),
            (vec![1.0, 4.0, 2.0], again(3, 2), 7.0 + 2.0 * 6.0),
            (vec![1.0, 4.0, 2.0], again(2, 9), 14.0),
            (Vec::new(), again(3, 3), 0.0),
        ] {
            assert_eq!(in_all(each.clone(), replicates), want, "{each:?} {replicates:?}");
        }
    }
}
