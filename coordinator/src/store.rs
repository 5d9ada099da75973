//! The coordinator's durable state: typed records over the registry. Every write is one atomic batch under
//! this coordinator's fence.
//!
//! | key | holds |
//! |---|---|
//! | `sweeps/<sweep>` | a [`SweepRecord`]; in a fleet without its spec, if that is large: that is an object then (`specs.rs`) |
//! | `trials/<sweep>/<number, ten digits>` | a [`TrialRecord`] |
//! | `logs/<sweep>/<number, ten digits>/<entry, ten digits>` | a [`LogEntry`] of a trial |
//! | `requests/<request id>` | the id of the sweep that the request made |
//! | `deleted/<sweep>` | the [`Tombstone`] of a deleted sweep: its id is never given again |
//! | `drains/<agent>` | the id of an agent that is drained |
//! | `owners/<agent>` | the [`Owner`] of an agent |
//! | `uploads/<file>` | the [`Uploaded`] file's namespace and bytes |
//! | `history/closed` | in a fleet with an object store: the [`Closed`] terms of its metrics |
//! | `newest/<time, descending>-<sweep>` | the sweep's id, so that a listing begins with the newest |

mod records;
mod specs;

pub use records::{
    Checkpoint, Closed, LogEntry, Owner, Placement, Revision, StopCause, SweepHead, SweepRecord, Tombstone,
    TrialRecord, Uploaded,
};
pub use specs::SpecObject;
pub(crate) use specs::{head as sweep_head, joined as joined_with_specs};

use crate::actors::sweep::Selection;
use crate::artifacts::Artifacts;
use crate::error::{CoordinatorError, Result};
use domain::data::ContentHash;
use domain::{AgentId, SweepId, Timestamp, TrialId};
use futures::stream::{self, StreamExt, TryStreamExt};
use registry::{Entries, Fence, Registry, Write};
use serde::Serialize;
use serde::de::DeserializeOwned;
use specs::Specs;
use std::collections::BTreeSet;
use std::sync::Arc;
use telemetry::metrics;
use tokio::time::Instant;

/// Records read in one go.
const PAGE: usize = 1000;

/// Records that are worth a second thread.
const MANY: usize = 250;

/// Objects with specs that are read at once.
const SPECS_AT_ONCE: usize = 16;

/// The durable state.
#[derive(Clone)]
pub struct Store {
    registry: Arc<dyn Registry>,
    fence: Fence,
    /// Where large specs lie, if the registry is not the place for them.
    specs: Option<Arc<Specs>>,
}

impl Store {
    /// Becomes the leader over a registry.
    pub async fn lead(registry: Arc<dyn Registry>, holder: &str) -> Result<Self> {
        let fence = registry.lead(holder).await?;
        Ok(Self { registry, fence, specs: None })
    }

    /// The same with a place for what is too large for the registry, if it names a limit: in this leader's objects.
    #[must_use]
    pub fn beside(self, artifacts: Artifacts) -> Self {
        let specs = self.registry.inline_limit().map(|limit| Arc::new(Specs::new(artifacts, limit)));
        Self { specs, ..self }
    }

    /// The same state out of another registry that can be read alone: whoever tries to write there leads nobody.
    pub fn read_in(registry: Arc<dyn Registry>) -> Self {
        Self { registry, fence: Fence(0), specs: None }
    }

    /// This leadership's number, larger than that of any before.
    pub fn term(&self) -> u64 {
        self.fence.0
    }

    /// Whether this coordinator leads: it did, at some moment after the call.
    ///
    /// # Errors
    /// Another leads, or it cannot be told.
    pub async fn still_leads(&self) -> registry::Result<()> {
        self.registry.commit(self.fence, Vec::new()).await
    }

    /// Writes all of a batch or nothing; durable when it returns.
    pub async fn commit(&self, batch: Batch) -> Result<()> {
        if let Some(error) = batch.error {
            return Err(error);
        }
        if batch.writes.is_empty() {
            return Ok(());
        }
        // What the transaction names is durable before.
        let (writes, named) = match &self.specs {
            Some(specs) => specs.keep(batch.writes).await?,
            None => (batch.writes, Vec::new()),
        };
        let started = Instant::now();
        let done = self.registry.commit(self.fence, writes).await;
        let outcome = if done.is_ok() { "durable" } else { "failed" };
        metrics::STORE_TRANSACTION_DURATION.record(started.elapsed().as_secs_f64(), &[("outcome", outcome)]);
        done?;
        if let Some(specs) = &self.specs {
            specs.committed(named);
        }
        Ok(())
    }

    /// A sweep.
    ///
    /// # Errors
    /// `Unreadable`, if its spec lies in an object that is not there or is damaged; or the registry or the object store failed.
    pub async fn sweep(&self, id: &SweepId) -> Result<Option<SweepRecord>> {
        let key = sweep_key(id);
        match self.registry.get(&key).await? {
            Some(value) => Ok(Some(self.sweep_record(&key, &value).await?)),
            None => Ok(None),
        }
    }

    /// What is known of a sweep without its spec.
    pub async fn sweep_head(&self, id: &SweepId) -> Result<Option<SweepHead>> {
        let key = sweep_key(id);
        self.registry.get(&key).await?.map(|value| sweep_head(&key, &value)).transpose()
    }

    /// The same of every sweep.
    pub async fn sweep_heads(&self) -> Result<Vec<SweepHead>> {
        self.sweep_values().await?.iter().map(|(key, value)| sweep_head(key, value)).collect()
    }

    /// Whether a sweep's spec lies in an object that is not there or is damaged.
    ///
    /// # Errors
    /// As [`Store::sweep`]'s others.
    pub async fn is_unreadable(&self, id: &SweepId) -> Result<bool> {
        match self.sweep(id).await {
            Ok(_) => Ok(false),
            Err(CoordinatorError::Unreadable { .. }) => Ok(true),
            Err(error) => Err(error),
        }
    }

    async fn sweep_record(&self, key: &str, value: &[u8]) -> Result<SweepRecord> {
        let head = sweep_head(key, value)?;
        match (&head.specs, &self.specs) {
            (Some(object), Some(specs)) => parse(key, &specs.whole(&head.id, object, value).await?),
            // Who knows no objects finds that the record is not whole.
            _ => parse(key, value),
        }
    }

    /// What stays of a deleted sweep.
    pub async fn tombstone(&self, id: &SweepId) -> Result<Option<Tombstone>> {
        self.read(&tombstone_key(id)).await
    }

    /// Agents that are drained.
    pub async fn drained(&self) -> Result<BTreeSet<AgentId>> {
        Ok(self.read_all(DRAINS).await?.into_iter().collect())
    }

    /// Agents that belong to a token.
    pub async fn owners(&self) -> Result<Vec<Owner>> {
        self.read_all(OWNERS).await
    }

    /// Files that were uploaded, and for whom.
    pub async fn uploads(&self) -> Result<Vec<Uploaded>> {
        self.read_all(UPLOADS).await
    }

    /// Every deleted sweep.
    pub async fn tombstones(&self) -> Result<Vec<Tombstone>> {
        self.read_all(TOMBSTONES).await
    }

    /// What the newest leader found of the metrics in an object store.
    pub async fn closed(&self) -> Result<Option<Closed>> {
        self.read(CLOSED).await
    }

    /// The keys of everything that is kept of a sweep's trials.
    pub async fn keys_of(&self, sweep: &SweepId) -> Result<Vec<String>> {
        let mut keys = Vec::new();
        for prefix in [format!("trials/{sweep}/"), format!("{LOGS}{sweep}/")] {
            let mut after: Option<String> = None;
            loop {
                let page = self.registry.list(&prefix, after.as_deref(), PAGE).await?;
                let full = page.len() == PAGE;
                keys.extend(page.into_iter().map(|(key, _)| key));
                if !full {
                    break;
                }
                after = keys.last().cloned();
            }
        }
        Ok(keys)
    }

    /// A trial's log from an entry on (the first is 0), in the order in which things happened.
    pub async fn log(&self, trial: &TrialId, from: u32) -> Result<Vec<LogEntry>> {
        let (Some(sweep), Some(number)) = (trial.sweep(), trial.number()) else { return Ok(Vec::new()) };
        let prefix = log_prefix(&sweep, number);
        let mut after = from.checked_sub(1).map(|last| format!("{prefix}{last:010}"));
        let mut entries = Vec::new();
        loop {
            let page = self.registry.list(&prefix, after.as_deref(), PAGE).await?;
            let full = page.len() == PAGE;
            for (key, value) in &page {
                entries.push(parse(key, value)?);
            }
            match page.into_iter().next_back() {
                Some((last, _)) if full => after = Some(last),
                _ => return Ok(entries),
            }
        }
    }

    /// The sweep that a request made.
    pub async fn request(&self, request_id: &str) -> Result<Option<SweepId>> {
        self.read(&request_key(request_id)).await
    }

    /// A trial.
    pub async fn trial(&self, id: &TrialId) -> Result<Option<TrialRecord>> {
        match (id.sweep(), id.number()) {
            (Some(sweep), Some(number)) => self.read(&trial_key(&sweep, number)).await,
            _ => Ok(None),
        }
    }

    /// A sweep's trials, in the order of their numbers.
    pub async fn trials(&self, sweep: &SweepId) -> Result<Vec<TrialRecord>> {
        self.read_all(&format!("trials/{sweep}/")).await
    }

    /// The object-store paths that any record points at.
    pub async fn paths(&self) -> Result<BTreeSet<String>> {
        let mut paths = BTreeSet::new();
        self.each("trials/", |record: TrialRecord| paths.extend(record.paths())).await?;
        paths.extend(self.sweep_heads().await?.into_iter().filter_map(|head| Some(head.specs?.path)));
        Ok(paths)
    }

    /// The uploaded data that any sweep names.
    ///
    /// # Errors
    /// As [`Store::sweep`]'s, where a record does not say itself what its object names.
    pub async fn trees(&self) -> Result<BTreeSet<ContentHash>> {
        let read = |(key, value): (String, Vec<u8>)| async move {
            let said = sweep_head(&key, &value)?.specs.and_then(|object| object.trees);
            Ok::<_, CoordinatorError>(match said {
                Some(trees) => trees,
                None => self.sweep_record(&key, &value).await?.trees(),
            })
        };
        let trees = stream::iter(self.sweep_values().await?).map(read).buffered(SPECS_AT_ONCE);
        Ok(trees.try_collect::<Vec<_>>().await?.into_iter().flatten().collect())
    }

    /// Ids of sweeps, newest first, at most `limit`; each with the position after which to go on.
    pub async fn newest(&self, after: Option<&str>, limit: usize) -> Result<Vec<(String, SweepId)>> {
        let rows = self.registry.list(NEWEST, after, limit).await?;
        rows.into_iter().map(|(key, value)| Ok((key.clone(), parse(&key, &value)?))).collect()
    }

    /// Some of a sweep's trials, in the order of their numbers.
    pub async fn select(&self, sweep: &SweepId, selection: &Selection) -> Result<Vec<TrialRecord>> {
        let prefix = format!("trials/{sweep}/");
        let mut after = trial_key(sweep, selection.after);
        let mut wanted = Vec::new();
        while wanted.len() < selection.limit {
            // Without a filter every record that is read is wanted.
            let asked = match selection.states.is_empty() {
                true => PAGE.min(selection.limit - wanted.len()),
                false => PAGE,
            };
            let page = self.registry.list(&prefix, Some(&after), asked).await?;
            let whole = page.len() == asked;
            for (key, record) in parse_all(page).await? {
                if selection.wants(&record) {
                    wanted.push(record);
                }
                if wanted.len() >= selection.limit {
                    break;
                }
                after = key;
            }
            if !whole {
                break;
            }
        }
        Ok(wanted)
    }

    async fn read<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>> {
        let value = self.registry.get(key).await?;
        value.map(|value| parse(key, &value)).transpose()
    }

    async fn read_all<T: DeserializeOwned>(&self, prefix: &str) -> Result<Vec<T>> {
        let mut all = Vec::new();
        self.each(prefix, |value| all.push(value)).await?;
        Ok(all)
    }

    async fn each<T: DeserializeOwned>(&self, prefix: &str, mut take: impl FnMut(T)) -> Result<()> {
        self.pages(prefix, |page| {
            for (key, value) in &page {
                take(parse(key, value)?);
            }
            Ok(())
        })
        .await
    }

    /// Every sweep's record as it lies in the registry.
    async fn sweep_values(&self) -> Result<Entries> {
        let mut values = Entries::new();
        self.pages("sweeps/", |page| {
            values.extend(page);
            Ok(())
        })
        .await?;
        Ok(values)
    }

    /// Everything whose key begins with `prefix`, a page at a time.
    async fn pages(&self, prefix: &str, mut take: impl FnMut(Entries) -> Result<()>) -> Result<()> {
        let mut after: Option<String> = None;
        loop {
            let page = self.registry.list(prefix, after.as_deref(), PAGE).await?;
            after = page.get(PAGE - 1).map(|(last, _)| last.clone());
            take(page)?;
            if after.is_none() {
                return Ok(());
            }
        }
    }
}

/// Changes that are written together.
#[derive(Debug, Default)]
pub struct Batch {
    writes: Vec<Write>,
    error: Option<CoordinatorError>,
}

impl Batch {
    /// Sets a sweep's record.
    pub fn sweep(&mut self, record: &SweepRecord) {
        self.put(sweep_key(&record.sweep.id), record);
    }

    /// Sets a trial's record.
    pub fn trial(&mut self, record: &TrialRecord) {
        match (record.trial.id.sweep(), record.trial.id.number()) {
            (Some(sweep), Some(number)) => self.put(trial_key(&sweep, number), record),
            _ => self.error = Some(CoordinatorError::not_found("trial", &record.trial.id)),
        }
    }

    /// Sets entry `entry` of a trial's log; the first is 0.
    pub fn log(&mut self, sweep: &SweepId, number: u32, entry: u32, what: &LogEntry) {
        self.put(format!("{}{entry:010}", log_prefix(sweep, number)), what);
    }

    /// Enters a new sweep: its record, its request and its place in the listing.
    pub fn submission(&mut self, record: &SweepRecord) {
        self.sweep(record);
        self.put(request_key(&record.sweep.request_id), &record.sweep.id);
        self.put(newest_key(record.sweep.created_at, &record.sweep.id), &record.sweep.id);
    }

    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.writes.is_empty() && self.error.is_none()
    }

    /// Removes a sweep with these keys of its trials. Its request stays: the same one again does not begin it anew.
    pub fn remove(&mut self, sweep: &SweepHead, keys: Vec<String>) {
        let own = [sweep_key(&sweep.id), newest_key(sweep.created_at, &sweep.id)];
        self.writes.extend(own.into_iter().chain(keys).map(Write::Delete));
    }

    /// Sets whether an agent is drained.
    pub fn drain(&mut self, agent: &AgentId, drained: bool) {
        let key = format!("{DRAINS}{agent}");
        match drained {
            true => self.put(key, agent),
            false => self.writes.push(Write::Delete(key)),
        }
    }

    /// Sets whom an agent belongs to.
    pub fn own(&mut self, owner: &Owner) {
        self.put(format!("{OWNERS}{}", owner.agent), owner);
    }

    /// Forgets whom an agent belonged to.
    pub fn disown(&mut self, agent: &AgentId) {
        self.writes.push(Write::Delete(format!("{OWNERS}{agent}")));
    }

    /// Sets for whom a file is uploaded.
    pub fn uploaded(&mut self, uploaded: &Uploaded) {
        self.put(upload_key(uploaded.file), uploaded);
    }

    /// Forgets for whom a file was uploaded.
    pub fn forget_upload(&mut self, file: ContentHash) {
        self.writes.push(Write::Delete(upload_key(file)));
    }

    /// Sets what stays of a deleted sweep.
    pub fn tombstone(&mut self, tombstone: &Tombstone) {
        self.put(tombstone_key(&tombstone.sweep), tombstone);
    }

    /// Sets what a leader found of the metrics in an object store.
    pub fn closed(&mut self, closed: &Closed) {
        self.put(CLOSED.into(), closed);
    }

    fn put<T: Serialize>(&mut self, key: String, value: &T) {
        match serde_json::to_vec(value) {
            Ok(bytes) => self.writes.push(Write::Put(key, bytes)),
            Err(error) => self.error = Some(CoordinatorError::Corrupt { key, problem: error.to_string() }),
        }
    }
}

const NEWEST: &str = "newest/";
const TOMBSTONES: &str = "deleted/";
const LOGS: &str = "logs/";
const DRAINS: &str = "drains/";

const OWNERS: &str = "owners/";
const UPLOADS: &str = "uploads/";
const CLOSED: &str = "history/closed";

pub(crate) fn upload_key(file: ContentHash) -> String {
    format!("{UPLOADS}{file}")
}

/// What the keys of a trial's log begin with.
pub(crate) fn log_prefix(sweep: &SweepId, number: u32) -> String {
    format!("{LOGS}{sweep}/{number:010}/")
}

pub(crate) fn tombstone_key(id: &SweepId) -> String {
    format!("{TOMBSTONES}{id}")
}

pub(crate) fn sweep_key(id: &SweepId) -> String {
    format!("sweeps/{id}")
}

pub(crate) fn trial_key(sweep: &SweepId, number: u32) -> String {
    format!("trials/{sweep}/{number:010}")
}

pub(crate) fn request_key(request_id: &str) -> String {
    format!("requests/{request_id}")
}

/// Counts down, so that a listing begins with the newest.
pub(crate) fn newest_key(created_at: Timestamp, sweep: &SweepId) -> String {
    let age = u64::MAX - created_at.0;
    format!("{NEWEST}{age:020}-{sweep}")
}

/// Records read by two threads if there are many: who lists waits for the slowest page.
async fn parse_all<T: DeserializeOwned + Send + 'static>(mut rows: Entries) -> Result<Vec<(String, T)>> {
    fn read<T: DeserializeOwned>(rows: Entries) -> Result<Vec<(String, T)>> {
        let read = |(key, value): (String, Vec<u8>)| parse(&key, &value).map(|record| (key, record));
        rows.into_iter().map(read).collect()
    }
    if rows.len() < MANY {
        return read(rows);
    }
    let rest = rows.split_off(rows.len() / 2);
    let rest = tokio::task::spawn_blocking(move || read(rest));
    let mut records = read(rows)?;
    // It panics at no input, and is not aborted but with the runtime.
    records.extend(rest.await.map_err(|_| actor::Gone)??);
    Ok(records)
}

fn parse<T: DeserializeOwned>(key: &str, value: &[u8]) -> Result<T> {
    serde_json::from_slice(value)
        .map_err(|error| CoordinatorError::Corrupt { key: key.into(), problem: error.to_string() })
}
