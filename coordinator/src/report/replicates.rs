//! What the runs of the best trials with other seeds say: the mean of each, and whether the best differs from the others
//! and from the base by more than seeds and items do.

use super::Sources;
use super::document::{Block, Line, Table};
use super::numbers::{self, or_dash};
use super::series::Entry;
use super::statistics::Estimate;
use domain::metric;
use domain::sweep::Goal;
use domain::trial::{TaskScore, Trial, TrialState};
use std::collections::BTreeMap;
use std::iter;

/// A run of a finalist that came to its end: the trial, and its value of the sweep's metric.
type Run<'a> = (&'a Trial, f64);

/// A trial that was run again, and came to its end at least twice.
pub(super) struct Finalist<'a> {
    /// Its first run, which the search proposed.
    pub(super) trial: &'a Trial,
    /// Its mean over runs by the sweep's metric.
    pub(super) value: Estimate,
    /// By their seeds.
    runs: BTreeMap<u64, Run<'a>>,
    /// Runs that were begun.
    begun: usize,
}

/// What two things differ by, run by run.
pub(super) struct Difference {
    metric: String,
    of: String,
    pub(super) from: String,
    estimate: Estimate,
    goal: Goal,
}

/// The finalists, the best mean first.
pub(super) fn finalists<'a>(sources: &'a Sources<'a>) -> Vec<Finalist<'a>> {
    let metric = sources.sweep.spec.search.metric.as_str();
    let goal = sources.sweep.spec.search.goal;
    let finalist = |first: &'a Entry<'a>| {
        let trial = first.trial;
        let again =
            sources.replicates.iter().filter(|run| run.trial.replicate_of.as_ref() == Some(&trial.id));
        let begun = 1 + again.clone().count();
        let ended = iter::once(first).chain(again).filter(|run| run.trial.state == TrialState::Completed);
        let runs: BTreeMap<_, _> =
            ended.filter_map(|run| Some((run.trial.config.seed, (run.trial, run.value?)))).collect();
        let values: Vec<_> = runs.values().map(|(_, value)| *value).collect();
        let items = mean(runs.values().filter_map(|(run, _)| variance(score(run, metric)?.stderr)));
        Some(Finalist { trial, value: Estimate::of(&values, items)?, runs, begun })
    };
    let mut finalists: Vec<_> = sources.entries.iter().filter_map(finalist).collect();
    let better = |a: &Finalist, b: &Finalist| goal.better(a.value.mean, b.value.mean);
    finalists.sort_by(|a, b| better(b, a).cmp(&better(a, b)));
    finalists
}

/// The best finalist's differences from the others, run by run of the same seed.
pub(super) fn from_others(sources: &Sources, finalists: &[Finalist]) -> Vec<Difference> {
    let Some((best, others)) = finalists.split_first() else { return Vec::new() };
    let search = &sources.sweep.spec.search;
    let difference = |other: &Finalist| {
        let pairs: Vec<_> =
            best.runs.iter().filter_map(|(seed, run)| Some((run, other.runs.get(seed)?))).collect();
        let values: Vec<_> = pairs.iter().map(|((_, a), (_, b))| a - b).collect();
        // Nothing is kept of single items, so that the two errors are taken as independent: what items have in common for
        // both would make the interval narrower.
        let of_pair = |(a, b): &(&Run, &Run)| {
            let of = |trial| variance(score(trial, &search.metric)?.stderr);
            Some(of(a.0)? + of(b.0)?)
        };
        Some(Difference {
            metric: search.metric.clone(),
            of: named(best.trial),
            from: named(other.trial),
            estimate: Estimate::of(&values, mean(pairs.iter().filter_map(of_pair)))?,
            goal: search.goal,
        })
    };
    others.iter().filter_map(difference).collect()
}

/// A finalist's differences from its base, which each run has measured on its own rows, and by every task.
fn from_base(finalist: &Finalist) -> Vec<Difference> {
    let runs = || finalist.runs.values().map(|(trial, _)| *trial);
    let difference = |name: &str, each: &dyn Fn(&Trial) -> Option<(f64, f64)>| {
        let each: Vec<_> = runs().filter_map(each).collect();
        let values: Vec<_> = each.iter().map(|(difference, _)| *difference).collect();
        Some(Difference {
            metric: name.into(),
            of: named(finalist.trial),
            from: "its base".into(),
            estimate: Estimate::of(&values, mean(each.iter().map(|(_, items)| *items)))?,
            goal: metric::goal(name),
        })
    };
    let loss = |trial: &Trial| {
        let base = trial.summary.as_ref()?.base_eval_loss?;
        Some((trial.recorded(metric::EVAL_LOSS)? - base, 0.0)).filter(|(value, _)| value.is_finite())
    };
    let names = finalist.trial.summary.iter().flat_map(|s| s.evaluations.iter().map(TaskScore::name));
    let of_task = |name: String| {
        difference(&name, &|trial| {
            let score = score(trial, &name)?;
            Some((score.value - score.base_value?, variance(score.difference_stderr).unwrap_or_default()))
        })
    };
    difference(metric::EVAL_LOSS, &loss).into_iter().chain(names.filter_map(of_task)).collect()
}

impl Difference {
    /// Whether the two may be as good as each other.
    pub(super) fn is_none(&self) -> bool {
        self.estimate.holds_zero()
    }

    /// What it says: `trial 2 is better than trial 5`, or that nothing is shown.
    pub(super) fn said(&self) -> String {
        let Self { metric, of, from, estimate: Estimate { runs, mean, interval, .. }, .. } = self;
        let what = match self.verdict() {
            Some(verdict) => format!("{of} is {verdict} than {from}"),
            None => format!("no difference shown between {of} and {from}"),
        };
        format!("{what}: {metric} {mean:+.4}, 95 % interval {} over {runs} seeds", signed(*interval))
    }

    /// `better` or `worse`; `None` where 0 is among what the difference may be.
    fn verdict(&self) -> Option<&'static str> {
        let better = self.goal.better(self.estimate.mean, 0.0);
        (!self.estimate.holds_zero()).then_some(if better { "better" } else { "worse" })
    }

    fn row(&self) -> [String; 8] {
        let Self { metric, of, from, estimate, .. } = self;
        [
            metric.clone(),
            of.clone(),
            from.clone(),
            estimate.runs.to_string(),
            format!("{:+.4}", estimate.mean),
            signed(estimate.interval),
            signed(estimate.bootstrap),
            self.verdict().unwrap_or("no difference shown").into(),
        ]
    }
}

/// The section: the finalists' means, and their differences.
pub(super) fn blocks(sources: &Sources) -> Vec<Block> {
    let finalists = finalists(sources);
    let Some(best) = finalists.first() else { return Vec::new() };
    let metric = &sources.sweep.spec.search.metric;
    let mut means = Table::new([
        "trial".to_string(),
        "runs".to_string(),
        format!("{metric}, first run"),
        "mean over runs".to_string(),
        "95 % interval".to_string(),
        "standard deviation".to_string(),
    ]);
    for Finalist { trial, value, runs, begun } in &finalists {
        let ended =
            if value.runs == *begun { begun.to_string() } else { format!("{} of {begun}", value.runs) };
        let first = runs.get(&trial.config.seed).map(|(_, value)| *value);
        means.row([
            or_dash(trial.id.number(), |number| number.to_string()),
            ended,
            or_dash(first, numbers::loss),
            numbers::loss(value.mean),
            between(value.interval),
            numbers::loss(value.deviation),
        ]);
    }
    let from_others = from_others(sources, &finalists);
    let said: Vec<_> = from_others.iter().map(|difference| Line::from(capital(&difference.said()))).collect();
    let mut differences = Table::new([
        "metric",
        "of",
        "less that of",
        "seeds",
        "difference",
        "95 % interval",
        "paired bootstrap",
        "so it is",
    ]);
    from_others.iter().chain(&from_base(best)).for_each(|difference| differences.row(difference.row()));
    let mut blocks = vec![Block::Table(means)];
    blocks.extend((!said.is_empty()).then_some(Block::List(said)));
    blocks.extend((!differences.rows.is_empty()).then_some(Block::Table(differences)));
    blocks.push(Block::Note(Line::from(HOW)));
    blocks
}

/// How to read it.
const HOW: &str = "Runs of a trial differ in their seed alone: another initialisation, another order of rows, other dropout and, \
                   where the held-out rows are drawn, others of them. The first run is the one that made it a finalist, so its \
                   value is a little lucky. Differences are taken between runs of the same seed. The intervals are Student's t \
                   over runs, with the error over a task's items added; where one holds 0, chance alone may be what made the \
                   two differ, and no difference is shown. A bootstrap over so few runs is coarse and too narrow; it stands \
                   beside for comparison.";

/// `trial 7`.
fn named(trial: &Trial) -> String {
    format!("trial {}", or_dash(trial.id.number(), |number| number.to_string()))
}

fn score<'a>(trial: &'a Trial, metric: &str) -> Option<&'a TaskScore> {
    trial.summary.as_ref()?.evaluation(metric)
}

fn variance(stderr: Option<f64>) -> Option<f64> {
    stderr.map(|stderr| stderr * stderr).filter(|variance| variance.is_finite())
}

/// The mean of some numbers; 0 of none.
fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0u32), |(sum, count), value| (sum + value, count + 1));
    sum / f64::from(count.max(1))
}

fn between((low, high): (f64, f64)) -> String {
    format!("{} to {}", numbers::loss(low), numbers::loss(high))
}

/// The same of a difference.
fn signed((low, high): (f64, f64)) -> String {
    format!("{low:+.4} to {high:+.4}")
}

/// With a capital letter, and a full stop.
fn capital(sentence: &str) -> String {
    let mut letters = sentence.chars();
    let first: String = letters.next().into_iter().flat_map(char::to_uppercase).collect();
    format!("{first}{}.", letters.as_str())
}

#[cfg(test)]
mod tests {
    use super::super::Records;
    use super::super::made::{self, float16};
    use super::*;
    use domain::sweep::Sweep;

    /// Trials 1, 2, … with these values by their first runs, then their further runs.
    fn runs(values: &[[f64; 3]], tell: impl Fn(&mut Trial, f64)) -> Vec<Trial> {
        let count = values.len() as u32;
        let run = |round: usize, first: u32, value: f64| {
            let number = round as u32 * count + first;
            let mut trial = made::measured(number, float16(2, 16, 512), 28.0, 5.0);
            if round > 0 {
                trial.replicate_of = Some(made::trial(first).id);
                trial.config.seed = 100 + round as u64;
            }
            tell(&mut trial, value);
            trial
        };
        let round =
            |round: usize| (1..).zip(values).map(move |(first, values)| run(round, first, values[round]));
        (0..3).flat_map(round).collect()
    }

    fn by_loss(trial: &mut Trial, value: f64) {
        trial.eval_loss = Some(value);
        if let Some(summary) = &mut trial.summary {
            summary.base_eval_loss = Some(3.0);
        }
    }

    /// The rows of its tables, and its sentences.
    fn said(sweep: &Sweep, trials: &[Trial]) -> Vec<Vec<String>> {
        let sources = Sources::of(Records { sweep, trials, curves: &[] });
        let mut all = Vec::new();
        for block in blocks(&sources) {
            match block {
                Block::Table(table) => {
                    all.extend(table.rows.iter().map(|row| row.cells.iter().map(Line::plain).collect()));
                }
                Block::List(lines) => all.extend(lines.iter().map(|line| vec![line.plain()])),
                _ => {}
            }
        }
        all
    }

    const LOSSES: [[f64; 3]; 3] = [[2.00, 2.04, 2.05], [2.01, 2.02, 2.00], [2.30, 2.33, 2.29]];

    /// Reference for this and the next: the formulas in Python's `statistics`, and the same streams drawn there.
    #[test]
    fn the_best_mean_and_what_it_differs_by() {
        let mut trials = runs(&LOSSES, by_loss);
        let none = "no difference shown";
        assert_eq!(
            said(&made::sweep(), &trials),
            [
                vec!["2", "3", "2.0100", "2.0100", "1.9852 to 2.0348", "0.0100"],
                vec!["1", "3", "2.0000", "2.0300", "1.9643 to 2.0957", "0.0265"],
                vec!["3", "3", "2.3000", "2.3067", "2.2550 to 2.3584", "0.0208"],
                vec![
                    "No difference shown between trial 2 and trial 1: eval/loss -0.0200, 95 % interval -0.0945 to +0.0545 \
                     over 3 seeds."
                ],
                vec![
                    "Trial 2 is better than trial 3: eval/loss -0.2967, 95 % interval -0.3254 to -0.2680 over 3 seeds."
                ],
                vec![
                    "eval/loss",
                    "trial 2",
                    "trial 1",
                    "3",
                    "-0.0200",
                    "-0.0945 to +0.0545",
                    "-0.0500 to +0.0100",
                    none
                ],
                vec![
                    "eval/loss",
                    "trial 2",
                    "trial 3",
                    "3",
                    "-0.2967",
                    "-0.3254 to -0.2680",
                    "-0.3100 to -0.2900",
                    "better"
                ],
                vec![
                    "eval/loss",
                    "trial 2",
                    "its base",
                    "3",
                    "-0.9900",
                    "-1.0148 to -0.9652",
                    "-1.0000 to -0.9800",
                    "better"
                ],
            ]
        );
        // A run that failed is none, and one run alone says nothing.
        trials[8].state = TrialState::Diverged;
        trials[7].state = TrialState::Diverged;
        trials[4].state = TrialState::Diverged;
        let said = said(&made::sweep(), &trials);
        assert_eq!(said[..2].iter().map(|row| row[..2].join(" ")).collect::<Vec<_>>(), ["1 3", "3 2 of 3"]);
        trials.truncate(3);
        assert!(self::said(&made::sweep(), &trials).is_empty(), "nothing was run again");
    }

    #[test]
    fn items_are_a_sample_too() {
        let mut sweep = made::sweep();
        sweep.spec.search.metric = metric::of_task("arc_easy", "acc");
        sweep.spec.search.goal = Goal::Maximize;
        let trials = runs(&[[0.40, 0.41, 0.45], [0.50, 0.54, 0.52]], |trial, value| {
            let score = TaskScore {
                task: "arc_easy".into(),
                metric: "acc".into(),
                value,
                stderr: Some(0.02),
                base_value: Some(0.39),
                base_stderr: Some(0.02),
                difference_stderr: Some(0.015),
                num_fewshot: 0,
                documents: 570,
            };
            if let Some(summary) = &mut trial.summary {
                summary.evaluations = vec![score];
            }
        });
        let said = said(&sweep, &trials);
        assert_eq!(said[0], ["2", "3", "0.5000", "0.5200", "0.4729 to 0.5671", "0.0200"]);
        assert_eq!(said[1], ["1", "3", "0.4000", "0.4200", "0.3660 to 0.4740", "0.0265"]);
        let name = "eval/arc_easy/acc";
        assert_eq!(
            said[3..],
            [
                [
                    name,
                    "trial 2",
                    "trial 1",
                    "3",
                    "+0.1000",
                    "+0.0318 to +0.1682",
                    "+0.0385 to +0.1614",
                    "better"
                ],
                [
                    name,
                    "trial 2",
                    "its base",
                    "3",
                    "+0.1300",
                    "+0.0894 to +0.1706",
                    "+0.0952 to +0.1644",
                    "better"
                ],
            ]
        );
    }

    #[test]
    fn a_recommendation_goes_by_means() {
        let trials = runs(&LOSSES, by_loss);
        let sweep = made::sweep();
        let sources = Sources::of(Records { sweep: &sweep, trials: &trials, curves: &[] });
        assert_eq!(sources.entries.len(), 3, "further runs are no trials of the search");
        let said = super::super::recommendation::recommendations(&sources);
        assert_eq!(
            said[0].plain(),
            "The best: trial 2. Its eval/loss of 2.0100 is the mean of its 3 runs with different seeds, the best of 3 such \
             means; it took $1.00. No difference shown from trial 1."
        );
    }
}
