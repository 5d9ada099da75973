//! Generation: each token goes through the layers once; its keys and values are kept.

use super::pass::{Cache, Pass};
use super::sample::Sampler;
use super::segment::Segment;
use super::tokens::Tokens;
use super::{head, segments};
use crate::error::Result;
use crate::lora::Adapter;
use crate::model::Base;
use candle_core::Tensor;

/// Continues a prompt greedily, until `eos` or `max_new_tokens`, or the model's length, is reached. Returns
/// the new tokens alone; an empty prompt has no continuation.
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
    generate_until(base, adapter, prompt, max_new_tokens, eos.as_slice(), &mut |_| Ok(false))
}

/// As [`generate`], until one of the tokens of `ends`, and also until `is_over` says so of the new tokens, which it is asked after each. The one that ended it is
/// among them.
///
/// # Errors
/// Those of [`generate`], and those of `is_over`.
pub fn generate_until(
    base: &Base,
    adapter: Option<&Adapter>,
    prompt: &[u32],
    max_new_tokens: usize,
    ends: &[u32],
    is_over: &mut dyn FnMut(&[u32]) -> Result<bool>,
) -> Result<Vec<u32>> {
    sample_until(base, adapter, prompt, max_new_tokens, ends, &Sampler::greedy(), is_over)
}

/// As [`generate_until`], each token the one that `sampler` chooses.
///
/// # Errors
/// Those of [`generate_until`].
pub fn sample_until(
    base: &Base,
    adapter: Option<&Adapter>,
    prompt: &[u32],
    max_new_tokens: usize,
    ends: &[u32],
    sampler: &Sampler,
    is_over: &mut dyn FnMut(&[u32]) -> Result<bool>,
) -> Result<Vec<u32>> {
    let room = base.config.max_position_embeddings.saturating_sub(prompt.len());
    let wanted = if prompt.is_empty() { 0 } else { max_new_tokens.min(room) };
    let mut new = Vec::with_capacity(wanted);
    let mut cache = Cache::default();
    // The adapter as passes use it, for the longest of them: the prompt's.
    let segments = segments(base, adapter, prompt.len(), 1)?;
    while new.len() < wanted {
        let unread = new.last().map_or(prompt, std::slice::from_ref);
        let next = sampler.choose(&read(base, &segments, unread, &mut cache)?, new.len())?;
        if ends.contains(&next) {
            break;
        }
        new.push(next);
        if is_over(&new)? {
            break;
        }
    }
    Ok(new)
}

/// Reads more of a text, and returns the logits `[vocab]` of the token after it.
fn read(base: &Base, segments: &[Segment<&Adapter>], ids: &[u32], cache: &mut Cache) -> Result<Tensor> {
    let tokens = Tokens::following(cache.length(), ids, base.config.vocab_size)?;
    let pass = Pass::new(base, &tokens, 0)?;
    let last = pass.continued(&tokens.ids, segments, cache)?.narrow(0, ids.len() - 1, 1)?;
    Ok(head::logits(base, &last, segments)?.squeeze(0)?)
}
