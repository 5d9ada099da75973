//! The calls of an upload, made again while the server cannot be reached: what came stays, and an upload goes on behind it.

use crate::Failure;
use crate::client::{Connection, ServerArgs};
use crate::output::say;
use domain::data::{ContentHash, Tree};
use proto::convert::data::{files, hash, to_hash};
use proto::status::{QUOTA_REASON, STORAGE_REASON};
use proto::v1;
use proto::v1::upload_file_request::Piece;
use std::path::Path;
use std::time::Duration;
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};
use tonic_types::StatusExt;

/// The first and the longest pause between two tries.
const PAUSES: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));

/// How long a server is waited for that takes nothing.
const PATIENCE: Duration = Duration::from_secs(600);

/// Messages that may wait for the network.
const WAITING: usize = 4;

/// Calls a server, and whoever leads after it.
pub(super) struct Sender<'a> {
    server: &'a ServerArgs,
    first: &'a Connection,
    again: Option<Connection>,
    waited: Duration,
}

/// Why a call did not succeed.
enum Refused {
    Call(Status),
    /// Another try would end likewise.
    Here(Failure),
}

impl From<Status> for Refused {
    fn from(status: Status) -> Self {
        Self::Call(status)
    }
}

impl<'a> Sender<'a> {
    /// Calls over this connection as long as it lasts.
    pub(super) fn new(server: &'a ServerArgs, first: &'a Connection) -> Self {
        Self { server, first, again: None, waited: Duration::ZERO }
    }

    fn connection(&self) -> &Connection {
        self.again.as_ref().unwrap_or(self.first)
    }

    /// Which files the server lacks, and from which byte on.
    pub(super) async fn missing(
        &mut self,
        asked: Vec<ContentHash>,
    ) -> Result<Vec<(ContentHash, u64)>, Failure> {
        let request = v1::FindMissingRequest { sha256: asked.into_iter().map(hash).collect() };
        let missing = loop {
            match self.connection().data().find_missing(request.clone()).await {
                Ok(answer) => break answer.into_inner().missing,
                Err(status) => self.wait(status).await?,
            }
        };
        let known = |file: v1::MissingFile| Ok((to_hash("sha256", &file.sha256)?, file.offset));
        let known: Result<_, proto::convert::ConvertError> = missing.into_iter().map(known).collect();
        known.map_err(Failure::failed)
    }

    /// Uploads a file, of which the server has the first `from` bytes. `sent` hears how many it was given.
    pub(super) async fn file(
        &mut self,
        path: &Path,
        file: ContentHash,
        bytes: u64,
        mut from: u64,
        sent: &dyn Fn(u64),
    ) -> Result<(), Failure> {
        loop {
            match self.try_file(path, file, bytes, from, sent).await {
                Ok(()) => {
                    self.waited = Duration::ZERO;
                    return Ok(());
                }
                Err(Refused::Here(failure)) => return Err(failure),
                Err(Refused::Call(status)) if status.code() == Code::DataLoss => {
                    return Err(super::changed(path));
                }
                Err(Refused::Call(status)) => self.wait(status).await?,
            }
            match self.missing(vec![file]).await?.pop() {
                None => return Ok(()),
                Some((_, at)) => {
                    if at > from {
                        self.waited = Duration::ZERO;
                    }
                    from = at;
                }
            }
        }
    }

    async fn try_file(
        &self,
        path: &Path,
        file: ContentHash,
        bytes: u64,
        from: u64,
        sent: &dyn Fn(u64),
    ) -> Result<(), Refused> {
        let (messages, stream) = mpsc::channel(WAITING);
        let mut client = self.connection().data();
        let call = client.upload_file(ReceiverStream::new(stream));
        let header = v1::UploadFileHeader { sha256: hash(file), bytes, offset: from };
        let read = send(path, header, messages, sent);
        let (read, answer) = tokio::join!(read, call);
        read.map_err(Refused::Here)?;
        answer?;
        Ok(())
    }

    /// Has files that are there be a tree.
    pub(super) async fn commit(&mut self, tree: &Tree) -> Result<(), Failure> {
        let request = v1::CommitTreeRequest { files: files(tree) };
        let id = loop {
            match self.connection().data().commit_tree(request.clone()).await {
                Ok(answer) => break answer.into_inner().id,
                // A file is gone again.
                Err(status) if status.code() == Code::FailedPrecondition => return Err(status.into()),
                Err(status) => self.wait(status).await?,
            }
        };
        match id == hash(tree.id()) {
            true => Ok(()),
            false => Err(Failure::failed("the server names the upload otherwise; is it of another version?")),
        }
    }

    /// Waits before another try, where one may succeed, and finds whoever leads then.
    async fn wait(&mut self, status: Status) -> Result<(), Failure> {
        if !may_pass(&status) || self.waited >= PATIENCE {
            return Err(status.into());
        }
        if self.waited.is_zero() {
            say!("the upload was cut off ({}); going on as soon as the server answers", status.message());
        }
        let pause = (self.waited + PAUSES.0).min(PAUSES.1);
        tokio::time::sleep(pause).await;
        self.waited += pause;
        if let Some(connection) = Connection::again(self.server).await {
            self.again = Some(connection);
        }
        Ok(())
    }
}

/// Whether what refused a call may pass by itself.
fn may_pass(status: &Status) -> bool {
    let reason = status.get_error_details().error_info().map(|info| info.reason.clone());
    match status.code() {
        // A full disk needs a person.
        Code::Unavailable => reason.as_deref() != Some(STORAGE_REASON),
        // Somebody else's upload of the same file moved on.
        Code::FailedPrecondition => true,
        // Too many calls are fewer soon; a quota needs a person.
        Code::ResourceExhausted => reason.as_deref() != Some(QUOTA_REASON),
        // A connection that breaks makes a status of its own, without the details that the server's have.
        Code::Unknown | Code::Cancelled | Code::Internal => reason.is_none(),
        _ => false,
    }
}

/// Sends a file's bytes. Ends early, without an error, if the server has answered already.
async fn send(
    path: &Path,
    header: v1::UploadFileHeader,
    messages: mpsc::Sender<v1::UploadFileRequest>,
    sent: &dyn Fn(u64),
) -> Result<(), Failure> {
    let unreadable = |error: std::io::Error| super::unreadable(path, &error);
    let message = |piece| v1::UploadFileRequest { piece: Some(piece) };
    let (mut at, bytes) = (header.offset, header.bytes);
    let mut file = File::open(path).await.map_err(unreadable)?;
    file.seek(std::io::SeekFrom::Start(at)).await.map_err(unreadable)?;
    if messages.send(message(Piece::Header(header))).await.is_err() {
        return Ok(());
    }
    while at < bytes {
        let mut piece = Vec::new();
        let most = (bytes - at).min(proto::CHUNK_BYTES as u64);
        (&mut file).take(most).read_to_end(&mut piece).await.map_err(unreadable)?;
        if piece.is_empty() {
            return Err(super::changed(path));
        }
        at += piece.len() as u64;
        if messages.send(message(Piece::Data(piece.into()))).await.is_err() {
            return Ok(());
        }
        sent(at);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::status::RpcError;

    #[test]
    fn what_may_pass() {
        for (status, want) in [
            (Status::unavailable("connection refused"), true),
            (RpcError::Standby(Ok(None)).into(), true),
            (RpcError::Storage("full".into()).into(), false),
            (Status::unknown("h2 protocol error"), true),
            (Status::internal("broken pipe"), true),
            (RpcError::Internal("defect".into()).into(), false),
            (RpcError::Precondition("file", "x".into(), "goes on at byte 5".into()).into(), true),
            (RpcError::Denied("viewer".into()).into(), false),
            (
                RpcError::Exhausted {
                    client: "c".into(),
                    why: "calls".into(),
                    retry: Duration::from_secs(1),
                }
                .into(),
                true,
            ),
            (RpcError::Quota("namespace a".into(), "full".into()).into(), false),
            (RpcError::Invalid(vec![("files".into(), "are wrong".into())]).into(), false),
        ] {
            assert_eq!(may_pass(&status), want, "{status:?}");
        }
    }
}
