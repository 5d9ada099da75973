//! What is removed: uploaded data that no sweep names, once it is old enough that nobody is about to name it.

use super::{BlobError, Blobs, FILES, TREES, whole_path};
use domain::Timestamp;
use domain::data::ContentHash;
use futures::future::BoxFuture;
use futures::stream::{self, StreamExt, TryStreamExt};
use object_store::ObjectMeta;
use object_store::path::Path as ObjectPath;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// How long data is kept that no sweep names: an upload that was cut off can be gone on with, and the same data submitted
/// again.
pub const KEPT_UNUSED: Duration = Duration::from_secs(24 * 60 * 60);

/// What is left once what nobody needs was removed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Retained {
    /// Files of which anything is stored.
    pub files: BTreeSet<ContentHash>,
    /// Objects that were removed.
    pub removed: usize,
}

impl Blobs {
    /// Removes trees that are not `used` and older than `age`, then files that are in no tree that is left and older than
    /// that. Nothing may be uploaded or named meanwhile: `may` is asked before each removal whether that is still so. What
    /// a leader that was replaced has asked for already may reach the store later, and take data with it that is uploaded
    /// anew just then.
    ///
    /// # Errors
    /// The store failed, or a tree cannot be read, so that it is not known what it needs; calling again goes on. Or what
    /// `may` says.
    pub async fn retain<E: From<BlobError>>(
        &self,
        used: &BTreeSet<ContentHash>,
        now: Timestamp,
        age: Duration,
        may: impl Fn() -> BoxFuture<'static, Result<(), E>> + Send + Sync,
    ) -> Result<Retained, E> {
        let (mut needed, mut retained) = (BTreeSet::new(), Retained::default());
        for object in self.list(TREES).await? {
            let Some(id) = element(&object, 2).and_then(|name| name.parse().ok()) else { continue };
            if used.contains(&id) || !is_older(&object, now, age) {
                needed.extend(self.tree(id).await?.files().iter().map(|file| file.sha256));
            } else {
                may().await?;
                self.delete(&object.location).await?;
                retained.removed += 1;
            }
        }
        let mut files: BTreeMap<ContentHash, Vec<ObjectMeta>> = BTreeMap::new();
        for object in self.list(FILES).await? {
            let Some(file) = element(&object, 2).and_then(|name| name.parse().ok()) else { continue };
            files.entry(file).or_default().push(object);
        }
        for (file, objects) in files {
            if needed.contains(&file) || !objects.iter().all(|object| is_older(object, now, age)) {
                retained.files.insert(file);
                continue;
            }
            may().await?;
            // It is no more before its pieces go.
            self.delete(&whole_path(file)).await?;
            retained.removed += objects.len();
            self.delete_all(objects.into_iter().map(|object| object.location)).await?;
        }
        Ok(retained)
    }

    /// Deletes objects, many at a time where the store can.
    async fn delete_all(
        &self,
        objects: impl Iterator<Item = ObjectPath> + Send + 'static,
    ) -> Result<(), BlobError> {
        let mut deleted = self.store.delete_stream(stream::iter(objects.map(Ok)).boxed());
        while let Some(done) = deleted.next().await {
            match done {
                Ok(_) | Err(object_store::Error::NotFound { .. }) => {}
                Err(error) => return Err(BlobError::store(&ObjectPath::from_iter(FILES))(error)),
            }
        }
        Ok(())
    }

    async fn list(&self, root: [&str; 2]) -> Result<Vec<ObjectMeta>, BlobError> {
        let root = ObjectPath::from_iter(root);
        self.store.list(Some(&root)).try_collect().await.map_err(BlobError::store(&root))
    }
}

/// An element of an object's path.
fn element(object: &ObjectMeta, index: usize) -> Option<String> {
    object.location.parts().nth(index).map(|part| part.as_ref().to_string())
}

fn is_older(object: &ObjectMeta, now: Timestamp, age: Duration) -> bool {
    let written = Timestamp(u64::try_from(object.last_modified.timestamp_millis()).unwrap_or(u64::MAX));
    now.since(written) > age
}
