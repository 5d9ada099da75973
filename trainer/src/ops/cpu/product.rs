//! A matrix product for operands that are too thin or too short-lived for candle's: low-rank products and the
//! blocks of an attention head. It adds into its output and runs on one thread; the callers share out the work.

use pulp::{Arch, Simd, WithSimd};
use std::ops::Range;

/// Elements of the right operand that are used together: half of a first-level cache of 32 KiB.
const CACHED: usize = 4096;

/// The left operand `a`, `[m, k]`.
#[derive(Clone, Copy)]
pub(super) enum Left<'a> {
    /// Element (i, p) stands at `i · stride + p`.
    Rows(&'a [f32], usize),
    /// Element (i, p) stands at `p · stride + i`: the transpose of a matrix that is stored by rows.
    Columns(&'a [f32], usize),
}

/// `c = scale · a · b`, or `c += scale · a · b`.
pub(super) struct Product<'a> {
    /// Rows of `c`, columns of `c`, and the length of the sums.
    pub(super) size: [usize; 3],
    /// `[m, k]`.
    pub(super) a: Left<'a>,
    /// `[k, n]` by rows, and the distance between them.
    pub(super) b: (&'a [f32], usize),
    /// `[m, n]` by rows, and the distance between them.
    pub(super) c: (&'a mut [f32], usize),
    /// A factor.
    pub(super) scale: f32,
    /// Whether the product is added to what `c` holds.
    pub(super) add: bool,
}

impl Product<'_> {
    /// Computes it.
    pub(super) fn run(self) {
        Arch::new().dispatch(self);
    }

    /// All rows of some columns, as many at a time as leave registers for the right operand.
    #[inline(always)]
    fn bands<S: Simd>(&mut self, simd: S, b: (&[f32], usize), columns: Range<usize>) {
        let m = self.size[0];
        let mut i = 0;
        if S::REGISTER_COUNT >= 32 {
            while i + 8 <= m {
                self.band::<S, 8>(simd, b, i, columns.clone());
                i += 8;
            }
        } else {
            // The last 8 are 4 and 4, and not 6 and 2 single ones.
            while i + 6 <= m && m - i != 8 {
                self.band::<S, 6>(simd, b, i, columns.clone());
                i += 6;
            }
        }
        while i + 4 <= m {
            self.band::<S, 4>(simd, b, i, columns.clone());
            i += 4;
        }
        while i < m {
            self.band::<S, 1>(simd, b, i, columns.clone());
            i += 1;
        }
    }

    /// `M` rows from row `i` on of some columns, the first of which is the first of `b`.
    #[inline(always)]
    fn band<S: Simd, const M: usize>(
        &mut self,
        simd: S,
        (b, stride): (&[f32], usize),
        i: usize,
        columns: Range<usize>,
    ) {
        let lanes = S::F32_LANES;
        let mut j = columns.start;
        while j + 2 * lanes <= columns.end {
            let b = &b[(j - columns.start).min(b.len())..];
            self.tile::<S, M, 2>(simd, (b, stride), i, j, 2 * lanes);
            j += 2 * lanes;
        }
        if j < columns.end {
            let b = &b[(j - columns.start).min(b.len())..];
            self.tile::<S, M, 1>(simd, (b, stride), i, j, columns.end - j);
        }
    }

    /// `M` rows from row `i` on of `V` vectors of columns from column `j` of `c` on, which are the first of `b`; of each row
    /// `width` elements are stored.
    #[allow(clippy::needless_range_loop, reason = "an index picks the same place in every row")]
    #[inline(always)]
    fn tile<S: Simd, const M: usize, const V: usize>(
        &mut self,
        simd: S,
        b: (&[f32], usize),
        i: usize,
        j: usize,
        width: usize,
    ) {
        let k = self.size[2];
        let mut sums = Sums::<S, M, V> { simd, b, sums: [[simd.splat_f32s(0.0); V]; M] };
        match self.a {
            Left::Rows(a, stride) => {
                let rows: [&[f32]; M] = std::array::from_fn(|r| &a[(i + r) * stride..][..k]);
                // Four at a time, so that a row's bounds are checked once for four elements.
                let fours = rows.map(|row| row.as_chunks::<4>().0);
                for q in 0..k / 4 {
                    let four: [&[f32; 4]; M] = std::array::from_fn(|r| &fours[r][q]);
                    for l in 0..4 {
                        sums.add(4 * q + l, |r| four[r][l]);
                    }
                }
                for p in k - k % 4..k {
                    sums.add(p, |r| rows[r][p]);
                }
            }
            Left::Columns(a, stride) => {
                let a = &a[i.min(a.len())..];
                for p in 0..k {
                    let column = &a[p * stride..][..M];
                    sums.add(p, |r| column[r]);
                }
            }
        }
        let sums = sums.sums;
        let scale = simd.splat_f32s(self.scale);
        let (c, stride) = (&mut *self.c.0, self.c.1);
        for (r, sums) in sums.iter().enumerate() {
            let row = &mut c[(i + r) * stride + j..][..width];
            let (vectors, rest) = S::as_mut_simd_f32s(row);
            if vectors.len() == V {
                for (out, sum) in vectors.iter_mut().zip(sums) {
                    *out = if self.add {
                        simd.mul_add_f32s(scale, *sum, *out)
                    } else {
                        simd.mul_f32s(scale, *sum)
                    };
                }
            } else {
                let old = if self.add { simd.partial_load_f32s(rest) } else { simd.splat_f32s(0.0) };
                simd.partial_store_f32s(rest, simd.mul_add_f32s(scale, sums[0], old));
            }
        }
    }
}

/// `M` rows by `V` vectors of sums.
struct Sums<'a, S: Simd, const M: usize, const V: usize> {
    simd: S,
    b: (&'a [f32], usize),
    sums: [[S::f32s; V]; M],
}

impl<S: Simd, const M: usize, const V: usize> Sums<'_, S, M, V> {
    /// Adds the products of the right operand's row `p` with each row's p-th element, `a(row)`.
    #[inline(always)]
    fn add(&mut self, p: usize, a: impl Fn(usize) -> f32) {
        let simd = self.simd;
        let (b, _) = S::as_simd_f32s(&self.b.0[p * self.b.1..][..V * S::F32_LANES]);
        for (r, sums) in self.sums.iter_mut().enumerate() {
            let x = simd.splat_f32s(a(r));
            for (sum, b) in sums.iter_mut().zip(b) {
                *sum = simd.mul_add_f32s(x, *b, *sum);
            }
        }
    }
}

impl WithSimd for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let [_, n, k] = self.size;
        let (b, stride) = self.b;
        let lanes = S::F32_LANES;
        let whole = n - n % lanes;
        // As many columns of the right operand as stay in the nearest cache while all rows pass by.
        let block = (CACHED / k.max(1)).max(1).next_multiple_of(2 * lanes);
        for j in (0..whole).step_by(block) {
            self.bands(simd, (&b[j.min(b.len())..], stride), j..(j + block).min(whole));
        }
        if whole < n {
            // The last columns do not fill a vector: they move to a place where zeros follow them.
            let mut padded = vec![0.0; k * lanes];
            for p in 0..k {
                padded[p * lanes..][..n - whole].copy_from_slice(&b[p * stride + whole..][..n - whole]);
            }
            self.bands(simd, (&padded, lanes), whole..n);
        }
    }
}

/// The transpose of a matrix `[rows, columns]` stored by rows at distance `stride`.
pub(super) fn transposed(x: &[f32], rows: usize, columns: usize, stride: usize) -> Vec<f32> {
    // A square of them lies in as few cache lines as it has rows, on both sides.
    const SQUARE: usize = 16;
    let mut out = vec![0.0; rows * columns];
    for first_row in (0..rows).step_by(SQUARE) {
        let height = SQUARE.min(rows - first_row);
        for first in (0..columns).step_by(SQUARE) {
            for column in first..(first + SQUARE).min(columns) {
                let out = &mut out[column * rows + first_row..][..height];
                for (i, out) in out.iter_mut().enumerate() {
                    *out = x[(first_row + i) * stride + column];
                }
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(n: usize, seed: u64) -> Vec<f32> {
        let key = crate::rng::key(seed, "product");
        (0..n as u64).map(|i| crate::rng::uniform(key, i) as f32 - 0.5).collect()
    }

    /// Both orders of the left operand, set and added, inside wider matrices, against the plain sums.
    fn check(m: usize, n: usize, k: usize) {
        let (a_row, b_row, c_row) = (k + 3, n + 5, n + 2);
        let (a, b) = (values(m * a_row, 1), values(k * b_row, 2));
        let before = values(m * c_row, 3);
        let a_columns = transposed(&a, m, k, a_row);
        for add in [false, true] {
            for left in [Left::Rows(&a, a_row), Left::Columns(&a_columns, m)] {
                let mut c = before.clone();
                Product { size: [m, n, k], a: left, b: (&b, b_row), c: (&mut c, c_row), scale: 0.5, add }
                    .run();
                for i in 0..m {
                    for j in 0..c_row {
                        let sum: f64 = (0..k)
                            .map(|p| f64::from(a[i * a_row + p]) * f64::from(b[p * b_row + j % b_row]))
                            .sum();
                        let old = f64::from(before[i * c_row + j]);
                        let want = match (j < n, add) {
                            (true, true) => old + 0.5 * sum,
                            (true, false) => 0.5 * sum,
                            (false, _) => old,
                        };
                        let got = f64::from(c[i * c_row + j]);
                        assert!(
                            (got - want).abs() < 1e-5 * (k as f64 / 100.0).max(1.0),
                            "{m}x{n}x{k} at {i},{j}: {got}, want {want}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn products_are_the_plain_sums() {
        for (m, n, k) in [
            (1, 1, 1),
            (8, 32, 7),
            (13, 35, 16),
            (3, 16, 0),
            (9, 8, 64),
            (16, 100, 33),
            (0, 5, 2),
            (21, 300, 70),
            (2, 40, 5000),
        ] {
            check(m, n, k);
        }
    }
}
