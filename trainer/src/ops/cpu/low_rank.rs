//! The products of an adapter, all with one side as narrow as its rank.

use super::product::{Left, Product, transposed};
use super::{for_rows, read, update};
use crate::error::Result;
use candle_core::{Device, Tensor};
use rayon::prelude::*;

pub(in crate::ops) fn project(x: &Tensor, a: &Tensor, a_is_transposed: bool) -> Result<Tensor> {
    let (tokens, width) = x.dims2()?;
    let rank = a.elem_count() / width;
    let mut out = vec![0.0; tokens * rank];
    read([x, a], |[x, a]| {
        let turned = a_is_transposed.then(|| transposed(a, rank, width, width));
        let a = turned.as_deref().unwrap_or(a);
        // A row of the result is short, but as much work as a row of x.
        let block = 128;
        out.par_chunks_mut((block * rank).max(1)).enumerate().for_each(|(i, rows)| {
            Product {
                size: [rows.len() / rank, rank, width],
                a: Left::Rows(&x[i * block * width..], width),
                b: (a, rank),
                c: (rows, rank),
                scale: 1.0,
                add: false,
            }
            .run();
        });
        Ok(())
    })?;
    Ok(Tensor::from_vec(out, (tokens, rank), &Device::Cpu)?)
}

pub(in crate::ops) fn add_product(
    into: Tensor,
    start: usize,
    h: &Tensor,
    w: &Tensor,
    w_is_transposed: bool,
    scale: f64,
) -> Result<Tensor> {
    let ((tokens, rank), width) = (h.dims2()?, into.dims2()?.1);
    let rows = into.narrow(0, start, tokens)?;
    read([h, w], |[h, w]| {
        let turned = w_is_transposed.then(|| transposed(w, width, rank, rank));
        let w = turned.as_deref().unwrap_or(w);
        update(&rows, |into| {
            for_rows(into, width, |first, rows| {
                Product {
                    size: [rows.len() / width, width, rank],
                    a: Left::Rows(&h[first * rank..], rank),
                    b: (w, width),
                    c: (rows, width),
                    scale: scale as f32,
                    add: true,
                }
                .run();
            });
        })
    })?;
    Ok(into)
}

/// Tokens whose part of an outer product is summed by one task. The split does not depend on the number of
/// threads, so neither does the result.
const TASK: usize = 256;

/// Tokens whose rows stay in the cache while all columns of the wide side pass by.
const CACHED: usize = 64;

pub(in crate::ops) fn outer(narrow: &Tensor, wide: &Tensor, scale: f64) -> Result<Tensor> {
    let (width, rank) = (wide.dims2()?.1, narrow.dims2()?.1);
    let turned = transposed(&sums(narrow, wide, scale)?, width, rank, rank);
    Ok(Tensor::from_vec(turned, (rank, width), &Device::Cpu)?)
}

pub(in crate::ops) fn outer_transposed(narrow: &Tensor, wide: &Tensor, scale: f64) -> Result<Tensor> {
    let shape = (wide.dims2()?.1, narrow.dims2()?.1);
    Ok(Tensor::from_vec(sums(narrow, wide, scale)?, shape, &Device::Cpu)?)
}

/// `scale · wide`ᵀ` · narrow`, `[width, rank]`: each row of the narrow side is a vector or a few, and all sums of a
/// column of the wide side are in registers at a time.
fn sums(narrow: &Tensor, wide: &Tensor, scale: f64) -> Result<Vec<f32>> {
    let ((tokens, rank), width) = (narrow.dims2()?, wide.dims2()?.1);
    read([narrow, wide], |[narrow, wide]| {
        let part = |first: usize| {
            let mut sum = vec![0.0; width * rank];
            let end = (first + TASK).min(tokens);
            for at in (first..end).step_by(CACHED) {
                Product {
                    size: [width, rank, CACHED.min(end - at)],
                    a: Left::Columns(&wide[at * width..], width),
                    b: (&narrow[at * rank..], rank),
                    c: (&mut sum, rank),
                    scale: scale as f32,
                    add: true,
                }
                .run();
            }
            sum
        };
        let starts: Vec<_> = (0..tokens).step_by(TASK).collect();
        let parts: Vec<Vec<f32>> = starts.into_par_iter().map(part).collect();
        let mut parts = parts.into_iter();
        let mut sum = parts.next().unwrap_or_else(|| vec![0.0; width * rank]);
        for part in parts {
            sum.iter_mut().zip(part).for_each(|(a, b)| *a += b);
        }
        Ok(sum)
    })
}
