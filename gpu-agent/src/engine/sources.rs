//! What trials name on the hub, on this machine before it is read.

use super::exams;
use domain::trial::{Failure, FailureClass};
use eval::task::Task;
use hub::{Hub, HubError, Kind, Located, Progress, RepoId, Settings};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use trainer::{TrainError, locate};

/// Repositories that this process has seen to, and where they lie. Each is asked for once, so that the trials of a sweep read the same
/// commit.
#[derive(Debug, Default)]
pub struct Sources {
    ready: HashMap<String, PathBuf>,
}

impl Sources {
    /// Downloads what a name means on the hub, unless it is a path or has been seen to.
    pub(super) fn ready(&mut self, kind: Kind, name: &str) -> Result<(), Failure> {
        let Located::Repo(id) = hub::locate(name) else { return absolute(name) };
        self.fetched(kind, &id).map(drop)
    }

    /// The directory of a task's documents, which come from the hub.
    pub(super) fn documents(&mut self, task: &Task) -> Result<PathBuf, Failure> {
        let id = task.dataset_path.as_deref().filter(|_| task.asks_shipped_data()).and_then(RepoId::parse);
        let id = id.ok_or_else(|| exams::no_documents(task))?;
        let id = task.dataset_name.as_deref().map_or(id.clone(), |part| id.part(part));
        self.fetched(Kind::Dataset, &id)
    }

    fn fetched(&mut self, kind: Kind, id: &RepoId) -> Result<PathBuf, Failure> {
        let key = format!("{kind:?} {id:?}");
        if let Some(dir) = self.ready.get(&key) {
            return Ok(dir.clone());
        }
        let hub = Hub::new(Settings::from_env().map_err(failure)?);
        let dir = hub.fetch(kind, id, &mut Logged { repo: id.to_string() }).map_err(failure)?;
        self.ready.insert(key, dir.clone());
        Ok(dir)
    }
}

/// The folder that holds a model's `config.json`, which alone is downloaded if it is not here.
pub(super) fn configuration(name: &str) -> Result<PathBuf, Failure> {
    let Located::Repo(id) = hub::locate(name) else {
        absolute(name)?;
        let user = |error: TrainError| Failure { class: FailureClass::User, message: error.to_string() };
        return locate::model(name).map_err(user);
    };
    let settings = Settings::from_env().map_err(failure)?;
    if let Ok(dir) = Hub::cached(&settings, Kind::Model, &id) {
        return Ok(dir);
    }
    Hub::new(settings).configuration(&id, &mut Logged { repo: id.to_string() }).map_err(failure)
}

/// Refuses a path that is not absolute: it would be one of this agent's own working directory, which nobody meant and
/// nobody allowed.
pub(super) fn absolute(name: &str) -> Result<(), Failure> {
    if Path::new(name).is_absolute() {
        return Ok(());
    }
    let message = format!("{name:?} is no absolute path; name one, or for a model or rows an id of the hub");
    Err(Failure { class: FailureClass::User, message })
}

fn failure(error: HubError) -> Failure {
    let class = match error {
        HubError::Repo { .. } | HubError::Setting { .. } => FailureClass::User,
        HubError::Unavailable { .. } | HubError::Io { .. } => FailureClass::Infrastructure,
    };
    Failure { class, message: error.to_string() }
}

struct Logged {
    repo: String,
}

impl Progress for Logged {
    fn file(&mut self, name: &str, done: u64, total: u64) {
        tracing::info!(repo = %self.repo, file = name, done, total, "downloading");
    }

    fn bytes(&mut self, _: u64) {}

    fn finished(&mut self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What lies in the agent's working directory is nobody's to name.
    #[test]
    fn a_path_of_the_working_directory_is_refused() {
        for name in ["./src", "../x", "a b/c", "src/engine/mod.rs", "rows.jsonl", "~/x", ""] {
            let failure = Sources::default().ready(Kind::Dataset, name).unwrap_err();
            assert_eq!(failure.class, FailureClass::User, "{name}");
            assert!(failure.message.contains("is no absolute path"), "{}", failure.message);
        }
        Sources::default().ready(Kind::Dataset, "/data/rows.jsonl").unwrap();
        assert!(absolute("org/adapter").is_err() && absolute("/adapter").is_ok());
    }
}
