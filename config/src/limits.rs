//! How much the sweeps and uploads of a namespace may take: the file of `--limits`.
//!
//! ```yaml
//! default: { max_concurrent_trials: 8, max_gpus: 4, max_upload_bytes: 500GB }
//! team-a: { max_gpus: 16 }
//! ```
//!
//! What is not said is not limited, and so is a namespace that is not there.

use crate::{size, tokens, yaml};
use serde::{Deserialize, Deserializer};
use std::collections::BTreeMap;

/// What a namespace may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limit {
    /// Trials that may hold a device at a time.
    #[serde(default)]
    pub max_concurrent_trials: Option<u32>,
    /// GPUs on which they may be at a time; those that share one use it once.
    #[serde(default)]
    pub max_gpus: Option<u32>,
    /// Bytes of uploaded data that are stored for it.
    #[serde(default, deserialize_with = "bytes")]
    pub max_upload_bytes: Option<u64>,
}

/// The limits of namespaces.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Limits(BTreeMap<String, Limit>);

impl Limits {
    /// Reads the file's text.
    ///
    /// # Errors
    /// Where it does not say what it should, and what to do.
    pub fn parse(text: &str) -> Result<Self, String> {
        let parsed = yaml::parse(text).map_err(|(at, why)| format!("line {}: {why}", at.line))?;
        if let Some(problem) = parsed.problems.first() {
            return Err(problem.to_string());
        }
        let serde_json::Value::Object(entries) = parsed.value else {
            return Err("must name namespaces, each with its limits, as in `default: { max_gpus: 4 }`".into());
        };
        let mut limits = BTreeMap::new();
        for (namespace, limit) in entries {
            let line = parsed.positions.get(&namespace).map_or(0, |at| at.line);
            let at = |why: String| format!("line {line}: {namespace}: {why}");
            tokens::check_name(&namespace).map_err(at)?;
            let limit = serde_json::from_value(limit).map_err(|error| at(error.to_string()))?;
            limits.insert(namespace, limit);
        }
        Ok(Self(limits))
    }

    /// What a namespace may take.
    pub fn of(&self, namespace: &str) -> Limit {
        self.0.get(namespace).copied().unwrap_or_default()
    }

    /// Every namespace that has limits.
    pub fn iter(&self) -> impl Iterator<Item = (&str, Limit)> {
        self.0.iter().map(|(namespace, limit)| (namespace.as_str(), *limit))
    }
}

/// A number of bytes, or a text that says one.
fn bytes<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Bytes {
        Number(u64),
        Text(String),
    }
    Ok(match Option::<Bytes>::deserialize(from)? {
        None => None,
        Some(Bytes::Number(bytes)) => Some(bytes),
        Some(Bytes::Text(text)) => Some(size::parse(&text).map_err(serde::de::Error::custom)?),
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn what_a_namespace_may_take() {
        let text = "default: { max_concurrent_trials: 8, max_gpus: 4, max_upload_bytes: 1.5GB }\nteam-a:\n  max_gpus: 0\n";
        let limits = Limits::parse(text).unwrap();
        let all = Limit {
            max_concurrent_trials: Some(8),
            max_gpus: Some(4),
            max_upload_bytes: Some(1_500_000_000),
        };
        assert_eq!(limits.of("default"), all);
        assert_eq!(limits.of("team-a"), Limit { max_gpus: Some(0), ..Limit::default() });
        assert_eq!(limits.of("nobody"), Limit::default());
        assert_eq!(limits.iter().map(|(namespace, _)| namespace).collect::<Vec<_>>(), ["default", "team-a"]);
        let number = Limits::parse("a: { max_upload_bytes: 7 }").unwrap();
        assert_eq!(number.of("a").max_upload_bytes, Some(7));
    }

    #[test]
    fn files_that_say_something_else_are_refused() {
        for (text, want) in [
            ("- a", "must name namespaces"),
            ("", "must name namespaces"),
            ("a: { max_gpu: 1 }", "line 1: a: unknown field `max_gpu`"),
            ("a: { max_gpus: -1 }", "line 1: a: "),
            ("a b: { max_gpus: 1 }", "is no name"),
            ("\na: { max_upload_bytes: much }", "line 2: a: "),
        ] {
            let found = Limits::parse(text).unwrap_err();
            assert!(found.contains(want), "{text:?}: {found}");
        }
    }
}
