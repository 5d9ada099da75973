//! What the tasks of a sweep's evaluations say: of the base, of the best adapter of each precision mode, and whether the
//! two, or two such adapters, differ by more than chance.

use super::document::{Block, Line, Table};
use super::figures::accuracy;
use super::numbers::{self, NONE, or_dash};
use super::paired::Paired;
use super::series::Entry;
use super::slice::PRECISION;
use super::{ITEMS_BYTES, ITEMS_WAIT, MOST_ITEMS, Sources};
use domain::metric::{MEAN, PERPLEXITIES, of_task};
use domain::sweep::Sweep;
use domain::trial::{TaskScore, Trial};
use serde_json::Value;

/// Standard errors on each side of 95 % of a normal distribution.
pub(super) const NORMAL_95: f64 = 1.96;

/// What is said of a difference that may be none.
pub(super) const NO_DIFFERENCE: &str = "no difference shown";

/// How an interval was found.
const BOOTSTRAP: &str = "paired bootstrap";
const OF_PAIRS: &str = "normal, paired";
const OF_EACH: &str = "normal, unpaired";

/// Accuracies as a figure, and a table with a row for each metric and precision mode with how to read it; then what the
/// precision modes differ by.
pub(super) fn blocks(sources: &Sources) -> Vec<Block> {
    let mut table = Table::new([
        "metric",
        PRECISION,
        "trial",
        "examples",
        "items",
        "base",
        "adapter",
        "difference",
        "95 % interval",
        "by",
        "so the adapter is",
    ]);
    // A sweep may ask some of its trials alone.
    let asked = |trial: &Trial| trial.summary.as_ref().is_some_and(|summary| !summary.evaluations.is_empty());
    let best = sources.best_of_modes(asked);
    let scores = |entry: &Entry| entry.trial.summary.clone().map(|s| s.evaluations).unwrap_or_default();
    let mut names: Vec<String> = Vec::new();
    for name in best.iter().flat_map(|(_, entry)| scores(entry)).map(|score| score.name()) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    for name in &names {
        for (mode, entry) in &best {
            let scores = scores(entry);
            let Some(score) = scores.iter().find(|score| score.name() == *name) else { continue };
            let paired = sources.items.against_base([entry.trial], name);
            table.row(row(score, mode, number(entry), paired.as_ref()));
        }
    }
    let unasked: Vec<_> = sources.entries.iter().filter_map(|entry| not_asked(entry.trial)).collect();
    let unasked = (!unasked.is_empty()).then_some(Block::List(unasked));
    let others = asked_others(sources).then(|| Block::Warning(Line::from(OTHERS)));
    if names.is_empty() {
        return unasked.into_iter().collect();
    }
    let figure = accuracy::figure(&best).map(|figure| Block::Figures(vec![figure]));
    let tables = [Some(table), between(sources, &best, &names)].into_iter().flatten().map(Block::Table);
    others
        .into_iter()
        .chain(figure)
        .chain(tables)
        .chain([Block::Note(Line::from(HOW))])
        .chain(left_out(sources).map(|line| Block::Warning(Line::from(line))))
        .chain(unasked)
        .collect()
}

/// Columns for what tasks say of some trials, their headings and the metrics' names: of each preset that the sweep asks its
/// mean and what that is of, of other tasks every metric that a trial has.
pub(super) fn columns(sweep: &Sweep, asked: &[(String, &Entry)]) -> Vec<(String, String)> {
    let scores = asked.iter().filter_map(|(_, entry)| entry.trial.summary.as_ref());
    let known: Vec<(&str, &str)> = scores
        .flat_map(|summary| &summary.evaluations)
        .map(|score| (score.task.as_str(), score.metric.as_str()))
        .collect();
    let mut columns: Vec<(String, String)> = Vec::new();
    let add = |columns: &mut Vec<(String, String)>, task: &str, metric: Option<&str>| {
        for (task, metric) in
            known.iter().filter(|(t, m)| *t == task && metric.is_none_or(|metric| *m == metric))
        {
            let heading =
                if *metric == MEAN { format!("{MEAN} of {task}") } else { format!("{task} {metric}") };
            let column = (heading, of_task(task, metric));
            if !columns.contains(&column) {
                columns.push(column);
            }
        }
    };
    for task in sweep.spec.evaluations.iter().flat_map(|evaluations| &evaluations.tasks) {
        let text = |value: &Value, key: &str| value.get(key).and_then(Value::as_str).map(str::to_string);
        let shipped = config::tasks::SHIPPED.iter().find(|(name, _)| task.as_str() == Some(*name));
        let said =
            shipped.and_then(|(_, text)| config::tasks::read(text).ok()).unwrap_or_else(|| task.clone());
        match (text(&said, "preset"), said.get("tasks").and_then(Value::as_array)) {
            (Some(preset), Some(parts)) => {
                add(&mut columns, &preset, Some(MEAN));
                for part in parts {
                    let name = text(part, "task").or_else(|| part.as_str().map(str::to_string));
                    add(&mut columns, &name.unwrap_or_default(), text(part, "metric").as_deref());
                }
            }
            _ => {
                let name = task.as_str().map(str::to_string).or_else(|| text(&said, "task"));
                add(&mut columns, &name.unwrap_or_default(), None);
            }
        }
    }
    // A record may be of a sweep that says no more what it asked.
    if columns.is_empty() {
        known.iter().for_each(|(task, metric)| add(&mut columns, task, Some(metric)));
    }
    columns
}

/// Said where what is kept of single documents is not all here, so that intervals are those without it.
fn left_out(sources: &Sources) -> Option<String> {
    let trials = || sources.entries.iter().chain(&sources.replicates).map(|entry| entry.trial);
    let kept = trials().filter(|trial| trial.summary.as_ref().is_some_and(|summary| summary.items.is_some()));
    let lacking = trials().filter(|trial| sources.items.lack(trial)).count();
    (lacking > 0).then(|| {
        format!(
            "What single documents made of {lacking} of {} trials was left out: a report reads that of the best {MOST_ITEMS} \
             trials, {} MiB at most, for {} seconds, and what cannot be read is in the server's log. Their intervals are those \
             of trials of which it is not kept.",
            kept.count(),
            ITEMS_BYTES >> 20,
            ITEMS_WAIT.as_secs(),
        )
    })
}

/// Said where scores of several trials are of different questions.
const OTHERS: &str = "Not all trials were asked the same documents, so that their scores do not compare: what lies at a path, or on the hub, \
                      was another on another machine or at another time. Their records say which were asked the same (digests, documents).";

/// Whether trials were asked different documents.
fn asked_others(sources: &Sources) -> bool {
    let digests = sources.entries.iter().filter_map(|entry| entry.trial.digests.as_ref());
    let mut known = digests.map(|digests| digests.documents.as_str()).filter(|digest| !digest.is_empty());
    let first = known.next();
    known.any(|digest| Some(digest) != first)
}

/// How to read it.
const HOW: &str = "± is one standard error over items. What is compared answered the same items. The interval is that of the \
                   difference item by item, by the paired bootstrap where what each item made of both is kept, and else by the \
                   normal distribution: paired, from the standard error of that difference; unpaired, from those of each alone, \
                   which is too wide. Where it holds 0, chance alone may be what made them differ, and no difference is shown. \
                   It is of items alone: of other seeds it says nothing. Of a perplexity the items are texts, or the windows of a \
                   single one. Each adapter is the best of its precision mode, and so \
                   a little lucky.";

fn number(entry: &Entry) -> String {
    or_dash(entry.trial.id.number(), |number| number.to_string())
}

/// What the best adapters of any two precision modes differ by, under each metric; `None` where there are no two.
fn between(sources: &Sources, best: &[(String, &Entry)], names: &[String]) -> Option<Table> {
    let mut table = Table::new([
        "metric",
        "of",
        "less that of",
        "items",
        "difference",
        "95 % interval",
        "by",
        "so the first is",
    ]);
    let pairs = || best.iter().enumerate().flat_map(|(i, a)| best[i + 1..].iter().map(move |b| (a, b)));
    for name in names {
        for ((mode, a), (other, b)) in pairs() {
            let Some(Gap { value, interval, by, said }) = gap_between(sources, a, b, name) else { continue };
            let items = a.trial.summary.as_ref().and_then(|summary| summary.evaluation(name));
            table.row([
                name.clone(),
                format!("{mode}, trial {}", number(a)),
                format!("{other}, trial {}", number(b)),
                or_dash(items, |score| score.documents.to_string()),
                numbers::signed(value),
                or_dash(interval, numbers::interval),
                by.into(),
                said.into(),
            ]);
        }
    }
    (!table.rows.is_empty()).then_some(table)
}

/// What two things differ by under a metric, how sure that is, how that was found, and what it says.
pub(super) struct Gap {
    pub(super) value: f64,
    pub(super) interval: Option<(f64, f64)>,
    pub(super) by: &'static str,
    pub(super) said: &'static str,
}

/// What the best adapter of a precision mode that was asked a preset makes of the mean of its tasks.
pub(super) struct Mean {
    pub(super) mode: String,
    pub(super) trial: String,
    /// The preset's name.
    pub(super) task: String,
    pub(super) value: f64,
    /// What it differs from its base by.
    pub(super) against_base: Option<Gap>,
    /// What it differs from the best adapters of the modes behind it by, by their names.
    pub(super) against_others: Vec<(String, Gap)>,
}

/// The means of all presets that the best trials of the precision modes were asked.
pub(super) fn means(sources: &Sources) -> Vec<Mean> {
    let asked = |trial: &Trial| trial.summary.as_ref().is_some_and(|summary| !summary.evaluations.is_empty());
    let best = sources.best_of_modes(asked);
    let mut means = Vec::new();
    for (place, (mode, entry)) in best.iter().enumerate() {
        let scores = entry.trial.summary.iter().flat_map(|summary| &summary.evaluations);
        for score in scores.filter(|score| score.metric == MEAN && score.value.is_finite()) {
            let others = best[place + 1..].iter();
            let others = others.filter_map(|(other, b)| {
                Some((other.clone(), gap_between(sources, entry, b, &score.name())?))
            });
            means.push(Mean {
                mode: mode.clone(),
                trial: number(entry),
                task: score.task.clone(),
                value: score.value,
                against_base: gap_to_base(sources, entry.trial, score),
                against_others: others.collect(),
            });
        }
    }
    means
}

fn gap_to_base(sources: &Sources, trial: &Trial, score: &TaskScore) -> Option<Gap> {
    let paired = sources.items.against_base([trial], &score.name());
    Gap::to_base(score, paired.as_ref())
}

/// What the first trial differs from the second by under a metric; `None` where one of them was not asked.
fn gap_between(sources: &Sources, a: &Entry, b: &Entry, name: &str) -> Option<Gap> {
    let score = |entry: &Entry| entry.trial.summary.as_ref()?.evaluation(name).cloned();
    let (with, from) = score(a).zip(score(b))?;
    let value = with.value - from.value;
    let paired = sources.items.between([(a.trial, b.trial)], name);
    let both = with.stderr.zip(from.stderr).map(|(a, b)| (a.hypot(b), OF_EACH));
    let (interval, by) = interval(value, paired.as_ref(), both);
    Some(Gap { value, interval, by, said: said(interval, &with.metric) })
}

impl Gap {
    fn to_base(score: &TaskScore, paired: Option<&Paired>) -> Option<Self> {
        let value = score.value - score.base_value?;
        let stderr = score.difference_stderr.map(|stderr| (stderr, OF_PAIRS));
        let (interval, by) = interval(value, paired, stderr);
        Some(Self { value, interval, by, said: said(interval, &score.metric) })
    }
}

/// The interval of a difference, and how it was found: from its items, or else from a standard error.
fn interval(
    difference: f64,
    paired: Option<&Paired>,
    stderr: Option<(f64, &'static str)>,
) -> (Option<(f64, f64)>, &'static str) {
    match (paired, stderr) {
        (Some(paired), _) => (Some(paired.bootstrap(1)), BOOTSTRAP),
        (None, Some((stderr, by))) => {
            let reach = NORMAL_95 * stderr;
            (Some((difference - reach, difference + reach)), by)
        }
        (None, None) => (None, NONE),
    }
}

/// What a difference with such an interval is.
fn said(interval: Option<(f64, f64)>, metric: &str) -> &'static str {
    let less_is_better = PERPLEXITIES.contains(&metric);
    match interval {
        Some((low, high)) if low > 0.0 || high < 0.0 => {
            if (low > 0.0) == less_is_better {
                "worse"
            } else {
                "better"
            }
        }
        Some(_) => NO_DIFFERENCE,
        None => NONE,
    }
}

/// Why a trial that was trained was not asked.
fn not_asked(trial: &Trial) -> Option<Line> {
    let why = trial.summary.as_ref()?.unasked.as_ref()?;
    Some(Line::default().strong(&trial.id).text(" was not asked: ").text(why))
}

fn row(score: &TaskScore, mode: &str, trial: String, paired: Option<&Paired>) -> [String; 11] {
    let gap = Gap::to_base(score, paired);
    let interval = gap.as_ref().and_then(|gap| gap.interval);
    [
        score.name(),
        mode.into(),
        trial,
        // A preset's mean is of tasks that have examples of their own.
        if score.metric == MEAN { NONE.into() } else { score.num_fewshot.to_string() },
        score.documents.to_string(),
        or_dash(score.base_value, |value| with_error(value, score.base_stderr)),
        with_error(score.value, score.stderr),
        or_dash(gap.as_ref(), |gap| numbers::signed(gap.value)),
        or_dash(interval, numbers::interval),
        gap.as_ref().map_or(NONE, |gap| gap.by).into(),
        gap.as_ref().map_or(NONE, |gap| gap.said).into(),
    ]
}

/// A value with its standard error.
pub(super) fn with_error(value: f64, stderr: Option<f64>) -> String {
    let stderr = stderr.map_or_else(String::new, |stderr| format!(" ± {stderr:.4}"));
    format!("{value:.4}{stderr}")
}

#[cfg(test)]
mod tests {
    use super::super::Records;
    use super::super::made::{self, float16, four_bit};
    use super::*;

    fn score(metric: &str, value: f64, stderr: Option<f64>) -> TaskScore {
        TaskScore {
            task: "t".into(),
            metric: metric.into(),
            value,
            stderr: Some(0.01),
            base_value: Some(0.5),
            base_stderr: None,
            difference_stderr: stderr,
            num_fewshot: 5,
            documents: 100,
        }
    }

    #[test]
    fn a_difference_that_chance_could_make_is_none() {
        let check = |metric: &str, value: f64, stderr: Option<f64>, interval: &str, by: &str, said: &str| {
            let row = row(&score(metric, value, stderr), "4bit", "3".into(), None);
            assert_eq!(
                [row[8].as_str(), row[9].as_str(), row[10].as_str()],
                [interval, by, said],
                "{metric} {value}"
            );
        };
        check("acc", 0.6, Some(0.01), "+0.0804 to +0.1196", OF_PAIRS, "better");
        check("acc", 0.4, Some(0.01), "−0.1196 to −0.0804", OF_PAIRS, "worse");
        check("acc", 0.51, Some(0.01), "−0.0096 to +0.0296", OF_PAIRS, NO_DIFFERENCE);
        check("bits_per_byte", 0.6, Some(0.01), "+0.0804 to +0.1196", OF_PAIRS, "worse");
        check("word_perplexity", 0.4, None, NONE, NONE, NONE);
        check("acc", 0.5, Some(0.0), "+0.0000 to +0.0000", OF_PAIRS, NO_DIFFERENCE);
        // A mean of tasks has no examples of its own.
        let examples = |metric: &str| row(&score(metric, 0.5, None), "4bit", "3".into(), None)[3].clone();
        assert_eq!([examples("acc"), examples("mean")], ["5", NONE]);
    }

    /// The rows of its tables, of a trial in 16 bits and one in 4 bits of which these items are right, of a hundred.
    fn rows(right: [usize; 2], kept: bool) -> Vec<String> {
        let mut trials = [
            made::measured(1, float16(2, 16, 512), 28.0, 5.0),
            made::measured(2, four_bit(2, 16, 512), 7.0, 3.0),
        ];
        let both = trials.iter_mut().zip(right);
        let mut items: Vec<_> = both.map(|(trial, right)| made::answered(trial, "t", right, 100)).collect();
        if !kept {
            items.clear();
        }
        let sweep = made::sweep();
        let sources = Sources::of(Records { sweep: &sweep, trials: &trials, curves: &[], items: &items });
        let tables = blocks(&sources).into_iter().filter_map(|block| match block {
            Block::Table(table) => Some(table.rows),
            _ => None,
        });
        let cells = |cells: &[Line]| cells[4..].iter().map(Line::plain).collect::<Vec<_>>().join(" | ");
        tables.flatten().map(|row| cells(&row.cells)).collect()
    }

    #[test]
    fn what_was_left_out_is_told() {
        let mut trials = [
            made::measured(1, float16(2, 16, 512), 28.0, 5.0),
            made::measured(2, four_bit(2, 16, 512), 7.0, 3.0),
            made::measured(3, four_bit(4, 16, 512), 8.0, 3.0),
        ];
        let both = trials[..2].iter_mut();
        let items: Vec<_> = both.map(|trial| made::answered(trial, "t", 60, 100)).collect();
        for trial in &mut trials[..2] {
            trial.summary.as_mut().unwrap().items = Some("somewhere".into());
        }
        let sweep = made::sweep();
        let said = |items: &[_]| -> Vec<String> {
            let sources = Sources::of(Records { sweep: &sweep, trials: &trials, curves: &[], items });
            let blocks = blocks(&sources).into_iter().filter_map(|block| match block {
                Block::Warning(line) => Some(line.plain()),
                _ => None,
            });
            blocks.collect()
        };
        assert_eq!(said(&items), Vec::<String>::new());
        let [said] = said(&items[..1]).try_into().unwrap();
        assert!(said.starts_with("What single documents made of 1 of 2 trials was left out"), "{said}");
    }

    /// The best of a mode may be one that was not asked.
    #[test]
    fn the_best_of_those_that_were_asked_is_shown() {
        let mut trials = [
            made::measured(1, four_bit(2, 16, 512), 7.0, 3.0),
            made::measured(2, four_bit(4, 16, 512), 8.0, 3.0),
            made::measured(3, four_bit(8, 16, 512), 9.0, 3.0),
        ];
        for (trial, loss) in trials.iter_mut().zip([2.0, 1.0, 1.5]) {
            trial.eval_loss = Some(loss);
        }
        let items: Vec<_> =
            [0, 2].into_iter().map(|i: usize| made::answered(&mut trials[i], "t", 60, 100)).collect();
        let sweep = made::sweep();
        let sources = Sources::of(Records { sweep: &sweep, trials: &trials, curves: &[], items: &items });
        let blocks = blocks(&sources);
        let table = blocks.iter().find_map(|block| match block {
            Block::Table(table) => Some(table),
            _ => None,
        });
        assert_eq!(table.unwrap().rows[0].cells[2].plain(), "3");
    }

    /// Of items of which nothing is kept, what is known of their mean says how sure it is.
    #[test]
    fn adapters_are_held_against_their_base_and_each_other() {
        assert_eq!(
            rows([60, 62], false),
            [
                "100 | 0.5000 | 0.6200 ± 0.0100 | +0.1200 | +0.0808 to +0.1592 | normal, paired | better",
                "100 | 0.5000 | 0.6000 ± 0.0100 | +0.1000 | +0.0608 to +0.1392 | normal, paired | better",
                "+0.0200 | −0.0077 to +0.0477 | normal, unpaired | no difference shown",
            ]
        );
        let same = rows([60, 60], true);
        assert_eq!(same[2], "+0.0000 | +0.0000 to +0.0000 | paired bootstrap | no difference shown");
        let kept = rows([60, 80], true);
        for (row, difference, verdict) in
            [(0, "+0.3000", "better"), (1, "+0.1000", "better"), (2, "+0.2000", "better")]
        {
            let row = &kept[row];
            assert!(
                row.contains(&format!("{difference} | +0."))
                    && row.ends_with(&format!("paired bootstrap | {verdict}")),
                "{row}"
            );
        }
        // Two of a hundred items: those that 4 bits alone had right may be chance.
        assert!(rows([60, 62], true)[2].ends_with("paired bootstrap | no difference shown"));
    }
}
