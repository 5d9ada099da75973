//! What an agent has said and not had acknowledged; it outlives the agent's process.

use coordinator::actors::message::TrialEvent;
use domain::metric::MetricPoint;
use domain::{Attempt, TrialId};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard};
use tokio::sync::Notify;

pub type Assignment = (TrialId, Attempt);

#[derive(Debug, Clone)]
pub enum Said {
    Points(Vec<MetricPoint>),
    Event(TrialEvent),
}

/// Clones share it.
#[derive(Clone, Default)]
pub struct Spool {
    entries: Arc<Mutex<BTreeMap<Assignment, Entry>>>,
    /// Unlike a watch channel, it wakes those who wait in the order in which they came.
    changed: Arc<Notify>,
}

#[derive(Default)]
struct Entry {
    pending: VecDeque<(u64, Said)>,
    last_sequence: u64,
    acknowledged: u64,
    over: bool,
}

impl Spool {
    fn entries(&self) -> MutexGuard<'_, BTreeMap<Assignment, Entry>> {
        self.entries.lock().unwrap()
    }

    pub fn append(&self, assignment: &Assignment, last: bool, said: Said) {
        let mut entries = self.entries();
        let entry = entries.entry(assignment.clone()).or_default();
        assert!(!entry.over, "{assignment:?}: {said:?} behind the last message");
        entry.last_sequence += 1;
        entry.over = last;
        entry.pending.push_back((entry.last_sequence, said));
    }

    /// The next message to send: any above what `sent` says of its assignment, within the window.
    pub fn next(&self, sent: &BTreeMap<Assignment, u64>, window: u64) -> Option<(Assignment, u64, Said)> {
        self.entries().iter().find_map(|(assignment, entry)| {
            let after = sent.get(assignment).copied().unwrap_or(0);
            let (sequence, said) = entry.pending.iter().find(|(sequence, _)| *sequence > after)?;
            let may = *sequence <= entry.acknowledged + window;
            may.then(|| (assignment.clone(), *sequence, said.clone()))
        })
    }

    /// Forgets what is acknowledged, and answers with it.
    pub fn acknowledge(&self, assignment: &Assignment, sequence: u64) -> Vec<Said> {
        let mut entries = self.entries();
        let Some(entry) = entries.get_mut(assignment) else { return Vec::new() };
        entry.acknowledged = entry.acknowledged.max(sequence.min(entry.last_sequence));
        let done = entry.pending.iter().take_while(|(of, _)| *of <= sequence).count();
        let said = entry.pending.drain(..done).map(|(_, said)| said).collect();
        if entry.over && entry.pending.is_empty() {
            entries.remove(assignment);
        }
        drop(entries);
        self.changed.notify_waiters();
        said
    }

    /// Forgets an assignment; answers with whether there was anything of it.
    pub fn forget(&self, assignment: &Assignment) -> bool {
        let was = self.entries().remove(assignment).is_some();
        self.changed.notify_waiters();
        was
    }

    pub fn assignments(&self) -> Vec<Assignment> {
        self.entries().keys().cloned().collect()
    }

    /// Those that have something yet to say.
    pub fn unfinished(&self) -> Vec<Assignment> {
        self.entries().iter().filter(|(_, entry)| !entry.over).map(|(of, _)| of.clone()).collect()
    }

    pub fn last_sequence(&self, assignment: &Assignment) -> u64 {
        self.entries().get(assignment).map_or(0, |entry| entry.last_sequence)
    }

    pub fn is_empty(&self) -> bool {
        self.entries().is_empty()
    }

    /// Returns once an assignment's messages up to a number are acknowledged, or it is forgotten: whether they are.
    pub async fn acknowledged(&self, assignment: &Assignment, sequence: u64) -> bool {
        loop {
            let changed = self.changed.notified();
            match self.entries().get(assignment).map(|entry| entry.acknowledged >= sequence) {
                None => return false,
                Some(true) => return true,
                Some(false) => {}
            }
            changed.await;
        }
    }
}
