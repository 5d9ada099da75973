//! Checkpoints against their manifests and the records that point at them.

use super::Findings;
use super::records::Records;
use crate::artifacts::{self, Inspected};
use crate::error::Result;
use std::collections::BTreeSet;
use std::path::Path;

/// `readable`: whether the records are all there, so that what none points at is garbage.
pub(super) fn check(root: &Path, records: &Records, readable: bool, findings: &mut Findings) -> Result<()> {
    let parts = artifacts::inspect(root)?;
    let (mut files, mut bytes) = (0, 0);
    let mut present = BTreeSet::new();
    let mut pointed_at = BTreeSet::new();
    for record in records.trials.values() {
        pointed_at.extend(record.paths());
    }
    pointed_at.extend(records.specs.values().map(|object| object.path.clone()));
    for part in &parts {
        match part {
            Inspected::Spec { path, bytes } => {
                if readable && !pointed_at.contains(path) {
                    let unused =
                        "no record points at it, a spec that was replaced or whose sweep was not recorded";
                    findings
                        .note(path, format!("{unused}: {bytes} bytes that are removed at the next start"));
                }
            }
            Inspected::Unfinished { path } => {
                findings
                    .note(path, "the rest of an upload that never finished; it is removed at the next start");
            }
            Inspected::Whole { path, files: of_part, bytes: length, problems } => {
                files += of_part;
                bytes += length;
                present.insert(path.clone());
                problems.iter().for_each(|problem| findings.problem(path, problem));
                if readable && !pointed_at.contains(path) {
                    let unused = "no record points at it, a checkpoint whose upload or deletion was cut off";
                    findings
                        .note(path, format!("{unused}: {length} bytes that are removed at the next start"));
                }
            }
        }
    }
    for record in records.trials.values() {
        for path in record.paths().difference(&present) {
            findings.problem(&record.trial.id, format!("it points at `{path}`, which is not there"));
        }
    }
    findings.checked("checkpoint parts", present.len());
    findings.checked("checkpoint files", files);
    findings.checked("checkpoint bytes", usize::try_from(bytes).unwrap_or(usize::MAX));
    Ok(())
}
