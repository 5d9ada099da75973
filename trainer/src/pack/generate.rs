//! Greedy generation.

use super::logits;
use crate::error::Result;
use crate::lora::Adapter;
use crate::model::Base;

/// Continues a prompt greedily, until `eos` or `max_new_tokens`, or the model's length, is reached. Returns
/// the new tokens alone.
///
/// # Errors
/// A token id is no row of the embedding; the device runs out of memory.
pub fn generate(
    base: &Base,
    adapter: Option<&Adapter>,
    prompt: &[u32],
    max_new_tokens: usize,
    eos: Option<u32>,
) -> Result<Vec<u32>> {
    let mut ids = prompt.to_vec();
    while ids.len() < (prompt.len() + max_new_tokens).min(base.config.max_position_embeddings) {
        let logits = logits(base, adapter, &ids)?;
        let next = logits.get(ids.len() - 1)?.argmax(0)?.to_scalar::<u32>()?;
        if Some(next) == eos {
            break;
        }
        ids.push(next);
    }
    Ok(ids.split_off(prompt.len()))
}
