//! Which namespace uploaded what, and how much it may: the first to upload a file has it counted, whoever names it then.
//!
//! A file counts from when its upload begins, with the bytes that were announced, until it is removed. Uploads that
//! began before there were quotas count for nobody.

use crate::blobs::Blobs;
use crate::error::{CoordinatorError, Result};
use crate::store::{Batch, Store, Uploaded};
use domain::data::ContentHash;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What is counted for whom. Clones share it.
#[derive(Clone)]
pub struct Uploads {
    store: Store,
    known: Arc<Mutex<HashMap<ContentHash, Uploaded>>>,
    /// Held by one that is about to count, so that two do not both find the last room.
    counting: Arc<tokio::sync::Mutex<()>>,
}

impl Uploads {
    /// Reads what is kept, and forgets what `blobs` does not have any more.
    ///
    /// # Errors
    /// The state cannot be read or written.
    pub async fn open(store: Store, blobs: &Blobs) -> Result<Self> {
        let mut known: HashMap<_, _> =
            store.uploads().await?.into_iter().map(|one| (one.file, one)).collect();
        match blobs.stored().await {
            Ok(stored) => {
                let mut batch = Batch::default();
                for gone in known.keys().filter(|file| !stored.contains(file)) {
                    batch.forget_upload(*gone);
                }
                known.retain(|file, _| stored.contains(file));
                store.commit(batch).await?;
            }
            Err(error) => tracing::warn!(%error, "uploads that are gone count on until the next start"),
        }
        Ok(Self { store, known: Arc::new(Mutex::new(known)), counting: Arc::default() })
    }

    fn known(&self) -> MutexGuard<'_, HashMap<ContentHash, Uploaded>> {
        // Nothing that can panic is done while it is held.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a file of which something is to be stored, unless it is counted already. Durable when it returns.
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
            if known.contains_key(&file) {
                return Ok(());
            }
            let own = known.values().filter(|one| one.namespace == namespace).map(|one| one.bytes);
            let used = own.fold(0, u64::saturating_add);
            if let Some(most) = most.filter(|most| used.saturating_add(bytes) > *most) {
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
        self.known().insert(file, uploaded);
        Ok(())
    }

    /// Counts a file no more, of which nothing was stored in the end.
    ///
    /// # Errors
    /// It cannot be written.
    pub async fn forget(&self, file: ContentHash) -> Result<()> {
        let _counting = self.counting.lock().await;
        let mut batch = Batch::default();
        batch.forget_upload(file);
        self.store.commit(batch).await?;
        self.known().remove(&file);
        Ok(())
    }
}
