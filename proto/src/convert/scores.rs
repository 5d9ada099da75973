//! Scores of a trial's evaluations.

use crate::limits::{self, cut};
use crate::v1;
use domain::trial::{ItemScores, TaskScore};

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
        let ItemScores { metric, asked, scores, base, parts } = items;
        Self { metric, asked, scores, base, parts }
    }
}

/// Scores of single documents that came, as many as an agent may send. Those of a base that are not as many say nothing.
pub(super) fn item_scores(items: Vec<v1::ItemScores>) -> Vec<ItemScores> {
    let short = |name| cut(name, limits::NAME_BYTES);
    let sound = |v1::ItemScores { metric, asked, scores, mut base, parts }: v1::ItemScores| {
        if base.len() != scores.len() {
            base.clear();
        }
        let parts = parts.into_iter().take(limits::SCORES).map(short).collect();
        ItemScores { metric: short(metric), asked: short(asked), scores, base, parts }
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
        };
        let wire = v1::ItemScores::from(items.clone());
        let short = v1::ItemScores { base: vec![0], ..wire.clone() };
        let without = ItemScores { base: Vec::new(), ..items.clone() };
        assert_eq!(item_scores(vec![wire.clone(), short]), [items, without]);
        assert_eq!(item_scores(vec![wire; limits::SCORES + 1]).len(), limits::SCORES);
    }
}
