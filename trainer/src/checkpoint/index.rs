//! Which files make a checkpoint.

use crate::error::{Result, TrainError};
use std::collections::BTreeMap;
use std::path::{Component, Path, PathBuf};

/// How a checkpoint's files are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Safetensors,
    Torch,
}

/// The files that may make a checkpoint, the first that is there first: one file, or an index of several.
pub(super) const CHOICES: [(Format, &str, &str); 2] = [
    (Format::Safetensors, "model.safetensors", "model.safetensors.index.json"),
    (Format::Torch, "pytorch_model.bin", "pytorch_model.bin.index.json"),
];

/// A checkpoint's files.
#[derive(Debug, PartialEq)]
pub(super) struct Index {
    pub(super) format: Format,
    pub(super) files: Vec<PathBuf>,
    /// The place in `files` of each tensor that an index names; a single file has none.
    pub(super) places: BTreeMap<String, usize>,
}

#[derive(serde::Deserialize)]
struct Document {
    weight_map: BTreeMap<String, String>,
}

/// A directory's checkpoint. Safetensors are taken where there are pickles too.
///
/// # Errors
/// There is none, or a shard is missing.
pub(super) fn find(dir: &Path) -> Result<Index> {
    for (format, single, index) in CHOICES {
        let (single, index) = (dir.join(single), dir.join(index));
        if single.is_file() {
            return Ok(Index { format, files: vec![single], places: BTreeMap::new() });
        }
        if index.is_file() {
            return shards(dir, format, &index);
        }
    }
    Err(TrainError::model(
        dir,
        "has neither model.safetensors nor pytorch_model.bin, nor an index of shards of them",
        "download the model's weights",
    ))
}

fn shards(dir: &Path, format: Format, index: &Path) -> Result<Index> {
    let broken = |problem: String| TrainError::model(index, problem, "download it again");
    let text = std::fs::read_to_string(index).map_err(TrainError::io(index))?;
    let document: Document =
        serde_json::from_str(&text).map_err(|e| broken(format!("is no index of a checkpoint ({e})")))?;
    let mut names: Vec<_> = document.weight_map.values().cloned().collect();
    names.sort();
    names.dedup();
    for name in &names {
        let mut parts = Path::new(name).components();
        if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) {
            return Err(broken(format!("names {name:?}, which is no file beside it")));
        }
        let file = dir.join(name);
        if !file.is_file() {
            return Err(TrainError::model(&file, "is missing", "download the shard that the index names"));
        }
    }
    let place = |file: &String| names.binary_search(file).unwrap_or_default();
    let places = document.weight_map.iter().map(|(tensor, file)| (tensor.clone(), place(file))).collect();
    let files = names.iter().map(|name| dir.join(name)).collect();
    Ok(Index { format, files, places })
}
