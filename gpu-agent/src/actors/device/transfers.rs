//! What a device brings to this machine before a trial begins, its uploaded data and the checkpoint to go on from, and the
//! checkpoints that it takes to the coordinator. What fails for now is tried again, after a pause that grows.

use super::super::traced;
use super::{Actor, Assign, Data};
use crate::Assignment;
use crate::cache::{CacheError, Pinned};
use crate::engine::{Checkpoint, How};
use crate::transfer::TransferError;
use domain::data;
use domain::trial::{Failure, FailureClass};
use std::collections::BTreeMap;
use std::time::Duration;

/// The longest pause between two tries of a transfer.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// What became of a transfer.
pub(super) enum Transferred {
    Data(Box<Assign>, Result<Data, CacheError>),
    Down(Box<Assign>, Result<Checkpoint, TransferError>),
    Up(Assignment, Checkpoint, Result<(), TransferError>),
}

impl Actor {
    /// Brings the uploaded data that a trial names to this machine, while others train; then goes on with it.
    pub(super) fn fetch(&mut self, assign: Box<Assign>, failures: u32) {
        let references = data::uploaded(&assign.config, assign.evaluations.as_ref());
        if references.is_empty() {
            return self.go_on(assign);
        }
        if let Some(held) = self.held.get_mut(&assign.assignment) {
            held.failures = failures;
        }
        let (cache, transfers) = (self.cache.clone(), self.transfers.clone());
        self.transfers_under_way.push(Box::pin(async move {
            tokio::time::sleep(pause(failures)).await;
            let work = async {
                let mut data = Data::new();
                for reference in references {
                    let own = data.values().map(|pinned: &Pinned| (pinned.tree(), pinned.bytes()));
                    let own = own.collect::<BTreeMap<_, _>>().values().sum();
                    let pinned = cache.get(&transfers, &reference).await;
                    let pinned = pinned.map_err(|error| error.beside(&reference, own))?;
                    data.insert(reference.to_string(), pinned);
                }
                // After an error nothing stays pinned: it may be what others wait for.
                Ok(data)
            };
            let result = traced::fetch(assign.belongs, work).await;
            Transferred::Data(assign, result)
        }));
    }

    fn fetched(&mut self, assign: Box<Assign>, result: Result<Data, CacheError>) {
        let Some(held) = self.held.get_mut(&assign.assignment) else { return };
        match result {
            Ok(data) => {
                held.data = data;
                self.go_on(assign);
            }
            Err(error) => match error.failure() {
                Some(failure) => self.fail(&assign.assignment, failure),
                None => {
                    let failures = held.failures + 1;
                    let what = format!("its data is not here; trying again: {error}");
                    self.failed_again(&assign.assignment, failures, &what);
                    self.fetch(assign, failures);
                }
            },
        }
    }

    /// Goes on with a trial whose data is here.
    fn go_on(&mut self, assign: Box<Assign>) {
        match assign.resume_step {
            Some(_) => self.download(assign, 0),
            None => self.admit(*assign, None),
        }
    }

    pub(super) fn upload(&mut self, assignment: &Assignment) {
        let Some(held) = self.held.get_mut(assignment) else { return };
        if held.uploading {
            return;
        }
        let Some((checkpoint, before)) = held.newest.take() else { return };
        held.uploading = true;
        let (pause, transfers, spool) = (pause(held.failures), self.transfers.clone(), self.spool.clone());
        let (assignment, belongs) = (assignment.clone(), held.traced.belongs());
        self.transfers_under_way.push(Box::pin(async move {
            tokio::time::sleep(pause).await;
            if !spool.acknowledged(&assignment, before).await {
                // The coordinator may not have these points, and would take the checkpoint behind them.
                let why = "dropped before what was said of it was acknowledged".into();
                return Transferred::Up(assignment, checkpoint, Err(TransferError::Fenced(why)));
            }
            let result = traced::upload(belongs, transfers.upload(&assignment, &checkpoint)).await;
            domain::crash::point("agent/uploaded");
            Transferred::Up(assignment, checkpoint, result)
        }));
    }

    fn download(&mut self, assign: Box<Assign>, failures: u32) {
        if let Some(held) = self.held.get_mut(&assign.assignment) {
            held.failures = failures;
        }
        let (transfers, work_dir) = (self.transfers.clone(), self.home.work_dir(&assign.assignment));
        self.transfers_under_way.push(Box::pin(async move {
            tokio::time::sleep(pause(failures)).await;
            let work = transfers.download(&assign.assignment, &work_dir);
            let result = traced::download(assign.belongs, work).await;
            Transferred::Down(assign, result)
        }));
    }

    pub(super) fn transferred(&mut self, transferred: Transferred) {
        match transferred {
            Transferred::Data(assign, result) => self.fetched(assign, result),
            Transferred::Up(assignment, checkpoint, result) => self.uploaded(&assignment, checkpoint, result),
            Transferred::Down(assign, result) => self.downloaded(assign, result),
        }
    }

    fn uploaded(
        &mut self,
        assignment: &Assignment,
        checkpoint: Checkpoint,
        result: Result<(), TransferError>,
    ) {
        let Some(held) = self.held.get_mut(assignment) else { return checkpoint.remove() };
        held.uploading = false;
        match result {
            Ok(()) => {
                held.failures = 0;
                checkpoint.remove();
            }
            Err(TransferError::Fenced(_)) => return self.stop(assignment, How::Drop, ""),
            Err(TransferError::Later(why)) => {
                held.failures += 1;
                let (failures, step) = (held.failures, checkpoint.step);
                if held.newest.is_some() {
                    checkpoint.remove();
                } else {
                    held.newest = Some((checkpoint, 0));
                }
                let what = format!("the upload of the checkpoint of step {step} failed; trying again: {why}");
                self.failed_again(assignment, failures, &what);
            }
            Err(error @ (TransferError::Refused(_) | TransferError::Io { .. })) => {
                let message = format!("the checkpoint of step {}: {error}", checkpoint.step);
                return self.fail(assignment, Failure { class: FailureClass::Infrastructure, message });
            }
        }
        self.upload(assignment);
        self.conclude(assignment);
    }

    fn downloaded(&mut self, assign: Box<Assign>, result: Result<Checkpoint, TransferError>) {
        let assignment = assign.assignment.clone();
        let Some(held) = self.held.get(&assignment) else {
            return self.home.remove_work_dir(&assignment);
        };
        match result {
            Ok(checkpoint) => self.admit(*assign, Some(checkpoint)),
            Err(TransferError::Fenced(_)) => self.stop(&assignment, How::Drop, ""),
            Err(error @ (TransferError::Later(_) | TransferError::Io { .. })) => {
                let failures = held.failures + 1;
                let what = format!("the download of its checkpoint failed; trying again: {error}");
                self.failed_again(&assignment, failures, &what);
                self.download(assign, failures);
            }
            Err(error) => {
                let message = format!("the checkpoint to go on from: {error}");
                self.fail(&assignment, Failure { class: FailureClass::Infrastructure, message });
            }
        }
    }
}

/// The pause after so many failures.
fn pause(failures: u32) -> Duration {
    if failures == 0 {
        return Duration::ZERO;
    }
    (Duration::from_millis(100) * 2u32.saturating_pow(failures - 1)).min(LONGEST_PAUSE)
}
