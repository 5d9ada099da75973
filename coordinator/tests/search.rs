//! The search: what each algorithm proposes, in which order, and what it refuses.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use coordinator::search::{Proposal, Proposed, Searcher};
use domain::sweep::SweepSpec;
use serde_json::{Value, json};
use std::collections::BTreeSet;

/// A spec with these searched parameters, search keys and other top-level keys.
fn spec(search: Value, parameters: Value, rest: Value) -> SweepSpec {
    let mut document = json!({
        "name": "test", "pretrained_model_id": "model", "dataset_name": "rows.jsonl",
        "search": search, "parameters": parameters,
    });
    document.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
    SweepSpec::from_document(document.as_object().unwrap()).unwrap_or_else(|p| panic!("{document}: {p:#?}"))
}

fn all(searcher: &mut Searcher) -> Vec<Proposed> {
    let next = || match searcher.propose() {
        Proposal::Trial(proposed) => Some(proposed),
        Proposal::Wait | Proposal::Exhausted => None,
    };
    std::iter::from_fn(next).collect()
}

/// `lora_rank=8 batch_size=2`, one line a trial.
fn lines(proposed: &[Proposed]) -> Vec<String> {
    let line = |p: &Proposed| {
        p.parameters.iter().map(|(name, value)| format!("{name}={value}")).collect::<Vec<_>>().join(" ")
    };
    proposed.iter().map(line).collect()
}

fn check(algorithm: &str, parameters: Value, rest: Value, want: &[&str]) {
    let spec = spec(json!({ "algorithm": algorithm }), parameters.clone(), rest);
    let mut searcher = Searcher::new(&spec).unwrap_or_else(|p| panic!("{parameters}: {p:#?}"));
    assert_eq!(searcher.size(), Some(want.len() as u32), "{parameters}");
    let proposed = all(&mut searcher);
    assert_eq!(lines(&proposed), want, "{parameters}");
    assert!(proposed.iter().map(|p| p.number).eq(1..=want.len() as u32));
    assert_eq!(searcher.propose(), Proposal::Exhausted);
}

fn check_refused(search: Value, parameters: Value, rest: Value, problem: &str) {
    let found = Searcher::new(&spec(search, parameters, rest)).unwrap_err();
    assert_eq!(found.iter().map(ToString::to_string).collect::<Vec<_>>(), [problem]);
}

#[test]
fn grid() {
    let none = || json!({});
    check("grid", none(), none(), &[""]);
    check(
        "grid",
        json!({ "lora_rank": [8, 4], "batch_size": [1, 2] }),
        none(),
        &[
            "batch_size=1 lora_rank=8",
            "batch_size=2 lora_rank=8",
            "batch_size=1 lora_rank=4",
            "batch_size=2 lora_rank=4",
        ],
    );
    // A constant is in the configuration, not among what was chosen.
    check("grid", json!({ "lora_rank": [8, 4], "batch_size": 2 }), none(), &["lora_rank=8", "lora_rank=4"]);
    check(
        "grid",
        json!({ "lora_rank": { "integer": [2, 9], "step": 3 } }),
        none(),
        &["lora_rank=2", "lora_rank=5", "lora_rank=8"],
    );
    check(
        "grid",
        json!({ "lora_dropout": { "uniform": [0, 0.3], "step": 0.1 } }),
        none(),
        &["lora_dropout=0.0", "lora_dropout=0.1", "lora_dropout=0.2", "lora_dropout=0.3"],
    );
    let length = json!({ "when": { "precision_mode": "4bit" }, "choices": [512, 1024], "otherwise": 256 });
    check(
        "grid",
        json!({ "precision_mode": ["4bit", "float32"], "max_sequence_length": length }),
        none(),
        &[
            r#"max_sequence_length=512 precision_mode="4bit""#,
            r#"max_sequence_length=1024 precision_mode="4bit""#,
            r#"max_sequence_length=256 precision_mode="float32""#,
        ],
    );
    // What does not apply keeps the base's value; the condition may name a top-level parameter.
    let alpha = json!({ "when": { "lora_rank": 8, "shuffle": false }, "choices": [8, 16.5] });
    check(
        "grid",
        json!({ "lora_rank": [4, 8], "lora_alpha": alpha }),
        json!({ "shuffle": false }),
        &["lora_rank=4", "lora_alpha=8.0 lora_rank=8", "lora_alpha=16.5 lora_rank=8"],
    );
}

#[test]
fn a_grid_says_what_constraints_leave_out() {
    let parameters = json!({ "lora_rank": [8, 16], "batch_size": [1, 4] });
    let constraints = json!({ "constraints": ["lora_rank * batch_size <= 32", "lora_alpha >= 32"] });
    let spec = spec(json!({ "algorithm": "grid" }), parameters, constraints);
    let mut searcher = Searcher::new(&spec).unwrap();
    assert_eq!((searcher.size(), searcher.rejected()), (Some(1), 3));
    assert_eq!(lines(&all(&mut searcher)), ["batch_size=1 lora_rank=16"]);
}

#[test]
fn grids_that_are_refused() {
    let grid = || json!({ "algorithm": "grid" });
    for algorithm in ["grid", "one_factor_at_a_time"] {
        check_refused(
            json!({ "algorithm": algorithm }),
            json!({ "learning_rate": { "log_uniform": [1e-5, 1e-3] } }),
            json!({}),
            "parameters.learning_rate: a range without a step has no end of values; give it a step, or name its \
             values with choices, or use the random algorithm",
        );
    }
    check_refused(
        grid(),
        json!({ "lora_rank": [8, 16], "lora_alpha": [null, 32] }),
        json!({}),
        "parameters: lora_alpha=null lora_rank=16 and lora_alpha=32.0 lora_rank=16 come to the same trial; \
         remove one of the values",
    );
    check_refused(
        json!({ "algorithm": "grid", "max_trials": 3 }),
        json!({ "lora_rank": [8, 16], "batch_size": [1, 2] }),
        json!({}),
        "search.max_trials: 3 would drop some of the 4 combinations; set it to 4 or remove it, or use the random \
         algorithm",
    );
    check_refused(
        grid(),
        json!({ "lora_rank": [8, 16] }),
        json!({ "constraints": ["lora_rank < 8"] }),
        "constraints: no combination of values meets them all; loosen a constraint or widen a parameter",
    );
    check_refused(
        grid(),
        json!({ "seed": { "integer": [1, 200] }, "lora_rank": { "integer": [1, 200] } }),
        json!({}),
        "parameters: more than 10000 combinations; at most 10000 trials can be listed; name fewer values, or use \
         the random algorithm with max_trials",
    );
}

#[test]
fn one_factor_at_a_time() {
    let none = || json!({});
    check(
        "one_factor_at_a_time",
        json!({ "lora_rank": [8, 4, 16], "batch_size": [2, 1], "shuffle": false }),
        none(),
        &[
            "batch_size=2 lora_rank=8",
            "batch_size=2 lora_rank=4",
            "batch_size=2 lora_rank=16",
            "batch_size=1 lora_rank=8",
        ],
    );
    let length =
        json!({ "when": { "precision_mode": "4bit" }, "choices": [512, 1024], "otherwise": [256, 128] });
    check(
        "one_factor_at_a_time",
        json!({ "precision_mode": ["4bit", "float32"], "max_sequence_length": length }),
        none(),
        &[
            r#"max_sequence_length=512 precision_mode="4bit""#,
            r#"max_sequence_length=256 precision_mode="float32""#,
            r#"max_sequence_length=1024 precision_mode="4bit""#,
        ],
    );
}

#[test]
fn random_draws_repeat_and_depend_on_nothing_but_their_key() {
    let search = |seed: u64| json!({ "algorithm": "random", "max_trials": 20, "seed": seed });
    let parameters = json!({
        "learning_rate": { "log_uniform": [1e-5, 1e-3] }, "lora_rank": [4, 8, 16],
        "weight_decay": { "uniform": [0, 0.1], "step": 0.02 }, "warmup_steps": { "integer": [0, 50] },
    });
    let draw = |search: Value, parameters: &Value| {
        all(&mut Searcher::new(&spec(search, parameters.clone(), json!({}))).unwrap())
    };
    let (once, again) = (draw(search(7), &parameters), draw(search(7), &parameters));
    assert_eq!(once.len(), 20);
    assert_eq!(once, again);
    assert_ne!(once, draw(search(8), &parameters));
    for proposed in &once {
        let config = &proposed.config;
        assert!((1e-5..=1e-3).contains(&config.learning_rate), "{config:?}");
        assert!([4, 8, 16].contains(&config.lora_rank));
        assert!(config.warmup_steps <= 50);
        let steps = config.weight_decay / 0.02;
        assert!((steps - steps.round()).abs() < 1e-9 && config.weight_decay <= 0.1);
        assert_eq!(config.seed, 42, "the trials' seed is the base's");
        assert_eq!(proposed.parameters["learning_rate"], json!(config.learning_rate));
    }
    // Without the other parameters the learning rates are the same.
    let alone = draw(search(7), &json!({ "learning_rate": { "log_uniform": [1e-5, 1e-3] } }));
    assert!(alone.iter().map(|p| p.config.learning_rate).eq(once.iter().map(|p| p.config.learning_rate)));
}

#[test]
fn log_uniform_draws_are_uniform_in_their_logarithm() {
    let search = json!({ "algorithm": "random", "max_trials": 4000, "seed": 1 });
    let parameters = json!({ "learning_rate": { "log_uniform": [1e-6, 1e-2] } });
    let mut searcher = Searcher::new(&spec(search, parameters, json!({}))).unwrap();
    let mut decades = [0u32; 4];
    for proposed in all(&mut searcher) {
        decades[(proposed.config.learning_rate.log10() + 6.0).clamp(0.0, 3.9) as usize] += 1;
    }
    // 1000 expected, standard deviation 27: six of them.
    assert!(decades.iter().all(|n| n.abs_diff(1000) < 165), "{decades:?}");
}

#[test]
fn draws_meet_the_constraints_and_end_with_the_space() {
    let search = json!({ "algorithm": "random", "max_trials": 50 });
    let parameters = json!({ "lora_rank": [4, 8, 16], "batch_size": [1, 2, 4] });
    let constraints = json!({ "constraints": ["lora_rank * batch_size <= 16"] });
    let mut searcher = Searcher::new(&spec(search, parameters, constraints)).unwrap();
    assert_eq!(searcher.size(), Some(6));
    let mut drawn = lines(&all(&mut searcher));
    drawn.sort();
    assert_eq!(
        drawn,
        [
            "batch_size=1 lora_rank=16",
            "batch_size=1 lora_rank=4",
            "batch_size=1 lora_rank=8",
            "batch_size=2 lora_rank=4",
            "batch_size=2 lora_rank=8",
            "batch_size=4 lora_rank=4",
        ]
    );
    assert_eq!(searcher.propose(), Proposal::Exhausted);
    check_refused(
        json!({ "algorithm": "random", "max_trials": 5 }),
        json!({ "lora_rank": [4, 8] }),
        json!({ "constraints": ["lora_rank > 8"] }),
        "constraints: no combination of values meets them all; loosen a constraint or widen a parameter",
    );
}

#[test]
fn a_small_space_is_drawn_to_its_end() {
    let search = json!({ "algorithm": "random", "max_trials": 2000 });
    let parameters = json!({ "lora_rank": { "integer": [1, 30] }, "batch_size": { "integer": [1, 30] } });
    let mut searcher = Searcher::new(&spec(search, parameters, json!({}))).unwrap();
    assert_eq!(searcher.size(), Some(900));
    let drawn: BTreeSet<_> = lines(&all(&mut searcher)).into_iter().collect();
    assert_eq!(drawn.len(), 900);
    // One configuration, one trial.
    let search = json!({ "algorithm": "random", "max_trials": 5 });
    let mut searcher = Searcher::new(&spec(search, json!({}), json!({}))).unwrap();
    assert_eq!((searcher.size(), lines(&all(&mut searcher)).len()), (Some(1), 1));
}

#[test]
fn no_more_trials_at_a_time_than_allowed() {
    let search = json!({ "algorithm": "grid", "max_concurrent_trials": 2 });
    let spec = spec(search, json!({ "lora_rank": [1, 2, 3] }), json!({}));
    let mut searcher = Searcher::new(&spec).unwrap();
    assert_eq!(all(&mut searcher).len(), 2);
    assert_eq!(searcher.propose(), Proposal::Wait);
    searcher.ended(2, Some(1.0));
    searcher.ended(2, Some(1.0));
    assert!(matches!(searcher.propose(), Proposal::Trial(p) if p.number == 3));
    assert_eq!(searcher.propose(), Proposal::Exhausted);
    // After a restart all three are there again, and all three under way until they are ended again.
    let mut restarted = Searcher::new(&spec).unwrap();
    assert_eq!(restarted.fast_forward(3).len(), 3);
}

#[test]
fn a_spec_that_came_over_the_wire_proposes_the_same() {
    let length = json!({ "when": { "precision_mode": "4bit" }, "choices": [512, 1024] });
    let parameters = json!({
        "weight_decay": { "uniform": [0, 1], "step": 0.5 }, "precision_mode": ["4bit", "float32"],
        "max_sequence_length": length, "batch_size": [4, 2], "adam_beta2": [0.99, 0.999],
    });
    let spec = spec(json!({ "algorithm": "grid" }), parameters, json!({}));
    let sent = proto::convert::from_struct(proto::convert::to_struct(&spec.to_document()));
    let arrived = SweepSpec::from_document(&sent).unwrap();
    assert_eq!(arrived, spec);
    let proposals = |spec: &SweepSpec| all(&mut Searcher::new(spec).unwrap());
    assert_eq!(proposals(&arrived), proposals(&spec));
    assert_eq!(proposals(&spec).len(), 3 * 3 * 2 * 2);
}
