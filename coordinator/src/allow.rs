//! What a submission may name: directories on the agents' machines, and models and data of the hub.
//!
//! An agent reads what a sweep names with its own rights. Where others submit, who runs the server says what that may be.

use crate::error::{CoordinatorError, Result};
use config::paths;
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

/// The word for everything.
const ALL: &str = "all";

impl Allow {
    /// What `--allow-path` and `--allow-hub` say. Where others can reach the server nothing may be named that they do not
    /// say, elsewhere everything.
    pub fn new(paths: &[String], hub: &[String], reachable: bool) -> Self {
        let said = |values: &[String]| match values {
            [] if !reachable => None,
            values if values.iter().any(|value| value == ALL) => None,
            values => Some(values.to_vec()),
        };
        let paths = said(paths).map(|paths| paths.into_iter().map(PathBuf::from).collect());
        Self { paths, hub: said(hub) }
    }

    /// Refuses a sweep's document that names something else.
    pub fn check(&self, document: &Map<String, Value>) -> Result<()> {
        let problem = |(at, name): (String, String)| Some((format!("spec.{at}"), self.problem(&name)?));
        let fields: Vec<_> = paths::named(document).into_iter().filter_map(problem).collect();
        match fields.is_empty() {
            true => Ok(()),
            false => Err(CoordinatorError::Invalid { fields }),
        }
    }

    fn problem(&self, name: &str) -> Option<String> {
        // An agent takes what lies in its own working directory for a path, whatever it looks like.
        match paths::is_local(name) {
            true => {
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
            false => {
                let allowed = self.hub.as_ref()?;
                let id = name.split_once('@').map_or(name, |(id, _)| id);
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
    let plain = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    path.is_absolute() && plain && path.starts_with(dir)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_may_be_named() {
        let some = |values: &[&str]| values.iter().map(ToString::to_string).collect::<Vec<_>>();
        let narrow = Allow::new(&some(&["/data/models", "/sets"]), &some(&["openlm-research/", "a/b"]), true);
        let nothing = Allow::new(&[], &[], true);
        let everything = Allow::new(&some(&["all"]), &some(&["all"]), true);
        assert_eq!(Allow::new(&[], &[], false), Allow::default());
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
}
