//! Sweep documents: what is accepted, what it means, and each thing that can be wrong with one.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use common::{check, document, over, spec};
use domain::sweep::{Algorithm, Evaluations, Goal, SweepSpec};
use domain::trial::TrialConfig;
use serde_json::{Value, json};

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
    check(
        json!({ "resources": { "gpus": [] } }),
        &["resources.gpus: unknown key; known are accelerators, max_pack_size"],
    );
    check(
        json!({ "search": 3 }),
        &[
            "search: must be a mapping, not 3; its keys are algorithm, max_trials, metric, goal, seed, min_steps, \
         reduction_factor, max_concurrent_trials",
        ],
    );
    check(
        json!({ "pretrained_model_id": null, "dataset_name": null }),
        &[
            "pretrained_model_id: missing; name the base model's directory",
            "dataset_name: missing; name a .jsonl, .json or .parquet file of training rows",
        ],
    );
    check(
        json!({ "pretrained_model_id": "" }),
        &[
            "pretrained_model_id: must be a model's directory or its id on the hub, not \"\"; give another value",
        ],
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
            "search.metric: \"eval_loss\" is no metric that a trial reports as it trains; did you mean eval/loss?",
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
    for (algorithm, expected) in [
        (json!({ "algorithm": "bayes" }), "search.algorithm"),
        (json!({ "algoritm": "grid" }), "search.algoritm"),
        (json!({ "max_trial": 4 }), "search.max_trial"),
    ] {
        let found = SweepSpec::from_document(&document(search(algorithm))).unwrap_err();
        assert_eq!(found.iter().map(|p| p.path.as_str()).collect::<Vec<_>>(), [expected]);
    }
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

/// What is said of a mixture where none is made would do nothing.
#[test]
fn settings_of_a_mixture_need_one() {
    let problem = |path: &str, name: &str| {
        format!(
            "{path}: is given without interleave_datasets, so that nothing is mixed; name the other data sets in \
             interleave_datasets, or leave {name} out"
        )
    };
    let (weights, stop) = ("interleave_probabilities", "stopping_strategy");
    check(json!({ "interleave_probabilities": [1] }), &[&problem(weights, weights)]);
    check(json!({ "stopping_strategy": "all_exhausted" }), &[&problem(stop, stop)]);
    check(
        over(stop, json!(["first_exhausted", "all_exhausted"])),
        &[&problem("parameters.stopping_strategy", stop)],
    );
    check(json!({ "stopping_strategy": "all_exhausted", "interleave_datasets": ["other.jsonl"] }), &[]);
    check(
        json!({ "stopping_strategy": "all_exhausted", "interleave_datasets": "other.jsonl" }),
        &[
            "interleave_datasets: must be a list of data sets, not \"other.jsonl\"; give another value, or leave it out",
        ],
    );
}

#[test]
fn metrics() {
    let with = |metric: &str| json!({ "search": { "max_trials": 2, "metric": metric } });
    for name in domain::metric::REPORTED {
        assert!(domain::metric::definition(name).is_some(), "{name} is not defined");
        assert_eq!(spec(with(name)).search.metric, *name);
    }
    let known = "known are eval/loss, loss, grad_norm, learning_rate, tokens, samples_per_second, \
                 tokens_per_second, peak_memory_bytes";
    for (name, remedy) in [
        ("eval/los", "did you mean eval/loss?"),
        ("los", "did you mean loss?"),
        ("eval//acc_norm", known),
        ("accuracy", known),
        ("cost_usd", known),
        ("", known),
    ] {
        let problem =
            format!("search.metric: \"{name}\" is no metric that a trial reports as it trains; {remedy}");
        check(with(name), &[&problem]);
    }
}

#[test]
fn nothing_to_search_over_is_one_trial() {
    for changes in [
        json!({ "search": null, "parameters": null }),
        json!({ "search": {}, "parameters": {} }),
        json!({ "search": { "algorithm": "asha" }, "parameters": null }),
        json!({ "search": null, "parameters": { "lora_rank": 8 } }),
    ] {
        assert_eq!(spec(changes.clone()).search.max_trials, Some(1), "{changes}");
    }
    assert_eq!(
        spec(json!({ "search": { "algorithm": "grid" }, "parameters": null })).search.max_trials,
        None
    );
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
            json!({ "metric": "eval/los", "min_steps": 25 }),
            json!({ "eval_steps": 10 }),
            "search.metric: \"eval/los\" is no metric that a trial reports as it trains; did you mean eval/loss?",
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
    for (most, want) in [(json!(null), None), (json!(1), Some(1)), (json!(8.0), Some(8))] {
        let read = spec(json!({ "resources": { "max_pack_size": most } }));
        assert_eq!(read.resources.max_pack_size, want, "{most}");
        assert_eq!(SweepSpec::from_document(&read.to_document()), Ok(read), "{most}");
    }
    for (most, named) in [
        ("0", "0"),
        ("1.5", "1.5"),
        ("-1", "-1"),
        ("\"one\"", "\"one\""),
        ("true", "true"),
        ("[1]", "a list"),
    ] {
        let value: Value = serde_json::from_str(most).unwrap();
        let problem = format!(
            "resources.max_pack_size: must be a whole number from 1, not {named}; give one of at most 4294967295"
        );
        check(json!({ "resources": { "max_pack_size": value } }), &[&problem]);
    }
}

/// Where trials run is a parameter like others, within what the sweep may use at all.
#[test]
fn accelerators() {
    let on = |value: Value| over("accelerator", value);
    let with = |mut changes: Value, allowed: Value| {
        changes["resources"] = json!({ "accelerators": allowed });
        changes
    };
    let both = json!(["A100-40GB", "V100-16GB"]);
    for (changes, want) in [
        (json!({}), &[][..]),
        (json!({ "accelerator": "A100-40GB" }), &["A100-40GB"]),
        (on(json!("of-a-later-catalogue")), &["of-a-later-catalogue"]),
        (on(both.clone()), &["A100-40GB", "V100-16GB"]),
        (with(on(both.clone()), json!(["v100-16gb", "a100-40gb", "T4-16GB"])), &["A100-40GB", "V100-16GB"]),
        (with(json!({}), json!(["T4-16GB"])), &[]),
    ] {
        assert_eq!(spec(changes.clone()).accelerators(), want, "{changes}");
    }
    let conditional = json!({ "parameters": {
        "precision_mode": ["float16", "4bit"],
        "accelerator": { "when": { "precision_mode": "4bit" }, "choices": ["T4-16GB", "V100-16GB"], "otherwise": "A100-40GB" },
    } });
    assert_eq!(spec(conditional).accelerators(), ["T4-16GB", "V100-16GB", "A100-40GB"]);
    let named =
        spec(with(on(both.clone()), json!(["v100-16gb", "a100-40gb", "T4-16GB"]))).named_accelerators();
    assert_eq!(named, ["v100-16gb", "a100-40gb", "T4-16GB"]);
    assert_eq!(spec(on(both.clone())).named_accelerators(), ["A100-40GB", "V100-16GB"]);
    check(
        on(json!(["A100-40GB", "a100-40gb"])),
        &["parameters.accelerator[1]: \"a100-40gb\" is there twice; remove one of them"],
    );
    check(
        on(json!([""])),
        &[
            "parameters.accelerator[0]: must be an accelerator's name, not \"\"; give another value, or leave it out",
        ],
    );
    check(
        with(on(both), json!(["V100-16GB", "T4-16GB"])),
        &[
            "parameters.accelerator: A100-40GB is none of resources.accelerators, V100-16GB, T4-16GB; add A100-40GB there, \
           or leave resources.accelerators out",
        ],
    );
    check(
        with(json!({ "accelerator": "CPU" }), json!(["T4-16GB"])),
        &[
            "accelerator: CPU is none of resources.accelerators, T4-16GB; add CPU there, or leave resources.accelerators out",
        ],
    );
}

#[test]
fn evaluations() {
    let asked = |section: Value| json!({ "evaluations": section });
    assert_eq!(spec(json!({})).evaluations, None);
    assert_eq!(spec(asked(json!(null))).evaluations, None);
    let full = json!({
        "tasks": ["arc_challenge", { "include": "arc_easy", "task": "mine" }],
        "when": { "lora_rank": 16, "max_steps": 500 }, "num_fewshot": 0, "limit": 20,
        "fewshot_order": "v0.3",
        "task_data": { "mine": "/data/mine.jsonl" }, "fewshot_data": { "mine": "/data/train.jsonl" },
    });
    assert_eq!(spec(asked(full.clone())).to_document()["evaluations"], full);
    let least = json!({ "tasks": ["arc_easy"] });
    assert_eq!(spec(asked(least.clone())).to_document()["evaluations"], least);

    let tasks = "evaluations.tasks: must be a list of tasks; write tasks: [arc_challenge, ./my-task.yaml]; \
                 docs/evaluation.md has their names";
    for wrong in [json!([]), json!("arc_easy"), json!([1]), json!([""]), json!([{ "include": "arc_easy" }])] {
        check(asked(json!({ "tasks": wrong })), &[tasks]);
    }
    check(asked(json!({})), &[tasks]);
    let with = |key: &str, value: Value| asked(json!({ "tasks": ["arc_easy"], key: value }));
    for (key, value, problem) in [
        ("limits", json!(1), "limits: unknown key; did you mean limit?"),
        (
            "when",
            json!("4bit"),
            "when: must be a mapping of parameters to values, not \"4bit\"; write when: { precision_mode: 4bit }",
        ),
        (
            "when",
            json!({ "lora_rnk": 8 }),
            "when.lora_rnk: lora_rnk is no parameter; did you mean lora_rank?",
        ),
        (
            "when",
            json!({ "lora_rank": 0 }),
            "when.lora_rank: must be a whole number from 1, not 0; give one such as 16, the default",
        ),
        ("when", json!({ "lora_rank": 32 }), "when.lora_rank: lora_rank is never 32; name one of its values"),
        ("limit", json!(0), "limit: must be a whole number from 1, not 0; give one of at most 4294967295"),
        (
            "num_fewshot",
            json!(0.5),
            "num_fewshot: must be a whole number from 0, not 0.5; give one of at most 4294967295",
        ),
        (
            "fewshot_order",
            json!("v0.2"),
            "fewshot_order: must be v0.4 or v0.3, not \"v0.2\"; name the harness's version whose order it is to be",
        ),
        (
            "task_data",
            json!("rows.jsonl"),
            "task_data: must be a mapping of tasks to paths; write task_data: \
             { arc_challenge: ./ARC-Challenge-Test.jsonl }",
        ),
        (
            "fewshot_data",
            json!({ "arc_easy": 1 }),
            "fewshot_data: must be a mapping of tasks to paths; write fewshot_data: \
             { arc_challenge: ./ARC-Challenge-Test.jsonl }",
        ),
    ] {
        check(with(key, value), &[&format!("evaluations.{problem}")]);
    }
}

/// Some trials are asked, and told nothing of the others.
#[test]
fn evaluations_of_some_trials() {
    let when = |conditions: Value| {
        let changes = json!({ "evaluations": { "tasks": ["arc_easy"], "when": conditions, "limit": 3 } });
        spec(changes).evaluations.unwrap()
    };
    let config = TrialConfig { lora_rank: 8, ..TrialConfig::default() };
    for (conditions, asked) in [
        (json!(null), true),
        (json!({ "lora_rank": 8 }), true),
        (json!({ "lora_rank": 8.0 }), true),
        (json!({ "lora_rank": 16 }), false),
        // What is in force.
        (json!({ "max_steps": 500, "lora_alpha": 16 }), true),
        (json!({ "lora_rank": 8, "max_steps": 1875 }), false),
    ] {
        let got = when(conditions.clone()).of(&config);
        let whole = Evaluations { tasks: vec![json!("arc_easy")], limit: Some(3), ..Evaluations::default() };
        assert_eq!(got, asked.then_some(whole), "{conditions}");
    }
}

/// Trials that are compared by a task's metric.
#[test]
fn metrics_of_tasks() {
    let by = |metric: &str, search: Value| {
        let mut changes = json!({
            "search": { "max_trials": 2, "metric": metric }, "evaluations": { "tasks": ["arc_challenge", "perplexity"] },
        });
        changes["search"].as_object_mut().unwrap().extend(search.as_object().unwrap().clone());
        changes
    };
    for (metric, search, goal) in [
        ("eval/arc_challenge/acc_norm", json!({}), Goal::Maximize),
        ("eval/arc_challenge/acc_norm", json!({ "goal": "minimize" }), Goal::Minimize),
        ("eval/perplexity/word_perplexity", json!({}), Goal::Minimize),
        ("eval/loss", json!({}), Goal::Minimize),
    ] {
        let spec = spec(by(metric, search));
        assert_eq!((spec.search.metric.as_str(), spec.search.goal), (metric, goal));
    }
    let mut unasked = by("eval/arc_challenge/acc", json!({}));
    unasked["evaluations"] = Value::Null;
    check(
        unasked,
        &["search.metric: eval/arc_challenge/acc is a task's, and none is asked; add evaluations: { tasks: \
           [arc_challenge] }"],
    );
    check(
        by("eval/arc_challenge/acc", json!({ "algorithm": "asha" })),
        &[
            "search.metric: asha compares trials as they train, and eval/arc_challenge/acc is known once they have \
           ended; compare them by eval/loss, or take another algorithm",
        ],
    );
}

#[test]
fn kept_adapters() {
    assert_eq!(spec(json!({})).keep_adapters, None);
    let three = spec(json!({ "keep_adapters": 3 }));
    assert_eq!((three.keep_adapters, &three.to_document()["keep_adapters"]), (Some(3), &json!(3)));
    for (wrong, told) in [(json!(0), "0"), (json!(1.5), "1.5"), (json!("all"), "\"all\"")] {
        let problem = format!(
            "keep_adapters: must be a whole number from 1, not {told}; give one of at most 4294967295"
        );
        check(json!({ "keep_adapters": wrong }), &[&problem]);
    }
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
