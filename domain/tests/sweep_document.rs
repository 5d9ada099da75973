//! Sweep documents: what is accepted, what it means, and each thing that can be wrong with one.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use domain::sweep::{Algorithm, Distribution, SweepSpec};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// A sound random search, with `changes` laid over its top-level keys; null removes one.
fn document(changes: Value) -> Map<String, Value> {
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

fn spec(changes: Value) -> SweepSpec {
    SweepSpec::from_document(&document(changes.clone())).unwrap_or_else(|p| panic!("{changes}: {p:#?}"))
}

fn check(changes: Value, problems: &[&str]) {
    let found = match SweepSpec::from_document(&document(changes.clone())) {
        Ok(_) => Vec::new(),
        Err(found) => found.iter().map(ToString::to_string).collect(),
    };
    assert_eq!(found, problems, "{changes}");
}

/// A search over one parameter.
fn over(name: &str, distribution: Value) -> Value {
    json!({ "parameters": { name: distribution } })
}

#[test]
fn keys() {
    check(json!({}), &[]);
    check(
        json!({ "lora_rnk": 8, "learning_rat": 1 }),
        &[
            "lora_rnk: unknown key; did you mean lora_rank?",
            "learning_rat: unknown key; did you mean learning_rate?",
        ],
    );
    check(
        json!({ "nmae": "x", "name": null }),
        &[
            "nmae: unknown key; did you mean name?",
            "name: missing; give the sweep a name, such as name: my-sweep",
        ],
    );
    check(over("lora_rnk", json!([8])), &["parameters.lora_rnk: unknown key; did you mean lora_rank?"]);
    check(
        json!({ "search": { "max_trials": 1, "algoritm": "grid" } }),
        &["search.algoritm: unknown key; did you mean algorithm?"],
    );
    check(
        json!({ "budget": { "max_cost": 1 } }),
        &["budget.max_cost: unknown key; did you mean max_cost_usd?"],
    );
    check(json!({ "resources": { "gpus": [] } }), &["resources.gpus: unknown key; known are accelerators"]);
    check(
        json!({ "search": 3 }),
        &[
            "search: must be a mapping, not 3; its keys are algorithm, max_trials, metric, goal, seed, min_steps, \
         reduction_factor, max_concurrent_trials",
            "search.max_trials: missing: these draws have no end of their own; say how many trials there shall be",
        ],
    );
    check(
        json!({ "pretrained_model_id": null, "dataset_name": null }),
        &[
            "pretrained_model_id: missing; name the base model's directory",
            "dataset_name: missing; name a .jsonl or .parquet file of training rows",
        ],
    );
    check(
        json!({ "pretrained_model_id": "" }),
        &["pretrained_model_id: must be a model's directory, not \"\"; give another value"],
    );
}

#[test]
fn names() {
    for name in ["a", "openllama-7b", "run_3.1", "7b"] {
        assert_eq!(spec(json!({ "name": name })).name, name);
    }
    for name in [json!(""), json!("a/b"), json!("a b"), json!(".."), json!("-x"), json!("é"), json!(7)] {
        let found = SweepSpec::from_document(&document(json!({ "name": name }))).unwrap_err();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].path, "name", "{name}");
    }
}

#[test]
fn values() {
    let message = "must be a whole number from 1, not 0; give one such as 16, the default";
    check(json!({ "lora_rank": 0, "parameters": null }), &[&format!("lora_rank: {message}")]);
    check(over("lora_rank", json!([8, 0])), &[&format!("parameters.lora_rank[1]: {message}")]);
    check(over("lora_rank", json!(0)), &[&format!("parameters.lora_rank: {message}")]);
    check(
        over("lora_rank", json!({ "choices": [0] })),
        &[&format!("parameters.lora_rank.choices[0]: {message}")],
    );
    check(
        over("lora_rank", json!({ "integer": [0, 8] })),
        &[&format!("parameters.lora_rank.integer[0]: {message}")],
    );
    check(
        json!({ "batch_size": "two" }),
        &["batch_size: must be a whole number from 1, not \"two\"; give one such as 2, the default"],
    );
    check(
        json!({ "learning_rate": [1e-4, 1e-3] }),
        &[
            "learning_rate: must be a number above 0, not a list; to search over learning_rate, put it under parameters",
        ],
    );
    check(
        json!({ "lora_rank": 8 }),
        &["parameters.lora_rank: lora_rank is given at the top level too; remove one of the two"],
    );
    check(
        json!({ "seed": 9_007_199_254_740_993u64 }),
        &[
            "seed: must be a whole number from 0 to 2^53, not 9007199254740993; give one such as 42, the default",
        ],
    );
    check(
        json!({ "seed": 1e300 }),
        &["seed: must be a whole number from 0 to 2^53, not 1e+300; give one such as 42, the default"],
    );
}

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

#[test]
fn search_keys() {
    let search = |search: Value| json!({ "search": search });
    for (given, problem) in [
        (
            json!({ "algorithm": "bayes", "max_trials": 1 }),
            "search.algorithm: must be one of grid, random, one_factor_at_a_time, asha, not \"bayes\"; known are grid, random, one_factor_at_a_time, asha",
        ),
        (
            json!({ "max_trials": 0 }),
            "search.max_trials: must be a whole number from 1, not 0; give one of at most 4294967295",
        ),
        (
            json!({ "max_trials": 1, "goal": "min" }),
            "search.goal: must be one of minimize, maximize, not \"min\"; did you mean minimize?",
        ),
        (
            json!({ "max_trials": 1, "metric": "eval_loss" }),
            "search.metric: \"eval_loss\" is no metric; did you mean eval/loss?",
        ),
        (
            json!({ "max_trials": 1, "reduction_factor": 1 }),
            "search.reduction_factor: must be a whole number from 2, not 1; give one of at most 4294967295",
        ),
        (
            json!({ "max_trials": 1, "seed": -1 }),
            "search.seed: must be a whole number from 0, not -1; give one of at most 9007199254740992",
        ),
    ] {
        let found = SweepSpec::from_document(&document(search(given))).unwrap_err();
        assert_eq!(found[0].to_string(), problem);
    }
    assert_eq!(
        spec(search(json!({ "max_trials": 2, "metric": "eval/arc/acc_norm" }))).search.metric,
        "eval/arc/acc_norm"
    );
    for algorithm in ["random", "asha"] {
        check(
            search(json!({ "algorithm": algorithm })),
            &[
                "search.max_trials: missing: these draws have no end of their own; say how many trials there shall be",
            ],
        );
    }
    check(search(json!({ "algorithm": "grid" })), &[]);
    check(
        json!({ "eval_size": 0 }),
        &[
            "search.metric: eval/loss needs held-out rows, and there are none; set eval_size above 0, or eval_dataset_name",
        ],
    );
    check(json!({ "eval_size": 0, "eval_dataset_name": "held-out.jsonl" }), &[]);
    check(json!({ "eval_size": 0, "search": { "max_trials": 1, "metric": "loss" } }), &[]);
}

#[test]
fn rungs_of_asha() {
    let asha = |search: Value, rest: Value| {
        let mut changes = rest;
        changes["search"] = json!({ "algorithm": "asha", "max_trials": 9 });
        changes["search"].as_object_mut().unwrap().extend(search.as_object().unwrap().clone());
        changes
    };
    // (search, other keys) -> (min_steps, eval_steps)
    for (search, rest, min_steps, eval_steps) in [
        (json!({}), json!({}), 19, 19),
        (json!({}), json!({ "max_steps": 200 }), 8, 8),
        (json!({}), json!({ "max_steps": 200, "eval_steps": 5 }), 10, 5),
        (json!({ "min_steps": 20 }), json!({ "max_steps": 200, "eval_steps": 10 }), 20, 10),
        (json!({ "min_steps": 20 }), json!({ "num_train_epochs": 3 }), 20, 20),
        (json!({ "reduction_factor": 2 }), json!({ "max_steps": 80 }), 10, 10),
        (json!({ "metric": "loss" }), json!({ "max_steps": 80, "logging_steps": 4 }), 4, 0),
    ] {
        let spec = spec(asha(search, rest));
        assert_eq!(spec.search.algorithm, Algorithm::Asha);
        assert_eq!((spec.search.min_steps, spec.base.eval_steps), (Some(min_steps), eval_steps));
    }
    for (search, rest, problem) in [
        (
            json!({ "min_steps": 200 }),
            json!({ "max_steps": 200 }),
            "search.min_steps: the first rung at step 200 does not come before the last step, 200; give fewer, or raise max_steps",
        ),
        (
            json!({}),
            json!({ "num_train_epochs": 3 }),
            "search.min_steps: missing: the steps of num_train_epochs are not known beforehand; say at which step asha first compares",
        ),
        (
            json!({ "min_steps": 25 }),
            json!({ "eval_steps": 10 }),
            "search.min_steps: the rung at step 25 has no value, since eval_steps is 10; make min_steps a multiple of eval_steps",
        ),
        (
            json!({ "metric": "cost_usd" }),
            json!({}),
            "search.metric: cost_usd is known at a trial's end only, too late for asha; use eval/loss or loss, or another algorithm",
        ),
        (
            json!({}),
            over("max_steps", json!([100, 200])),
            "parameters.max_steps: asha compares trials at the same steps; give max_steps one value",
        ),
    ] {
        check(asha(search, rest), &[problem]);
    }
}

#[test]
fn budget_and_resources() {
    for (clock, seconds) in [
        (json!("6h"), 21600.0),
        (json!("30m"), 1800.0),
        (json!("1h30m"), 5400.0),
        (json!("1.5h"), 5400.0),
        (json!("45s"), 45.0),
        (json!("2d"), 172800.0),
        (json!(90), 90.0),
    ] {
        assert_eq!(
            spec(json!({ "budget": { "max_wall_clock": clock } })).budget.max_wall_clock_seconds,
            Some(seconds)
        );
    }
    for clock in [json!("6"), json!("6 hours"), json!("h"), json!(0), json!(-3), json!([1]), json!("")] {
        let found = SweepSpec::from_document(&document(json!({ "budget": { "max_wall_clock": clock } })))
            .unwrap_err();
        assert_eq!(found[0].path, "budget.max_wall_clock", "{clock}");
        assert_eq!(found[0].remedy, "write 6h, 30m, 1h30m or seconds");
    }
    check(
        json!({ "budget": { "max_cost_usd": 0 } }),
        &["budget.max_cost_usd: must be above 0, not 0; give an amount in US dollars"],
    );
    check(
        json!({ "resources": { "accelerators": "A100" } }),
        &[
            "resources.accelerators: must be a list of accelerator names; write accelerators: [A100-40GB]; an empty list means any",
        ],
    );
}

#[test]
fn constraints() {
    check(json!({ "constraints": ["lora_rank <= 8"] }), &[]);
    check(
        json!({ "constraints": ["lora_rank <= 8", "lora_rnk <= 8", "lora_rank +"] }),
        &[
            "constraints[1]: column 1: lora_rnk is no parameter (a text needs quotes); did you mean lora_rank?; \
         write a condition such as lora_rank * batch_size <= 128",
            "constraints[2]: column 12: expected a parameter, a number or a text, found the end; \
         write a condition such as lora_rank * batch_size <= 128",
        ],
    );
    check(
        json!({ "constraints": "lora_rank <= 8" }),
        &["constraints: must be a list of texts; write constraints: [\"lora_rank * batch_size <= 128\"]"],
    );
}
