//! A coordinator, and on demand an agent, in this process: the same code as a fleet's, talking real gRPC on
//! loopback.

use crate::Failure;
use crate::client::ENDPOINT_FILE;
use coordinator::{Access, CoordinatorError};
use domain::SystemClock;
use gpu_agent::devices::simulated::SimulateArgs;
use gpu_agent::devices::{CPU, Prices};
use gpu_agent::{DeviceOptions, EngineHost};
use security::client::Token;
use security::{Client, Secret};
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// How long the agent, and after it the coordinator, are waited for at shutdown before the process ends regardless. With
/// [`telemetry::program::END_LIMIT`] it ends before a machine that is taken away does; what was acknowledged is durable.
const AGENT_LIMIT: Duration = gpu_agent::SHUTDOWN_GRACE.saturating_add(gpu_agent::MARGIN);
const COORDINATOR_LIMIT: Duration = Duration::from_secs(3);

/// Any free port of this machine.
const FREE_PORT: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// For tests: `process` has the CPU's engine run in a process of its own, as a GPU's does.
const ENGINE_HOST_VARIABLE: &str = "LORAFLEET_ENGINE_HOST";

/// An embedded server.
pub(crate) struct Embedded {
    coordinator: actor::Scope,
    agent: Option<actor::Scope>,
    address: SocketAddr,
    local: String,
    health: coordinator::Health,
    endpoint_file: PathBuf,
}

impl Embedded {
    /// Starts a coordinator for this process on a data directory, made if it is not there.
    pub(crate) async fn coordinator(data_dir: &Path) -> Result<Self, Failure> {
        Self::serve(data_dir, FREE_PORT, Access::default()).await
    }

    /// Starts a coordinator for others too.
    pub(crate) async fn serve(data_dir: &Path, listen: SocketAddr, access: Access) -> Result<Self, Failure> {
        std::fs::create_dir_all(data_dir).map_err(|e| {
            Failure::invalid(format!("{}: {e}; choose another --data-dir", data_dir.display()))
        })?;
        let scope = actor::Scope::new();
        let options = coordinator::Options {
            data_dir: data_dir.to_path_buf(),
            listen,
            clock: Arc::new(SystemClock::new()),
            heartbeat: Duration::from_secs(2),
            lease: Duration::from_secs(10),
            access: Access { also_local: access.tls.is_some(), ..access },
        };
        let server = coordinator::start(options, scope.clone()).await.map_err(refused)?;
        let endpoint_file = data_dir.join(ENDPOINT_FILE);
        let local = format!("http://{}", server.local.unwrap_or(server.address));
        std::fs::write(&endpoint_file, format!("{local}\n"))
            .map_err(|e| Failure::failed(format!("{}: {e}", endpoint_file.display())))?;
        let coordinator::Server { address, health, .. } = server;
        Ok(Self { coordinator: scope, agent: None, address, local, health, endpoint_file })
    }

    /// Starts an agent on this machine's devices, which keeps so many bytes of uploaded data. `token` is the agent's, where the
    /// coordinator wants one.
    pub(crate) async fn start_agent(
        &mut self,
        data_dir: &Path,
        devices: Vec<DeviceOptions>,
        cache_limit: u64,
        token: Option<Secret>,
    ) -> Result<(), Failure> {
        // Not a child of the coordinator's scope: it must have a coordinator to hand its trials back to.
        let scope = actor::Scope::new();
        let client = Client { token: token.map(Token::Given), ..Client::default() };
        let options = gpu_agent::Options {
            coordinator: gpu_agent::Coordinator::from(self.endpoint()).with(client),
            data_dir: data_dir.join("agent"),
            devices,
            labels: BTreeMap::new(),
            cache_limit,
            clock: Arc::new(SystemClock::new()),
        };
        gpu_agent::start(options, scope.clone()).await.map_err(|error| match error {
            gpu_agent::AgentError::InUse { .. } | gpu_agent::AgentError::OtherKind { .. } => {
                Failure::invalid(error)
            }
            _ => Failure::failed(error),
        })?;
        self.agent = Some(scope);
        Ok(())
    }

    /// What the coordinator can say of itself.
    pub(crate) fn health(&self) -> coordinator::Health {
        self.health.clone()
    }

    /// Whether something trains here.
    pub(crate) fn has_agent(&self) -> bool {
        self.agent.is_some()
    }

    /// Returns when the coordinator ends by itself: what it keeps cannot be written, or it has a defect.
    pub(crate) async fn ended(&self) {
        self.coordinator.cancelled().await;
    }

    /// Where it serves this machine.
    pub(crate) fn endpoint(&self) -> String {
        self.local.clone()
    }

    /// Where it serves whoever may reach it.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Checkpoints and hands back the agent's trials, then stops the coordinator.
    pub(crate) async fn stop(self) {
        if let Some(agent) = &self.agent
            && !agent.finish(AGENT_LIMIT).await
        {
            tracing::warn!("the agent did not stop in time; its trials go on from their last checkpoints");
        }
        if !self.coordinator.finish(COORDINATOR_LIMIT).await {
            tracing::warn!("the coordinator did not stop in time");
        }
        if let Err(error) = std::fs::remove_file(&self.endpoint_file) {
            tracing::warn!(%error, file = %self.endpoint_file.display(), "left behind");
        }
    }
}

/// What this machine trains on.
#[derive(Debug, clap::Args)]
pub(crate) struct DeviceArgs {
    /// Dollars that an hour of this machine costs, for the trials' cost. Unless given, a GPU costs what the cheapest machine
    /// of the catalogue asks for one on demand, and the CPU nothing.
    #[arg(long, alias = "price_per_hour", value_name = "USD", value_parser = gpu_agent::devices::price)]
    price_per_hour: Option<f64>,
    #[command(flatten)]
    simulate: SimulateArgs,
}

impl DeviceArgs {
    /// Whether devices are simulated.
    pub(crate) fn are_simulated(&self) -> bool {
        !self.simulate.simulate.is_empty()
    }

    /// The simulated devices, or this machine's GPUs, or its CPU if it has none to train on; each at its price. What
    /// is to be said about them is logged, but for where those prices come from: that is answered, a line an accelerator.
    pub(crate) fn devices(&self) -> Result<(Vec<DeviceOptions>, Vec<String>), Failure> {
        let mut devices = self.simulate.devices().map_err(Failure::invalid)?;
        if devices.is_empty() {
            let found = gpu_agent::devices::local();
            for note in found.notes {
                tracing::warn!("{note}");
            }
            devices = found.devices;
        }
        let Prices { mut known, unknown } =
            gpu_agent::devices::priced(&mut devices, self.price_per_hour).map_err(Failure::invalid)?;
        known.extend(unknown);
        for device in devices.iter_mut().filter(|device| device.id.as_str() == CPU) {
            device.host = cpu_host();
        }
        Ok((devices, known))
    }
}

/// Where the CPU's engine runs: on a thread, unless a test of engine processes wants it in one. People have no use for
/// that: the CPU has no driver that could die.
fn cpu_host() -> EngineHost {
    match std::env::var(ENGINE_HOST_VARIABLE) {
        Ok(value) if value == "process" => EngineHost::Process { device: CPU.into(), variables: Vec::new() },
        _ => EngineHost::Thread,
    }
}

/// A data directory that is somebody else's now, or of a later version, is a wrong argument; all else is a failure.
fn refused(error: CoordinatorError) -> Failure {
    if error.refuses_directory() { Failure::invalid(error) } else { Failure::failed(error) }
}
