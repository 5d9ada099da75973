//! Which of a repository's files are needed.

use crate::error::{HubError, Result};
use crate::id::Kind;
use std::collections::BTreeMap;
use std::path::Path;

/// A model's configuration.
pub(crate) const CONFIG: &str = "config.json";

/// What a model has beside its configuration and weights, as far as it is there.
pub const COMPANIONS: [&str; 9] = [
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
];

/// Weights, the first that is there first: one file, or an index of several.
const WEIGHTS: [(&str, &str); 2] = [
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
];

/// What files of rows end in, the first that is there first: a repository often has its rows in several forms.
const ROWS: [&str; 3] = [".parquet", ".jsonl", ".json"];

/// Files that end so and hold no rows.
const NO_ROWS: [&str; 6] = [
    "dataset_infos.json",
    "dataset_info.json",
    "dataset_dict.json",
    "state.json",
    "config.json",
    "package.json",
];

/// What to download.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Needed {
    /// The files, small ones first.
    pub(crate) files: Vec<String>,
    /// Of these, the index that names more.
    pub(crate) index: Option<String>,
    /// The folder within the snapshot that holds them all; empty for the snapshot itself.
    pub(crate) folder: String,
}

/// What is needed of a repository's files; the error is `(problem, remedy)`.
pub(crate) fn needed(kind: Kind, files: &[String]) -> std::result::Result<Needed, (String, String)> {
    match kind {
        Kind::Model => model(files),
        Kind::Dataset => rows(files),
    }
}

fn model(files: &[String]) -> std::result::Result<Needed, (String, String)> {
    let has = |name: &str| files.iter().any(|file| file == name);
    let mut needed: Vec<String> =
        [CONFIG].iter().chain(&COMPANIONS).filter(|name| has(name)).map(ToString::to_string).collect();
    if !has("config.json") {
        return Err(("has no config.json".into(), "name a model in the layout of transformers".into()));
    }
    for (single, index) in WEIGHTS {
        if has(single) {
            needed.push(single.into());
            return Ok(Needed { files: needed, index: None, folder: String::new() });
        }
        if has(index) {
            needed.push(index.into());
            return Ok(Needed { files: needed, index: Some(index.into()), folder: String::new() });
        }
    }
    Err((
        "has neither model.safetensors nor pytorch_model.bin, nor an index of shards of them".into(),
        "name a model in the layout of transformers".into(),
    ))
}

/// The files of a model's directory on this machine that are needed of it: those that would be downloaded.
///
/// # Errors
/// It is none in the layout of transformers, or cannot be read.
pub fn of_model(dir: &Path) -> Result<Vec<String>> {
    let (mut files, io) = (Vec::new(), |source| HubError::Io { path: dir.into(), source });
    for entry in std::fs::read_dir(dir).map_err(io)? {
        files.extend(entry.map_err(io)?.file_name().into_string());
    }
    let wrong = |(problem, remedy): (String, String)| HubError::repo(dir.display(), problem, remedy);
    let Needed { mut files, index, .. } = model(&files).map_err(wrong)?;
    if let Some(index) = index {
        let path = dir.join(&index);
        let text = std::fs::read(&path).map_err(|source| HubError::Io { path: path.clone(), source })?;
        let no_index = || wrong((format!("{index} names no shards"), "download the model again".into()));
        files.extend(shards(&text).ok_or_else(no_index)?);
    }
    Ok(files)
}

/// The shards that an index names, in order; none for what is no index.
pub(crate) fn shards(index: &[u8]) -> Option<Vec<String>> {
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let mut names: Vec<_> = serde_json::from_slice::<Index>(index).ok()?.weight_map.into_values().collect();
    names.sort();
    names.dedup();
    names.iter().all(|name| is_safe(name)).then_some(names)
}

fn rows(files: &[String]) -> std::result::Result<Needed, (String, String)> {
    let holds_rows = |file: &&String| {
        let name = file.rsplit('/').next().unwrap_or_default();
        is_safe(file) && !NO_ROWS.contains(&name) && !file.split('/').any(|part| part.starts_with('.'))
    };
    for end in ROWS {
        let found: Vec<_> =
            files.iter().filter(|file| file.ends_with(end)).filter(holds_rows).cloned().collect();
        let mut folders: Vec<_> =
            found.iter().map(|f| f.rsplit_once('/').map_or("", |(folder, _)| folder)).collect();
        folders.dedup();
        folders.sort_unstable();
        folders.dedup();
        match folders.as_slice() {
            [] => {}
            [folder] => {
                let folder = (*folder).to_string();
                return Ok(Needed { files: found, index: None, folder });
            }
            several => {
                let problem = format!("holds rows in several folders: {}", several.join(", "));
                let remedy = "download the one that is meant, and name that folder of this machine";
                return Err((problem, remedy.into()));
            }
        }
    }
    Err((
        "has no .parquet, .jsonl or .json file of rows".into(),
        "name a data set that has, or write its rows to such a file".into(),
    ))
}

/// Whether a name stays within the folder that it is joined to.
pub(crate) fn is_safe(name: &str) -> bool {
    !name.contains('\\') && name.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_needed() {
        let check = |kind, files: &[&str], want: std::result::Result<(&[&str], Option<&str>, &str), &str>| {
            let files: Vec<_> = files.iter().map(ToString::to_string).collect();
            match (needed(kind, &files), want) {
                (Ok(got), Ok((want, index, folder))) => {
                    assert_eq!(
                        (got.files, got.index.as_deref(), got.folder.as_str()),
                        (want.iter().map(ToString::to_string).collect(), index, folder)
                    );
                }
                (Err((problem, _)), Err(want)) => assert!(problem.contains(want), "{problem}"),
                (got, want) => panic!("{files:?}: {got:?}, not {want:?}"),
            }
        };
        let model = |files: &[&str], want| check(Kind::Model, files, want);
        model(
            &[
                "README.md",
                "config.json",
                "model.safetensors",
                "pytorch_model.bin",
                "tokenizer.json",
                "onnx/model.onnx",
            ],
            Ok((&["config.json", "tokenizer.json", "model.safetensors"], None, "")),
        );
        model(
            &[
                "config.json",
                "model.safetensors.index.json",
                "model-00001-of-00002.safetensors",
                "pytorch_model.bin",
            ],
            Ok((&["config.json", "model.safetensors.index.json"], Some("model.safetensors.index.json"), "")),
        );
        model(
            &["config.json", "pytorch_model.bin", "tf_model.h5"],
            Ok((&["config.json", "pytorch_model.bin"], None, "")),
        );
        model(&["model.safetensors"], Err("has no config.json"));
        model(&["config.json", "original/consolidated.00.pth"], Err("has neither model.safetensors"));
        let rows = |files: &[&str], want| check(Kind::Dataset, files, want);
        rows(&["README.md", "train.jsonl", "eval.jsonl"], Ok((&["train.jsonl", "eval.jsonl"], None, "")));
        rows(
            &["data/train-0.parquet", "data.jsonl", "dataset_infos.json"],
            Ok((&["data/train-0.parquet"], None, "data")),
        );
        rows(&["rows.json", ".gitattributes", "dataset_infos.json"], Ok((&["rows.json"], None, "")));
        rows(&["main/a.parquet", "socratic/a.parquet"], Err("several folders: main, socratic"));
        rows(&["rows.csv", "dataset_infos.json", ".x/a.json", "../a.json"], Err("has no .parquet"));
    }

    #[test]
    fn shards_of_an_index() {
        let names = |names: &[&str]| Some(names.iter().map(ToString::to_string).collect());
        for (text, want) in [
            (r#"{"weight_map": {"a": "2", "b": "1", "c": "2"}}"#, names(&["1", "2"])),
            (r#"{"weight_map": {"a": "../2"}}"#, None),
            (r#"{"weight_map": {"a": "/2"}}"#, None),
            ("{}", None),
        ] {
            assert_eq!(shards(text.as_bytes()), want, "{text}");
        }
    }

    #[test]
    fn the_files_of_a_directory() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
        let found = || of_model(dir.path()).map_err(|error| error.to_string());
        write("config.json", "{}");
        write("README.md", "");
        assert!(found().unwrap_err().contains("neither model.safetensors"));
        write("model.safetensors.index.json", "{}");
        assert!(found().unwrap_err().contains("names no shards"));
        write(
            "model.safetensors.index.json",
            r#"{"weight_map": {"a": "2.safetensors", "b": "1.safetensors"}}"#,
        );
        let want = ["config.json", "model.safetensors.index.json", "1.safetensors", "2.safetensors"];
        assert_eq!(found().unwrap(), want);
        assert!(of_model(&dir.path().join("gone")).is_err());
    }
}
