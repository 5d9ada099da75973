//! A sound sweep document, and what is wrong with one that was changed.

#![allow(dead_code, reason = "each test file uses some of it")]

use domain::sweep::SweepSpec;
use serde_json::{Map, Value, json};

/// A sound random search, with `changes` laid over its top-level keys; null removes one.
pub fn document(changes: Value) -> Map<String, Value> {
    let mut document = json!({
        "name": "test",
        "pretrained_model_id": "model",
        "dataset_name": "rows.jsonl",
        "search": { "max_trials": 4 },
        "parameters": { "lora_rank": [8, 16] },
    });
    let document = document.as_object_mut().unwrap();
    for (key, value) in changes.as_object().unwrap() {
        match value {
            Value::Null => drop(document.shift_remove(key)),
            value => drop(document.insert(key.clone(), value.clone())),
        }
    }
    document.clone()
}

/// The spec of such a document.
pub fn spec(changes: Value) -> SweepSpec {
    SweepSpec::from_document(&document(changes.clone())).unwrap_or_else(|p| panic!("{changes}: {p:#?}"))
}

/// Holds the problems of such a document against those given, word for word.
pub fn check(changes: Value, problems: &[&str]) {
    let found = match SweepSpec::from_document(&document(changes.clone())) {
        Ok(_) => Vec::new(),
        Err(found) => found.iter().map(ToString::to_string).collect(),
    };
    assert_eq!(found, problems, "{changes}");
}

/// A search over one parameter.
pub fn over(name: &str, distribution: Value) -> Value {
    json!({ "parameters": { name: distribution } })
}
