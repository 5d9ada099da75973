//! Causal attention, a block of queries of one document at a time: two matrix products with a softmax between them.
//! A block's scores are all that is held of `[queries, keys]`, so that memory is linear in a document's length. This form
//! takes all numbers, widths and devices; where [`flash`] can, it does the work.

use super::gemm::{Matrix, gemm};
use super::{Argument, Grid, Module, THREADS, empty, flash, launch, suffix};
use crate::error::Result;
use crate::ops::{Documents, Heads};
use candle_core::{DType, Tensor};
use domain::footprint::ATTENTION_BLOCK;

const MODULE: Module = Module::Attention;

/// Queries of a block.
const QUERIES: usize = ATTENTION_BLOCK as usize;

/// Some queries of a document, and the keys that they may see.
struct Block {
    /// The document's first token.
    document: usize,
    /// The first query, counted from there.
    first: usize,
    queries: usize,
    /// The first key that the first query sees, counted from there.
    first_key: usize,
    /// Keys from that on: up to the last query.
    keys: usize,
}

fn blocks(documents: &Documents, heads: Heads) -> impl Iterator<Item = Block> {
    documents.ranges.iter().flat_map(move |document| {
        (0..document.len()).step_by(QUERIES).map(move |first| {
            let queries = QUERIES.min(document.len() - first);
            let first_key = heads.first_key(first);
            Block { document: document.start, first, queries, first_key, keys: first + queries - first_key }
        })
    })
}

impl Heads {
    /// Query heads that share a key-value head: the first of each share, then the second, …
    fn group(&self) -> usize {
        self.query / self.key_value
    }

    /// The block's rows of the query heads of member `j` of each group.
    fn queries(&self, t: &Tensor, block: &Block, j: usize) -> Result<Matrix> {
        let width = self.query * self.dim;
        let offset = (block.document + block.first) * width + j * self.dim;
        Matrix::within(t, offset, width, self.group() * self.dim)
    }

    /// The rows of the keys or values that the block sees.
    fn keys(&self, t: &Tensor, block: &Block) -> Result<Matrix> {
        let width = self.key_value * self.dim;
        Matrix::within(t, (block.document + block.first_key) * width, width, self.dim)
    }

    /// The `[queries, keys]` matrices of member `j` of each group.
    fn scores(&self, t: &Tensor, block: &Block, j: usize) -> Result<Matrix> {
        let one = block.queries * block.keys;
        Matrix::within(t, j * one, block.keys, self.group() * one)
    }

    /// How many of `keys` keys a query sees at most.
    pub(super) fn window_of(&self, keys: usize) -> Argument {
        Argument::Width(self.window.unwrap_or(keys).min(keys) as u32)
    }

    pub(super) fn scale(&self) -> f32 {
        1.0 / (self.dim as f32).sqrt()
    }

    /// What a block's queries give each key: `[heads, queries, keys]`, and the products that they came from, which
    /// may be overwritten.
    fn block_probabilities(&self, q: &Tensor, k: &Tensor, block: &Block) -> Result<(Tensor, Tensor)> {
        let (shape, device) = ((self.query, block.queries, block.keys), q.device());
        let (scores, p) = (empty(shape, DType::F32, device)?, empty(shape, q.dtype(), device)?);
        let size = [block.queries, block.keys, self.dim];
        for j in 0..self.group() {
            let operands = (self.queries(q, block, j)?, self.keys(k, block)?.t());
            gemm(
                device,
                size,
                operands,
                self.scores(&scores, block, j)?,
                (self.scale(), 0.0),
                self.key_value,
            )?;
        }
        let arguments = [(&scores).try_into()?, (&p).try_into()?];
        self.softmax("causal_softmax", &p, block, &arguments, &[])?;
        Ok((p, scores))
    }

    fn softmax(
        &self,
        name: &str,
        p: &Tensor,
        block: &Block,
        tensors: &[Argument],
        numbers: &[Argument],
    ) -> Result<()> {
        let threads = (block.keys as u32).next_multiple_of(32).min(THREADS);
        let grid = Grid { blocks: (block.queries as u32, self.query as u32), threads, shared: 0 };
        let first = (block.first - block.first_key) as u32;
        let sizes = [Argument::Width(block.keys as u32), Argument::Width(first), self.window_of(block.keys)];
        let kernel = format!("{name}{}", suffix(p.dtype(), false)?);
        launch(p.device(), MODULE, &kernel, grid, &[tensors, &sizes, numbers].concat())
    }
}

pub(in crate::ops) fn forward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    documents: &Documents,
    heads: Heads,
) -> Result<Tensor> {
    let (q, k, v) = (q.contiguous()?, k.contiguous()?, v.contiguous()?);
    if flash::takes(&q, heads) {
        return flash::forward(&q, &k, &v, documents, heads);
    }
    let out = empty(q.shape(), q.dtype(), q.device())?;
    for block in blocks(documents, heads) {
        let (p, scores) = heads.block_probabilities(&q, &k, &block)?;
        drop(scores);
        let size = [block.queries, heads.dim, block.keys];
        for j in 0..heads.group() {
            let operands = (heads.scores(&p, &block, j)?, heads.keys(&v, &block)?);
            gemm(q.device(), size, operands, heads.queries(&out, &block, j)?, (1.0, 0.0), heads.key_value)?;
        }
    }
    Ok(out)
}

/// With P the probabilities, dP = dY·Vᵀ and dS = P·(dP − Σ P·dP)·scale: dQ = dS·K, dK = dSᵀ·Q, dV = Pᵀ·dY.
pub(in crate::ops) fn backward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    documents: &Documents,
    heads: Heads,
    dy: &Tensor,
) -> Result<(Tensor, Tensor, Tensor)> {
    let (q, k, v, dy) = (q.contiguous()?, k.contiguous()?, v.contiguous()?, dy.contiguous()?);
    if flash::takes(&q, heads) {
        return flash::backward(&q, &k, &v, documents, heads, &dy);
    }
    let (device, dtype) = (q.device(), q.dtype());
    let dq = empty(q.shape(), dtype, device)?;
    // Keys that several blocks or heads share collect their gradients in float32.
    let shared = heads.group() > 1 || documents.ranges.iter().any(|document| document.len() > QUERIES);
    let collects = |like: &Tensor| match shared {
        true => Ok(Tensor::zeros(like.shape(), DType::F32, device)?),
        false => empty(like.shape(), dtype, device),
    };
    let (dk, dv) = (collects(&k)?, collects(&v)?);
    let onto = if shared { 1.0 } else { 0.0 };
    for block in blocks(documents, heads) {
        let (p, products) = heads.block_probabilities(&q, &k, &block)?;
        let Block { queries, keys, .. } = block;
        for j in 0..heads.group() {
            let dy = heads.queries(&dy, &block, j)?;
            let operands = (heads.scores(&p, &block, j)?.t(), dy);
            gemm(
                device,
                [keys, heads.dim, queries],
                operands,
                heads.keys(&dv, &block)?,
                (1.0, onto),
                heads.key_value,
            )?;
            let (operands, dp) = ((dy, heads.keys(&v, &block)?.t()), heads.scores(&products, &block, j)?);
            gemm(device, [queries, keys, heads.dim], operands, dp, (1.0, 0.0), heads.key_value)?;
        }
        let arguments = [(&p).try_into()?, (&products).try_into()?];
        heads.softmax(
            "causal_softmax_backward",
            &p,
            &block,
            &arguments,
            &[Argument::Number(heads.scale())],
        )?;
        drop(products);
        for j in 0..heads.group() {
            let ds = heads.scores(&p, &block, j)?;
            let (operands, into) = ((ds, heads.keys(&k, &block)?), heads.queries(&dq, &block, j)?);
            gemm(device, [queries, heads.dim, keys], operands, into, (1.0, 0.0), heads.key_value)?;
            let (operands, into) = ((ds.t(), heads.queries(&q, &block, j)?), heads.keys(&dk, &block)?);
            gemm(device, [keys, heads.dim, queries], operands, into, (1.0, onto), heads.key_value)?;
        }
    }
    Ok((dq, dk.to_dtype(dtype)?, dv.to_dtype(dtype)?))
}
