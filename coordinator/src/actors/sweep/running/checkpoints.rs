//! Checkpoints that came to the object store, and those that are gone from it.

use super::RunningSweep;
use crate::actors::message::{StopReason, ToAgent};
use crate::actors::sweep::ledger::Standing;
use crate::artifacts::Stored;
use crate::error::Result;
use crate::store::Checkpoint;
use domain::Attempt;

impl RunningSweep {
    /// A checkpoint is in the object store. Answers with the paths that nothing points at any more.
    pub(super) async fn checkpoint(
        &mut self,
        number: u32,
        attempt: Attempt,
        step: u64,
        stored: Stored,
    ) -> Result<Vec<String>> {
        match self.standing(number, attempt)? {
            Standing::Over => self.ledger.unused(number, stored),
            Standing::Current { .. } => {
                let trial = &self.ledger.get(number)?.trial;
                let curve = self.tools.history.curve(&trial.id, &trial.attempts).await?;
                self.ledger.checkpoint(number, step, stored, &curve)
            }
        }
    }

    /// The checkpoint that an attempt was to go on from is not in the object store any more: it ends, and the next goes on without.
    pub(super) async fn checkpoint_gone(
        &mut self,
        number: u32,
        attempt: Attempt,
        gone: &Checkpoint,
    ) -> Result<()> {
        let standing = self.standing(number, attempt)?;
        let record = self.ledger.get(number)?;
        // Whoever asked twice is heard once.
        if standing == Standing::Over || record.checkpoint.as_ref() != Some(gone) {
            return Ok(());
        }
        let trial = record.trial.id.clone();
        let why = format!("its checkpoint of step {} is not in the store any more", gone.step);
        tracing::warn!(%trial, %attempt, resume = gone.resume, "{why}");
        // The agent is told before it may be given the next attempt.
        let stop = ToAgent::Stop(trial.clone(), attempt, StopReason::Fenced);
        self.tools.dispatcher.send(trial.clone(), attempt, stop).await?;
        self.release(number, trial, attempt, false, None).await?;
        self.why.insert(number, why);
        self.ledger.checkpoint_gone(number, gone, self.now())
    }
}
