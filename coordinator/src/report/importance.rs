//! How much each searched parameter matters, by PED-ANOVA (Watanabe, Bansal and Hutter 2023, arXiv 2304.10255): of each
//! parameter, the Pearson divergence of the best trials' values from all trials' values, both smoothed over a grid of the
//! parameter's space by Scott's rule. Grid, kernels, prior and quantile are those of Optuna 5's
//! `PedAnovaImportanceEvaluator`, which `tests/tools/exports.py` holds this against.

use domain::sweep::{Distribution, Goal};
use libm::erf;
use serde_json::Value;
use std::collections::BTreeMap;
use std::f64::consts::SQRT_2;

/// With fewer trials, chance alone says which parameter matters.
const FEWEST_TRIALS: usize = 10;
/// The part of the trials that is called best.
const BEST: f64 = 0.1;
/// Cells of a range's grid at most.
const MOST_CELLS: usize = 50;
/// Pseudo-count of the prior: a value that no trial had is not impossible.
const PRIOR: f64 = 1.0;
/// The narrowest kernel: 90 % of it lie within its cell.
const NARROWEST: f64 = 0.5 / 1.64;
/// Keeps a quotient of densities finite.
const LEAST: f64 = 1e-12;

/// A completed trial's parameters and its value of the sweep's metric, which is a finite number.
pub type Observed<'a> = (&'a BTreeMap<String, Value>, f64);

/// The parts, which sum up to 1, that parameters have in what tells the best trials from all, largest first. Without the
/// parameters that not all trials drew alike, such as conditional ones; empty of less than ten trials, if nothing tells them
/// apart, or if there is one such parameter alone.
pub fn importance(
    parameters: &[(String, Distribution)],
    trials: &[Observed],
    goal: Goal,
) -> Vec<(String, f64)> {
    if trials.len() < FEWEST_TRIALS {
        return Vec::new();
    }
    let loss = |(_, value): &Observed| match goal {
        Goal::Minimize => *value,
        Goal::Maximize => -value,
    };
    let mut losses: Vec<_> = trials.iter().map(loss).collect();
    losses.sort_by(f64::total_cmp);
    let best = (BEST * losses.len() as f64).ceil() as usize;
    let Some(last_of_best) = best.checked_sub(1).and_then(|last| losses.get(last)).copied() else {
        return Vec::new();
    };
    let best: Vec<_> = trials.iter().filter(|trial| loss(trial) <= last_of_best).copied().collect();
    let divergence = |(name, distribution): &(String, Distribution)| {
        let space = Space::of(distribution)?;
        let (of_best, of_all) = (space.density(name, &best)?, space.density(name, trials)?);
        let parts = of_best.iter().zip(&of_all).map(|(best, all)| {
            let (best, all) = (best + LEAST, all + LEAST);
            all * (best / all - 1.0).powi(2)
        });
        Some((name.clone(), parts.sum::<f64>()))
    };
    let mut parts: Vec<_> = parameters.iter().filter_map(divergence).collect();
    let sum: f64 = parts.iter().map(|(_, part)| part).sum();
    if parts.len() < 2 || sum <= 0.0 {
        return Vec::new();
    }
    parts.iter_mut().for_each(|(_, part)| *part /= sum);
    parts.sort_by(|(_, a), (_, b)| b.total_cmp(a));
    parts
}

/// What values a parameter can take, in cells.
enum Space<'a> {
    /// The middles of the cells, and whether they are logarithms.
    Grid(Vec<f64>, bool),
    Choices(&'a [Value]),
}

impl<'a> Space<'a> {
    /// `None` of a space of one value, and of one that depends on other parameters.
    fn of(distribution: &'a Distribution) -> Option<Self> {
        // A range ends with its last whole step.
        let end = |high: f64| {
            let last = distribution.count().and_then(|count| distribution.nth(count.checked_sub(1)?));
            last.and_then(|last| last.as_f64()).unwrap_or(high)
        };
        let (low, high, step, logarithmic) = match distribution {
            Distribution::Choices(choices) if choices.len() > 1 => return Some(Self::Choices(choices)),
            Distribution::Uniform { low, high, step } => (*low, end(*high), *step, false),
            Distribution::LogUniform { low, high, .. } => (low.ln(), high.ln(), None, true),
            Distribution::Integer { low, high, step } => {
                (*low as f64, end(*high as f64), Some(step.unwrap_or(1) as f64), false)
            }
            Distribution::Choices(_) | Distribution::Constant(_) | Distribution::When { .. } => return None,
        };
        if high <= low {
            return None;
        }
        let values =
            step.map_or(MOST_CELLS, |step| (((high - low) / step).round() as usize).saturating_add(1));
        let last = values.clamp(2, MOST_CELLS) - 1;
        let middle = |i: usize| if i == last { high } else { low + i as f64 * ((high - low) / last as f64) };
        Some(Self::Grid((0..=last).map(middle).collect(), logarithmic))
    }

    /// How likely each cell is among these trials; `None` if one of them has no value of this space.
    fn density(&self, name: &str, trials: &[Observed]) -> Option<Vec<f64>> {
        let cells = match self {
            Self::Grid(middles, _) => middles.len(),
            Self::Choices(choices) => choices.len(),
        };
        let mut counts = vec![0.0; cells];
        for (parameters, _) in trials {
            counts[self.cell(parameters.get(name)?)?] += 1.0;
        }
        Some(match self {
            Self::Grid(..) => of_range(&counts),
            Self::Choices(_) => of_choices(&counts),
        })
    }

    fn cell(&self, value: &Value) -> Option<usize> {
        match self {
            Self::Grid(middles, logarithmic) => {
                let value = value.as_f64().map(|value| if *logarithmic { value.ln() } else { value })?;
                let begin = value - (middles[1] - middles[0]) / 2.0;
                Some(middles.partition_point(|middle| *middle < begin).min(middles.len() - 1))
            }
            Self::Choices(choices) => {
                let same = |choice: &Value| {
                    choice == value || choice.as_f64().is_some_and(|x| Some(x) == value.as_f64())
                };
                choices.iter().position(same)
            }
        }
    }
}

/// A kernel for each cell that has trials, by how many, and one over all cells: each gives its own cell 1 and every cell a
/// little.
fn of_choices(counts: &[f64]) -> Vec<f64> {
    let kernels = counts.iter().filter(|count| **count > 0.0).count() + 1;
    let (little, cells) = (PRIOR / kernels as f64, counts.len() as f64);
    let total = counts.iter().sum::<f64>() + PRIOR;
    let of_kernel = 1.0 + cells * little;
    let (seen, prior) = ((total - PRIOR) / total, PRIOR / total);
    let likely = |count: &f64| (seen * little + count / total) / of_kernel + prior / cells;
    counts.iter().map(likely).collect()
}

/// A normal kernel, cut off at the ends, for each cell that has trials, by how many, and a wide one over all cells.
fn of_range(counts: &[f64]) -> Vec<f64> {
    let trials: f64 = counts.iter().sum();
    let seen: Vec<(f64, f64)> = counts.iter().enumerate().map(|(i, count)| (i as f64, *count)).collect();
    let seen: Vec<_> = seen.into_iter().filter(|(_, count)| *count > 0.0).collect();
    let cells = counts.len() as f64;
    let sigma = scott(&seen, trials).max(NARROWEST);
    let kernels = seen.into_iter().map(|(cell, count)| (cell, sigma, count));
    let kernels: Vec<_> = kernels.chain([((cells - 1.0) / 2.0, cells, PRIOR)]).collect();
    let likely = |cell: usize| {
        let cell = cell as f64;
        let mass = kernels.iter().map(|(mean, sigma, count)| {
            let within = |low: f64, high: f64| {
                let place = |x: f64| erf((x - mean) / sigma / SQRT_2);
                (place(high) - place(low)) / 2.0
            };
            count * within(cell - 0.5, cell + 0.5) / within(-0.5, cells - 0.5)
        });
        mass.sum::<f64>() / (trials + PRIOR)
    };
    (0..counts.len()).map(likely).collect()
}

/// Scott's rule for cells with so many trials each.
fn scott(seen: &[(f64, f64)], trials: f64) -> f64 {
    let mean = seen.iter().map(|(cell, count)| cell * count / trials).sum::<f64>();
    let squares = seen.iter().map(|(cell, count)| (cell - mean).powi(2) * count).sum::<f64>();
    let deviation = (squares / (trials - 1.0).max(1.0)).sqrt();
    let mut sum = 0.0;
    let up_to: Vec<f64> = seen
        .iter()
        .map(|(_, count)| {
            sum += count;
            sum
        })
        .collect();
    let quarter = up_to.partition_point(|n| *n < (trials / 4.0).floor());
    let three_quarters = up_to.partition_point(|n| *n <= (trials * 3.0 / 4.0).floor());
    let middle_half = seen[three_quarters.min(seen.len() - 1)].0 - seen[quarter].0;
    1.059 * deviation.min(middle_half / 1.34) * trials.powf(-0.2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parameters() -> Vec<(String, Distribution)> {
        let named = |(name, distribution): (&str, Distribution)| (name.to_string(), distribution);
        [
            ("learning_rate", Distribution::LogUniform { low: 1e-5, high: 1e-2, step: None }),
            ("lora_dropout", Distribution::Uniform { low: 0.0, high: 0.5, step: None }),
            ("warmup_ratio", Distribution::Uniform { low: 0.0, high: 0.25, step: Some(0.1) }),
            ("batch_size", Distribution::Integer { low: 1, high: 8, step: Some(2) }),
            ("lora_rank", Distribution::Choices(vec![json!(4), json!(8), json!(16)])),
            ("seed", Distribution::Constant(json!(1))),
        ]
        .map(named)
        .to_vec()
    }

    /// Trials of a formula, so that Optuna can be given the same.
    fn trial(i: u32) -> (BTreeMap<String, Value>, f64) {
        let part = |factor: u32, modulus: u32| f64::from(i * factor % modulus) / f64::from(modulus);
        let learning_rate = 1e-5 * 1000f64.powf(part(37, 101));
        let lora_dropout = 0.5 * part(53, 97);
        let (warmup, batch, rank) = (i * 7 % 3, i * 11 % 4, i * 5 % 3);
        let value = (learning_rate.log10() + 3.3).powi(2) + 0.5 * lora_dropout + 0.02 * f64::from(rank)
            - 0.05 * f64::from(batch);
        let values = [
            ("learning_rate", json!(learning_rate)),
            ("lora_dropout", json!(lora_dropout)),
            ("warmup_ratio", json!(0.1 * f64::from(warmup))),
            ("batch_size", json!(1 + 2 * batch)),
            ("lora_rank", json!([4, 8, 16][rank as usize])),
            ("seed", json!(1)),
        ];
        (values.map(|(name, value)| (name.to_string(), value)).into(), value)
    }

    fn of(trials: &[(BTreeMap<String, Value>, f64)], goal: Goal) -> Vec<(String, f64)> {
        let observed: Vec<Observed> = trials.iter().map(|(values, value)| (values, *value)).collect();
        importance(&parameters(), &observed, goal)
    }

    /// What `optuna.importance.get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())` of Optuna 5.0.0 says of a
    /// study with the same trials.
    #[test]
    fn parts_are_those_of_optuna() {
        let trials: Vec<_> = (1..=60).map(trial).collect();
        let check = |goal, want: &[(&str, f64)]| {
            let got = of(&trials, goal);
            let names: Vec<_> = got.iter().map(|(name, _)| name.as_str()).collect();
            assert_eq!(names, want.iter().map(|(name, _)| *name).collect::<Vec<_>>(), "{got:?}");
            for ((name, got), (_, want)) in got.iter().zip(want) {
                assert!((got - want).abs() < 1e-6, "{name}: {got}, not {want}");
            }
        };
        check(Goal::Minimize, MINIMIZED);
        check(Goal::Maximize, MAXIMIZED);
    }

    const MINIMIZED: &[(&str, f64)] = &[
        ("lora_dropout", 0.6149968742235014),
        ("learning_rate", 0.37576218635751996),
        ("lora_rank", 0.005896888352962108),
        ("warmup_ratio", 0.0019186014962946534),
        ("batch_size", 0.00142544956972209),
    ];
    const MAXIMIZED: &[(&str, f64)] = &[
        ("learning_rate", 0.9589546007596841),
        ("lora_dropout", 0.03906379022084971),
        ("batch_size", 0.0014761814422520538),
        ("warmup_ratio", 0.0005054275772144492),
        ("lora_rank", 0.0),
    ];

    #[test]
    fn what_tells_nothing_has_no_part() {
        let trials: Vec<_> = (1..=20).map(trial).collect();
        assert_eq!(of(&trials[..9], Goal::Minimize), [], "too few");
        assert_ne!(of(&trials[..10], Goal::Minimize), []);
        let observed: Vec<Observed> = trials.iter().map(|(values, value)| (values, *value)).collect();
        assert_eq!(importance(&parameters()[..1], &observed, Goal::Minimize), [], "nothing beside it");
        let even: Vec<_> = trials.iter().map(|(values, _)| (values.clone(), 1.0)).collect();
        assert_eq!(of(&even, Goal::Minimize), [], "all are the best");
        // A value that the space has no more, or never had.
        let mut changed = trials.clone();
        changed[3].0.insert("lora_rank".into(), json!(64));
        changed[4].0.remove("batch_size");
        let names: Vec<_> = of(&changed, Goal::Minimize).into_iter().map(|(name, _)| name).collect();
        assert!(names.len() == 3 && !names.contains(&"lora_rank".into()), "{names:?}");
        let sum: f64 = of(&trials, Goal::Minimize).iter().map(|(_, part)| part).sum();
        assert!((sum - 1.0).abs() < 1e-12);
    }
}
