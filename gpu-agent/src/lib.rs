//! Trains trials on the devices of one machine.
//!
//! ```text
//! coordinator ══ session ──> device ──commands──> engine (its own thread, or process)
//!      ▲            ▲           │ ▲                  │
//!      ║            └── spool <─┘ └──────events──────┘
//!      ╚═════════ transfer <────┘ checkpoints; uploaded data, through the cache
//! ```
//!
//! | module | holds |
//! |---|---|
//! | [`engine`] | what trains: trials that share a base, stepped together on a thread or in a process of their own |
//! | [`actors`] | a device and its trials; the session with the coordinator |
//! | [`spool`] | what the coordinator has not acknowledged yet, on disk |
//! | [`transfer`] | checkpoints up and down |
//! | [`cache`] | uploaded data on this machine's disk |
//! | [`beginning`] | how long its first training step takes to come |
//! | [`home`] | the agent's folder: its name, its lock |
//! | [`find`] | where the coordinator is |
//! | [`devices`] | what this machine has |
//! | [`spot`] | whether this machine is about to be taken away |
//! | [`wire`] | between the agent's words and the protocol's |

pub mod actors;
mod assignment;
pub mod beginning;
pub mod cache;
pub mod devices;
pub mod engine;
pub mod find;
#[cfg(test)]
mod hand;
pub mod home;
pub mod spool;
pub mod spot;
pub mod transfer;
pub mod wire;

pub use assignment::Assignment;

use actor::Scope;
use actors::device::Device;
use actors::session::{Identity, Session};
use beginning::Stopwatch;
use cache::Cache;
use domain::machine::{Accelerator, ComputeCapability, PriceSource};
use domain::trial::{Failure, FailureClass};
use domain::{AgentId, Clock, DeviceId};
use engine::candle::Candle;
use engine::host::{Factory, Host};
use engine::pack::Pack;
use engine::process::{self, Launch};
use engine::simulated::{Hurried, Simulated};
pub use find::Coordinator;
use find::Finder;
use home::Home;
use prost::Message;
use spool::Spool;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use telemetry::http::Look;
use tokio::sync::{Semaphore, watch};
use transfer::Transfers;
use wire::Saying;

/// The time in which an agent that is told to end checkpoints its trials and gives them back. Whoever waits
/// for the agent's scope waits a [`MARGIN`] longer.
pub const SHUTDOWN_GRACE: Duration = Duration::from_secs(20);

/// The time beyond its own grace that an agent is waited for, and after that etcd, in which it says that it leaves.
pub const MARGIN: Duration = Duration::from_secs(1);

/// The time in which the `gpu-agent` program does all of that. With [`telemetry::program::END_LIMIT`] it ends before a machine
/// that is taken away does, and before systemd kills it.
pub const STOP_LIMIT: Duration = SHUTDOWN_GRACE.saturating_add(MARGIN).saturating_add(MARGIN);

/// What an agent is started with.
#[derive(Clone)]
pub struct Options {
    /// Where its coordinator is.
    pub coordinator: Coordinator,
    /// The agent's own folder.
    pub data_dir: PathBuf,
    /// The devices to train on.
    pub devices: Vec<DeviceOptions>,
    /// What is said of the agent where agents are listed: `zone`, `spot`, ….
    pub labels: BTreeMap<String, String>,
    /// Bytes of uploaded data that are kept at most; [`cache::DEFAULT_LIMIT`] if nothing else is said.
    pub cache_limit: u64,
    /// The hour.
    pub clock: Arc<dyn Clock>,
}

/// A device to train on.
#[derive(Debug, Clone, PartialEq)]
pub struct DeviceOptions {
    /// `cpu`, `cuda:0`, ….
    pub id: DeviceId,
    /// `CPU`, `A100-40GB`, ….
    pub accelerator: String,
    /// Bytes that trials may use.
    pub memory_bytes: u64,
    /// Trials that may share it at a time.
    pub max_pack_size: u32,
    /// Dollars an hour; 0 for a machine of one's own.
    pub price_per_hour: f64,
    /// Where that price comes from. `None`: whoever starts the agent named it, or there is none.
    pub price_from: Option<PriceSource>,
    /// Of a GPU, the compute capability whose instructions trials get there: its own, or of a program that was built for an
    /// older one, that.
    pub compute_capability: Option<ComputeCapability>,
    /// Where its engine runs.
    pub host: EngineHost,
}

impl DeviceOptions {
    /// Whether it trains nothing.
    pub fn is_simulated(&self) -> bool {
        self.simulated_speed() > 0.0
    }

    /// How many of a simulated device's seconds pass in one; 0 if it trains.
    pub fn simulated_speed(&self) -> f64 {
        match self.host {
            EngineHost::Simulated { speed, .. } => speed,
            EngineHost::Thread | EngineHost::Process { .. } => 0.0,
        }
    }
}

/// Where a device's engine runs.
#[derive(Debug, Clone, PartialEq)]
pub enum EngineHost {
    /// On a thread of the agent.
    Thread,
    /// In a process of its own: this program again, with [`ENGINE_HOST`] as its verb. A driver that dies takes that along
    /// and not the agent.
    Process {
        /// The device as that process knows it: where it sees one GPU alone, that is the first.
        device: String,
        /// Variables by which it finds its device.
        variables: Vec<(String, String)>,
    },
    /// On a thread of the agent, where nothing is trained: see [`engine::simulated`].
    Simulated {
        /// What it behaves as.
        accelerator: Accelerator,
        /// How many of its seconds pass in one.
        speed: f64,
    },
}

/// The verb of this program that hosts an engine; see [`EngineHost::Process`] and [`engine::child::serve`].
pub const ENGINE_HOST: &str = "engine-host";

/// The pause after an engine process died, before the next; see [`engine::process`].
const FIRST_PAUSE: Duration = Duration::from_secs(1);

/// Why an agent does not start.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The coordinator's address, or a certificate for it, cannot be used.
    #[error(transparent)]
    Address(#[from] security::client::AddressError),
    /// This build cannot train on that device.
    #[error("{device}: this build trains on the device `{cpu}` alone", cpu = devices::CPU)]
    Device {
        /// The device.
        device: DeviceId,
    },
    /// A device's engine has nowhere to run.
    #[error("{device}: its engine cannot be started: {source}")]
    Engine {
        /// The device.
        device: DeviceId,
        /// What the system said.
        source: std::io::Error,
    },
    /// Two agents would use one folder.
    #[error("{}: another agent uses this folder; give each its own", path.display())]
    InUse {
        /// The folder.
        path: PathBuf,
    },
    /// Devices that are simulated and devices that train would use one folder.
    #[error(
        "{}: is the folder of {id}, and an agent is either of devices that train or of simulated ones; give each its own with \
         --data-dir",
        path.display()
    )]
    OtherKind {
        /// The folder.
        path: PathBuf,
        /// The agent whose it is.
        id: String,
    },
    /// The agent's folder cannot be used.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

/// A running agent. It ends when its scope is cancelled: it checkpoints its trials, gives them back, and is
/// done within [`SHUTDOWN_GRACE`]. A coordinator in the same process should be ended after it.
#[derive(Debug)]
pub struct Agent {
    /// Its id, the same at each start on one data directory.
    pub id: AgentId,
    /// Whether it is connected to a coordinator.
    pub connected: watch::Receiver<bool>,
    /// What its coordinator has not acknowledged.
    pub spool: Spool,
    data_dir: PathBuf,
}

impl Agent {
    /// Looks, whenever it is asked, whether it can do its work: it is connected, and can write to its folder.
    pub fn look(&self) -> Look {
        let (connected, data_dir) = (self.connected.clone(), self.data_dir.clone());
        // One at a time: on a disk that hangs, each look would take a thread more.
        let one = Arc::new(Semaphore::new(1));
        Arc::new(move || {
            let (connected, data_dir) = (*connected.borrow(), data_dir.clone());
            let alone = one.clone().try_acquire_owned();
            Box::pin(async move {
                if !connected {
                    return Err("not connected to the coordinator".into());
                }
                let Ok(alone) = alone else { return Err("its disk has not answered the last look".into()) };
                let probe = move || {
                    let _alone = alone;
                    home::probe(&data_dir)
                };
                let written = tokio::task::spawn_blocking(probe).await;
                written.unwrap_or_else(|error| Err(error.to_string()))
            })
        })
    }
}

/// Makes the engine of a device.
pub type Engines = Arc<dyn Fn(&DeviceOptions) -> Factory + Send + Sync>;

/// Starts an agent.
///
/// # Errors
/// See [`AgentError`]. A coordinator that cannot be reached is no error: the agent tries until it can be.
pub async fn start(options: Options, scope: Scope) -> Result<Agent, AgentError> {
    let trains = |device: &&DeviceOptions| {
        cfg!(feature = "cuda") || device.id.as_str() == devices::CPU || device.is_simulated()
    };
    if let Some(other) = options.devices.iter().find(|device| !trains(device)) {
        return Err(AgentError::Device { device: other.id.clone() });
    }
    let clock = options.clock.clone();
    start_on(options, |device, scope| host(device, clock.clone(), scope), scope).await
}

/// The host of a device's engine.
fn host(device: &DeviceOptions, clock: Arc<dyn Clock>, scope: &Scope) -> std::io::Result<Host> {
    let memory = device.memory_bytes;
    let on_thread = |factory| Host::start(&format!("engine {}", device.id), factory);
    let (name, variables) = match &device.host {
        EngineHost::Thread => {
            return on_thread(Box::new(move || {
                let candle = Candle::new(trainer::Device::Cpu, clock.clone());
                Box::new(Pack::new(candle, memory, clock.clone()))
            }));
        }
        EngineHost::Simulated { accelerator, speed } => {
            let (accelerator, speed) = (accelerator.clone(), *speed);
            return on_thread(Box::new(move || {
                let simulated = Simulated::of(accelerator.clone(), speed, clock.clone());
                Box::new(Pack::new(simulated, memory, Arc::new(Hurried { clock: clock.clone(), speed })))
            }));
        }
        EngineHost::Process { device, variables } => (device, variables),
    };
    let memory = memory.to_string();
    let arguments =
        [ENGINE_HOST, "--device", name, "--memory-bytes", &memory, "--accelerator", &device.accelerator];
    let arguments = arguments.map(OsString::from);
    let launch = Launch {
        device: device.id.to_string(),
        program: std::env::current_exe()?,
        arguments: arguments.into(),
        variables: variables.iter().map(|(name, value)| (name.into(), value.into())).collect(),
        first_pause: FIRST_PAUSE,
    };
    Ok(process::start(launch, scope))
}

/// Starts an agent that trains with engines of one's own.
///
/// # Errors
/// As [`start`]'s.
pub async fn start_with(options: Options, engines: Engines, scope: Scope) -> Result<Agent, AgentError> {
    let host =
        |device: &DeviceOptions, _: &Scope| Host::start(&format!("engine {}", device.id), engines(device));
    start_on(options, host, scope).await
}

async fn start_on(
    options: Options,
    host: impl Fn(&DeviceOptions, &Scope) -> std::io::Result<Host>,
    scope: Scope,
) -> Result<Agent, AgentError> {
    let finder = Finder::new(options.coordinator)?;
    let home = Home::open(&options.data_dir)?;
    let id = home.agent_id(options.devices.iter().any(DeviceOptions::is_simulated))?;
    let spool = open_spool(&home)?;
    let transfers = Transfers::new(finder.clone());
    let path = home.cache();
    let cache = Cache::open(&path, options.cache_limit, options.clock.clone());
    let cache = cache.map_err(|source| AgentError::Io { path, source })?;
    devices::observe();
    let ahead = actors::ahead::start(cache.clone(), transfers.clone(), &scope);
    let stopwatch = Stopwatch::new(options.clock.clone());
    let mut devices = Vec::new();
    for device in &options.devices {
        let host = host(device, &scope)
            .map_err(|source| AgentError::Engine { device: device.id.clone(), source })?;
        let disk = (spool.clone(), cache.clone(), home.clone());
        devices.push(Device::start(
            device.id.clone(),
            host,
            transfers.clone(),
            disk,
            stopwatch.clone(),
            &scope,
        ));
    }
    let Options { devices: of_machine, labels, data_dir, .. } = options;
    let identity =
        Identity { id: id.clone(), hostname: devices::hostname(), devices: of_machine, labels, stopwatch };
    let of_session = (finder, transfers, ahead);
    let connected = Session::start(identity, of_session, devices, spool.clone(), home, &scope);
    Ok(Agent { id, connected, spool, data_dir })
}

/// The spool as the last agent left it. What that agent was training is reported as failed: nothing trains it
/// now, and a trial that ends its agent each time must not do so for ever.
fn open_spool(home: &Home) -> Result<Spool, AgentError> {
    let path = home.spool();
    let io = |source| AgentError::Io { path: path.clone(), source };
    let spool = Spool::open(&path).map_err(io)?;
    for assignment in spool.unfinished() {
        let message = "the agent that trained it ended, and was started again".into();
        let failed = Saying::Failed(Failure { class: FailureClass::Infrastructure, message });
        spool
            .append(&assignment, true, |sequence| failed.request(&assignment, sequence).encode_to_vec())
            .map_err(io)?;
    }
    Ok(spool)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_agent_is_ready_while_it_is_connected_and_can_write() {
        let [dir, spools] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let (here, gone) = (dir.path().to_path_buf(), dir.path().join("gone"));
        for (is_connected, data_dir, want) in [
            (true, &here, None),
            (false, &here, Some("not connected")),
            (true, &gone, Some("gone cannot be written: No such file")),
        ] {
            let connected = watch::channel(is_connected).1;
            let spool = Spool::open(spools.path()).unwrap();
            let agent = Agent { id: AgentId::new("a"), connected, spool, data_dir: data_dir.clone() };
            let said = (agent.look())().await.err();
            match want {
                None => assert_eq!(said, None),
                Some(want) => assert!(said.as_ref().is_some_and(|said| said.contains(want)), "{said:?}"),
            }
        }
        assert_eq!(std::fs::read_dir(&here).unwrap().count(), 0, "nothing is left behind");
    }
}
