//! What single documents made of a trial's adapter: a part of one file, [`FILE`], a JSON array of [`ItemScores`]. It is far
//! larger than what the registry is for, and read for reports alone.

use super::{ArtifactError, Artifacts, FileSpec, Part};
use bytes::Bytes;
use domain::trial::ItemScores;
use domain::{Attempt, TrialId};
use futures::TryStreamExt;
use sha2::{Digest, Sha256};

/// The part's file.
const FILE: &str = "items.json";

impl Artifacts {
    /// Keeps what single documents made of a trial after a step. Durable when it returns, with the path for
    /// [`Artifacts::items`]; the same again is a success.
    ///
    /// # Errors
    /// The store failed, or has others of this attempt and step.
    pub async fn keep_items(
        &self,
        trial: &TrialId,
        attempt: Attempt,
        step: u64,
        items: &[ItemScores],
    ) -> Result<String, ArtifactError> {
        let problem = |error: serde_json::Error| ArtifactError::Manifest {
            path: trial.to_string(),
            problem: error.to_string(),
        };
        let bytes = Bytes::from(serde_json::to_vec(items).map_err(problem)?);
        let (length, sha256) = (bytes.len() as u64, Sha256::digest(&bytes).into());
        let file = FileSpec { part: Part::Items, name: FILE.into(), bytes: length, sha256 };
        let mut upload = self.begin(trial, attempt, step, vec![file])?;
        upload.write(bytes).await?;
        // Its one file is of that part.
        upload.finish().await?.items.ok_or(ArtifactError::Empty)
    }

    /// What was kept at a path.
    ///
    /// # Errors
    /// There is nothing at this path, or it cannot be read.
    pub async fn items(&self, path: &str) -> Result<Vec<ItemScores>, ArtifactError> {
        let pieces: Vec<Bytes> = self.read(path, FILE).await?.try_collect().await?;
        serde_json::from_slice(&pieces.concat()).map_err(|_| ArtifactError::Damaged(format!("{path}/{FILE}")))
    }
}
