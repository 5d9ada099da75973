//! What people asked of a sweep, where it is too large for the state: an object named by what it holds, and by the term of
//! the leader that wrote it. It is written before the transaction that names it.
//!
//! A leader that is replaced removes none that a later one names: a leader names objects of earlier terms only if its records
//! named them when it began to lead, and removes, at its own beginning, those of earlier terms that no record named then. One
//! that was replaced by an extension, or whose transaction failed, stays until then.

use super::{ArtifactError, Artifacts, names};
use bytes::Bytes;
use domain::SweepId;
use domain::data::ContentHash;
use object_store::path::Path as ObjectPath;
use object_store::{Error, ObjectStoreExt};
use sha2::{Digest, Sha256};
use std::path::Path;

/// The path of a sweep's spec of that content, but for the term at its end.
///
/// # Errors
/// The sweep's id is empty.
pub(crate) fn spec_path(sweep: &SweepId, bytes: &[u8]) -> Result<String, ArtifactError> {
    names::spec(sweep, hash(bytes), None).map(|path| path.to_string())
}

/// Reads a spec in the directory of a local store.
///
/// # Errors
/// There is none at this path, or it is not what was stored.
pub fn read_spec(root: &Path, path: &str) -> Result<Bytes, ArtifactError> {
    let (object, hash) = names::parse_spec(path)?;
    let file = object.parts().fold(root.to_path_buf(), |file, part| file.join(part.as_ref()));
    let bytes = std::fs::read(file).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => ArtifactError::NotFound(path.into()),
        _ => {
            let error = Error::Generic { store: "LocalFileSystem", source: error.into() };
            ArtifactError::Store { path: path.into(), error }
        }
    })?;
    checked(bytes.into(), &object, hash)
}

impl Artifacts {
    /// Keeps a sweep's spec. Durable when it returns, with the path for [`Artifacts::spec`]; the same again is a success.
    ///
    /// # Errors
    /// The store failed.
    pub async fn keep_spec(&self, sweep: &SweepId, bytes: Bytes) -> Result<String, ArtifactError> {
        let term = self.term.as_ref().map(|term| term.number);
        let object = names::spec(sweep, hash(&bytes), term)?;
        // Again it is the same bytes: nothing is replaced by something else.
        self.store.put(&object, bytes.into()).await.map_err(ArtifactError::written(&object))?;
        Ok(object.to_string())
    }

    /// What was kept at a path.
    ///
    /// # Errors
    /// There is nothing at this path, or it is not what was stored; the store failed.
    pub async fn spec(&self, path: &str) -> Result<Bytes, ArtifactError> {
        let (object, hash) = names::parse_spec(path)?;
        let found = self.store.get(&object).await.map_err(ArtifactError::store(&object))?;
        let bytes = found.bytes().await.map_err(ArtifactError::store(&object))?;
        checked(bytes, &object, hash)
    }
}

fn hash(bytes: &[u8]) -> ContentHash {
    ContentHash(Sha256::digest(bytes).into())
}

fn checked(bytes: Bytes, object: &ObjectPath, announced: ContentHash) -> Result<Bytes, ArtifactError> {
    match hash(&bytes) == announced {
        true => Ok(bytes),
        false => Err(ArtifactError::Damaged(object.to_string())),
    }
}
