//! What each parameter of a trial may be: one table, by which sweep files and command-line flags are checked.

use super::Problem;
use super::problem::describe;
use crate::trial::{InitLoraWeights, StoppingStrategy, TargetModules, TrialConfig};
use serde_json::{Map, Number, Value};

/// Largest whole number that a double holds exactly; documents travel as doubles.
pub const LARGEST_WHOLE: u64 = 1 << 53;

/// What sort of value a parameter takes; ranges and constraints depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Whole,
    Number,
    Text,
    Flag,
    /// Values of several sorts.
    Mixed,
}

/// One parameter's rule.
pub(super) struct Rule {
    name: &'static str,
    pub(super) kind: Kind,
    /// Ends the sentence "must be …".
    must_be: &'static str,
    holds: fn(&TrialConfig) -> bool,
}

const fn rule(
    name: &'static str,
    kind: Kind,
    must_be: &'static str,
    holds: fn(&TrialConfig) -> bool,
) -> Rule {
    Rule { name, kind, must_be, holds }
}

fn above_0(x: f64) -> bool {
    x > 0.0 && x.is_finite()
}

fn from_0(x: f64) -> bool {
    x >= 0.0 && x.is_finite()
}

const FROM_0: &str = "a whole number from 0";
const FROM_1: &str = "a whole number from 1";
const TRUE_OR_FALSE: &str = "true or false";

fn names_something(modules: &TargetModules) -> bool {
    match modules {
        TargetModules::Names(names) => !names.is_empty() && names.iter().all(|n| !n.is_empty()),
        TargetModules::Pattern(pattern) => !pattern.is_empty(),
    }
}

const RULES: &[Rule] = &[
    rule("task", Kind::Text, "instruct-lora", |_| true),
    rule("pretrained_model_id", Kind::Text, "a model's directory or its id on the hub", |c| {
        !c.pretrained_model_id.is_empty()
    }),
    rule("dataset_name", Kind::Text, "a file of rows, a directory of them, or an id on the hub", |c| {
        !c.dataset_name.is_empty()
    }),
    rule("interleave_datasets", Kind::Mixed, "a list of data sets", |c| {
        c.interleave_datasets
            .as_ref()
            .is_none_or(|names| !names.is_empty() && names.iter().all(|n| !n.is_empty()))
    }),
    rule("interleave_probabilities", Kind::Mixed, "a list of numbers from 0, not all of them 0", |c| {
        let sound = |list: &Vec<f64>| list.iter().all(|p| from_0(*p)) && above_0(list.iter().sum());
        c.interleave_probabilities.as_ref().is_none_or(sound)
    }),
    rule("stopping_strategy", Kind::Text, "first_exhausted or all_exhausted", |_| true),
    rule("instruct_column_in_dataset", Kind::Text, "a column's name", |c| {
        !c.instruct_column_in_dataset.is_empty()
    }),
    rule("eval_dataset_name", Kind::Text, "a file of rows, a directory of them, or an id on the hub", |c| {
        c.eval_dataset_name.as_ref().is_none_or(|n| !n.is_empty())
    }),
    rule("eval_size", Kind::Number, "a share from 0 to below 1, or a whole number of rows", |c| {
        from_0(c.eval_size) && (c.eval_size < 1.0 || c.eval_size.fract() == 0.0)
    }),
    rule("eval_split", Kind::Text, "random or last", |_| true),
    rule("assistant_only_loss", Kind::Flag, TRUE_OR_FALSE, |_| true),
    rule("add_eos", Kind::Flag, TRUE_OR_FALSE, |_| true),
    rule("skip_bad_rows", Kind::Flag, TRUE_OR_FALSE, |_| true),
    rule("shuffle", Kind::Flag, TRUE_OR_FALSE, |_| true),
    rule("precision_mode", Kind::Text, "float32, bfloat16, float16 or 4bit", |_| true),
    rule("compute_dtype", Kind::Text, "float32, bfloat16 or float16", |_| true),
    rule("double_quant", Kind::Flag, TRUE_OR_FALSE, |_| true),
    rule("gradient_checkpointing", Kind::Mixed, "true, false or auto", |_| true),
    rule("lora_rank", Kind::Whole, FROM_1, |c| c.lora_rank >= 1),
    rule("lora_alpha", Kind::Number, "a number above 0", |c| c.lora_alpha.is_none_or(above_0)),
    rule("lora_dropout", Kind::Number, "a number from 0 to below 1", |c| {
        (0.0..1.0).contains(&c.lora_dropout)
    }),
    rule("target_modules", Kind::Mixed, "all-linear, a regular expression or a list of module names", |c| {
        names_something(&c.target_modules)
    }),
    rule("exclude_modules", Kind::Mixed, "a regular expression or a list of module names", |c| {
        c.exclude_modules.as_ref().is_none_or(names_something)
    }),
    rule("layers_to_transform", Kind::Mixed, "a list of whole numbers from 0", |c| {
        c.layers_to_transform.as_ref().is_none_or(|layers| !layers.is_empty())
    }),
    rule("modules_to_save", Kind::Mixed, "a list of modules' names", |c| {
        c.modules_to_save
            .as_ref()
            .is_none_or(|names| !names.is_empty() && names.iter().all(|n| !n.is_empty()))
    }),
    rule("rank_pattern", Kind::Mixed, "a map of paths to whole numbers from 1", |c| {
        c.rank_pattern.iter().all(|(path, rank)| !path.is_empty() && *rank >= 1)
    }),
    rule("alpha_pattern", Kind::Mixed, "a map of paths to numbers above 0", |c| {
        c.alpha_pattern.iter().all(|(path, alpha)| !path.is_empty() && above_0(*alpha))
    }),
    rule("use_rslora", Kind::Flag, TRUE_OR_FALSE, |_| true),
    rule("use_dora", Kind::Flag, TRUE_OR_FALSE, |_| true),
    rule(
        "init_lora_weights",
        Kind::Text,
        "default, gaussian, pissa or pissa_niter_N (N from 1 to 1000)",
        |c| match c.init_lora_weights {
            InitLoraWeights::PissaNiter(iterations) => InitLoraWeights::ITERATIONS.contains(&iterations),
            _ => true,
        },
    ),
    rule("init_adapter", Kind::Text, "an adapter's directory", |c| {
        c.init_adapter.as_ref().is_none_or(|a| !a.is_empty())
    }),
    rule("batch_size", Kind::Whole, FROM_1, |c| c.batch_size >= 1),
    rule("gradient_accumulation_steps", Kind::Whole, FROM_1, |c| c.gradient_accumulation_steps >= 1),
    // One token is predicted from the one before it, so a row of one token teaches nothing.
    rule("max_sequence_length", Kind::Whole, "a whole number from 2", |c| c.max_sequence_length >= 2),
    // At a rate of 0 nothing is learnt, so that it is a slip.
    rule("learning_rate", Kind::Number, "a number above 0", |c| above_0(c.learning_rate)),
    rule("loraplus_lr_ratio", Kind::Number, "a number above 0", |c| c.loraplus_lr_ratio.is_none_or(above_0)),
    rule("lr_scheduler_type", Kind::Text, "constant, constant_with_warmup, linear or cosine", |_| true),
    rule("warmup_steps", Kind::Whole, FROM_0, |_| true),
    rule("warmup_ratio", Kind::Number, "a number from 0 to 1", |c| (0.0..=1.0).contains(&c.warmup_ratio)),
    rule("weight_decay", Kind::Number, "a number from 0", |c| from_0(c.weight_decay)),
    rule("adam_beta1", Kind::Number, "a number from 0 to below 1", |c| (0.0..1.0).contains(&c.adam_beta1)),
    rule("adam_beta2", Kind::Number, "a number from 0 to below 1", |c| (0.0..1.0).contains(&c.adam_beta2)),
    rule("adam_epsilon", Kind::Number, "a number above 0", |c| above_0(c.adam_epsilon)),
    rule("max_grad_norm", Kind::Number, "a number from 0 (0 clips nothing)", |c| from_0(c.max_grad_norm)),
    rule("max_steps", Kind::Whole, FROM_1, |c| c.max_steps.is_none_or(|s| s >= 1)),
    rule("num_train_epochs", Kind::Number, "a number above 0", |c| c.num_train_epochs.is_none_or(above_0)),
    rule("seed", Kind::Whole, "a whole number from 0 to 2^53", |c| c.seed <= LARGEST_WHOLE),
    rule("logging_steps", Kind::Whole, FROM_1, |c| c.logging_steps >= 1),
    rule("eval_steps", Kind::Whole, FROM_0, |_| true),
    rule("save_steps", Kind::Whole, FROM_0, |_| true),
    rule(TrialConfig::ACCELERATOR, Kind::Text, "an accelerator's name", |c| {
        c.accelerator.as_ref().is_none_or(|name| !name.is_empty())
    }),
];

/// The rule of parameter `name`, if there is such a parameter.
pub(super) fn rule_of(name: &str) -> Option<&'static Rule> {
    RULES.iter().find(|r| r.name == name)
}

/// Checks a value for parameter `name` and returns it in its normal form: whole numbers as integers, other
/// numbers as doubles, so that equal values are equal JSON.
///
/// # Errors
/// What the value must be, as a sentence's predicate: `must be a whole number from 1, not 0`.
pub fn check_parameter(name: &str, value: &Value) -> Result<Value, String> {
    let Some(rule) = rule_of(name) else {
        return Err("is no parameter".into());
    };
    let mut object = Map::new();
    object.insert(name.into(), whole_as_integer(value));
    let config = serde_json::from_value::<TrialConfig>(Value::Object(object)).ok().filter(rule.holds);
    let normal = config.and_then(|config| serde_json::to_value(config).ok()?.get(name).cloned());
    normal.ok_or_else(|| format!("must be {}, not {}", rule.must_be, describe(value)))
}

/// What to do about a value that parameter `name` cannot have.
pub(super) fn remedy(name: &str) -> String {
    let defaults = serde_json::to_value(TrialConfig::default()).unwrap_or_default();
    match &defaults[name] {
        Value::Null => "give another value, or leave it out".into(),
        Value::String(text) if text.is_empty() => "give another value".into(),
        default => format!("give one such as {default}, the default"),
    }
}

/// Checks every parameter of a trial's configuration by the rules of sweep files.
///
/// # Errors
/// One problem for each parameter that breaks its rule.
pub fn check_config(config: &TrialConfig) -> Result<(), Vec<Problem>> {
    let values = serde_json::to_value(config).unwrap_or_default();
    let problem = |rule: &Rule| {
        let problem = format!("must be {}, not {}", rule.must_be, describe(&values[rule.name]));
        Problem::new(rule.name, problem, remedy(rule.name))
    };
    let mut broken: Vec<_> = RULES.iter().filter(|rule| !(rule.holds)(config)).map(problem).collect();
    if config.interleave_datasets.is_none() {
        broken.extend(set_of_a_mixture(config).map(|name| without_a_mixture(name, name)));
    }
    if broken.is_empty() { Ok(()) } else { Err(broken) }
}

/// The parameters by which `config` says how data sets are to be mixed.
pub(super) fn set_of_a_mixture(config: &TrialConfig) -> impl Iterator<Item = &'static str> {
    let set = [
        ("interleave_probabilities", config.interleave_probabilities.is_some()),
        ("stopping_strategy", config.stopping_strategy != StoppingStrategy::default()),
    ];
    set.into_iter().filter_map(|(name, set)| set.then_some(name))
}

/// What is wrong with such a parameter, set at `path`, where nothing is mixed: it would do nothing.
pub(super) fn without_a_mixture(path: impl Into<String>, name: &str) -> Problem {
    let remedy = format!("name the other data sets in interleave_datasets, or leave {name} out");
    Problem::new(path, "is given without interleave_datasets, so that nothing is mixed", remedy)
}

/// `8.0` is the whole number 8: JSON and YAML make no difference, and a document's doubles lose it.
fn whole_as_integer(value: &Value) -> Value {
    match value.as_f64() {
        Some(x) if value.is_f64() && x.fract() == 0.0 && x.abs() <= LARGEST_WHOLE as f64 => {
            Value::Number(Number::from(x as i64))
        }
        _ => value.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trial::{PARAMETER_MEANINGS, PARAMETER_NAMES};
    use serde_json::json;

    #[test]
    fn every_parameter_has_a_rule_that_its_default_meets() {
        let names: Vec<_> = RULES.iter().map(|r| r.name).collect();
        assert_eq!(names, PARAMETER_NAMES);
        let broken = check_config(&TrialConfig::default()).unwrap_err();
        let paths: Vec<_> = broken.iter().map(|p| p.path.as_str()).collect();
        assert_eq!(paths, ["pretrained_model_id", "dataset_name"], "only what has no default");
    }

    /// The page has a row for each parameter, as this table and the configuration's defaults have it.
    #[test]
    fn the_documented_parameters_are_the_parameters() {
        let page = include_str!("../../../docs/sweep-file.md");
        let defaults = serde_json::to_value(TrialConfig::default()).unwrap();
        let mut missing = Vec::new();
        for (rule, meaning) in RULES.iter().zip(PARAMETER_MEANINGS) {
            let default = match &defaults[rule.name] {
                Value::Null => "–".into(),
                Value::String(text) if text.is_empty() => "required".into(),
                Value::String(text) => format!("`{text}`"),
                other => format!("`{other}`"),
            };
            let row = format!("| `{}` | {} | {default} | {} |", rule.name, rule.must_be, meaning.trim());
            if !page.contains(&row) {
                missing.push(row);
            }
        }
        assert!(missing.is_empty(), "docs/sweep-file.md lacks\n{}", missing.join("\n"));
    }

    #[test]
    fn values_and_their_normal_form() {
        for (name, value, normal) in [
            ("lora_rank", json!(8), json!(8)),
            ("lora_rank", json!(8.0), json!(8)),
            ("learning_rate", json!(1), json!(1.0)),
            ("lora_alpha", json!(32), json!(32.0)),
            ("lora_alpha", json!(null), json!(null)),
            ("precision_mode", json!("4bit"), json!("4bit")),
            ("target_modules", json!(["q_proj", "v_proj"]), json!(["q_proj", "v_proj"])),
            ("target_modules", json!("all-linear"), json!("all-linear")),
            ("eval_size", json!(50), json!(50.0)),
            ("shuffle", json!(false), json!(false)),
            ("seed", json!(LARGEST_WHOLE), json!(LARGEST_WHOLE)),
            ("interleave_probabilities", json!([3, 1]), json!([3.0, 1.0])),
            ("accelerator", json!("A100-40GB"), json!("A100-40GB")),
            ("accelerator", json!(null), json!(null)),
            ("init_lora_weights", json!("pissa_niter_16"), json!("pissa_niter_16")),
            ("init_lora_weights", json!("pissa_niter_1000"), json!("pissa_niter_1000")),
        ] {
            assert_eq!(check_parameter(name, &value), Ok(normal), "{name}: {value}");
        }
    }

    #[test]
    fn values_that_are_refused() {
        for (name, value, message) in [
            ("lora_rank", json!(0), "must be a whole number from 1, not 0"),
            ("lora_rank", json!(-1), "must be a whole number from 1, not -1"),
            ("lora_rank", json!(1.5), "must be a whole number from 1, not 1.5"),
            ("lora_rank", json!("8"), "must be a whole number from 1, not \"8\""),
            ("lora_rank", json!([8]), "must be a whole number from 1, not a list"),
            ("lora_rank", json!(null), "must be a whole number from 1, not nothing"),
            ("lora_rank", json!(5_000_000_000u64), "must be a whole number from 1, not 5000000000"),
            ("batch_size", json!(0), "must be a whole number from 1, not 0"),
            ("learning_rate", json!(0), "must be a number above 0, not 0"),
            ("learning_rate", json!(-1e-4), "must be a number above 0, not -0.0001"),
            ("learning_rate", json!("fast"), "must be a number above 0, not \"fast\""),
            ("lora_dropout", json!(1), "must be a number from 0 to below 1, not 1"),
            (
                "eval_size",
                json!(1.5),
                "must be a share from 0 to below 1, or a whole number of rows, not 1.5",
            ),
            ("seed", json!(LARGEST_WHOLE + 1), "must be a whole number from 0 to 2^53, not 9007199254740993"),
            ("accelerator", json!(""), "must be an accelerator's name, not \"\""),
            ("accelerator", json!(4), "must be an accelerator's name, not 4"),
            ("precision_mode", json!("8bit"), "must be float32, bfloat16, float16 or 4bit, not \"8bit\""),
            ("shuffle", json!("yes"), "must be true or false, not \"yes\""),
            (
                "interleave_probabilities",
                json!([1, -1]),
                "must be a list of numbers from 0, not all of them 0, not a list",
            ),
            (
                "interleave_probabilities",
                json!([0, 0]),
                "must be a list of numbers from 0, not all of them 0, not a list",
            ),
            ("stopping_strategy", json!("never"), "must be first_exhausted or all_exhausted, not \"never\""),
            (
                "target_modules",
                json!([]),
                "must be all-linear, a regular expression or a list of module names, not an empty list",
            ),
            ("lora_rnk", json!(8), "is no parameter"),
        ] {
            assert_eq!(check_parameter(name, &value), Err(message.into()), "{name}: {value}");
        }
        for number in ["", "0", "+5", "-5", "007", "1001", "4294967296", "5.0", " 5"] {
            let text = format!("pissa_niter_{number}");
            let want = "must be default, gaussian, pissa or pissa_niter_N (N from 1 to 1000)";
            let got = check_parameter("init_lora_weights", &json!(text));
            assert_eq!(got, Err(format!("{want}, not {text:?}")));
        }
    }

    /// What would do nothing is refused by its name.
    #[test]
    fn settings_of_a_mixture_need_one() {
        let all = StoppingStrategy::AllExhausted;
        let named = TrialConfig {
            pretrained_model_id: "m".into(),
            dataset_name: "d".into(),
            ..TrialConfig::default()
        };
        let alone = TrialConfig { interleave_probabilities: Some(vec![1.0]), ..named.clone() };
        let mixed = TrialConfig { interleave_datasets: Some(vec!["e".into()]), ..named.clone() };
        for (config, want) in [
            (named.clone(), vec![]),
            (TrialConfig { stopping_strategy: all, ..named }, vec!["stopping_strategy"]),
            (alone.clone(), vec!["interleave_probabilities"]),
            (
                TrialConfig { stopping_strategy: all, ..alone },
                vec!["interleave_probabilities", "stopping_strategy"],
            ),
            (TrialConfig { stopping_strategy: all, ..mixed }, vec![]),
        ] {
            let problems = check_config(&config).err().unwrap_or_default();
            let paths: Vec<_> = problems.iter().map(|p| p.path.as_str()).collect();
            assert_eq!(paths, want);
            let says = "is given without interleave_datasets, so that nothing is mixed";
            assert!(problems.iter().all(|p| p.problem == says), "{problems:?}");
        }
    }
}
