//! The forms in which a parameter's values are written, and each thing that can be wrong with one.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use common::{check, over, spec};
use domain::sweep::Distribution;
use serde_json::{Value, json};
use std::collections::BTreeMap;

#[test]
fn forms() {
    for (form, distribution) in [
        (json!(8), Distribution::Constant(json!(8))),
        (json!({ "value": 8 }), Distribution::Constant(json!(8))),
        (json!([8, 16.0]), Distribution::Choices(vec![json!(8), json!(16)])),
        (json!({ "choices": [8] }), Distribution::Choices(vec![json!(8)])),
        (json!({ "integer": [1, 9] }), Distribution::Integer { low: 1, high: 9, step: None }),
        (json!({ "integer": [2, 8], "step": 2 }), Distribution::Integer { low: 2, high: 8, step: Some(2) }),
    ] {
        assert_eq!(spec(over("lora_rank", form.clone())).parameters[0].1, distribution, "{form}");
    }
    for (form, distribution) in [
        (json!({ "uniform": [1, 2] }), Distribution::Uniform { low: 1.0, high: 2.0, step: None }),
        (
            json!({ "uniform": [0.1, 0.5], "step": 0.2 }),
            Distribution::Uniform { low: 0.1, high: 0.5, step: Some(0.2) },
        ),
        (
            json!({ "log_uniform": [1e-5, 1e-3] }),
            Distribution::LogUniform { low: 1e-5, high: 1e-3, step: None },
        ),
        (json!({ "integer": [1, 3] }), Distribution::Integer { low: 1, high: 3, step: None }),
    ] {
        assert_eq!(spec(over("learning_rate", form.clone())).parameters[0].1, distribution, "{form}");
    }
    let names = json!({ "value": ["q_proj", "v_proj"] });
    assert_eq!(
        spec(over("target_modules", names)).parameters[0].1,
        Distribution::Constant(json!(["q_proj", "v_proj"]))
    );
}

#[test]
fn forms_that_are_refused() {
    for (name, form, problem) in [
        ("lora_rank", json!([]), ": is an empty list; name at least one value, or remove the key"),
        (
            "lora_rank",
            json!({ "choices": [] }),
            ".choices: is an empty list; name at least one value, or remove the key",
        ),
        ("lora_rank", json!({ "choices": 8 }), ".choices: must be a list, not 8; write choices: [8]"),
        ("lora_rank", json!([8, 16, 8.0]), "[2]: 8 is there twice; remove one of them"),
        ("learning_rate", json!([1, 1.0]), "[1]: 1.0 is there twice; remove one of them"),
        (
            "lora_rank",
            json!({ "uniform": [1, 8] }),
            ".uniform: lora_rank takes whole numbers; use integer, or choices",
        ),
        (
            "precision_mode",
            json!({ "uniform": [1, 8] }),
            ".uniform: precision_mode is no number; name its values with choices",
        ),
        ("lora_rank", json!({ "integer": [9, 8] }), ".integer: 9 is above 8; write [8, 9]"),
        (
            "lora_rank",
            json!({ "integer": [1, 8], "step": 0 }),
            ".step: must be a number above 0 and at most 7, not 0; give a step that fits the range",
        ),
        (
            "lora_rank",
            json!({ "integer": [1, 8], "step": 0.5 }),
            ".integer: the step must be a whole number of at most 2^53; use uniform for fractions",
        ),
        (
            "learning_rate",
            json!({ "integer": [1.5, 8] }),
            ".integer: the lowest must be a whole number of at most 2^53; use uniform for fractions",
        ),
        (
            "learning_rate",
            json!({ "log_uniform": [0, 1] }),
            ".log_uniform: the range goes through 0 or below; a logarithmic range begins above 0; use uniform for one that does not",
        ),
        (
            "weight_decay",
            json!({ "log_uniform": [-1, 1] }),
            ".log_uniform: the range goes through 0 or below; a logarithmic range begins above 0; use uniform for one that does not",
        ),
        (
            "learning_rate",
            json!({ "uniform": [1] }),
            ".uniform: must be two numbers, not a list; write uniform: [lowest, highest]",
        ),
        (
            "learning_rate",
            json!({ "uniform": ["a", "b"] }),
            ".uniform: must be two numbers, not a list; write uniform: [lowest, highest]",
        ),
        (
            "learning_rate",
            json!({ "step": 1 }),
            ": says no values; give one of value, choices, uniform, log_uniform, integer",
        ),
        (
            "learning_rate",
            json!({ "uniform": [1, 2], "choices": [1] }),
            ": has choices and uniform at once; keep one of them",
        ),
        (
            "learning_rate",
            json!({ "loguniform": [1, 2] }),
            ".loguniform: unknown key; did you mean log_uniform?",
        ),
        (
            "learning_rate",
            json!({ "choices": [1], "step": 1 }),
            ".step: choices takes no step; it belongs to uniform, log_uniform and integer; remove it",
        ),
        (
            "learning_rate",
            json!({ "choices": [1], "otherwise": 1 }),
            ".otherwise: there is no when; add when: { parameter: value }",
        ),
        (
            "target_modules",
            json!(["q_proj", "v_proj"]),
            ": a list of choices, each of which would have to match a whole module path; for one set of modules write { value: [q_proj, v_proj] }",
        ),
    ] {
        check(over(name, form), &[&format!("parameters.{name}{problem}")]);
    }
}

#[test]
fn conditions() {
    let length = |when: Value| json!({ "when": when, "choices": [512, 1024], "otherwise": 256 });
    let two = |first: (&str, Value), second: (&str, Value)| json!({ "parameters": { first.0: first.1, second.0: second.1 } });
    let precision = ("precision_mode", json!(["float16", "4bit"]));
    let sound = ("max_sequence_length", length(json!({ "precision_mode": "4bit" })));
    let spec = spec(two(precision.clone(), sound.clone()));
    let Distribution::When { conditions, then, otherwise } = &spec.parameters[1].1 else { panic!("no when") };
    assert_eq!(conditions, &BTreeMap::from([("precision_mode".to_string(), json!("4bit"))]));
    assert_eq!(**then, Distribution::Choices(vec![json!(512), json!(1024)]));
    assert_eq!(otherwise.as_deref(), Some(&Distribution::Constant(json!(256))));

    let at = "parameters.max_sequence_length.when";
    check(
        two(sound, precision.clone()),
        &[&format!(
            "{at}.precision_mode: precision_mode does not stand before max_sequence_length; \
         move precision_mode above max_sequence_length"
        )],
    );
    for (when, problem) in [
        (
            json!({ "precision": "4bit" }),
            ".precision: precision is no parameter; did you mean precision_mode?",
        ),
        (
            json!({ "precision_mode": "8bit" }),
            ".precision_mode: must be float32, bfloat16, float16 or 4bit, not \"8bit\"; give one such as \"float32\", the default",
        ),
        (
            json!({ "precision_mode": "float32" }),
            ".precision_mode: precision_mode is never \"float32\"; name one of its values",
        ),
        (
            json!({ "max_sequence_length": 512 }),
            ".max_sequence_length: max_sequence_length does not stand before max_sequence_length; move max_sequence_length above max_sequence_length",
        ),
        (json!({}), ": names no parameter; write when: { precision_mode: 4bit }"),
        (
            json!("4bit"),
            ": must be a mapping of parameters to values, not \"4bit\"; write when: { precision_mode: 4bit }",
        ),
    ] {
        let changes = two(precision.clone(), ("max_sequence_length", length(when)));
        check(changes, &[&format!("{at}{problem}")]);
    }
}
