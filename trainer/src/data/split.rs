//! Which rows are held out.

use crate::error::{Result, TrainError};
use crate::rng;
use domain::trial::{EvalSplit, TrialConfig};

/// Splits rows into (training, held out), each in the order that they came in.
pub fn hold_out<T>(config: &TrialConfig, rows: Vec<T>) -> Result<(Vec<T>, Vec<T>)> {
    let count = held_out(config.eval_size, rows.len())?;
    let mut held = vec![false; rows.len()];
    match config.eval_split {
        EvalSplit::Last => held[rows.len() - count..].fill(true),
        EvalSplit::Random => {
            let order = rng::permutation(rng::key(config.seed, "data/held-out"), rows.len());
            order[..count].iter().for_each(|row| held[*row] = true);
        }
    }
    let (eval, train): (Vec<_>, Vec<_>) = rows.into_iter().zip(held).partition(|(_, held)| *held);
    let bare = |rows: Vec<(T, bool)>| rows.into_iter().map(|(row, _)| row).collect();
    Ok((bare(train), bare(eval)))
}

/// Rows to hold out of `rows`: a share rounds to the nearest number, but holds out at least one.
fn held_out(eval_size: f64, rows: usize) -> Result<usize> {
    let refuse = |problem: String| {
        Err(TrainError::parameter(
            "eval_size",
            problem,
            "set a share below 1, a whole number below the number of rows, or 0 to hold none out",
        ))
    };
    if !eval_size.is_finite() || eval_size < 0.0 || (eval_size >= 1.0 && eval_size.fract() != 0.0) {
        return refuse(format!("{eval_size} is neither a share nor a number of rows"));
    }
    let count = match eval_size {
        0.0 => 0,
        share if share < 1.0 => ((share * rows as f64).round() as usize).max(1),
        number => number as usize,
    };
    if count >= rows {
        return refuse(format!("holding out {count} of {rows} rows leaves none to train on"));
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn sizes() {
        for (eval_size, rows, want) in [
            (0.1, 500, Some(50)),
            (0.1, 3, Some(1)),
            (0.5, 3, Some(2)),
            (0.0, 3, Some(0)),
            (2.0, 3, Some(2)),
            (50.0, 500, Some(50)),
            (3.0, 3, None),
            (0.9, 1, None),
            (1.5, 3, None),
            (-0.1, 3, None),
            (f64::NAN, 3, None),
        ] {
            match (held_out(eval_size, rows), want) {
                (Ok(got), Some(want)) => assert_eq!(got, want, "{eval_size} of {rows}"),
                (Err(error), None) => {
                    let text = error.to_string();
                    assert!(text.starts_with("eval_size: ") && text.contains("0 to hold none out"), "{text}");
                }
                (got, _) => panic!("{eval_size} of {rows}: {got:?}"),
            }
        }
    }

    #[test]
    fn each_row_is_on_one_side_and_the_seed_decides() {
        let split = |seed, eval_split| {
            let config = TrialConfig { eval_size: 20.0, eval_split, seed, ..TrialConfig::default() };
            hold_out(&config, (0..100).collect::<Vec<u32>>()).unwrap()
        };
        let (train, eval) = split(1, EvalSplit::Random);
        assert!(train.is_sorted() && eval.is_sorted());
        assert_eq!((train.len(), eval.len()), (80, 20));
        assert_eq!(train.iter().chain(&eval).collect::<BTreeSet<_>>().len(), 100);
        assert_eq!(split(1, EvalSplit::Random).1, eval);
        assert_ne!(split(2, EvalSplit::Random).1, eval);
        assert_eq!(split(1, EvalSplit::Last).1, (80..100).collect::<Vec<_>>());
    }
}
