//! A mean over a few runs, and how sure it is. Pure, and the same each time.
//!
//! Runs of one configuration with other seeds are a sample; where they are asked the same items of a task, those items are
//! another, drawn once for all runs. With s the standard deviation of n values and u the standard error over items, the
//! standard error of their mean is √(s²/n + u²). The interval is Student's, mean ± t · that, with Welch and Satterthwaite's
//! effective degrees of freedom (JCGM 100:2008, G.4), of which s²/n has n − 1 and u², from hundreds of items, as good as
//! infinitely many. Beside it stands the percentile interval of the bootstrap (Efron and Tibshirani 1993, chapter 13), of
//! values that are differences within a run the paired one: runs drawn with replacement, and a normal error of u added.
//! That one is too narrow for few runs (Hesterberg 2015, The American Statistician 69(4)): three runs have ten samples
//! with replacement, and the interval is from the least to the largest of them. So what is said goes by Student's.

use domain::rng;

/// Times that the runs are drawn anew.
const RESAMPLES: usize = 10_000;
/// Part of the samples that lies beyond each end of an interval of 95 %.
const TAIL: f64 = 0.025;
/// The 97.5 % quantiles of Student's t for 1, 2, … degrees of freedom; for more [`quantile`] has a series.
const T: [f64; 9] =
    [12.706_205, 4.302_653, 3.182_446, 2.776_445, 2.570_582, 2.446_912, 2.364_624, 2.306_004, 2.262_157];
/// The same of a normal distribution.
const NORMAL: f64 = 1.959_964;

/// A mean, and how sure it is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Estimate {
    /// Values that it is of.
    pub(super) runs: usize,
    pub(super) mean: f64,
    /// Their standard deviation, of a sample: divided by n − 1.
    pub(super) deviation: f64,
    /// Student's 95 % interval.
    pub(super) interval: (f64, f64),
    /// The bootstrap's.
    pub(super) bootstrap: (f64, f64),
}

impl Estimate {
    /// Of values of which each has the same items; `items` is the variance of their mean over items, 0 where no task was
    /// asked. `None` of fewer than two values.
    pub(super) fn of(values: &[f64], items: f64) -> Option<Self> {
        let runs = values.len();
        if runs < 2 {
            return None;
        }
        let n = runs as f64;
        let mean = values.iter().sum::<f64>() / n;
        let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (n - 1.0);
        let (of_runs, of_both) = (variance / n, variance / n + items);
        let freedom = if of_runs > 0.0 { (n - 1.0) * (of_both / of_runs).powi(2) } else { f64::INFINITY };
        let reach = quantile(freedom) * of_both.sqrt();
        Some(Self {
            runs,
            mean,
            deviation: variance.sqrt(),
            interval: (mean - reach, mean + reach),
            bootstrap: bootstrap(values, items.sqrt()),
        })
    }

    /// Whether 0 is among what the mean may be, so that values of differences show none.
    pub(super) fn holds_zero(&self) -> bool {
        (self.interval.0..=self.interval.1).contains(&0.0)
    }
}

/// The 97.5 % quantile of Student's t, of whole degrees of freedom: of others the next fewer, which makes an interval wider.
/// Beyond [`T`] it is Cornish and Fisher's expansion to 1/ν⁴ (Abramowitz and Stegun 26.7.5), good to 1e-5.
fn quantile(freedom: f64) -> f64 {
    let freedom = freedom.floor().max(1.0);
    if let Some(known) = T.get(freedom as usize - 1) {
        return *known;
    }
    let z = NORMAL;
    let terms = [
        (z.powi(3) + z) / 4.0,
        (5.0 * z.powi(5) + 16.0 * z.powi(3) + 3.0 * z) / 96.0,
        (3.0 * z.powi(7) + 19.0 * z.powi(5) + 17.0 * z.powi(3) - 15.0 * z) / 384.0,
        (79.0 * z.powi(9) + 776.0 * z.powi(7) + 1482.0 * z.powi(5) - 1920.0 * z.powi(3) - 945.0 * z)
            / 92_160.0,
    ];
    terms.iter().rev().fold(0.0, |sum, term| (sum + term) / freedom) + z
}

/// The percentile interval of the mean over runs drawn with replacement, each time with another error over items.
fn bootstrap(values: &[f64], items: f64) -> (f64, f64) {
    let (drawn, errors) = (rng::key(0, "bootstrap/runs"), rng::key(0, "bootstrap/items"));
    let n = values.len();
    let draw = |place: usize| values.get((rng::uniform(drawn, place as u64) * n as f64) as usize);
    let mean = |sample: usize| {
        let sum: f64 = (sample * n..(sample + 1) * n).filter_map(draw).sum();
        sum / n as f64 + items * rng::normal(errors, sample as u64)
    };
    let mut means: Vec<_> = (0..RESAMPLES).map(mean).collect();
    means.sort_by(f64::total_cmp);
    let beyond = (TAIL * RESAMPLES as f64) as usize;
    (means[beyond], means[RESAMPLES - 1 - beyond])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(got: f64, want: f64, by: f64, what: &str) {
        assert!((got - want).abs() <= by, "{what}: {got} is not {want}");
    }

    /// Reference: the regularised incomplete beta function, inverted by bisection.
    #[test]
    fn quantiles_are_students() {
        for (freedom, want) in [
            (1.0, 12.706_205),
            (2.0, 4.302_653),
            (4.9, 2.776_445),
            (9.0, 2.262_157),
            (10.0, 2.228_139),
            (15.0, 2.131_450),
            (30.0, 2.042_272),
            (99.0, 1.984_217),
            (f64::INFINITY, 1.959_964),
        ] {
            close(quantile(freedom), want, 1e-5, &format!("{freedom} degrees of freedom"));
        }
    }

    /// Reference: the formulas in Python's `statistics`, and the same streams drawn there.
    #[test]
    fn intervals_of_few_runs() {
        for (values, items, mean, deviation, interval, bootstrap) in [
            (&[1.0, 2.0, 3.0][..], 0.0, 2.0, 1.0, (-0.484_138, 4.484_138), (1.0, 3.0)),
            (&[0.1, 0.3], 0.0, 0.2, 0.141_421, (-1.070_621, 1.470_621), (0.1, 0.3)),
            // Runs that agree, on items that are a sample.
            (&[2.0, 2.0, 2.0], 0.25, 2.0, 0.0, (1.020_018, 2.979_982), (1.036_929, 2.961_983)),
            // 28.4 effective degrees of freedom.
            (
                &[0.02, 0.05, 0.01],
                0.000_4,
                0.026_667,
                0.020_817,
                (-0.021_129, 0.074_463),
                (-0.016_822, 0.070_395),
            ),
            (
                &[0.5, -0.1, 0.9, 0.3, 0.4, 1.2, -0.3, 0.8, 0.6, 0.2],
                0.0,
                0.45,
                0.455_217,
                (0.124_358, 0.775_642),
                (0.18, 0.72),
            ),
        ] {
            let got = Estimate::of(values, items).unwrap();
            let what = format!("{values:?}, {items}: {got:?}");
            assert_eq!(got.runs, values.len());
            for (got, want) in [
                (got.mean, mean),
                (got.deviation, deviation),
                (got.interval.0, interval.0),
                (got.interval.1, interval.1),
                (got.bootstrap.0, bootstrap.0),
                (got.bootstrap.1, bootstrap.1),
            ] {
                close(got, want, 2e-6, &what);
            }
        }
        assert_eq!(Estimate::of(&[1.0], 0.0), None);
    }

    #[test]
    fn a_difference_that_may_be_0_is_none() {
        for (values, want) in
            [(&[1.0, 2.0, 3.0][..], true), (&[2.0, 2.1, 1.9], false), (&[-2.0, -2.1, -1.9], false)]
        {
            assert_eq!(Estimate::of(values, 0.0).unwrap().holds_zero(), want, "{values:?}");
        }
    }
}
