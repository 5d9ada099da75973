//! Where what a configuration names lies on this machine: at a path, or in the hub's cache. Nothing is downloaded
//! here; whoever runs the trainer does that first.

use crate::error::{Result, TrainError};
use hub::{Hub, HubError, Kind, Located, Settings};
use std::path::PathBuf;

/// The directory of a base model.
///
/// # Errors
/// The parameter is empty, there is no such directory, or the cache does not have the repository.
pub fn model(name: &str) -> Result<PathBuf> {
    let key = "pretrained_model_id";
    if name.is_empty() {
        let remedy = "name a directory in Hugging Face's layout or a model of its hub";
        return Err(TrainError::parameter(key, "is not given", remedy));
    }
    match located(key, Kind::Model, name)? {
        dir if dir.is_dir() => Ok(dir),
        other => {
            let problem = format!("{} is no directory", other.display());
            Err(TrainError::parameter(key, problem, "download the model and name its directory"))
        }
    }
}

/// The file or directory of rows that the parameter `key` names, there or not.
///
/// # Errors
/// The cache does not have the repository.
pub fn dataset(key: &'static str, name: &str) -> Result<PathBuf> {
    located(key, Kind::Dataset, name)
}

fn located(key: &'static str, kind: Kind, name: &str) -> Result<PathBuf> {
    let id = match hub::locate(name) {
        Located::Path(path) => return Ok(path),
        Located::Repo(id) => id,
    };
    let found = Settings::from_env().and_then(|settings| Hub::cached(&settings, kind, &id));
    found.map_err(|error| match error {
        HubError::Repo { repo, problem, remedy } | HubError::Unavailable { repo, problem, remedy } => {
            TrainError::parameter(key, format!("{repo} {problem}"), remedy)
        }
        HubError::Setting { variable, problem } => {
            TrainError::parameter(key, format!("{variable} {problem}"), "or name a path")
        }
        HubError::Io { path, source } => TrainError::io(&path)(source),
    })
}
