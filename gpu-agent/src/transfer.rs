//! Checkpoints to and from the coordinator, and uploaded data from it, by their own calls on their own connections, so that
//! a large file never stands before a heartbeat.

use crate::Assignment;
use crate::cache::Source;
use crate::engine::{Checkpoint, CheckpointDirs};
use crate::find::Finder;
use bytes::Bytes;
use domain::data::{ContentHash, Tree};
use futures::stream::{BoxStream, StreamExt};
use proto::convert::data::{hash, to_tree};
use proto::v1::agent_service_client::AgentServiceClient;
use proto::v1::data_service_client::DataServiceClient;
use proto::v1::{self, CheckpointPart};
use security::Line;
use sha2::{Digest, Sha256};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use telemetry::grpc::Traced;
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Uri;
use tonic::{Code, Status, Streaming};
use tonic_types::StatusExt;
use v1::download_checkpoint_response::Piece as Down;
use v1::upload_checkpoint_request::Piece as Up;

/// Pieces of an upload that may wait for the network.
const PIECES: usize = 4;

/// Why a transfer did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// The assignment is not current any more.
    #[error("the assignment is not current: {0}")]
    Fenced(String),
    /// The coordinator cannot be reached, or cannot take it now; try again.
    #[error("{0}")]
    Later(String),
    /// Another try would end likewise.
    #[error("{0}")]
    Refused(String),
    /// A local file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl From<Status> for TransferError {
    fn from(status: Status) -> Self {
        let text = security::explain(&status);
        let text = text.unwrap_or_else(|| format!("{}: {}", status.code(), status.message()));
        match status.code() {
            // Our own defect, which another try finds again. A connection that breaks makes a status of its own, without the
            // details that the coordinator's have.
            Code::Internal if status.get_details_error_info().is_some() => Self::Refused(text),
            // A trial that is gone is as little ours as one that was given to somebody else.
            Code::Aborted | Code::NotFound => Self::Fenced(text),
            Code::InvalidArgument | Code::FailedPrecondition | Code::OutOfRange | Code::Unimplemented => {
                Self::Refused(text)
            }
            _ => Self::Later(text),
        }
    }
}

pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> TransferError + '_ {
    move |source| TransferError::Io { path: path.into(), source }
}

/// The checkpoint plane. Each transfer has a connection of its own, with certificates that are read anew.
#[derive(Clone)]
pub struct Transfers {
    finder: Finder,
    /// The coordinator of the session; clones share it.
    to: Arc<Mutex<Option<Uri>>>,
}

impl Transfers {
    /// Transfers to the coordinator that [`Transfers::follow`] names, reached as the finder reaches it.
    pub fn new(finder: Finder) -> Self {
        Self { finder, to: Arc::default() }
    }

    /// Transfers to that coordinator from now on.
    pub fn follow(&self, coordinator: &Uri) {
        *self.to() = Some(coordinator.clone());
    }

    fn to(&self) -> MutexGuard<'_, Option<Uri>> {
        // Nothing that can panic is done while it is held.
        self.to.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn client(&self) -> Result<AgentServiceClient<Traced<Line>>, TransferError> {
        Ok(AgentServiceClient::new(self.line()?))
    }

    fn line(&self) -> Result<Traced<Line>, TransferError> {
        let to = self.to().clone();
        let to = to.ok_or_else(|| TransferError::Later("no coordinator was found yet".into()))?;
        let line = self.finder.again(&to).and_then(|endpoint| self.finder.line(endpoint.connect_lazy()));
        let line = line.map_err(|error| TransferError::Later(error.to_string()))?;
        Ok(Traced::client(line, &to))
    }

    /// Uploads a checkpoint. When it returns, the checkpoint is durable and the trial's record points at it. Answers with
    /// its bytes.
    ///
    /// # Errors
    /// See [`TransferError`].
    pub async fn upload(
        &self,
        assignment: &Assignment,
        checkpoint: &Checkpoint,
    ) -> Result<u64, TransferError> {
        let (files, paths) = files_of(&checkpoint.dirs).await?;
        let bytes = files.iter().map(|file| file.bytes).sum();
        let header = v1::CheckpointHeader {
            trial_id: assignment.trial.to_string(),
            attempt: assignment.attempt.0,
            step: checkpoint.step,
            files,
        };
        let (pieces, stream) = mpsc::channel(PIECES);
        let mut client = self.client()?;
        let call = client.upload_checkpoint(ReceiverStream::new(stream));
        let (sent, answer) = tokio::join!(send(header, paths, pieces), call);
        sent?;
        answer?;
        Ok(bytes)
    }

    /// Downloads the trial's newest checkpoint into a work folder.
    ///
    /// # Errors
    /// See [`TransferError`].
    pub async fn download(
        &self,
        assignment: &Assignment,
        work_dir: &Path,
    ) -> Result<Checkpoint, TransferError> {
        let request = v1::DownloadCheckpointRequest {
            trial_id: assignment.trial.to_string(),
            attempt: assignment.attempt.0,
        };
        let answer = self.client()?.download_checkpoint(request).await;
        let mut stream = answer.map_err(of_checkpoint)?.into_inner();
        let Some(Down::Header(header)) = next_piece(&mut stream).await? else {
            return Err(TransferError::Refused("the checkpoint came without its header".into()));
        };
        let dirs = CheckpointDirs::within(work_dir, header.step);
        for dir in [&dirs.adapter, &dirs.resume] {
            tokio::fs::create_dir_all(dir).await.map_err(io(dir))?;
        }
        for file in &header.files {
            receive(&mut stream, file, &target(&dirs, file)?).await?;
        }
        Ok(Checkpoint { step: header.step, dirs })
    }
}

impl Source for Transfers {
    async fn tree(&self, id: ContentHash) -> Result<Option<Tree>, TransferError> {
        let request = v1::GetTreeRequest { id: hash(id) };
        match DataServiceClient::new(self.line()?).get_tree(request).await {
            Ok(response) => {
                let tree = to_tree(response.into_inner().files);
                tree.map(Some).map_err(|error| TransferError::Later(error.to_string()))
            }
            Err(status) if status.code() == Code::NotFound => Ok(None),
            Err(status) => Err(status.into()),
        }
    }

    async fn file(
        &self,
        file: ContentHash,
        offset: u64,
    ) -> Result<BoxStream<'static, Result<Bytes, TransferError>>, TransferError> {
        let request = v1::DownloadFileRequest { sha256: hash(file), offset };
        let stream = DataServiceClient::new(self.line()?).download_file(request).await.map_err(of_data)?;
        let pieces = stream.into_inner().map(|piece| piece.map(|piece| piece.data).map_err(of_data));
        Ok(pieces.boxed())
    }
}

/// What a refusal of data means: no assignment is concerned, and what is not there or damaged is so at the next try, too.
fn of_data(status: Status) -> TransferError {
    match (status.code(), TransferError::from(status)) {
        (Code::NotFound | Code::DataLoss, TransferError::Fenced(why) | TransferError::Later(why)) => {
            TransferError::Refused(why)
        }
        (_, TransferError::Fenced(why)) => TransferError::Later(why),
        (_, error) => error,
    }
}

/// What a refusal of a checkpoint to go on from means: one that is damaged or gone is so at the next try, too, and says nothing
/// of the assignment.
fn of_checkpoint(status: Status) -> TransferError {
    let resource = status.get_details_resource_info();
    let gone = resource.is_some_and(|resource| resource.resource_type.starts_with("checkpoint"));
    match (status.code(), TransferError::from(status)) {
        (Code::NotFound, TransferError::Fenced(why)) if gone => TransferError::Refused(why),
        (Code::DataLoss, TransferError::Later(why)) => TransferError::Refused(why),
        (_, error) => error,
    }
}

async fn next_piece(
    stream: &mut Streaming<v1::DownloadCheckpointResponse>,
) -> Result<Option<Down>, TransferError> {
    Ok(stream.message().await.map_err(of_checkpoint)?.and_then(|response| response.piece))
}

/// The files of both folders, by part and name, and where they lie.
async fn files_of(dirs: &CheckpointDirs) -> Result<(Vec<v1::CheckpointFile>, Vec<PathBuf>), TransferError> {
    let (mut files, mut paths) = (Vec::new(), Vec::new());
    for (part, dir) in [(CheckpointPart::Adapter, &dirs.adapter), (CheckpointPart::Resume, &dirs.resume)] {
        let mut names = Vec::new();
        let mut entries = tokio::fs::read_dir(dir).await.map_err(io(dir))?;
        while let Some(entry) = entries.next_entry().await.map_err(io(dir))? {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
        names.sort();
        for name in names {
            let path = dir.join(&name);
            let (bytes, sha256) = digest(&path).await?;
            files.push(v1::CheckpointFile { part: part.into(), name, bytes, sha256 });
            paths.push(path);
        }
    }
    Ok((files, paths))
}

/// A file's length and SHA-256.
async fn digest(path: &Path) -> Result<(u64, Vec<u8>), TransferError> {
    let mut file = File::open(path).await.map_err(io(path))?;
    let (mut hash, mut bytes) = (Sha256::new(), 0);
    while let Some(piece) = read_piece(&mut file, path).await? {
        hash.update(&piece);
        bytes += piece.len() as u64;
    }
    Ok((bytes, hash.finalize().to_vec()))
}

/// The next piece of a file, of the largest size that a message may have; `None` at its end.
async fn read_piece(file: &mut File, path: &Path) -> Result<Option<Bytes>, TransferError> {
    let mut piece = Vec::new();
    file.take(proto::CHUNK_BYTES as u64).read_to_end(&mut piece).await.map_err(io(path))?;
    Ok((!piece.is_empty()).then(|| piece.into()))
}

/// Sends a header and its files' bytes. Ends early, without an error, if the receiver has answered already.
async fn send(
    header: v1::CheckpointHeader,
    paths: Vec<PathBuf>,
    pieces: mpsc::Sender<v1::UploadCheckpointRequest>,
) -> Result<(), TransferError> {
    let message = |piece| v1::UploadCheckpointRequest { piece: Some(piece) };
    if pieces.send(message(Up::Header(header))).await.is_err() {
        return Ok(());
    }
    for path in paths {
        let mut file = File::open(&path).await.map_err(io(&path))?;
        while let Some(piece) = read_piece(&mut file, &path).await? {
            if pieces.send(message(Up::Data(piece))).await.is_err() {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Where a file of a download goes. Its name comes from the network and must not lead out of its folder.
fn target(dirs: &CheckpointDirs, file: &v1::CheckpointFile) -> Result<PathBuf, TransferError> {
    let dir = match file.part() {
        CheckpointPart::Adapter => &dirs.adapter,
        CheckpointPart::Resume => &dirs.resume,
        CheckpointPart::Unspecified => {
            return Err(TransferError::Refused(format!("{}: belongs to no part", file.name)));
        }
    };
    let mut parts = Path::new(&file.name).components();
    match (parts.next(), parts.next()) {
        (Some(std::path::Component::Normal(name)), None) if name == file.name.as_str() => Ok(dir.join(name)),
        _ => Err(TransferError::Refused(format!("{:?} is no file's name", file.name))),
    }
}

async fn receive(
    stream: &mut Streaming<v1::DownloadCheckpointResponse>,
    file: &v1::CheckpointFile,
    path: &Path,
) -> Result<(), TransferError> {
    let mut out = File::create(path).await.map_err(io(path))?;
    let (mut hash, mut bytes) = (Sha256::new(), 0);
    while bytes < file.bytes {
        let Some(Down::Data(piece)) = next_piece(stream).await? else {
            return Err(TransferError::Later(format!("{}: cut off at byte {bytes}", file.name)));
        };
        hash.update(&piece);
        bytes += piece.len() as u64;
        out.write_all(&piece).await.map_err(io(path))?;
    }
    out.flush().await.map_err(io(path))?;
    if bytes != file.bytes || hash.finalize().as_slice() != file.sha256 {
        return Err(TransferError::Later(format!("{}: other bytes than its SHA-256 says", file.name)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::status::RpcError;

    #[test]
    fn names_stay_in_their_folder() {
        let dirs = CheckpointDirs::within(Path::new("work"), 3);
        let file = |part: CheckpointPart, name: &str| v1::CheckpointFile {
            part: part.into(),
            name: name.into(),
            ..v1::CheckpointFile::default()
        };
        for (part, name, want) in [
            (CheckpointPart::Adapter, "a.json", Some("work/adapter-3/a.json")),
            (CheckpointPart::Resume, "a.json", Some("work/resume-3/a.json")),
            (CheckpointPart::Unspecified, "a.json", None),
            (CheckpointPart::Adapter, "../a", None),
            (CheckpointPart::Adapter, "b/a", None),
            (CheckpointPart::Adapter, "b/", None),
            (CheckpointPart::Adapter, "/a", None),
            (CheckpointPart::Adapter, "..", None),
            (CheckpointPart::Adapter, ".", None),
            (CheckpointPart::Adapter, "", None),
        ] {
            assert_eq!(target(&dirs, &file(part, name)).ok(), want.map(PathBuf::from), "{name:?}");
        }
    }

    #[test]
    fn what_a_status_means() {
        let class = |error| match error {
            TransferError::Fenced(_) => "fenced",
            TransferError::Later(_) => "later",
            TransferError::Refused(_) => "refused",
            TransferError::Io { .. } => "io",
        };
        let bare = |code| Status::new(code, "");
        let gone = |kind| RpcError::NotFound(kind, "x".into()).into();
        // Of an upload, and of the download of a checkpoint.
        for (status, up, down) in [
            (bare(Code::Aborted), "fenced", "fenced"),
            (bare(Code::NotFound), "fenced", "fenced"),
            (gone("trial"), "fenced", "fenced"),
            (gone("checkpoint"), "fenced", "refused"),
            (gone("checkpoint of trial"), "fenced", "refused"),
            (bare(Code::InvalidArgument), "refused", "refused"),
            (bare(Code::Unavailable), "later", "later"),
            (bare(Code::ResourceExhausted), "later", "later"),
            (bare(Code::DataLoss), "later", "refused"),
            (bare(Code::Internal), "later", "later"),
            (RpcError::Internal("a manifest".into()).into(), "refused", "refused"),
            (RpcError::Storage("a full disk".into()).into(), "later", "later"),
            (bare(Code::Unknown), "later", "later"),
        ] {
            let found = (class(status.clone().into()), class(of_checkpoint(status.clone())));
            assert_eq!(found, (up, down), "{status:?}");
        }
    }
}
