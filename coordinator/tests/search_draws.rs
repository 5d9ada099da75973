//! Draws from any range: each value lies in it, on its steps, and is one that its parameter can have. And every
//! sweep file that ships can be searched.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use config::sweep_file;
use coordinator::search::{Proposal, Searcher};
use domain::sweep::{SweepSpec, check_parameter};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::path::Path;

fn drawn(name: &str, distribution: &Value, seed: u64) -> Vec<f64> {
    let document = json!({
        "name": "test", "pretrained_model_id": "model", "dataset_name": "rows.jsonl",
        "search": { "algorithm": "random", "max_trials": 30, "seed": seed }, "parameters": { name: distribution },
    });
    let spec = SweepSpec::from_document(document.as_object().unwrap()).unwrap_or_else(|p| panic!("{p:#?}"));
    let mut searcher = Searcher::new(&spec).unwrap();
    let mut values = Vec::new();
    while let Proposal::Trial(proposed) = searcher.propose() {
        let value = &proposed.parameters[name];
        assert_eq!(check_parameter(name, value).as_ref(), Ok(value), "{name} in its normal form");
        assert_eq!(serde_json::to_value(&proposed.config).unwrap()[name], *value);
        values.push(value.as_f64().unwrap());
    }
    values
}

fn check(name: &str, distribution: Value, seed: u64, low: f64, high: f64, step: Option<f64>) {
    let values = drawn(name, &distribution, seed);
    assert!(!values.is_empty());
    for value in values {
        assert!((low..=high).contains(&value), "{value} from {distribution}");
        if let Some(step) = step {
            let steps = (value - low) / step;
            assert!((steps - steps.round()).abs() < 1e-6, "{value} from {distribution}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn uniform(low in 0.0..10.0, width in 1e-9..1e3, parts in prop::option::of(1..50u32), seed in any::<u32>()) {
        let step = parts.map(|parts| width / f64::from(parts));
        let mut form = json!({ "uniform": [low, low + width] });
        // The distance of neighbours must fit the width as a double has it.
        if let Some(step) = step.filter(|s| *s <= (low + width) - low) {
            form["step"] = json!(step);
        }
        let step = form.get("step").and_then(Value::as_f64).filter(|s| *s > 1e-6);
        check("weight_decay", form, seed.into(), low, low + width, step);
    }

    #[test]
    fn log_uniform(low in -300.0..0.0, decades in 0.001..300.0, seed in any::<u32>()) {
        let (low, high) = (10f64.powf(low), 10f64.powf(low + decades));
        check("learning_rate", json!({ "log_uniform": [low, high] }), seed.into(), low, high, None);
    }

    #[test]
    fn integer(low in 1..1000i64, width in 0..1000i64, step in prop::option::of(1..7i64), seed in any::<u32>()) {
        let mut form = json!({ "integer": [low, low + width] });
        if let Some(step) = step.filter(|s| *s <= width) {
            form["step"] = json!(step);
        }
        let step = form.get("step").map_or(1.0, |s| s.as_f64().unwrap());
        check("lora_rank", form, seed.into(), low as f64, (low + width) as f64, Some(step));
    }
}

#[test]
fn ranges_at_the_ends_of_what_numbers_hold() {
    for (name, form, low, high) in [
        ("weight_decay", json!({ "uniform": [0, 1e300], "step": 1e-300 }), 0.0, 1e300),
        ("weight_decay", json!({ "uniform": [0, 1.7e308] }), 0.0, 1.7e308),
        ("seed", json!({ "integer": [0, 9_007_199_254_740_992u64] }), 0.0, 9_007_199_254_740_992.0),
        ("learning_rate", json!({ "log_uniform": [5e-324, 1.7e308] }), 5e-324, 1.7e308),
        ("learning_rate", json!({ "log_uniform": [1e-3, 1e-3] }), 1e-3, 1e-3),
        ("lora_dropout", json!({ "uniform": [0.1, 0.1] }), 0.1, 0.1),
    ] {
        check(name, form, 1, low, high, None);
    }
}

#[test]
fn every_sweep_file_that_ships_can_be_searched() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../config/sweeps");
    for entry in std::fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        let spec = sweep_file::parse_only(&text, &path).unwrap_or_else(|e| panic!("{e}")).spec;
        let mut searcher = Searcher::new(&spec).unwrap_or_else(|p| panic!("{}: {p:#?}", path.display()));
        let size = searcher.size().unwrap();
        assert_eq!(searcher.fast_forward(u32::MAX).len(), size as usize, "{}", path.display());
    }
}
