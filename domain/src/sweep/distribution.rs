//! The forms in which a parameter's values are written: a scalar, a list, or a mapping with one of
//! `value`, `choices`, `uniform`, `log_uniform`, `integer`, each of the latter with `step` if wanted, and
//! all of them with `when` and `otherwise`.

use super::parameter::{Kind, LARGEST_WHOLE, check_parameter, remedy, rule_of};
use super::problem::{describe, did_you_mean, join, unknown_key};
use super::{Distribution, Problem};
use crate::trial::{PARAMETER_NAMES, TrialConfig};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// The keys that say what values a parameter takes.
const FORMS: &[&str] = &["value", "choices", "uniform", "log_uniform", "integer"];
/// All keys of a distribution.
const KEYS: &[&str] = &["value", "choices", "uniform", "log_uniform", "integer", "step", "when", "otherwise"];

/// Reads the distribution of parameter `name`, which must exist; `None` if problems were found.
pub(super) fn read(
    problems: &mut Vec<Problem>,
    path: &str,
    name: &str,
    value: &Value,
) -> Option<Distribution> {
    match value {
        Value::Object(object) => read_mapping(problems, path, name, object),
        Value::Array(items) => read_choices(problems, path, name, items),
        scalar => Some(Distribution::Constant(read_value(problems, path, name, scalar)?)),
    }
}

fn read_mapping(
    problems: &mut Vec<Problem>,
    path: &str,
    name: &str,
    object: &Map<String, Value>,
) -> Option<Distribution> {
    let before = problems.len();
    for key in object.keys().filter(|k| !KEYS.contains(&k.as_str())) {
        problems.push(unknown_key(join(path, key), key, KEYS));
    }
    let given: Vec<_> = FORMS.iter().filter(|form| object.contains_key(**form)).collect();
    let distribution = match given.as_slice() {
        [form] => read_form(problems, path, name, form, object),
        [] if problems.len() > before => None,
        [] => {
            problems.push(Problem::new(path, "says no values", format!("give one of {}", FORMS.join(", "))));
            None
        }
        many => {
            let many: Vec<_> = many.iter().map(ToString::to_string).collect();
            problems.push(Problem::new(
                path,
                format!("has {} at once", many.join(" and ")),
                "keep one of them",
            ));
            None
        }
    };
    let distribution = read_when(problems, path, name, object, distribution);
    if problems.len() > before { None } else { distribution }
}

fn read_form(
    problems: &mut Vec<Problem>,
    path: &str,
    name: &str,
    form: &str,
    object: &Map<String, Value>,
) -> Option<Distribution> {
    let at = join(path, form);
    let value = &object[form];
    let step = object.get("step");
    if let ("value" | "choices", Some(_)) = (form, step) {
        let remedy = "it belongs to uniform, log_uniform and integer; remove it";
        problems.push(Problem::new(join(path, "step"), format!("{form} takes no step"), remedy));
    }
    match (form, value) {
        ("value", value) => Some(Distribution::Constant(read_value(problems, &at, name, value)?)),
        ("choices", Value::Array(items)) => read_choices(problems, &at, name, items),
        ("choices", other) => {
            let problem = format!("must be a list, not {}", describe(other));
            problems.push(Problem::new(at, problem, format!("write choices: [{}]", describe(other))));
            None
        }
        (_, value) => read_range(problems, &at, name, form, value, step.map(|s| (join(path, "step"), s))),
    }
}

fn read_value(problems: &mut Vec<Problem>, path: &str, name: &str, value: &Value) -> Option<Value> {
    match check_parameter(name, value) {
        Ok(value) => Some(value),
        Err(problem) => {
            problems.push(Problem::new(path, problem, remedy(name)));
            None
        }
    }
}

fn read_choices(
    problems: &mut Vec<Problem>,
    path: &str,
    name: &str,
    items: &[Value],
) -> Option<Distribution> {
    let before = problems.len();
    if items.is_empty() {
        problems.push(Problem::new(path, "is an empty list", "name at least one value, or remove the key"));
    }
    let mut choices = Vec::with_capacity(items.len());
    for (i, item) in items.iter().enumerate() {
        let at = format!("{path}[{i}]");
        let Some(value) = read_value(problems, &at, name, item) else { continue };
        if choices.iter().any(|known| is_same(name, known, &value)) {
            problems.push(Problem::new(
                at,
                format!("{} is there twice", describe(&value)),
                "remove one of them",
            ));
        }
        choices.push(value);
    }
    if name == "target_modules" && choices.len() > 1 && choices.iter().all(is_bare_word) {
        let names: Vec<_> = choices.iter().filter_map(Value::as_str).collect();
        problems.push(Problem::new(
            path,
            "a list of choices, each of which would have to match a whole module path",
            format!("for one set of modules write {{ value: [{}] }}", names.join(", ")),
        ));
    }
    (problems.len() == before).then_some(Distribution::Choices(choices))
}

/// Whether two values of parameter `name` are one: an accelerator is known by its name in capitals and small letters.
fn is_same(name: &str, a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::String(a), Value::String(b)) if name == TrialConfig::ACCELERATOR => a.eq_ignore_ascii_case(b),
        _ => a == b,
    }
}

/// A module's bare name, such as `q_proj`, which as a pattern would match no layer.
fn is_bare_word(value: &Value) -> bool {
    value.as_str().is_some_and(|s| s.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'))
}

fn read_range(
    problems: &mut Vec<Problem>,
    path: &str,
    name: &str,
    form: &str,
    value: &Value,
    step: Option<(String, &Value)>,
) -> Option<Distribution> {
    let before = problems.len();
    let kind = rule_of(name)?.kind;
    if !matches!(kind, Kind::Whole | Kind::Number) {
        problems.push(Problem::new(path, format!("{name} is no number"), "name its values with choices"));
        return None;
    }
    if kind == Kind::Whole && form != "integer" {
        let remedy = "use integer, or choices";
        problems.push(Problem::new(path, format!("{name} takes whole numbers"), remedy));
        return None;
    }
    let ends = value.as_array().and_then(|ends| match ends.as_slice() {
        [low, high] => Some((low.as_f64()?, high.as_f64()?)),
        _ => None,
    });
    let Some((low, high)) = ends else {
        let problem = format!("must be two numbers, not {}", describe(value));
        problems.push(Problem::new(path, problem, format!("write {form}: [lowest, highest]")));
        return None;
    };
    if low > high {
        problems.push(Problem::new(path, format!("{low} is above {high}"), format!("write [{high}, {low}]")));
    }
    if form == "log_uniform" && low <= 0.0 {
        let remedy = "a logarithmic range begins above 0; use uniform for one that does not";
        problems.push(Problem::new(path, "the range goes through 0 or below", remedy));
    } else {
        for (i, end) in value.as_array().into_iter().flatten().enumerate() {
            read_value(problems, &format!("{path}[{i}]"), name, end);
        }
    }
    let step = match step {
        None => None,
        Some((at, step)) => read_step(problems, at, step, high - low),
    };
    if form == "integer" {
        for (what, x) in [("lowest", Some(low)), ("highest", Some(high)), ("step", step)] {
            if x.is_some_and(|x| x.fract() != 0.0 || x.abs() > LARGEST_WHOLE as f64) {
                let problem = format!("the {what} must be a whole number of at most 2^53");
                problems.push(Problem::new(path, problem, "use uniform for fractions"));
            }
        }
    }
    (problems.len() == before).then_some(match form {
        "uniform" => Distribution::Uniform { low, high, step },
        "log_uniform" => Distribution::LogUniform { low, high, step },
        _ => Distribution::Integer { low: low as i64, high: high as i64, step: step.map(|s| s as i64) },
    })
}

fn read_step(problems: &mut Vec<Problem>, path: String, step: &Value, width: f64) -> Option<f64> {
    match step.as_f64() {
        Some(step) if step > 0.0 && step <= width => Some(step),
        _ => {
            let problem = format!("must be a number above 0 and at most {width}, not {}", describe(step));
            problems.push(Problem::new(path, problem, "give a step that fits the range"));
            None
        }
    }
}

fn read_when(
    problems: &mut Vec<Problem>,
    path: &str,
    name: &str,
    object: &Map<String, Value>,
    then: Option<Distribution>,
) -> Option<Distribution> {
    let otherwise = object.get("otherwise");
    let Some(when) = object.get("when") else {
        if otherwise.is_some() {
            problems.push(Problem::new(
                join(path, "otherwise"),
                "there is no when",
                "add when: { parameter: value }",
            ));
        }
        return then;
    };
    let otherwise = otherwise.map(|o| read(problems, &join(path, "otherwise"), name, o).map(Box::new));
    let conditions = read_conditions(problems, &join(path, "when"), when)?;
    let otherwise = match otherwise {
        Some(None) => return None,
        Some(some) => some,
        None => None,
    };
    Some(Distribution::When { conditions, then: Box::new(then?), otherwise })
}

pub(super) fn read_conditions(
    problems: &mut Vec<Problem>,
    path: &str,
    when: &Value,
) -> Option<BTreeMap<String, Value>> {
    let problem = match when.as_object() {
        None => Some(format!("must be a mapping of parameters to values, not {}", describe(when))),
        Some(object) if object.is_empty() => Some("names no parameter".into()),
        Some(_) => None,
    };
    if let Some(problem) = problem {
        problems.push(Problem::new(path, problem, "write when: { precision_mode: 4bit }"));
    }
    let object = when.as_object().filter(|o| !o.is_empty())?;
    let before = problems.len();
    let mut conditions = BTreeMap::new();
    for (parameter, value) in object {
        let at = join(path, parameter);
        if rule_of(parameter).is_none() {
            let remedy = did_you_mean(parameter, PARAMETER_NAMES);
            problems.push(Problem::new(at, format!("{parameter} is no parameter"), remedy));
        } else if let Some(value) = read_value(problems, &at, parameter, value) {
            conditions.insert(parameter.clone(), value);
        }
    }
    (problems.len() == before).then_some(conditions)
}

/// Writes a distribution in the form that [`read`] reads.
pub(super) fn write(distribution: &Distribution) -> Value {
    let range = |form: &str, ends: Value, step: Option<Value>| {
        let mut object = Map::new();
        object.insert(form.into(), ends);
        step.map(|step| object.insert("step".into(), step));
        Value::Object(object)
    };
    match distribution {
        Distribution::Constant(Value::Array(items)) => json!({ "value": items }),
        Distribution::Constant(value) => value.clone(),
        Distribution::Choices(choices) => json!({ "choices": choices }),
        Distribution::Uniform { low, high, step } => {
            range("uniform", json!([low, high]), step.map(|s| json!(s)))
        }
        Distribution::LogUniform { low, high, step } => {
            range("log_uniform", json!([low, high]), step.map(|s| json!(s)))
        }
        Distribution::Integer { low, high, step } => {
            range("integer", json!([low, high]), step.map(|s| json!(s)))
        }
        Distribution::When { conditions, then, otherwise } => {
            let mut object = Map::new();
            object.insert("when".into(), json!(conditions));
            match write(then) {
                Value::Object(form) => object.extend(form),
                constant => drop(object.insert("value".into(), constant)),
            }
            otherwise.as_ref().map(|o| object.insert("otherwise".into(), write(o)));
            Value::Object(object)
        }
    }
}

impl Distribution {
    /// Every value that it names one by one, whichever conditions hold; none of a range.
    pub fn named(&self) -> Vec<&Value> {
        match self {
            Distribution::Constant(value) => vec![value],
            Distribution::Choices(choices) => choices.iter().collect(),
            Distribution::When { then, otherwise, .. } => {
                let otherwise = otherwise.as_ref().map(|otherwise| otherwise.named()).unwrap_or_default();
                [then.named(), otherwise].concat()
            }
            Distribution::Uniform { .. } | Distribution::LogUniform { .. } | Distribution::Integer { .. } => {
                Vec::new()
            }
        }
    }

    /// How many values it can take; `None` if there is no end of them. Of a `when`, ask what it resolves to.
    pub fn count(&self) -> Option<u64> {
        match self {
            Distribution::Constant(_) => Some(1),
            Distribution::Choices(choices) => Some(choices.len() as u64),
            Distribution::Uniform { low, high, step } | Distribution::LogUniform { low, high, step } => {
                Some(steps_between(*low, *high, (*step)?).saturating_add(1))
            }
            Distribution::Integer { low, high, step } => {
                Some(((high - low) / step.unwrap_or(1).max(1)) as u64 + 1)
            }
            Distribution::When { .. } => None,
        }
    }

    /// Its `k`-th value (from 0) in rising or the written order; `None` where [`Self::count`] is or ends.
    pub fn nth(&self, k: u64) -> Option<Value> {
        if k >= self.count()? {
            return None;
        }
        match self {
            Distribution::Constant(value) => Some(value.clone()),
            Distribution::Choices(choices) => choices.get(usize::try_from(k).ok()?).cloned(),
            Distribution::Uniform { low, high, step } | Distribution::LogUniform { low, high, step } => {
                Some(json!(stepped(*low, (*step)?, k).max(*low).min(*high)))
            }
            Distribution::Integer { low, step, .. } => {
                Some(json!(low + i64::try_from(k).ok()? * step.unwrap_or(1).max(1)))
            }
            Distribution::When { .. } => None,
        }
    }

    /// The distribution in force where `holds` says whether a parameter has a value; `None` where the
    /// parameter keeps its default.
    pub fn resolve(&self, holds: &dyn Fn(&str, &Value) -> bool) -> Option<&Distribution> {
        match self {
            Distribution::When { conditions, then, otherwise } => {
                if conditions.iter().all(|(name, value)| holds(name, value)) {
                    then.resolve(holds)
                } else {
                    otherwise.as_ref()?.resolve(holds)
                }
            }
            plain => Some(plain),
        }
    }
}

/// Steps of size `step` that fit between `low` and `high`, forgiving the last bits of a decimal step.
fn steps_between(low: f64, high: f64, step: f64) -> u64 {
    ((high - low) / step + 1e-9).floor().max(0.0) as u64
}

/// `low + k · step` without the noise of binary fractions (0.1 + 2 · 0.1 is 0.3).
fn stepped(low: f64, step: f64, k: u64) -> f64 {
    let x = low + k as f64 * step;
    format!("{x:.12e}").parse().unwrap_or(x)
}
