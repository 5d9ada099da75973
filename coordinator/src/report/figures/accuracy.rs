//! Accuracies by task: of the base and of the best adapter of each precision mode, with what chance alone could make of them.

use super::super::chart::{Axis, Chart, Key, Mark, OTHERS, PALETTE, Shape};
use super::super::document::{Figure, Line};
use super::super::evaluations::NORMAL_95;
use super::super::series::Entry;
use domain::metric::PERPLEXITIES;
use domain::trial::TaskScore;

/// Pixels of a dot's row, and those between two tasks.
const ROW: u32 = 30;
const BETWEEN: u32 = 26;

/// The figure of the best trials of the precision modes; of none that was asked, none.
pub(in super::super) fn figure(best: &[(String, &Entry)]) -> Option<Figure> {
    let scores = |entry: &Entry| entry.trial.summary.clone().map(|s| s.evaluations).unwrap_or_default();
    let all: Vec<_> =
        best.iter().flat_map(|(mode, entry)| scores(entry).into_iter().map(move |s| (mode, s))).collect();
    let less_is_better = |score: &TaskScore| PERPLEXITIES.contains(&score.metric.as_str());
    let accuracies: Vec<_> =
        all.iter().filter(|(_, score)| !less_is_better(score) && score.value.is_finite()).collect();
    let mut names: Vec<String> = Vec::new();
    let mut modes: Vec<&String> = Vec::new();
    for (mode, score) in &accuracies {
        let name = name(score);
        if !names.contains(&name) {
            names.push(name);
        }
        if !modes.contains(mode) {
            modes.push(*mode);
        }
    }
    if names.is_empty() {
        return None;
    }
    let (mut marks, mut values) = (Vec::new(), Vec::new());
    for (mode, score) in &accuracies {
        let at = |items: usize| items as f64;
        let task = names.iter().position(|known| *known == name(score)).unwrap_or_default();
        let series = modes.iter().position(|known| known == mode).unwrap_or_default();
        let colour = PALETTE[series % PALETTE.len()];
        let base =
            score.base_value.filter(|value| value.is_finite()).map(|value| (value, score.base_stderr, false));
        for (value, stderr, full) in base.into_iter().chain([(score.value, score.stderr, true)]) {
            // The first task on top, and within it the first mode, its base before its adapter.
            let row = 2 * series + usize::from(full);
            let y = 0.4 - 0.8 * (at(row) + 0.5) / at(2 * modes.len()) - at(task);
            let reach = stderr.filter(|stderr| stderr.is_finite()).unwrap_or(0.0) * NORMAL_95;
            let points = vec![(value - reach, y), (value + reach, y)];
            values.extend([value - reach, value + reach]);
            marks.extend((reach > 0.0).then_some(Mark::Line { points, colour, width: 4 }));
            marks.push(Mark::Dot { x: value, y, colour, full, size: 9, shape: Shape::of(series) });
        }
    }
    let dot = |(series, mode): (usize, &&String)| {
        (Key::Dot(PALETTE[series % PALETTE.len()], Shape::of(series)), method(mode))
    };
    let mut legend: Vec<_> = modes.iter().enumerate().map(dot).collect();
    legend.push((Key::Ring, "the base in the same numbers".into()));
    legend.push((Key::Line(OTHERS), "95 % interval".into()));
    let rows = names.len() as u32;
    let mut caption = Line::default().strong("Accuracy by task").text(
        ": a full mark is the best adapter of a precision mode, a ring the base without it. Each interval is of a value by \
         itself (1.96 standard errors over items); whether base and adapter differ is said by that of their paired difference, \
         in the table.",
    );
    if accuracies.len() < all.len() {
        caption = caption.text(" Perplexities, of which less is better, are in the table alone.");
    }
    Some(Figure {
        name: "accuracy-by-task".into(),
        description: format!("Accuracy of base and adapters by task: {}", names.join(", ")),
        chart: Chart {
            x: Axis::linear(values.into_iter()),
            y: Axis::rows(
                names.iter().enumerate().map(|(task, name)| (-(task as f64), name.clone())),
                (0.5 - f64::from(rows), 0.5),
                rows * (2 * modes.len() as u32 * ROW + BETWEEN),
            ),
            titles: ("accuracy, of 1: more is better".into(), String::new()),
            legend,
            marks,
        },
        caption,
        data: None,
    })
}

/// A metric's name as short as it tells tasks apart.
fn name(score: &TaskScore) -> String {
    format!("{} {}", score.task, score.metric)
}

/// What is done to a base in these numbers.
pub(in super::super) fn method(mode: &str) -> String {
    format!("{}, {mode}", if mode == "4bit" { "QLoRA" } else { "LoRA" })
}

#[cfg(test)]
mod tests {
    use super::super::super::made::{self, float16, four_bit};
    use super::super::super::{Records, Sources};
    use super::*;
    use domain::trial::{Trial, TrialConfig};

    fn score(task: &str, metric: &str, value: f64, base: Option<f64>) -> TaskScore {
        TaskScore {
            task: task.into(),
            metric: metric.into(),
            value,
            stderr: Some(0.01),
            base_value: base,
            base_stderr: None,
            difference_stderr: None,
            num_fewshot: 25,
            documents: 100,
        }
    }

    fn asked(number: u32, config: TrialConfig, evaluations: Vec<TaskScore>) -> Trial {
        let mut trial = made::measured(number, config, 7.0, 1.0);
        if let Some(summary) = &mut trial.summary {
            summary.evaluations = evaluations;
        }
        trial
    }

    fn shown(trials: &[Trial]) -> Option<Figure> {
        let sweep = made::sweep();
        let sources = Sources::of(Records { sweep: &sweep, trials, curves: &[], items: &[] });
        figure(&sources.best_of_modes(|_| true))
    }

    #[test]
    fn base_and_adapter_of_each_mode_by_task() {
        let trials = [
            asked(
                1,
                float16(2, 16, 512),
                vec![
                    score("arc_challenge", "acc_norm", 0.5, Some(0.4)),
                    score("hellaswag", "acc_norm", 0.8, None),
                ],
            ),
            asked(2, four_bit(2, 16, 512), vec![score("arc_challenge", "acc_norm", 0.45, Some(0.3))]),
            // Not the best of its mode.
            asked(3, four_bit(2, 64, 512), vec![score("arc_challenge", "acc_norm", 0.1, Some(0.3))]),
        ];
        let figure = shown(&trials).unwrap();
        let legend: Vec<_> = figure.chart.legend.iter().map(|(_, meaning)| meaning.as_str()).collect();
        assert_eq!(legend, ["QLoRA, 4bit", "LoRA, float16", "the base in the same numbers", "95 % interval"]);
        let dots = figure.chart.marks.iter().filter_map(|mark| match mark {
            Mark::Dot { x, y, full, .. } => Some((*x, (y * 10.0).round() / 10.0, *full)),
            _ => None,
        });
        let want =
            [(0.3, 0.3, false), (0.45, 0.1, true), (0.4, -0.1, false), (0.5, -0.3, true), (0.8, -1.3, true)];
        assert_eq!(dots.collect::<Vec<_>>(), want);
        // Of a base nobody told a standard error.
        let intervals = figure.chart.marks.iter().filter_map(|mark| match mark {
            Mark::Line { points, .. } => Some((points[0].0, points[1].0)),
            _ => None,
        });
        let intervals: Vec<_> = intervals.collect();
        for (got, want) in intervals.iter().zip([(0.4304, 0.4696), (0.4804, 0.5196), (0.7804, 0.8196)]) {
            assert!((got.0 - want.0).abs() < 1e-9 && (got.1 - want.1).abs() < 1e-9, "{got:?}, not {want:?}");
        }
        assert_eq!(intervals.len(), 3);
        let svg = figure.chart.draw(true).unwrap();
        assert!(svg.contains("arc_challenge acc_norm") && svg.contains("simulated"), "{svg}");
    }

    #[test]
    fn perplexities_are_no_accuracies() {
        let with = |scores: Vec<TaskScore>| shown(&[asked(1, float16(2, 16, 512), scores)]);
        let perplexity = || score("book", "word_perplexity", 12.0, Some(20.0));
        assert!(with(vec![perplexity()]).is_none());
        assert!(with(vec![]).is_none());
        let figure = with(vec![perplexity(), score("mmlu", "acc", 0.3, Some(f64::NAN))]).unwrap();
        assert!(figure.caption.plain().ends_with("are in the table alone."), "{}", figure.caption.plain());
        assert!(figure.description.ends_with(": mmlu acc"), "{}", figure.description);
        assert!(figure.chart.draw(false).is_ok());
    }
}
