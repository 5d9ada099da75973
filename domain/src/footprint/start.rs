//! What PiSSA's start takes: the decomposition of a weight.

use super::{Engine, table_bytes};
use crate::trial::{InitLoraWeights, Precision};

/// Most bytes that the start of an adapter of `rank` on a weight of `shape` takes while it lasts, weight and adapter
/// aside; none but PiSSA's takes any. The terms follow `trainer::pissa`: it runs on the CPU whatever the engine, so that
/// a GPU holds the weight in float32 alone.
pub fn start_bytes(
    engine: Engine,
    precision: Precision,
    [rows, columns]: [u64; 2],
    rank: u64,
    init: InitLoraWeights,
) -> u64 {
    let (long, short) = (rows.max(columns), rows.min(columns));
    let copy = if table_bytes(precision) == 4 { 0 } else { long * short };
    let elements = match init {
        InitLoraWeights::Default | InitLoraWeights::Gaussian => 0,
        _ if engine == Engine::Gpu => copy,
        // The longer side's vectors, the weight as it is worked on, and squares: the other side's vectors and six more; a
        // weight that is nearly twice as long as short is brought to one first, which takes two.
        InitLoraWeights::Pissa => {
            let squares = if 6 * long > 11 * short { 9 } else { 7 };
            copy + 2 * long * short + squares * short * short
        }
        // The longer side's basis, that before it, and two steps between them; or the last basis with what the weight is
        // in it, which is decomposed.
        InitLoraWeights::PissaNiter(_) => {
            copy + (4 * long * rank).max(rank * (long + 4 * short) + 10 * rank * rank)
        }
    };
    4 * elements
}
