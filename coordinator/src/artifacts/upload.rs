//! A checkpoint's way into the store: bytes in, checked, all or nothing.

use super::{
    ArtifactError, Artifacts, FileSpec, MANIFEST, Manifest, ManifestFile, PIECE, Part, Stored, names,
};
use bytes::Bytes;
use domain::data::ContentHash;
use domain::{Attempt, TrialId, crash};
use object_store::path::Path as ObjectPath;
use object_store::{MultipartUpload, ObjectStoreExt, PutMode, PutPayload};
use sha2::{Digest, Sha256};
use std::collections::VecDeque;

/// A checkpoint under way. Nothing of it can be read before [`Upload::finish`] returns; dropping it, or an
/// error, leaves nothing that counts.
#[derive(Debug)]
pub struct Upload {
    artifacts: Artifacts,
    parts: Vec<PartPlan>,
    /// Files whose bytes have not begun to come, in order.
    waiting: VecDeque<FileSpec>,
    /// The file whose bytes are coming.
    open: Option<OpenFile>,
    /// Files that came whole, not yet visible.
    staged: Vec<StagedFile>,
    failed: bool,
}

#[derive(Debug)]
struct PartPlan {
    path: ObjectPath,
    manifest: Manifest,
}

#[derive(Debug)]
struct StagedFile {
    part: Part,
    object: ObjectPath,
    upload: Box<dyn MultipartUpload>,
}

#[derive(Debug)]
struct OpenFile {
    spec: FileSpec,
    missing: u64,
    digest: Sha256,
    piece: Vec<Bytes>,
    held: usize,
    object: ObjectPath,
    upload: Box<dyn MultipartUpload>,
}

impl Artifacts {
    /// Begins a checkpoint of these files, whose bytes come in this order.
    ///
    /// # Errors
    /// A name is not allowed, or there are no files.
    pub fn begin(
        &self,
        trial: &TrialId,
        attempt: Attempt,
        step: u64,
        files: Vec<FileSpec>,
    ) -> Result<Upload, ArtifactError> {
        names::check(&files)?;
        let mut parts = Vec::new();
        for part in Part::ALL {
            let manifest = Manifest::of(part, &files);
            if !manifest.files.is_empty() {
                let term = self.term.as_ref().map(|term| term.number);
                parts.push(PartPlan { path: names::part(trial, attempt, step, part, term)?, manifest });
            }
        }
        let (artifacts, waiting) = (self.clone(), files.into());
        Ok(Upload { artifacts, parts, waiting, open: None, staged: Vec::new(), failed: false })
    }
}

impl Upload {
    /// Takes the next bytes of the files, which come one after the other; a piece may end one and begin the
    /// next. Some 8 MiB are held in memory.
    ///
    /// # Errors
    /// A file's checksum is not the announced one, there are too many bytes, or the store failed. The upload
    /// is over then.
    pub async fn write(&mut self, data: Bytes) -> Result<(), ArtifactError> {
        if self.failed {
            return Err(ArtifactError::Failed);
        }
        let outcome = self.take(data).await;
        if outcome.is_err() {
            self.abort().await;
        }
        outcome
    }

    /// Checks that every file came whole, then makes the checkpoint visible; it is durable when this returns.
    /// If the same content is there already, that is a success.
    ///
    /// # Errors
    /// Bytes are missing, the name is taken by other content, or the store failed.
    pub async fn finish(mut self) -> Result<Stored, ArtifactError> {
        if self.failed {
            return Err(ArtifactError::Failed);
        }
        let outcome = self.publish().await;
        if outcome.is_err() {
            self.abort().await;
        }
        outcome
    }

    async fn take(&mut self, mut data: Bytes) -> Result<(), ArtifactError> {
        while !data.is_empty() {
            self.open_next().await?;
            let file = self.open.as_mut().ok_or(ArtifactError::Long)?;
            let length = file.missing.min(data.len() as u64) as usize;
            file.push(data.split_to(length)).await?;
            self.stage_whole().await?;
        }
        Ok(())
    }

    /// Opens the next file that wants bytes, if none is open; empty ones on the way are staged.
    async fn open_next(&mut self) -> Result<(), ArtifactError> {
        while self.open.is_none() {
            let Some(spec) = self.waiting.pop_front() else { return Ok(()) };
            let part = self.parts.iter().find(|plan| plan.manifest.part == spec.part);
            // Every part that a file names was planned.
            let part = part.ok_or_else(|| ArtifactError::NotFound(spec.name.clone()))?;
            let object = part.path.clone().join(spec.name.as_str());
            let begun = self.artifacts.store.put_multipart(&object).await;
            let upload = begun.map_err(ArtifactError::written(&object))?;
            let (missing, digest) = (spec.bytes, Sha256::new());
            self.open = Some(OpenFile { spec, missing, digest, piece: Vec::new(), held: 0, object, upload });
            self.stage_whole().await?;
        }
        Ok(())
    }

    /// Checks and puts aside the open file if all its bytes are here.
    async fn stage_whole(&mut self) -> Result<(), ArtifactError> {
        if let Some(file) = self.open.as_mut()
            && file.missing == 0
        {
            file.flush().await?;
            file.check()?;
            let staged =
                |OpenFile { spec, object, upload, .. }| StagedFile { part: spec.part, object, upload };
            self.staged.extend(self.open.take().map(staged));
        }
        Ok(())
    }

    /// A part that is there already, from a call whose answer was lost, is left alone; a crash between two
    /// manifests leaves one part there and one missing.
    async fn publish(&mut self) -> Result<Stored, ArtifactError> {
        self.open_next().await?;
        if let Some(file) = &self.open {
            return Err(ArtifactError::Short { file: file.spec.name.clone(), missing: file.missing });
        }
        let publishing = self.artifacts.publishing.clone();
        let _one_at_a_time = publishing.lock().await;
        let mut missing = Vec::new();
        for plan in &self.parts {
            match self.artifacts.manifest(&plan.path).await? {
                None => missing.push(plan),
                Some(there) if there == plan.manifest => {}
                Some(_) => return Err(ArtifactError::Exists(plan.path.to_string())),
            }
        }
        for plan in missing {
            for file in self.staged.iter_mut().filter(|file| file.part == plan.manifest.part) {
                crash::point("artifacts/before-file");
                file.upload.complete().await.map_err(ArtifactError::written(&file.object))?;
            }
            crash::point("artifacts/before-manifest");
            plan.write_manifest(&self.artifacts).await?;
            crash::point("artifacts/after-manifest");
            self.staged.retain(|file| file.part != plan.manifest.part);
        }
        // Of a part that was there already.
        self.abort().await;
        let of = |part| {
            self.parts.iter().find(|plan| plan.manifest.part == part).map(|plan| plan.path.to_string())
        };
        Ok(Stored { adapter: of(Part::Adapter), resume: of(Part::Resume), items: of(Part::Items) })
    }

    /// Gives up what was begun.
    async fn abort(&mut self) {
        self.failed = true;
        give_up(self.unfinished()).await;
    }

    fn unfinished(&mut self) -> Vec<Box<dyn MultipartUpload>> {
        let open = self.open.take().map(|file| file.upload);
        self.staged.drain(..).map(|file| file.upload).chain(open).collect()
    }
}

/// Whoever sent it has gone.
impl Drop for Upload {
    fn drop(&mut self) {
        let uploads = self.unfinished();
        if let Some(term) = self.artifacts.term.as_ref().filter(|_| !uploads.is_empty()) {
            term.scope.spawn("upload given up", give_up(uploads));
        }
    }
}

/// What remains counts for nothing, so that an error here says nothing new.
async fn give_up(uploads: Vec<Box<dyn MultipartUpload>>) {
    for mut upload in uploads {
        let _ = upload.abort().await;
    }
}

impl PartPlan {
    /// The moment from which the part exists.
    async fn write_manifest(&self, artifacts: &Artifacts) -> Result<(), ArtifactError> {
        let problem = |error: serde_json::Error| ArtifactError::Manifest {
            path: self.path.to_string(),
            problem: error.to_string(),
        };
        let bytes = serde_json::to_vec_pretty(&self.manifest).map_err(problem)?;
        let object = self.path.clone().join(MANIFEST);
        match artifacts.store.put_opts(&object, bytes.into(), PutMode::Create.into()).await {
            Ok(_) => Ok(()),
            Err(error @ object_store::Error::AlreadyExists { .. }) => {
                match artifacts.manifest(&self.path).await? {
                    // The store was asked twice, because its first answer was lost.
                    Some(there) if there == self.manifest => Ok(()),
                    // Someone else's process wrote to this store in between.
                    Some(_) => Err(ArtifactError::Exists(self.path.to_string())),
                    // S3 says so, too, of a name that is being written.
                    None => Err(ArtifactError::written(object)(error)),
                }
            }
            Err(error) => Err(ArtifactError::written(object)(error)),
        }
    }
}

impl Manifest {
    fn of(part: Part, files: &[FileSpec]) -> Self {
        let of_part = files.iter().filter(|file| file.part == part);
        let mut files: Vec<_> = of_part
            .map(|file| ManifestFile {
                name: file.name.clone(),
                bytes: file.bytes,
                sha256: ContentHash(file.sha256).to_string(),
            })
            .collect();
        files.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        Self { part, files }
    }
}

impl OpenFile {
    async fn push(&mut self, data: Bytes) -> Result<(), ArtifactError> {
        self.digest.update(&data);
        self.missing -= data.len() as u64;
        self.held += data.len();
        self.piece.push(data);
        if self.held >= PIECE { self.flush().await } else { Ok(()) }
    }

    async fn flush(&mut self) -> Result<(), ArtifactError> {
        if self.held == 0 {
            return Ok(());
        }
        self.held = 0;
        let piece: PutPayload = self.piece.drain(..).collect();
        self.upload.put_part(piece).await.map_err(ArtifactError::written(&self.object))
    }

    fn check(&self) -> Result<(), ArtifactError> {
        let found: [u8; 32] = self.digest.clone().finalize().into();
        if found == self.spec.sha256 {
            return Ok(());
        }
        Err(ArtifactError::Checksum {
            file: self.spec.name.clone(),
            announced: ContentHash(self.spec.sha256).to_string(),
            found: ContentHash(found).to_string(),
        })
    }
}
