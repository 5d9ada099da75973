//! A spec's document reads back as the spec.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use domain::sweep::SweepSpec;
use proptest::prelude::*;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// As a protobuf document carries it: keys in no order (here: sorted), every number a double.
fn over_the_wire(value: &Value) -> Value {
    match value {
        Value::Object(object) => {
            let sorted: BTreeMap<_, _> = object.iter().collect();
            Value::Object(sorted.into_iter().map(|(k, v)| (k.clone(), over_the_wire(v))).collect())
        }
        Value::Array(items) => items.iter().map(over_the_wire).collect(),
        Value::Number(number) => json!(number.as_f64().unwrap()),
        other => other.clone(),
    }
}

fn distribution() -> BoxedStrategy<(&'static str, Value)> {
    prop_oneof![
        prop::sample::subsequence(vec![4, 8, 16, 32], 1..4).prop_map(|c| ("lora_rank", json!(c))),
        (1..8u32, 9..64u32, 1..3u32)
            .prop_map(|(a, b, s)| ("lora_rank", json!({ "integer": [a, b], "step": s }))),
        (1e-6..1e-4, 1e-4..1e-2).prop_map(|(a, b)| ("learning_rate", json!({ "log_uniform": [a, b] }))),
        (0.0..0.1, 0.2..0.9).prop_map(|(a, b)| ("lora_dropout", json!({ "uniform": [a, b], "step": 0.05 }))),
        Just(("target_modules", json!([["q_proj"], ["q_proj", "v_proj"], "all-linear"]))),
        Just(("target_modules", json!({ "value": ["q_proj", "v_proj"] }))),
        Just(("precision_mode", json!(["4bit", "float32"]))),
        (1..9u32).prop_map(|n| ("batch_size", json!(n))),
        Just(("lora_alpha", json!([null, 16, 32.5]))),
        Just(("accelerator", json!(["A100-40GB", "V100-16GB"]))),
    ]
    .boxed()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// A spec's document reads back as the spec, also after a journey as protobuf.
    #[test]
    fn a_spec_comes_back_from_its_document(
        all in prop::collection::vec(distribution(), 0..6),
        last in prop_oneof![Just(json!(null)), Just(json!({ "integer": [16, 64] })), Just(json!([128]))],
        otherwise in prop_oneof![Just(json!(null)), Just(json!(256)), Just(json!([256, 512]))],
        algorithm in prop::sample::select(vec!["grid", "random", "asha", "one_factor_at_a_time"]),
        steps in prop::option::of(50..600u32),
    ) {
        let mut parameters: Map<String, Value> = all.into_iter().map(|(n, d)| (n.to_string(), d)).collect();
        if let (Value::Object(mut form), true) = (last, parameters.contains_key("precision_mode")) {
            form.insert("when".into(), json!({ "precision_mode": "4bit" }));
            if !otherwise.is_null() {
                form.insert("otherwise".into(), otherwise);
            }
            parameters.insert("max_sequence_length".into(), Value::Object(form));
        }
        let mut changes = json!({ "parameters": parameters, "search": { "algorithm": algorithm, "max_trials": 7 } });
        if let Some(steps) = steps {
            changes["max_steps"] = json!(steps);
        }
        let mut document = json!({ "name": "test", "pretrained_model_id": "model", "dataset_name": "rows.jsonl" });
        document.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        let spec = SweepSpec::from_document(document.as_object().unwrap()).unwrap();
        let document = spec.to_document();
        prop_assert_eq!(SweepSpec::from_document(&document), Ok(spec.clone()));
        let Value::Object(wire) = over_the_wire(&Value::Object(document)) else { panic!("an object") };
        prop_assert_eq!(SweepSpec::from_document(&wire), Ok(spec));
    }
}
