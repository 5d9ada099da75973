//! What a submission may name: directories on the agents' machines, and models and data of the hub.
//!
//! An agent reads what a sweep names with its own rights. Where others submit, who runs the server says what that may be.
//! What was uploaded is always allowed: it is the submitters' own.

use crate::error::{CoordinatorError, Result};
use config::paths::{self, Named, Place};
use domain::data::Reference;
use serde_json::{Map, Value};
use std::path::{Component, Path, PathBuf};

/// What may be named. By default everything.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Allow {
    /// Directories below which a path may lie; `None`: anywhere.
    pub paths: Option<Vec<PathBuf>>,
    /// Names on the hub, or organisations with a slash at the end; `None`: any.
    pub hub: Option<Vec<String>>,
}

/// What `--allow-path` or `--allow-hub` says that no sweep can name.
#[derive(Debug, thiserror::Error)]
pub enum AllowError {
    /// Sweeps name absolute paths.
    #[error("--allow-path {0:?}: must be an absolute path without `..`, or all")]
    Path(String),
    /// It is neither an organisation's nor one thing of it.
    #[error(
        "--allow-hub {0:?}: must be ORG/NAME or NAME without a revision, or ORG/ with its slash for all of an organisation, or all"
    )]
    Hub(String),
}

/// The word for everything.
const ALL: &str = "all";

impl Allow {
    /// What `--allow-path` and `--allow-hub` say. Where others can reach the server nothing may be named that they do not
    /// say, elsewhere everything.
    ///
    /// # Errors
    /// One of them could never be what a sweep names.
    pub fn new(paths: &[String], hub: &[String], reachable: bool) -> std::result::Result<Self, AllowError> {
        let said = |values: &[String]| match values {
            [] if !reachable => None,
            values if values.iter().any(|value| value == ALL) => None,
            values => Some(values.to_vec()),
        };
        let paths = said(paths).map(|paths| paths.into_iter().map(PathBuf::from).collect::<Vec<_>>());
        if let Some(wrong) = paths.iter().flatten().find(|path| !is_plain(path)) {
            return Err(AllowError::Path(wrong.display().to_string()));
        }
        let hub = said(hub);
        match hub.iter().flatten().find(|name| !is_of_hub(name)) {
            Some(wrong) => Err(AllowError::Hub(wrong.clone())),
            None => Ok(Self { paths, hub }),
        }
    }

    /// Refuses a sweep's document that names something else.
    pub fn check(&self, document: &Map<String, Value>) -> Result<()> {
        let problem = |named: Named| Some((format!("spec.{}", named.at), self.problem(&named)?));
        let fields: Vec<_> = paths::named(document).into_iter().filter_map(problem).collect();
        match fields.is_empty() {
            true => Ok(()),
            false => Err(CoordinatorError::Invalid { fields }),
        }
    }

    fn problem(&self, Named { name, place, .. }: &Named) -> Option<String> {
        match place {
            Place::Uploaded => name.parse::<Reference>().err().map(|error| error.to_string()),
            Place::Path => {
                let allowed = self.paths.as_ref()?;
                let problem = || {
                    format!(
                        "{name} is not below a directory that this server allows ({}); use one of them, or ask who runs \
                         the server for --allow-path",
                        list(allowed.iter().map(|path| path.display().to_string()))
                    )
                };
                (!allowed.iter().any(|prefix| below(Path::new(name), prefix))).then(problem)
            }
            Place::Hub => {
                let allowed = self.hub.as_ref()?;
                let id = name.split_once('@').map_or(name.as_str(), |(id, _)| id);
                let fits = |allowed: &String| match allowed.ends_with('/') {
                    true => id.starts_with(allowed.as_str()),
                    false => id == allowed,
                };
                let problem = || {
                    format!(
                        "{name} is nothing of the hub that this server allows ({}); use one of these, or ask who runs the \
                         server for --allow-hub",
                        list(allowed.iter().cloned())
                    )
                };
                (!allowed.iter().any(fits)).then(problem)
            }
        }
    }
}

fn list(names: impl Iterator<Item = String>) -> String {
    let names: Vec<_> = names.collect();
    if names.is_empty() { "none".into() } else { names.join(", ") }
}

/// Whether a path lies in a directory, by its words: what links there lead to, only the agent's machine knows.
fn below(path: &Path, dir: &Path) -> bool {
    is_plain(path) && path.starts_with(dir)
}

/// Whether a path is absolute and never goes back up.
fn is_plain(path: &Path) -> bool {
    let plain = |part| matches!(part, Component::RootDir | Component::Normal(_));
    path.is_absolute() && path.components().all(plain)
}

/// Whether a text is `ORG/`, `ORG/NAME`, or `NAME` of no organisation.
fn is_of_hub(text: &str) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let part = |part: &str| part.chars().all(plain) && part != "." && part != "..";
    let (first, name) = text.split_once('/').unwrap_or((text, ""));
    !first.is_empty() && part(first) && part(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_may_be_named() {
        let some = |values: &[&str]| values.iter().map(ToString::to_string).collect::<Vec<_>>();
        let narrow =
            Allow::new(&some(&["/data/models", "/sets"]), &some(&["openlm-research/", "a/b"]), true).unwrap();
        let nothing = Allow::new(&[], &[], true).unwrap();
        let everything = Allow::new(&some(&["all"]), &some(&["all"]), true).unwrap();
        assert_eq!(Allow::new(&[], &[], false).unwrap(), Allow::default());
        assert_eq!(everything, Allow::default());
        for (name, allowed) in [
            ("/data/models", true),
            ("/data/models/7b", true),
            ("/data/models/7b/", true),
            ("/data/models-of-others", false),
            ("/data/models/../secret", false),
            ("/data/models/./7b/../../../etc/passwd", false),
            ("/etc/passwd", false),
            ("/sets/rows.jsonl", true),
            ("./rows.jsonl", false),
            ("../sets/rows.jsonl", false),
            ("~/rows", false),
            ("rows.jsonl", false),
            ("openlm-research/open_llama_7b", true),
            ("openlm-research/open_llama_7b@main", true),
            ("openlm-research-evil/x", false),
            ("openlm-research/../x", false),
            ("a/b", true),
            ("a/b@refs/pr/1", true),
            ("a/bc", false),
            ("gpt2", false),
            ("openlm-research/rows.JSONL", false),
        ] {
            let document = json!({ "pretrained_model_id": name });
            let document = document.as_object().unwrap();
            assert_eq!(narrow.check(document).is_ok(), allowed, "{name}");
            assert!(nothing.check(document).is_err() && everything.check(document).is_ok(), "{name}");
        }
        let searched = json!({
            "pretrained_model_id": "a/b",
            "parameters": { "dataset_name": ["/sets/a.jsonl", "/etc/shadow"], "init_adapter": {
                "when": { "lora_rank": 2 }, "choices": ["/root/x"], "otherwise": "/sets/y",
            } },
        });
        let error = narrow.check(searched.as_object().unwrap()).unwrap_err().to_string();
        let fields: Vec<_> = error.lines().map(|line| line.split_once(": ").unwrap().0).collect();
        assert_eq!(
            fields,
            ["spec.parameters.dataset_name[1]", "spec.parameters.init_adapter.choices[0]"],
            "{error}"
        );
    }

    /// An adapter is never taken from the hub, whatever its name looks like.
    #[test]
    fn an_adapter_is_a_path() {
        let hub = ["a/".to_string()];
        let allow = Allow::new(&["/sets".to_string()], &hub, true).unwrap();
        for (name, allowed) in [("a/b", false), ("b", false), ("/sets/b", true)] {
            let document = json!({ "pretrained_model_id": "a/b", "init_adapter": name });
            assert_eq!(allow.check(document.as_object().unwrap()).is_ok(), allowed, "{name}");
        }
    }

    #[test]
    fn what_was_uploaded_is_allowed_everywhere() {
        let hash = "0".repeat(64);
        for (name, problem) in [
            (format!("blob:sha256:{hash}/rows.jsonl"), None),
            (format!("blob:sha256:{hash}/base/"), None),
            (format!("blob:sha256:{hash}/../../etc/passwd"), Some("names no uploaded data")),
            ("blob:/etc/passwd".into(), Some("names no uploaded data")),
            ("blob:".into(), Some("names no uploaded data")),
        ] {
            let document =
                json!({ "pretrained_model_id": "a/b", "dataset_name": name, "init_adapter": name });
            for allow in [Allow::new(&[], &["a/".into()], true).unwrap(), Allow::default()] {
                let said = allow.check(document.as_object().unwrap()).err().map(|error| error.to_string());
                let fits = said.as_ref().map(|said| problem.is_some_and(|problem| said.contains(problem)));
                assert_eq!(fits, problem.map(|_| true), "{name}: {said:?}");
            }
        }
    }

    #[test]
    fn what_nothing_can_be_is_refused_at_the_start() {
        let absolute = "must be an absolute path without `..`";
        for path in ["data", "./data", "../data", "/data/../x", "", "~/data"] {
            let error = Allow::new(&[path.into()], &[], false).unwrap_err().to_string();
            assert!(error.contains("--allow-path") && error.contains(absolute), "{path}: {error}");
        }
        for name in ["..", "/", "/x", "org/x/y", "org/x@main", "org/..", "a b/", ""] {
            let error = Allow::new(&[], &[name.into()], true).unwrap_err().to_string();
            assert!(
                error.contains("--allow-hub") && error.contains("ORG/ with its slash"),
                "{name}: {error}"
            );
        }
        for (path, name) in
            [("/", "org/"), ("/data/", "org/x"), ("/data", "gpt2"), ("/a/./b", "o.r-g/x_1"), ("all", "all")]
        {
            assert!(Allow::new(&[path.into()], &[name.into()], true).is_ok(), "{path} {name}");
        }
    }
}
