//! Whether a data directory is sound: everything in it is read and compared, nothing is changed.
//!
//! | file | holds |
//! |---|---|
//! | `mod.rs` | [`check`]: reads what lies there, and hands it to the checks; the [`Findings`] |
//! | `records.rs` | sweeps and trials, each by itself and against the others (pure) |
//! | `curves.rs` | trials against their metric points (pure) |
//! | `objects.rs` | checkpoints against their manifests and the records that point at them |
//! | `data.rs` | uploaded data against its hashes and the sweeps that name it |

mod curves;
mod data;
mod objects;
mod records;

use crate::error::Result;
use crate::history;
use records::Records;
use registry::{RegistryError, Snapshot};
use serde::Serialize;
use std::path::Path;

/// Something that a look at a data directory found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The file, record or trial.
    pub place: String,
    /// What is the matter with it, and what follows.
    pub what: String,
}

/// What was read, and what was found.
#[derive(Debug, Default, Serialize)]
pub struct Findings {
    /// How many of what was checked, in the order in which it was.
    pub checked: Vec<(&'static str, u64)>,
    /// What must not be: something was lost or changed.
    pub problems: Vec<Finding>,
    /// What may be: leavings of a process that was killed, things that nothing points at.
    pub notes: Vec<Finding>,
}

impl Findings {
    /// Counts something that was checked.
    pub fn checked(&mut self, what: &'static str, count: usize) {
        self.checked.push((what, count as u64));
    }

    /// Enters a problem.
    pub fn problem(&mut self, place: impl ToString, what: impl Into<String>) {
        self.problems.push(Finding { place: place.to_string(), what: what.into() });
    }

    /// Enters a note.
    pub fn note(&mut self, place: impl ToString, what: impl Into<String>) {
        self.notes.push(Finding { place: place.to_string(), what: what.into() });
    }

    /// Enters a problem unless something holds.
    fn expect(&mut self, holds: bool, place: impl ToString, what: impl FnOnce() -> String) {
        if !holds {
            self.problem(place, what());
        }
    }
}

/// Checks a coordinator's data directory. The caller holds its [`registry::DirectoryLock`].
///
/// # Errors
/// A file cannot be read, is another program's, or was written by a later version. Damage is a finding.
pub fn check(data_dir: &Path) -> Result<Findings> {
    let mut findings = Findings::default();
    let history_dir = data_dir.join("history");
    history::History::refuse_newer(&history_dir)?;
    let database = data_dir.join("coordinator.db");
    let snapshot = match Snapshot::read(&database) {
        Err(RegistryError::Storage(what)) => Snapshot { problems: vec![what], ..Snapshot::default() },
        snapshot => snapshot?,
    };
    for problem in &snapshot.problems {
        findings.problem(database.display(), problem);
    }
    let readable = snapshot.problems.is_empty();
    let records = Records::read(&snapshot.entries, &data_dir.join("artifacts"), &mut findings);
    records.check(&mut findings);
    match history::inspect(&history_dir) {
        Ok(inspection) => curves::check(&records, &inspection, &mut findings),
        Err(error) => {
            findings.problem(history_dir.display(), error.to_string());
            findings.note(history_dir.display(), "curves were not checked");
        }
    }
    objects::check(&data_dir.join("artifacts"), &records, readable, &mut findings)?;
    data::check(&data_dir.join("artifacts"), &records, readable, &mut findings);
    Ok(findings)
}
