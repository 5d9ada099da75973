//! A file's way into the store: piece by piece, gone on with after a cut, whole once its hash is right.

use super::{BlobError, Blobs, There, piece_path, whole_path};
use bytes::{Bytes, BytesMut};
use domain::data::{ContentHash, MOST_BYTES};
use object_store::path::Path as ObjectPath;
use object_store::{ObjectStore, PutMode};
use sha2::{Digest, Sha256};
use tokio::sync::OwnedMutexGuard;

/// An upload under way. Dropped, the pieces that are stored stay, and the next goes on behind them.
#[derive(Debug)]
pub struct Upload {
    blobs: Blobs,
    file: ContentHash,
    bytes: u64,
    /// Pieces that are stored.
    pieces: u64,
    /// Bytes that come again although they are stored.
    skip: u64,
    /// What came and is not stored: a piece and a message at most.
    held: BytesMut,
    digest: Sha256,
    /// Others wait for it.
    _turn: OwnedMutexGuard<()>,
}

impl Blobs {
    /// Begins an upload of a file of that length, whose bytes come from `offset` on; `None` if all of it is there. Waits
    /// while another of the same file is under way.
    ///
    /// # Errors
    /// The length cannot be, the offset is behind what is there, or the store failed.
    pub async fn begin(
        &self,
        file: ContentHash,
        bytes: u64,
        offset: u64,
    ) -> Result<Option<Upload>, BlobError> {
        if bytes > MOST_BYTES {
            return Err(BlobError::Length { file, bytes });
        }
        let turn = self.turn(file).await;
        let mut pieces = match self.there(file).await? {
            There::Whole(there) if there == bytes => return Ok(None),
            There::Whole(_) => return Err(BlobError::Length { file, bytes }),
            There::Pieces(pieces) => pieces,
        };
        if pieces * self.piece > bytes {
            // Of an upload that announced another length for the same hash; one of the two is wrong.
            self.remove_pieces(file, pieces).await?;
            pieces = 0;
        }
        let at = pieces * self.piece;
        if offset > at {
            return Err(BlobError::Behind { file, at, offset });
        }
        let mut digest = Sha256::new();
        for piece in 0..pieces {
            let path = piece_path(file, piece);
            let stored = self.get(&path).await?;
            digest.update(stored.ok_or_else(|| BlobError::corrupt(&path, "it is gone"))?);
        }
        let (skip, held) = (at - offset, BytesMut::new());
        Ok(Some(Upload { blobs: self.clone(), file, bytes, pieces, skip, held, digest, _turn: turn }))
    }

    /// Removes the pieces of an upload that went wrong, unless another coordinator has had the file come to be meanwhile.
    async fn remove_pieces(&self, file: ContentHash, pieces: u64) -> Result<(), BlobError> {
        if self.get(&whole_path(file)).await?.is_some() {
            return Ok(());
        }
        for piece in (0..pieces).rev() {
            self.delete(&piece_path(file, piece)).await?;
        }
        Ok(())
    }

    /// Creates an object. One that is there with the same bytes, from a moment before a crash, is as good.
    async fn create(&self, file: ContentHash, path: &ObjectPath, bytes: Bytes) -> Result<(), BlobError> {
        match self.store.put_opts(path, bytes.clone().into(), PutMode::Create.into()).await {
            Ok(_) => Ok(()),
            Err(object_store::Error::AlreadyExists { .. }) => match self.get(path).await? {
                Some(there) if there == bytes => Ok(()),
                _ => Err(BlobError::Busy { file }),
            },
            Err(error) => Err(BlobError::store(path)(error)),
        }
    }
}

impl Upload {
    /// Takes the next bytes.
    ///
    /// # Errors
    /// There are more than were announced, or the store failed. What is stored stays.
    pub async fn write(&mut self, mut data: Bytes) -> Result<(), BlobError> {
        let again = self.skip.min(data.len() as u64);
        self.skip -= again;
        let data = data.split_off(again as usize);
        if self.came() + data.len() as u64 > self.bytes {
            return Err(BlobError::Length { file: self.file, bytes: self.bytes });
        }
        self.digest.update(&data);
        self.held.extend_from_slice(&data);
        // The last piece waits for the hash, so that no wrong end of a file is ever stored.
        let piece = self.blobs.piece as usize;
        while self.held.len() > piece {
            self.store_piece(piece).await?;
        }
        Ok(())
    }

    /// Checks that it is whole and what its hash says, then has it exist; it is durable when this returns. Its last call:
    /// other uploads of the file wait until it is dropped.
    ///
    /// # Errors
    /// Bytes are missing, or they are others than the hash says: then nothing of it stays. Or the store failed.
    pub async fn finish(&mut self) -> Result<(), BlobError> {
        let file = self.file;
        if let Some(missing @ 1..) = self.bytes.checked_sub(self.came()) {
            return Err(BlobError::Short { file, missing });
        }
        let found = ContentHash(self.digest.clone().finalize().into());
        if found != file {
            self.blobs.remove_pieces(file, self.pieces).await?;
            return Err(BlobError::Checksum { file, found });
        }
        if !self.held.is_empty() {
            self.store_piece(self.held.len()).await?;
        }
        self.blobs.create(file, &whole_path(file), self.bytes.to_string().into()).await
    }

    /// Bytes that are stored or held.
    fn came(&self) -> u64 {
        self.pieces * self.blobs.piece + self.held.len() as u64
    }

    async fn store_piece(&mut self, length: usize) -> Result<(), BlobError> {
        let path = piece_path(self.file, self.pieces);
        let piece = self.held.split_to(length).freeze();
        self.blobs.create(self.file, &path, piece).await?;
        self.pieces += 1;
        Ok(())
    }
}
