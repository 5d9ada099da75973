//! Scores of a trial's evaluations.

use crate::limits::{self, cut};
use crate::v1;
use domain::trial::{ItemScores, TaskScore, TextScores};

impl From<TaskScore> for v1::TaskScore {
    fn from(score: TaskScore) -> Self {
        Self {
            task: score.task,
            metric: score.metric,
            value: score.value,
            stderr: score.stderr,
            base_value: score.base_value,
            base_stderr: score.base_stderr,
            difference_stderr: score.difference_stderr,
            num_fewshot: score.num_fewshot,
            documents: score.documents,
        }
    }
}

/// The scores that came; one without a finite value is none: a record is JSON, which has no other numbers.
pub(super) fn scores(scores: Vec<v1::TaskScore>) -> Vec<TaskScore> {
    let short = |name| cut(name, limits::NAME_BYTES);
    let finite = |value: Option<f64>| value.filter(|value| value.is_finite());
    let sound = scores.into_iter().take(limits::SCORES).filter(|score| score.value.is_finite());
    let score = |score: v1::TaskScore| TaskScore {
        task: short(score.task),
        metric: short(score.metric),
        value: score.value,
        stderr: finite(score.stderr),
        base_value: finite(score.base_value),
        base_stderr: finite(score.base_stderr),
        difference_stderr: finite(score.difference_stderr),
        num_fewshot: score.num_fewshot,
        documents: score.documents,
    };
    sound.map(score).collect()
}

impl From<ItemScores> for v1::ItemScores {
    fn from(items: ItemScores) -> Self {
        let ItemScores { metric, asked, scores, base, parts, texts } = items;
        let (log_likelihoods, base_log_likelihoods, weights) =
            texts.map(|texts| (texts.log_likelihoods, texts.base, texts.weights)).unwrap_or_default();
        Self { metric, asked, scores, base, parts, log_likelihoods, base_log_likelihoods, weights }
    }
}

/// Scores of single documents that came, as many as an agent may send. Those of a base that are not as many say nothing.
pub(super) fn item_scores(items: Vec<v1::ItemScores>) -> Vec<ItemScores> {
    let short = |name| cut(name, limits::NAME_BYTES);
    let sound = |items: v1::ItemScores| {
        let (scores, mut base) = (items.scores, items.base);
        if base.len() != scores.len() {
            base.clear();
        }
        let parts = items.parts.into_iter().take(limits::SCORES).map(short).collect();
        let texts = TextScores::new(items.log_likelihoods, items.base_log_likelihoods, items.weights);
        ItemScores { metric: short(items.metric), asked: short(items.asked), scores, base, parts, texts }
    };
    ItemScores::fitting(items.into_iter().take(limits::SCORES).map(sound))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_travel_unchanged_if_they_are_numbers() {
        let score = TaskScore {
            task: "arc_challenge".into(),
            metric: "acc_norm".into(),
            value: 0.5,
            stderr: Some(0.01),
            base_value: Some(0.25),
            base_stderr: None,
            difference_stderr: Some(0.02),
            num_fewshot: 25,
            documents: 1172,
        };
        let wire = v1::TaskScore::from(score.clone());
        assert_eq!(scores(vec![wire.clone()]), std::slice::from_ref(&score));
        let odd = v1::TaskScore { stderr: Some(f64::NAN), ..wire.clone() };
        assert_eq!(scores(vec![odd]), [TaskScore { stderr: None, ..score.clone() }]);
        let none = v1::TaskScore { value: f64::INFINITY, ..wire.clone() };
        assert_eq!(scores(vec![none, wire.clone()]), [score]);
        assert_eq!(scores(vec![wire; limits::SCORES + 1]).len(), limits::SCORES);
    }

    #[test]
    fn scores_of_documents_travel_unchanged() {
        let items = ItemScores {
            metric: "eval/arc_easy/acc".into(),
            asked: "0f".into(),
            scores: vec![0, 255, 255],
            base: vec![255, 0, 128],
            parts: vec!["eval/a/acc".into()],
            texts: None,
        };
        let wire = v1::ItemScores::from(items.clone());
        let short = v1::ItemScores { base: vec![0], ..wire.clone() };
        let without = ItemScores { base: Vec::new(), ..items.clone() };
        assert_eq!(item_scores(vec![wire.clone(), short]), [items, without]);
        let texts = TextScores::new(vec![-6.5, -0.1], vec![-7.0, -1.0], vec![2, 1]);
        let of_texts = ItemScores { metric: "eval/t/bits_per_byte".into(), texts, ..ItemScores::default() };
        let told = v1::ItemScores::from(of_texts.clone());
        let odd = v1::ItemScores { weights: vec![2], ..told.clone() };
        let none = ItemScores { texts: None, ..of_texts.clone() };
        assert_eq!(item_scores(vec![told, odd]), [of_texts, none]);
        assert_eq!(item_scores(vec![wire; limits::SCORES + 1]).len(), limits::SCORES);
    }
}
