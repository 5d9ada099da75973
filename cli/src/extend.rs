//! `lorafleet extend`: more trials, more budget or a wider space for a sweep that is there already.

use crate::client::{Connection, ServerArgs};
use crate::output::OutputArgs;
use crate::{Failure, plan, sweeps};
use config::sweep_file;
use proto::v1;

/// Gives a sweep more trials, more budget or other values to search.
///
/// It may run, be paused or be over; one that is over runs again, and trials that a spent budget had ended go on from
/// their checkpoints. Trials that were proposed stay as they are.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  lorafleet extend quickstart-3fa2 --max-trials 40
  lorafleet extend quickstart-3fa2 --max-cost-usd 20 --max-wall-clock 6h
  lorafleet extend quickstart-3fa2 --set 'parameters.lora_rank=[8, 16, 32]'")]
pub(crate) struct Args {
    /// The sweep's id, as `lorafleet list` shows it.
    #[arg(value_name = "SWEEP_ID")]
    sweep: String,
    /// Trials in all.
    #[arg(long, alias = "max_trials", value_name = "N")]
    max_trials: Option<u32>,
    /// US dollars that it may cost in all.
    #[arg(long, alias = "max_cost_usd", value_name = "USD")]
    max_cost_usd: Option<f64>,
    /// Time that it may take in all, without pauses: 6h, 30m, 1h30m or seconds.
    #[arg(long, alias = "max_wall_clock", value_name = "TIME")]
    max_wall_clock: Option<String>,
    /// Sets a key under `parameters`, `search.max_trials`, `replicates`, `finalists` or `budget`. May be given several times.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    #[command(flatten)]
    server: ServerArgs,
    #[command(flatten)]
    output: OutputArgs,
}

impl Args {
    /// What is to change, as `--set` has it.
    fn changes(&self) -> Result<Vec<(String, String)>, Failure> {
        let mut changes = plan::overrides(&self.set)?;
        let flags = [
            ("search.max_trials", self.max_trials.map(|n| n.to_string())),
            ("budget.max_cost_usd", self.max_cost_usd.map(|usd| usd.to_string())),
            ("budget.max_wall_clock", self.max_wall_clock.clone()),
        ];
        changes.extend(flags.into_iter().filter_map(|(key, value)| Some((key.to_string(), value?))));
        if changes.is_empty() {
            return Err(Failure::invalid(
                "nothing to extend; give --max-trials, --max-cost-usd, --max-wall-clock or --set",
            ));
        }
        Ok(changes)
    }
}

/// Runs the verb.
pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    let changes = args.changes()?;
    let cwd = std::env::current_dir().map_err(Failure::failed)?;
    let sweep = Connection::with(&args.server, async |connection| {
        let spec = sweeps::get(connection, &args.sweep).await?.spec.unwrap_or_default();
        let document = sweep_file::change(proto::convert::from_struct(spec), &changes, &cwd);
        let document = document.map_err(Failure::invalid)?;
        let request = v1::ExtendSweepRequest {
            sweep_id: args.sweep.clone(),
            request_id: uuid::Uuid::new_v4().to_string(),
            spec: Some(proto::convert::to_struct(&document)),
        };
        sweeps::named(connection.sweeps().extend_sweep(request).await?.into_inner().sweep)
    });
    sweeps::show(&sweep.await?, &args.output)
}
