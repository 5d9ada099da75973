//! Bases in 4 bits, kept beside what was uploaded: a base that an engine quantised is read in that form the next time.
//!
//! | path in the cache | holds |
//! |---|---|
//! | `<key>/data/`, `<key>/tree` | such a base, and the list of its files with their lengths and SHA-256, as an uploaded tree has it |
//! | `<key>.new-<n>/` | one that an engine writes; renamed once it is whole and durable, and removed at the next start if it never was |
//!
//! The key is a hash of all that the base's numbers depend on (`trainer::kept`), so that nothing here is ever out of date:
//! a base of other files has another key, and what nobody reads any more goes as the least recently used. The agent
//! makes room before an engine writes, and writes nothing itself; how far an engine is, is what lies on the disk, whatever became
//! of its process. An engine that reads one holds nothing: if it is removed meanwhile, the base is quantised anew.

use super::{Cache, Entry, State, disk};
use domain::data::{ContentHash, Tree, TreeFile};
use serde::{Deserialize, Serialize};
use sha2::Digest;
use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

/// The folder of a base in the cache at `root` that is whole and whose files are what their hashes say.
///
/// # Errors
/// The disk cannot be read.
pub fn whole(root: &Path, key: ContentHash) -> io::Result<Option<PathBuf>> {
    let dir = root.join(key.to_string());
    Ok(disk::whole(&dir, None, None)?.map(|_| dir.join(disk::DATA)))
}

/// Has a base that cannot be used, for all that its hashes are right, not be used again.
pub fn spoil(root: &Path, key: ContentHash) {
    // What cannot be removed is found unusable once more.
    let _ = std::fs::remove_file(root.join(key.to_string()).join(disk::TREE));
}

/// A base that an engine writes. It lies where no other is ever written, also none of the same key: what its writer still
/// does once its [`Room`] is gone touches nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Draft {
    /// What names the base.
    pub key: ContentHash,
    number: u64,
}

impl Draft {
    /// The folder that the engine fills with the base's files, in the cache at `root`. It is there while there is a
    /// [`Room`] and the base is not whole.
    pub fn data(self, root: &Path) -> PathBuf {
        self.dir(root).join(disk::DATA)
    }

    /// Has the base that was written be in the cache. Its files are durable.
    ///
    /// # Errors
    /// The draft is gone, or the system refuses.
    pub fn publish(self, root: &Path) -> io::Result<()> {
        let dir = self.dir(root);
        let mut files = Vec::new();
        for entry in std::fs::read_dir(dir.join(disk::DATA))? {
            let entry = entry?;
            let (digest, bytes) = disk::digest(&entry.path())?;
            let (name, sha256) =
                (entry.file_name().to_string_lossy().into_owned(), ContentHash(digest.finalize().into()));
            files.push(TreeFile { name, bytes, sha256 });
        }
        let tree = Tree::new(files).map_err(io::Error::other)?;
        let list = dir.join(disk::TREE);
        std::fs::write(&list, tree.text())?;
        for path in [&list, &dir.join(disk::DATA), &dir] {
            File::open(path)?.sync_all()?;
        }
        std::fs::rename(dir, root.join(self.key.to_string()))
    }

    /// Removes it: it will not be whole.
    pub fn give_up(self, root: &Path) {
        // What stays is removed with its room, or at the next start.
        let _ = std::fs::remove_dir_all(self.dir(root));
    }

    fn dir(self, root: &Path) -> PathBuf {
        root.join(format!("{}.new-{}", self.key, self.number))
    }
}

/// Room for a base that an engine writes. Dropped, it stays with a base that is whole, and is given up with one that is
/// not.
pub struct Room {
    cache: Cache,
    draft: Draft,
}

impl Room {
    /// What the engine is to write.
    pub fn draft(&self) -> Draft {
        self.draft
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let gone = {
            let mut state = self.cache.state();
            // From then on the engine cannot publish it.
            let gone = self.cache.take_out(&mut state, self.draft.key, &self.draft.dir(&self.cache.root));
            self.cache.settle_drafts(&mut state);
            gone
        };
        remove_aside(gone.into_iter().collect());
    }
}

/// Removes directories, of gigabytes perhaps, without keeping what else a runtime does from going on.
fn remove_aside(gone: Vec<PathBuf>) {
    let remove = move || gone.iter().for_each(|gone| disk::remove(gone));
    match tokio::runtime::Handle::try_current() {
        Ok(runtime) => drop(runtime.spawn_blocking(remove)),
        Err(_) => remove(),
    }
}

impl Cache {
    /// The directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Notes that an engine has read a base.
    pub fn used(&self, key: ContentHash) {
        let now = self.clock.now();
        if let Some(entry) = self.state().entries.get_mut(&key) {
            entry.used = now;
        }
        disk::touch(&self.root.join(key.to_string()), now);
    }

    /// Makes room for a base of so many bytes at most, by removing what was not used for longest. `None` if it is there, if
    /// another engine writes it, or if there is no room, which is said once.
    pub fn room(&self, key: ContentHash, bytes: u64) -> Option<Room> {
        let mut gone = Vec::new();
        let draft = self.make_draft(&mut self.state(), key, bytes, &mut gone);
        remove_aside(gone);
        Some(Room { cache: self.clone(), draft: draft? })
    }

    /// Makes a draft for which there is room. What was taken out of the cache for it is added to `gone`.
    fn make_draft(
        &self,
        state: &mut State,
        key: ContentHash,
        bytes: u64,
        gone: &mut Vec<PathBuf>,
    ) -> Option<Draft> {
        let dir = self.root.join(key.to_string());
        self.settle_drafts(state);
        let written = state.entries.get(&key).is_some_and(|entry| entry.draft.is_some());
        if written || dir.join(disk::TREE).exists() {
            return None;
        }
        // What is left of one that was damaged.
        state.entries.remove(&key);
        gone.extend(self.take_out(state, key, &dir));
        let in_use = state.entries.values().filter(|entry| entry.is_in_use()).map(|entry| entry.bytes);
        if in_use.fold(bytes, u64::saturating_add) > self.limit {
            if !std::mem::replace(&mut state.told_of_no_room, true) {
                tracing::warn!(
                    bytes,
                    limit = self.limit,
                    "the cache has no room to keep a base in 4 bits: it is quantised at each load; a larger --cache-limit keeps it"
                );
            }
            return None;
        }
        gone.extend(self.evict_from(state, &BTreeSet::new(), Some((key, bytes))).0);
        state.drafts += 1;
        let draft = Draft { key, number: state.drafts };
        let data = draft.data(&self.root);
        if let Err(error) = std::fs::create_dir_all(&data) {
            tracing::warn!(path = %data.display(), %error, "a base in 4 bits is not kept");
            state.entries.remove(&key);
            return None;
        }
        let entry = Entry { bytes, draft: Some(draft), used: self.clock.now(), ..Entry::default() };
        state.entries.insert(key, entry);
        Some(draft)
    }

    /// Takes a directory out of the cache, if it is there. Answers with where it lies now.
    fn take_out(&self, state: &mut State, key: ContentHash, dir: &Path) -> Option<PathBuf> {
        state.gone += 1;
        let gone = disk::gone(&self.root, key, state.gone);
        std::fs::rename(dir, &gone).is_ok().then_some(gone)
    }

    /// Looks what became of the bases that engines were told to write.
    pub(super) fn settle_drafts(&self, state: &mut State) {
        state.entries.retain(|key, entry| {
            // In this order: a draft that is gone has become a base, or nothing.
            if entry.draft.is_none_or(|draft| draft.dir(&self.root).exists()) {
                return true;
            }
            entry.draft = None;
            self.root.join(key.to_string()).join(disk::TREE).exists()
        });
    }
}

#[cfg(test)]
mod tests;
