//! What an upload that never finished left in a local directory. It counts for nothing; it only takes space.

use super::{MANIFEST, names};
use std::fs::DirEntry;
use std::io;
use std::path::{Path, PathBuf};

/// Removes parts without a manifest, and files that the store had begun beside finished ones and as specs. What cannot be
/// removed is logged and stays.
pub(super) fn remove_unfinished(root: &Path) {
    for sweep in entries(&root.join("sweeps")) {
        for entry in entries(&sweep.path()).iter().filter(|entry| in_progress(entry)) {
            removed(&entry.path(), std::fs::remove_file(entry.path()));
        }
    }
    for part in parts(root) {
        if !part.join(MANIFEST).exists() {
            removed(&part, std::fs::remove_dir_all(&part));
            continue;
        }
        for entry in entries(&part).iter().filter(|entry| in_progress(entry)) {
            removed(&entry.path(), std::fs::remove_file(entry.path()));
        }
    }
}

/// The folders of a local store that are named as parts, in the order of their paths.
pub(super) fn parts(root: &Path) -> Vec<PathBuf> {
    let sweeps = entries(&root.join("sweeps"));
    let trials = sweeps.iter().flat_map(|sweep| entries(&sweep.path()));
    let parts = trials.flat_map(|trial| entries(&trial.path()));
    let named = parts.filter(|part| part.file_name().to_str().is_some_and(names::is_part));
    let mut parts: Vec<_> = named.map(|part| part.path()).collect();
    parts.sort_unstable();
    parts
}

/// Whether the store had begun a file: it writes to `<name>#<number>` and renames; our own names have no `#`.
pub(super) fn in_progress(entry: &DirEntry) -> bool {
    entry.file_name().to_string_lossy().contains('#')
}

/// What is in a folder, in the order of the names.
pub(super) fn entries(dir: &Path) -> Vec<DirEntry> {
    let mut entries: Vec<_> =
        std::fs::read_dir(dir).map(|entries| entries.flatten().collect()).unwrap_or_default();
    entries.sort_unstable_by_key(DirEntry::file_name);
    entries
}

fn removed(path: &Path, outcome: io::Result<()>) {
    match outcome {
        Ok(()) => tracing::info!(path = %path.display(), "removed what an unfinished upload had left"),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "cannot remove what an unfinished upload left")
        }
    }
}
