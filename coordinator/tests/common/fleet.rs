//! What tests on sweeps in paused time share: directory and dispatcher as they are, on the registry's model; and agents that
//! have one device.

use actor::Scope;
use coordinator::actors::directory::{Directory, Submission};
use coordinator::actors::dispatcher::{Dispatcher, Terms};
use coordinator::actors::sweep::Tools;
use coordinator::artifacts::Artifacts;
use coordinator::history::History;
use coordinator::store::Store;
use coordinator::trouble::Trouble;
use domain::fleet::{Agent, Device};
use domain::sweep::SweepSpec;
use domain::{AgentId, Clock, DeviceId, Timestamp};
use registry::MemoryRegistry;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// Time between an agent's reports, and between two looks at a budget.
pub const INTERVAL: Duration = Duration::from_secs(2);
/// An assignment's.
pub const LEASE: Duration = Duration::from_secs(20);

/// A clock that goes with tokio's paused time, and whose hour a test sets.
pub struct Jumping {
    start: Instant,
    /// What its hour is put on by.
    pub offset_ms: AtomicI64,
}

impl Jumping {
    pub fn new() -> Self {
        Self { start: Instant::now(), offset_ms: AtomicI64::new(0) }
    }
}

impl Clock for Jumping {
    fn now(&self) -> Timestamp {
        let hour = 1_000_000_000 + self.monotonic().as_millis() as u64;
        Timestamp(hour.saturating_add_signed(self.offset_ms.load(Ordering::Relaxed)))
    }

    fn monotonic(&self) -> Duration {
        self.start.elapsed()
    }
}

/// A coordinator's actors on these records and a folder for the rest, until the scope ends.
pub async fn served(
    dir: &Path,
    registry: &Arc<MemoryRegistry>,
    clock: &Arc<Jumping>,
    scope: &Scope,
) -> (Directory, Dispatcher) {
    let terms = Terms { heartbeat: INTERVAL, lease: LEASE };
    let dispatcher = Dispatcher::start(clock.clone(), terms, BTreeSet::new(), scope);
    let artifacts = Artifacts::local(&dir.join("artifacts")).unwrap();
    let tools = Tools {
        store: Store::lead(registry.clone(), "test").await.unwrap().beside(artifacts.clone()),
        history: History::open(&dir.join("history")).unwrap(),
        artifacts,
        dispatcher: dispatcher.clone(),
        trouble: Trouble::new(clock.clone()),
        clock: clock.clone(),
        tick: INTERVAL,
    };
    let directory = Directory::start(tools, scope).await.unwrap();
    dispatcher.serve().await.unwrap();
    (directory, dispatcher)
}

/// An agent with one device that so many trials may share, at a price an hour.
pub fn agent(id: &str, max_pack_size: u32, price_per_hour: f64) -> Agent {
    let device = Device {
        id: DeviceId::new("cpu"),
        accelerator: "CPU".into(),
        memory_bytes: 1 << 40,
        max_pack_size,
        price_per_hour,
        price_from: None,
        resident_base: None,
        simulated_speed: None,
        compute_capability: None,
    };
    let (labels, understands) = (BTreeMap::new(), Default::default());
    let id = AgentId::new(id);
    Agent { id, version: "0".into(), hostname: "h".into(), devices: vec![device], labels, understands }
}

/// A sweep's document as somebody submits it.
pub fn submission(document: &Value) -> Submission {
    Submission {
        request_id: "r".into(),
        namespace: "default".into(),
        spec: Box::new(SweepSpec::from_document(document.as_object().unwrap()).unwrap()),
        base_models: BTreeMap::new(),
        submitted_by: None,
    }
}
