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

pub(in crate::ops) fn outer(narrow: &Tensor, wide: &Tensor, scale: f64) -> Result<Tensor> {
    let ((tokens, rank), width) = (narrow.dims2()?, wide.dims2()?.1);
    let out = read([narrow, wide], |[narrow, wide]| {
        let part = |first: usize| {
            let mut sum = vec![0.0; rank * width];
            // Short stretches of the long side stay in the cache while all columns pass by.
            for at in (first..(first + TASK).min(tokens)).step_by(64) {
                Product {
                    size: [rank, width, 64.min(tokens - at)],
                    a: Left::Columns(&narrow[at * rank..], rank),
                    b: (&wide[at * width..], width),
                    c: (&mut sum, width),
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
        let mut sum = parts.next().unwrap_or_else(|| vec![0.0; rank * width]);
        for part in parts {
            sum.iter_mut().zip(part).for_each(|(a, b)| *a += b);
        }
        Ok(sum)
    })?;
    Ok(Tensor::from_vec(out, (rank, width), &Device::Cpu)?)
}
