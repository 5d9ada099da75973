//! `lorafleet doctor`: whether a machine has what it takes, and what to do where it has not.
//!
//! | file | holds |
//! |---|---|
//! | `mod.rs` | the verb, and what a check can say |
//! | `machine.rs` | what this machine has: accelerators, memory, disk |
//! | `network.rs` | what it reaches: a server, etcd, a collector; the addresses that it would serve at |
//! | `store.rs` | where metrics and checkpoints are to lie |

mod machine;
mod network;
mod store;

use crate::Failure;
use crate::client::ServerArgs;
use crate::output::{self, OutputArgs};
use security::args::EtcdArgs;
use serde::Serialize;
use serde_json::json;
use std::net::SocketAddr;

/// Checks this machine: GPUs and driver, memory, disk, the addresses to serve at, and the server, etcd, object store and
/// collector that are named. Says what to do where something is missing.
///
/// Nothing is changed: what is written to measure the disk, or to try a store, is removed again.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  lorafleet doctor                                             # before `run`
  lorafleet doctor --endpoint https://fleet.example.org:7401   # may I use it?
  lorafleet doctor --data-dir /var/lib/lorafleet --etcd http://10.0.0.2:2379 -o json
  lorafleet doctor --artifacts s3://bucket/fleet --http 127.0.0.1:7402   # before `coordinator`

Exit codes: 0 nothing is in the way (there may be warnings), 1 something is, 2 usage.")]
pub(crate) struct Args {
    /// Address that `up` or a coordinator would serve at.
    #[arg(long, env = "LORAFLEET_LISTEN", default_value = "127.0.0.1:7401", value_name = "ADDRESS")]
    listen: SocketAddr,
    /// Address that it would serve /metrics and /healthz at.
    #[arg(long, env = "LORAFLEET_HTTP", value_name = "ADDRESS")]
    http: Option<SocketAddr>,
    /// Where a coordinator would keep metrics and checkpoints: a directory, s3://BUCKET/PREFIX or gs://BUCKET/PREFIX.
    #[arg(long, env = "LORAFLEET_ARTIFACTS", value_name = "DIR|URL")]
    artifacts: Option<String>,
    /// Addresses of etcd, of a fleet.
    #[arg(long, env = "LORAFLEET_ETCD", value_delimiter = ',', value_name = "URL[,URL…]")]
    etcd: Vec<String>,
    #[command(flatten)]
    etcd_access: EtcdArgs,
    #[command(flatten)]
    server: ServerArgs,
    #[command(flatten)]
    output: OutputArgs,
}

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    /// As it should be.
    Good,
    /// It works, and may not be what is wanted.
    Warning,
    /// In the way.
    Bad,
}

/// What a check found.
#[derive(Debug, Clone, PartialEq, Serialize)]
struct Finding {
    check: &'static str,
    verdict: Verdict,
    found: String,
    /// What to do; empty where nothing is to be done.
    remedy: String,
}

impl Finding {
    fn good(check: &'static str, found: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Good, found: found.into(), remedy: String::new() }
    }

    fn warning(check: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Warning, found: found.into(), remedy: remedy.into() }
    }

    fn bad(check: &'static str, found: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { check, verdict: Verdict::Bad, found: found.into(), remedy: remedy.into() }
    }
}

/// Runs the verb.
pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    let mut findings = vec![machine::memory()];
    findings.extend(machine::accelerators());
    findings.extend(machine::disk(args.server.data_dir()));
    findings.push(network::address(args.listen, "--listen"));
    findings.extend(args.http.map(|http| network::address(http, "--http")));
    findings.extend(network::server(&args.server).await);
    findings.extend(network::etcd(&args.etcd, &args.etcd_access).await);
    if let Some(artifacts) = &args.artifacts {
        findings.extend(store::artifacts(artifacts).await);
    }
    findings.extend(network::collector().await);
    let worst = findings.iter().map(|finding| finding.verdict).max().unwrap_or(Verdict::Good);
    let document = json!({ "verdict": worst, "checks": findings });
    output::print(args.output.format, &document, || text(&findings))?;
    match findings.iter().filter(|finding| finding.verdict == Verdict::Bad).count() {
        0 => Ok(()),
        1 => Err(Failure::failed("one thing is in the way")),
        count => Err(Failure::failed(format!("{count} things are in the way"))),
    }
}

/// One check a line, its remedy below it.
fn text(findings: &[Finding]) -> String {
    let line = |finding: &Finding| {
        let mark = match finding.verdict {
            Verdict::Good => "ok",
            Verdict::Warning => "warning",
            Verdict::Bad => "BAD",
        };
        let remedy = match finding.remedy.as_str() {
            "" => String::new(),
            remedy => format!("\n{:22}→ {remedy}", ""),
        };
        format!("{mark:8} {:12} {}{remedy}", finding.check, finding.found)
    };
    findings.iter().map(line).collect::<Vec<_>>().join("\n")
}
