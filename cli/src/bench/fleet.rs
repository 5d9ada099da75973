//! `lorafleet bench fleet`: what a coordinator of this machine has to do with many agents that report at the pace of training.
//! The coordinator is a process of its own, as in `lorafleet bench orchestration`; each simulated agent has a connection of its own.

use super::agent::{self, Pace, Plan};
use super::orchestration::{check, spec, to_its_end};
use super::server::Server;
use crate::Failure;
use crate::client::Connection;
use crate::output::{self, say};
use domain::SystemClock;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::task::JoinSet;

/// The time between two reports of an agent.
const EVERY: Duration = Duration::from_secs(1);

/// Times how long reports of many agents wait for their acknowledgement; prints JSON.
///
/// Each agent trains one trial and reports once a second; reports are spread over the second. A report is durable before it is
/// acknowledged. Agents and coordinator share this machine.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  lorafleet bench fleet
  lorafleet bench fleet --agents 2000 --seconds 300

Trains nothing: agents are simulated, all else is real. It needs some more open files than there are agents, in each of two
processes (`ulimit -n`).")]
pub(crate) struct Args {
    /// Simulated agents.
    #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(u32).range(1..=20_000))]
    agents: u32,
    /// Seconds for which each reports.
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    seconds: u64,
    /// A folder on the disk to use; the data directory is made in it and removed. The system's temporary
    /// folder unless given.
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
}

/// Runs the verb.
pub(crate) fn run(args: &Args) -> Result<(), Failure> {
    let document = crate::block_on(measure(args))?;
    output::to_stdout(&format!("{document:#}"))
}

async fn measure(args: &Args) -> Result<Value, Failure> {
    let server = Server::start(args.dir.as_deref())?;
    let (acknowledged, waits) = (Arc::new(AtomicU64::new(0)), Arc::new(Mutex::new(Vec::new())));
    let mut agents = JoinSet::new();
    say!("{} simulated agents, each a report a second for {} s", args.agents, args.seconds);
    for number in 0..args.agents {
        let pace = Pace {
            every: EVERY,
            first: EVERY.mul_f64(f64::from(number) / f64::from(args.agents)),
            clock: SystemClock::new(),
            waits: waits.clone(),
        };
        let plan = Plan {
            id: format!("fleet-{number}"),
            pack: 1,
            reports: args.seconds,
            acknowledged: acknowledged.clone(),
            pace: Some(pace),
        };
        let channel = Connection::to(server.endpoint()).await?.channel();
        #[allow(clippy::disallowed_methods, reason = "aborted when the set is dropped")]
        agents.spawn(agent::serve(plan, channel));
    }
    let connection = Connection::to(server.endpoint()).await?;
    let spec = spec("fleet", args.agents, args.seconds);
    let (sweep, seconds) = to_its_end(&connection, &spec, &mut agents).await?;
    let timed = check(&sweep, args.agents, args.seconds, acknowledged.load(Ordering::Relaxed), seconds)?;
    let mut waits = std::mem::take(&mut *waits.lock().unwrap_or_else(PoisonError::into_inner));
    waits.sort_by(f32::total_cmp);
    let reports = u64::from(args.agents) * args.seconds;
    Ok(json!({
        "benchmark": "fleet",
        "agents": args.agents,
        "reports": reports,
        "seconds": timed.seconds,
        "reports_per_second": reports as f64 / timed.seconds,
        "acknowledgement_seconds": {
            "p50": quantile(&waits, 0.5),
            "p90": quantile(&waits, 0.9),
            "p99": quantile(&waits, 0.99),
            "max": quantile(&waits, 1.0),
        },
        "coordinator": server.usage()?,
        "data_directory_bytes": server.bytes(),
    }))
}

/// The value that this share of sorted ones does not exceed.
fn quantile(sorted: &[f32], share: f64) -> Option<f32> {
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.saturating_sub(1)).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles() {
        let hundred: Vec<_> = (1..=100).map(|value| value as f32).collect();
        for (sorted, share, expected) in [
            (&hundred[..], 0.5, Some(50.0)),
            (&hundred, 0.99, Some(99.0)),
            (&hundred, 1.0, Some(100.0)),
            (&hundred[..1], 0.01, Some(1.0)),
            (&[], 0.5, None),
        ] {
            assert_eq!(quantile(sorted, share), expected, "{share} of {}", sorted.len());
        }
    }
}
