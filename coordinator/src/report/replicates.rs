//! What the runs of the best trials with other seeds say: the mean of each, and the section that tells of them.

use super::Sources;
use super::differences;
use super::document::{Block, Line, Table};
use super::numbers::{self, or_dash};
use super::series::Entry;
use super::statistics::Estimate;
use domain::TrialId;
use domain::sweep::Sweep;
use domain::trial::{TaskScore, Trial, TrialState};
use std::collections::BTreeMap;
use std::iter;

/// A run of a finalist that came to its end: the trial, and its value of the sweep's metric.
pub(super) type Run<'a> = (&'a Trial, f64);

/// A trial that was run again.
pub(super) struct Finalist<'a> {
    /// Its first run, which the search proposed.
    pub(super) trial: &'a Trial,
    /// Its mean over the runs that came to their end by the sweep's metric; `None` of fewer than two.
    pub(super) value: Option<Estimate>,
    /// Those runs, by their seeds.
    pub(super) runs: BTreeMap<u64, Run<'a>>,
    /// Runs that there are.
    begun: usize,
    /// Those of them that are over without a value.
    failed: usize,
}

impl Finalist<'_> {
    /// Which of its runs its mean lacks: `; 1 of its 3 runs did not complete`, or nothing.
    pub(super) fn lacks(&self) -> String {
        let open = self.begun - self.failed - self.runs.len();
        let of = |count: usize, what: &str| match count {
            0 => String::new(),
            count => format!("; {count} of its {} runs {what}", self.begun),
        };
        of(self.failed, "did not complete") + &of(open, "not over yet")
    }
}

/// The trials that were run again, the best mean first; those without one last, the best first run first.
pub(super) fn finalists<'a>(
    sweep: &Sweep,
    entries: &[Entry<'a>],
    replicates: &[Entry<'a>],
) -> Vec<Finalist<'a>> {
    let (metric, goal) = (sweep.spec.search.metric.as_str(), sweep.spec.search.goal);
    let mut again: BTreeMap<&TrialId, Vec<&Entry>> = BTreeMap::new();
    for run in replicates {
        if let Some(of) = &run.trial.replicate_of {
            again.entry(of).or_default().push(run);
        }
    }
    let finalist = |first: &Entry<'a>| {
        let again = again.get(&first.trial.id)?;
        let all = || iter::once((first.trial, first.value)).chain(again.iter().map(|e| (e.trial, e.value)));
        let ended = all().filter(|(trial, _)| trial.state == TrialState::Completed);
        let runs: BTreeMap<_, _> =
            ended.filter_map(|(trial, value)| Some((trial.config.seed, (trial, value?)))).collect();
        let values: Vec<_> = runs.values().map(|(_, value)| *value).collect();
        let items = mean(runs.values().filter_map(|(run, _)| variance(score(run, metric)?.stderr)));
        let over = all().filter(|(trial, _)| trial.state.is_terminal()).count();
        Some(Finalist {
            trial: first.trial,
            value: Estimate::of(&values, items.unwrap_or_default(), 1),
            failed: over - runs.len(),
            begun: all().count(),
            runs,
        })
    };
    let mut finalists: Vec<_> = entries.iter().filter_map(finalist).collect();
    let rank = |finalist: &Finalist| finalist.value.map_or(f64::NAN, |value| value.mean);
    finalists.sort_by(|a, b| {
        let (x, y) = (rank(a), rank(b));
        goal.better(y, x).cmp(&goal.better(x, y))
    });
    finalists
}

/// The section: the finalists' means, and their differences.
pub(super) fn blocks(sources: &Sources) -> Vec<Block> {
    let Some(best) = sources.finalists.first() else { return Vec::new() };
    let metric = &sources.sweep.spec.search.metric;
    let mut means = Table::new([
        "trial".to_string(),
        "runs".to_string(),
        format!("{metric}, first run"),
        "mean over runs".to_string(),
        "95 % interval".to_string(),
        "standard deviation".to_string(),
    ]);
    for Finalist { trial, value, runs, begun, .. } in &sources.finalists {
        let ended =
            if runs.len() == *begun { begun.to_string() } else { format!("{} of {begun}", runs.len()) };
        let first = runs.get(&trial.config.seed).map(|(_, value)| *value);
        means.row([
            or_dash(trial.id.number(), |number| number.to_string()),
            ended,
            or_dash(first, numbers::loss),
            or_dash(*value, |value| numbers::loss(value.mean)),
            or_dash(value.and_then(|value| value.interval), between),
            or_dash(*value, |value| numbers::loss(value.deviation)),
        ]);
    }
    let said: Vec<_> =
        sources.differences.iter().map(|difference| Line::from(capital(&difference.said()))).collect();
    let mut differences = Table::new([
        "metric",
        "of",
        "less that of",
        "seeds",
        "difference",
        "95 % interval",
        "paired bootstrap",
        "error of",
        "so it is",
    ]);
    let against_base = differences::against_base(best, &sources.items);
    sources.differences.iter().chain(&against_base).for_each(|difference| differences.row(difference.row()));
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
                   over runs, with the error over a task's items added where it is known; where one holds 0, chance alone may be \
                   what made the two differ, and no difference is shown. Those from several finalists are wider, adjusted for the \
                   number of comparisons, since the best of many is the best by chance too. Where what each item made of both is kept, \
                   their difference is taken item by item (paired items), and the bootstrap draws runs and items; else it draws runs, \
                   and a normal error of items. Over so few runs it is coarse and too narrow; it stands beside for comparison.";

pub(super) fn score<'a>(trial: &'a Trial, metric: &str) -> Option<&'a TaskScore> {
    trial.summary.as_ref()?.evaluation(metric)
}

/// The square of a standard error that is known.
pub(super) fn variance(stderr: Option<f64>) -> Option<f64> {
    stderr.map(|stderr| stderr * stderr).filter(|variance| variance.is_finite())
}

/// The mean of some numbers; `None` of none.
pub(super) fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, count) = values.fold((0.0, 0u32), |(sum, count), value| (sum + value, count + 1));
    (count > 0).then(|| sum / f64::from(count))
}

fn between((low, high): (f64, f64)) -> String {
    format!("{} to {}", numbers::loss(low), numbers::loss(high))
}

/// With a capital letter, and a full stop.
fn capital(sentence: &str) -> String {
    let mut letters = sentence.chars();
    let first: String = letters.next().into_iter().flat_map(char::to_uppercase).collect();
    format!("{first}{}.", letters.as_str())
}

#[cfg(test)]
mod tests;
