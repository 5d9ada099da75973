//! What must hold between a sweep's parts.

use super::document::SEARCH;
use super::parameter::{set_of_a_mixture, without_a_mixture};
use super::problem::{is_within, join};
use super::{Algorithm, Distribution, Problem, Replicates, SweepSpec};
use crate::metric;
use crate::trial::TrialConfig;
use serde_json::{Map, Value};

/// The parameter without which nothing is mixed.
const MIXED: &str = "interleave_datasets";

/// ASHA's default has at most this many rungs.
const DEFAULT_RUNGS: u32 = 3;

/// Checks a spec whose parts are sound each by itself, and fills in what follows from its other parts: ASHA's
/// first rung, evaluations at its rungs, the one trial of draws that all come to the same. `told` is where the
/// document is wrong in itself: nothing is said of what follows from a part that could not be read.
pub(super) fn between_parts(spec: &mut SweepSpec, told: &[String]) -> Vec<Problem> {
    let mut problems = Vec::new();
    required(spec, &mut problems);
    conditions(spec, &mut problems);
    held_out_rows(spec, &mut problems);
    evaluated(spec, &mut problems);
    accelerators(spec, &mut problems);
    other_seeds(spec, &mut problems);
    if !told.iter().any(|path| is_within(path, MIXED) || is_within(path, &join("parameters", MIXED))) {
        mixture(spec, &mut problems);
    }
    let is_told = |path: &str| told.iter().any(|told| told == path);
    if matches!(spec.search.algorithm, Algorithm::Random | Algorithm::Asha) && !unknown_search(told) {
        end_of_draws(spec, &mut problems);
    }
    let compares_as_it_trains = metric::task_and_metric(&spec.search.metric).is_none();
    if spec.search.algorithm == Algorithm::Asha && compares_as_it_trains && !is_told("search.metric") {
        rungs(spec, &mut problems);
    }
    problems
}

/// Whether it is open how trials are chosen: the section or its algorithm cannot be read, or a key is misspelt.
fn unknown_search(told: &[String]) -> bool {
    let sound = SEARCH.iter().filter(|key| **key != "algorithm").map(|key| join("search", key));
    let sound: Vec<_> = sound.collect();
    told.iter().any(|path| is_within(path, "search") && !sound.contains(path))
}

/// Draws need a number of trials, unless all of them would be the same trial.
fn end_of_draws(spec: &mut SweepSpec, problems: &mut Vec<Problem>) {
    if !spec.parameters.iter().any(|(name, _)| spec.varies(name)) {
        spec.search.max_trials.get_or_insert(1);
    } else if spec.search.max_trials.is_none() {
        let problem = "missing: these draws have no end of their own";
        problems.push(Problem::new("search.max_trials", problem, "say how many trials there shall be"));
    }
}

fn required(spec: &SweepSpec, problems: &mut Vec<Problem>) {
    for (name, value, remedy) in [
        ("pretrained_model_id", &spec.base.pretrained_model_id, "name the base model's directory"),
        ("dataset_name", &spec.base.dataset_name, "name a .jsonl, .json or .parquet file of training rows"),
    ] {
        if value.is_empty() && spec.distribution(name).is_none() {
            problems.push(Problem::new(name, "missing", remedy));
        }
    }
}

/// A `when` looks at parameters before its own, and at values that they can have.
fn conditions(spec: &SweepSpec, problems: &mut Vec<Problem>) {
    for (i, (name, distribution)) in spec.parameters.iter().enumerate() {
        let mut check = |parameter: &str, value: &Value, path: &str| {
            let at = format!("{path}.when.{parameter}");
            let position = spec.parameters.iter().position(|(n, _)| n == parameter);
            match position.map(|p| (p >= i, &spec.parameters[p].1)) {
                Some((true, _)) => {
                    let problem = format!("{parameter} does not stand before {name}");
                    problems.push(Problem::new(at, problem, format!("move {parameter} above {name}")));
                }
                // Of a constant a condition may be false: an override may have made it one.
                Some((false, Distribution::Choices(choices))) if !choices.contains(value) => {
                    let problem = format!("{parameter} is never {value}");
                    problems.push(Problem::new(at, problem, "name one of its values"));
                }
                _ => {}
            }
        };
        each_condition(distribution, &join("parameters", name), &mut check);
    }
}

fn each_condition(distribution: &Distribution, path: &str, visit: &mut impl FnMut(&str, &Value, &str)) {
    if let Distribution::When { conditions, otherwise, .. } = distribution {
        for (parameter, value) in conditions {
            visit(parameter, value, path);
        }
        if let Some(otherwise) = otherwise {
            each_condition(otherwise, &join(path, "otherwise"), visit);
        }
    }
}

fn held_out_rows(spec: &SweepSpec, problems: &mut Vec<Problem>) {
    let base = spec.common();
    let searched = ["eval_size", "eval_dataset_name"].iter().any(|name| spec.varies(name));
    if spec.search.metric == metric::EVAL_LOSS
        && base.eval_size == 0.0
        && base.eval_dataset_name.is_none()
        && !searched
    {
        let remedy = "set eval_size above 0, or eval_dataset_name";
        problems.push(Problem::new(
            "search.metric",
            "eval/loss needs held-out rows, and there are none",
            remedy,
        ));
    }
}

/// A trial that must run on an accelerator which the sweep excludes would wait for ever.
fn accelerators(spec: &SweepSpec, problems: &mut Vec<Problem>) {
    let allowed = &spec.resources.accelerators;
    if allowed.is_empty() {
        return;
    }
    let path = match spec.distribution(TrialConfig::ACCELERATOR) {
        Some(_) => join("parameters", TrialConfig::ACCELERATOR),
        None => TrialConfig::ACCELERATOR.into(),
    };
    for name in spec.accelerators() {
        if !allowed.iter().any(|allowed| allowed.eq_ignore_ascii_case(name)) {
            let problem = format!("{name} is none of resources.accelerators, {}", allowed.join(", "));
            let remedy = format!("add {name} there, or leave resources.accelerators out");
            problems.push(Problem::new(path.clone(), problem, remedy));
        }
    }
}

/// A metric of a task is known once a trial has made all its steps, and only if the task is asked.
fn evaluated(spec: &SweepSpec, problems: &mut Vec<Problem>) {
    // A condition that no trial can meet is a slip; of a parameter with a range it cannot be said.
    for (name, value) in spec.evaluations.iter().flat_map(|asked| &asked.when) {
        let never = match spec.distribution(name) {
            Some(Distribution::Choices(choices)) => !choices.contains(value),
            _ => false,
        };
        if never {
            let at = format!("evaluations.when.{name}");
            problems.push(Problem::new(at, format!("{name} is never {value}"), "name one of its values"));
        }
    }
    let metric = &spec.search.metric;
    let Some((task, _)) = metric::task_and_metric(metric) else { return };
    if spec.evaluations.is_none() {
        let problem = format!("{metric} is a task's, and none is asked");
        let remedy = format!("add evaluations: {{ tasks: [{task}] }}");
        problems.push(Problem::new("search.metric", problem, remedy));
    }
    if spec.search.algorithm == Algorithm::Asha {
        let problem =
            format!("asha compares trials as they train, and {metric} is known once they have ended");
        let remedy = "compare them by eval/loss, or take another algorithm";
        problems.push(Problem::new("search.metric", problem, remedy));
    }
}

/// Runs with other seeds say how much seeds matter, which a search over seeds has chosen by; and which of the finalists is
/// the best, whose adapter must be there still.
fn other_seeds(spec: &SweepSpec, problems: &mut Vec<Problem>) {
    let Some(Replicates { finalists, .. }) = spec.replicates else { return };
    if spec.varies("seed") {
        let problem = "are runs of the best trials with other seeds, and the search chooses by seed";
        let remedy = "give seed one value, or remove replicates";
        problems.push(Problem::new("replicates", problem, remedy));
    }
    if let Some(most) = spec.keep_adapters.filter(|most| *most < finalists) {
        let problem = format!("is {most}, and the best of {finalists} finalists may be any of them");
        let remedy = "set keep_adapters to at least finalists";
        problems.push(Problem::new("keep_adapters", problem, remedy));
    }
}

/// What is said of how data sets are mixed, where no trial mixes any.
fn mixture(spec: &SweepSpec, problems: &mut Vec<Problem>) {
    let common = spec.common();
    if common.interleave_datasets.is_some() || spec.varies(MIXED) {
        return;
    }
    let set: Vec<_> = set_of_a_mixture(&common).collect();
    for name in ["interleave_probabilities", "stopping_strategy"] {
        if !set.contains(&name) && !spec.varies(name) {
            continue;
        }
        let searched = spec.distribution(name).is_some();
        let path = if searched { join("parameters", name) } else { name.to_string() };
        problems.push(without_a_mixture(path, name));
    }
}

/// ASHA's first rung, and a value of the metric at each rung.
fn rungs(spec: &mut SweepSpec, problems: &mut Vec<Problem>) {
    let base = spec.common();
    let (every_name, every) = if spec.search.metric == metric::EVAL_LOSS {
        ("eval_steps", base.eval_steps)
    } else {
        ("logging_steps", base.logging_steps)
    };
    for name in ["max_steps", "num_train_epochs", every_name] {
        if spec.varies(name) {
            let problem = "asha compares trials at the same steps";
            problems.push(Problem::new(join("parameters", name), problem, format!("give {name} one value")));
        }
    }
    let steps = base.max_steps.or(base.num_train_epochs.is_none().then_some(TrialConfig::DEFAULT_MAX_STEPS));
    let min_steps =
        spec.search.min_steps.or_else(|| Some(first_rung(steps?, spec.search.reduction_factor, every)));
    let Some(min_steps) = min_steps else {
        let problem = "missing: the steps of num_train_epochs are not known beforehand";
        problems.push(Problem::new("search.min_steps", problem, "say at which step asha first compares"));
        return;
    };
    if let Some(steps) = steps
        && min_steps >= steps
    {
        let problem =
            format!("the first rung at step {min_steps} does not come before the last step, {steps}");
        problems.push(Problem::new("search.min_steps", problem, "give fewer, or raise max_steps"));
    }
    if every == 0 && spec.distribution(every_name).is_none() {
        spec.base.eval_steps = min_steps;
    } else if every == 0 || min_steps % every != 0 {
        let problem = format!("the rung at step {min_steps} has no value, since {every_name} is {every}");
        let remedy = format!("make min_steps a multiple of {every_name}");
        problems.push(Problem::new("search.min_steps", problem, remedy));
    }
    spec.search.min_steps = Some(min_steps);
}

/// The default first rung: at most [`DEFAULT_RUNGS`] rungs before `steps`, on a step that has a value.
fn first_rung(steps: u32, reduction_factor: u32, every: u32) -> u32 {
    let parts = reduction_factor.saturating_pow(DEFAULT_RUNGS);
    steps.div_ceil(parts).checked_next_multiple_of(every.max(1)).unwrap_or(steps)
}

impl SweepSpec {
    /// What is said of parameter `name` under `parameters`.
    pub fn distribution(&self, name: &str) -> Option<&Distribution> {
        self.parameters.iter().find(|(n, _)| n == name).map(|(_, d)| d)
    }

    /// Whether trials may differ in parameter `name`.
    pub fn varies(&self, name: &str) -> bool {
        !matches!(self.distribution(name), None | Some(Distribution::Constant(_)))
    }

    /// The accelerators that `accelerator` may name in a trial, each once; none if it is never given.
    pub fn accelerators(&self) -> Vec<&str> {
        let named = self.distribution(TrialConfig::ACCELERATOR).map(Distribution::named);
        let searched = named.into_iter().flatten().filter_map(Value::as_str);
        let mut names: Vec<&str> = Vec::new();
        for name in searched.chain(self.base.accelerator.as_deref()) {
            if !names.iter().any(|known| known.eq_ignore_ascii_case(name)) {
                names.push(name);
            }
        }
        names
    }

    /// Every accelerator that it names, for all of its trials or for some.
    pub fn named_accelerators(&self) -> Vec<String> {
        let mut names = self.resources.accelerators.clone();
        for name in self.accelerators() {
            if !names.iter().any(|known| known.eq_ignore_ascii_case(name)) {
                names.push(name.into());
            }
        }
        names
    }

    /// What all trials share: the base with the constants among the parameters.
    pub fn common(&self) -> TrialConfig {
        let constants = self.parameters.iter().filter_map(|(name, distribution)| match distribution {
            Distribution::Constant(value) => Some((name.as_str(), value)),
            _ => None,
        });
        with_values(&self.base, values_of(&self.base), constants)
    }
}

/// The configuration with the values of some parameters, which have passed [`super::check_parameter`]; `values` are
/// [`values_of`] it.
pub fn with_values<'a>(
    config: &TrialConfig,
    mut values: Map<String, Value>,
    some: impl IntoIterator<Item = (&'a str, &'a Value)>,
) -> TrialConfig {
    values.extend(some.into_iter().map(|(name, value)| (name.into(), value.clone())));
    serde_json::from_value(Value::Object(values)).unwrap_or_else(|_| config.clone())
}

/// Every parameter with its value, as it was given.
pub fn values_of(config: &TrialConfig) -> Map<String, Value> {
    match serde_json::to_value(config) {
        Ok(Value::Object(values)) => values,
        // A flat struct of strings and numbers serialises without fail.
        Ok(_) | Err(_) => Map::new(),
    }
}

/// Every parameter with the value in force: `lora_alpha` is 2 × rank where it is not given, `max_steps` the
/// default where neither it nor `num_train_epochs` is.
pub fn in_force(config: &TrialConfig) -> Map<String, Value> {
    values_of(&config.in_force(None))
}
