//! Norms, activations, the rotary embedding, sums.

use super::vector::{dot, dot3, sigmoid, widest};
use super::{for_rows, for_rows2, new_rows, read, update, write, write_slices};
use crate::error::Result;
use candle_core::{Device, Tensor};

pub(in crate::ops) fn add_rows(into: Tensor, start: usize, x: &Tensor) -> Result<Tensor> {
    let rows = x.dims()[0];
    // A row of a vector is one element.
    let width = x.elem_count() / rows.max(1);
    read([x], |[x]| {
        update(&into.narrow(0, start, rows)?, |into| {
            for_rows(into, width, |first, rows| {
                let x = &x[first * width..][..rows.len()];
                widest(
                    #[inline(always)]
                    || rows.iter_mut().zip(x).for_each(|(a, b)| *a += b),
                );
            });
        })
    })?;
    Ok(into)
}

pub(in crate::ops) fn multiply(x: &Tensor, factor: impl Fn(u64) -> f32 + Sync) -> Result<Tensor> {
    let (tokens, width) = x.dims2()?;
    let out = read([x], |[x]| {
        Ok(new_rows(tokens, width, |row, out| {
            let at = row * width;
            let x = x[at..][..width].iter().enumerate();
            write(out, x.map(|(i, x)| x * factor((at + i) as u64)))
        }))
    })?;
    Ok(Tensor::from_vec(out, (tokens, width), &Device::Cpu)?)
}

pub(in crate::ops) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    let (tokens, hidden) = x.dims2()?;
    let out = read([x, weight], |[x, weight]| {
        Ok(new_rows(
            tokens,
            hidden,
            #[inline(always)]
            |row, out| {
                let x = &x[row * hidden..][..hidden];
                let r = inverse_rms(x, eps);
                write(out, x.iter().zip(weight).map(|(x, w)| x * r * w))
            },
        ))
    })?;
    Ok(Tensor::from_vec(out, (tokens, hidden), &Device::Cpu)?)
}

pub(in crate::ops) fn add_rms_norm_backward(
    into: Tensor,
    x: &Tensor,
    weight: &Tensor,
    eps: f64,
    dy: &Tensor,
) -> Result<Tensor> {
    let hidden = x.dims2()?.1;
    read([x, weight, dy], |[x, weight, dy]| {
        update(&into, |into| {
            for_rows(into, hidden, |first, rows| {
                widest(
                    #[inline(always)]
                    || {
                        for (i, out) in rows.chunks_exact_mut(hidden).enumerate() {
                            let at = (first + i) * hidden;
                            let (x, dy) = (&x[at..][..hidden], &dy[at..][..hidden]);
                            let r = inverse_rms(x, eps);
                            let pull = dot3(dy, weight, x) / hidden as f32 * r * r * r;
                            for (((out, x), w), dy) in out.iter_mut().zip(x).zip(weight).zip(dy) {
                                *out += dy * w * r - x * pull;
                            }
                        }
                    },
                );
            });
        })
    })?;
    Ok(into)
}

#[inline(always)]
fn inverse_rms(x: &[f32], eps: f64) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + eps as f32).sqrt()
}

pub(in crate::ops) fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let (tokens, width) = gate.dims2()?;
    let out = read([gate, up], |[gate, up]| {
        Ok(new_rows(
            tokens,
            width,
            #[inline(always)]
            |row, out| {
                let at = row * width..(row + 1) * width;
                let (gate, up) = (gate[at.clone()].iter(), up[at].iter());
                write(out, gate.zip(up).map(|(gate, up)| gate * sigmoid(*gate) * up))
            },
        ))
    })?;
    Ok(Tensor::from_vec(out, (tokens, width), &Device::Cpu)?)
}

pub(in crate::ops) fn swiglu_backward(
    gate: &Tensor,
    up: &Tensor,
    activated: Tensor,
    dy: Tensor,
) -> Result<(Tensor, Tensor)> {
    let width = gate.dims2()?.1;
    let mut updated = Ok(());
    read([gate, up], |[gate, up]| {
        let both = |dy: &mut [f32], d_up: &mut [f32]| {
            for_rows2((dy, width), (d_up, width), |first, dy, d_up| {
                let at = first * width..first * width + dy.len();
                let (gate, up) = (&gate[at.clone()], &up[at]);
                widest(
                    #[inline(always)]
                    || {
                        for (((dy, d_up), gate), up) in dy.iter_mut().zip(d_up).zip(gate).zip(up) {
                            let s = sigmoid(*gate);
                            *d_up = *dy * gate * s;
                            *dy = *dy * up * s * (1.0 + gate * (1.0 - s));
                        }
                    },
                );
            });
        };
        update(&dy, |dy| updated = update(&activated, |d_up| both(dy, d_up)))
    })?;
    updated?;
    Ok((dy, activated))
}

/// Rotates each head's first half against its second; `angle` holds the cosine and sine of every position.
pub(in crate::ops) fn rotate(
    x: Tensor,
    head_dim: usize,
    (cos, sin): (&Tensor, &Tensor),
    positions: &[u32],
    sign: f32,
) -> Result<Tensor> {
    let width = x.dims2()?.1;
    let half = head_dim / 2;
    read([cos, sin], |[cos, sin]| {
        update(&x, |x| {
            for_rows(x, width, |first, rows| {
                widest(
                    #[inline(always)]
                    || {
                        for (i, row) in rows.chunks_exact_mut(width).enumerate() {
                            let at = positions[first + i] as usize * half;
                            let (cos, sin) = (&cos[at..][..half], &sin[at..][..half]);
                            for head in row.chunks_exact_mut(head_dim) {
                                let (a, b) = head.split_at_mut(half);
                                for (((a, b), cos), sin) in a.iter_mut().zip(b).zip(cos).zip(sin) {
                                    let sin = sin * sign;
                                    (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                                }
                            }
                        }
                    },
                );
            });
        })
    })?;
    Ok(x)
}

/// The rows of `x` that `rows` names.
pub(in crate::ops) fn gather(x: &Tensor, rows: &[u32]) -> Result<Tensor> {
    let width = x.dims2()?.1;
    let out = read([x], |[x]| {
        Ok(new_rows(rows.len(), width, |row, out| {
            write_slices(out, std::iter::once(&x[rows[row] as usize * width..][..width]))
        }))
    })?;
    Ok(Tensor::from_vec(out, (rows.len(), width), &Device::Cpu)?)
}

/// Writes `dy`'s rows to their places in `into`.
pub(in crate::ops) fn scatter(into: Tensor, dy: &Tensor, rows: &[u32]) -> Result<Tensor> {
    let width = dy.dims2()?.1;
    read([dy], |[dy]| {
        update(&into, |into| {
            for (row, dy) in rows.iter().zip(dy.chunks_exact(width)) {
                into[*row as usize * width..][..width].copy_from_slice(dy);
            }
        })
    })?;
    Ok(into)
}

/// `x` with `rows` of its rows, from `start` on, multiplied by `factor`.
pub(in crate::ops) fn scale_rows(x: Tensor, start: usize, rows: usize, factor: f32) -> Result<Tensor> {
    update(&x.narrow(0, start, rows)?, |values| values.iter_mut().for_each(|value| *value *= factor))?;
    Ok(x)
}

pub(in crate::ops) fn add_bias(x: Tensor, bias: &Tensor) -> Result<Tensor> {
    let width = bias.elem_count();
    read([bias], |[bias]| {
        update(&x, |x| {
            for_rows(x, width, |_, rows| {
                for row in rows.chunks_exact_mut(width) {
                    row.iter_mut().zip(bias).for_each(|(x, bias)| *x += bias);
                }
            });
        })
    })?;
    Ok(x)
}

/// [`scale_rows`], column by column.
pub(in crate::ops) fn scale_columns(
    x: Tensor,
    start: usize,
    rows: usize,
    factors: &Tensor,
) -> Result<Tensor> {
    let (part, width) = (x.narrow(0, start, rows)?, x.dims2()?.1);
    read([factors], |[factors]| {
        let scale = |row: &mut [f32]| row.iter_mut().zip(factors).for_each(|(x, factor)| *x *= factor);
        update(&part, |values| values.chunks_exact_mut(width.max(1)).for_each(scale))
    })?;
    Ok(x)
}
