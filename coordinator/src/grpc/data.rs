//! `DataService`: what submitters upload, and agents fetch.

use super::{Answers, Services};
use crate::access::Caller;
use crate::blobs::BlobError;
use crate::error::{CoordinatorError, Result};
use crate::trouble::Storage;
use domain::data::{MOST_FILES, Reference};
use futures::TryStreamExt;
use proto::convert::data::{files, hash, to_hash, to_tree};
use proto::v1;
use proto::v1::data_service_server::DataService;
use proto::v1::upload_file_request::Piece;
use serde_json::{Map, Value};
use tonic::{Request, Response, Status, Streaming};

#[tonic::async_trait]
impl DataService for Services {
    async fn find_missing(
        &self,
        request: Request<v1::FindMissingRequest>,
    ) -> std::result::Result<Response<v1::FindMissingResponse>, Status> {
        let asked = request.into_inner().sha256;
        if asked.len() > MOST_FILES {
            let problem = format!("are {}, above {MOST_FILES}; ask in parts", asked.len());
            return Err(CoordinatorError::invalid("sha256", problem).into());
        }
        let asked = asked.iter().map(|bytes| to_hash("sha256", bytes));
        let asked = asked.collect::<std::result::Result<Vec<_>, _>>()?;
        let missing = self.blobs.missing(asked).await.map_err(CoordinatorError::from)?;
        let missing =
            missing.into_iter().map(|(file, offset)| v1::MissingFile { sha256: hash(file), offset });
        Ok(Response::new(v1::FindMissingResponse { missing: missing.collect() }))
    }

    async fn upload_file(
        &self,
        request: Request<Streaming<v1::UploadFileRequest>>,
    ) -> std::result::Result<Response<v1::UploadFileResponse>, Status> {
        self.writable().await?;
        let caller = Caller::of(&request);
        let mut pieces = request.into_inner();
        let Some(Piece::Header(header)) = pieces.message().await?.and_then(|message| message.piece) else {
            return Err(CoordinatorError::invalid("header", "must come first").into());
        };
        let file = to_hash("header.sha256", &header.sha256)?;
        let begun = self.told(self.blobs.begin(file, header.bytes, header.offset).await)?;
        if let Some(mut upload) = begun {
            let (namespace, uploads) = (caller.namespace(), &self.desk.uploads);
            let most = self.access.limit(namespace).max_upload_bytes;
            uploads.count(namespace, file, header.bytes, most).await?;
            while let Some(message) = pieces.message().await? {
                match message.piece {
                    Some(Piece::Data(data)) => self.told(upload.write(data).await)?,
                    _ => {
                        return Err(
                            CoordinatorError::invalid("piece", "must be data after the header").into()
                        );
                    }
                }
            }
            let done = upload.finish().await;
            if let Err(BlobError::Checksum { .. }) = &done {
                // Nothing of it stayed, and nobody else has begun: the upload still has its turn.
                uploads.forget(file).await?;
            }
            self.told(done)?;
            tracing::info!(%file, bytes = header.bytes, "a file was uploaded");
        }
        Ok(Response::new(v1::UploadFileResponse {}))
    }

    async fn commit_tree(
        &self,
        request: Request<v1::CommitTreeRequest>,
    ) -> std::result::Result<Response<v1::CommitTreeResponse>, Status> {
        let tree = to_tree(request.into_inner().files)?;
        let id = self.told(self.blobs.commit(&tree).await)?;
        Ok(Response::new(v1::CommitTreeResponse { id: hash(id) }))
    }

    async fn get_tree(
        &self,
        request: Request<v1::GetTreeRequest>,
    ) -> std::result::Result<Response<v1::GetTreeResponse>, Status> {
        let id = to_hash("id", &request.into_inner().id)?;
        let tree = self.blobs.tree(id).await.map_err(CoordinatorError::from)?;
        Ok(Response::new(v1::GetTreeResponse { files: files(&tree) }))
    }

    type DownloadFileStream = Answers<v1::DownloadFileResponse>;

    async fn download_file(
        &self,
        request: Request<v1::DownloadFileRequest>,
    ) -> std::result::Result<Response<Self::DownloadFileStream>, Status> {
        let request = request.into_inner();
        let file = to_hash("sha256", &request.sha256)?;
        let pieces = self.blobs.read(file, request.offset).await.map_err(CoordinatorError::from)?;
        let messages = pieces.map_ok(|piece| {
            let starts = (0..piece.len()).step_by(proto::CHUNK_BYTES);
            let chunk = move |from: usize| piece.slice(from..piece.len().min(from + proto::CHUNK_BYTES));
            futures::stream::iter(starts.map(move |from| Ok(v1::DownloadFileResponse { data: chunk(from) })))
        });
        let messages = messages.map_err(|error| Status::from(CoordinatorError::from(error))).try_flatten();
        Ok(Response::new(Box::pin(messages)))
    }
}

impl Services {
    /// What came of a write, which people are told of if the store refused it.
    fn told<T>(&self, done: std::result::Result<T, BlobError>) -> Result<T> {
        let done = done.map_err(CoordinatorError::from);
        match &done {
            Err(error) if error.is_storage() => self.desk.trouble.failed(Storage::Artifacts, error),
            _ => self.desk.trouble.succeeded(Storage::Artifacts),
        }
        done
    }

    /// Refuses a sweep that names data which was not uploaded, or is of another kind.
    pub(super) async fn uploaded(&self, document: &Map<String, Value>) -> Result<()> {
        let mut fields = Vec::new();
        for named in config::paths::named(document) {
            // What is no reference was refused before.
            let Ok(reference) = named.name.parse::<Reference>() else { continue };
            let problem = match self.blobs.tree(reference.tree).await {
                Ok(tree) if reference.fits(&tree) => continue,
                Ok(_) => format!("{reference} is no file of that name; a directory has a slash at its end"),
                Err(BlobError::NotFound(_)) => {
                    format!(
                        "{reference} was not uploaded, or was removed since; `lorafleet submit` uploads it"
                    )
                }
                Err(error) => return Err(error.into()),
            };
            fields.push((format!("spec.{}", named.at), problem));
        }
        if fields.is_empty() { Ok(()) } else { Err(CoordinatorError::Invalid { fields }) }
    }
}
