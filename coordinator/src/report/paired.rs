//! Differences document by document, of two adapters that were asked the same or of one and its base: how sure they are,
//! by the paired bootstrap over runs and items. Pure, and the same each time.
//!
//! A pair of runs of the same seed differs by d(i) on item i. All runs are asked the same items, so runs and items cross:
//! a resample draws as many runs as there are, and as many items, each with replacement, and takes the mean of d over both
//! (Efron and Tibshirani 1993, chapter 13; Owen 2007, The Annals of Applied Statistics 1(2), for both at once). Of a mean of
//! tasks, the items of each task are drawn apart. The interval is between percentiles of these means.

use super::statistics;
use domain::TrialId;
use domain::rng;
use domain::trial::{ItemScores, Trial};
use std::collections::BTreeMap;

/// Times that runs and items are drawn anew.
const RESAMPLES: usize = 2_000;

/// What is kept of single documents.
#[derive(Debug)]
pub(super) struct Items<'a>(BTreeMap<&'a TrialId, &'a [ItemScores]>);

/// What two things differ by on the documents of a task: what these are, and the difference of each.
type OfTask<'a> = (&'a str, Vec<f32>);

/// What two things differ by on each item, in each of some pairs of runs.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Paired {
    /// Pairs of runs.
    runs: usize,
    /// Of each task that their metric is a mean of: what they differ by, item after item, of each that of all runs.
    tasks: Vec<Vec<f32>>,
}

impl<'a> Items<'a> {
    /// Of trials.
    pub(super) fn of(kept: &'a [(TrialId, Vec<ItemScores>)]) -> Self {
        Self(kept.iter().map(|(trial, items)| (trial, items.as_slice())).collect())
    }

    /// What pairs of trials differ by under a metric, the first of each less the second; `None` unless all of them were
    /// asked the same, and that is kept.
    pub(super) fn between<'t>(
        &self,
        pairs: impl IntoIterator<Item = (&'t Trial, &'t Trial)>,
        metric: &str,
    ) -> Option<Paired> {
        let of_pair = |(a, b): (&Trial, &Trial)| -> Option<Vec<OfTask<'a>>> {
            let (a, b) = (self.tasks(a, metric)?, self.tasks(b, metric)?);
            if !a.iter().map(|task| &task.asked).eq(b.iter().map(|task| &task.asked)) {
                return None;
            }
            let both = a.into_iter().zip(b);
            both.map(|(a, b)| of_task(&a.asked, &a.scores, &b.scores)).collect()
        };
        Paired::of(pairs.into_iter().map(of_pair).collect::<Option<_>>()?)
    }

    /// What trials and the base, as each of them found it, differ by under a metric.
    pub(super) fn against_base<'t>(
        &self,
        trials: impl IntoIterator<Item = &'t Trial>,
        metric: &str,
    ) -> Option<Paired> {
        let of_trial = |trial| -> Option<Vec<OfTask<'a>>> {
            let tasks = self.tasks(trial, metric)?.into_iter();
            tasks.map(|task| of_task(&task.asked, &task.scores, &task.base)).collect()
        };
        Paired::of(trials.into_iter().map(of_trial).collect::<Option<_>>()?)
    }

    /// A trial's scores under a metric, or under those that it is the mean of.
    fn tasks(&self, trial: &Trial, metric: &str) -> Option<Vec<&'a ItemScores>> {
        let of_trial = self.0.get(&trial.id)?;
        let find = |name: &str| of_trial.iter().find(|items| items.metric == name);
        let found = find(metric)?;
        match found.parts.as_slice() {
            [] => Some(vec![found]),
            parts => parts.iter().map(|part| find(part).filter(|part| part.parts.is_empty())).collect(),
        }
    }
}

/// What two things differ by on the documents of a task; `None` if they have not as many, or none.
fn of_task<'a>(asked: &'a str, a: &[u8], b: &[u8]) -> Option<OfTask<'a>> {
    let difference = |(a, b): (&u8, &u8)| (f32::from(*a) - f32::from(*b)) / 255.0;
    let pairs = a.iter().zip(b);
    (!a.is_empty() && a.len() == b.len()).then(|| (asked, pairs.map(difference).collect()))
}

impl Paired {
    /// Of pairs of runs, each with its tasks; `None` of none, or unless all are of the same documents.
    fn of<'a>(runs: Vec<Vec<OfTask<'a>>>) -> Option<Self> {
        let first = runs.first().filter(|tasks| !tasks.is_empty())?;
        let documents = |run: &[OfTask<'a>]| -> Vec<_> {
            run.iter().map(|(asked, differences)| (*asked, differences.len())).collect()
        };
        if runs.iter().any(|run| documents(run) != documents(first)) {
            return None;
        }
        let of_task = |task: usize| -> Vec<f32> {
            let items = 0..first[task].1.len();
            items.flat_map(|item| runs.iter().map(move |run| run[task].1[item])).collect()
        };
        Some(Self { runs: runs.len(), tasks: (0..first.len()).map(of_task).collect() })
    }

    /// Items in all.
    pub(super) fn items(&self) -> usize {
        self.tasks.iter().map(|task| task.len() / self.runs).sum()
    }

    /// The variance, over items, of the mean of all: that of each task's mean over runs is the sample's, by its items.
    /// `None` if a task has but one.
    pub(super) fn variance(&self) -> Option<f64> {
        let of_task = |task: &Vec<f32>| {
            let means: Vec<_> = task.chunks(self.runs).map(|item| sum(item) / self.runs as f64).collect();
            let (n, mean) = (means.len() as f64, means.iter().sum::<f64>() / means.len() as f64);
            let squares: f64 = means.iter().map(|value| (value - mean).powi(2)).sum();
            (n > 1.0).then(|| squares / (n - 1.0) / n)
        };
        let sum: f64 = self.tasks.iter().map(of_task).sum::<Option<_>>()?;
        Some(sum / (self.tasks.len() as f64).powi(2))
    }

    /// The percentile interval of the mean of all, of one of so many `comparisons`.
    pub(super) fn bootstrap(&self, comparisons: usize) -> (f64, f64) {
        let (of_runs, of_items) =
            (rng::key(0, "bootstrap/paired/runs"), rng::key(0, "bootstrap/paired/items"));
        let mut drawn = 0..;
        let mut weights = vec![0.0; self.runs];
        let mean = |sample: usize| {
            weights.fill(0.0);
            for run in 0..self.runs {
                let place = (sample * self.runs + run) as u64;
                weights[pick(rng::bits(of_runs, place), self.runs)] += 1.0 / self.runs as f64;
            }
            let of_task = |task: &Vec<f32>| {
                let items = task.len() / self.runs;
                let item = |place: u64| {
                    let at = pick(rng::bits(of_items, place), items) * self.runs;
                    let runs = task[at..at + self.runs].iter().zip(&weights);
                    runs.map(|(value, weight)| f64::from(*value) * weight).sum::<f64>()
                };
                drawn.by_ref().take(items).map(item).sum::<f64>() / items as f64
            };
            self.tasks.iter().map(of_task).sum::<f64>() / self.tasks.len() as f64
        };
        statistics::percentiles((0..RESAMPLES).map(mean).collect(), comparisons)
    }
}

/// A number below `n` from 64 random bits, each as likely as the others but for `n` in 2³².
fn pick(bits: u64, n: usize) -> usize {
    (((bits >> 32) * n as u64) >> 32) as usize
}

fn sum(values: &[f32]) -> f64 {
    values.iter().copied().map(f64::from).sum()
}

#[cfg(test)]
mod tests;
