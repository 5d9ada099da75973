//! Causal attention that never writes a score to memory, on tensor cores: numbers in 16 bits, heads of 64 or 128.

use super::{Argument, Grid, Module, empty, launch, suffix, upload};
use crate::error::Result;
use crate::ops::{Documents, Heads};
use candle_core::{DType, Device, Tensor};

const MODULE: Module = Module::Flash;

/// Rows of a tile, queries that a tile of keys takes at a time, threads of a block; the same as in `flash.cu`.
const ROWS: usize = 64;
const QUERIES: usize = 32;
const THREADS: u32 = 128;

/// The compute capability from which on there are the kernels: mma's with bfloat16.
const TENSOR_CORES: (u32, u32) = (8, 0);

/// Whether there is a kernel for such queries.
pub(super) fn takes(q: &Tensor, heads: Heads) -> bool {
    // The CPU in a GPU's place has all kernels.
    crate::device::built_for().is_none_or(|built_for| built_for >= TENSOR_CORES)
        && matches!(q.dtype(), DType::F16 | DType::BF16)
        && matches!(heads.dim, 64 | 128)
}

/// Tiles of [`ROWS`] rows of the documents, those that see most first: three numbers each. All calls of a pass have the
/// same, which go to the device once.
fn tiles<'a>(documents: &'a Documents, device: &Device) -> Result<&'a Tensor> {
    if let Some(tiles) = documents.tiles.get() {
        return Ok(tiles);
    }
    let mut tiles = Vec::new();
    for document in &documents.ranges {
        for first in (0..document.len()).step_by(ROWS) {
            tiles.push([document.start as u32, document.len() as u32, first as u32]);
        }
    }
    // The last tiles of a document see most keys: they begin first, so that none is left over at the end.
    tiles.sort_by_key(|tile| std::cmp::Reverse(tile[2]));
    let tiles = upload(&tiles.concat(), device)?;
    Ok(documents.tiles.get_or_init(|| tiles))
}

/// What all kernels of a call share.
struct Call<'a> {
    q: &'a Tensor,
    heads: Heads,
    tiles: &'a Tensor,
    inputs: Vec<Argument>,
}

impl<'a> Call<'a> {
    fn new(q: &'a Tensor, k: &Tensor, v: &Tensor, documents: &'a Documents, heads: Heads) -> Result<Self> {
        let tiles = tiles(documents, q.device())?;
        let inputs = vec![
            q.try_into()?,
            k.try_into()?,
            v.try_into()?,
            tiles.try_into()?,
            Argument::Width(heads.query as u32),
            Argument::Width(heads.key_value as u32),
            Argument::Number(heads.scale()),
            Argument::Width(q.dims()[0] as u32),
            heads.window_of(q.dims()[0]),
        ];
        Ok(Self { q, heads, tiles, inputs })
    }

    /// Launches a kernel for each tile of each of `heads` heads, with room for so many rows and numbers.
    fn launch(&self, name: &str, heads: usize, room: (usize, usize), others: &[Argument]) -> Result<()> {
        let row = 2 * (self.heads.dim + 8);
        let shared = (room.0 * row + 4 * room.1) as u32;
        let tiles = self.tiles.elem_count() / 3;
        let grid = Grid { blocks: (tiles as u32, heads as u32), threads: THREADS, shared };
        let kernel = format!("flash_{name}{}_{}", suffix(self.q.dtype(), false)?, self.heads.dim);
        launch(self.q.device(), MODULE, &kernel, grid, &[&self.inputs, others].concat())
    }
}

pub(super) fn forward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    documents: &Documents,
    heads: Heads,
) -> Result<Tensor> {
    let out = empty(q.shape(), q.dtype(), q.device())?;
    let none = Argument::Pointer(0);
    let call = Call::new(q, k, v, documents, heads)?;
    call.launch("forward", heads.query, (2 * ROWS, 0), &[(&out).try_into()?, none, none, none])?;
    Ok(out)
}

/// The forward once more gives each row's normaliser and Σ dy · out, which were not kept; then a kernel for the keys
/// and one for the queries, so that each sum is made by one thread in one order.
pub(super) fn backward(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    documents: &Documents,
    heads: Heads,
    dy: &Tensor,
) -> Result<(Tensor, Tensor, Tensor)> {
    let new = |like: &Tensor| empty(like.shape(), like.dtype(), like.device());
    let (dq, dk, dv) = (new(q)?, new(k)?, new(v)?);
    let rows = || empty((heads.query, q.dims()[0]), DType::F32, q.device());
    let (lse, delta) = (rows()?, rows()?);
    let call = Call::new(q, k, v, documents, heads)?;
    let [dy, lse, delta] = [dy.try_into()?, (&lse).try_into()?, (&delta).try_into()?];
    call.launch("forward", heads.query, (2 * ROWS, 0), &[Argument::Pointer(0), dy, lse, delta])?;
    let keys = [dy, lse, delta, (&dk).try_into()?, (&dv).try_into()?];
    call.launch("backward_keys", heads.key_value, (2 * ROWS + 2 * QUERIES, 2 * QUERIES), &keys)?;
    call.launch("backward_queries", heads.query, (4 * ROWS, 0), &[dy, lse, delta, (&dq).try_into()?])?;
    Ok((dq, dk, dv))
}
