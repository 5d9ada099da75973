//! Which values are local paths, and what they resolve to.
//!
//! A value of a path parameter is local if it begins with `/`, `./`, `../` or `~`, ends as a data file does, or
//! exists beside the file; else it is an id of the Hugging Face hub (`name` or `organisation/name`, with `@revision` or without) and stays.

use domain::sweep::Problem;
use serde_json::{Map, Value};
use std::path::{Component, Path, PathBuf};

/// What an adapter must be on disk.
const ADAPTER: &str = "an adapter's directory";

/// Parameters that name a model, an adapter or rows, and what each must be on disk.
const PATH_PARAMETERS: &[(&str, &str)] = &[
    ("pretrained_model_id", "a model's directory"),
    ("dataset_name", "a .jsonl, .json or .parquet file or a directory of them"),
    ("interleave_datasets", "a .jsonl, .json or .parquet file or a directory of them"),
    ("eval_dataset_name", "a .jsonl, .json or .parquet file or a directory of them"),
    ("init_adapter", ADAPTER),
];

/// What to do about a local path that does not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Missing {
    Report,
    Ignore,
}

/// Makes every local path in the document absolute; `base` says against which folder a document path's values
/// resolve.
pub(crate) fn resolve(
    document: &mut Map<String, Value>,
    base: &dyn Fn(&str) -> PathBuf,
    missing: Missing,
) -> Vec<Problem> {
    let mut resolver = Resolver { base, missing, problems: Vec::new() };
    each(document, &mut |path, text, what| resolver.text(path, text, what));
    resolver.problems
}

/// A path or an id of the hub that a sweep's document names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    /// Where it stands.
    pub at: String,
    /// The name.
    pub name: String,
    /// Whether it is a path: an adapter is one whatever it looks like, as none is taken from the hub.
    pub is_path: bool,
}

/// Every path and hub id that a sweep's document names.
pub fn named(document: &Map<String, Value>) -> Vec<Named> {
    let mut named = Vec::new();
    each(&mut document.clone(), &mut |at, name, what| {
        let is_path = is_local(name) || what == ADAPTER;
        named.push(Named { at: at.into(), name: name.clone(), is_path });
    });
    named
}

/// A name that a person gives in the working directory, as it is understood everywhere: a path that is there, or can be
/// nothing else, is made absolute.
pub fn absolute(name: &str) -> String {
    let mut name = name.to_string();
    let base = |_: &str| PathBuf::new();
    Resolver { base: &base, missing: Missing::Ignore, problems: Vec::new() }.text("", &mut name, "");
    name
}

/// What is done with a name: where it stands, the name, and what it must be on disk.
type Visit<'a> = dyn FnMut(&str, &mut String, &'static str) + 'a;

fn each(document: &mut Map<String, Value>, visit: &mut Visit<'_>) {
    for (name, what) in PATH_PARAMETERS {
        if let Some(value) = document.get_mut(*name) {
            each_of(name, value, what, visit);
        }
        let path = format!("parameters.{name}");
        match document.get_mut("parameters") {
            Some(Value::Object(object)) => {
                object.get_mut(*name).into_iter().for_each(|v| each_of(&path, v, what, visit));
            }
            Some(Value::Array(items)) => {
                let found = items.iter_mut().filter_map(|item| item.as_object_mut()?.get_mut(*name));
                found.for_each(|v| each_of(&path, v, what, visit));
            }
            _ => {}
        }
    }
}

fn each_of(path: &str, value: &mut Value, what: &'static str, visit: &mut Visit<'_>) {
    match value {
        Value::String(text) => visit(path, text, what),
        Value::Array(items) => {
            let items = items.iter_mut().enumerate();
            items.for_each(|(i, v)| each_of(&format!("{path}[{i}]"), v, what, visit));
        }
        Value::Object(object) => {
            for (key, value) in object.iter_mut().filter(|(key, _)| *key != "when") {
                each_of(&format!("{path}.{key}"), value, what, visit);
            }
        }
        _ => {}
    }
}

struct Resolver<'a> {
    base: &'a dyn Fn(&str) -> PathBuf,
    missing: Missing,
    problems: Vec<Problem>,
}

impl Resolver<'_> {
    fn text(&mut self, path: &str, text: &mut String, what: &str) {
        let base = (self.base)(path);
        let full = base.join(home(text).unwrap_or_else(|| PathBuf::from(&*text)));
        let exists = !text.is_empty() && full.exists();
        if !exists && !is_local(text) {
            return;
        }
        let full = tidy(&full);
        if !exists && self.missing == Missing::Report {
            let problem = format!("{text} is not there (looked for {})", full.display());
            let remedy = format!("name {what}; a relative path is taken from {}", tidy(&base).display());
            self.problems.push(Problem::new(path, problem, remedy));
        }
        *text = full.to_string_lossy().into_owned();
    }
}

/// Whether a value that does not exist must have been meant as a local path.
pub fn is_local(text: &str) -> bool {
    let begins = ["/", "./", "../", "~"].iter().any(|prefix| text.starts_with(prefix));
    let lower = text.to_ascii_lowercase();
    let is_file = [".jsonl", ".json", ".parquet"].iter().any(|suffix| lower.ends_with(suffix));
    // A revision may have slashes of its own (`refs/pr/1`).
    let name = text.split_once('@').map_or(text, |(name, _)| name);
    begins || is_file || text == "." || text == ".." || name.matches('/').count() > 1
}

/// `~` and `~/…` in the home directory.
fn home(text: &str) -> Option<PathBuf> {
    let rest = text.strip_prefix('~')?;
    let home = PathBuf::from(std::env::var_os("HOME")?);
    match rest.strip_prefix('/') {
        Some(rest) => Some(home.join(rest)),
        None => rest.is_empty().then_some(home),
    }
}

/// Absolute, without `.` and `..`. Links are followed in the folders alone: a file keeps the name it was given,
/// by whose end its format is known.
fn tidy(path: &Path) -> PathBuf {
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    if let (Some(parent), Some(Component::Normal(name))) = (path.parent(), path.components().next_back())
        && let Ok(parent) = parent.canonicalize()
    {
        return parent.join(name);
    }
    path.canonicalize().unwrap_or(path)
}
