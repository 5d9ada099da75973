//! Arithmetic on slices, written so that the compiler turns it into vector instructions. Everything here is
//! inlined into its caller, whose closure [`widest`] compiles once for each instruction set.

/// Runs `f` compiled for the widest vectors that this processor has.
#[inline(always)]
pub(in crate::ops) fn widest<T>(f: impl FnOnce() -> T) -> T {
    pulp::Arch::new().dispatch(f)
}

/// Independent sums that a reduction keeps: a whole number of vectors on every instruction set.
pub(super) const LANES: usize = 32;

/// e to the x, within 3 units in the last place for results that are normal numbers; beyond, the nearest such
/// result. NaN stays NaN.
///
/// x = n·ln 2 + r with |r| ≤ ln 2 / 2; eʳ by its Taylor polynomial of degree 7 (error 5e-9), 2ⁿ by its exponent.
#[inline(always)]
pub(in crate::ops) fn exp(x: f32) -> f32 {
    // Adding 1.5·2²³ rounds to a whole number, which then stands in the low bits of the sum.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts, the first short enough that n times it is exact.
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    // Written as comparisons, which let NaN through, unlike f32::clamp's relatives max and min.
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 88.0 { 88.0 } else { x };
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN_2_HIGH - n * LN_2_LOW;
    let mut p = 1.0 / 5040.0;
    for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        p = p * r + c;
    }
    p * f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0f32.to_bits()))
}

/// 1 / (1 + e⁻ˣ).
#[inline(always)]
pub(in crate::ops) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Folds `f` over the indices of a slice's elements in [`LANES`] independent strands.
#[inline(always)]
fn fold(n: usize, start: f32, mut f: impl FnMut(f32, usize) -> f32, join: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [start; LANES];
    let whole = n - n % LANES;
    for i in (0..whole).step_by(LANES) {
        for (l, lane) in lanes.iter_mut().enumerate() {
            *lane = f(*lane, i + l);
        }
    }
    for i in whole..n {
        lanes[i - whole] = f(lanes[i - whole], i);
    }
    let mut width = LANES / 2;
    while width > 0 {
        for l in 0..width {
            lanes[l] = join(lanes[l], lanes[l + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// Σ aᵢ·bᵢ.
#[inline(always)]
pub(in crate::ops) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let n = a.len();
    let b = &b[..n];
    fold(n, 0.0, |sum, i| sum + a[i] * b[i], |x, y| x + y)
}

/// Σ aᵢ·bᵢ·cᵢ.
#[inline(always)]
pub(in crate::ops) fn dot3(a: &[f32], b: &[f32], c: &[f32]) -> f32 {
    let n = a.len();
    let (b, c) = (&b[..n], &c[..n]);
    fold(n, 0.0, |sum, i| sum + a[i] * b[i] * c[i], |x, y| x + y)
}

/// The largest element; −∞ of none.
#[inline(always)]
fn largest(a: &[f32]) -> f32 {
    let max = |x: f32, y: f32| if y > x { y } else { x };
    fold(a.len(), f32::NEG_INFINITY, |m, i| max(m, a[i]), max)
}

/// Turns `row` into exp(rowᵢ − largest) and returns the largest and the sum.
#[inline(always)]
pub(in crate::ops) fn exponentials(row: &mut [f32]) -> (f32, f32) {
    let (n, top) = (row.len(), largest(row));
    let add = |sum: f32, i: usize| {
        row[i] = exp(row[i] - top);
        sum + row[i]
    };
    (top, fold(n, 0.0, add, |x, y| x + y))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_the_exponential() {
        for i in -87_000..88_000 {
            let x = i as f32 / 1000.0;
            let (got, want) = (f64::from(exp(x)), f64::from(x).exp());
            assert!((got - want).abs() <= 4e-7 * want, "exp({x}) = {got}, should be {want}");
        }
        for (x, low, high) in [(-1e30, 0.0, 2e-38), (f32::NEG_INFINITY, 0.0, 2e-38), (1e30, 1e38, f32::MAX)] {
            assert!((low..=high).contains(&exp(x)), "exp({x}) = {}", exp(x));
        }
        assert!(exp(f32::NAN).is_nan() && sigmoid(f32::NAN).is_nan());
    }

    #[test]
    fn folds_are_the_plain_sums() {
        for n in [0, 1, 31, 32, 33, 100] {
            let a: Vec<f32> = (0..n).map(|i| (i as f32 * 0.7).sin()).collect();
            let want: f32 = a.iter().map(|x| x * x).sum();
            assert!((dot(&a, &a) - want).abs() < 1e-5, "{n}");
            let top = a.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let mut e = a.clone();
            let (max, sum) = exponentials(&mut e);
            assert_eq!(max, top, "{n}");
            assert!((sum - a.iter().map(|x| (x - top).exp()).sum::<f32>()).abs() < 1e-4, "{n}");
        }
    }
}
