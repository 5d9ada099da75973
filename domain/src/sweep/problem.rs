//! What is wrong with a sweep document, said so that a person can mend it.

use serde_json::Value;
use std::fmt;

/// Something wrong with a sweep document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Where: keys and indices from the document's root, `parameters.lora_rank[1]`.
    pub path: String,
    /// What is wrong.
    pub problem: String,
    /// What to do.
    pub remedy: String,
}

impl Problem {
    /// A problem at `path`.
    pub fn new(path: impl Into<String>, problem: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { path: path.into(), problem: problem.into(), remedy: remedy.into() }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}; {}", self.path, self.problem, self.remedy)
    }
}

/// The problem of a key that nobody knows, with the nearest of those that are known.
pub(super) fn unknown_key(path: String, key: &str, known: &[&str]) -> Problem {
    Problem::new(path, "unknown key", did_you_mean(key, known))
}

/// `did you mean X?` if a known word is near, else all known words.
pub(super) fn did_you_mean(word: &str, known: &[&str]) -> String {
    let nearest = known.iter().map(|k| (strsim::jaro_winkler(word, k), k)).max_by(|a, b| a.0.total_cmp(&b.0));
    match nearest {
        Some((similarity, nearest)) if similarity > 0.8 => format!("did you mean {nearest}?"),
        _ => format!("known are {}", known.join(", ")),
    }
}

/// What a value is, in words, for "must be …, not …".
pub(super) fn describe(value: &Value) -> String {
    match value {
        Value::Null => "nothing".into(),
        Value::Array(items) if items.is_empty() => "an empty list".into(),
        Value::Array(_) => "a list".into(),
        Value::Object(_) => "a mapping".into(),
        scalar => scalar.to_string(),
    }
}

/// `parent.key`, or `key` at the root.
pub(super) fn join(parent: &str, key: &str) -> String {
    if parent.is_empty() { key.into() } else { format!("{parent}.{key}") }
}

/// Whether the document path `path` is `parent` or inside it.
pub fn is_within(path: &str, parent: &str) -> bool {
    path.strip_prefix(parent).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
}
