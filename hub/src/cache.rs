//! The cache of Hugging Face's tools: a folder a repository, in it
//!
//! ```text
//! blobs/ETAG                    a file's bytes, under the name that the hub gives its content
//! refs/REVISION                 the commit that a branch or tag was at
//! snapshots/COMMIT/a/file.txt   -> ../../../blobs/ETAG
//! ```

use crate::error::{HubError, Result};
use crate::id::{Kind, RepoId, is_commit};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// A repository's folder in the cache.
#[derive(Debug, Clone)]
pub(crate) struct Folder {
    root: PathBuf,
}

impl Folder {
    pub(crate) fn new(cache: &Path, kind: Kind, id: &RepoId) -> Self {
        Self { root: cache.join(format!("{}--{}", kind.plural(), id.name().replace('/', "--"))) }
    }

    /// Where a file's bytes lie.
    pub(crate) fn blob(&self, etag: &str) -> PathBuf {
        self.root.join("blobs").join(etag)
    }

    /// A commit's files.
    pub(crate) fn snapshot(&self, commit: &str) -> PathBuf {
        self.root.join("snapshots").join(commit)
    }

    /// The commit that a revision was at when it was last asked for, or that it is itself.
    pub(crate) fn commit(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return self.snapshot(revision).is_dir().then(|| revision.to_string());
        }
        let commit = std::fs::read_to_string(self.root.join("refs").join(revision)).ok()?;
        Some(commit.trim().to_string()).filter(|commit| is_commit(commit))
    }

    /// Writes down which commit a revision is at.
    pub(crate) fn point(&self, revision: &str, commit: &str) -> Result<()> {
        if is_commit(revision) {
            return Ok(());
        }
        let path = self.root.join("refs").join(revision);
        make_parent(&path)?;
        let partial = beside(&path);
        std::fs::write(&partial, commit).map_err(HubError::io(&partial))?;
        std::fs::rename(&partial, &path).map_err(HubError::io(&path))
    }

    /// Makes a blob a file of a commit.
    pub(crate) fn link(&self, commit: &str, file: &str, etag: &str) -> Result<()> {
        let path = self.snapshot(commit).join(file);
        make_parent(&path)?;
        let up = "../".repeat(2 + file.matches('/').count());
        let target = format!("{up}blobs/{etag}");
        if std::fs::read_link(&path).is_ok_and(|found| found == Path::new(&target)) {
            return Ok(());
        }
        // Beside it and then in its place: a reader finds the one or the other.
        let partial = beside(&path);
        let _ = std::fs::remove_file(&partial);
        symlink(&target, &self.blob(etag), &partial).map_err(HubError::io(&partial))?;
        std::fs::rename(&partial, &path).map_err(HubError::io(&path))
    }
}

/// A name beside a file that no other writer uses.
fn beside(path: &Path) -> PathBuf {
    static WRITERS: AtomicU64 = AtomicU64::new(0);
    let name = path.file_name().unwrap_or_default().display();
    let number = WRITERS.fetch_add(1, Ordering::Relaxed);
    path.with_file_name(format!(".{name}.{}-{number}.partial", std::process::id()))
}

pub(crate) fn make_parent(path: &Path) -> Result<()> {
    let parent = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent).map_err(HubError::io(parent))
}

#[cfg(unix)]
fn symlink(target: &str, _: &Path, link: &Path) -> std::io::Result<()> {
    std::os::unix::fs::symlink(target, link)
}

/// Where links want a privilege, the file has two names.
#[cfg(not(unix))]
fn symlink(_: &str, blob: &Path, link: &Path) -> std::io::Result<()> {
    std::fs::hard_link(blob, link)
}

/// A snapshot's files by their names within it, in order.
///
/// # Errors
/// A folder cannot be read.
pub(crate) fn list(snapshot: &Path) -> Result<Vec<String>> {
    let mut files = Vec::new();
    let mut folders = vec![String::new()];
    while let Some(folder) = folders.pop() {
        let path = snapshot.join(&folder);
        for entry in std::fs::read_dir(&path).map_err(HubError::io(&path))? {
            let entry = entry.map_err(HubError::io(&path))?;
            let name = format!("{folder}{}", entry.file_name().to_string_lossy());
            let path = entry.path();
            if path.is_dir() {
                folders.push(name + "/");
            } else if path.is_file() {
                files.push(name);
            }
        }
    }
    files.sort();
    Ok(files)
}
