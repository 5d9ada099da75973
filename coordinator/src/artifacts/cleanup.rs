//! What an upload that never finished left in a local directory. It counts for nothing; it only takes space.

use super::{MANIFEST, names};
use std::fs::DirEntry;
use std::io;
use std::path::Path;

/// Removes parts without a manifest, and files that the store had begun beside finished ones. What cannot be
/// removed is logged and stays.
pub(super) fn remove_unfinished(root: &Path) {
    let sweeps = entries(&root.join("sweeps"));
    for trial in sweeps.iter().flat_map(|sweep| entries(&sweep.path())) {
        let parts = entries(&trial.path());
        for part in parts.iter().filter(|part| part.file_name().to_str().is_some_and(names::is_part)) {
            remove_unfinished_of(&part.path());
        }
    }
}

fn remove_unfinished_of(part: &Path) {
    if !part.join(MANIFEST).exists() {
        return removed(part, std::fs::remove_dir_all(part));
    }
    // The store writes to `<name>#<number>` and renames; our own names have no `#`.
    for entry in entries(part).iter().filter(|entry| entry.file_name().to_string_lossy().contains('#')) {
        removed(&entry.path(), std::fs::remove_file(entry.path()));
    }
}

fn entries(dir: &Path) -> Vec<DirEntry> {
    std::fs::read_dir(dir).map(|entries| entries.flatten().collect()).unwrap_or_default()
}

fn removed(path: &Path, outcome: io::Result<()>) {
    match outcome {
        Ok(()) => tracing::info!(path = %path.display(), "removed what an unfinished upload had left"),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "cannot remove what an unfinished upload left")
        }
    }
}
