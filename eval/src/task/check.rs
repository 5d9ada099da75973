//! What a task's keys say together that cannot be.

use super::{OutputType, Task};
use crate::generate::GenerationKwargs;
use crate::{EvalError, Result};

/// What a sweep's task may ask for: an agent is asked between the steps of other trials, and holds what it compiled.
const MOST_TOKENS: usize = 2048;
const MOST_STEPS: usize = 32;

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

/// Refuses a sweep's task that would hold up or fill the agents that ask it.
pub(super) fn of_sweep(task: &Task) -> Result<()> {
    let tokens = task.generation_kwargs.max_gen_toks;
    if tokens > MOST_TOKENS {
        let problem = format!("its answers have up to {tokens} tokens, and a sweep's {MOST_TOKENS} at most");
        return Err(EvalError::task(&task.task, problem, "lower max_gen_toks in its generation_kwargs"));
    }
    let filters = task.filter_list.iter().map(|filter| filter.filter.len());
    let ignored = task.metrics.iter().map(|counted| counted.ignored.regexes_to_ignore.len());
    let steps: usize = filters.chain(ignored).sum();
    if steps > MOST_STEPS {
        let problem = format!(
            "has {steps} steps in filter_list and expressions in regexes_to_ignore, and a sweep's {MOST_STEPS} at most"
        );
        return Err(EvalError::task(&task.task, problem, "make one expression of several"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::task;
    use serde_json::{Value, json};

    #[test]
    fn a_sweeps_task_asks_for_no_more_than_an_agent_has_time_for() {
        let filters = |steps: usize| json!([{ "name": "f", "filter": vec![json!({ "function": "lowercase" }); steps] }]);
        // GSM8K takes out four expressions.
        for (key, value, want) in [
            ("generation_kwargs", json!({ "max_gen_toks": 2048 }), None),
            (
                "generation_kwargs",
                json!({ "max_gen_toks": 2049 }),
                Some("up to 2049 tokens, and a sweep's 2048"),
            ),
            ("filter_list", filters(28), None),
            ("filter_list", filters(29), Some("has 33 steps")),
        ] {
            let task: Value = json!({ "include": "gsm8k", "task": "mine", key: value });
            let problem = task::of_sweep(&[task]).map(drop).map_err(|error| error.to_string());
            match want {
                None => assert_eq!(problem, Ok(()), "{key}"),
                Some(want) => assert!(problem.unwrap_err().contains(want), "{key}"),
            }
        }
    }
}
