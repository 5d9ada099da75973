//! What a name in a configuration means: a path on this machine, or a repository of the hub.

use std::fmt;
use std::path::PathBuf;

/// What a repository holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A model.
    Model,
    /// Rows.
    Dataset,
}

impl Kind {
    /// The kind's folder names in the cache begin with it.
    pub(crate) fn plural(self) -> &'static str {
        match self {
            Self::Model => "models",
            Self::Dataset => "datasets",
        }
    }

    /// As messages call it.
    pub(crate) fn noun(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Dataset => "data set",
        }
    }
}

/// A repository at a revision: a branch, a tag or a commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RepoId {
    name: String,
    revision: Option<String>,
    part: Option<String>,
}

/// The revision where none is named.
const MAIN: &str = "main";

impl RepoId {
    /// Reads `organisation/name` or `name`, with `@revision` or without. `None` where it can be none.
    pub fn parse(text: &str) -> Option<Self> {
        let (name, revision) = match text.split_once('@') {
            Some((name, revision)) => (name, Some(revision)),
            None => (text, None),
        };
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        let sound = |part: &str| {
            let ends = |c: char| c == '-' || c == '.';
            !part.is_empty() && part.chars().all(plain) && !part.starts_with(ends) && !part.ends_with(ends)
        };
        let parts: Vec<_> = name.split('/').collect();
        let named = parts.len() <= 2
            && parts.iter().all(|part| sound(part))
            && name.len() <= 96
            && !name.contains("--")
            && !name.contains("..");
        // A revision becomes a path below `refs/`.
        let dated = revision.is_none_or(|revision| {
            revision.len() <= 200
                && revision.split('/').all(|part| !part.is_empty() && !part.starts_with('.'))
                && revision.chars().all(|c| plain(c) || "/+".contains(c))
        });
        (named && dated).then(|| Self { name: name.into(), revision: revision.map(Into::into), part: None })
    }

    /// One part of a data set that has several: a folder of its repository.
    #[must_use]
    pub fn part(self, folder: &str) -> Self {
        Self { part: Some(folder.into()), ..self }
    }

    /// The part that is meant, if not all.
    pub(crate) fn folder(&self) -> Option<&str> {
        self.part.as_deref()
    }

    /// Under which names the cache may know the commit that it is at, the surest first. A part has a name of its own: a
    /// revision under its plain name is whole.
    pub(crate) fn references(&self) -> Vec<String> {
        let whole = self.revision().to_owned();
        match self.part.as_ref().filter(|part| !part.contains(['/', '\\']) && !part.starts_with('.')) {
            Some(part) => vec![format!("parts/{part}/{whole}"), whole],
            None => vec![whole],
        }
    }

    /// Of its files those that are meant.
    pub(crate) fn meant(&self, mut files: Vec<String>) -> Vec<String> {
        if let Some(part) = &self.part {
            files.retain(|file| file.split_once('/').is_some_and(|(folder, _)| folder == part));
        }
        files
    }

    /// `organisation/name`, without the revision.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The revision: `main` unless one was named.
    pub fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or(MAIN)
    }

    /// The revision that was named.
    pub fn named_revision(&self) -> Option<&str> {
        self.revision.as_deref()
    }

    /// Whether the revision is a commit, which never changes.
    pub(crate) fn is_pinned(&self) -> bool {
        is_commit(self.revision())
    }
}

/// Whether a text is a commit's hash.
pub(crate) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

impl fmt::Display for RepoId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.revision {
            Some(revision) => write!(f, "{}@{revision}", self.name),
            None => f.write_str(&self.name),
        }
    }
}

/// What a name means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Located {
    /// A path on this machine, there or not.
    Path(PathBuf),
    /// A repository.
    Repo(RepoId),
}

/// Ends of files of rows: a name that ends so is a path, there or not.
const ROWS: [&str; 3] = [".jsonl", ".json", ".parquet"];

/// What a name means, by its words alone: nobody looks whether a path is there, so that a name means the same to who
/// allows it and on each machine that reads it.
pub fn locate(name: &str) -> Located {
    let is_rows = ROWS.iter().any(|end| name.to_ascii_lowercase().ends_with(end));
    match RepoId::parse(name) {
        Some(id) if !is_rows => Located::Repo(id),
        _ => Located::Path(name.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_revisions() {
        let commit = "0123456789abcdef0123456789abcdef01234567";
        let pinned = format!("a/b@{commit}");
        for (text, want) in [
            ("gpt2", Some(("gpt2", "main", false))),
            ("openlm-research/open_llama_7b", Some(("openlm-research/open_llama_7b", "main", false))),
            ("meta-llama/Llama-3.2-1B@v1.0", Some(("meta-llama/Llama-3.2-1B", "v1.0", false))),
            ("a/b@refs/pr/3", Some(("a/b", "refs/pr/3", false))),
            (pinned.as_str(), Some(("a/b", commit, true))),
            ("", None),
            ("/a/b", None),
            ("./a", None),
            ("../a", None),
            ("a/b/c", None),
            ("a/", None),
            ("a b/c", None),
            ("a--b/c", None),
            ("a/b..c", None),
            ("-a/b", None),
            ("a/b@", None),
            ("a/b@../../x", None),
            ("a/b@x/../y", None),
            ("a/b@x y", None),
            ("a/é", None),
        ] {
            let got = RepoId::parse(text);
            let got = got.as_ref().map(|id| (id.name(), id.revision(), id.is_pinned()));
            assert_eq!(got, want, "{text}");
            if got.is_some() {
                assert_eq!(RepoId::parse(text).unwrap().to_string(), text);
            }
        }
    }

    #[test]
    fn a_name_means_the_same_whatever_is_there() {
        assert!(std::path::Path::new("src").exists(), "beside the crate's manifest");
        for (name, is_repo) in [
            ("src", true),
            ("src/id.rs", true),
            ("not/there", true),
            ("./src", false),
            ("../hub", false),
            ("~/src", false),
            ("/src/lib.rs", false),
            ("src/a/b", false),
            ("not-there.jsonl", false),
            ("data/rows.Parquet", false),
        ] {
            let want = match is_repo {
                true => Located::Repo(RepoId::parse(name).unwrap()),
                false => Located::Path(name.into()),
            };
            assert_eq!(locate(name), want, "{name}");
        }
    }
}
