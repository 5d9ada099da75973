//! `lorafleet up`: coordinator and agent of this machine as a server, for verbs in other terminals.

use crate::Failure;
use crate::client;
use crate::embedded::{DeviceArgs, Embedded};
use crate::interrupt::Requests;
use crate::output::say;
use coordinator::Access;
use coordinator::access::AccessArgs;
use gpu_agent::DeviceOptions;
use gpu_agent::spot::{Notices, Source};
use security::Secret;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;
use telemetry::http::{self, Readiness};

/// The time in which it ends once its cloud takes the machine away: as an agent's, less than Google's 30 seconds.
const LEAVING: Duration = Duration::from_secs(24);

/// The time after which it says that it waits for the cloud's word.
const SILENCE: Duration = Duration::from_secs(1);

/// Serves this machine: a coordinator and an agent on its GPUs or its CPU, until Ctrl-C or SIGTERM.
///
/// Goes on with every unfinished sweep of the data directory. Verbs find the server through the same
/// --data-dir, or by --endpoint; a browser shows sweeps, trials and agents at the same address, which beyond this machine
/// is for whoever has a token of --tokens. When it is told to stop, or its cloud says that it takes the machine away, it
/// checkpoints its trials; the next start goes on.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  lorafleet up
  lorafleet up --data-dir /data/lorafleet --listen 127.0.0.1:7401 --price-per-hour 0.35
  lorafleet up --listen 0.0.0.0:7401 --tls-cert gpu1.crt --tls-key gpu1.key --tokens tokens.yaml --allow-hub all
  lorafleet submit sweep.yaml && lorafleet list    # in another terminal

Exit codes: 0 stopped when told to, 1 it could not go on, 2 usage, or the data directory is in use.")]
pub(crate) struct Args {
    /// Where sweeps, metrics and adapters are kept.
    #[arg(
        long,
        alias = "data_dir",
        env = "LORAFLEET_DATA_DIR",
        default_value = "./lorafleet-data",
        value_name = "DIR"
    )]
    data_dir: PathBuf,
    /// Address to serve at; port 0 takes a free one. With a certificate, this machine has a second one, without.
    #[arg(long, default_value = "127.0.0.1:7401", value_name = "ADDRESS")]
    listen: SocketAddr,
    /// Bytes of uploaded data, and of bases in 4 bits, that the agent keeps in that folder at most, such as 50GB or 500GiB.
    /// What was not used for longest goes first, and nothing that a trial uses.
    #[arg(
        long,
        alias = "cache_limit",
        env = "LORAFLEET_CACHE_LIMIT",
        default_value = "50GB",
        value_name = "BYTES",
        value_parser = config::size::parse
    )]
    cache_limit: u64,
    /// Who says that this machine is about to be taken away, which is then as SIGTERM, within 29 seconds: `gce` or `aws`, the
    /// metadata server of that cloud, also at another address as in gce=http://127.0.0.1:8080; `off`; or `auto`, what the
    /// machine's firmware says that it is.
    #[arg(
        long,
        alias = "spot_notice",
        env = "LORAFLEET_SPOT_NOTICE",
        default_value = "auto",
        value_name = "auto|off|gce[=URL]|aws[=URL]",
        value_parser = Source::parse
    )]
    spot_notice: Source,
    #[command(flatten)]
    devices: DeviceArgs,
    #[command(flatten)]
    access: AccessArgs,
    /// Address of /metrics, /healthz and /readyz; nothing is served there unless it is given.
    #[arg(long, env = "LORAFLEET_HTTP", value_name = "ADDRESS")]
    pub(crate) http: Option<SocketAddr>,
}

/// Runs the verb.
pub(crate) async fn run(args: Args) -> Result<(), Failure> {
    let (access, token) = args.access.with_agent(args.listen).map_err(Failure::invalid)?;
    let (devices, prices) = args.devices.devices()?;
    prices.into_iter().for_each(|line| say!("{line}"));
    client::refuse_in_use(&args.data_dir).await?;
    let ready = Readiness::not_yet("it has not started to serve");
    match http::beside(args.http, ready.clone(), async {
        Ok(serve(args, devices, (access, token), &ready).await)
    })
    .await
    {
        Ok(served) => served,
        Err(end) => Err(Failure::invalid(end)),
    }
}

/// Serves until it is told to stop.
async fn serve(
    args: Args,
    devices: Vec<DeviceOptions>,
    (access, token): (Access, Option<Secret>),
    ready: &Readiness,
) -> Result<(), Failure> {
    let mut requests = Requests::new()?;
    let watching = actor::Scope::new();
    let mut notices = Notices::watch(args.spot_notice, &watching);
    // Whoever starts it again after a notice must not have its trials begin once more.
    if tokio::time::timeout(SILENCE, notices.stays()).await.is_err() {
        say!("waiting: the cloud says that it takes this machine away, or has not said yet that it does not");
        tokio::select! {
            () = notices.stays() => {}
            () = requests.next() => return Ok(()),
        }
    }
    let mut server = Embedded::serve(&args.data_dir, args.listen, access.clone()).await?;
    if let Err(failure) = server.start_agent(&args.data_dir, devices, args.cache_limit, token).await {
        server.stop().await;
        return Err(failure);
    }
    ready.look(server.health().look());
    say!(
        "LoraFleet {} · serving {} at {} (Ctrl-C stops it)",
        env!("CARGO_PKG_VERSION"),
        args.data_dir.display(),
        access.url(server.address())
    );
    if coordinator::web::is_served(args.listen, &access) {
        say!("live page: {}/", access.url(server.address()));
    }
    let mut limit = Duration::MAX;
    let ended = tokio::select! {
        () = requests.next() => {
            say!("stopping: checkpointing (once more ends at once)");
            Ok(())
        }
        why = notices.leaves() => {
            say!("this machine is about to be taken away ({why}): checkpointing");
            limit = LEAVING;
            Ok(())
        }
        () = server.ended() => Err(Failure::failed("the coordinator cannot go on; its last message says why")),
    };
    ready.not_now("it ends");
    tokio::select! {
        stopped = tokio::time::timeout(limit, server.stop()) => {
            if stopped.is_err() {
                tracing::warn!("not all was done in time; trials go on from their last checkpoints");
            }
        }
        () = requests.next() => {}
    }
    watching.cancel();
    ended
}
