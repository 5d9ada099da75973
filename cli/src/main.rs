//! The `lorafleet` command.

mod failure;
mod train;

pub(crate) use failure::Failure;

use clap::{Parser, Subcommand};

/// Finds the best LoRA fine-tuning configuration for a model, a data set and a budget.
#[derive(Parser)]
#[command(name = "lorafleet", version, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    Train(train::Args),
}

fn main() -> std::process::ExitCode {
    let cli = Cli::parse();
    let result: Result<(), Failure> = match cli.verb {
        Verb::Train(args) => train::run(args),
    };
    match result {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}
