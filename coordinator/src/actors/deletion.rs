//! Deleting a sweep. One transaction removes its records and leaves a tombstone; then its checkpoints go. What was
//! interrupted goes on at the next start, by the tombstone.

use super::sweep::Tools;
use crate::error::{CoordinatorError, Result};
use crate::store::{Batch, Tombstone};
use domain::SweepId;

/// Removes a sweep's records and metrics, if it is over. Answers with the tombstone that stands in their place; one
/// that stands there already stays. `runs`: its actor is there, which would write its record again.
pub(super) async fn remove_records(tools: &Tools, id: &SweepId, runs: bool) -> Result<Tombstone> {
    let store = &tools.store;
    if let Some(tombstone) = store.tombstone(id).await? {
        return Ok(tombstone);
    }
    let head = store.sweep_head(id).await?.ok_or_else(|| CoordinatorError::not_found("sweep", id))?;
    // One that could not be read when this leader began does not run, and is never over.
    if !head.state.is_terminal() && (runs || !store.is_unreadable(id).await?) {
        let state = "not over; cancel it first, or delete it with --force";
        return Err(CoordinatorError::Over { kind: "sweep", id: id.to_string(), state });
    }
    let tombstone = Tombstone { sweep: id.clone(), deleted_at: tools.clock.now(), completed_at: None };
    let mut batch = Batch::default();
    batch.remove(&head, store.keys_of(id).await?);
    batch.tombstone(&tombstone);
    store.commit(batch).await?;
    tools.history.forget(|sweep| sweep == id);
    tracing::info!(sweep = %id, "deleted its records");
    Ok(tombstone)
}

/// Removes a deleted sweep's checkpoints, and notes in the tombstone that nothing is left.
pub(super) async fn remove_artifacts(tools: &Tools, mut tombstone: Tombstone) -> Result<Tombstone> {
    if tombstone.completed_at.is_none() {
        tools.artifacts.delete_sweep(&tombstone.sweep).await?;
        tombstone.completed_at = Some(tools.clock.now());
        let mut batch = Batch::default();
        batch.tombstone(&tombstone);
        tools.store.commit(batch).await?;
        tracing::info!(sweep = %tombstone.sweep, "deleted its checkpoints");
    }
    Ok(tombstone)
}
