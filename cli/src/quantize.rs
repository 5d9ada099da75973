//! `quantize`: a model with its linear layers in NF4.

use crate::Failure;
use crate::download::Downloads;
use crate::interrupt::Requests;
use crate::output::{self, OutputArgs, say};
use crate::train::progress::Loading;
use domain::trial::ComputeDtype;
use futures::FutureExt;
use serde_json::{Value, json};
use std::path::PathBuf;
use trainer::new_model::SHARD_BYTES;
use trainer::quantize::Quantize;
use trainer::{TrainError, locate};

/// Writes a model with its linear layers in 4 bits (NF4), as transformers and bitsandbytes do.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  lorafleet quantize ./llama --to ./llama-4bit
  lorafleet quantize openlm-research/open_llama_7b --to ./open_llama_7b-4bit --compute-dtype bfloat16

The new directory has the model's tokenizer, and its configuration with a quantization_config; over 5 GB of weights are
in several files. AutoModelForCausalLM.from_pretrained reads it where bitsandbytes is installed, and a sweep with
precision_mode 4bit takes its numbers as they are.")]
pub(crate) struct Args {
    /// The model: a directory, or its name on the hub.
    #[arg(value_name = "MODEL")]
    model: String,
    /// Where to write the new model: a directory that is empty or not there.
    #[arg(long, value_name = "DIR")]
    to: PathBuf,
    /// Whether the magnitudes of the blocks are quantised too.
    #[arg(long, alias = "double_quant", value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    double_quant: bool,
    /// The numbers in which transformers is to compute: float32, bfloat16, float16. The model's own unless given.
    #[arg(long, alias = "compute_dtype", value_name = "TYPE", value_parser = compute_dtype)]
    compute_dtype: Option<ComputeDtype>,
    /// Replaces a model that is in the directory already.
    #[arg(long)]
    overwrite: bool,
    #[command(flatten)]
    output: OutputArgs,
}

fn compute_dtype(text: &str) -> Result<ComputeDtype, String> {
    serde_json::from_value(Value::String(text.into()))
        .map_err(|_| format!("{text} is not float32, bfloat16 or float16"))
}

/// Runs the verb.
pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    let model = config::paths::absolute(&args.model);
    Downloads::default().model(&model, "MODEL")?;
    let model = locate::model(&model).map_err(unusable)?;
    let quantize = Quantize {
        model: &model,
        to: &args.to,
        double_quant: args.double_quant,
        compute_dtype: args.compute_dtype,
        shard_bytes: SHARD_BYTES,
        overwrite: args.overwrite,
    };
    let mut requests = Requests::new()?;
    let mut progress = Loading::of("quantising");
    let written = quantize.run(&mut |read, of| {
        progress.read(read, of);
        requests.next().now_or_never().is_some()
    });
    progress.finish();
    let Some(written) = written.map_err(unusable)? else {
        return Err(Failure::interrupted("interrupted; nothing was written"));
    };
    let document = json!({
        "model": args.to.display().to_string(),
        "base": model.display().to_string(),
        "layers": written.layers,
        "weight_files": written.weight_files,
        "bytes": written.bytes,
        "base_bytes": written.source_bytes,
        "double_quant": args.double_quant,
        "compute_dtype": written.compute_dtype,
    });
    output::print(args.output.format, &document, || {
        let (bytes, of) = (output::bytes(written.bytes), output::bytes(written.source_bytes));
        say!("{bytes} of {of}, {} layers in 4 bits", written.layers);
        format!("{}\n", args.to.display())
    })
}

/// A failed write or tensor operation is no fault of what was given.
fn unusable(error: TrainError) -> Failure {
    match error {
        TrainError::Io { .. } | TrainError::Tensor(_) => Failure::failed(error),
        _ => Failure::invalid(error),
    }
}
