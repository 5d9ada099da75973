//! What simulated trials answer: nothing is asked, and every score follows from the loss.

use domain::metric::{MEAN, PERPLEXITIES};
use domain::sweep::Evaluations;
use domain::trial::TaskScore;
use eval::exam;
use eval::task::{self, Selection};

/// Documents of a task, where a sweep does not limit them.
const DOCUMENTS: u64 = 1000;

/// The scores of a trial with a loss, beside its base's. An accuracy is `1/4 + exp(−loss/2)/2`, its standard error that of
/// as many draws; a perplexity is `exp(loss)`.
pub(super) fn of(evaluations: &Evaluations, loss: f64, base_loss: f64) -> Vec<TaskScore> {
    let Ok(Selection { tasks, presets }) = task::of_sweep(&evaluations.tasks) else { return Vec::new() };
    let documents = evaluations.limit.map_or(DOCUMENTS, u64::from);
    let score = |task: &str, metric: &str, num_fewshot: u32, documents: u64| {
        let of = |loss: f64| match metric {
            "bits_per_byte" => (loss / std::f64::consts::LN_2, None),
            metric if PERPLEXITIES.contains(&metric) => (loss.exp(), None),
            _ => {
                let part = 0.25 + 0.5 * (-loss / 2.0).exp();
                (part, Some((part * (1.0 - part) / documents as f64).sqrt()))
            }
        };
        let ((value, stderr), (base_value, base_stderr)) = (of(loss), of(base_loss));
        let both = stderr.zip(base_stderr);
        TaskScore {
            task: task.into(),
            metric: metric.into(),
            value,
            stderr,
            base_value: Some(base_value),
            base_stderr,
            difference_stderr: both.map(|(with, without)| with.hypot(without)),
            num_fewshot,
            documents,
        }
    };
    let mut scores = Vec::new();
    let options = exam::options(evaluations);
    for chosen in &tasks {
        let examples = options.examples(chosen) as u32;
        for measure in chosen.task.measures() {
            scores.push(score(&chosen.task.task, &measure.to_string(), examples, documents));
        }
    }
    for preset in presets {
        scores.push(score(&preset.preset, MEAN, 0, documents * preset.tasks.len() as u64));
    }
    scores
}
