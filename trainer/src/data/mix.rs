//! Several data sets' rows as one: Hugging Face's `interleave_datasets`.

use crate::error::{Result, TrainError};
use crate::rng;
use domain::trial::{StoppingStrategy, TrialConfig};

/// Rows that a mixture may have at most.
const MOST: f64 = (1u64 << 28) as f64;

const KEY: &str = "interleave_probabilities";

/// The probabilities of `dataset_name` and of each of `interleave_datasets`; `None` where they take turns.
///
/// # Errors
/// They are not as many as the data sets, or cannot be brought to a sum of 1; something is said of a mixture, and there
/// is none.
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

/// One list of all sets' rows. Each next row is the next of a set that is drawn by `seed`, or without probabilities of
/// the next set. A set that has no more begins anew, until one has none (`first_exhausted`) or all have had their
/// last (`all_exhausted`). A set of probability 0 is left out.
///
/// # Errors
/// Those of [`probabilities`]; the list would be too long.
pub fn interleave<T: Clone>(config: &TrialConfig, sets: Vec<Vec<T>>) -> Result<Vec<T>> {
    let lengths: Vec<usize> = sets.iter().map(Vec::len).collect();
    match <[Vec<T>; 1]>::try_from(sets) {
        Ok([only]) => Ok(only),
        Err(sets) => {
            let places = order(config, &lengths)?;
            Ok(places.into_iter().map(|(set, row)| sets[set][row].clone()).collect())
        }
    }
}

/// Each row's set and its number there.
fn order(config: &TrialConfig, lengths: &[usize]) -> Result<Vec<(usize, usize)>> {
    let all = config.stopping_strategy == StoppingStrategy::AllExhausted;
    let Some(probabilities) = probabilities(config)? else {
        let rounds = if all { lengths.iter().max() } else { lengths.iter().min() };
        let round = |round: usize| lengths.iter().enumerate().map(move |(set, length)| (set, round % length));
        return Ok((0..rounds.copied().unwrap_or(0)).flat_map(round).collect());
    };
    let expected = lengths.iter().zip(&probabilities).filter(|(_, p)| **p > 0.0);
    let expected = expected.map(|(length, p)| *length as f64 / p);
    let rows = if all { expected.fold(0.0, f64::max) } else { expected.fold(f64::INFINITY, f64::min) };
    if rows > MOST {
        let problem = format!("make a list of some {rows:.0} rows out of {}", lengths.iter().sum::<usize>());
        let remedy = "raise the least of them, or set stopping_strategy: first_exhausted";
        return Err(TrainError::parameter(KEY, problem, remedy));
    }
    let mut exhausted: Vec<bool> = probabilities.iter().map(|p| all && *p == 0.0).collect();
    let (mut next, mut places) = (vec![0; lengths.len()], Vec::new());
    let (key, last) =
        (rng::key(config.seed, "data/interleave"), probabilities.iter().rposition(|p| *p > 0.0));
    while if all { exhausted.contains(&false) } else { !exhausted.contains(&true) } {
        let (drawn, mut below) = (rng::uniform(key, places.len() as u64), 0.0);
        let set = probabilities.iter().position(|p| {
            below += p;
            drawn < below
        });
        // Rounded, the sum may be a little below 1.
        let Some(set) = set.or(last) else { break };
        places.push((set, next[set]));
        next[set] += 1;
        if next[set] >= lengths[set] {
            exhausted[set] = true;
            next[set] = 0;
        }
    }
    Ok(places)
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

    /// The examples of `datasets.interleave_datasets`' documentation.
    #[test]
    fn sets_take_turns_as_hugging_faces_do() {
        let sets = || vec![vec![0, 1, 2], vec![10, 11, 12], vec![20, 21, 22, 23]];
        for (all, want) in [
            (false, vec![0, 10, 20, 1, 11, 21, 2, 12, 22]),
            (true, vec![0, 10, 20, 1, 11, 21, 2, 12, 22, 0, 10, 23]),
        ] {
            assert_eq!(interleave(&config(None, 2, all, 0), sets()).unwrap(), want);
        }
        assert_eq!(interleave(&config(None, 0, false, 0), vec![vec![3, 4]]).unwrap(), [3, 4]);
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
        let message = order(&config(Some(&[1.0, 1e-12]), 1, true, 0), &[5, 5]).unwrap_err().to_string();
        assert!(message.contains("make a list of some 5000000000005 rows out of 10"), "{message}");
    }

    /// A set's share of a long list is its probability: within five standard deviations.
    #[test]
    fn shares_are_the_probabilities() {
        let places = order(&config(Some(&[6.0, 3.0, 1.0]), 2, false, 7), &[60_000, 60_000, 60_000]).unwrap();
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
            let places = order(&config, &lengths).unwrap();
            prop_assert_eq!(&places, &order(&config, &lengths).unwrap());
            let mut counts = vec![0; lengths.len()];
            for (set, row) in &places {
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
                let (last, row) = places[places.len() - 1];
                prop_assert_eq!(row + 1, lengths[last]);
            }
        }
    }
}
