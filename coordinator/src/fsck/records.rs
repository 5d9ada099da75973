//! Sweeps and trials, each by itself and against the others.

use super::Findings;
use crate::artifacts::{read_spec, split_term};
use crate::store::{
    self, Closed, LogEntry, Owner, SpecObject, SweepRecord, Tombstone, TrialRecord, Uploaded,
};
use domain::data::ContentHash;
use domain::sweep::StateCounts;
use domain::trial::{TrialConfig, TrialPlacement, TrialState};
use domain::{AgentId, SweepId, Timestamp};
use registry::Entries;
use serde::de::DeserializeOwned;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Every record of a store.
#[derive(Debug, Default)]
pub(super) struct Records {
    pub(super) sweeps: BTreeMap<SweepId, SweepRecord>,
    pub(super) trials: BTreeMap<(SweepId, u32), TrialRecord>,
    /// Objects that hold specs, by the sweeps that name them.
    pub(super) specs: BTreeMap<SweepId, SpecObject>,
    /// By key, the sweep that it leads to.
    requests: BTreeMap<String, SweepId>,
    newest: BTreeMap<String, SweepId>,
    /// How many entries each trial's log has, by the prefix of their keys.
    logs: BTreeMap<String, u32>,
    deleted: BTreeMap<SweepId, Tombstone>,
}

impl Records {
    /// Reads every entry; what cannot be read, or lies under another key than its own, is a problem.
    /// `artifacts` is where the objects lie that records name.
    pub(super) fn read(entries: &Entries, artifacts: &Path, findings: &mut Findings) -> Self {
        let mut records = Self::default();
        for (key, value) in entries {
            match key.split_once('/').map_or("", |(folder, _)| folder) {
                "sweeps" => {
                    if let Some(record) = records.read_sweep(key, value, artifacts, findings) {
                        let id = record.sweep.id.clone();
                        expect_key(key, &store::sweep_key(&id), findings);
                        records.sweeps.insert(id, record);
                    }
                }
                "trials" => {
                    let Some(record) = parse::<TrialRecord>(key, value, findings) else { continue };
                    match (record.trial.id.sweep(), record.trial.id.number()) {
                        (Some(sweep), Some(number)) => {
                            expect_key(key, &store::trial_key(&sweep, number), findings);
                            records.trials.insert((sweep, number), record);
                        }
                        _ => findings.problem(key, format!("`{}` is no trial's id", record.trial.id)),
                    }
                }
                "requests" => {
                    records.requests.extend(parse(key, value, findings).map(|id| (key.clone(), id)))
                }
                "newest" => records.newest.extend(parse(key, value, findings).map(|id| (key.clone(), id))),
                "logs" => records.read_log_entry(key, value, findings),
                "deleted" => {
                    if let Some(tombstone) = parse::<Tombstone>(key, value, findings) {
                        expect_key(key, &store::tombstone_key(&tombstone.sweep), findings);
                        records.deleted.insert(tombstone.sweep.clone(), tombstone);
                    }
                }
                "drains" => drop(parse::<AgentId>(key, value, findings)),
                "owners" => drop(parse::<Owner>(key, value, findings)),
                "uploads" => {
                    if let Some(uploaded) = parse::<Uploaded>(key, value, findings) {
                        expect_key(key, &store::upload_key(uploaded.file), findings);
                    }
                }
                "history" => drop(parse::<Closed>(key, value, findings)),
                _ => findings.note(key, "a record of a kind that this version does not know"),
            }
        }
        findings.checked("sweeps", records.sweeps.len());
        findings.checked("trials", records.trials.len());
        let entries = records.logs.values().map(|count| *count as usize).sum();
        findings.checked("log entries", entries);
        records
    }

    /// A sweep's record, with its spec if that lies in an object.
    fn read_sweep(
        &mut self,
        key: &str,
        value: &[u8],
        artifacts: &Path,
        findings: &mut Findings,
    ) -> Option<SweepRecord> {
        // What is no record is told as of others.
        let Ok(head) = store::sweep_head(key, value) else { return parse(key, value, findings) };
        let Some(object) = head.specs else { return parse(key, value, findings) };
        let (specs, told, bytes) = (read_spec(artifacts, &object.path), object.trees.clone(), object.bytes);
        self.specs.insert(head.id, object);
        let specs = specs.map_err(|error| findings.problem(key, format!("its spec: {error}"))).ok()?;
        let whole = store::joined_with_specs(value, &specs);
        let whole = whole.map_err(|error| findings.problem(key, format!("its spec: {error}"))).ok()?;
        let record: SweepRecord = parse(key, &whole, findings)?;
        findings.expect(bytes == specs.len() as u64, key, || {
            format!("its spec has {} bytes, and the record says {bytes}", specs.len())
        });
        // What is told is what is kept of the uploaded data, without a look at the object.
        if let Some(told) = told {
            let named = record.trees();
            findings.expect(told == named, key, || {
                format!("its spec names {}, and the record says {}", listed(&named), listed(&told))
            });
        }
        Some(record)
    }

    /// Entries come in the order of their numbers.
    fn read_log_entry(&mut self, key: &str, value: &[u8], findings: &mut Findings) {
        parse::<LogEntry>(key, value, findings);
        let Some((trial, _)) = key.rsplit_once('/') else {
            return findings.problem(key, "is no log entry's key");
        };
        let count = self.logs.entry(trial.to_string()).or_default();
        expect_key(key, &format!("{trial}/{count:010}"), findings);
        *count += 1;
    }

    /// The trials of a sweep, by number.
    fn of<'a>(&'a self, sweep: &SweepId) -> impl Iterator<Item = (u32, &'a TrialRecord)> {
        let range = (sweep.clone(), 0)..=(sweep.clone(), u32::MAX);
        self.trials.range(range).map(|((_, number), record)| (*number, record))
    }

    /// Checks what must hold of and between them.
    pub(super) fn check(&self, findings: &mut Findings) {
        for record in self.sweeps.values() {
            self.check_sweep(record, findings);
        }
        for (folder, index) in [("requests", &self.requests), ("newest", &self.newest)] {
            for (key, id) in index {
                let key_of = |record: &SweepRecord| match folder {
                    "requests" => store::request_key(&record.sweep.request_id),
                    _ => store::newest_key(record.sweep.created_at, &record.sweep.id),
                };
                match self.sweeps.get(id) {
                    // The same submission again must not begin it anew.
                    None if folder == "requests" && self.deleted.contains_key(id) => {}
                    None => {
                        findings.problem(key, format!("leads to the sweep {id}, of which there is no record"))
                    }
                    Some(record) => expect_key(key, &key_of(record), findings),
                }
            }
        }
        for ((sweep, _), record) in &self.trials {
            let known = self.sweeps.contains_key(sweep);
            findings.expect(known, &record.trial.id, || format!("there is no record of its sweep {sweep}"));
            let keeps = self.sweeps.get(sweep).and_then(|sweep| sweep.sweep.spec.keep_adapters);
            check_trial(record, keeps.is_none(), findings);
            let kept = record.trial.id.number().map_or(0, |number| {
                self.logs
                    .get(store::log_prefix(sweep, number).trim_end_matches('/'))
                    .copied()
                    .unwrap_or_default()
            });
            findings.expect(kept == record.logged, &record.trial.id, || {
                format!("its log has {kept} entries, and its record counts {}", record.logged)
            });
        }
        for prefix in self.logs.keys() {
            let trial = prefix.trim_start_matches("logs/").rsplit_once('/');
            let trial = trial.and_then(|(sweep, number)| Some((SweepId::new(sweep), number.parse().ok()?)));
            let known = trial.is_some_and(|trial| self.trials.contains_key(&trial));
            findings.expect(known, prefix, || "is the log of a trial of which there is no record".into());
        }
        for (sweep, tombstone) in &self.deleted {
            let gone = !self.sweeps.contains_key(sweep);
            findings.expect(gone, sweep, || "is deleted, and has a record".into());
            if tombstone.completed_at.is_none() {
                findings.note(
                    sweep,
                    "is deleted, and its checkpoints are not yet; the next start goes on with it",
                );
            }
        }
    }

    fn check_sweep(&self, record: &SweepRecord, findings: &mut Findings) {
        let sweep = &record.sweep;
        let id = &sweep.id;
        let at = |key: String, index: &BTreeMap<String, SweepId>, findings: &mut Findings| {
            findings.expect(index.get(&key) == Some(id), id, || format!("`{key}` does not lead to it"));
        };
        at(store::request_key(&sweep.request_id), &self.requests, findings);
        at(store::newest_key(sweep.created_at, id), &self.newest, findings);
        let numbers: Vec<_> = self.of(id).map(|(number, _)| number).collect();
        let whole = numbers.iter().copied().eq(1..=sweep.proposed);
        findings.expect(whole, id, || {
            let missing: Vec<_> = (1..=sweep.proposed).filter(|n| !numbers.contains(n)).collect();
            format!(
                "it has proposed {} trials, and there are records of {}; missing: {missing:?}",
                sweep.proposed,
                numbers.len()
            )
        });
        let counted: StateCounts = self.of(id).map(|(_, record)| record.trial.state).collect();
        findings.expect(counted == sweep.counts, id, || {
            format!("it counts its trials as {:?}, and they are {counted:?}", sweep.counts)
        });
        let is_searched = |record: &TrialRecord| record.trial.replicate_of.is_none();
        let searched = self.of(id).filter(|(_, record)| is_searched(record)).count();
        let within = sweep.max_trials.is_none_or(|most| searched <= most as usize);
        findings.expect(within, id, || format!("more trials than its search has: {:?}", sweep.max_trials));
        self.check_runs(id, findings);
        over(id, sweep.state.as_str(), sweep.state.is_terminal(), sweep.finished_at, findings);
        if sweep.state.is_terminal() {
            for (_, live) in self.of(id).filter(|(_, record)| !record.trial.state.is_terminal()) {
                let (trial, state) = (&live.trial.id, live.trial.state);
                findings.problem(trial, format!("is {state}, and its sweep is {}", sweep.state));
            }
        }
        let kept = self.of(id).filter(|(_, record)| record.has_result() && record.trial.adapter.is_some());
        let (kept, most) = (kept.count(), sweep.spec.keep_adapters);
        findings.expect(most.is_none_or(|most| kept <= most as usize), id, || {
            format!("it has {kept} adapters, and keeps {} at most", most.unwrap_or_default())
        });
        if let Some((best, _)) = &sweep.best {
            let there = best.number().is_some_and(|number| self.trials.contains_key(&(id.clone(), number)));
            findings.expect(there, id, || format!("its best trial is {best}, of which there is no record"));
        }
    }
}

impl Records {
    /// Runs with other seeds: each of a trial that the search proposed, with its configuration, and none twice.
    fn check_runs(&self, sweep: &SweepId, findings: &mut Findings) {
        let mut seen = BTreeSet::new();
        for (_, record) in self.of(sweep) {
            let again = &record.trial;
            let (Some(of), seed) = (&again.replicate_of, again.config.seed) else { continue };
            let first = of.number().and_then(|number| self.trials.get(&(sweep.clone(), number)));
            let first = first.map(|first| &first.trial);
            let Some(first) = first.filter(|first| first.id == *of && first.replicate_of.is_none()) else {
                findings.problem(
                    &again.id,
                    format!("runs {of} again, which is no trial that its search proposed"),
                );
                continue;
            };
            let once = seed != first.config.seed && seen.insert((of, seed));
            findings.expect(once, &again.id, || format!("runs {of} with seed {seed}, as another run does"));
            let config = TrialConfig { seed: first.config.seed, ..again.config.clone() };
            let same = config == first.config && again.parameters == first.parameters;
            findings.expect(same, &again.id, || {
                format!("runs {of} again, and differs from it in more than its seed")
            });
        }
    }
}

fn parse<T: DeserializeOwned>(key: &str, value: &[u8], findings: &mut Findings) -> Option<T> {
    serde_json::from_slice(value)
        .inspect_err(|error| findings.problem(key, format!("the record cannot be read: {error}")))
        .ok()
}

/// Uploaded data by its names.
fn listed(trees: &BTreeSet<ContentHash>) -> String {
    match trees.is_empty() {
        true => "no uploaded data".into(),
        false => trees.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
    }
}

fn expect_key(key: &str, expected: &str, findings: &mut Findings) {
    findings.expect(key == expected, key, || {
        format!("the record lies under this key, and belongs to `{expected}`")
    });
}

fn over(
    place: impl ToString,
    state: &str,
    terminal: bool,
    finished: Option<Timestamp>,
    findings: &mut Findings,
) {
    findings.expect(terminal == finished.is_some(), place, || match terminal {
        true => format!("is {state}, and it is not said when it ended"),
        false => format!("is {state}, and has an end"),
    });
}

/// `keeps_all`: whether its sweep keeps every adapter.
fn check_trial(record: &TrialRecord, keeps_all: bool, findings: &mut Findings) {
    let trial = &record.trial;
    let (id, state) = (&trial.id, trial.state);
    over(id, state.as_str(), state.is_terminal(), trial.finished_at, findings);
    let placed = record.placement.is_some();
    findings.expect(placed == state.holds_device(), id, || match placed {
        true => format!("is {state}, and still has a device"),
        false => format!("is {state}, and has no device"),
    });
    findings.expect(trial.attempts.is_sorted_by(|a, b| a.0 < b.0), id, || {
        format!("its attempts do not grow: {:?}", trial.attempts)
    });
    let newest = trial.attempts.last().map_or(0, |(attempt, _)| attempt.0);
    findings.expect(newest == trial.attempt.0, id, || {
        format!("its attempt is {}, and the last that is listed {newest}", trial.attempt)
    });
    let there = |placed: &TrialPlacement| placed.ended_at.is_none();
    let current = |placed: &TrialPlacement| state.holds_device() && placed.attempt == trial.attempt;
    findings.expect(trial.placements.iter().all(|placed| current(placed) == there(placed)), id, || {
        format!("is {state} in attempt {}, and its devices are {:?}", trial.attempt, trial.placements)
    });
    check_steps(record, findings);
    let failed = matches!(state, TrialState::Failed | TrialState::Diverged);
    findings.expect(!failed || trial.failure.is_some(), id, || format!("is {state}, and it is not said why"));
    if state == TrialState::Completed {
        let total = trial.total_steps;
        findings.expect(total == Some(trial.step), id, || {
            format!("is completed at step {} of {total:?}", trial.step)
        });
        let kept = trial.adapter.is_some() || !keeps_all;
        findings.expect(kept, id, || "is completed, and has no adapter".into());
        let steps = trial.summary.as_ref().map(|summary| summary.steps);
        findings
            .expect(steps == total, id, || format!("is completed, and its summary counts {steps:?} steps"));
    }
}

/// Start steps, checkpoints and the paths that name them.
fn check_steps(record: &TrialRecord, findings: &mut Findings) {
    let trial = &record.trial;
    let id = &trial.id;
    // A checkpoint that nothing goes on from any more is gone, and earlier attempts' may be: a trial that has lost its
    // own begins anew when it is tried again.
    let resumable = record.checkpoint.as_ref().map_or(record.adapter_step, |checkpoint| checkpoint.step);
    if let Some((attempt, start)) = trial.attempts.last() {
        // One that waits may have lost the checkpoint that its last attempt started from.
        let waits = trial.state == TrialState::Queued;
        findings.expect(waits || *start <= resumable, id, || {
            format!(
                "attempt {attempt} starts from step {start}, and its newest checkpoint is of step {resumable}"
            )
        });
    }
    if let Some((_, start)) = trial.attempts.last() {
        let step = trial.step;
        findings
            .expect(step >= *start, id, || format!("is at step {step}, before its attempt's start {start}"));
    }
    let seen = trial.resume.as_ref().map(|(path, step)| (path.as_str(), *step));
    let kept = record.checkpoint.as_ref().map(|checkpoint| (checkpoint.resume.as_str(), checkpoint.step));
    findings.expect(seen == kept, id, || {
        format!("it shows the resume state {seen:?}, and goes on from {kept:?}")
    });
    let checkpoints = record.checkpoint.iter().chain(&record.best_checkpoint);
    let checkpoints = checkpoints.flat_map(|c| [(&c.adapter, c.step), (&c.resume, c.step)]);
    for (path, step) in checkpoints.chain(trial.adapter.iter().map(|path| (path, record.adapter_step))) {
        let own =
            path.starts_with(&format!("sweeps/{id}/")) && split_term(path).0.ends_with(&format!("-s{step}"));
        findings.expect(own, id, || format!("it points at `{path}` as its checkpoint of step {step}"));
    }
}
