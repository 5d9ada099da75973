//! Every parameter of a trial as a flag: `--learning-rate` and `--learning_rate` alike. Names, meanings and
//! defaults are [`TrialConfig`]'s own, so that a new parameter is a new flag.

use clap::error::ErrorKind;
use clap::{Arg, ArgMatches, Command};
use domain::sweep::check_parameter;
use domain::trial::{PARAMETER_MEANINGS, PARAMETER_NAMES, TrialConfig};
use serde_json::{Map, Value, json};

/// The parameters that have no default to start from.
const REQUIRED: [&str; 2] = ["pretrained_model_id", "dataset_name"];

/// A trial's parameters from the command line.
#[derive(Debug, Clone)]
pub(crate) struct Parameters(pub(crate) TrialConfig);

fn flag(name: &str) -> String {
    name.replace('_', "-")
}

fn defaults() -> Map<String, Value> {
    match serde_json::to_value(TrialConfig::default()) {
        Ok(Value::Object(map)) => map,
        _ => Map::new(),
    }
}

fn argument(name: &'static str, meaning: &'static str, default: &Value) -> Arg {
    let shown = match default {
        Value::Null => String::new(),
        Value::String(text) if text.is_empty() => String::new(),
        Value::String(text) => format!(" [default: {text}]"),
        other => format!(" [default: {other}]"),
    };
    let mut argument = Arg::new(name)
        .long(flag(name))
        .required(REQUIRED.contains(&name))
        .allow_negative_numbers(true)
        .value_parser(move |text: &str| value(name, text))
        .help(format!("{}{shown}", meaning.trim().trim_end_matches('.')));
    if name.contains('_') {
        argument = argument.alias(name);
    }
    match default {
        Value::Bool(_) => argument.num_args(0..=1).default_missing_value("true").value_name("BOOL"),
        Value::Number(_) => argument.value_name("NUMBER"),
        _ => argument.value_name("VALUE"),
    }
}

impl clap::Args for Parameters {
    fn augment_args(command: Command) -> Command {
        let defaults = defaults();
        // One run is where it is.
        let parameters = PARAMETER_NAMES.iter().zip(PARAMETER_MEANINGS);
        let parameters = parameters.filter(|(name, _)| **name != TrialConfig::ACCELERATOR);
        let arguments = parameters.map(|(name, meaning)| argument(name, meaning, &defaults[*name]));
        command.next_help_heading("Parameters").args(arguments)
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl clap::FromArgMatches for Parameters {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let given = |name: &&str| {
            let value = matches.try_get_one::<Value>(name).ok().flatten()?;
            Some(((*name).to_string(), value.clone()))
        };
        let values = PARAMETER_NAMES.iter().filter_map(given).collect();
        let config = serde_json::from_value(Value::Object(values));
        config.map(Self).map_err(|e| clap::Error::raw(ErrorKind::InvalidValue, e))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// A flag's text as a value that its parameter takes: as JSON if the parameter takes that, else as a string.
/// Whether a value of the right sort is in range depends on the model and is checked with it.
fn value(name: &str, text: &str) -> Result<Value, String> {
    if name == "target_modules" && is_list(text) {
        return Ok(text.split(',').map(str::trim).collect());
    }
    let string = Value::String(text.to_string());
    let parsed = serde_json::from_str(text).unwrap_or_else(|_| string.clone());
    let takes = |value: &&Value| serde_json::from_value::<TrialConfig>(json!({ name: value })).is_ok();
    match [&parsed, &string].into_iter().find(takes) {
        Some(value) => Ok(value.clone()),
        None => Err(refusal(name, &parsed)),
    }
}

/// What a parameter must be, in the words that a sweep file's errors have, and a value that it takes.
fn refusal(name: &str, value: &Value) -> String {
    let must_be = check_parameter(name, value).err().unwrap_or_else(|| "cannot be used".into());
    match &defaults()[name] {
        Value::Null => must_be,
        Value::String(text) if text.is_empty() => must_be,
        Value::String(text) => format!("{must_be}; give one such as {text}, the default"),
        default => format!("{must_be}; give one such as {default}, the default"),
    }
}

/// Module names with commas between; anything else is `all-linear` or a pattern.
fn is_list(text: &str) -> bool {
    text.chars().all(|c| c.is_ascii_alphanumeric() || "_., ".contains(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(arguments: &[&str]) -> Result<TrialConfig, String> {
        let command = <Parameters as clap::Args>::augment_args(Command::new("train"));
        let required = ["train", "--pretrained-model-id=m", "--dataset-name=d"];
        let matches =
            command.try_get_matches_from(required.iter().chain(arguments)).map_err(|e| e.to_string())?;
        let parameters = <Parameters as clap::FromArgMatches>::from_arg_matches(&matches);
        parameters.map(|p| p.0).map_err(|e| e.to_string())
    }

    #[test]
    fn flags_become_parameters() {
        let base = || TrialConfig {
            pretrained_model_id: "m".into(),
            dataset_name: "d".into(),
            ..TrialConfig::default()
        };
        let names = |names: &[&str]| {
            domain::trial::TargetModules::Names(names.iter().map(ToString::to_string).collect())
        };
        let pattern = |p: &str| domain::trial::TargetModules::Pattern(p.into());
        let rows: Vec<(&[&str], TrialConfig)> = vec![
            (&[], base()),
            (&["--task=instruct-lora", "--lora_rank=2"], TrialConfig { lora_rank: 2, ..base() }),
            (&["--learning-rate", "2e-4"], TrialConfig { learning_rate: 2e-4, ..base() }),
            (&["--weight_decay", "-1"], TrialConfig { weight_decay: -1.0, ..base() }),
            (&["--shuffle", "false", "--seed", "7"], TrialConfig { shuffle: false, seed: 7, ..base() }),
            (
                &["--add_eos=false", "--max_steps=5"],
                TrialConfig { add_eos: false, max_steps: Some(5), ..base() },
            ),
            (&["--skip-bad-rows", "--seed", "7"], TrialConfig { skip_bad_rows: true, seed: 7, ..base() }),
            (
                &["--precision_mode=4bit"],
                TrialConfig { precision_mode: domain::trial::PrecisionMode::FourBit, ..base() },
            ),
            (&["--init-adapter", "12"], TrialConfig { init_adapter: Some("12".into()), ..base() }),
            (
                &["--target-modules", "q_proj,v_proj"],
                TrialConfig { target_modules: names(&["q_proj", "v_proj"]), ..base() },
            ),
            (&["--target_modules=q_proj"], TrialConfig { target_modules: names(&["q_proj"]), ..base() }),
            (
                &["--target-modules", "[\"o_proj\"]"],
                TrialConfig { target_modules: names(&["o_proj"]), ..base() },
            ),
            (&["--target-modules", "all-linear"], base()),
            (
                &["--target-modules", ".*(q|v)_proj"],
                TrialConfig { target_modules: pattern(".*(q|v)_proj"), ..base() },
            ),
        ];
        for (arguments, want) in rows {
            assert_eq!(parse(arguments), Ok(want), "{arguments:?}");
        }
    }

    #[test]
    fn a_wrong_value_is_named() {
        for (arguments, fragments) in [
            (["--lora-rank", "abc"], ["--lora-rank", "abc", "a whole number from 1"]),
            (["--lora_rank", "1.5"], ["--lora-rank", "1.5", "such as 16, the default"]),
            (["--max-steps", "ten"], ["--max-steps", "ten", "a whole number from 1"]),
            (["--precision-mode", "int8"], ["--precision-mode", "int8", "float32"]),
            (["--lr_scheduler_type", "step"], ["--lr-scheduler-type", "step", "cosine"]),
            (["--shuffle", "maybe"], ["--shuffle", "maybe", "true or false"]),
            (["--learning-rat", "1"], ["--learning-rat", "unexpected", "--learning-rate"]),
        ] {
            let message = parse(&arguments).unwrap_err();
            for fragment in fragments {
                assert!(message.contains(fragment), "{arguments:?}: {message:?} lacks {fragment}");
            }
            for word in ["u32", "f64", "variant", "Usage: lorafleet"] {
                assert!(!message.contains(word), "{arguments:?}: {message:?} has {word}");
            }
        }
    }
}
