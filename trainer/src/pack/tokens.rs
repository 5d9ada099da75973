//! The rows of a pack's trials as one sequence of tokens.

use super::Row;
use crate::error::{Result, TrainError};
use std::ops::Range;

/// The tokens of a pass.
#[derive(Default)]
pub(super) struct Tokens {
    pub(super) ids: Vec<u32>,
    /// Each token's place in its row.
    pub(super) positions: Vec<u32>,
    /// Each row's range of tokens.
    pub(super) documents: Vec<Range<usize>>,
    /// Tokens whose next token counts, in order.
    pub(super) predicting: Vec<u32>,
    /// The token that each of them predicts.
    pub(super) wanted: Vec<u32>,
    /// For each trial, its range in `ids` and its range in `wanted`.
    pub(super) trials: Vec<(Range<usize>, Range<usize>)>,
}

impl Tokens {
    /// The trials' rows one after the other; empty rows are left out.
    pub(super) fn new<'a>(trials: impl Iterator<Item = &'a [Row]>, vocab: usize) -> Result<Self> {
        let mut t = Self::default();
        for rows in trials {
            let (tokens, wanted) = (t.ids.len(), t.wanted.len());
            for row in rows.iter().filter(|row| !row.input_ids.is_empty()) {
                t.push(row, vocab)?;
            }
            t.trials.push((tokens..t.ids.len(), wanted..t.wanted.len()));
        }
        Ok(t)
    }

    /// More tokens of one row, `read` of which have been read before. None is a target.
    pub(super) fn following(read: usize, ids: &[u32], vocab: usize) -> Result<Self> {
        let mut t = Self::default();
        t.push(&Row { input_ids: ids.to_vec(), targets: vec![false; ids.len()] }, vocab)?;
        t.positions.iter_mut().for_each(|position| *position += read as u32);
        Ok(t)
    }

    fn push(&mut self, row: &Row, vocab: usize) -> Result<()> {
        let start = self.ids.len();
        for (i, id) in row.input_ids.iter().enumerate() {
            known(*id, vocab)?;
            if i > 0 && row.targets[i] {
                self.predicting.push((start + i - 1) as u32);
                self.wanted.push(*id);
            }
        }
        self.ids.extend(&row.input_ids);
        self.positions.extend(0..row.input_ids.len() as u32);
        self.documents.push(start..self.ids.len());
        Ok(())
    }
}

/// Refuses what is no row of the embedding.
pub(super) fn known(id: u32, vocab: usize) -> Result<()> {
    if (id as usize) < vocab {
        return Ok(());
    }
    Err(TrainError::parameter(
        "dataset_name",
        format!("token id {id} is not below the model's vocab_size {vocab}"),
        "tokenise with the model's own tokenizer",
    ))
}
