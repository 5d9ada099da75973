//! Attention of texts that share their beginnings.

use super::{Documents, Heads, attention, cpu, gather};
use crate::error::Result;
use candle_core::Tensor;
use std::ops::Range;
use std::sync::OnceLock;

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

/// The branches of a pass, for all of its layers: their own tokens are all tokens, in order.
#[derive(Debug)]
pub struct Branches<'a> {
    branches: &'a [Branch],
    /// Made once it is needed.
    written_out: OnceLock<WrittenOut>,
}

/// Texts one after the other, each with all of its runs.
#[derive(Debug)]
struct WrittenOut {
    /// The token at each place.
    rows: Vec<u32>,
    documents: Documents,
    /// The places of the branches' own tokens.
    own: Vec<u32>,
}

impl<'a> Branches<'a> {
    /// Those.
    pub fn new(branches: &'a [Branch]) -> Self {
        Self { branches, written_out: OnceLock::new() }
    }

    fn written_out(&self) -> &WrittenOut {
        self.written_out.get_or_init(|| {
            let (mut rows, mut documents, mut own) = (Vec::<u32>::new(), Vec::new(), Vec::<u32>::new());
            for branch in self.branches {
                let start = rows.len();
                branch.runs().for_each(|run| rows.extend(run.start as u32..run.end as u32));
                own.extend((rows.len() - branch.own.len()) as u32..rows.len() as u32);
                documents.push(start..rows.len());
            }
            WrittenOut { rows, documents: Documents::new(documents), own }
        })
    }
}

/// [`attention`] of texts that share their beginnings: each token sees its branch's runs up to itself.
pub fn branched_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    branches: &Branches,
    heads: Heads,
) -> Result<Tensor> {
    if cpu::has(q) {
        return cpu::attention::branched(q, k, v, branches.branches, heads);
    }
    written_out(q, k, v, branches, heads)
}

/// Each text written out: what texts share is attended to more than once, and only each branch's own is kept.
fn written_out(q: &Tensor, k: &Tensor, v: &Tensor, branches: &Branches, heads: Heads) -> Result<Tensor> {
    let WrittenOut { rows, documents, own } = branches.written_out();
    let [q, k, v] = [gather(q, rows)?, gather(k, rows)?, gather(v, rows)?];
    gather(&attention(&q, &k, &v, documents, heads)?, own)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rng;
    use candle_core::Device;

    #[test]
    fn the_two_forms_are_the_same() {
        let stem = 0..70;
        // A stem of more than a block of queries, branches on it and on one of them, and a text of its own.
        let branches = [
            Branch { seen: vec![], own: stem.clone() },
            Branch { seen: vec![stem.clone()], own: 70..75 },
            Branch { seen: vec![stem.clone(), 70..75], own: 75..76 },
            Branch { seen: vec![stem.clone(), 70..75], own: 76..150 },
            Branch { seen: vec![stem.clone()], own: 150..151 },
            Branch { seen: vec![], own: 151..160 },
        ];
        let random = |name: &str, width: usize| {
            let key = rng::key(9, name);
            let values = (0..160 * width as u64).map(|i| (2.0 * rng::uniform(key, i) - 1.0) as f32);
            Tensor::from_vec(values.collect::<Vec<_>>(), (160, width), &Device::Cpu).unwrap()
        };
        let (q, k, v) = (random("q", 32), random("k", 16), random("v", 16));
        let branches = Branches::new(&branches);
        let values = |t: Result<Tensor>| t.unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        for window in [None, Some(1), Some(20), Some(72)] {
            let heads = Heads { query: 4, key_value: 2, dim: 8, window };
            let got = values(branched_attention(&q, &k, &v, &branches, heads));
            let want = values(written_out(&q, &k, &v, &branches, heads));
            let furthest = got.iter().zip(&want).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(got.len() == want.len() && furthest < 1e-6, "{window:?}: {furthest}");
        }
    }
}
