//! What a trial names on the hub, on this machine before it is read.

use crate::Failure;
use crate::bar::Bar;
use ::eval::task::Task;
use domain::trial::TrialConfig;
use hub::{Hub, HubError, Kind, Located, Progress, RepoId, Settings};
use std::collections::HashMap;
use std::path::PathBuf;

/// Downloads what is not in the cache, each repository once.
#[derive(Default)]
pub(crate) struct Downloads {
    ready: HashMap<String, PathBuf>,
}

impl Downloads {
    /// Sees to the model and the rows of a trial. `place` says where a parameter was set, for errors.
    pub(crate) fn of(&mut self, config: &TrialConfig, place: &dyn Fn(&str) -> String) -> Result<(), Failure> {
        let named = [
            ("pretrained_model_id", Kind::Model, Some(&config.pretrained_model_id)),
            ("dataset_name", Kind::Dataset, Some(&config.dataset_name)),
            ("eval_dataset_name", Kind::Dataset, config.eval_dataset_name.as_ref()),
        ];
        let mixed = config.interleave_datasets.iter().flatten();
        let mixed = mixed.map(|name| ("interleave_datasets", Kind::Dataset, Some(name)));
        named.into_iter().chain(mixed).try_for_each(|(key, kind, name)| {
            let Some(name) = name else { return Ok(()) };
            self.one(kind, name).map_err(|error| failure(&error, &place(key)))
        })
    }

    /// Sees to a model that `place` names.
    pub(crate) fn model(&mut self, name: &str, place: &str) -> Result<(), Failure> {
        self.one(Kind::Model, name).map_err(|error| failure(&error, place))
    }

    /// Sees to a task's documents, which are in a data set of the hub, and says where they lie.
    pub(crate) fn documents(&mut self, task: &Task, place: &str) -> Result<PathBuf, Failure> {
        let name = task.dataset_path.as_deref().unwrap_or_default();
        let Some(id) = RepoId::parse(name) else {
            let problem = format!(
                "{place}: its dataset_path `{name}` is no data set of the hub; say where its documents lie"
            );
            return Err(Failure::invalid(problem));
        };
        let id = task.dataset_name.as_deref().map_or(id.clone(), |part| id.part(part));
        self.fetched(Kind::Dataset, &id).map_err(|error| failure(&error, place))
    }

    fn one(&mut self, kind: Kind, name: &str) -> Result<(), HubError> {
        let Located::Repo(id) = hub::locate(name) else { return Ok(()) };
        self.fetched(kind, &id).map(drop)
    }

    fn fetched(&mut self, kind: Kind, id: &RepoId) -> Result<PathBuf, HubError> {
        let key = format!("{kind:?} {id:?}");
        if let Some(dir) = self.ready.get(&key) {
            return Ok(dir.clone());
        }
        let hub = Hub::new(Settings::from_env()?);
        let dir = hub.fetch(kind, id, &mut Shown { repo: id.to_string(), bar: None })?;
        self.ready.insert(key, dir.clone());
        Ok(dir)
    }
}

fn failure(error: &HubError, place: &str) -> Failure {
    let message = format!("{place}: {error}");
    match error {
        HubError::Repo { .. } | HubError::Setting { .. } => Failure::invalid(message),
        HubError::Unavailable { .. } => Failure::unreachable(message),
        HubError::Io { .. } => Failure::failed(message),
    }
}

struct Shown {
    repo: String,
    bar: Option<Bar>,
}

impl Progress for Shown {
    fn file(&mut self, name: &str, done: u64, total: u64) {
        self.bar = Some(Bar::new("downloading", &format!("{}: {name}", self.repo), done, total));
    }

    fn bytes(&mut self, count: u64) {
        self.bar.iter().for_each(|bar| bar.add(count));
    }

    fn finished(&mut self) {
        self.bar = None;
    }
}
