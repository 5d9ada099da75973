//! What trials name on the hub, on this machine before it is read.

use domain::trial::{Failure, FailureClass};
use hub::{Hub, HubError, Kind, Located, Progress, Settings};
use std::collections::HashSet;

/// Repositories that this process has seen to. Each is asked for once, so that the trials of a sweep read the same
/// commit.
#[derive(Debug, Default)]
pub struct Sources {
    ready: HashSet<String>,
}

impl Sources {
    /// Downloads what a name means on the hub, unless it is a path or has been seen to.
    pub(super) fn ready(&mut self, kind: Kind, name: &str) -> Result<(), Failure> {
        let Located::Repo(id) = hub::locate(name) else { return Ok(()) };
        let key = format!("{kind:?} {id}");
        if self.ready.contains(&key) {
            return Ok(());
        }
        let hub = Hub::new(Settings::from_env().map_err(failure)?);
        hub.fetch(kind, &id, &mut Logged { repo: id.to_string() }).map_err(failure)?;
        self.ready.insert(key);
        Ok(())
    }
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
