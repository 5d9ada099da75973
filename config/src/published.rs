//! Published numbers that reports show beside what a sweep measured: `config/published/`, one file a report.

use crate::yaml;
use serde::Deserialize;
use std::sync::LazyLock;

const OPENLLAMA_7B: &str = include_str!("../published/openllama-7b.yaml");

/// A published report, as far as its numbers can be held beside a sweep's.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Published {
    /// What it is called.
    pub title: String,
    /// Who wrote it.
    pub by: String,
    /// Its base model.
    pub base: Base,
    /// What a number is of where it does not say otherwise.
    pub usual: Setting,
    /// Peak memory in GB; `None` where it does not fit.
    pub peak_memory: Vec<Number>,
    /// The largest batch size that fits; `None` where none does.
    pub largest_batch_size: Vec<Number>,
    /// Rows a second.
    pub speed: Vec<Number>,
    /// US dollars of a run of [`Published::usual`]'s steps; `None` where it does not fit.
    pub cost: Vec<Number>,
    /// Parameters and sizes of adapters.
    pub adapters: Vec<Adapter>,
    /// What tasks made of base and adapters.
    pub accuracy: Accuracy,
    /// Where the numbers do not agree with each other.
    pub notes: Vec<String>,
}

/// A base model.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Base {
    /// The last part of its id.
    pub name: String,
    /// Its parameters.
    pub parameters: u64,
}

/// A configuration.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Setting {
    /// The accelerator's name in the catalogue.
    pub accelerator: String,
    /// Rows a step.
    pub batch_size: u64,
    /// The adapter's rank.
    pub lora_rank: u64,
    /// Tokens of a row at most.
    pub max_sequence_length: u64,
    /// Steps of a run.
    pub max_steps: u64,
}

/// A number of a precision mode, and in what its configuration is not the usual one.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Number {
    /// `float16` of LoRA, `4bit` of QLoRA.
    pub precision_mode: String,
    /// Another accelerator.
    pub accelerator: Option<String>,
    /// Another rank.
    pub lora_rank: Option<u64>,
    /// Another length.
    pub max_sequence_length: Option<u64>,
    /// The number; `None` where it was told that it does not fit.
    pub value: Option<f64>,
    /// Whether it was told as about that.
    #[serde(default)]
    pub about: bool,
}

impl Number {
    /// The whole configuration.
    pub fn setting(&self, usual: &Setting) -> Setting {
        Setting {
            accelerator: self.accelerator.as_ref().unwrap_or(&usual.accelerator).clone(),
            lora_rank: self.lora_rank.unwrap_or(usual.lora_rank),
            max_sequence_length: self.max_sequence_length.unwrap_or(usual.max_sequence_length),
            ..*usual
        }
    }
}

/// An adapter's size.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Adapter {
    /// Its rank.
    pub lora_rank: u64,
    /// Trainable parameters.
    pub trainable: f64,
    /// Parameters of base and adapter together.
    pub total: f64,
    /// Its file in MB.
    pub megabytes: f64,
}

/// A table of accuracies.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Accuracy {
    /// Steps of the adapters' runs.
    pub max_steps: u64,
    /// Its columns.
    pub metrics: Vec<Metric>,
    /// Its rows.
    pub rows: Vec<Scores>,
}

/// A column of accuracies.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Metric {
    /// As the report calls it.
    pub name: String,
    /// As a trial has it: `eval/hellaswag/acc_norm`.
    pub metric: String,
}

/// A row of accuracies.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scores {
    /// Of what.
    pub of: String,
    /// The adapter's precision mode; `None` of a base.
    pub precision_mode: Option<String>,
    /// From 0 to 1, in the order of the metrics.
    pub values: Vec<f64>,
}

/// The published report on OpenLLaMA 7B.
pub fn openllama_7b() -> Option<&'static Published> {
    // A test reads the file; what ships reads.
    static READ: LazyLock<Option<Published>> = LazyLock::new(|| read(OPENLLAMA_7B).ok());
    READ.as_ref()
}

fn read(text: &str) -> Result<Published, String> {
    let parsed = yaml::parse(text).map_err(|(at, why)| format!("line {}:{}: {why}", at.line, at.column))?;
    serde_json::from_value(parsed.value).map_err(|error| error.to_string())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn the_shipped_numbers_read() {
        let published = read(OPENLLAMA_7B).unwrap();
        assert_eq!(openllama_7b(), Some(&published));
        let all = [&published.peak_memory, &published.largest_batch_size, &published.speed, &published.cost];
        assert_eq!(all.map(Vec::len), [8, 4, 8, 4]);
        for number in all.into_iter().flatten() {
            assert!(["float16", "4bit"].contains(&number.precision_mode.as_str()), "{number:?}");
            assert!(number.value.is_none_or(|value| value > 0.0), "{number:?}");
            let on = number.setting(&published.usual).accelerator;
            assert!(crate::machines::accelerator(&on).is_ok(), "{on}");
        }
        for row in &published.accuracy.rows {
            assert_eq!(row.values.len(), published.accuracy.metrics.len(), "{row:?}");
            // The first is the mean of the others, to its two digits.
            let mean = row.values[1..].iter().sum::<f64>() / 3.0;
            assert!((row.values[0] - mean).abs() < 0.01, "{row:?}: {mean}");
        }
        // Rank by rank what all linear layers come to, and MiB where it says MB.
        for adapter in &published.adapters {
            let trainable = adapter.lora_rank as f64 * 2_498_560.0;
            assert!((adapter.trainable / trainable - 1.0).abs() < 0.01, "{adapter:?}");
            assert!((adapter.megabytes * 1_048_576.0 / (4.0 * trainable) - 1.0).abs() < 0.01, "{adapter:?}");
        }
    }

    /// What the notes say of the numbers, computed.
    #[test]
    fn the_notes_are_arithmetic() {
        let published = openllama_7b().unwrap();
        let (a100, rows) = (3.673_385, 1000.0);
        assert!((rows / 5.0 * a100 / 3600.0 - 0.20_f64).abs() < 0.005);
        assert!((3600.0 / a100 - 981.0_f64).abs() < 2.0);
        assert!((rows / 3.0 * a100 / 3600.0 - 0.34_f64).abs() < 0.005);
        assert!((6.75 / 2.86 - 2.4_f64).abs() < 0.05);
        assert!((rows / (6.75 / 2.86 * 3600.0) - 0.12_f64).abs() < 0.005);
        assert!(published.notes[0].contains("$0.20") && published.notes[0].contains("981 s"));
    }
}
