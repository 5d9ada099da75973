//! Causal attention, head by head. A task is one document's key-value head with the query heads that it serves;
//! it goes through the queries in blocks and looks only at the keys from the first that a block's first query sees up to
//! its last query, so that of the upper triangle no more than the blocks on the diagonal is computed, and of the scores
//! no more than [`BLOCK`] rows exist at a time.

use super::product::{Left, Product, transposed};
use super::vector::{LANES, dot, exponentials, widest};
use super::{new_rows, read, write_slices};
use crate::error::Result;
use crate::ops::{Branch, Heads};
use candle_core::{Device, Tensor};
use rayon::prelude::*;
use std::ops::Range;

/// Queries that are looked at together.
const BLOCK: usize = 32;

/// A matrix `[rows, heads · dim]` by rows.
#[derive(Clone, Copy)]
struct Matrix<'a> {
    data: &'a [f32],
    width: usize,
    dim: usize,
}

impl<'a> Matrix<'a> {
    fn new(data: &'a [f32], heads: usize, dim: usize) -> Self {
        Self { data, width: heads * dim, dim }
    }

    /// One head of a document, `[length, dim]` by rows.
    fn head(&self, document: &Range<usize>, head: usize) -> Vec<f32> {
        self.head_of([document], head)
    }

    /// One head of some runs of rows, one after the other.
    fn head_of<'r>(&self, runs: impl IntoIterator<Item = &'r Range<usize>>, head: usize) -> Vec<f32> {
        let mut out = Vec::new();
        for run in runs {
            let rows = self.data[run.start * self.width..run.end * self.width].chunks_exact(self.width);
            out.reserve(run.len() * self.dim);
            rows.for_each(|row| out.extend_from_slice(&row[head * self.dim..][..self.dim]));
        }
        out
    }
}

/// Some queries of a document, counted from its first token, and the keys that any of them sees.
struct Block {
    queries: Range<usize>,
    keys: Range<usize>,
}

/// The blocks of some queries of a document.
fn blocks(queries: Range<usize>, heads: Heads) -> impl Iterator<Item = Block> {
    let last = queries.end;
    queries.step_by(BLOCK).map(move |start| {
        let end = (start + BLOCK).min(last);
        Block { queries: start..end, keys: heads.first_key(start)..end }
    })
}

/// A document's keys for one head, and what stays the same over its blocks of queries.
struct Keys {
    heads: Heads,
    dim: usize,
    length: usize,
    /// `[dim, length]`
    transposed: Vec<f32>,
}

impl Keys {
    fn new(keys: &[f32], length: usize, heads: Heads) -> Self {
        let dim = heads.dim;
        Self { heads, dim, length, transposed: transposed(keys, length, dim, dim) }
    }

    /// `x · Kᵀ` for the rows `x` of a block's queries, `[queries, keys]`.
    fn scores(&self, x: &[f32], block: &Block, scale: f32, out: &mut [f32]) {
        let (rows, keys) = (block.queries.len(), block.keys.len());
        Product {
            size: [rows, keys, self.dim],
            a: Left::Rows(x, self.dim),
            b: (&self.transposed[block.keys.start..], self.length),
            c: (out, keys),
            scale,
            add: false,
        }
        .run();
    }

    /// The attention probabilities of a block's queries `q`, `[queries, keys]`.
    fn probabilities(&self, q: &[f32], block: &Block, out: &mut [f32]) {
        self.scores(q, block, 1.0 / (self.dim as f32).sqrt(), out);
        let keys = block.keys.len();
        widest(
            #[inline(always)]
            || {
                let rows = out[..block.queries.len() * keys].chunks_exact_mut(keys);
                for (query, row) in block.queries.clone().zip(rows) {
                    let seen = self.heads.first_key(query) - block.keys.start..query + 1 - block.keys.start;
                    // A whole number of strands, of which what is not seen counts for nothing.
                    let strands = seen.end.next_multiple_of(LANES).min(keys);
                    row[..seen.start].fill(f32::NEG_INFINITY);
                    row[seen.end..strands].fill(f32::NEG_INFINITY);
                    let (_, sum) = exponentials(&mut row[..strands]);
                    let factor = 1.0 / sum;
                    row[seen.clone()].iter_mut().for_each(|p| *p *= factor);
                    row[..seen.start].fill(0.0);
                    row[seen.end..].fill(0.0);
                }
            },
        );
    }
}

pub(in crate::ops) fn forward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    documents: &[Range<usize>],
    heads: Heads,
) -> Result<Tensor> {
    let whole = |own: &Range<usize>| Branch { seen: Vec::new(), own: own.clone() };
    branched(q, k, v, &documents.iter().map(whole).collect::<Vec<_>>(), heads)
}

/// [`forward`] of texts that share their beginnings.
pub(in crate::ops) fn branched(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    branches: &[Branch],
    heads: Heads,
) -> Result<Tensor> {
    let dim = heads.dim;
    let group = heads.query / heads.key_value;
    let out = read([q, k, v], |[q, k, v]| {
        let q = Matrix::new(q, heads.query, dim);
        let (k, v) = (Matrix::new(k, heads.key_value, dim), Matrix::new(v, heads.key_value, dim));
        let results = each_head(branches, heads, |branch, head| {
            let (length, before) = (branch.own.len(), branch.before());
            let keys = Keys::new(&k.head_of(branch.runs(), head), before + length, heads);
            let values = v.head_of(branch.runs(), head);
            let mut scores = vec![0.0; BLOCK.min(length) * (before + length)];
            let one = |member: usize| {
                let q = q.head(&branch.own, head * group + member);
                let mut out = vec![0.0; length * dim];
                for block in blocks(before..before + length, heads) {
                    let at = (block.queries.start - before) * dim;
                    keys.probabilities(&q[at..], &block, &mut scores);
                    Product {
                        size: [block.queries.len(), dim, block.keys.len()],
                        a: Left::Rows(&scores, block.keys.len()),
                        b: (&values[block.keys.start * dim..], dim),
                        c: (&mut out[at..], dim),
                        scale: 1.0,
                        add: false,
                    }
                    .run();
                }
                out
            };
            (0..group).map(one).collect::<Vec<_>>()
        });
        let parts: Vec<Vec<&[f32]>> =
            results.iter().map(|heads| heads.iter().flatten().map(Vec::as_slice).collect()).collect();
        let own: Vec<_> = branches.iter().map(|branch| branch.own.clone()).collect();
        Ok(join(&own, &parts, dim))
    })?;
    Ok(Tensor::from_vec(out, q.shape(), &Device::Cpu)?)
}

/// The gradients of one document's key-value head.
struct Gradients {
    /// One for each query head that it serves, `[length, dim]`.
    dq: Vec<Vec<f32>>,
    dk: Vec<f32>,
    dv: Vec<f32>,
}

pub(in crate::ops) fn backward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    documents: &[Range<usize>],
    heads: Heads,
    dy: &Tensor,
) -> Result<(Tensor, Tensor, Tensor)> {
    let dim = heads.dim;
    let group = heads.query / heads.key_value;
    let [dq, dk, dv] = read([q, k, v, dy], |[q, k, v, dy]| {
        let (q, dy) = (Matrix::new(q, heads.query, dim), Matrix::new(dy, heads.query, dim));
        let (k, v) = (Matrix::new(k, heads.key_value, dim), Matrix::new(v, heads.key_value, dim));
        let results = each_head(documents, heads, |document, head| {
            let length = document.len();
            let (k, v) = (k.head(document, head), v.head(document, head));
            let mut work = Backward {
                keys: Keys::new(&k, length, heads),
                values: Keys::new(&v, length, heads),
                k: &k,
                p: vec![0.0; BLOCK.min(length) * length],
                dp: vec![0.0; BLOCK.min(length) * length],
                dk: vec![0.0; length * dim],
                dv: vec![0.0; length * dim],
            };
            let query_heads = head * group..(head + 1) * group;
            let dq = query_heads.map(|h| work.query_head(&q.head(document, h), &dy.head(document, h)));
            Gradients { dq: dq.collect(), dk: work.dk, dv: work.dv }
        });
        let parts = |f: fn(&Gradients) -> Vec<&[f32]>| -> Vec<Vec<&[f32]>> {
            results.iter().map(|heads| heads.iter().flat_map(f).collect()).collect()
        };
        let dq = join(documents, &parts(|g| g.dq.iter().map(Vec::as_slice).collect()), dim);
        let [dk, dv] = [parts(|g| vec![&g.dk]), parts(|g| vec![&g.dv])].map(|all| join(documents, &all, dim));
        Ok([dq, dk, dv])
    })?;
    let tensor = |values, like: &Tensor| Tensor::from_vec(values, like.shape(), &Device::Cpu);
    Ok((tensor(dq, q)?, tensor(dk, k)?, tensor(dv, v)?))
}

/// The backward of one document's key-value head at work.
struct Backward<'a> {
    keys: Keys,
    values: Keys,
    k: &'a [f32],
    p: Vec<f32>,
    dp: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
}

impl Backward<'_> {
    /// Adds a query head's gradients by keys and values and returns that by its queries.
    fn query_head(&mut self, q: &[f32], dy: &[f32]) -> Vec<f32> {
        let (dim, length) = (self.keys.dim, self.keys.length);
        let scale = 1.0 / (dim as f32).sqrt();
        let mut dq = vec![0.0; length * dim];
        for block in blocks(0..length, self.keys.heads) {
            let (rows, keys) = (block.queries.len(), block.keys.len());
            let (at, first) = (block.queries.start * dim, block.keys.start * dim);
            self.keys.probabilities(&q[at..], &block, &mut self.p);
            self.values.scores(&dy[at..], &block, 1.0, &mut self.dp);
            let (p, ds) = (&self.p[..rows * keys], &mut self.dp[..rows * keys]);
            add_columns([keys, dim, rows], p, &dy[at..], 1.0, &mut self.dv[first..]);
            widest(
                #[inline(always)]
                || {
                    for (p, ds) in p.chunks_exact(keys).zip(ds.chunks_exact_mut(keys)) {
                        let mean = dot(p, ds);
                        ds.iter_mut().zip(p).for_each(|(ds, p)| *ds = p * (*ds - mean));
                    }
                },
            );
            add_columns([keys, dim, rows], ds, &q[at..], scale, &mut self.dk[first..]);
            Product {
                size: [rows, dim, keys],
                a: Left::Rows(ds, keys),
                b: (&self.k[first..], dim),
                c: (&mut dq[at..], dim),
                scale,
                add: false,
            }
            .run();
        }
        dq
    }
}

/// `c += scale · aᵀ · b` with `a` `[k, m]`, `b` `[k, n]`, `c` `[m, n]`, all dense.
fn add_columns(size: [usize; 3], a: &[f32], b: &[f32], scale: f32, c: &mut [f32]) {
    let [m, n, _] = size;
    Product { size, a: Left::Columns(a, m), b: (b, n), c: (c, n), scale, add: true }.run();
}

/// Runs a task for each document and key-value head; results by document, then head.
fn each_head<D: Sync, T: Send>(
    documents: &[D],
    heads: Heads,
    f: impl Fn(&D, usize) -> T + Sync,
) -> Vec<Vec<T>> {
    let count = heads.key_value;
    let task = |i: usize| f(&documents[i / count], i % count);
    let all: Vec<T> = (0..documents.len() * count).into_par_iter().map(task).collect();
    let mut all = all.into_iter();
    documents.iter().map(|_| all.by_ref().take(count).collect()).collect()
}

/// The heads of each document, `[length, dim]` each, side by side.
fn join(documents: &[Range<usize>], parts: &[Vec<&[f32]>], dim: usize) -> Vec<f32> {
    // Each row's document, and its place within.
    let rows: Vec<(usize, usize)> = documents
        .iter()
        .enumerate()
        .flat_map(|(number, document)| (0..document.len()).map(move |row| (number, row)))
        .collect();
    let width = parts.first().map_or(0, Vec::len) * dim;
    new_rows(rows.len(), width, |row, out| {
        let (document, place) = rows[row];
        write_slices(out, parts[document].iter().map(|head| &head[place * dim..][..dim]))
    })
}
