//! Attention of texts that share their beginnings.

use super::{Heads, attention, cpu, gather};
use crate::error::Result;
use candle_core::Tensor;
use std::ops::Range;

/// A run of tokens that goes on after others, as another run may do too.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Branch {
    /// The runs before it, the first of them first.
    pub seen: Vec<Range<usize>>,
    /// Its own tokens.
    pub own: Range<usize>,
}

impl Branch {
    /// All runs of its text.
    pub fn runs(&self) -> impl Iterator<Item = &Range<usize>> {
        self.seen.iter().chain([&self.own])
    }

    /// Tokens before its own.
    pub fn before(&self) -> usize {
        self.seen.iter().map(Range::len).sum()
    }
}

/// [`attention`] of texts that share their beginnings: each token sees its branch's runs up to itself. The branches'
/// own tokens are all tokens, in order.
pub fn branched_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    branches: &[Branch],
    heads: Heads,
) -> Result<Tensor> {
    if cpu::has(q) {
        return cpu::attention::branched(q, k, v, branches, heads);
    }
    // Each text written out; what it shares is attended to more than once, and only its own is kept.
    let (mut rows, mut documents, mut own) = (Vec::<u32>::new(), Vec::new(), Vec::<u32>::new());
    for branch in branches {
        let start = rows.len();
        branch.runs().for_each(|run| rows.extend(run.start as u32..run.end as u32));
        own.extend((rows.len() - branch.own.len()) as u32..rows.len() as u32);
        documents.push(start..rows.len());
    }
    let [q, k, v] = [gather(q, &rows)?, gather(k, &rows)?, gather(v, &rows)?];
    gather(&attention(&q, &k, &v, &documents, heads)?, &own)
}
