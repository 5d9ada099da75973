//! Whether a sweep's trials can run on the accelerators that it names, as far as the catalogue tells.

use crate::error::{CoordinatorError, Result};
use domain::machine::ComputeCapability;
use domain::sweep::SweepSpec;
use domain::trial::{ComputeDtype, PrecisionMode, TrialConfig};
use serde::de::DeserializeOwned;

/// Refuses a sweep of which trials would wait for ever: it names accelerators, and none of these has a trial's numbers. One
/// that the catalogue does not know may have them; and what constraints leave of the trials is not known yet.
pub(super) fn check(spec: &SweepSpec) -> Result<()> {
    let needed = needed(spec).filter(|_| spec.constraints.is_empty());
    let has = |name: &String| Some(config::machines::accelerator(name).ok()?.compute_capability);
    let named = &spec.resources.accelerators;
    let lacks = |name: &String| needed.zip(has(name)).is_some_and(|(needed, has)| has < needed);
    if named.is_empty() || !named.iter().all(lacks) {
        return Ok(());
    }
    let mut problems = named.iter().filter_map(|name| has(name)?.lacks_bfloat16(name));
    let problem = problems.next().unwrap_or_default() + ", or name an accelerator that has it";
    Err(CoordinatorError::invalid("resources.accelerators", problem))
}

/// The greatest compute capability that a trial may need, for some of the values that its precision takes.
fn needed(spec: &SweepSpec) -> Option<ComputeCapability> {
    let modes: Vec<PrecisionMode> = values(spec, "precision_mode", spec.base.precision_mode);
    let dtypes: Vec<Option<ComputeDtype>> = values(spec, "compute_dtype", spec.base.compute_dtype);
    let with = |mode: &PrecisionMode| {
        let config = TrialConfig { precision_mode: *mode, ..spec.base.clone() };
        let each = dtypes.iter().map(move |dtype| TrialConfig { compute_dtype: *dtype, ..config.clone() });
        each.filter_map(|config| config.base_model().precision.compute_capability()).max()
    };
    modes.iter().filter_map(with).max()
}

/// What a parameter may be: `given` unless it is searched.
fn values<T: DeserializeOwned>(spec: &SweepSpec, name: &str, given: T) -> Vec<T> {
    match spec.parameters.iter().find(|(searched, _)| searched == name) {
        Some((_, distribution)) => {
            let named = distribution.named().into_iter();
            named.filter_map(|value| serde_json::from_value(value.clone()).ok()).collect()
        }
        None => vec![given],
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use serde_json::{Map, json};

    #[test]
    fn what_no_accelerator_that_is_named_can_train() {
        let volta = ["V100-16GB", "t4-16gb"];
        // (accelerators, what is set, whether it is refused)
        for (accelerators, set, refused) in [
            (&volta[..], json!({"precision_mode": "bfloat16"}), true),
            (&volta, json!({"precision_mode": "float16"}), false),
            (&volta, json!({"precision_mode": "float16", "compute_dtype": "bfloat16"}), false),
            (&volta, json!({"precision_mode": "4bit", "compute_dtype": "bfloat16"}), true),
            (&volta, json!({"precision_mode": "4bit"}), false),
            (&[], json!({"precision_mode": "bfloat16"}), false),
            (&["V100-16GB", "A100-40GB"], json!({"precision_mode": "bfloat16"}), false),
            (&["V100-16GB", "MI300X"], json!({"precision_mode": "bfloat16"}), false),
            (&["CPU"], json!({"precision_mode": "bfloat16"}), false),
            (&volta, json!({"parameters": {"precision_mode": ["float16", "bfloat16"]}}), true),
            (&volta, json!({"parameters": {"precision_mode": ["float16", "4bit"]}}), false),
            (
                &volta,
                json!({"compute_dtype": "bfloat16", "parameters": {"precision_mode": ["float16", "4bit"]}}),
                true,
            ),
            (
                &volta,
                json!({"parameters": {
                    "lora_rank": [8, 16],
                    "precision_mode": {"when": {"lora_rank": 8}, "value": "bfloat16", "otherwise": "float16"},
                }}),
                true,
            ),
            (
                &volta,
                json!({
                    "parameters": {"precision_mode": ["float16", "bfloat16"]},
                    "constraints": ["precision_mode == \"float16\""],
                }),
                false,
            ),
        ] {
            let mut document = json!({
                "name": "s",
                "pretrained_model_id": "m",
                "dataset_name": "d.jsonl",
                "resources": {"accelerators": accelerators},
                "parameters": {"learning_rate": {"choices": [1e-4]}},
                "search": {"algorithm": "random", "max_trials": 2},
            });
            let all: &mut Map<_, _> = document.as_object_mut().unwrap();
            all.extend(set.as_object().unwrap().clone());
            let spec = SweepSpec::from_document(all).unwrap();
            let said = check(&spec).err().map(|error| error.to_string());
            let want = "resources.accelerators: bfloat16 needs compute capability 8.0; V100-16GB has 7.0; use float16, or \
                        name an accelerator that has it";
            assert_eq!(said.as_deref(), refused.then_some(want), "{accelerators:?} {set}");
        }
    }
}
