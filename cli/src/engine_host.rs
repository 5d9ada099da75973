//! `lorafleet engine-host`: the process of a device's engine. An agent starts it; no person needs it.

use crate::Failure;
use gpu_agent::engine::child::{self, ChildError};

/// Trains what is written to its standard input on one device, and says how it goes on its standard output.
///
/// Agents start it, one a GPU. Each line is a JSON value, in a form that changes from version to version.
#[derive(Debug, clap::Args)]
#[command(
    name = gpu_agent::ENGINE_HOST,
    hide = true,
    after_help = "Example:\n  lorafleet engine-host --device cuda:0 --memory-bytes 80000000000"
)]
pub(crate) struct Args {
    /// The device: `cpu` or `cuda:N`.
    #[arg(long, value_name = "DEVICE")]
    device: String,
    /// Bytes that its trials may use.
    #[arg(long, value_name = "BYTES")]
    memory_bytes: u64,
    /// What the device is called.
    #[arg(long, value_name = "NAME")]
    accelerator: Option<String>,
}

/// Runs the verb.
pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    child::serve(&args.device, args.memory_bytes, args.accelerator.as_deref()).map_err(|error| match error {
        ChildError::Device(_) => Failure::invalid(error),
        ChildError::Lost(_) | ChildError::Io(_) => Failure::failed(error),
    })
}
