//! What can go wrong with the hub.

use std::path::{Path, PathBuf};

/// Errors of the hub. Each names the repository or file and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// There is no such repository, revision or file, or it does not hold what is needed.
    #[error("{repo}: {problem}; {remedy}")]
    Repo {
        /// The repository, and its revision if one was named.
        repo: String,
        /// What is wrong with it.
        problem: String,
        /// What to do.
        remedy: String,
    },
    /// The hub cannot be reached, or cannot answer now.
    #[error("{repo}: {problem}; {remedy}")]
    Unavailable {
        /// The repository, and its revision if one was named.
        repo: String,
        /// What happened.
        problem: String,
        /// What to do.
        remedy: String,
    },
    /// A file of the cache could not be read or written.
    #[error("{}: {source}{}", path.display(), full(source))]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The environment says something that cannot be used.
    #[error("{variable}: {problem}")]
    Setting {
        /// The variable.
        variable: &'static str,
        /// What is wrong with it, and what it may be.
        problem: String,
    },
}

/// The hub's result.
pub type Result<T> = std::result::Result<T, HubError>;

impl HubError {
    pub(crate) fn repo(repo: impl ToString, problem: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::Repo { repo: repo.to_string(), problem: problem.into(), remedy: remedy.into() }
    }

    pub(crate) fn unavailable(
        repo: impl ToString,
        problem: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self::Unavailable { repo: repo.to_string(), problem: problem.into(), remedy: remedy.into() }
    }

    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Self::Io { path: path.into(), source }
    }
}

fn full(source: &std::io::Error) -> &'static str {
    match source.kind() {
        std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
            "; make room, or name another place with HF_HUB_CACHE; what is downloaded already stays"
        }
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::ErrorKind;

    #[test]
    fn a_full_disk_says_what_to_do() {
        for (kind, full) in
            [(ErrorKind::StorageFull, true), (ErrorKind::QuotaExceeded, true), (ErrorKind::NotFound, false)]
        {
            let message = HubError::io(Path::new("/cache/blobs/x"))(kind.into()).to_string();
            assert!(message.starts_with("/cache/blobs/x: "), "{message}");
            assert_eq!(
                message.contains("make room, or name another place with HF_HUB_CACHE"),
                full,
                "{message}"
            );
        }
    }
}
