//! Whether the best of the trials that were run again differs from the others, and from the base, by more than seeds and
//! items do.

use super::numbers::{self, NONE, or_dash};
use super::paired::{Items, Paired};
use super::replicates::{Finalist, Run, mean, score, variance};
use super::statistics::{Estimate, bootstrap, holds_zero};
use domain::metric;
use domain::sweep::{Goal, SearchSpec};
use domain::trial::{TaskScore, Trial};

/// What is said of two that have fewer than two seeds in common.
const TOO_FEW: &str = "too few runs of the same seed";

/// What two things differ by in a run, and the variance of that over a task's items where it is known.
type Pair = (f64, Option<f64>);

/// What two things differ by, run by run.
pub(super) struct Difference {
    metric: String,
    of: String,
    pub(super) from: String,
    goal: Goal,
    /// Of each run.
    values: Vec<f64>,
    /// The variance of their mean over a task's items; `None` where that is not known.
    items: Option<f64>,
    /// What they differ by item by item, where that is kept of all runs.
    paired: Option<Paired>,
    /// Comparisons that are made together, this one among them.
    comparisons: usize,
    /// Whether a run is among them that was chosen for its value.
    chosen: bool,
    /// Their mean; `None` of fewer than two.
    estimate: Option<Estimate>,
}

/// The best finalist's differences from the others, run by run of the same seed; none while it has no mean. `finalists` have
/// the best mean first.
pub(super) fn from_others(search: &SearchSpec, finalists: &[Finalist], items: &Items) -> Vec<Difference> {
    let Some((best, others)) = finalists.split_first().filter(|(best, _)| best.value.is_some()) else {
        return Vec::new();
    };
    // Where nothing is kept of single items, the two errors are taken as independent: what items have in common for both
    // would make the interval narrower.
    let pair = |a: &Run, b: &Run| -> Pair {
        let of = |trial| variance(score(trial, &search.metric)?.stderr);
        (a.1 - b.1, of(a.0).zip(of(b.0)).map(|(a, b)| a + b))
    };
    let pairs = |other: &Finalist| -> (Vec<Pair>, Option<Paired>) {
        let same_seed = || best.runs.iter().filter_map(|(seed, run)| Some((run, other.runs.get(seed)?)));
        let paired = items.between(same_seed().map(|(a, b)| (a.0, b.0)), &search.metric);
        (same_seed().map(|(a, b)| pair(a, b)).collect(), paired)
    };
    let pairs: Vec<_> = others.iter().map(|other| (named(other.trial), pairs(other))).collect();
    let comparisons = pairs.iter().filter(|(_, (pairs, _))| pairs.len() > 1).count();
    let named = named(best.trial);
    let difference = |(from, (pairs, paired)): (String, (Vec<Pair>, _))| {
        Difference::of(&search.metric, search.goal, (named.clone(), from), &pairs, paired, comparisons)
    };
    pairs.into_iter().map(difference).collect()
}

/// A finalist's differences from its base, which each run has measured on its own rows, and by every task.
pub(super) fn against_base(finalist: &Finalist, items: &Items) -> Vec<Difference> {
    let difference = |name: String, of_run: &dyn Fn(&Trial) -> Option<Pair>| {
        let known = finalist.runs.values().filter_map(|(trial, _)| Some((*trial, of_run(trial)?)));
        let (trials, pairs): (Vec<_>, Vec<_>) = known.unzip();
        let (paired, named) = (items.against_base(trials, &name), (named(finalist.trial), "its base".into()));
        let difference = Difference::of(&name, metric::goal(&name), named, &pairs, paired, 1);
        // Its first run is one that was chosen for being good.
        difference.estimate.map(|_| Difference { chosen: true, ..difference })
    };
    let loss = |trial: &Trial| {
        let base = trial.summary.as_ref()?.base_eval_loss?;
        Some((trial.recorded(metric::EVAL_LOSS)? - base, None)).filter(|(value, _)| value.is_finite())
    };
    let names = finalist.trial.summary.iter().flat_map(|s| s.evaluations.iter().map(TaskScore::name));
    let of_task = |name: String| {
        difference(name.clone(), &|trial| {
            let score = score(trial, &name)?;
            Some((score.value - score.base_value?, over_items(score)))
        })
    };
    difference(metric::EVAL_LOSS.into(), &loss).into_iter().chain(names.filter_map(of_task)).collect()
}

/// The variance over items of what an adapter and its base differ by. Where that of the pairs is not known, both are taken as
/// independent, which makes it too large rather than too small.
fn over_items(score: &TaskScore) -> Option<f64> {
    let of_both = || Some(variance(score.stderr)? + variance(score.base_stderr)?);
    variance(score.difference_stderr).or_else(of_both)
}

impl Difference {
    fn of(
        metric: &str,
        goal: Goal,
        (of, from): (String, String),
        pairs: &[Pair],
        paired: Option<Paired>,
        comparisons: usize,
    ) -> Self {
        let values: Vec<_> = pairs.iter().map(|(value, _)| *value).collect();
        let items = paired.as_ref().and_then(Paired::variance);
        let items = items.or_else(|| mean(pairs.iter().filter_map(|(_, items)| *items)));
        let estimate = Estimate::of(&values, items.unwrap_or_default(), comparisons);
        let metric = metric.to_owned();
        Self { metric, of, from, goal, values, items, paired, comparisons, chosen: false, estimate }
    }

    /// Whether the two may be as good as each other.
    pub(super) fn is_none(&self) -> bool {
        self.verdict().is_none()
    }

    /// What it says: `trial 2 is better than trial 5`, or that nothing is shown.
    pub(super) fn said(&self) -> String {
        let Self { metric, of, from, .. } = self;
        let what = match self.verdict() {
            Some(verdict) => format!("{of} is {verdict} than {from}"),
            None => format!("no difference shown between {of} and {from}"),
        };
        let Some(Estimate { runs, mean, interval, .. }) = self.estimate else {
            return format!("{what}: {TOO_FEW}");
        };
        let adjusted = match self.comparisons {
            ..=1 => String::new(),
            several => format!(", adjusted for {several} comparisons,"),
        };
        let (mean, interval) = (numbers::signed(mean), or_dash(interval, numbers::interval));
        format!("{what}: {metric} {mean}, 95 % interval {interval}{adjusted} over {runs} seeds")
    }

    /// `better` or `worse`; `None` where 0 is among what the difference may be, or too little is known.
    fn verdict(&self) -> Option<&'static str> {
        let estimate =
            self.estimate.filter(|estimate| estimate.interval.is_some_and(|of| !holds_zero(of)))?;
        Some(if self.goal.better(estimate.mean, 0.0) { "better" } else { "worse" })
    }

    /// Its row: metric, of, from, seeds, difference, interval, bootstrap, what the error is of, what it says.
    pub(super) fn row(&self) -> [String; 9] {
        let Self { metric, of, from, values, items, paired, estimate, .. } = self;
        let drawn = || match paired {
            Some(paired) => Some(paired.bootstrap(self.comparisons)),
            None => bootstrap(values, items.unwrap_or_default(), self.comparisons),
        };
        let said = match (self.verdict(), estimate) {
            (Some(verdict), _) if self.chosen => format!("{verdict}; its first run was chosen"),
            (Some(verdict), _) => verdict.into(),
            (None, Some(_)) => "no difference shown".into(),
            (None, None) => TOO_FEW.into(),
        };
        let of_what = match (estimate, paired, items) {
            (None, ..) => NONE,
            (Some(_), Some(_), _) => "seeds and paired items",
            (Some(_), None, Some(_)) => "seeds and items",
            (Some(_), None, None) => "seeds alone",
        };
        [
            metric.clone(),
            of.clone(),
            from.clone(),
            values.len().to_string(),
            or_dash(*estimate, |estimate| numbers::signed(estimate.mean)),
            or_dash(estimate.and_then(|estimate| estimate.interval), numbers::interval),
            or_dash(estimate.and_then(|_| drawn()), numbers::interval),
            of_what.into(),
            said,
        ]
    }
}

/// `trial 7`.
fn named(trial: &Trial) -> String {
    format!("trial {}", or_dash(trial.id.number(), |number| number.to_string()))
}
