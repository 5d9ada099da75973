//! `lorafleet bench orchestration`: how much a coordinator of this machine can schedule, keep and list. The
//! coordinator is a process of its own (`lorafleet up`) on real SQLite, history files and gRPC; the agents are
//! simulated in this process, and nothing is trained.

use super::agent::{self, ACCELERATOR, Plan};
use super::server::Server;
use crate::Failure;
use crate::client::Connection;
use crate::output::{self, say};
use domain::{Clock, SystemClock};
use proto::v1;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::task::JoinSet;

/// Times what a coordinator does beside training: trials, metric reports, listings; prints JSON.
///
/// Every trial is durable at each of its states, and every report before it is acknowledged. A trial that does
/// nothing is proposed, placed, started, reports once and ends. Then fewer trials make many reports, each in a
/// message of its own.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  lorafleet bench orchestration
  lorafleet bench orchestration --trials 100000 --reports 0    # the coordinator's memory
  lorafleet bench orchestration --dir /data                    # on that disk

Trains nothing: agents are simulated, all else is real.")]
pub(crate) struct Args {
    /// Trials that do nothing.
    #[arg(long, default_value_t = 12_500)]
    trials: u32,
    /// Metric reports in all, of a second sweep; 0 leaves it out.
    #[arg(long, default_value_t = 200_000)]
    reports: u64,
    /// Simulated agents.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=1000))]
    agents: u32,
    /// Trials that an agent holds at a time.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pack: u32,
    /// A folder on the disk to use; the data directory is made in it and removed. The system's temporary
    /// folder unless given.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

/// Runs the verb.
pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    if args.trials == 0 {
        return Err(Failure::invalid("--trials: is 0; use 1 or more"));
    }
    let document = crate::block_on(measure(args))?;
    output::to_stdout(&format!("{document:#}"))
}

async fn measure(args: &Args) -> Result<Value, Failure> {
    let server = Server::start(args.dir.as_deref())?;
    let connection = Connection::to(server.endpoint()).await?;
    say!("{} trials that do nothing, on {} simulated agents", args.trials, args.agents);
    let trials = sweep(args, &connection, "trials", args.trials, 1).await?;
    let after_trials = server.usage()?;
    let trials_list = server.time(&["trials", "list", &trials.sweep])?;
    let trials_list_json = server.time(&["trials", "list", &trials.sweep, "-o", "json"])?;
    let list = server.time(&["list"])?;
    let running = args.agents * args.pack;
    let reports = if args.reports == 0 {
        Value::Null
    } else {
        let each = args.reports.div_ceil(u64::from(running));
        say!("{running} trials with {each} reports each");
        sweep(args, &connection, "reports", running, each).await?.document()
    };
    Ok(json!({
        "benchmark": "orchestration",
        "agents": args.agents,
        "pack": args.pack,
        "trials": trials.document(),
        "reports": reports,
        "list_seconds": list,
        "trials_list_seconds": trials_list,
        "trials_list_json_seconds": trials_list_json,
        "coordinator": { "after_trials": after_trials, "at_end": server.usage()? },
        "data_directory_bytes": server.bytes(),
    }))
}

/// What a sweep took.
pub(super) struct Timed {
    sweep: String,
    trials: u32,
    reports: u64,
    pub(super) seconds: f64,
}

impl Timed {
    fn document(&self) -> Value {
        json!({
            "trials": self.trials,
            "reports": self.reports,
            "seconds": self.seconds,
            "trials_per_second": f64::from(self.trials) / self.seconds,
            "reports_per_second": self.reports as f64 / self.seconds,
        })
    }
}

/// Runs a sweep of `trials` trials with `reports` reports each, from its submission to its end.
async fn sweep(
    args: &Args,
    connection: &Connection,
    name: &str,
    trials: u32,
    reports: u64,
) -> Result<Timed, Failure> {
    let acknowledged = Arc::new(AtomicU64::new(0));
    let mut agents = JoinSet::new();
    for number in 0..args.agents {
        let plan = Plan {
            id: format!("{name}-{number}"),
            pack: args.pack,
            reports,
            acknowledged: acknowledged.clone(),
            pace: None,
        };
        let channel = connection.channel();
        #[allow(clippy::disallowed_methods, reason = "aborted when the set is dropped")]
        agents.spawn(agent::serve(plan, channel));
    }
    let (sweep, seconds) = to_its_end(connection, &spec(name, trials, reports), &mut agents).await?;
    check(&sweep, trials, reports, acknowledged.load(Ordering::Relaxed), seconds)
}

/// Submits a sweep and waits for its end; answers with the seconds that it took too.
///
/// # Errors
/// An agent ended before.
pub(super) async fn to_its_end(
    connection: &Connection,
    spec: &Value,
    agents: &mut JoinSet<Result<(), Failure>>,
) -> Result<(v1::Sweep, f64), Failure> {
    let clock = SystemClock::new();
    let started = clock.monotonic();
    let request = v1::SubmitSweepRequest {
        request_id: uuid::Uuid::new_v4().to_string(),
        spec: Some(proto::convert::document(spec)),
        base_models: std::collections::HashMap::new(),
    };
    let submitted = connection.sweeps().submit_sweep(request).await?.into_inner().sweep.unwrap_or_default();
    loop {
        tokio::select! {
            () = tokio::time::sleep(Duration::from_millis(20)) => {}
            Some(ended) = agents.join_next() => return Err(match ended {
                Ok(Err(failure)) => failure,
                other => Failure::failed(format!("an agent ended: {other:?}")),
            }),
        }
        let request = v1::GetSweepRequest { sweep_id: submitted.id.clone() };
        let sweep = connection.sweeps().get_sweep(request).await?.into_inner().sweep.unwrap_or_default();
        if sweep.state() != v1::SweepState::Running {
            return Ok((sweep, (clock.monotonic() - started).as_secs_f64()));
        }
    }
}

/// A figure counts if all of it was done.
pub(super) fn check(
    sweep: &v1::Sweep,
    trials: u32,
    reports: u64,
    acknowledged: u64,
    seconds: f64,
) -> Result<Timed, Failure> {
    let completed: u32 =
        sweep.counts.iter().filter(|c| c.state() == v1::TrialState::Completed).map(|c| c.trials).sum();
    let expected = u64::from(trials) * reports;
    // The last acknowledgements may still be on their way when the sweep is over.
    if completed != trials || acknowledged > expected {
        return Err(Failure::failed(format!(
            "{completed} of {trials} trials were completed, {acknowledged} of {expected} reports acknowledged"
        )));
    }
    Ok(Timed { sweep: sweep.id.clone(), trials, reports: expected, seconds })
}

/// A sweep for simulated agents alone.
pub(super) fn spec(name: &str, trials: u32, reports: u64) -> Value {
    json!({
        "name": name,
        "pretrained_model_id": "/simulated/base",
        "dataset_name": "/simulated/rows.jsonl",
        "search": { "algorithm": "random", "max_trials": trials },
        "parameters": { "learning_rate": { "log_uniform": [1e-6, 1e-1] }, "lora_rank": [4, 8, 16, 32] },
        "max_steps": reports,
        "resources": { "accelerators": [ACCELERATOR] },
    })
}
