//! The group commit: what waits becomes one frame, which is durable before anybody is told.

use super::HistoryError;
use super::index::Index;
use super::segment::{self, Record};
use actor::Scope;
use futures::future::{BoxFuture, FutureExt};
use std::io::{self, ErrorKind};
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};
use tokio::sync::{mpsc, oneshot};

/// The most appends in one frame, so that the first does not wait without bound for the last.
const GROUP: usize = 256;

/// Points to keep, and where to say that they are kept.
#[derive(Debug)]
pub(super) struct Append {
    pub(super) record: Record,
    pub(super) reply: oneshot::Sender<Result<(), HistoryError>>,
}

/// Where frames go: a directory (`files.rs`) or an object store (`objects.rs`).
pub(super) trait Segments: Send {
    /// Keeps a frame; it is durable, and this coordinator may say so, when it returns. After an error the frame may be
    /// there or not.
    fn append<'a>(&'a mut self, frame: &'a [u8]) -> BoxFuture<'a, Result<(), HistoryError>>;

    /// What is to be done between two frames, once everybody has heard that the first is kept.
    fn tidy(&mut self) -> BoxFuture<'_, ()> {
        std::future::ready(()).boxed()
    }
}

/// The one who writes.
pub(super) struct Writer {
    segments: Box<dyn Segments>,
    index: Arc<RwLock<Index>>,
}

impl Writer {
    pub(super) fn new(segments: Box<dyn Segments>, index: Arc<RwLock<Index>>) -> Self {
        Self { segments, index }
    }

    /// Serves appends until every sender is gone, or `stop` is cancelled: then after the group that is being written.
    pub(super) async fn run(mut self, mut inbox: mpsc::Receiver<Append>, stop: Scope) {
        let mut group = Vec::with_capacity(GROUP);
        loop {
            let count = tokio::select! {
                count = inbox.recv_many(&mut group, GROUP) => count,
                () = stop.cancelled() => 0,
            };
            if count == 0 {
                return;
            }
            let (records, replies): (Vec<_>, Vec<_>) = group.drain(..).map(|a| (a.record, a.reply)).unzip();
            let outcome = self.keep(records).await;
            for reply in replies {
                // Whoever asked may be gone; then nobody needs the answer.
                let _ = reply.send(outcome.clone());
            }
            if outcome.is_ok() {
                self.segments.tidy().await;
            }
        }
    }

    /// Makes new points durable, then readable.
    pub(super) async fn keep(&mut self, mut records: Vec<Record>) -> Result<(), HistoryError> {
        self.drop_known(&mut records);
        if records.is_empty() {
            return Ok(());
        }
        let too_large = || io::Error::new(ErrorKind::InvalidInput, "more than 4 GiB of points at once");
        let frame = segment::frame(&records).ok_or_else(too_large);
        self.segments.append(&frame.map_err(HistoryError::io(Path::new("history")))?).await?;
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        records.into_iter().for_each(|record| index.insert(record));
        Ok(())
    }

    /// Drops points that are kept already. Two of one group may still be the same; the index takes the first,
    /// now and when it is read back.
    fn drop_known(&self, records: &mut Vec<Record>) {
        let index = self.index.read().unwrap_or_else(PoisonError::into_inner);
        for Record { trial, attempt, points } in records.iter_mut() {
            points.retain(|point| !index.contains(trial, *attempt, point.step));
        }
        records.retain(|record| !record.points.is_empty());
    }
}

#[cfg(test)]
mod tests;
