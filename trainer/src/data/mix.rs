//! Several data sets' rows as one: Hugging Face's `interleave_datasets`. The rows are held once, and a list of their
//! numbers says in which order they come.

use crate::error::{Result, TrainError};
use crate::rng;
use domain::trial::{StoppingStrategy, TrialConfig};

/// Rows that a mixture may have at most, or [`TIMES`] those that it is made of: 64 MiB of numbers, or fewer bytes than
/// the rows themselves. A probability near 0 would have the others' rows come again and again.
const MOST: usize = 1 << 24;
const TIMES: usize = 4;

const KEY: &str = "interleave_probabilities";

/// The probabilities of `dataset_name` and of each of `interleave_datasets`; `None` where they take turns.
///
/// # Errors
/// They are not as many as the data sets, or cannot be brought to a sum of 1.
pub fn probabilities(config: &TrialConfig) -> Result<Option<Vec<f64>>> {
    let others = config.interleave_datasets.as_deref().unwrap_or_default();
    let Some(weights) = &config.interleave_probabilities else { return Ok(None) };
    let refuse = |problem: String, remedy: &str| Err(TrainError::parameter(KEY, problem, remedy));
    let sets = 1 + others.len();
    if weights.len() != sets {
        let remedy = "give one for dataset_name and then one for each of interleave_datasets";
        return refuse(format!("are {}, but there are {sets} data sets", weights.len()), remedy);
    }
    if let Some(weight) = weights.iter().find(|weight| !(weight.is_finite() && **weight >= 0.0)) {
        return refuse(format!("hold {weight}"), "give numbers from 0");
    }
    let sum: f64 = weights.iter().sum();
    if !(sum > 0.0 && sum.is_finite()) {
        return refuse(format!("have a sum of {sum}"), "give at least one number above 0");
    }
    Ok(Some(weights.iter().map(|weight| weight / sum).collect()))
}

/// The order in which a mixture takes the rows of sets that have `lengths` rows, all of them numbered from the first
/// set's first to the last one's last; `None` if there is one set. Each next row is the next of a set that is drawn by
/// `seed`, or without probabilities of the next set. A set that has no more begins anew, until one has none
/// (`first_exhausted`) or all have had their last (`all_exhausted`). A set of probability 0 is left out.
///
/// # Errors
/// Those of [`probabilities`]; the list would be too long.
pub fn order(config: &TrialConfig, lengths: &[usize]) -> Result<Option<Vec<u32>>> {
    if lengths.len() == 1 {
        return Ok(None);
    }
    let probabilities = probabilities(config)?;
    let rows: usize = lengths.iter().sum();
    let most = MOST.max(rows.saturating_mul(TIMES)).min(u32::MAX as usize);
    let too_long = |key, count: f64, remedy: &str| {
        let problem = format!(
            "make a list of some {count:.0} rows out of {rows}, above the {most} that a mixture of them may have"
        );
        TrainError::parameter(key, problem, remedy)
    };
    let starts: Vec<usize> = lengths
        .iter()
        .scan(0, |next, length| {
            *next += length;
            Some(*next - length)
        })
        .collect();
    // No more rows than `most`, or it is refused below.
    let number = |set: usize, row: usize| (starts[set] + row) as u32;
    let all = config.stopping_strategy == StoppingStrategy::AllExhausted;
    let Some(probabilities) = probabilities else {
        let rounds = if all { lengths.iter().max() } else { lengths.iter().min() };
        let rounds = rounds.copied().unwrap_or(0);
        if rounds.saturating_mul(lengths.len()) > most || rows > most {
            let remedy = "set stopping_strategy: first_exhausted, or mix fewer or more even data sets";
            return Err(too_long("interleave_datasets", rounds as f64 * lengths.len() as f64, remedy));
        }
        let number = &number;
        let turn = |round| {
            lengths.iter().enumerate().map(move |(set, length): (_, &usize)| number(set, round % *length))
        };
        return Ok(Some((0..rounds).flat_map(turn).collect()));
    };
    let remedy = "raise the least of them, or set stopping_strategy: first_exhausted";
    let expected = lengths.iter().zip(&probabilities).filter(|(_, p)| **p > 0.0);
    let expected = expected.map(|(length, p)| *length as f64 / p);
    let expected = if all { expected.fold(0.0, f64::max) } else { expected.fold(f64::INFINITY, f64::min) };
    if expected > most as f64 || rows > most {
        return Err(too_long(KEY, expected, remedy));
    }
    let mut exhausted: Vec<bool> = probabilities.iter().map(|p| all && *p == 0.0).collect();
    let (mut next, mut order) = (vec![0; lengths.len()], Vec::new());
    let (key, last) =
        (rng::key(config.seed, "data/interleave"), probabilities.iter().rposition(|p| *p > 0.0));
    while if all { exhausted.contains(&false) } else { !exhausted.contains(&true) } {
        if order.len() == most {
            // Unluckier than expected.
            return Err(too_long(KEY, most as f64 + 1.0, remedy));
        }
        let (drawn, mut below) = (rng::uniform(key, order.len() as u64), 0.0);
        let set = probabilities.iter().position(|p| {
            below += p;
            drawn < below
        });
        // Rounded, the sum may be a little below 1.
        let Some(set) = set.or(last) else { break };
        order.push(number(set, next[set]));
        next[set] += 1;
        if next[set] >= lengths[set] {
            exhausted[set] = true;
            next[set] = 0;
        }
    }
    Ok(Some(order))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn config(weights: Option<&[f64]>, others: usize, all: bool, seed: u64) -> TrialConfig {
        TrialConfig {
            interleave_datasets: Some(vec!["rows.jsonl".into(); others]),
            interleave_probabilities: weights.map(<[f64]>::to_vec),
            stopping_strategy: if all { StoppingStrategy::AllExhausted } else { StoppingStrategy::default() },
            seed,
            ..TrialConfig::default()
        }
    }

    /// Each row's set and its number there.
    fn places(config: &TrialConfig, lengths: &[usize]) -> Vec<(usize, usize)> {
        let place = |row: u32| {
            let (mut set, mut row) = (0, row as usize);
            while row >= lengths[set] {
                row -= lengths[set];
                set += 1;
            }
            (set, row)
        };
        order(config, lengths).unwrap().unwrap().into_iter().map(place).collect()
    }

    /// The examples of `datasets.interleave_datasets`' documentation.
    #[test]
    fn sets_take_turns_as_hugging_faces_do() {
        let rows = [0, 1, 2, 10, 11, 12, 20, 21, 22, 23];
        for (all, want) in [
            (false, vec![0, 10, 20, 1, 11, 21, 2, 12, 22]),
            (true, vec![0, 10, 20, 1, 11, 21, 2, 12, 22, 0, 10, 23]),
        ] {
            let order = order(&config(None, 2, all, 0), &[3, 3, 4]).unwrap().unwrap();
            let taken: Vec<_> = order.into_iter().map(|row| rows[row as usize]).collect();
            assert_eq!(taken, want);
        }
        assert_eq!(order(&config(None, 0, false, 0), &[2]).unwrap(), None);
    }

    #[test]
    fn what_makes_no_probabilities() {
        let check = |weights: &[f64], want: &str| {
            let message = probabilities(&config(Some(weights), 1, false, 0)).unwrap_err().to_string();
            assert!(message.starts_with(&format!("interleave_probabilities: {want}; give ")), "{message}");
        };
        check(&[1.0], "are 1, but there are 2 data sets");
        check(&[1.0, -0.5], "hold -0.5");
        check(&[1.0, f64::NAN], "hold NaN");
        check(&[f64::INFINITY, 1.0], "hold inf");
        check(&[0.0, 0.0], "have a sum of 0");
        check(&[f64::MAX, f64::MAX], "have a sum of inf");
        assert_eq!(probabilities(&config(Some(&[3.0, 1.0]), 1, false, 0)).unwrap(), Some(vec![0.75, 0.25]));
    }

    /// A list is a few times as long as what it is made of, or short.
    #[test]
    fn a_mixture_has_an_end() {
        let refused = |config: TrialConfig, lengths: &[usize], want: &str| {
            let message = order(&config, lengths).unwrap_err().to_string();
            assert_eq!(message, want);
        };
        refused(
            config(Some(&[1.0, 1e-12]), 1, true, 0),
            &[5, 5],
            "interleave_probabilities: make a list of some 5000000000005 rows out of 10, above the 16777216 that a mixture of \
             them may have; raise the least of them, or set stopping_strategy: first_exhausted",
        );
        refused(
            config(None, 5, true, 0),
            &[1 << 23, 1, 1, 1, 1, 1],
            "interleave_datasets: make a list of some 50331648 rows out of 8388613, above the 33554452 that a mixture of them \
             may have; set stopping_strategy: first_exhausted, or mix fewer or more even data sets",
        );
        let mixed = order(&config(Some(&[1.0, 1e-4]), 1, true, 0), &[5, 1]).unwrap().unwrap();
        assert!(
            mixed.len() < 1 << 20 && mixed.iter().filter(|row| **row == 5).count() == 1,
            "{}",
            mixed.len()
        );
    }

    /// A set's share of a long list is its probability: within five standard deviations.
    #[test]
    fn shares_are_the_probabilities() {
        let places = places(&config(Some(&[6.0, 3.0, 1.0]), 2, false, 7), &[60_000, 60_000, 60_000]);
        for (set, p) in [0.6, 0.3, 0.1].into_iter().enumerate() {
            let share = places.iter().filter(|(s, _)| *s == set).count() as f64 / places.len() as f64;
            let deviation = (p * (1.0 - p) / places.len() as f64).sqrt();
            assert!((share - p).abs() < 5.0 * deviation, "{set}: {share}");
        }
    }

    proptest! {
        #[test]
        fn every_set_goes_on_where_it_was(
            lengths in prop::collection::vec(1usize..30, 2..4), seed: u64, all: bool, zero: bool,
        ) {
            let mut weights: Vec<f64> = (1..=lengths.len()).map(|n| n as f64).collect();
            if zero {
                weights[0] = 0.0;
            }
            let config = config(Some(&weights), lengths.len() - 1, all, seed);
            let taken = places(&config, &lengths);
            prop_assert_eq!(&taken, &places(&config, &lengths));
            let mut counts = vec![0; lengths.len()];
            for (set, row) in &taken {
                prop_assert_eq!(*row, counts[*set] % lengths[*set]);
                counts[*set] += 1;
            }
            prop_assert!(!zero || counts[0] == 0);
            let full = |set: &usize| counts[*set] >= lengths[*set];
            let complete = (0..lengths.len()).filter(full).count();
            if all {
                prop_assert_eq!(complete, lengths.len() - usize::from(zero));
            } else {
                prop_assert_eq!(complete, 1);
                let (last, row) = taken[taken.len() - 1];
                prop_assert_eq!(row + 1, lengths[last]);
            }
        }
    }
}
