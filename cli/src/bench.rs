//! `lorafleet bench`: how fast parts of LoraFleet are on this machine. Every benchmark prints one JSON object.

mod agent;
mod fleet;
mod load;
mod orchestration;
mod server;
mod train;

use crate::Failure;
use serde_json::{Value, json};
use trainer::profile::{Profile, Share};

/// Times parts of LoraFleet on this machine; prints JSON.
#[derive(Debug, clap::Subcommand)]
#[command(after_help = "Examples:
  lorafleet bench train --trials 4 --batch 1
  lorafleet bench load models/open_llama_7b --precision-mode 4bit
  lorafleet bench orchestration
  lorafleet bench fleet --agents 2000 --seconds 300")]
pub(crate) enum Verb {
    Train(train::Args),
    Load(load::Args),
    Orchestration(orchestration::Args),
    Fleet(fleet::Args),
}

/// Runs the verb.
pub(crate) fn run(verb: Verb) -> Result<(), Failure> {
    match verb {
        Verb::Train(args) => train::run(&args),
        Verb::Load(args) => load::run(&args),
        Verb::Orchestration(args) => orchestration::run(&args),
        Verb::Fleet(args) => fleet::run(&args),
    }
}

/// Where a GPU's time went.
fn profile(Profile { seconds, shares }: Profile) -> Value {
    let share = |Share { what, calls, seconds }| json!({ "what": what, "calls": calls, "seconds": seconds });
    json!({ "seconds": seconds, "shares": shares.into_iter().map(share).collect::<Vec<_>>() })
}
