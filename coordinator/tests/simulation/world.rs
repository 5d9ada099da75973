//! What all share: the durable state, who leads, what was seen, and what was found wrong.

use crate::plan::Storage;
use crate::server::Server;
use actor::Scope;
use coordinator::store::{SweepRecord, TrialRecord};
use domain::{AgentId, Attempt, Clock, Timestamp, TrialId};
use futures::FutureExt;
use object_store::memory::InMemory;
use object_store::path::Path as ObjectPath;
use object_store::{ObjectStore, ObjectStoreExt};
use registry::{MemoryRegistry, Write};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub const HOUR_MS: i64 = 3_600_000;

/// A clock that goes with tokio's paused time, and whose hour jumps.
pub struct Hour {
    start: Instant,
    offset_ms: AtomicI64,
}

impl Hour {
    pub fn jump(&self, hours: i64) {
        self.offset_ms.fetch_add(hours * HOUR_MS, Ordering::Relaxed);
    }
}

impl Clock for Hour {
    fn now(&self) -> Timestamp {
        let hour = 1_700_000_000_000 + self.monotonic().as_millis() as u64;
        Timestamp(hour.saturating_add_signed(self.offset_ms.load(Ordering::Relaxed)))
    }

    fn monotonic(&self) -> Duration {
        self.start.elapsed()
    }
}

pub struct World {
    pub seed: u64,
    pub clock: Arc<Hour>,
    pub truth: MemoryRegistry,
    pub objects: Arc<InMemory>,
    /// The history's files.
    pub history: PathBuf,
    full: [AtomicBool; 3],
    /// Cancelled when nothing goes wrong any more.
    pub healed: CancellationToken,
    /// The number of the coordinator that leads.
    pub leads: AtomicU32,
    /// Who serves; `None`: nobody.
    pub leader: watch::Sender<Option<Arc<Server>>>,
    /// Of agents and whatever goes wrong.
    pub scope: Scope,
    log: Mutex<Vec<String>>,
    seen: Mutex<Seen>,
}

/// What was seen of the durable state.
#[derive(Default)]
pub struct Seen {
    pub sweep: Option<SweepRecord>,
    pub trials: BTreeMap<u32, TrialRecord>,
    /// The object that the sweep's record names.
    pub specs: Option<String>,
    /// Assignments of which a record said that they train, that they have let go of their device, that they ended the
    /// trial.
    pub ran: BTreeSet<(u32, Attempt)>,
    pub let_go: BTreeSet<(u32, Attempt)>,
    pub ended: BTreeSet<(u32, Attempt)>,
    /// The newest step of which a record had a checkpoint.
    pub checkpoints: BTreeMap<u32, u64>,
    /// The newest step of which a checkpoint was acknowledged, of trials that have not ended since.
    pub acknowledged: BTreeMap<u32, u64>,
    /// Whether anybody asked for something that lets a trial go on which is over.
    pub may_reopen: bool,
    pub findings: Vec<String>,
}

impl World {
    pub fn new(seed: u64, history: PathBuf) -> Arc<Self> {
        let clock = Hour { start: Instant::now(), offset_ms: AtomicI64::new(0) };
        Arc::new(Self {
            seed,
            clock: Arc::new(clock),
            truth: MemoryRegistry::new(),
            objects: Arc::new(InMemory::new()),
            history,
            full: Default::default(),
            healed: CancellationToken::new(),
            leads: AtomicU32::new(0),
            leader: watch::Sender::new(None),
            scope: Scope::new(),
            log: Mutex::default(),
            seen: Mutex::default(),
        })
    }

    pub fn say(&self, who: &str, what: impl std::fmt::Display) {
        let at = self.clock.monotonic().as_secs_f64();
        self.log.lock().unwrap().push(format!("{at:10.3} {who}: {what}"));
    }

    pub fn log(&self) -> Vec<String> {
        std::mem::take(&mut self.log.lock().unwrap())
    }

    pub fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap()
    }

    /// Something is not as it must be.
    pub fn find(&self, what: impl std::fmt::Display) {
        self.say("FOUND", &what);
        self.seen().findings.push(format!("after {:.3} s: {what}", self.clock.monotonic().as_secs_f64()));
    }

    pub fn is_full(&self, storage: Storage) -> bool {
        self.full[storage as usize].load(Ordering::Relaxed)
    }

    pub fn set_full(&self, storage: Storage, full: bool) {
        self.full[storage as usize].store(full, Ordering::Relaxed);
    }

    pub fn leader(&self) -> Option<Arc<Server>> {
        self.leader.borrow().clone()
    }

    /// Whether the durable state gives the trial to that agent in that attempt.
    pub fn is_current(&self, trial: &TrialId, attempt: Attempt, agent: &AgentId) -> bool {
        let seen = self.seen();
        let trial = trial.number().and_then(|number| seen.trials.get(&number)).map(|record| &record.trial);
        trial.is_some_and(|trial| {
            trial.attempt == attempt
                && trial.state.holds_device()
                && trial.agent.as_deref() == Some(agent.as_str())
        })
    }

    /// Looks at what is durable from now on.
    pub fn committed(&self, batch: &[Write]) {
        for write in batch {
            let Write::Put(key, value) = write else { continue };
            match key.split_once('/').unwrap_or_default().0 {
                "trials" => self.committed_trial(serde_json::from_slice(value).unwrap()),
                "sweeps" => {
                    let Some(record) = self.whole(value) else { continue };
                    self.committed_sweep(record);
                }
                _ => {}
            }
        }
    }

    /// A sweep's record, of which the spec may lie in an object; nothing if that is not there, which must not be.
    fn whole(&self, value: &[u8]) -> Option<SweepRecord> {
        let mut record: Value = serde_json::from_slice(value).unwrap();
        let path = record["specs"]["path"].as_str().map(String::from);
        self.seen().specs.clone_from(&path);
        if let Some(path) = path {
            let there = self.objects.get(&ObjectPath::from(path.as_str())).now_or_never().unwrap();
            let Ok(found) = there else {
                self.find(format_args!("the sweep points at {path}, which is not there"));
                return None;
            };
            let mut specs: Value =
                serde_json::from_slice(&found.bytes().now_or_never().unwrap().unwrap()).unwrap();
            record["sweep"]["spec"] = specs["spec"].take();
            record["revisions"] = specs["revisions"].take();
        }
        Some(serde_json::from_value(record).unwrap())
    }

    fn committed_sweep(&self, new: SweepRecord) {
        let old = self.seen().sweep.replace(new.clone());
        let Some(old) = old else { return };
        let (old, new) = (old.sweep, new.sweep);
        if old.state != new.state {
            self.say("state", format_args!("the sweep is {}", new.state));
        }
        let again = old.state.is_terminal() && !new.state.is_terminal();
        if again && !self.seen().may_reopen {
            self.find(format_args!("the sweep was {}, and is {}", old.state, new.state));
        }
        if new.proposed < old.proposed {
            self.find(format_args!("{} trials were proposed, and are {}", old.proposed, new.proposed));
        }
    }

    fn committed_trial(&self, new: TrialRecord) {
        let number = new.trial.id.number().unwrap();
        let id = format!("trial {number}");
        for path in new.paths() {
            if !self.is_there(&path) {
                self.find(format_args!("{id} points at {path}, which is not there"));
            }
        }
        let (state, attempt) = (new.trial.state, new.trial.attempt);
        let old = {
            let mut seen = self.seen();
            if state.holds_device() {
                seen.ran.extend(new.trial.total_steps.map(|_| (number, attempt)));
            } else {
                seen.let_go.insert((number, attempt));
            }
            if state.is_terminal() {
                seen.ended.insert((number, attempt));
                seen.acknowledged.remove(&number);
            }
            if let Some(checkpoint) = &new.checkpoint {
                let newest = seen.checkpoints.entry(number).or_default();
                *newest = (*newest).max(checkpoint.step);
            }
            seen.trials.insert(number, new.clone())
        };
        let Some(old) = old else { return };
        let of = |record: &TrialRecord| (record.trial.state, record.trial.attempt);
        if of(&old) != of(&new) {
            let step = new.trial.attempts.last().map_or(0, |(_, start)| *start);
            self.say("state", format_args!("{id} is {state}, attempt {attempt} from step {step}"));
        }
        let may_reopen = self.seen().may_reopen && old.trial.state != domain::trial::TrialState::Completed;
        if old.trial.state.is_terminal() && old.trial.state != state && !may_reopen {
            self.find(format_args!("{id} was {}, and is {state}", old.trial.state));
        }
        if !new.trial.attempts.starts_with(&old.trial.attempts) {
            let (old, new) = (&old.trial.attempts, &new.trial.attempts);
            self.find(format_args!("{id} had the attempts {old:?}, and has {new:?}"));
        }
        let cost = |record: &TrialRecord| record.trial.cost_usd.unwrap_or_default();
        if cost(&new) < cost(&old) - 1e-9 || !cost(&new).is_finite() {
            self.find(format_args!("{id} cost ${}, and costs ${}", cost(&old), cost(&new)));
        }
        if let (Some(old), Some(new)) = (&old.checkpoint, &new.checkpoint)
            && new.step < old.step
        {
            self.find(format_args!("{id} had a checkpoint of step {}, and has {}", old.step, new.step));
        }
    }

    /// Whether a checkpoint's part is there, whole.
    fn is_there(&self, part: &str) -> bool {
        let manifest = ObjectPath::from(part).join("manifest.json");
        self.objects.head(&manifest).now_or_never().unwrap().is_ok()
    }

    /// Somebody removes an object; the state may not name it.
    pub fn deletes(&self, object: &ObjectPath) {
        let seen = self.seen();
        let part = object.as_ref().rsplit_once('/').map_or("", |(part, _)| part);
        let named = seen.trials.values().find(|record| record.paths().contains(part));
        let named = named.map(|record| record.trial.id.to_string());
        let spec = seen.specs.as_deref() == Some(object.as_ref());
        let named = named.or_else(|| spec.then(|| "the sweep".into()));
        drop(seen);
        if let Some(trial) = named {
            self.find(format_args!("{object} is removed, and {trial} points at it"));
        }
    }

    /// Every object with its bytes.
    pub async fn all_objects(&self) -> Vec<(ObjectPath, Vec<u8>)> {
        use futures::TryStreamExt;
        let all: Vec<_> = self.objects.list(None).try_collect().await.unwrap();
        let mut objects = Vec::new();
        for meta in all {
            let bytes = self.objects.get(&meta.location).await.unwrap().bytes().await.unwrap();
            objects.push((meta.location, bytes.to_vec()));
        }
        objects
    }
}
