//! What was asked of a sweep, where it is too large for the registry: its spec, those before it was extended, and the shapes of
//! its base models. Only a submission and an extension change them, and the rest of the record changes with each trial. So
//! they lie in one object, and the record names it:
//!
//! ```text
//! {"sweep": {"id": …, "spec": {…}, …}, "revisions": […], "extensions": […], "base_models": {…}, …}
//! {"sweep": {"id": …, …}, "specs": {"path": "sweeps/<sweep>/spec-<sha256>-t<term>", "bytes": …, "trees": […]}, …}
//! ```
//!
//! `trees` is the uploaded data that it names: what is to be kept is known without the object.
//!
//! Nobody but [`super::Store`] knows of the second form. Records of an earlier version, and of a registry in which large values
//! are as good as small ones, have the first, however large they are.

use super::{SweepHead, SweepRecord, sweep_key};
use crate::artifacts::{ArtifactError, Artifacts, spec_path, split_term};
use crate::error::{CoordinatorError, Result};
use bytes::Bytes;
use domain::SweepId;
use domain::data::ContentHash;
use registry::Write;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::{BTreeSet, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Members of a record that lie in the object, beside its sweep's `spec`.
const MOVED: [&str; 3] = ["revisions", "extensions", "base_models"];
/// The member of a record that names the object.
const NAMED: &str = "specs";
/// A JSON object.
type Members = Map<String, Value>;

/// Uploaded trees that a record names itself, at most: it is written again with each change of its sweep.
const TREES: usize = 32;

/// Bytes of objects that are kept in memory once they were read; what is over is read again.
const READ_BYTES: usize = 32 << 20;

/// The object that a record names.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpecObject {
    /// Its path in the object store; the name says what it hashes to.
    pub path: String,
    /// Its length.
    pub bytes: u64,
    /// The uploaded data that the specs in it name. `None` if they name too much for the record: the object says it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trees: Option<BTreeSet<ContentHash>>,
}

/// Where specs lie that are too large for the registry.
#[derive(Debug)]
pub(super) struct Specs {
    artifacts: Artifacts,
    /// Bytes of one that still stays in its record.
    limit: usize,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    /// What records name, as this leader read or wrote them.
    named: HashMap<SweepId, SpecObject>,
    /// What objects hold, by their paths.
    read: HashMap<String, Bytes>,
    read_bytes: usize,
}

impl Specs {
    pub(super) fn new(artifacts: Artifacts, limit: usize) -> Self {
        Self { artifacts, limit, known: Mutex::default() }
    }

    /// The same batch with each spec that is too large in an object, durable when this returns; and what to tell
    /// [`Specs::committed`] once the batch is durable, too.
    pub(super) async fn keep(&self, batch: Vec<Write>) -> Result<(Vec<Write>, Vec<(SweepId, SpecObject)>)> {
        let (mut writes, mut named) = (Vec::with_capacity(batch.len()), Vec::new());
        for write in batch {
            let large = match &write {
                Write::Put(key, value) if value.len() > self.limit => {
                    sweep_of(key).map(|id| (id, key, value))
                }
                _ => None,
            };
            let Some((id, key, value)) = large else {
                writes.push(write);
                continue;
            };
            let Some((mut record, specs)) = split(value, self.limit).map_err(corrupt(key))? else {
                writes.push(write);
                continue;
            };
            let object = self.object(&id, key, value, specs).await?;
            record.insert(NAMED.into(), serde_json::to_value(&object).map_err(corrupt(key))?);
            writes.push(Write::Put(key.clone(), serde_json::to_vec(&record).map_err(corrupt(key))?));
            named.push((id, object));
        }
        Ok((writes, named))
    }

    /// The object of that content: the one that the sweep's record names, or a new one. `record` is the whole record, under `key`.
    async fn object(&self, sweep: &SweepId, key: &str, record: &[u8], specs: Vec<u8>) -> Result<SpecObject> {
        let path = spec_path(sweep, &specs)?;
        let named = self.known().named.get(sweep).cloned();
        if let Some(named) = named.filter(|named| split_term(&named.path).0 == path) {
            return Ok(named);
        }
        let trees = serde_json::from_slice::<SweepRecord>(record).map_err(corrupt(key))?.trees();
        let trees = (trees.len() <= TREES).then_some(trees);
        let (bytes, specs) = (specs.len() as u64, Bytes::from(specs));
        let path = self.artifacts.keep_spec(sweep, specs.clone()).await?;
        self.known().remember(&path, specs);
        Ok(SpecObject { path, bytes, trees })
    }

    /// Records name these objects from now on.
    pub(super) fn committed(&self, named: Vec<(SweepId, SpecObject)>) {
        self.known().named.extend(named);
    }

    /// The whole of a record that names an object, in the form that has none.
    ///
    /// # Errors
    /// `Unreadable`, if the object is not there or is damaged; the store failed.
    pub(super) async fn whole(&self, sweep: &SweepId, object: &SpecObject, record: &[u8]) -> Result<Vec<u8>> {
        let held = self.known().read.get(&object.path).cloned();
        let specs = match held {
            Some(specs) => specs,
            None => {
                let read = self.artifacts.spec(&object.path).await;
                let specs = read.map_err(|error| unreadable(sweep, error))?;
                self.known().remember(&object.path, specs.clone());
                specs
            }
        };
        // What a record names when this leader began: of earlier terms nothing else is named anew.
        self.known().named.entry(sweep.clone()).or_insert_with(|| object.clone());
        joined(record, &specs).map_err(corrupt(&sweep_key(sweep)))
    }

    /// What is known. A poisoned lock is no matter: nothing panics half-way through a change.
    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    fn remember(&mut self, path: &str, specs: Bytes) {
        if self.read_bytes + specs.len() > READ_BYTES {
            self.read.clear();
            self.read_bytes = 0;
        }
        if specs.len() <= READ_BYTES {
            self.read_bytes += specs.len();
            if let Some(old) = self.read.insert(path.into(), specs) {
                self.read_bytes -= old.len();
            }
        }
    }
}

/// What an error of the object store means to whoever reads the sweep.
pub(super) fn unreadable(sweep: &SweepId, error: ArtifactError) -> CoordinatorError {
    match error {
        error @ ArtifactError::Store { .. } => error.into(),
        error => CoordinatorError::Unreadable { sweep: sweep.clone(), error },
    }
}

/// The sweep whose record lies under a key.
fn sweep_of(key: &str) -> Option<SweepId> {
    key.strip_prefix("sweeps/").map(SweepId::new)
}

fn corrupt(key: &str) -> impl Fn(serde_json::Error) -> CoordinatorError {
    move |error| CoordinatorError::Corrupt { key: key.into(), problem: error.to_string() }
}

/// A record without what an object holds, and that; nothing if it fits the record.
fn split(record: &[u8], limit: usize) -> serde_json::Result<Option<(Members, Vec<u8>)>> {
    let mut record: Members = serde_json::from_slice(record)?;
    let mut moved = Members::new();
    if let Some(Value::Object(sweep)) = record.get_mut("sweep") {
        // In the order of the others: the same content has the same bytes.
        moved.extend(sweep.shift_remove_entry("spec"));
    }
    moved.extend(MOVED.iter().filter_map(|member| record.shift_remove_entry(*member)));
    let specs = serde_json::to_vec(&moved)?;
    Ok((specs.len() > limit).then_some((record, specs)))
}

/// A record with what its object holds.
pub(crate) fn joined(record: &[u8], specs: &[u8]) -> serde_json::Result<Vec<u8>> {
    let mut record: Members = serde_json::from_slice(record)?;
    let mut moved: Members = serde_json::from_slice(specs)?;
    record.remove(NAMED);
    if let Some(Value::Object(sweep)) = record.get_mut("sweep") {
        sweep.extend(moved.shift_remove_entry("spec"));
    }
    record.extend(moved);
    serde_json::to_vec(&record)
}

/// What can be read of a record without its object.
pub(crate) fn head(key: &str, record: &[u8]) -> Result<SweepHead> {
    #[derive(Deserialize)]
    struct Record {
        sweep: SweepHead,
        #[serde(default)]
        specs: Option<SpecObject>,
    }
    let Record { sweep, specs } = serde_json::from_slice(record).map_err(corrupt(key))?;
    Ok(SweepHead { specs, ..sweep })
}
