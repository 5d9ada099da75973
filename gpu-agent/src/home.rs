//! The agent's folder on disk:
//!
//! | path | holds |
//! |---|---|
//! | `lock` | nothing; locked while an agent uses the folder |
//! | `agent-id` | the agent's name, made once |
//! | `spool/` | what the coordinator has not acknowledged |
//! | `cache/` | uploaded data, and bases in 4 bits ([`crate::cache`]) |
//! | `trials/<assignment>/` | checkpoints on their way; emptied at start, since no training survives a restart |

use crate::{AgentError, Assignment};
use domain::AgentId;
use domain::fleet::SIMULATED_AGENT;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The folder, locked as long as a clone lives.
#[derive(Debug, Clone)]
pub struct Home {
    root: PathBuf,
    _lock: Arc<File>,
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> AgentError + '_ {
    move |source| AgentError::Io { path: path.into(), source }
}

/// The file that [`probe`] writes.
const PROBE: &str = ".probe";

/// Writes a small file to a folder and removes it again: a disk that is full keeps trials from going on.
///
/// # Errors
/// It cannot be written, for people.
pub fn probe(dir: &Path) -> Result<(), String> {
    let file = dir.join(PROBE);
    let written = std::fs::write(&file, [1; 4096]);
    // What part of it was written takes room.
    let removed = std::fs::remove_file(&file);
    written.and(removed).map_err(|error| format!("{} cannot be written: {error}", dir.display()))
}

/// Removes a folder, if there is one.
fn remove(path: &Path) -> Result<(), AgentError> {
    match std::fs::remove_dir_all(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(io(path)(e)),
        _ => Ok(()),
    }
}

impl Home {
    /// Makes the folder if need be, and takes it.
    ///
    /// # Errors
    /// Another agent uses it; it cannot be written.
    pub fn open(root: &Path) -> Result<Self, AgentError> {
        std::fs::create_dir_all(root).map_err(io(root))?;
        let path = root.join("lock");
        let lock = File::create(&path).map_err(io(&path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => return Err(AgentError::InUse { path: root.into() }),
            Err(std::fs::TryLockError::Error(source)) => return Err(io(&path)(source)),
        }
        // Moved away first: an engine's process that outlives a killed agent by a moment may be writing there, and would
        // have folders that were just emptied not be empty.
        let (trials, removed) = (root.join("trials"), root.join("trials.removed"));
        remove(&removed)?;
        match std::fs::rename(&trials, &removed) {
            Ok(()) => remove(&removed)?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(io(&trials)(e)),
        }
        Ok(Self { root: root.into(), _lock: Arc::new(lock) })
    }

    /// The agent's name: the one of the last time, or a new one, which says whether its devices are simulated.
    ///
    /// # Errors
    /// The file cannot be read or written, or it was an agent of the other kind: what one trains the other must not go on
    /// with.
    pub fn agent_id(&self, simulated: bool) -> Result<AgentId, AgentError> {
        let path = self.root.join("agent-id");
        match std::fs::read_to_string(&path) {
            Ok(text) if !text.trim().is_empty() => {
                let id = text.trim();
                return match id.starts_with(SIMULATED_AGENT) == simulated {
                    true => Ok(AgentId::new(id)),
                    false => Err(AgentError::OtherKind { path: self.root.clone(), id: id.into() }),
                };
            }
            Ok(_) => {}
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(io(&path)(e)),
        }
        let kind = if simulated { SIMULATED_AGENT } else { "agent-" };
        let id = format!("{kind}{}", &uuid::Uuid::new_v4().simple().to_string()[..8]);
        // Renamed into place, so that a crash leaves no half of a name.
        let draft = self.root.join("agent-id.new");
        std::fs::write(&draft, &id).map_err(io(&draft))?;
        domain::crash::point("agent/named");
        std::fs::rename(&draft, &path).map_err(io(&path))?;
        Ok(AgentId::new(id))
    }

    /// The folder of the spool.
    pub fn spool(&self) -> PathBuf {
        self.root.join("spool")
    }

    /// The folder of the cache. Trials name what lies there, and a relative path is none that a trial may name.
    pub fn cache(&self) -> PathBuf {
        let path = self.root.join("cache");
        std::path::absolute(&path).unwrap_or(path)
    }

    /// An assignment's work folder.
    pub fn work_dir(&self, assignment: &Assignment) -> PathBuf {
        self.root.join("trials").join(assignment.file_name())
    }

    /// Removes an assignment's work folder. What cannot be removed goes when the agent starts again.
    pub fn remove_work_dir(&self, assignment: &Assignment) {
        let dir = self.work_dir(assignment);
        match std::fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                tracing::warn!(path = %dir.display(), %error, "a work folder could not be removed");
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_for_life_and_one_agent_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let home = Home::open(dir.path()).unwrap();
        let id = home.agent_id(false).unwrap();
        let work = home.work_dir(&Assignment::new("s/1", 1));
        std::fs::create_dir_all(&work).unwrap();
        assert!(matches!(Home::open(dir.path()), Err(AgentError::InUse { .. })));
        assert!(work.exists(), "an agent that may not have the folder leaves it alone");
        drop(home);
        // As an agent leaves it that is killed while it starts.
        std::fs::create_dir_all(dir.path().join("trials.removed/s%2F1")).unwrap();
        let home = Home::open(dir.path()).unwrap();
        assert_eq!(home.agent_id(false).unwrap(), id);
        let mut left: Vec<_> =
            std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["agent-id", "lock"]);
    }

    #[test]
    fn an_agent_stays_of_its_kind() {
        for simulated in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let home = Home::open(dir.path()).unwrap();
            let id = home.agent_id(simulated).unwrap();
            assert_eq!(id.as_str().starts_with(SIMULATED_AGENT), simulated);
            assert_eq!(home.agent_id(simulated).unwrap(), id);
            let refusal = home.agent_id(!simulated).unwrap_err().to_string();
            assert!(refusal.contains(id.as_str()) && refusal.contains("--data-dir"), "{refusal}");
        }
    }
}
