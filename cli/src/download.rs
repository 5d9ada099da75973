//! What a trial names on the hub, on this machine before it is read.

use crate::Failure;
use crate::output::{bytes, say};
use domain::trial::TrialConfig;
use hub::{Hub, HubError, Kind, Located, Progress, Settings};
use indicatif::{ProgressBar, ProgressStyle};
use std::collections::HashSet;
use std::io::IsTerminal;

/// Bytes from which a file is worth a line where there is no terminal.
const LARGE: u64 = 10_000_000;

/// Downloads what is not in the cache, each repository once.
#[derive(Default)]
pub(crate) struct Downloads {
    ready: HashSet<String>,
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

    fn one(&mut self, kind: Kind, name: &str) -> Result<(), HubError> {
        let Located::Repo(id) = hub::locate(name) else { return Ok(()) };
        if self.ready.insert(format!("{kind:?} {id}")) {
            let hub = Hub::new(Settings::from_env()?);
            hub.fetch(kind, &id, &mut Shown { repo: id.to_string(), bar: None })?;
        }
        Ok(())
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

/// A bar a file on a terminal, a line a large file elsewhere.
struct Shown {
    repo: String,
    bar: Option<ProgressBar>,
}

impl Progress for Shown {
    fn file(&mut self, name: &str, done: u64, total: u64) {
        if !std::io::stderr().is_terminal() {
            if total >= LARGE {
                let from = if done > 0 { format!(" from byte {done} on") } else { String::new() };
                say!("{}: downloading {name}, {}{from}", self.repo, bytes(total));
            }
            return;
        }
        let bar = ProgressBar::new(total).with_position(done).with_message(format!("{}: {name}", self.repo));
        let template = "{bar:24} {bytes}/{total_bytes} {bytes_per_sec}  {wide_msg}  {eta}";
        self.bar = Some(match ProgressStyle::with_template(template) {
            Ok(style) => bar.with_style(style),
            Err(_) => bar,
        });
    }

    fn bytes(&mut self, count: u64) {
        if let Some(bar) = &self.bar {
            bar.inc(count);
        }
    }

    fn finished(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}
