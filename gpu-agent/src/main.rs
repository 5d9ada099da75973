//! The `gpu-agent` program: this machine's devices, for a coordinator elsewhere.

use clap::{Parser, Subcommand};
use domain::SystemClock;
use gpu_agent::devices::choose::Found;
use gpu_agent::devices::simulated::SimulateArgs;
use gpu_agent::engine::child::{self, ChildError};
use gpu_agent::spot::{Notices, Source};
use gpu_agent::{Coordinator, DeviceOptions, MARGIN, Options, SHUTDOWN_GRACE, devices};
use security::args::{ClientArgs, EtcdArgs};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use telemetry::End;
use telemetry::http::{self, Readiness};

/// Trains trials on this machine's devices for a coordinator elsewhere.
///
/// It dials out only, so that it may stand behind NAT. With --etcd it registers itself there, finds the leading
/// coordinator, and follows when another leads. While nobody answers it trains on, and keeps what it has to say. Ctrl-C or
/// SIGTERM checkpoint its trials and give them back, within 20 seconds, and it ends within 27; once more ends it at once. So does the word of the
/// cloud that it takes the machine away.
#[derive(Debug, Parser)]
#[command(
    name = "gpu-agent",
    version,
    args_conflicts_with_subcommands = true,
    after_help = "Examples:
  gpu-agent --coordinator http://10.0.0.5:7401 --data-dir /var/lib/lorafleet-agent
  gpu-agent --etcd http://10.0.0.2:2379,http://10.0.0.3:2379 --devices 0,1 --price-per-hour 7.34 \\
      --label zone=europe-west4-a --label spot=true --data-dir /var/lib/lorafleet-agent
  gpu-agent --coordinator http://127.0.0.1:7401 --simulate A100-40GB:8,V100-16GB --simulate-speed 60

Exit codes: 0 stopped when told to, 1 it could not go on, 2 usage, or the data directory is in use."
)]
struct Args {
    #[command(subcommand)]
    verb: Option<Verb>,
    #[command(flatten)]
    agent: AgentArgs,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Not for people: the process of a device's engine.
    #[command(name = gpu_agent::ENGINE_HOST, hide = true)]
    EngineHost {
        /// The device: `cpu` or `cuda:N`.
        #[arg(long, value_name = "DEVICE")]
        device: String,
        /// Bytes that its trials may use.
        #[arg(long, value_name = "BYTES")]
        memory_bytes: u64,
        /// What the device is called.
        #[arg(long, value_name = "NAME")]
        accelerator: Option<String>,
    },
}

#[derive(Debug, clap::Args)]
struct AgentArgs {
    /// The coordinator's address; of several that share an etcd any one's: who stands by names the one that leads.
    #[arg(
        long,
        env = "LORAFLEET_COORDINATOR",
        value_name = "URL",
        conflicts_with = "etcd",
        required_unless_present = "etcd"
    )]
    coordinator: Option<String>,
    /// Addresses of the etcd of a fleet, in which the leading coordinator is found.
    #[arg(long, env = "LORAFLEET_ETCD", value_delimiter = ',', value_name = "URL[,URL…]")]
    etcd: Vec<String>,
    /// What the fleet's keys in etcd begin with.
    #[arg(long, env = "LORAFLEET_ETCD_PREFIX", default_value = "/lorafleet", value_name = "PREFIX")]
    etcd_prefix: String,
    #[command(flatten)]
    etcd_access: EtcdArgs,
    /// The agent's own folder: its name, and what was not acknowledged yet.
    #[arg(long, env = "LORAFLEET_DATA_DIR", default_value = "./lorafleet-agent", value_name = "DIR")]
    data_dir: PathBuf,
    /// Bytes of uploaded data, and of bases in 4 bits, that are kept in that folder at most, such as 50GB or 500GiB.
    /// What was not used for longest goes first, and nothing that a trial uses.
    #[arg(
        long,
        env = "LORAFLEET_CACHE_LIMIT",
        default_value = "50GB",
        value_name = "BYTES",
        value_parser = config::size::parse
    )]
    cache_limit: u64,
    /// What to train on: `all` GPUs, or the CPU if there are none; `cpu`; or GPUs by their numbers, as in 0,1.
    #[arg(
        long,
        env = "LORAFLEET_DEVICES",
        default_value = "all",
        value_name = "all|cpu|N[,N…]",
        conflicts_with = "simulate"
    )]
    devices: String,
    #[command(flatten)]
    simulate: SimulateArgs,
    /// Dollars that an hour of this machine costs, for the trials' cost. Unless given, a GPU costs what the cheapest machine
    /// of the catalogue asks for one on demand, and the CPU nothing.
    #[arg(long, env = "LORAFLEET_PRICE_PER_HOUR", value_name = "USD", value_parser = devices::price)]
    price_per_hour: Option<f64>,
    /// What is said of this machine where agents are listed.
    #[arg(long = "label", value_name = "NAME=VALUE", value_parser = label)]
    labels: Vec<(String, String)>,
    /// Who says that this machine is about to be taken away, which is then as SIGTERM: `gce` or `aws`, the metadata server of
    /// that cloud, also at another address as in gce=http://127.0.0.1:8080; `off`; or `auto`, what the machine's firmware says
    /// that it is.
    #[arg(
        long,
        env = "LORAFLEET_SPOT_NOTICE",
        default_value = "auto",
        value_name = "auto|off|gce[=URL]|aws[=URL]",
        value_parser = Source::parse
    )]
    spot_notice: Source,
    #[command(flatten)]
    client: ClientArgs,
    /// Address of /metrics, /healthz and /readyz; nothing is served there unless it is given.
    #[arg(long, env = "LORAFLEET_HTTP", value_name = "ADDRESS")]
    http: Option<SocketAddr>,
}

fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.into(), value.into())),
        _ => Err("write NAME=VALUE, as in zone=europe-west4-a".into()),
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    let options = telemetry::Options {
        service: "lorafleet-agent",
        version: env!("CARGO_PKG_VERSION"),
        level: "info",
        scraped: args.agent.http.is_some(),
    };
    match args.verb {
        Some(Verb::EngineHost { device, memory_bytes, accelerator }) => {
            telemetry::program::run_quietly(&options, || host(&device, memory_bytes, accelerator.as_deref()))
        }
        None => telemetry::program::run(&options, run(args.agent)),
    }
}

fn host(device: &str, memory_bytes: u64, accelerator: Option<&str>) -> Result<(), End> {
    child::serve(device, memory_bytes, accelerator).map_err(|error| match error {
        ChildError::Device(_) => End::invalid(error),
        ChildError::Lost(_) | ChildError::Io(_) => End::failed(error),
    })
}

async fn run(args: AgentArgs) -> Result<(), End> {
    let ready = Readiness::not_yet("it has not started");
    http::beside(args.http, ready.clone(), work(args, &ready)).await
}

async fn work(args: AgentArgs, ready: &Readiness) -> Result<(), End> {
    let mut interrupts = actor::Interrupts::new().map_err(End::failed)?;
    // The second is ended after the agent, which is found through it to the last.
    let (scope, in_etcd) = (actor::Scope::new(), actor::Scope::new());
    let mut notices = Notices::watch(args.spot_notice.clone(), &scope);
    ready.not_now("this machine is about to be taken away, or nobody has said yet that it is not");
    tokio::select! {
        // Whoever starts it again after a notice must not have it join once more.
        () = notices.stays() => {}
        () = interrupts.next() => return Ok(()),
    }
    let mut devices = args.simulate.devices().map_err(End::invalid)?;
    if devices.is_empty() {
        devices = chosen(&args.devices)?;
    } else {
        tracing::warn!(devices = devices.len(), "the devices are simulated: nothing is trained");
    }
    let prices = devices::priced(&mut devices, args.price_per_hour).map_err(End::invalid)?;
    prices.known.iter().for_each(|line| tracing::info!("{line}"));
    prices.unknown.iter().for_each(|line| tracing::warn!("{line}"));
    let labels: BTreeMap<_, _> = args.labels.iter().cloned().collect();
    let fleet = tokio::select! {
        fleet = fleet::connect(&args, ready) => fleet?,
        () = interrupts.next() => return Ok(()),
        why = notices.leaves() => {
            tracing::warn!(why, "this machine is about to be taken away");
            return Ok(());
        }
    };
    let coordinator = args.coordinator.map(Coordinator::from).or_else(|| fleet.coordinator());
    let coordinator = coordinator.ok_or_else(|| End::invalid("name the coordinator, or the fleet's etcd"))?;
    let options = Options {
        coordinator: coordinator.with(args.client.client()),
        data_dir: args.data_dir,
        devices: devices.clone(),
        labels: labels.clone(),
        cache_limit: args.cache_limit,
        clock: Arc::new(SystemClock::new()),
    };
    let agent = gpu_agent::start(options, scope.clone()).await.map_err(|error| match error {
        gpu_agent::AgentError::InUse { .. }
        | gpu_agent::AgentError::OtherKind { .. }
        | gpu_agent::AgentError::Address(_) => End::invalid(error),
        error => End::failed(error),
    })?;
    ready.look(agent.look());
    fleet.register(&agent.id, &devices, &labels, &in_etcd);
    tracing::info!(id = %agent.id, devices = devices.len(), "the agent runs");
    let ended = tokio::select! {
        () = interrupts.next() => Ok(()),
        why = notices.leaves() => {
            tracing::warn!(why, "this machine is about to be taken away");
            Ok(())
        }
        () = scope.cancelled() => Err(End::failed("the agent cannot go on; its last message says why")),
    };
    ready.not_now("it ends");
    tracing::info!("checkpointing and giving trials back");
    let stop = async {
        if !scope.finish(SHUTDOWN_GRACE + MARGIN).await {
            tracing::warn!("it did not end in time; its trials go on from their last checkpoints");
        }
        in_etcd.finish(MARGIN).await;
    };
    tokio::select! {
        () = stop => {}
        () = interrupts.next() => {}
    }
    ended
}

/// The devices that `--devices` names.
fn chosen(wanted: &str) -> Result<Vec<DeviceOptions>, End> {
    let Found { devices: gpus, notes, .. } = devices::gpus();
    for note in notes {
        tracing::warn!("{note}");
    }
    Ok(match wanted {
        "all" if gpus.is_empty() => vec![devices::cpu()],
        "all" => gpus,
        devices::CPU => vec![devices::cpu()],
        numbers => {
            let one = |number: &str| {
                let id = format!("cuda:{}", number.trim());
                let there: Vec<_> = gpus.iter().map(|gpu| gpu.id.as_str()).collect();
                gpus.iter().find(|gpu| gpu.id.as_str() == id).cloned().ok_or_else(|| {
                    End::invalid(format!(
                        "--devices {wanted}: there is no GPU {number:?} to train on; there are: {}",
                        if there.is_empty() {
                            "none (`cpu` trains on the CPU)".into()
                        } else {
                            there.join(", ")
                        }
                    ))
                })
            };
            numbers.split(',').map(one).collect::<Result<Vec<_>, _>>()?
        }
    })
}

#[cfg(feature = "etcd")]
mod fleet {
    use super::{AgentArgs, Arc, BTreeMap, Coordinator, DeviceOptions, Duration, End, Readiness, devices};
    use domain::AgentId;
    use registry::etcd::{EtcdOptions, Members};
    use registry::{Member, RegistryError};
    use serde_json::json;

    /// The pauses between tries to reach an etcd that does not answer: twice as long each time, up to the last.
    const PAUSES: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(30)];

    /// The fleet that the agent is of; nothing without etcd.
    pub(super) struct Fleet(Option<Members>);

    /// Waits for an etcd that does not answer. One whose address means nothing, or that refuses what it is shown, is not waited
    /// for.
    pub(super) async fn connect(args: &AgentArgs, ready: &Readiness) -> Result<Fleet, End> {
        if args.etcd.is_empty() {
            return Ok(Fleet(None));
        }
        let (client, user) = args.etcd_access.access(&args.etcd).map_err(End::invalid)?;
        for address in &args.etcd {
            client.endpoint(address).map_err(|error| End::invalid(format!("--etcd {address}: {error}")))?;
        }
        if let Some((_, password)) = &user {
            telemetry::secrets::keep(password.expose());
        }
        let options = EtcdOptions {
            prefix: args.etcd_prefix.clone(),
            client,
            user,
            ..EtcdOptions::new(args.etcd.clone())
        };
        let [mut pause, longest] = PAUSES;
        loop {
            match Members::connect(&options).await {
                Ok(members) => return Ok(Fleet(Some(members))),
                Err(error @ RegistryError::Unavailable(_)) => {
                    tracing::warn!(%error, "etcd does not answer; trying again in {} s", pause.as_secs());
                    ready.not_now(&format!("etcd does not answer: {error}"));
                }
                Err(error) => return Err(End::failed(error)),
            }
            tokio::time::sleep(pause).await;
            pause = longest.min(pause * 2);
        }
    }

    impl Fleet {
        /// Where the leader is, if there is a fleet.
        pub(super) fn coordinator(&self) -> Option<Coordinator> {
            self.0.clone().map(|members| Coordinator::leading(Arc::new(members)))
        }

        /// Enters the agent, as long as the scope is not cancelled.
        pub(super) fn register(
            &self,
            id: &AgentId,
            devices: &[DeviceOptions],
            labels: &BTreeMap<String, String>,
            scope: &actor::Scope,
        ) {
            let Some(members) = &self.0 else { return };
            let devices: Vec<_> = devices
                .iter()
                .map(|device| {
                    json!({
                        "id": device.id.as_str(),
                        "accelerator": device.accelerator,
                        "memory_bytes": device.memory_bytes,
                        "max_pack_size": device.max_pack_size,
                        "price_per_hour": device.price_per_hour,
                        "price_from": device.price_from,
                        "simulated_speed": device.simulated_speed(),
                        "compute_capability": device.compute_capability,
                    })
                })
                .collect();
            let value = json!({
                "hostname": devices::hostname(),
                "version": env!("CARGO_PKG_VERSION"),
                "devices": devices,
                "labels": labels,
            });
            let member = Member { id: id.to_string(), value: value.to_string().into_bytes() };
            members.register(member, scope);
        }
    }
}

#[cfg(not(feature = "etcd"))]
mod fleet {
    use super::{AgentArgs, BTreeMap, Coordinator, DeviceOptions, End, Readiness};
    use domain::AgentId;

    /// No fleet: etcd is not built in.
    pub(super) struct Fleet;

    pub(super) async fn connect(args: &AgentArgs, _: &Readiness) -> Result<Fleet, End> {
        match args.etcd.is_empty() {
            true => Ok(Fleet),
            false => Err(End::invalid("--etcd: this program was built without the feature `etcd`")),
        }
    }

    impl Fleet {
        pub(super) fn coordinator(&self) -> Option<Coordinator> {
            None
        }

        pub(super) fn register(
            &self,
            _: &AgentId,
            _: &[DeviceOptions],
            _: &BTreeMap<String, String>,
            _: &actor::Scope,
        ) {
        }
    }
}
