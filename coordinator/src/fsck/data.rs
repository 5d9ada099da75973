//! Uploaded data against its hashes and the sweeps that name it.

use super::Findings;
use super::records::Records;
use crate::blobs::{self, Inspected};
use std::collections::BTreeSet;
use std::path::Path;

/// `readable`: whether the records are all there, so that what none names is garbage.
pub(super) fn check(root: &Path, records: &Records, readable: bool, findings: &mut Findings) {
    let Inspected { trees, files, unfinished, problems } = match blobs::inspect(root) {
        Ok(inspected) => inspected,
        Err(error) => return findings.problem(root.display(), format!("uploaded data: {error}")),
    };
    problems.iter().for_each(|(path, problem)| findings.problem(path, problem));
    for path in unfinished {
        let rest = "the rest of an upload that never finished; the same upload goes on with it";
        findings.note(path, format!("{rest}, or a start removes it once it is a day old"));
    }
    let mut named = BTreeSet::new();
    for (id, record) in &records.sweeps {
        for tree in record.trees() {
            findings.expect(trees.contains_key(&tree), id, || {
                format!("it names the uploaded data {tree}, which is not there")
            });
            named.insert(tree);
        }
    }
    for (id, tree) in &trees {
        let lost = tree.files().iter().filter(|file| files.get(&file.sha256) != Some(&file.bytes));
        for file in lost {
            findings.problem(id, format!("its file {:?} ({}) is not there", file.name, file.sha256));
        }
        if readable && !named.contains(id) {
            let bytes = tree.bytes();
            let unused = "uploaded data that no sweep names";
            findings
                .note(id, format!("{unused}: {bytes} bytes that a start removes once they are a day old"));
        }
    }
    findings.checked("uploaded files", files.len());
    findings.checked("uploaded bytes", usize::try_from(files.values().sum::<u64>()).unwrap_or(usize::MAX));
}
