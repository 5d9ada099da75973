//! Random draws, each a function of (seed, trial number, parameter name, redraw).

use super::MOST_DRAWS;
use super::space::{Assignment, Candidate, Identity, Space};
use domain::rng;
use domain::sweep::Distribution;
use serde_json::{Value, json};
use std::collections::HashSet;

/// The draw for trial `number` that meets the constraints and repeats none of `seen`, if there is one.
pub(super) fn next(space: &Space, seed: u64, number: u32, seen: &HashSet<Identity>) -> Option<Candidate> {
    (0..MOST_DRAWS)
        .map(|redraw| space.candidate(assignment(space, seed, number, redraw)))
        .find(|candidate| candidate.allowed && !seen.contains(&candidate.identity))
}

fn assignment(space: &Space, seed: u64, number: u32, redraw: u32) -> Assignment {
    let index = u64::from(number) << 32 | u64::from(redraw);
    let mut assignment = Assignment::new();
    for (name, distribution) in &space.parameters {
        let u = rng::uniform(rng::key(seed, name), index);
        let value = space.resolve(distribution, &assignment).and_then(|d| draw(d, u));
        if let Some(value) = value {
            Space::assign(&mut assignment, name, value);
        }
    }
    assignment
}

/// The value at `u` in [0, 1) of the distribution's cumulative function, turned round.
fn draw(distribution: &Distribution, u: f64) -> Option<Value> {
    match distribution {
        Distribution::Uniform { low, high, step: None } => {
            Some(json!(rounded(low + u * (high - low), *low, *high)))
        }
        Distribution::LogUniform { low, high, step: None } => {
            Some(json!(rounded(log_between(*low, *high, u), *low, *high)))
        }
        Distribution::LogUniform { low, high, step: Some(step) } => {
            let nearest = ((log_between(*low, *high, u) - low) / step).round() as u64;
            distribution.nth(nearest.min(distribution.count()? - 1))
        }
        counted => {
            let count = counted.count()?;
            counted.nth(((u * count as f64) as u64).min(count - 1))
        }
    }
}

fn log_between(low: f64, high: f64, u: f64) -> f64 {
    (low.ln() + u * (high.ln() - low.ln())).exp()
}

/// To 6 significant digits: enough to tell trials apart, few enough to read and to type again, and the same
/// where another machine's `exp` differs in the last bit.
fn rounded(x: f64, low: f64, high: f64) -> f64 {
    format!("{x:.5e}").parse().unwrap_or(x).max(low).min(high)
}
