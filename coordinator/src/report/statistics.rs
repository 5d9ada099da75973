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

use super::student;
use domain::rng;

/// Times that the runs are drawn anew.
const RESAMPLES: usize = 10_000;
/// Part of the distribution that lies beyond each end of an interval of 95 %.
const TAIL: f64 = 0.025;

/// A mean, and how sure it is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Estimate {
    /// Values that it is of.
    pub(super) runs: usize,
    pub(super) mean: f64,
    /// Their standard deviation, of a sample: divided by n − 1.
    pub(super) deviation: f64,
    /// Student's interval; `None` of values that are all the same and of no items, which say nothing of how sure they are.
    pub(super) interval: Option<(f64, f64)>,
}

impl Estimate {
    /// Of values of which each has the same items; `items` is the variance of their mean over items, 0 where no task was
    /// asked. `comparisons` is how many are made together. `None` of fewer than two values.
    pub(super) fn of(values: &[f64], items: f64, comparisons: usize) -> Option<Self> {
        let runs = values.len();
        if runs < 2 {
            return None;
        }
        let n = runs as f64;
        let mean = values.iter().sum::<f64>() / n;
        let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (n - 1.0);
        let (of_runs, of_both) = (variance / n, variance / n + items);
        let freedom = if of_runs > 0.0 { (n - 1.0) * (of_both / of_runs).powi(2) } else { f64::INFINITY };
        let reach = student::quantile(freedom, tail(comparisons)) * of_both.sqrt();
        let interval = (of_both > 0.0).then_some((mean - reach, mean + reach));
        Some(Self { runs, mean, deviation: variance.sqrt(), interval })
    }
}

/// Whether 0 is among what a mean may be, by its interval, so that values of differences show none.
pub(super) fn holds_zero((low, high): (f64, f64)) -> bool {
    (low..=high).contains(&0.0)
}

/// What lies beyond each end of one of several intervals that together hold what they are of in 95 % of all cases: of the
/// largest of many differences chance makes more than of one (Bonferroni's inequality).
fn tail(comparisons: usize) -> f64 {
    TAIL / comparisons.max(1) as f64
}

/// The percentile interval of the mean over runs drawn with replacement, each time with another error over items, of which
/// `items` is the variance; of one of so many `comparisons`. `None` of no values.
pub(super) fn bootstrap(values: &[f64], items: f64, comparisons: usize) -> Option<(f64, f64)> {
    let (drawn, errors) = (rng::key(0, "bootstrap/runs"), rng::key(0, "bootstrap/items"));
    let (n, items) = (values.len(), items.sqrt());
    let draw = |place: usize| values.get((rng::uniform(drawn, place as u64) * n as f64) as usize);
    let mean = |sample: usize| {
        let sum: f64 = (sample * n..(sample + 1) * n).filter_map(draw).sum();
        sum / n as f64 + items * rng::normal(errors, sample as u64)
    };
    (n > 0).then(|| percentiles((0..RESAMPLES).map(mean).collect(), comparisons))
}

/// Between which of the means of resamples, of which there are some, one of so many `comparisons` lies in 95 % of all cases.
pub(super) fn percentiles(mut means: Vec<f64>, comparisons: usize) -> (f64, f64) {
    means.sort_by(f64::total_cmp);
    let beyond = (tail(comparisons) * means.len() as f64) as usize;
    (means[beyond], means[means.len() - 1 - beyond])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(got: f64, want: f64, by: f64, what: &str) {
        assert!((got - want).abs() <= by, "{what}: {got} is not {want}");
    }

    /// Reference: the formulas in Python's `statistics`, and the same streams drawn there.
    #[test]
    fn intervals_of_few_runs() {
        for (values, items, comparisons, mean, deviation, interval, drawn) in [
            (&[1.0, 2.0, 3.0][..], 0.0, 1, 2.0, 1.0, (-0.484_138, 4.484_138), (1.0, 3.0)),
            (&[1.0, 2.0, 3.0], 0.0, 2, 2.0, 1.0, (-1.582_659, 5.582_659), (1.0, 3.0)),
            (&[0.1, 0.3], 0.0, 1, 0.2, 0.141_421, (-1.070_621, 1.470_621), (0.1, 0.3)),
            // Runs that agree, on items that are a sample.
            (&[2.0, 2.0, 2.0], 0.25, 1, 2.0, 0.0, (1.020_018, 2.979_982), (1.036_929, 2.961_983)),
            // 28.4 effective degrees of freedom.
            (
                &[0.02, 0.05, 0.01],
                0.000_4,
                1,
                0.026_667,
                0.020_817,
                (-0.021_098, 0.074_431),
                (-0.016_822, 0.070_395),
            ),
            (
                &[0.5, -0.1, 0.9, 0.3, 0.4, 1.2, -0.3, 0.8, 0.6, 0.2],
                0.0,
                1,
                0.45,
                0.455_217,
                (0.124_358, 0.775_642),
                (0.18, 0.72),
            ),
        ] {
            let got = Estimate::of(values, items, comparisons).unwrap();
            let bootstrap = bootstrap(values, items, comparisons).unwrap();
            let what = format!("{values:?}, {items}: {got:?} {bootstrap:?}");
            assert_eq!(got.runs, values.len());
            let student = got.interval.unwrap();
            for (got, want) in [
                (got.mean, mean),
                (got.deviation, deviation),
                (student.0, interval.0),
                (student.1, interval.1),
                (bootstrap.0, drawn.0),
                (bootstrap.1, drawn.1),
            ] {
                close(got, want, 2e-6, &what);
            }
        }
        assert_eq!((Estimate::of(&[1.0], 0.0, 1), bootstrap(&[], 0.0, 1)), (None, None));
        assert_eq!(
            Estimate::of(&[2.0, 2.0, 2.0], 0.0, 1).unwrap().interval,
            None,
            "nothing says how sure it is"
        );
    }

    #[test]
    fn a_difference_that_may_be_0_is_none() {
        for (values, want) in
            [(&[1.0, 2.0, 3.0][..], true), (&[2.0, 2.1, 1.9], false), (&[-2.0, -2.1, -1.9], false)]
        {
            assert_eq!(
                holds_zero(Estimate::of(values, 0.0, 1).unwrap().interval.unwrap()),
                want,
                "{values:?}"
            );
        }
    }
}
