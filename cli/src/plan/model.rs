//! `lorafleet plan --model`: what a model of some shape takes, from its config.json alone.

use super::device::{self, Device};
use crate::Failure;
use crate::output::{self, Format};
use domain::footprint::{self, Engine, ModelShape};
use domain::sweep::check_config;
use domain::trial::TrialConfig;
use serde_json::{Map, Value, json};
use std::path::PathBuf;
use trainer::model::{ModelConfig, Quantization};

/// Values of parameters, each a list.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// A model's config.json, or the directory that holds it.
    #[arg(long, value_name = "CONFIG")]
    model: Option<PathBuf>,
    /// Values of lora_rank.
    #[arg(long, alias = "lora_rank", value_delimiter = ',', requires = "model", conflicts_with = "file")]
    lora_rank: Vec<u32>,
    /// Values of batch_size.
    #[arg(long, alias = "batch_size", value_delimiter = ',', requires = "model", conflicts_with = "file")]
    batch_size: Vec<u32>,
    /// Values of max_sequence_length.
    #[arg(
        long,
        alias = "max_sequence_length",
        value_delimiter = ',',
        requires = "model",
        conflicts_with = "file"
    )]
    max_sequence_length: Vec<u32>,
    /// Values of precision_mode: float32, bfloat16, float16, 4bit. float16 unless given.
    #[arg(
        long,
        alias = "precision_mode",
        value_delimiter = ',',
        requires = "model",
        conflicts_with = "file"
    )]
    precision_mode: Vec<String>,
    /// With 4bit, the numbers of embedding and head. float16 unless given.
    #[arg(long, alias = "compute_dtype", requires = "model", conflicts_with = "file")]
    compute_dtype: Option<String>,
    /// With 4bit, whether magnitudes are quantised too. true unless given or the model is in 4 bits already.
    #[arg(long, alias = "double_quant", requires = "model", conflicts_with = "file")]
    double_quant: Option<bool>,
    /// Steps of a trial.
    #[arg(long, alias = "max_steps", default_value_t = TrialConfig::DEFAULT_MAX_STEPS, requires = "model", conflicts_with = "file")]
    max_steps: u32,
    /// Finds the largest value that fits each device: batch_size, max_sequence_length or lora_rank.
    #[arg(long, value_name = "PARAMETER", requires = "model", conflicts_with = "file", value_parser = SOLVABLE)]
    solve: Option<String>,
}

const SOLVABLE: [&str; 3] = ["batch_size", "max_sequence_length", "lora_rank"];

/// Combinations that are shown at most.
const MOST_ROWS: usize = 10_000;

/// Runs the verb for a model.
pub(super) fn run(args: &Args, devices: &[Device], format: Format) -> Result<(), Failure> {
    let config = config(args)?;
    let (shape, positions) = (config.shape(), config.max_position_embeddings as u64);
    let configs = configs(args, config.quantization)?;
    match &args.solve {
        Some(parameter) => {
            let solve = |config| devices.iter().map(move |device| (config, device));
            let rows = configs.iter().flat_map(solve);
            let documents: Vec<_> =
                rows.map(|(config, device)| solution(&shape, positions, config, device, parameter)).collect();
            output::print(format, &json!(documents), || solutions_table(&documents))
        }
        None => {
            let documents: Vec<_> = configs.iter().map(|config| document(&shape, config, devices)).collect();
            output::print(format, &json!(documents), || table(&documents))
        }
    }
}

/// The model's configuration.
fn config(args: &Args) -> Result<ModelConfig, Failure> {
    let path = args.model.clone().unwrap_or_default();
    let path = if path.is_dir() { path.join("config.json") } else { path };
    let text = std::fs::read_to_string(&path).map_err(|e| {
        Failure::invalid(format!("{}: cannot be read ({e}); name a model's config.json", path.display()))
    })?;
    ModelConfig::parse(&text)
        .map_err(|(problem, remedy)| Failure::invalid(format!("{}: {problem}; {remedy}", path.display())))
}

/// Every combination of the values, checked by the rules of sweep files.
fn configs(args: &Args, quantization: Option<Quantization>) -> Result<Vec<TrialConfig>, Failure> {
    // Files in 4 bits have quantised magnitudes or not.
    let of_files = quantization.map(|quantization| quantization.double_quant);
    if let (Some(asked), Some(has)) = (args.double_quant, of_files)
        && asked != has
    {
        return Err(Failure::invalid(format!(
            "--double-quant: is {asked}, but the model was quantised with bnb_4bit_use_double_quant {has}; leave it out"
        )));
    }
    let numbers = |values: &[u32]| values.iter().map(|value| json!(value)).collect::<Vec<_>>();
    let precision = args.precision_mode.iter().map(|mode| json!(mode)).collect::<Vec<_>>();
    let precision = if precision.is_empty() { vec![json!("float16")] } else { precision };
    let axes = [
        ("precision_mode", precision),
        ("lora_rank", numbers(&args.lora_rank)),
        ("batch_size", numbers(&args.batch_size)),
        ("max_sequence_length", numbers(&args.max_sequence_length)),
    ];
    let mut rows = vec![Map::from_iter([
        ("max_steps".to_string(), json!(args.max_steps)),
        ("compute_dtype".to_string(), json!(args.compute_dtype.as_deref().unwrap_or("float16"))),
        ("double_quant".to_string(), json!(args.double_quant.or(of_files).unwrap_or(true))),
    ])];
    for (name, values) in axes.into_iter().filter(|(_, values)| !values.is_empty()) {
        let with = |row: &Map<String, Value>| {
            let row = row.clone();
            values.clone().into_iter().map(move |value| {
                let mut row = row.clone();
                row.insert(name.into(), value);
                row
            })
        };
        rows = rows.iter().flat_map(with).take(MOST_ROWS).collect();
    }
    let config = |row| {
        let wrong = |problem: String| Failure::invalid(problem);
        let config: TrialConfig =
            serde_json::from_value(Value::Object(row)).map_err(|e| wrong(e.to_string()))?;
        // A model and its data have names elsewhere; here there are none.
        let named = |path: &str| matches!(path, "pretrained_model_id" | "dataset_name");
        let problems = check_config(&config).err().unwrap_or_default();
        match problems.into_iter().find(|problem| !named(&problem.path)) {
            None => Ok(config),
            Some(problem) => Err(wrong(format!("{}: {}; {}", problem.path, problem.problem, problem.remedy))),
        }
    };
    rows.into_iter().map(config).collect()
}

/// The parameters that a row is about.
fn parameters(config: &TrialConfig) -> Value {
    json!({
        "precision_mode": config.precision_mode,
        "lora_rank": config.lora_rank,
        "batch_size": config.batch_size,
        "max_sequence_length": config.max_sequence_length,
    })
}

fn document(shape: &ModelShape, config: &TrialConfig, devices: &[Device]) -> Value {
    let engine = devices.first().map_or(Engine::Gpu, |device| device.engine);
    let load = shape.load_at_most(config, engine);
    let trainable = load.trainable_parameters;
    let peak = shape.peak_bytes(&load, 0);
    let steps = config.total_steps(0);
    let on = |device: &Device| {
        device.document(shape, config, &shape.load_at_most(config, device.engine), steps, None)
    };
    json!({
        "parameters": parameters(config),
        "trainable_parameters": trainable,
        "total_parameters": shape.parameters() + trainable,
        "trainable_share": footprint::trainable_share(trainable, shape.parameters()),
        "adapter_bytes": footprint::adapter_bytes(trainable + load.initial_parameters, 14 * shape.num_hidden_layers),
        "flops_per_token": shape.flops_per_token(&load, u64::from(config.max_sequence_length)),
        "peak_memory_bytes": peak.total(),
        "peak": {
            "weights": peak.weights,
            "adapter": peak.adapter,
            "activations": peak.activations,
            "working": peak.working,
        },
        "peak_memory_bytes_all_recomputed": shape.peak_bytes(&load, shape.num_hidden_layers).total(),
        "devices": devices.iter().map(on).collect::<Vec<_>>(),
    })
}

fn table(documents: &[Value]) -> String {
    let row = |d: &Value| {
        let p = &d["parameters"];
        let bytes = |value: &Value| output::bytes(value.as_u64().unwrap_or_default());
        vec![
            output::short(&p["precision_mode"]),
            p["lora_rank"].to_string(),
            p["batch_size"].to_string(),
            p["max_sequence_length"].to_string(),
            format!(
                "{} ({:.2} %)",
                d["trainable_parameters"],
                100.0 * d["trainable_share"].as_f64().unwrap_or_default()
            ),
            bytes(&d["adapter_bytes"]),
            bytes(&d["peak_memory_bytes"]),
            bytes(&d["peak_memory_bytes_all_recomputed"]),
            d["devices"]
                .as_array()
                .into_iter()
                .flatten()
                .map(device::in_words)
                .collect::<Vec<_>>()
                .join(" · "),
        ]
    };
    let rows: Vec<_> = documents.iter().map(row).collect();
    let headings =
        ["precision", "rank", "batch", "length", "trainable", "adapter", "peak", "all again", "fits"];
    let devices = documents.iter().flat_map(|d| d["devices"].as_array()).flatten();
    output::table(&headings, &rows, &["trainable", "adapter"]) + &device::prices(devices)
}

/// The largest value of a parameter with which a trial fits, without computing a layer again and with all of them.
fn solution(
    shape: &ModelShape,
    positions: u64,
    config: &TrialConfig,
    device: &Device,
    parameter: &str,
) -> Value {
    let with = |value: u32| {
        let mut config = config.clone();
        match parameter {
            "batch_size" => config.batch_size = value,
            "max_sequence_length" => config.max_sequence_length = value,
            _ => config.lora_rank = value,
        }
        config
    };
    let narrowest = shape.linears().iter().map(|l| l.in_features.min(l.out_features)).min().unwrap_or(1);
    // What the model itself allows.
    let (least, most) = match parameter {
        "max_sequence_length" => (2, positions),
        "lora_rank" => (1, narrowest),
        _ => (1, u64::from(u32::MAX - 1)),
    };
    let most = u32::try_from(most).unwrap_or(u32::MAX - 1);
    // More of either takes more memory, so that the answer can be closed in on.
    let largest = |recomputed: u64| {
        let fits = |value| device.fits(shape, &with(value), recomputed);
        if !fits(least) {
            return None;
        }
        let (mut fitting, mut too_large) = (least, most + 1);
        while too_large - fitting > 1 {
            let middle = fitting + (too_large - fitting) / 2;
            if fits(middle) { fitting = middle } else { too_large = middle }
        }
        Some(fitting)
    };
    let mut given = parameters(config);
    if let Some(given) = given.as_object_mut() {
        given.remove(parameter);
    }
    json!({
        "device": device.name,
        "memory_bytes": device.memory_bytes,
        "parameters": given,
        "parameter": parameter,
        "largest": largest(0),
        "largest_all_recomputed": largest(shape.num_hidden_layers),
        "limit_of_the_model": (most < u32::MAX - 1).then_some(most),
    })
}

fn solutions_table(documents: &[Value]) -> String {
    let row = |d: &Value| {
        let given = d["parameters"].as_object().into_iter().flatten();
        let given: Vec<_> = given.map(|(key, value)| format!("{key} {}", output::short(value))).collect();
        vec![
            output::short(&d["device"]),
            given.join(" · "),
            output::short(&d["parameter"]),
            output::or_none(d["largest"].as_u64()),
            output::or_none(d["largest_all_recomputed"].as_u64()),
        ]
    };
    let rows: Vec<_> = documents.iter().map(row).collect();
    output::table(&["device", "with", "parameter", "largest", "all layers again"], &rows, &[])
}
