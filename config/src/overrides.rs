//! `--set key=value`: one key of the document replaced or added.
//!
//! The value is read as YAML. Dots in the key reach inside: `search.max_trials=4`. A parameter's bare name sets
//! it wherever it stands: what the file says of it, at the top level or under `parameters`, is replaced. A list
//! or mapping for a parameter that takes one value is a search over it and goes under `parameters`.

use crate::yaml;
use domain::sweep::{Problem, check_parameter};
use domain::trial::PARAMETER_NAMES;
use serde_json::{Map, Value, json};

/// Applies one override and returns the path in the document at which it now stands.
///
/// # Errors
/// Why the key or value cannot be read.
pub(crate) fn apply(document: &mut Map<String, Value>, key: &str, text: &str) -> Result<String, Problem> {
    let value = read(key, text)?;
    let name = key.strip_prefix("parameters.").unwrap_or(key);
    if PARAMETER_NAMES.contains(&name) {
        return Ok(set_parameter(document, name, value, name != key));
    }
    set(document, key, key, value)?;
    Ok(key.to_string())
}

fn read(key: &str, text: &str) -> Result<Value, Problem> {
    let parsed = yaml::parse(text)
        .map_err(|(_, message)| Problem::new(key, format!("`{text}` is no YAML: {message}"), "quote it"))?;
    match parsed.problems.into_iter().next() {
        Some(problem) => Err(Problem { path: key.into(), ..problem }),
        None => Ok(parsed.value),
    }
}

/// Sets a parameter in the one place where it may stand.
fn set_parameter(document: &mut Map<String, Value>, name: &str, value: Value, searched: bool) -> String {
    let one_value = check_parameter(name, &value).is_ok();
    let composite = value.is_array() || value.is_object();
    let entry = find_entry(document, name);
    if !searched && entry.is_none() && (one_value || !composite) {
        document.insert(name.into(), value);
        return name.into();
    }
    // A list of module names is one value, but under `parameters` a list is one of choices.
    let value = if one_value && composite && !searched { json!({ "value": value }) } else { value };
    document.shift_remove(name);
    match find_entry(document, name) {
        Some(entry) => *entry = value,
        None => match document.entry("parameters").or_insert_with(|| Value::Object(Map::new())) {
            Value::Array(items) => items.push(Value::Object(Map::from_iter([(name.to_string(), value)]))),
            Value::Object(object) => drop(object.insert(name.into(), value)),
            other => *other = json!({ name: value }),
        },
    }
    format!("parameters.{name}")
}

/// What stands under `parameters`, a mapping or a list of mappings, for `name`.
fn find_entry<'a>(document: &'a mut Map<String, Value>, name: &str) -> Option<&'a mut Value> {
    match document.get_mut("parameters")? {
        Value::Object(object) => object.get_mut(name),
        Value::Array(items) => items.iter_mut().find_map(|item| item.as_object_mut()?.get_mut(name)),
        _ => None,
    }
}

fn set(object: &mut Map<String, Value>, whole: &str, rest: &str, value: Value) -> Result<(), Problem> {
    let Some((first, rest)) = rest.split_once('.') else {
        object.insert(rest.into(), value);
        return Ok(());
    };
    match object.entry(first).or_insert_with(|| Value::Object(Map::new())) {
        Value::Object(inner) => set(inner, whole, rest, value),
        null @ Value::Null => {
            let mut inner = Map::new();
            set(&mut inner, whole, rest, value)?;
            *null = Value::Object(inner);
            Ok(())
        }
        _ => {
            Err(Problem::new(whole, format!("{first} has no keys inside"), format!("set {first} as a whole")))
        }
    }
}
