//! Data that submitters upload, in an object store, named by what it holds:
//!
//! ```text
//! data/sha256/<hash>/<piece, eight digits>    a file's bytes, 8 MiB a piece but for the last
//! data/sha256/<hash>/whole                    its length
//! data/trees/<id>                             the text that lists a tree's files
//! ```
//!
//! A file without `whole` does not exist; that is written last, once its pieces are what the hash says, and goes first when
//! they are not there any more. So an upload goes
//! on behind the pieces that are there, on any coordinator and in any store that can put, get and list. A tree is stored
//! once its files exist. A leader that starts removes what no sweep names, see [`Blobs::retain`].
//!
//! | file | holds |
//! |---|---|
//! | `mod.rs` | [`Blobs`]: what is there, trees, reading |
//! | `upload.rs` | [`Upload`]: bytes in, checked, gone on with |
//! | `retention.rs` | what is removed, and when |
//! | `inspect.rs` | whether what lies there is what its names say |

mod inspect;
mod retention;
mod upload;

pub use inspect::{Inspected, inspect};
pub use retention::{KEPT_UNUSED, Retained};
pub use upload::Upload;

use crate::error::said;
use bytes::Bytes;
use domain::data::{ContentHash, DataError, Tree};
use futures::stream::{self, Stream, StreamExt, TryStreamExt};
use object_store::path::Path as ObjectPath;
use object_store::{ObjectStore, ObjectStoreExt};
use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// Bytes of a piece, which an upload holds in memory until it is stored. Fixed for ever: what is stored is found by it.
const PIECE: u64 = 8 << 20;

/// Objects that are asked for at a time, where many are.
const AT_ONCE: usize = 16;

/// The first elements of the paths of files and of trees.
const FILES: [&str; 2] = ["data", "sha256"];
const TREES: [&str; 2] = ["data", "trees"];

/// The object that says that a file is whole.
const WHOLE: &str = "whole";

/// Why data was not stored, or cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum BlobError {
    /// An upload begins behind what is there.
    #[error("an upload of {file} goes on at byte {at}, not at {offset}")]
    Behind {
        /// The file.
        file: ContentHash,
        /// Where it goes on.
        at: u64,
        /// Where it would have begun.
        offset: u64,
    },
    /// Fewer bytes came than were announced.
    #[error("{file} ended {missing} bytes early; upload the rest")]
    Short {
        /// The file.
        file: ContentHash,
        /// Bytes that it lacks.
        missing: u64,
    },
    /// The announced length cannot be, or is not that of the file.
    #[error("{file} cannot have {bytes} bytes; announce its own length, a TiB at most")]
    Length {
        /// The file.
        file: ContentHash,
        /// What was announced.
        bytes: u64,
    },
    /// The bytes that came are not those of the hash.
    #[error("the bytes of {file} have the SHA-256 {found}; did the file change? upload it again")]
    Checksum {
        /// What was announced.
        file: ContentHash,
        /// What came.
        found: ContentHash,
    },
    /// Another coordinator stores the same file in other pieces.
    #[error("{file} is being uploaded by somebody else; try again")]
    Busy {
        /// The file.
        file: ContentHash,
    },
    /// Files of a tree are not there.
    #[error("{} of the files are not uploaded, the first is {:?}; upload them first", .0.len(), .0.first())]
    Missing(Vec<String>),
    /// There is no such file or tree.
    #[error("there is no uploaded data {0}")]
    NotFound(ContentHash),
    /// An object is not what this version writes.
    #[error("`{path}` cannot be read: {problem}")]
    Corrupt {
        /// The object.
        path: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The object store failed.
    #[error("`{path}`: {}", said(error))]
    Store {
        /// The object.
        path: String,
        /// What the store said.
        error: object_store::Error,
    },
}

impl BlobError {
    fn store(path: &ObjectPath) -> impl FnOnce(object_store::Error) -> Self {
        let path = path.to_string();
        move |error| Self::Store { path, error }
    }

    fn corrupt(path: &ObjectPath, problem: impl ToString) -> Self {
        Self::Corrupt { path: path.to_string(), problem: problem.to_string() }
    }
}

/// What is there of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum There {
    /// All of it: so many bytes.
    Whole(u64),
    /// Its first pieces: so many.
    Pieces(u64),
}

/// Uploaded data in an object store whose writes are durable when they return. Clones share it.
#[derive(Debug, Clone)]
pub struct Blobs {
    store: Arc<dyn ObjectStore>,
    piece: u64,
    /// One upload a file at a time, so that the second goes on where the first ended. Gone with the last that waits.
    turns: Arc<Mutex<HashMap<ContentHash, Weak<tokio::sync::Mutex<()>>>>>,
}

impl Blobs {
    /// Data in this store.
    pub fn on(store: Arc<dyn ObjectStore>) -> Self {
        Self::in_pieces(store, PIECE)
    }

    /// Data in this store in pieces of another length, for tests.
    pub fn in_pieces(store: Arc<dyn ObjectStore>, piece: u64) -> Self {
        Self { store, piece, turns: Arc::default() }
    }

    /// Which of these files are not there, each once, and how many of its first bytes are.
    ///
    /// # Errors
    /// The store failed.
    pub async fn missing(
        &self,
        files: impl IntoIterator<Item = ContentHash>,
    ) -> Result<Vec<(ContentHash, u64)>, BlobError> {
        let files: BTreeSet<_> = files.into_iter().collect();
        let look = stream::iter(files).map(|file| async move {
            Ok::<_, BlobError>(match self.there(file).await? {
                There::Whole(_) => None,
                There::Pieces(pieces) => Some((file, pieces * self.piece)),
            })
        });
        look.buffered(AT_ONCE).try_filter_map(|found| async move { Ok(found) }).try_collect().await
    }

    /// Makes files a tree; it is durable when this returns. Again, its age begins anew.
    ///
    /// # Errors
    /// A file is not there, or of another length; the store failed.
    pub async fn commit(&self, tree: &Tree) -> Result<ContentHash, BlobError> {
        let look = stream::iter(tree.files().to_vec()).map(|file| async move {
            match self.there(file.sha256).await? {
                There::Whole(bytes) if bytes == file.bytes => Ok(None),
                There::Whole(_) => Err(BlobError::Length { file: file.sha256, bytes: file.bytes }),
                There::Pieces(_) => Ok(Some(file.name)),
            }
        });
        let missing: Vec<_> = look.buffered(AT_ONCE).try_collect().await?;
        let missing: Vec<_> = missing.into_iter().flatten().collect();
        if !missing.is_empty() {
            return Err(BlobError::Missing(missing));
        }
        let (id, path) = (tree.id(), tree_path(tree.id()));
        self.store.put(&path, tree.text().into()).await.map_err(BlobError::store(&path))?;
        Ok(id)
    }

    /// The files of a tree.
    ///
    /// # Errors
    /// There is none of that id, or it cannot be read.
    pub async fn tree(&self, id: ContentHash) -> Result<Tree, BlobError> {
        let path = tree_path(id);
        let text = self.get(&path).await?.ok_or(BlobError::NotFound(id))?;
        let text = String::from_utf8(text.into()).map_err(|error| BlobError::corrupt(&path, error))?;
        let tree = Tree::parse(&text).map_err(|error: DataError| BlobError::corrupt(&path, error))?;
        if tree.id() == id { Ok(tree) } else { Err(BlobError::corrupt(&path, "it is of another tree")) }
    }

    /// A file's bytes from `offset` on, a piece at a time. Whoever receives them checks the hash.
    ///
    /// # Errors
    /// It is not there, or not as long as that.
    pub async fn read(
        &self,
        file: ContentHash,
        offset: u64,
    ) -> Result<impl Stream<Item = Result<Bytes, BlobError>> + use<>, BlobError> {
        let There::Whole(bytes) = self.there(file).await? else { return Err(BlobError::NotFound(file)) };
        if offset > bytes {
            return Err(BlobError::Behind { file, at: bytes, offset });
        }
        let (store, length) = (self.store.clone(), self.piece);
        let end = bytes.div_ceil(length);
        // Nothing is left of it behind its last byte.
        let pieces = if offset == bytes { end..end } else { (offset / length)..end };
        Ok(stream::iter(pieces).then(move |piece| {
            let store = store.clone();
            async move {
                let (path, begins) = (piece_path(file, piece), piece * length);
                let wanted = offset.saturating_sub(begins)..length.min(bytes - begins);
                store.get_range(&path, wanted).await.map_err(BlobError::store(&path))
            }
        }))
    }

    async fn there(&self, file: ContentHash) -> Result<There, BlobError> {
        let path = whole_path(file);
        let whole = self.get(&path).await?;
        let prefix = file_path(file);
        let objects: Vec<_> =
            self.store.list(Some(&prefix)).try_collect().await.map_err(BlobError::store(&prefix))?;
        if let Some(text) = whole {
            let bytes = std::str::from_utf8(&text).ok().and_then(|text| text.parse().ok());
            let pieces = objects.iter().filter(|object| object.location != path).map(|object| object.size);
            match bytes {
                Some(bytes) if bytes == pieces.sum::<u64>() => return Ok(There::Whole(bytes)),
                // Something is lost of it, and an upload mends that.
                _ => self.delete(&path).await?,
            }
        }
        let full = objects.iter().filter(|object| object.size == self.piece);
        let full: BTreeSet<_> = full.map(|object| object.location.clone()).collect();
        let pieces = (0..).take_while(|piece| full.contains(&piece_path(file, *piece))).count();
        Ok(There::Pieces(pieces as u64))
    }

    /// An object's bytes, if it is there.
    async fn get(&self, path: &ObjectPath) -> Result<Option<Bytes>, BlobError> {
        let bytes = match self.store.get(path).await {
            Ok(found) => found.bytes().await,
            Err(object_store::Error::NotFound { .. }) => return Ok(None),
            Err(error) => Err(error),
        };
        bytes.map(Some).map_err(BlobError::store(path))
    }

    async fn delete(&self, path: &ObjectPath) -> Result<(), BlobError> {
        match self.store.delete(path).await {
            Ok(()) | Err(object_store::Error::NotFound { .. }) => Ok(()),
            Err(error) => Err(BlobError::store(path)(error)),
        }
    }

    /// Waits until no other upload of the file is under way here.
    async fn turn(&self, file: ContentHash) -> tokio::sync::OwnedMutexGuard<()> {
        let turn = {
            // Nothing that can panic is done while it is held.
            let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
            turns.retain(|_, turn| turn.strong_count() > 0);
            let turn = turns.get(&file).and_then(Weak::upgrade).unwrap_or_default();
            turns.insert(file, Arc::downgrade(&turn));
            turn
        };
        turn.lock_owned().await
    }
}

fn file_path(file: ContentHash) -> ObjectPath {
    ObjectPath::from_iter([FILES[0], FILES[1], &file.to_string()])
}

fn piece_path(file: ContentHash, piece: u64) -> ObjectPath {
    file_path(file).join(format!("{piece:08}"))
}

fn whole_path(file: ContentHash) -> ObjectPath {
    file_path(file).join(WHOLE)
}

fn tree_path(id: ContentHash) -> ObjectPath {
    ObjectPath::from_iter([TREES[0], TREES[1], &id.to_string()])
}
