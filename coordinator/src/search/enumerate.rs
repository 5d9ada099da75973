//! Searches whose trials are all known beforehand: grid and one factor at a time.

use super::space::{Assignment, Candidate, Identity, Space};
use super::{Source, nothing_meets_the_constraints};
use domain::sweep::{Distribution, Problem};
use serde_json::Value;
use std::collections::{HashMap, HashSet};

/// Most combinations that a search may list.
const MOST: usize = 10_000;
/// Most combinations of a space that draws know in full.
const FEW: usize = 1000;

/// Every combination in order, the last parameter varying fastest.
pub(super) fn grid(space: &Space) -> Result<Vec<Assignment>, Vec<Problem>> {
    let mut combinations = vec![Assignment::new()];
    for (name, distribution) in &space.parameters {
        let mut longer = Vec::new();
        for before in combinations {
            match space.resolve(distribution, &before) {
                None => longer.push(before),
                Some(branch) => {
                    for value in values(name, branch)? {
                        let mut with = before.clone();
                        Space::assign(&mut with, name, value);
                        longer.push(with);
                    }
                }
            }
            if longer.len() > MOST {
                return Err(too_many(format!("more than {MOST} combinations")));
            }
        }
        combinations = longer;
    }
    Ok(combinations)
}

/// The first value of every parameter, then each other value of each, one parameter at a time.
pub(super) fn one_factor(space: &Space) -> Result<Vec<Assignment>, Vec<Problem>> {
    let mut all = vec![with_varied(space, None)?];
    for (name, distribution) in &space.parameters {
        let Some(branch) = space.resolve(distribution, &all[0]) else { continue };
        for value in values(name, branch)?.into_iter().skip(1) {
            all.push(with_varied(space, Some((name, value)))?);
        }
    }
    Ok(all)
}

/// Every parameter at its first value but the varied one.
fn with_varied(space: &Space, varied: Option<(&str, Value)>) -> Result<Assignment, Vec<Problem>> {
    let mut assignment = Assignment::new();
    for (name, distribution) in &space.parameters {
        let Some(branch) = space.resolve(distribution, &assignment) else { continue };
        let value = match &varied {
            Some((n, value)) if n == name => Some(value.clone()),
            _ => values(name, branch)?.into_iter().next(),
        };
        if let Some(value) = value {
            Space::assign(&mut assignment, name, value);
        }
    }
    Ok(assignment)
}

fn values(name: &str, distribution: &Distribution) -> Result<Vec<Value>, Vec<Problem>> {
    let Some(count) = distribution.count() else {
        let problem = "a range without a step has no end of values";
        let remedy = "give it a step, or name its values with choices, or use the random algorithm";
        return Err(vec![Problem::new(format!("parameters.{name}"), problem, remedy)]);
    };
    if count > MOST as u64 {
        return Err(too_many(format!("{count} values of {name}")));
    }
    Ok((0..count).filter_map(|k| distribution.nth(k)).collect())
}

fn too_many(what: String) -> Vec<Problem> {
    let remedy = "name fewer values, or use the random algorithm with max_trials";
    vec![Problem::new("parameters", format!("{what}; at most {MOST} trials can be listed"), remedy)]
}

/// Refuses a list that repeats a configuration or comes to more than `max_trials`; leaves out what a constraint
/// rejects, and what was proposed already.
pub(super) fn checked(
    space: &Space,
    assignments: Vec<Assignment>,
    proposed: &HashSet<Identity>,
    max_trials: Option<u32>,
) -> Result<Source, Vec<Problem>> {
    let mut seen: HashMap<Identity, usize> = HashMap::new();
    let mut candidates: Vec<Candidate> = Vec::new();
    let mut rejected = 0;
    for candidate in assignments.into_iter().map(|a| space.candidate(a)) {
        if !candidate.allowed {
            rejected += 1;
            continue;
        }
        if let Some(first) = seen.insert(candidate.identity, candidates.len()) {
            return Err(vec![repeated(space, &candidates[first], &candidate)]);
        }
        candidates.push(candidate);
    }
    if candidates.is_empty() {
        return Err(nothing_meets_the_constraints());
    }
    candidates.retain(|candidate| !proposed.contains(&candidate.identity));
    let all = proposed.len() + candidates.len();
    if let Some(most) = max_trials.filter(|most| all > *most as usize) {
        let problem = format!("{most} would drop some of the {all} combinations");
        let remedy = format!("set it to {all} or remove it, or use the random algorithm");
        return Err(vec![Problem::new("search.max_trials", problem, remedy)]);
    }
    Ok(Source::List { candidates, rejected })
}

/// Every configuration that the constraints allow, once, if there are few.
pub(super) fn few(space: &Space) -> Option<Vec<Candidate>> {
    let assignments = grid(space).ok().filter(|all| all.len() <= FEW)?;
    let mut seen = HashSet::new();
    let candidates = assignments.into_iter().map(|a| space.candidate(a));
    Some(candidates.filter(|c| c.allowed && seen.insert(c.identity)).collect())
}

fn repeated(space: &Space, first: &Candidate, second: &Candidate) -> Problem {
    let say = |candidate| {
        let chosen = space.chosen(candidate);
        chosen.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(" ")
    };
    let problem = format!("{} and {} come to the same trial", say(first), say(second));
    Problem::new("parameters", problem, "remove one of the values")
}
