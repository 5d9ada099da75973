//! A task's documents, and the examples for its prompts, from files in the data sets' own layouts.

use crate::task::{FewshotConfig, OutputType, Sampler, Task};
use crate::{EvalError, Result};
use domain::sweep::FewshotOrder;
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// A document's fields.
pub type Fields = Map<String, Value>;

/// What a task asks, and what it shows before.
#[derive(Debug, Clone)]
pub struct Data {
    /// Where the documents lie.
    pub path: PathBuf,
    /// The documents, in order.
    pub documents: Vec<Fields>,
    /// The examples, in order.
    pub examples: Vec<Fields>,
    /// Whether a document may be among the examples, and is then left out of those before itself.
    pub examples_hold_documents: bool,
}

/// Reads a task's documents from `path`, a file or a directory of files called after splits, and, where `examples` are
/// asked for, those: from `fewshot` if it is given, from the task file, from the directory's split, or else from among the
/// documents. `order` is whose rule says whether a document may be among the examples.
///
/// # Errors
/// A file or split is not there, or holds rows that cannot be read, or none.
pub fn load(
    task: &Task,
    path: &Path,
    fewshot: Option<&Path>,
    examples: bool,
    order: FewshotOrder,
) -> Result<Data> {
    let split = task.test_split.as_deref().or(task.validation_split.as_deref());
    let documents = rows(task, path, split)?;
    let FewshotConfig { sampler, samples } = &task.fewshot_config;
    let draws = *sampler == Sampler::Default && samples.is_none();
    let mut data = Data {
        path: path.to_owned(),
        documents,
        examples: Vec::new(),
        // As the harness decides it, also where neither split is named.
        examples_hold_documents: match order {
            FewshotOrder::V0_3 if draws => task.training_split.is_none(),
            _ => task.fewshot_split == task.test_split,
        },
    };
    if !examples {
        return Ok(data);
    }
    let splits = [&task.fewshot_split, &task.training_split, &task.validation_split, &task.test_split];
    let split = splits.into_iter().flatten().next().map(String::as_str);
    data.examples = match (&task.fewshot_config.samples, fewshot) {
        (_, Some(path)) => rows(task, path, split)?,
        (Some(samples), None) => samples.clone(),
        (None, None) if path.is_dir() => rows(task, path, split)?,
        (None, None) => {
            data.examples_hold_documents = true;
            data.documents.clone()
        }
    };
    Ok(data)
}

fn rows(task: &Task, path: &Path, split: Option<&str>) -> Result<Vec<Fields>> {
    let files = if path.is_dir() { split_files(task, path, split)? } else { vec![path.to_owned()] };
    let mut rows = Vec::new();
    for file in &files {
        let is_text = file.extension().is_some_and(|kind| kind.eq_ignore_ascii_case("txt"));
        if is_text && task.output_type == OutputType::LoglikelihoodRolling {
            let text = std::fs::read_to_string(file)
                .map_err(|source| EvalError::Io { path: file.clone(), source })?;
            rows.push(Map::from_iter([("text".to_owned(), Value::from(text))]));
        } else {
            rows.extend(trainer::data::objects(file)?);
        }
    }
    match rows.is_empty() {
        true => Err(EvalError::task(
            &task.task,
            format!("{} has no documents", path.display()),
            "name a file with some",
        )),
        false => Ok(rows),
    }
}

/// Where in a directory a task's documents lie: in the folder of its part of the data set, in `data/` or at the top.
pub fn folder(task: &Task, dir: &Path) -> PathBuf {
    let part = task.dataset_name.as_ref().map(|name| dir.join(name)).filter(|folder| folder.is_dir());
    let folder = part.or_else(|| Some(dir.join("data")).filter(|folder| folder.is_dir()));
    folder.unwrap_or_else(|| dir.to_owned())
}

/// The files of a split, by name.
fn split_files(task: &Task, dir: &Path, split: Option<&str>) -> Result<Vec<PathBuf>> {
    let folder = folder(task, dir);
    let Some(split) = split else {
        let problem = format!("names no split, and {} is a directory", dir.display());
        return Err(EvalError::task(&task.task, problem, "name a file"));
    };
    let io = |source| EvalError::Io { path: folder.clone(), source };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(&folder).map_err(io)? {
        let path = entry.map_err(io)?.path();
        let kind = path.extension().and_then(|kind| kind.to_str()).unwrap_or_default().to_ascii_lowercase();
        let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        let of_split = stem.split(|c: char| !c.is_alphanumeric()).any(|word| word == split);
        if of_split && ["jsonl", "json", "parquet"].contains(&kind.as_str()) {
            files.push(path);
        }
    }
    files.sort();
    match files.is_empty() {
        true => Err(EvalError::task(
            &task.task,
            format!("{} has no file of the split `{split}`", folder.display()),
            format!("call it {split}.jsonl or {split}.parquet, or name the file itself"),
        )),
        false => Ok(files),
    }
}
