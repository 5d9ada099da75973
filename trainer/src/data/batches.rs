//! Which rows an optimizer step takes: a function of the configuration, the number of rows and the step alone,
//! so that a resumed run goes on where it was.

use crate::rng;
use domain::trial::TrialConfig;

/// The micro-batches of optimizer step `step` (from 0) over `rows` training rows, each a list of row indices.
///
/// As in transformers' Trainer, a step never crosses an epoch: an epoch has b = ⌈rows ÷ batch⌉ micro-batches, the
/// last of which may be smaller, and with accumulation g its i-th step takes micro-batches g·i up to
/// min(g·(i+1), b). So each epoch takes each row exactly once, in the rows' order or, with `shuffle`, in one
/// drawn from `seed` and the epoch's number.
pub fn step_batches(config: &TrialConfig, rows: usize, step: u64) -> Vec<Vec<usize>> {
    if rows == 0 {
        return Vec::new();
    }
    let batch = config.batch_size.max(1) as usize;
    let accumulation = config.gradient_accumulation_steps.max(1) as usize;
    let steps_per_epoch = rows.div_ceil(batch).div_ceil(accumulation) as u64;
    let (epoch, step) = (step / steps_per_epoch, (step % steps_per_epoch) as usize);
    let order = match config.shuffle {
        true => rng::permutation(rng::key(config.seed, &format!("data/order/{epoch}")), rows),
        false => (0..rows).collect(),
    };
    let taken = batch.saturating_mul(accumulation);
    let start = step * taken;
    order[start..start.saturating_add(taken).min(rows)].chunks(batch).map(<[usize]>::to_vec).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn config(batch_size: u32, gradient_accumulation_steps: u32, shuffle: bool, seed: u64) -> TrialConfig {
        TrialConfig { batch_size, gradient_accumulation_steps, shuffle, seed, ..TrialConfig::default() }
    }

    #[test]
    fn in_file_order() {
        // (rows, batch, accumulation, step) -> micro-batches
        for (rows, batch, accumulation, step, want) in [
            (5, 2, 1, 0, vec![vec![0, 1]]),
            (5, 2, 1, 2, vec![vec![4]]),
            (5, 2, 1, 3, vec![vec![0, 1]]),
            (5, 2, 2, 0, vec![vec![0, 1], vec![2, 3]]),
            (5, 2, 2, 1, vec![vec![4]]),
            (5, 2, 2, 2, vec![vec![0, 1], vec![2, 3]]),
            (3, 8, 4, 7, vec![vec![0, 1, 2]]),
            (0, 2, 1, 0, vec![]),
        ] {
            assert_eq!(step_batches(&config(batch, accumulation, false, 0), rows, step), want, "step {step}");
        }
    }

    #[test]
    fn epochs_differ_and_seeds_differ() {
        let epoch = |seed, n| step_batches(&config(50, 1, true, seed), 50, n);
        assert_eq!(epoch(1, 0), epoch(1, 0));
        assert_ne!(epoch(1, 0), epoch(1, 1));
        assert_ne!(epoch(1, 0), epoch(2, 0));
    }

    proptest! {
        #[test]
        fn an_epoch_holds_each_row_once(
            rows in 1usize..200, batch in 1u32..20, accumulation in 1u32..6, shuffle: bool, seed: u64, epoch in 0u64..4,
        ) {
            let config = config(batch, accumulation, shuffle, seed);
            let steps = TrialConfig { num_train_epochs: Some(1.0), ..config.clone() }.total_steps(rows as u64);
            let batches: Vec<_> = (0..steps).map(|s| step_batches(&config, rows, epoch * steps + s)).collect();
            let (last, full) = batches.split_last().unwrap();
            prop_assert!(full.iter().all(|b| b.len() == accumulation as usize));
            prop_assert!(!last.is_empty() && last.len() <= accumulation as usize);
            let all: Vec<_> = batches.into_iter().flatten().collect();
            let (last, full) = all.split_last().unwrap();
            prop_assert!(full.iter().all(|b| b.len() == batch as usize));
            prop_assert!(!last.is_empty() && last.len() <= batch as usize);
            let mut taken: Vec<_> = all.into_iter().flatten().collect();
            taken.sort_unstable();
            prop_assert_eq!(taken, (0..rows).collect::<Vec<_>>());
        }
    }
}
