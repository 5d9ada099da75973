//! What a coordinator keeps things in: the registry's model, an object store in memory and the history's files, each with
//! a process in front that may be dead, a disk that may be full, and time that a write takes.

use crate::draws::Draws;
use crate::plan::Storage;
use crate::world::World;
use coordinator::history::{Disk, RealDisk, SegmentFile};
use futures::future::{BoxFuture, FutureExt};
use futures::stream::{BoxStream, StreamExt};
use object_store::memory::InMemory;
use object_store::path::Path as ObjectPath;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, UploadPart,
};
use registry::{Entries, Fence, Registry, RegistryError, Write};
use std::io;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// A coordinator's process, as its storage sees it.
#[derive(Clone)]
pub struct Process {
    world: Arc<World>,
    number: u32,
    draws: Arc<Mutex<Draws>>,
    /// Cancelled once it is dead: nothing that it does has an effect then.
    pub dead: CancellationToken,
}

impl std::fmt::Debug for Process {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Process")
    }
}

impl Process {
    pub fn new(world: &Arc<World>, number: u32) -> Self {
        let draws = Draws::new(world.seed, &format!("process {number}"));
        Self {
            world: world.clone(),
            number,
            draws: Arc::new(Mutex::new(draws)),
            dead: CancellationToken::new(),
        }
    }

    /// The time that a write takes before it has its effect, or after.
    async fn takes(&self) {
        let takes = {
            let mut draws = self.draws.lock().unwrap();
            match draws.whole(0, 19) {
                0..=11 => Duration::ZERO,
                12..=17 => draws.millis(1, 50),
                18 => draws.millis(50, 500),
                _ => draws.millis(500, 3000),
            }
        };
        if !takes.is_zero() {
            tokio::time::sleep(takes).await;
        }
    }

    fn refuses(&self, storage: Storage) -> io::Result<()> {
        if self.dead.is_cancelled() {
            return Err(io::Error::other("the process is dead"));
        }
        if self.world.is_full(storage) { Err(io::Error::other("the disk is full")) } else { Ok(()) }
    }
}

impl Registry for Process {
    fn lead(&self, holder: &str) -> BoxFuture<'_, registry::Result<Fence>> {
        self.world.leads.store(self.number, Ordering::Relaxed);
        self.world.truth.lead(holder)
    }

    fn commit(&self, fence: Fence, batch: Vec<Write>) -> BoxFuture<'_, registry::Result<()>> {
        let storage = |error: io::Error| RegistryError::Storage(error.to_string());
        async move {
            self.takes().await;
            if let Err(error) = self.refuses(Storage::Registry) {
                // A write that was said to have failed may be there all the same.
                let is_there = !self.dead.is_cancelled() && self.draws.lock().unwrap().chance(0.2);
                if is_there && self.world.truth.commit(fence, batch.clone()).await.is_ok() {
                    self.world.committed(&batch);
                }
                return Err(storage(error));
            }
            self.world.truth.commit(fence, batch.clone()).await?;
            if self.world.leads.load(Ordering::Relaxed) != self.number {
                self.world.find(format_args!("coordinator {} writes, and leads no more", self.number));
            }
            self.world.committed(&batch);
            self.takes().await;
            match self.dead.is_cancelled() {
                true => Err(RegistryError::Storage("the process is dead".into())),
                false => Ok(()),
            }
        }
        .boxed()
    }

    fn get(&self, key: &str) -> BoxFuture<'_, registry::Result<Option<Vec<u8>>>> {
        self.world.truth.get(key)
    }

    fn list(
        &self,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> BoxFuture<'_, registry::Result<Entries>> {
        self.world.truth.list(prefix, after, limit)
    }

    fn inline_limit(&self) -> Option<usize> {
        self.world.truth.inline_limit()
    }
}

/// The history's disk.
pub struct Segments(pub Process);

struct Segment(Process, Box<dyn SegmentFile>);

impl Disk for Segments {
    fn create(&self, path: &Path) -> io::Result<Box<dyn SegmentFile>> {
        self.0.refuses(Storage::History)?;
        Ok(Box::new(Segment(self.0.clone(), RealDisk.create(path)?)))
    }

    fn sync_dir(&self, _: &Path) -> io::Result<()> {
        self.0.refuses(Storage::History)
    }
}

impl SegmentFile for Segment {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let refused = self.0.refuses(Storage::History);
        if self.0.dead.is_cancelled() {
            return refused;
        }
        // A full disk takes half of it.
        self.1.append(if refused.is_ok() { bytes } else { &bytes[..bytes.len() / 2] })?;
        refused
    }

    fn sync(&mut self) -> io::Result<()> {
        self.0.refuses(Storage::History)
    }
}

/// The object store.
#[derive(Debug, Clone)]
pub struct Objects {
    process: Process,
    inner: Arc<InMemory>,
}

impl Objects {
    pub fn new(process: Process) -> Self {
        Self { inner: process.world.objects.clone(), process }
    }

    fn refuses(&self) -> object_store::Result<()> {
        let refused = self.process.refuses(Storage::Artifacts);
        refused.map_err(|error| object_store::Error::Generic { store: "memory", source: error.into() })
    }
}

impl std::fmt::Display for Objects {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("objects")
    }
}

#[tonic::async_trait]
impl ObjectStore for Objects {
    async fn put_opts(
        &self,
        location: &ObjectPath,
        payload: PutPayload,
        opts: PutOptions,
    ) -> object_store::Result<PutResult> {
        self.process.takes().await;
        self.refuses()?;
        self.inner.put_opts(location, payload, opts).await
    }

    async fn put_multipart_opts(
        &self,
        location: &ObjectPath,
        opts: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        self.refuses()?;
        let upload = self.inner.put_multipart_opts(location, opts).await?;
        Ok(Box::new(Upload(self.clone(), upload)))
    }

    async fn get_opts(&self, location: &ObjectPath, options: GetOptions) -> object_store::Result<GetResult> {
        self.inner.get_opts(location, options).await
    }

    fn delete_stream(
        &self,
        locations: BoxStream<'static, object_store::Result<ObjectPath>>,
    ) -> BoxStream<'static, object_store::Result<ObjectPath>> {
        let objects = self.clone();
        let allowed = locations.map(move |location| {
            // A full disk has room for less.
            let location = location?;
            if objects.process.dead.is_cancelled() {
                objects.refuses()?;
            }
            objects.process.world.deletes(&location);
            Ok(location)
        });
        self.inner.delete_stream(allowed.boxed())
    }

    fn list(&self, prefix: Option<&ObjectPath>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&ObjectPath>) -> object_store::Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(
        &self,
        from: &ObjectPath,
        to: &ObjectPath,
        options: CopyOptions,
    ) -> object_store::Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

#[derive(Debug)]
struct Upload(Objects, Box<dyn MultipartUpload>);

#[tonic::async_trait]
impl MultipartUpload for Upload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        match self.0.refuses() {
            Ok(()) => self.1.put_part(data),
            Err(error) => std::future::ready(Err(error)).boxed(),
        }
    }

    async fn complete(&mut self) -> object_store::Result<PutResult> {
        self.0.process.takes().await;
        self.0.refuses()?;
        self.1.complete().await
    }

    async fn abort(&mut self) -> object_store::Result<()> {
        self.1.abort().await
    }
}
