//! `lorafleet bench load`: a base read from its files onto a device, in the numbers that it is trained in.

use super::train::parameter;
use crate::Failure;
use domain::trial::{ComputeDtype, Precision, PrecisionMode};
use domain::{Clock, SystemClock};
use serde_json::json;
use std::path::PathBuf;
use trainer::TrainError;
use trainer::model::{Base, LoadProgress};
use trainer::run::peak_rss_bytes;

/// Times how long a base takes from its files to a device; prints JSON.
///
/// The weights are brought into the precision's numbers as they come: with 4bit they are quantised. A second time the
/// system has the files in memory. Of a GPU it also tells how long it copied, and how long each kernel ran: side by side, so
/// that where neither takes about all of the seconds, it waited for the files.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  lorafleet bench load models/open_llama_7b --precision-mode 4bit --compute-dtype bfloat16 --device cuda:0
  lorafleet bench load models/open_llama_7b --precision-mode 4bit")]
pub(crate) struct Args {
    /// The model's directory.
    #[arg(value_name = "DIR")]
    model: PathBuf,
    /// Where it is to lie: cpu, cuda or cuda:N.
    #[arg(long, default_value = trainer::device::CPU)]
    device: String,
    /// The base's numbers: float32, bfloat16, float16 or 4bit.
    #[arg(long, default_value = "float32", value_parser = parameter::<PrecisionMode>)]
    precision_mode: PrecisionMode,
    /// With 4bit, the numbers of embedding and head: float32, bfloat16 or float16.
    #[arg(long, value_parser = parameter::<ComputeDtype>)]
    compute_dtype: Option<ComputeDtype>,
    /// With 4bit, quantise the blocks' magnitudes too.
    #[arg(long, default_value_t = true, action = clap::ArgAction::Set)]
    double_quant: bool,
}

/// Runs the verb.
pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let failed = |error: TrainError| match error {
        TrainError::Parameter { .. } | TrainError::Model { .. } => Failure::invalid(error),
        _ => Failure::failed(error),
    };
    let device = trainer::device::open(&args.device).map_err(failed)?;
    let precision = Precision {
        mode: args.precision_mode,
        compute_dtype: args.compute_dtype,
        double_quant: args.double_quant,
    };
    let (clock, mut bytes) = (SystemClock::new(), 0);
    let started = clock.monotonic();
    let load = || {
        Base::load_watched(&args.model, precision, &device, &mut |progress| {
            if let LoadProgress::Read { bytes: read, .. } = progress {
                bytes = read;
            }
        })
    };
    let (base, profile) = trainer::profile::of(&device, load).map_err(failed)?;
    // A GPU may still be at it.
    device.synchronize().map_err(|error| failed(error.into()))?;
    let seconds = clock.monotonic().saturating_sub(started).as_secs_f64();
    let mut document = json!({
        "benchmark": "load",
        "model": args.model,
        "device": args.device,
        "precision_mode": args.precision_mode,
        "compute_dtype": args.compute_dtype,
        "double_quant": args.double_quant,
        "read_bytes": bytes,
        "seconds": seconds,
        "bytes_per_second": bytes as f64 / seconds,
        "base_bytes": base.bytes(),
        "peak_rss_bytes": peak_rss_bytes(),
    });
    if let Some(profile) = profile {
        document["profile"] = super::profile(profile);
    }
    crate::output::to_stdout(&format!("{document:#}"))
}
