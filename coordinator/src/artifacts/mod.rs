//! Checkpoints in an object store: a local directory, or one that all coordinators of a fleet reach.
//!
//! A checkpoint has two parts, the adapter (what people want) and the resume state. A third part lies beside the last
//! adapter of a trial that was asked something: what single documents made of it. A part is a prefix with its
//! files, and a manifest that is written last:
//!
//! ```text
//! sweeps/<sweep>/<number>/adapter-a<attempt>-s<step>/adapter_model.safetensors, …, manifest.json
//! sweeps/<sweep>/<number>/resume-a<attempt>-s<step>/…
//! sweeps/<sweep>/<number>/items-a<attempt>-s<step>/items.json, manifest.json
//! sweeps/<sweep>/spec-<sha256>
//! ```
//!
//! A part without a manifest does not exist. Names carry the attempt and the step and are created only: once a
//! manifest is there, nothing under its prefix changes until [`Artifacts::delete`].
//!
//! The last is what people asked of a sweep, where that is too large for the state (`specs.rs`). It has no manifest: its name
//! says what it holds.
//!
//! A local directory is one process's, by its lock. A remote store has no lock: a leader that was stopped may go on while
//! another leads. There each name ends with the leader's term, `adapter-a<attempt>-s<step>-t<term>`, so that two leaders
//! never write to one name, and a leader records only paths of its own term. What a leader that was replaced still writes
//! is a part that no record can point at, because records are fenced; the next leader removes it. What it still deletes
//! is one of three things, none of which can ever be used again, so that a delete may be as late as it likes:
//!
//! - a checkpoint that a newer one replaced ([`Artifacts::discard`]): the fenced transaction that recorded the newer one
//!   came first, and no later leader records a path of an earlier term;
//! - a deleted sweep's ([`Artifacts::delete_sweep`]): its tombstone is fenced, came first, and ids are not given again;
//! - what no record pointed at when it began to lead ([`Artifacts::delete_all_but`]): of earlier terms alone. Whoever
//!   could have recorded those was fenced off by its election, before it read the records.
//!
//! Nothing remembers an upload of several pieces that was neither finished nor given up because its process died: only
//! the store does, and an expiry rule there ends it (`docs/fleet.md`).
//!
//! | file | holds |
//! |---|---|
//! | `mod.rs` | [`Artifacts`]: reading and deleting parts |
//! | `upload.rs` | [`Upload`]: bytes in, checked, all or nothing |
//! | `items.rs` | scores of single documents, in and out |
//! | `specs.rs` | specs that are too large for the state, in and out |
//! | `names.rs` | which names are allowed, and where they lie |
//! | `cleanup.rs` | what an upload that never finished left behind |
//! | `inspect.rs` | whether what lies there is what the manifests say |

mod cleanup;
mod inspect;
mod items;
mod names;
mod specs;
mod upload;

pub use inspect::{Inspected, inspect};
pub(crate) use names::split_term;
pub use specs::read_spec;
pub(crate) use specs::spec_path;
pub use upload::Upload;

use crate::error::said;
use actor::Scope;
use bytes::Bytes;
use domain::data::{ContentHash, DataError};
use domain::{SweepId, TrialId};
use futures::stream::{self, BoxStream, StreamExt, TryStreamExt};
use object_store::local::LocalFileSystem;
use object_store::path::Path as ObjectPath;
use object_store::{ObjectStore, ObjectStoreExt};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Why a checkpoint was not stored, or cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ArtifactError {
    /// The trial's id has not the form `<sweep>/<number>`.
    #[error("`{0}` is no trial id: it must be <sweep>/<number>")]
    Trial(TrialId),
    /// A file's name is not one that a checkpoint may have.
    #[error(
        "`{0}` cannot be a checkpoint file's name: use ASCII letters, digits and . _ - only, and not {MANIFEST}"
    )]
    Name(String),
    /// Two files of one part have the same name.
    #[error("the file `{0}` is announced twice")]
    Duplicate(String),
    /// A path is not one of a checkpoint's part.
    #[error("`{0}` is no checkpoint's path, and no spec's")]
    Path(String),
    /// More files were announced than a checkpoint may have.
    #[error("{0} files are too many for a checkpoint: at most {MOST_FILES}", MOST_FILES = names::MOST_FILES)]
    TooMany(usize),
    /// No files were announced.
    #[error("a checkpoint needs at least one file")]
    Empty,
    /// The bytes that came are not those announced.
    #[error("`{file}`: SHA-256 is {found}, announced was {announced}; send it again")]
    Checksum {
        /// The file's name.
        file: String,
        /// The announced checksum, in hexadecimal.
        announced: String,
        /// The checksum of what came.
        found: String,
    },
    /// Fewer bytes came than were announced.
    #[error("`{file}` ended {missing} bytes early; send it again")]
    Short {
        /// The first file that is not whole.
        file: String,
        /// Bytes that it lacks.
        missing: u64,
    },
    /// More bytes came than were announced.
    #[error("more bytes came than the announced files have")]
    Long,
    /// The bytes of a stored file are not those that were stored.
    #[error("`{0}` is damaged: it is not what was stored there; restore it from a copy")]
    Damaged(String),
    /// An earlier call on this upload failed.
    #[error("the upload has failed before; begin it again")]
    Failed,
    /// The name is taken by other content.
    #[error("`{0}` is there already, with other content; a checkpoint is never replaced")]
    Exists(String),
    /// There is no such part, or it has no such file.
    #[error("there is no `{0}`")]
    NotFound(String),
    /// A manifest cannot be read.
    #[error("`{path}/{MANIFEST}` cannot be read: {problem}")]
    Manifest {
        /// The part's path.
        path: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The object store failed.
    #[error("`{path}`: {}", said(error))]
    Store {
        /// The object, or the store's root.
        path: String,
        /// What the store said.
        error: object_store::Error,
    },
}

impl ArtifactError {
    fn store(path: impl ToString) -> impl FnOnce(object_store::Error) -> Self {
        let path = path.to_string();
        move |error| match error {
            object_store::Error::NotFound { .. } => Self::NotFound(path),
            error => Self::Store { path, error },
        }
    }

    /// The same of a write: that a bucket or an upload is not there says nothing of the checkpoint.
    fn written(path: impl ToString) -> impl FnOnce(object_store::Error) -> Self {
        let path = path.to_string();
        move |error| Self::Store { path, error }
    }
}

/// The name of a part's manifest.
const MANIFEST: &str = "manifest.json";

/// Bytes that are held in memory on their way, in each direction. Object stores take no less than 5 MiB at a time.
const PIECE: usize = 8 * 1024 * 1024;

/// A checkpoint's half, or what lies beside the last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Part {
    /// The adapter in PEFT's format.
    Adapter,
    /// What training goes on from: moments, step, data position.
    Resume,
    /// What single documents made of the adapter; of no checkpoint.
    Items,
}

impl Part {
    /// Each.
    const ALL: [Self; 3] = [Self::Adapter, Self::Resume, Self::Items];
}

/// A file of a checkpoint, as announced and as stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileSpec {
    /// The part that it belongs to.
    pub part: Part,
    /// Its name within the part.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// Its SHA-256.
    pub sha256: [u8; 32],
}

/// Where a stored checkpoint lies: the paths of its parts, for [`Artifacts::files`] and the rest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Stored {
    /// The adapter's, if files of it were announced.
    pub adapter: Option<String>,
    /// The resume state's, if files of it were announced.
    pub resume: Option<String>,
    /// The items', if files of it were announced.
    pub items: Option<String>,
}

/// What stands in a manifest.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Manifest {
    part: Part,
    /// In the order of their names.
    files: Vec<ManifestFile>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct ManifestFile {
    name: String,
    bytes: u64,
    /// In hexadecimal.
    sha256: String,
}

/// Checkpoints in an object store. Clones share it.
#[derive(Debug, Clone)]
pub struct Artifacts {
    store: Arc<dyn ObjectStore>,
    local: Option<LocalFileSystem>,
    /// Where other leaders may write.
    term: Option<Term>,
    /// Held while a part is published: of two uploads to one name, the second must find the first's manifest.
    publishing: Arc<tokio::sync::Mutex<()>>,
}

/// A leader's time.
#[derive(Debug, Clone)]
struct Term {
    /// What the names of its parts end with.
    number: u64,
    /// Gives up uploads that whoever sent them left.
    scope: Scope,
}

impl Artifacts {
    /// Checkpoints in a local directory, made if it is not there; every write is fsynced, with its directory.
    /// Removes what unfinished uploads left, so one process at a time, and one value of this at a time.
    ///
    /// # Errors
    /// The directory cannot be made or opened.
    pub fn local(root: &Path) -> Result<Self, ArtifactError> {
        let failed = ArtifactError::store(root.display());
        let opened = match std::fs::create_dir_all(root) {
            Ok(()) => LocalFileSystem::new_with_prefix(root),
            Err(error) => {
                Err(object_store::Error::Generic { store: "LocalFileSystem", source: error.into() })
            }
        };
        let store = opened.map_err(failed)?.with_fsync(true).with_automatic_cleanup(true);
        cleanup::remove_unfinished(root);
        Ok(Self { local: Some(store.clone()), ..Self::on(Arc::new(store)) })
    }

    /// Checkpoints in any object store whose writes are durable when they return.
    pub fn on(store: Arc<dyn ObjectStore>) -> Self {
        Self { store, local: None, term: None, publishing: Arc::default() }
    }

    /// The same under a leader's term, in a store where leaders of other terms may write and delete too. Uploads that
    /// are dropped are given up in the store by tasks of `scope`.
    pub fn in_term(self, number: u64, scope: Scope) -> Self {
        Self { term: Some(Term { number, scope }), ..self }
    }

    /// The store itself, for what lies beside the checkpoints.
    pub fn store(&self) -> Arc<dyn ObjectStore> {
        self.store.clone()
    }

    /// The files of a part, in the order of their names.
    ///
    /// # Errors
    /// There is no finished part at this path.
    pub async fn files(&self, path: &str) -> Result<Vec<FileSpec>, ArtifactError> {
        let at = names::parse_part(path)?;
        let Some(Manifest { part, files }) = self.manifest(&at).await? else {
            return Err(ArtifactError::NotFound(path.into()));
        };
        let spec = |file: ManifestFile| {
            let ContentHash(sha256) = file.sha256.parse().map_err(|error: DataError| {
                ArtifactError::Manifest { path: path.into(), problem: error.to_string() }
            })?;
            Ok(FileSpec { part, name: file.name, bytes: file.bytes, sha256 })
        };
        files.into_iter().map(spec).collect()
    }

    /// The bytes of a part's file, in pieces, which are read as they are taken. The last comes only if all of them are
    /// what was stored.
    ///
    /// # Errors
    /// There is no finished part at this path, or it has no such file.
    pub async fn read(
        &self,
        path: &str,
        file: &str,
    ) -> Result<BoxStream<'static, Result<Bytes, ArtifactError>>, ArtifactError> {
        let object = names::parse_part(path)?.join(file);
        let spec = self.files(path).await?.into_iter().find(|spec| spec.name == file);
        let spec = spec.ok_or_else(|| ArtifactError::NotFound(object.to_string()))?;
        let store = self.store.clone();
        let pieces = stream::try_unfold((0, Sha256::new()), move |(from, mut digest)| {
            let (store, object) = (store.clone(), object.clone());
            async move {
                if from == spec.bytes {
                    return Ok(None);
                }
                let to = spec.bytes.min(from + PIECE as u64);
                let piece =
                    store.get_range(&object, from..to).await.map_err(ArtifactError::store(&object))?;
                digest.update(&piece);
                let whole = piece.len() as u64 == to - from;
                if !whole || (to == spec.bytes && <[u8; 32]>::from(digest.clone().finalize()) != spec.sha256)
                {
                    return Err(ArtifactError::Damaged(object.to_string()));
                }
                Ok(Some((piece, (to, digest))))
            }
        });
        Ok(pieces.boxed())
    }

    /// Where a part lies in the file system, if the store is a local directory. Whether it is there and
    /// finished, this does not say.
    pub fn local_path(&self, path: &str) -> Option<PathBuf> {
        let part = names::parse_part(path).ok()?;
        self.local.as_ref()?.path_to_filesystem(&part).ok()
    }

    /// Removes a part: first its manifest, so that it is no more, then its files. One that is not there is no
    /// error. The records must no longer point at it.
    ///
    /// # Errors
    /// The store failed; calling again goes on.
    pub async fn delete(&self, path: &str) -> Result<(), ArtifactError> {
        let part = names::parse_part(path)?;
        domain::crash::point("artifacts/before-delete");
        self.delete_object(part.clone().join(MANIFEST)).await?;
        domain::crash::point("artifacts/manifest-deleted");
        self.delete_objects(path, self.store.list(Some(&part)).map_ok(|object| object.location).boxed()).await
    }

    /// [`Artifacts::delete`] of parts that a trial's record no longer points at. What cannot be removed is logged, and
    /// goes at the next start.
    pub async fn discard(&self, trial: &TrialId, paths: impl IntoIterator<Item = String>) {
        for path in paths {
            if let Err(error) = self.delete(&path).await {
                tracing::warn!(%trial, path, %error, "a checkpoint that nothing needs could not be deleted");
            }
        }
    }

    /// Removes every part and every spec whose path is not among these, and what is left of uploads that never finished; in a
    /// store with other leaders those of earlier terms. Nothing may be uploaded meanwhile in this term: a part or a spec is
    /// stored before a record points at it.
    ///
    /// # Errors
    /// The store failed; calling again goes on.
    pub async fn delete_all_but(&self, used: &BTreeSet<String>) -> Result<(), ArtifactError> {
        let own = self.term.as_ref().map_or(u64::MAX, |term| term.number);
        let is_unused = |path: &str| names::split_term(path).1 < own && !used.contains(path);
        let (mut parts, mut specs) = (BTreeSet::new(), Vec::new());
        for object in self.objects(&names::root()).await? {
            let Some((part, _)) = object.as_ref().rsplit_once('/') else { continue };
            if names::parse_part(part).is_ok() {
                if is_unused(part) {
                    parts.insert(part.to_string());
                }
            } else if names::parse_spec(object.as_ref()).is_ok() && is_unused(object.as_ref()) {
                specs.push(object);
            }
        }
        for part in parts {
            self.delete(&part).await?;
            tracing::info!(part, "removed a checkpoint that no record points at");
        }
        for spec in specs {
            tracing::info!(%spec, "removing a spec that no record points at");
            self.delete_object(spec).await?;
        }
        Ok(())
    }

    /// Removes everything of a sweep: first the manifests, so that no part is there any more, then the rest.
    ///
    /// # Errors
    /// The store failed; calling again goes on.
    pub async fn delete_sweep(&self, sweep: &SweepId) -> Result<(), ArtifactError> {
        let prefix = names::sweep(sweep)?;
        let objects = self.objects(&prefix).await?.into_iter();
        let (manifests, rest) = objects.partition::<Vec<_>, _>(|object| object.filename() == Some(MANIFEST));
        for objects in [manifests, rest] {
            self.delete_objects(prefix.as_ref(), stream::iter(objects.into_iter().map(Ok)).boxed()).await?;
        }
        Ok(())
    }

    /// Everything below a path.
    async fn objects(&self, below: &ObjectPath) -> Result<Vec<ObjectPath>, ArtifactError> {
        let listed = self.store.list(Some(below)).map_ok(|object| object.location).try_collect();
        listed.await.map_err(ArtifactError::store(below))
    }

    /// Deletes objects, in any order.
    async fn delete_objects(
        &self,
        below: &str,
        objects: BoxStream<'static, object_store::Result<ObjectPath>>,
    ) -> Result<(), ArtifactError> {
        let mut deleted = self.store.delete_stream(objects);
        while let Some(done) = deleted.next().await {
            match done {
                Ok(_) | Err(object_store::Error::NotFound { .. }) => {}
                Err(error) => return Err(ArtifactError::store(below)(error)),
            }
        }
        Ok(())
    }

    async fn delete_object(&self, object: ObjectPath) -> Result<(), ArtifactError> {
        match self.store.delete(&object).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(ArtifactError::store(object)(error)),
        }
    }

    /// A part's manifest, if it is there.
    async fn manifest(&self, part: &ObjectPath) -> Result<Option<Manifest>, ArtifactError> {
        let object = part.clone().join(MANIFEST);
        let bytes = match self.store.get(&object).await {
            Ok(found) => found.bytes().await,
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            Err(error) => Err(error),
        };
        let bytes = bytes.map_err(ArtifactError::store(&object))?;
        let parsed = serde_json::from_slice(&bytes);
        parsed
            .map(Some)
            .map_err(|error| ArtifactError::Manifest { path: part.to_string(), problem: error.to_string() })
    }
}
