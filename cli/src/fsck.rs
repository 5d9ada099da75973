//! `lorafleet fsck`: whether a data directory is sound.

use crate::Failure;
use crate::output::{self, OutputArgs};
use coordinator::fsck::{self, Findings};
use registry::DirectoryLock;
use serde_json::json;
use std::path::{Path, PathBuf};

/// Checks a data directory that nobody uses: everything in it is read, nothing is changed or repaired.
///
/// Every record, metric point and checkpoint byte is read and compared with the others. Problems are what must not
/// be; notes are what a killed process may leave, and what becomes of it. What a fleet keeps in etcd and in an object store is
/// not read.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:
  lorafleet fsck ./lorafleet-data
  lorafleet fsck /data/lorafleet -o json

Exit codes: 0 sound, 1 problems were found, 2 usage, or the data directory is in use or of a newer version.")]
pub(crate) struct Args {
    /// The data directory.
    #[arg(value_name = "DATA_DIR")]
    data_dir: PathBuf,
    #[command(flatten)]
    output: OutputArgs,
}

/// Runs the verb.
pub(crate) fn run(args: Args) -> Result<(), Failure> {
    let dir = &args.data_dir;
    if !["coordinator.db", "history", "artifacts"].iter().any(|name| dir.join(name).exists()) {
        let what = "is no data directory of LoraFleet; name one that `run` or `up` was given as --data-dir";
        return Err(Failure::invalid(format!("{} {what}", dir.display())));
    }
    let _lock = DirectoryLock::acquire(dir).map_err(Failure::invalid)?;
    let mut findings = fsck::check(dir).map_err(Failure::invalid)?;
    check_agent(&dir.join("agent"), &mut findings)?;
    let sound = findings.problems.is_empty();
    let counts: serde_json::Map<_, _> =
        findings.checked.iter().map(|(what, count)| (what.replace(' ', "_"), json!(count))).collect();
    let document = json!({
        "data_dir": dir,
        "sound": sound,
        "checked": counts,
        "problems": findings.problems,
        "notes": findings.notes,
    });
    output::print(args.output.format, &document, || table(dir, &findings))?;
    match findings.problems.len() {
        0 => Ok(()),
        count => Err(Failure::failed(format!("{}: {count} problems found", dir.display()))),
    }
}

/// The embedded agent's part of a data directory.
fn check_agent(dir: &Path, findings: &mut Findings) -> Result<(), Failure> {
    let spool = dir.join("spool");
    let files = gpu_agent::spool::inspect(&spool)
        .map_err(|error| Failure::failed(format!("{}: {error}", spool.display())))?;
    findings.checked("agent spool files", files.len());
    for file in files {
        let place = file.path.display().to_string();
        for problem in &file.problems {
            findings.problem(&place, problem);
        }
        if file.torn > 0 {
            let what =
                "bytes of a write that was cut off; they go at the next start, and the trial repeats them";
            findings.note(&place, format!("{} {what}", file.torn));
        }
        if file.unacknowledged > 0 {
            findings.note(&place, format!("{} messages that are yet to be sent", file.unacknowledged));
        }
    }
    let work = dir.join("trials");
    let left = std::fs::read_dir(&work).map_or(0, Iterator::count);
    if left > 0 {
        let what = "work folders of trials; they are removed at the next start";
        findings.note(work.display(), format!("{left} {what}"));
    }
    Ok(())
}

fn table(dir: &Path, findings: &Findings) -> String {
    let counts: Vec<_> = findings.checked.iter().map(|(what, count)| format!("{count} {what}")).collect();
    let mut text = format!("checked {}: {}\n", dir.display(), counts.join(", "));
    for (kind, found) in [("problem", &findings.problems), ("note", &findings.notes)] {
        for finding in found {
            text += &format!("{kind}: {}: {}\n", finding.place, finding.what);
        }
    }
    let verdict = if findings.problems.is_empty() { "sound\n" } else { "not sound\n" };
    text + verdict
}
