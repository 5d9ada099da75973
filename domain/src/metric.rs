//! What a metric's name means. A number is defined here and nowhere else; whoever shows it says this.
//! GB is 10⁹ bytes everywhere.

use crate::Timestamp;
use serde::{Deserialize, Serialize};

/// A metric's definition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Definition {
    /// Its name in records, files and on the wire.
    pub name: &'static str,
    /// Its unit in UCUM notation (`1`, `By`, `s`, `USD`, …).
    pub unit: &'static str,
    /// What it counts.
    pub meaning: &'static str,
}

macro_rules! metrics {
    ($( $const:ident = $name:literal, $unit:literal, $meaning:literal; )*) => {
        $( #[doc = $meaning] pub const $const: &str = $name; )*

        /// Every metric.
        pub const DEFINITIONS: &[Definition] =
            &[ $( Definition { name: $name, unit: $unit, meaning: $meaning }, )* ];
    };
}

metrics! {
    LOSS = "loss", "1", "Negative log-likelihood of the step's unmasked target tokens divided by their number.";
    GRAD_NORM = "grad_norm", "1", "Global L2 norm of the trial's gradients before clipping.";
    LEARNING_RATE = "learning_rate", "1", "Learning rate that the step used.";
    TOKENS = "tokens", "{token}", "Unmasked target tokens of the step.";
    EVAL_LOSS = "eval/loss", "1", "Total negative log-likelihood of the held-out rows divided by their predicted tokens.";
    SAMPLES_PER_SECOND = "samples_per_second", "{row}/s", "Real rows trained a second, solo or packed as marked.";
    TOKENS_PER_SECOND = "tokens_per_second", "{token}/s", "Unpadded tokens trained a second, solo or packed as marked.";
    PEAK_MEMORY_BYTES = "peak_memory_bytes", "By", "High-water mark: on a GPU of the allocator's pool, on CPU of counted tensor bytes. Measured for a solo trial, attributed in a pack.";
    PACK_PEAK_MEMORY_BYTES = "pack_peak_memory_bytes", "By", "High-water mark of all trials of a pack and their base together.";
    PEAK_RSS_BYTES = "peak_rss_bytes", "By", "Highest resident set size of the training process.";
    COST_USD = "cost_usd", "USD", "Device time from assignment to release, loading included, times the trial's share of the device, times the price.";
}

/// What every trial reports at each of its points, `eval/loss` at those where it evaluates: the metrics by which
/// a sweep can compare trials. The others are known at a trial's end alone, or of a pack.
pub const REPORTED: &[&str] = &[
    EVAL_LOSS,
    LOSS,
    GRAD_NORM,
    LEARNING_RATE,
    TOKENS,
    SAMPLES_PER_SECOND,
    TOKENS_PER_SECOND,
    PEAK_MEMORY_BYTES,
];

/// What begins the name of every metric that is measured with an adapter in place.
const EVALUATED: &str = "eval/";

/// The metric of a task, or of a preset, that a sweep's evaluations ask: `eval/arc_challenge/acc_norm`.
pub fn of_task(task: &str, metric: &str) -> String {
    format!("{EVALUATED}{task}/{metric}")
}

/// The task and the metric that [`of_task`] made a name of; `None` if it made none of it.
pub fn task_and_metric(name: &str) -> Option<(&str, &str)> {
    let (task, metric) = name.strip_prefix(EVALUATED)?.rsplit_once('/')?;
    (!task.is_empty() && !metric.is_empty()).then_some((task, metric))
}

/// Metrics of tasks of whole texts, of which less is better; of all other tasks' more is.
pub const PERPLEXITIES: &[&str] = &["word_perplexity", "byte_perplexity", "bits_per_byte"];

/// The mean of a preset's tasks.
pub const MEAN: &str = "mean";

/// Which way is better, of a metric by which trials are compared and nobody says.
pub fn goal(name: &str) -> crate::sweep::Goal {
    match task_and_metric(name) {
        Some((_, metric)) if !PERPLEXITIES.contains(&metric) => crate::sweep::Goal::Maximize,
        _ => crate::sweep::Goal::Minimize,
    }
}

/// The definition of `name`.
pub fn definition(name: &str) -> Option<&'static Definition> {
    DEFINITIONS.iter().find(|d| d.name == name)
}

/// All metrics of one trial at one step. Steps count finished optimizer steps: the first point is step 1;
/// step 0 carries what was measured before training (the base's `eval/loss`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MetricPoint {
    /// Finished optimizer steps.
    pub step: u64,
    /// When it was measured.
    pub time: Timestamp,
    /// Values by metric name, in the order in which they were measured.
    pub values: Vec<(String, f64)>,
}

impl MetricPoint {
    /// The value of a metric at this step.
    pub fn get(&self, name: &str) -> Option<f64> {
        self.values.iter().find(|(n, _)| n == name).map(|(_, v)| *v)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sweep::Goal;

    #[test]
    fn what_a_name_of_a_tasks_metric_says() {
        for (name, parts, goal_of_it) in [
            ("eval/arc_challenge/acc_norm", Some(("arc_challenge", "acc_norm")), Goal::Maximize),
            ("eval/a/b/acc", Some(("a/b", "acc")), Goal::Maximize),
            ("eval/book/word_perplexity", Some(("book", "word_perplexity")), Goal::Minimize),
            ("eval/open-llm-leaderboard-v1/mean", Some(("open-llm-leaderboard-v1", "mean")), Goal::Maximize),
            ("eval/loss", None, Goal::Minimize),
            ("eval//acc", None, Goal::Minimize),
            ("eval/arc/", None, Goal::Minimize),
            ("loss", None, Goal::Minimize),
        ] {
            assert_eq!((task_and_metric(name), goal(name)), (parts, goal_of_it), "{name}");
            if let Some((task, metric)) = parts {
                assert_eq!(of_task(task, metric), name);
            }
        }
    }
}
