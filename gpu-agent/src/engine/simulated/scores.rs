//! What simulated trials answer: nothing is asked, and every score follows from the loss.

use domain::metric::{MEAN, PERPLEXITIES};
use domain::rng;
use domain::sweep::Evaluations;
use domain::trial::{ItemScores, TaskScore};
use eval::exam;
use eval::task::{self, Selection};

/// Documents of a task, where a sweep does not limit them.
const DOCUMENTS: u64 = 1000;
/// The golden ratio's fraction: its multiples lie evenly between whole numbers, however many they are.
const GOLDEN: f64 = 0.618_033_988_749_894_9;

/// The scores of a trial with a loss, beside its base's. An accuracy is `1/4 + exp(−loss/2)/2`, its standard error that of
/// as many draws; a perplexity is `exp(loss)`. Of single documents that part is right, and which ones the part decides.
pub(super) fn of(evaluations: &Evaluations, loss: f64, base_loss: f64) -> (Vec<TaskScore>, Vec<ItemScores>) {
    let Ok(Selection { tasks, presets }) = task::of_sweep(&evaluations.tasks) else {
        return Default::default();
    };
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
    // Documents of one task are the same for all trials, whatever they are.
    let asked = |score: &TaskScore| format!("simulated {}", score.task);
    let few = scores.len() as u64 * documents * 2 <= ItemScores::MOST_BYTES as u64;
    let means_of_documents = scores.iter().filter(|score| few && score.stderr.is_some());
    let mut items: Vec<_> = means_of_documents
        .map(|score| ItemScores {
            metric: score.name(),
            asked: asked(score),
            scores: right(score.value, documents),
            base: right(score.base_value.unwrap_or_default(), documents),
            ..ItemScores::default()
        })
        .collect();
    for preset in presets {
        items.extend(preset.item_scores());
        scores.push(score(&preset.preset, MEAN, 0, documents * preset.tasks.len() as u64));
    }
    (scores, items)
}

/// Which documents are right, if a part of them is.
fn right(part: f64, documents: u64) -> Vec<u8> {
    let first = rng::uniform(rng::key(part.to_bits(), "simulated/right"), 0);
    let is_right = |document: u64| (first + document as f64 * GOLDEN).fract() < part;
    (0..documents).map(|document| ItemScores::byte(f64::from(is_right(document)))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_documents_are_right_as_the_score_says() {
        let evaluations = |limit| Evaluations {
            tasks: vec!["arc_easy".into(), "perplexity".into()],
            limit,
            ..Evaluations::default()
        };
        let (scores, items) = of(&evaluations(Some(700)), 2.0, 4.0);
        let kept: Vec<_> = items.iter().map(|items| items.metric.as_str()).collect();
        assert_eq!(
            kept,
            ["eval/arc_easy/acc", "eval/arc_easy/acc_norm"],
            "a perplexity is no mean of documents"
        );
        for (items, score) in items.iter().zip(&scores) {
            let part = |bytes: &[u8]| bytes.iter().filter(|byte| **byte == 255).count() as f64 / 700.0;
            assert!((part(&items.scores) - score.value).abs() < 0.01, "{items:?}");
            assert!((part(&items.base) - score.base_value.unwrap()).abs() < 0.01, "{items:?}");
        }
        assert_eq!(of(&evaluations(Some(u32::MAX)), 2.0, 4.0).1, [], "too many to keep");
    }
}
