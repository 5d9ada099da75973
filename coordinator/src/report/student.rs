//! Student's t distribution: the value that it seldom exceeds, for any degrees of freedom and any probability, since
//! intervals that are adjusted for several comparisons ask for those of no table. Pure.
//!
//! Of our own for the degrees of freedom that runs of the same value have, infinitely many, of which the crates that have the
//! distribution (statrs 0.19) make no quantile.

use std::f64::consts::SQRT_2;

/// From so many degrees of freedom on it is the normal distribution; its quantiles differ by less than 1e-5 there.
const NORMAL: f64 = 1e6;
/// Halvings of a quantile's bracket, after which it is as narrow as a number is exact.
const HALVINGS: u32 = 60;
/// Terms of the continued fraction at most; where it is used it needs about as many as the root of its parameters.
const TERMS: u32 = 10_000;

/// The value that Student's t exceeds with probability `tail`, above 0 and below 0.5. Of fewer than one degree of freedom,
/// or where their number is none, that of one.
pub(super) fn quantile(freedom: f64, tail: f64) -> f64 {
    let freedom = freedom.max(1.0);
    let (mut low, mut high) = (0.0, 1.0);
    while beyond(high, freedom) > tail {
        (low, high) = (high, 2.0 * high);
    }
    for _ in 0..HALVINGS {
        let middle = f64::midpoint(low, high);
        if beyond(middle, freedom) > tail {
            low = middle;
        } else {
            high = middle;
        }
    }
    f64::midpoint(low, high)
}

/// The probability of more than `value`, which is above 0: half of the regularised incomplete beta function
/// I(ν ÷ (ν + t²); ν ÷ 2, 1 ÷ 2) (Abramowitz and Stegun 26.7.1).
fn beyond(value: f64, freedom: f64) -> f64 {
    if freedom >= NORMAL {
        return libm::erfc(value / SQRT_2) / 2.0;
    }
    let (square, a, b) = (value * value, freedom / 2.0, 0.5);
    let x = freedom / (freedom + square);
    // Beyond this the fraction converges slowly, and the other tail's fast.
    if x <= (a + 1.0) / (a + b + 2.0) {
        beta(x, a, b) / 2.0
    } else {
        (1.0 - beta(square / (freedom + square), b, a)) / 2.0
    }
}

/// The regularised incomplete beta function by its continued fraction (DLMF 8.17.22), evaluated from the front (Lentz 1976).
fn beta(x: f64, a: f64, b: f64) -> f64 {
    let scale = libm::lgamma(a + b) - libm::lgamma(a) - libm::lgamma(b);
    let front = (scale + a * x.ln() + b * (1.0 - x).ln()).exp() / a;
    let (mut fraction, mut c, mut d) = (1.0, 1.0, 0.0);
    for n in 1..=TERMS {
        let m = f64::from(n / 2);
        let term = if n % 2 == 0 {
            m * (b - m) * x / ((a + 2.0 * m - 1.0) * (a + 2.0 * m))
        } else {
            -(a + m) * (a + b + m) * x / ((a + 2.0 * m) * (a + 2.0 * m + 1.0))
        };
        d = 1.0 / (1.0 + term * d);
        c = 1.0 + term / c;
        fraction *= c * d;
        if (c * d - 1.0).abs() < 1e-15 {
            break;
        }
    }
    front / fraction
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// 97.5 % quantiles, divided among no comparisons, 2, 4 and 99. Reference: the density integrated and the integral
    /// inverted by mpmath; of one and two degrees of freedom also in closed form.
    #[test]
    fn quantiles_are_students() {
        for (freedom, want) in [
            (1.0, [12.706_205, 25.451_700, 50.923_037, 1_260.506_885]),
            (2.0, [4.302_653, 6.205_347, 8.860_200, 44.480_334]),
            (4.9, [2.586_441, 3.188_615, 3.847_833, 8.121_444]),
            (9.0, [2.262_157, 2.685_011, 3.110_935, 5.283_062]),
            (28.4, [2.047_108, 2.366_569, 2.666_910, 3.924_216]),
            (99.0, [1.984_217, 2.276_003, 2.544_161, 3.596_603]),
            (1e5, [1.959_988, 2.241_436, 2.497_751, 3.478_177]),
            (2e6, [1.959_965, 2.241_404, 2.497_708, 3.478_069]),
            (f64::INFINITY, [1.959_964, 2.241_403, 2.497_705, 3.478_063]),
        ] {
            for (comparisons, want) in [1.0, 2.0, 4.0, 99.0].into_iter().zip(want) {
                let got = quantile(freedom, 0.025 / comparisons);
                assert!(
                    (got - want).abs() < 1e-5 * want.max(1.0),
                    "{freedom}, {comparisons}: {got}, not {want}"
                );
            }
        }
        for freedom in [0.0, 0.5, f64::NAN] {
            assert_eq!(quantile(freedom, 0.025), quantile(1.0, 0.025), "{freedom}");
        }
    }

    proptest! {
        /// In closed form: tan(π(½ − p)) and (1 − 2p) ÷ √(2p(1 − p)).
        #[test]
        fn of_one_and_two_degrees_of_freedom(tail in 1e-4..0.45f64) {
            let one = (std::f64::consts::PI * (0.5 - tail)).tan();
            let two = (1.0 - 2.0 * tail) / (2.0 * tail * (1.0 - tail)).sqrt();
            prop_assert!((quantile(1.0, tail) - one).abs() < 1e-7 * one.max(1.0));
            prop_assert!((quantile(2.0, tail) - two).abs() < 1e-7 * two.max(1.0));
        }

        #[test]
        fn more_freedom_and_more_tail_reach_less_far(freedom in 1.0..1e5f64, tail in 1e-4..0.2f64) {
            let at = quantile(freedom, tail);
            prop_assert!(quantile(1.1 * freedom, tail) < at);
            prop_assert!(quantile(freedom, 1.1 * tail) < at);
            prop_assert!(quantile(f64::INFINITY, tail) < at);
        }
    }
}
