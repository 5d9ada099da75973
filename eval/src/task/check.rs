//! What a task's keys say together that cannot be.

use super::{OutputType, Task};
use crate::generate::GenerationKwargs;
use crate::{EvalError, Result};

/// Refuses a task that cannot be asked or counted. `place` is where it is from, in words.
pub(super) fn check(place: &str, task: &Task) -> Result<()> {
    match problem(task) {
        None => task.judge().map(drop),
        Some((problem, remedy)) => Err(EvalError::task(place, problem, remedy)),
    }
}

/// What is wrong, and what to do.
fn problem(task: &Task) -> Option<(String, &'static str)> {
    if task.output_type == OutputType::MultipleChoice && task.doc_to_choice.is_null() {
        return Some(("has no choices".into(), "give doc_to_choice"));
    }
    if task.doc_to_target.is_null() {
        return Some(("has no target".into(), "give doc_to_target"));
    }
    let mut metrics = task.metrics.iter().map(|counted| counted.metric);
    if let Some(metric) = metrics.find(|metric| metric.output_type() != task.output_type) {
        let remedy = "acc, acc_norm and acc_bytes are of multiple_choice, exact_match is of generate_until, the others \
                      are of loglikelihood_rolling";
        return Some((format!("counts {metric}, which its output_type does not have"), remedy));
    }
    if task.metrics.is_empty() {
        return Some(("counts nothing".into(), "name a metric in metrics"));
    }
    if task.output_type == OutputType::GenerateUntil { generated(task) } else { asked(task) }
}

/// Of tasks whose answers are generated.
fn generated(task: &Task) -> Option<(String, &'static str)> {
    if let Some(problem) = task.generation_kwargs.problem() {
        let remedy = "answers are generated greedily: give until and max_gen_toks alone";
        return Some((problem, remedy));
    }
    if task.metrics.len() > 1 {
        return Some(("counts exact_match twice".into(), "name it once; filters make several figures of it"));
    }
    if task.doc_to_labels.is_some() {
        return Some(("has doc_to_labels".into(), "give doc_to_target the answers that are right"));
    }
    let names: Vec<_> = task.filter_list.iter().map(|filter| filter.name.as_str()).collect();
    let fits = |name: &str| !name.is_empty() && !name.contains(['/', ',']);
    match names.iter().enumerate().find(|(place, name)| !fits(name) || names[..*place].contains(name)) {
        Some((_, name)) => {
            let remedy = "give each its own, without a slash or a comma";
            Some((format!("filter_list has a filter of the name `{name}`"), remedy))
        }
        None => None,
    }
}

/// Of the others.
fn asked(task: &Task) -> Option<(String, &'static str)> {
    let remedy = "leave it out, or say output_type: generate_until";
    let generates = [
        ("generation_kwargs", task.generation_kwargs != GenerationKwargs::default()),
        ("filter_list", !task.filter_list.is_empty()),
    ];
    let key = generates.into_iter().find(|(_, is_there)| *is_there)?.0;
    Some((format!("has {key}, and its answers are not generated"), remedy))
}
