//! Which namespace uploaded what, and how much it may: the first to upload a file has it counted, whoever names it then.
//!
//! A file counts from when its upload begins, with the bytes that were announced, until it is removed. Whoever announces
//! more of it has all of it counted: no file comes to be that has more bytes than were announced. Uploads that began before
//! there were quotas count for nobody.

use crate::error::{CoordinatorError, Result};
use crate::store::{Batch, Store, Uploaded};
use domain::data::ContentHash;
use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What is counted for whom. Clones share it.
#[derive(Clone)]
pub struct Uploads {
    store: Store,
    known: Arc<Mutex<Known>>,
    /// Held by one that is about to count, so that two do not both find the last room.
    counting: Arc<tokio::sync::Mutex<()>>,
}

/// The files that count, and the sum of each namespace.
#[derive(Default)]
struct Known {
    files: HashMap<ContentHash, Uploaded>,
    /// Bytes; of as many files as there can be, the sum does not overflow.
    used: HashMap<String, u128>,
}

impl Known {
    /// Counts a file, instead of what is counted of it.
    fn insert(&mut self, uploaded: Uploaded) {
        self.remove(uploaded.file);
        *self.used.entry(uploaded.namespace.clone()).or_default() += u128::from(uploaded.bytes);
        self.files.insert(uploaded.file, uploaded);
    }

    fn remove(&mut self, file: ContentHash) {
        if let Some(uploaded) = self.files.remove(&file)
            && let Some(used) = self.used.get_mut(&uploaded.namespace)
        {
            *used -= u128::from(uploaded.bytes);
        }
    }

    /// The bytes of a namespace without those of a file.
    fn used_without(&self, namespace: &str, file: ContentHash) -> u128 {
        let used = self.used.get(namespace).copied().unwrap_or_default();
        let own = self.files.get(&file).filter(|one| one.namespace == namespace);
        used - own.map_or(0, |one| u128::from(one.bytes))
    }
}

impl Uploads {
    /// Reads what is kept, and forgets files that are not `stored` any more. `None`: that is not known, and they count on
    /// until the next start.
    ///
    /// # Errors
    /// The state cannot be read or written.
    pub async fn open(store: Store, stored: Option<&BTreeSet<ContentHash>>) -> Result<Self> {
        let mut known = Known::default();
        store.uploads().await?.into_iter().for_each(|one| known.insert(one));
        let is_gone = |file: &&ContentHash| stored.is_some_and(|stored| !stored.contains(*file));
        let gone: Vec<_> = known.files.keys().filter(is_gone).copied().collect();
        let mut batch = Batch::default();
        for file in gone {
            batch.forget_upload(file);
            known.remove(file);
        }
        store.commit(batch).await?;
        Ok(Self { store, known: Arc::new(Mutex::new(known)), counting: Arc::default() })
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        // Nothing that can panic is done while it is held.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a file of which something is to be stored, unless as many bytes of it are counted already. Durable when it
    /// returns.
    ///
    /// # Errors
    /// With it the namespace would have more than `most` bytes, or it cannot be written.
    pub async fn count(
        &self,
        namespace: &str,
        file: ContentHash,
        bytes: u64,
        most: Option<u64>,
    ) -> Result<()> {
        let _counting = self.counting.lock().await;
        {
            let known = self.known();
            if known.files.get(&file).is_some_and(|one| one.bytes >= bytes) {
                return Ok(());
            }
            let used = known.used_without(namespace, file);
            if let Some(most) = most.filter(|most| used + u128::from(bytes) > u128::from(*most)) {
                let why = format!(
                    "the namespace {namespace} has {used} bytes of uploaded data and may have {most}: {bytes} more are too \
                     many; what no sweep names is removed a day later, when the coordinator starts; delete sweeps, or ask \
                     who runs the server for more"
                );
                return Err(CoordinatorError::Quota { namespace: namespace.into(), why });
            }
        }
        let uploaded = Uploaded { file, namespace: namespace.into(), bytes };
        let mut batch = Batch::default();
        batch.uploaded(&uploaded);
        self.store.commit(batch).await?;
        self.known().insert(uploaded);
        Ok(())
    }

    /// Counts a file no more, of which nothing was stored in the end. No other upload of it may have begun.
    ///
    /// # Errors
    /// It cannot be written.
    pub async fn forget(&self, file: ContentHash) -> Result<()> {
        let _counting = self.counting.lock().await;
        let mut batch = Batch::default();
        batch.forget_upload(file);
        self.store.commit(batch).await?;
        self.known().remove(file);
        Ok(())
    }
}
