//! How much a sweep has yet to train, as far as its search's own rule tells. Pure.

use domain::sweep::{Algorithm, SearchSpec};

/// Steps that a trial which stands at step `from` of `total` will make yet, on average.
///
/// Successive halving lets one in `reduction_factor` go on at each rung, so that what lies behind a rung counts
/// for that share alone; any other trial makes all its steps. That is known before any trial is over, and it
/// does not lean to the short lives of those that are over first.
pub(crate) fn steps_to_come(search: &SearchSpec, from: u64, total: u64) -> f64 {
    let factor = search.reduction_factor.max(2);
    let first = u64::from(search.min_steps.unwrap_or(1).max(1));
    let halves = search.algorithm == Algorithm::Asha;
    let rungs = std::iter::successors(halves.then_some(first), |step| step.checked_mul(u64::from(factor)));
    let (mut steps, mut at, mut share) = (0.0, from, 1.0);
    for rung in rungs.take_while(|rung| *rung < total).filter(|rung| *rung > from) {
        steps += share * (rung - at) as f64;
        (at, share) = (rung, share / f64::from(factor));
    }
    steps + share * total.saturating_sub(at) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_by_the_rule_of_the_search() {
        let asha = SearchSpec {
            algorithm: Algorithm::Asha,
            min_steps: Some(15),
            reduction_factor: 3,
            ..SearchSpec::default()
        };
        let grid = SearchSpec { algorithm: Algorithm::Grid, ..asha.clone() };
        for (search, from, total, want) in [
            (&grid, 0, 135, 135.0),
            (&grid, 100, 135, 35.0),
            (&grid, 135, 135, 0.0),
            // 15 steps, a third of the 30 to the second rung, a ninth of the 90 to the end.
            (&asha, 0, 135, 35.0),
            (&asha, 15, 135, 60.0),
            (&asha, 20, 135, 55.0),
            (&asha, 45, 135, 90.0),
            (&asha, 130, 135, 5.0),
            (&asha, 0, 10, 10.0),
            (&asha, 9, 5, 0.0),
        ] {
            assert_eq!(steps_to_come(search, from, total), want, "{:?} {from}/{total}", search.algorithm);
        }
    }
}
