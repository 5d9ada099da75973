//! Which values are local paths, and what they resolve to.
//!
//! A value of a path parameter is uploaded data if it begins with `blob:`, and stays. It is local if it begins with `/`,
//! `./`, `../` or `~`, ends as a data file does, or exists beside the file; else it is an id of the Hugging Face hub
//! (`name` or `organisation/name`, with `@revision` or without) and stays.

use domain::data::Reference;
use domain::sweep::Problem;
use serde_json::{Map, Value};
use std::path::{Component, Path, PathBuf};

/// What a name names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    /// A base model.
    Model,
    /// Rows.
    Rows,
    /// An adapter.
    Adapter,
    /// What a task asks, or shows before.
    Documents,
}

impl What {
    /// Whether it is never one of the hub.
    fn is_always_local(self) -> bool {
        matches!(self, Self::Adapter | Self::Documents)
    }

    /// What it must be on disk.
    fn on_disk(self) -> &'static str {
        match self {
            Self::Model => "a model's directory",
            Self::Rows => "a .jsonl, .json or .parquet file or a directory of them",
            Self::Adapter => "an adapter's directory",
            Self::Documents => {
                "a .jsonl, .json, .parquet or .txt file or a directory of files called after splits"
            }
        }
    }
}

/// Parameters that name a model, an adapter or rows.
const PATH_PARAMETERS: &[(&str, What)] = &[
    ("pretrained_model_id", What::Model),
    ("dataset_name", What::Rows),
    ("interleave_datasets", What::Rows),
    ("eval_dataset_name", What::Rows),
    ("init_adapter", What::Adapter),
];

/// Mappings in the section `evaluations` that name where tasks' documents lie.
const PLACES_OF_DOCUMENTS: &[&str] = &["task_data", "fewshot_data"];

/// What to do about a local path that does not exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Missing {
    Report,
    /// An absolute one may lie on other machines.
    ReportRelative,
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

/// Where a name leads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// To a path; an adapter's and a task's documents' always does, as none of these is taken from the hub by its name.
    Path,
    /// To the hub.
    Hub,
    /// To uploaded data; the reference may be a wrong one.
    Uploaded,
}

/// A model, an adapter or rows that a sweep's document names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Named {
    /// Where it stands.
    pub at: String,
    /// The name.
    pub name: String,
    /// What it is.
    pub what: What,
    /// Where it leads.
    pub place: Place,
}

/// Every model, adapter and set of rows that a sweep's document names.
pub fn named(document: &Map<String, Value>) -> Vec<Named> {
    let mut named = Vec::new();
    each(&mut document.clone(), &mut |at, name, what| {
        let place = match () {
            () if Reference::is_meant(name) => Place::Uploaded,
            () if is_local(name) || what.is_always_local() => Place::Path,
            () => Place::Hub,
        };
        named.push(Named { at: at.into(), name: name.clone(), what, place });
    });
    named
}

/// Gives what a sweep's document names other names, where `new` knows one.
pub fn rename(document: &mut Map<String, Value>, new: &dyn Fn(&str) -> Option<String>) {
    each(document, &mut |_, name, _| *name = new(name).unwrap_or_else(|| std::mem::take(name)));
}

/// Whether a `when` or a constraint of a sweep's document compares something with that name.
pub fn is_compared(document: &Map<String, Value>, name: &str) -> bool {
    fn in_when(value: &Value, name: &str) -> bool {
        let is_it = |value: &Value| match value {
            Value::Array(values) => values.iter().any(|value| value == name),
            value => value == name,
        };
        match value {
            Value::Object(object) => object.iter().any(|(key, value)| match (key.as_str(), value) {
                ("when", Value::Object(conditions)) => conditions.values().any(is_it),
                (_, value) => in_when(value, name),
            }),
            Value::Array(values) => values.iter().any(|value| in_when(value, name)),
            _ => false,
        }
    }
    let constraints = document.get("constraints").and_then(Value::as_array);
    let constraints = constraints.into_iter().flatten().filter_map(Value::as_str);
    constraints.into_iter().any(|text| text.contains(name))
        || document.values().any(|value| in_when(value, name))
}

/// A name that a person gives in the working directory, as it is understood everywhere: a path that is there, or can be
/// nothing else, is made absolute.
pub fn absolute(name: &str) -> String {
    let mut name = name.to_string();
    let base = |_: &str| PathBuf::new();
    Resolver { base: &base, missing: Missing::Ignore, problems: Vec::new() }.text("", &mut name, What::Model);
    name
}

/// What is done with a name: where it stands, the name, and what it names.
type Visit<'a> = dyn FnMut(&str, &mut String, What) + 'a;

fn each(document: &mut Map<String, Value>, visit: &mut Visit<'_>) {
    for (name, what) in PATH_PARAMETERS {
        if let Some(value) = document.get_mut(*name) {
            each_of(name, value, *what, visit);
        }
        let path = format!("parameters.{name}");
        match document.get_mut("parameters") {
            Some(Value::Object(object)) => {
                object.get_mut(*name).into_iter().for_each(|v| each_of(&path, v, *what, visit));
            }
            Some(Value::Array(items)) => {
                let found = items.iter_mut().filter_map(|item| item.as_object_mut()?.get_mut(*name));
                found.for_each(|v| each_of(&path, v, *what, visit));
            }
            _ => {}
        }
    }
    if let Some(Value::Object(asked)) = document.get_mut("evaluations") {
        for key in PLACES_OF_DOCUMENTS {
            if let Some(places) = asked.get_mut(*key) {
                each_of(&format!("evaluations.{key}"), places, What::Documents, visit);
            }
        }
    }
}

fn each_of(path: &str, value: &mut Value, what: What, visit: &mut Visit<'_>) {
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
    fn text(&mut self, path: &str, text: &mut String, what: What) {
        if Reference::is_meant(text) {
            return;
        }
        let base = (self.base)(path);
        let full = base.join(home(text).unwrap_or_else(|| PathBuf::from(&*text)));
        let exists = !text.is_empty() && full.exists();
        if !exists && !is_local(text) && what != What::Documents {
            return;
        }
        let full = tidy(&full);
        let may_be_elsewhere = match self.missing {
            Missing::Report => false,
            Missing::ReportRelative => text.starts_with('/'),
            Missing::Ignore => true,
        };
        if !exists && !may_be_elsewhere {
            let problem = format!("{text} is not there (looked for {})", full.display());
            let remedy =
                format!("name {}; a relative path is taken from {}", what.on_disk(), tidy(&base).display());
            self.problems.push(Problem::new(path, problem, remedy));
        }
        *text = full.to_string_lossy().into_owned();
    }
}

/// Whether a value that does not exist, and is no uploaded data, must have been meant as a local path.
pub fn is_local(text: &str) -> bool {
    let begins = ["/", "./", "../", "~"].iter().any(|prefix| text.starts_with(prefix));
    let lower = text.to_ascii_lowercase();
    let is_file = [".jsonl", ".json", ".parquet"].iter().any(|suffix| lower.ends_with(suffix));
    // A revision may have slashes of its own (`refs/pr/1`).
    let name = text.split_once('@').map_or(text, |(name, _)| name);
    begins || is_file || text == "." || text == ".." || name.matches('/').count() > 1
}

/// `~` and `~/…` in the home directory.
pub(crate) fn home(text: &str) -> Option<PathBuf> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    /// A reference ends like a file, and is still none.
    #[test]
    fn what_is_compared_is_found() {
        let document = |text: &str| serde_json::from_str::<Map<String, Value>>(text).unwrap();
        for (text, want) in [
            (r#"{ "pretrained_model_id": "/m" }"#, false),
            (r#"{ "constraints": ["pretrained_model_id != '/m' or batch_size <= 2"] }"#, true),
            (r#"{ "constraints": ["batch_size <= 2"] }"#, false),
            (
                r#"{ "parameters": { "lora_rank": { "when": { "pretrained_model_id": "/m" }, "choices": [2] } } }"#,
                true,
            ),
            (
                r#"{ "parameters": { "lora_rank": { "when": { "pretrained_model_id": ["/x", "/m"] } } } }"#,
                true,
            ),
            (
                r#"{ "parameters": { "lora_rank": { "when": { "pretrained_model_id": "/n" }, "choices": ["/m"] } } }"#,
                false,
            ),
        ] {
            assert_eq!(is_compared(&document(text), "/m"), want, "{text}");
        }
    }

    #[test]
    fn uploaded_data_is_no_path_and_nothing_of_the_hub() {
        let hash = "0".repeat(64);
        let rows = format!("blob:sha256:{hash}/rows.jsonl");
        let document = json!({
            "pretrained_model_id": "org/base", "eval_dataset_name": "/sets/rows.jsonl",
            "parameters": [{ "dataset_name": [rows, "./blob:x.jsonl"] }, { "init_adapter": "blob:x" }],
        });
        let mut document = document.as_object().unwrap().clone();
        let places: Vec<_> = named(&document).into_iter().map(|named| (named.at, named.place)).collect();
        let want = [
            ("pretrained_model_id", Place::Hub),
            ("parameters.dataset_name[0]", Place::Uploaded),
            ("parameters.dataset_name[1]", Place::Path),
            ("eval_dataset_name", Place::Path),
            ("parameters.init_adapter", Place::Uploaded),
        ];
        assert_eq!(places, want.map(|(at, place)| (at.to_string(), place)));

        let problems = resolve(&mut document, &|_| "/nowhere".into(), Missing::Report);
        assert_eq!(problems.len(), 2, "{problems:?}");
        let problems = resolve(&mut document, &|_| "/nowhere".into(), Missing::ReportRelative);
        assert_eq!(problems, [], "what was relative is absolute now");
        assert_eq!(document["parameters"][0]["dataset_name"], json!([rows, "/nowhere/blob:x.jsonl"]));
        assert_eq!(absolute(&rows), rows);

        rename(&mut document, &|name| name.ends_with("rows.jsonl").then(|| "new".to_string()));
        assert_eq!(document["parameters"][0]["dataset_name"], json!(["new", "/nowhere/blob:x.jsonl"]));
        assert_eq!(
            (&document["eval_dataset_name"], &document["pretrained_model_id"]),
            (&json!("new"), &json!("org/base"))
        );
    }
}
