//! The checkpoint plane of `AgentService`: files in and out of the object store.

use super::{Answers, Services};
use crate::access::Caller;
use crate::actors::sweep::Standing;
use crate::artifacts::{ArtifactError, Artifacts, FileSpec, Part};
use crate::error::{CoordinatorError, Result};
use crate::trouble::Storage;
use bytes::Bytes;
use domain::{AgentId, Attempt, TrialId, crash};
use futures::{Stream, StreamExt, TryStreamExt};
use proto::v1;
use proto::v1::download_checkpoint_response::Piece as Down;
use proto::v1::upload_checkpoint_request::Piece as Up;
use tonic::{Request, Status, Streaming};

/// Takes a checkpoint in: checked against the assignment, stored, then pointed at.
pub async fn upload(
    services: &Services,
    request: Request<Streaming<v1::UploadCheckpointRequest>>,
) -> std::result::Result<v1::UploadCheckpointResponse, Status> {
    let caller = Caller::of(&request);
    let mut pieces = request.into_inner();
    let Some(Up::Header(header)) = pieces.message().await?.and_then(|m| m.piece) else {
        return Err(CoordinatorError::invalid("header", "must come first").into());
    };
    let (trial, attempt, step) = (TrialId::new(header.trial_id), Attempt(header.attempt), header.step);
    current(services, &trial, attempt, &caller).await?;
    let files = header.files.into_iter().map(file_spec).collect::<Result<_>>()?;
    let begun = services.desk.artifacts.begin(&trial, attempt, step, files);
    let mut upload = begun.map_err(CoordinatorError::from)?;
    while let Some(message) = pieces.message().await? {
        match message.piece {
            Some(Up::Data(data)) => told(services, upload.write(data).await)?,
            _ => return Err(CoordinatorError::invalid("piece", "must be data after the header").into()),
        }
    }
    let stored = told(services, upload.finish().await)?;
    crash::point("checkpoint/stored");
    let response = v1::UploadCheckpointResponse {
        adapter: stored.adapter.clone().unwrap_or_default(),
        resume: stored.resume.clone().unwrap_or_default(),
    };
    let paths: Vec<_> = [&stored.adapter, &stored.resume].into_iter().flatten().cloned().collect();
    let unused = match services.desk.directory.checkpoint(&trial, attempt, step, stored).await {
        // While it was uploaded its attempt ended, or its sweep was deleted.
        Err(error @ (CoordinatorError::Fenced { .. } | CoordinatorError::NotFound { .. })) => {
            services.desk.discard(&trial, paths).await;
            return Err(error.into());
        }
        unused => unused?,
    };
    crash::point("checkpoint/recorded");
    services.desk.artifacts.discard(&trial, unused).await;
    tracing::info!(%trial, %attempt, step, "checkpoint stored");
    Ok(response)
}

/// What came of a write, which people are told of if the disk refused it.
fn told<T>(services: &Services, done: std::result::Result<T, ArtifactError>) -> Result<T> {
    let done = done.map_err(CoordinatorError::from);
    match &done {
        Err(error) if error.is_storage() => services.desk.trouble.failed(Storage::Artifacts, error),
        _ => services.desk.trouble.succeeded(Storage::Artifacts),
    }
    done
}

/// Streams the newest complete checkpoint of a trial to the agent that holds it.
pub async fn download(
    services: &Services,
    request: Request<v1::DownloadCheckpointRequest>,
) -> Result<Answers<v1::DownloadCheckpointResponse>> {
    let caller = Caller::of(&request);
    let request = request.into_inner();
    let (trial, attempt) = (TrialId::new(request.trial_id), Attempt(request.attempt));
    current(services, &trial, attempt, &caller).await?;
    let checkpoint = services.desk.directory.trial(&trial).await?.checkpoint;
    let checkpoint = checkpoint.ok_or_else(|| CoordinatorError::not_found("checkpoint of trial", &trial))?;
    let mut files = Vec::new();
    for path in [&checkpoint.adapter, &checkpoint.resume] {
        let of_part = match services.desk.artifacts.files(path).await {
            // A record points at what is there, but where the state is an older one than the store; or the bucket itself is gone.
            Err(error @ ArtifactError::NotFound(_)) => {
                services.writable().await?;
                services.desk.directory.checkpoint_gone(&trial, attempt, checkpoint.clone()).await?;
                return Err(error.into());
            }
            of_part => of_part?,
        };
        files.extend(of_part.into_iter().map(|file| (path.clone(), file)));
    }
    let header = v1::CheckpointHeader {
        trial_id: trial.to_string(),
        attempt: attempt.0,
        step: checkpoint.step,
        files: files.iter().map(|(_, file)| wire_file(file)).collect(),
    };
    let message = |piece| v1::DownloadCheckpointResponse { piece: Some(piece) };
    let data =
        read(services.desk.artifacts.clone(), files).map_ok(move |(_, data)| message(Down::Data(data)));
    let first = futures::stream::iter([Ok(message(Down::Header(header)))]);
    Ok(Box::pin(first.chain(data.map_err(Status::from))))
}

/// Refuses an attempt that is not current, or that an agent of another token holds.
async fn current(services: &Services, trial: &TrialId, attempt: Attempt, caller: &Caller) -> Result<()> {
    if caller.name().is_some()
        && let Some(agent) = services.desk.directory.trial(trial).await?.trial.agent
    {
        services.desk.owners.check(&AgentId::new(agent), caller)?;
    }
    match services.desk.directory.standing(trial, attempt, None).await? {
        Standing::Current { .. } => Ok(()),
        Standing::Over => Err(CoordinatorError::Fenced { trial: trial.clone(), attempt }),
    }
}

/// The bytes of files, one file after the other, in pieces that fit a message.
pub fn read(
    artifacts: Artifacts,
    files: Vec<(String, FileSpec)>,
) -> impl Stream<Item = Result<(FileSpec, Bytes)>> {
    let open = move |(path, file): (String, FileSpec)| {
        let artifacts = artifacts.clone();
        async move {
            let bytes = artifacts.read(&path, &file.name).await?;
            let named = bytes.map_ok(move |bytes| (file.clone(), bytes)).map_err(CoordinatorError::from);
            Ok::<_, CoordinatorError>(named)
        }
    };
    let pieces = |(file, bytes): (FileSpec, Bytes)| {
        let pieces = (0..bytes.len()).step_by(proto::CHUNK_BYTES).map(move |from| {
            let to = bytes.len().min(from + proto::CHUNK_BYTES);
            Ok((file.clone(), bytes.slice(from..to)))
        });
        futures::stream::iter(pieces)
    };
    futures::stream::iter(files).then(open).try_flatten().map_ok(pieces).try_flatten()
}

fn file_spec(file: v1::CheckpointFile) -> Result<FileSpec> {
    let part = match file.part() {
        v1::CheckpointPart::Adapter => Part::Adapter,
        v1::CheckpointPart::Resume => Part::Resume,
        v1::CheckpointPart::Unspecified => {
            return Err(CoordinatorError::invalid("header.files.part", "is unspecified"));
        }
    };
    let sha256 = file.sha256.try_into();
    let sha256 =
        sha256.map_err(|_| CoordinatorError::invalid("header.files.sha256", "must have 32 bytes"))?;
    Ok(FileSpec { part, name: file.name, bytes: file.bytes, sha256 })
}

fn wire_file(file: &FileSpec) -> v1::CheckpointFile {
    let part = match file.part {
        Part::Adapter => v1::CheckpointPart::Adapter,
        Part::Resume => v1::CheckpointPart::Resume,
        // Of no checkpoint.
        Part::Items => v1::CheckpointPart::Unspecified,
    };
    v1::CheckpointFile {
        part: part.into(),
        name: file.name.clone(),
        bytes: file.bytes,
        sha256: file.sha256.to_vec(),
    }
}
