//! Differences document by document, of two adapters that were asked the same or of one and its base: how sure they are,
//! by the paired bootstrap over runs and items. Pure, and the same each time.
//!
//! A pair of runs of the same seed differs by d(i) on item i. All runs are asked the same items, so runs and items cross:
//! a resample draws as many runs as there are, and as many items, each with replacement, and takes the mean of d over both
//! (Efron and Tibshirani 1993, chapter 13; Owen 2007, The Annals of Applied Statistics 1(2), for both at once). Of a mean of
//! tasks, the items of each task are drawn apart. The interval is between percentiles of these means. A perplexity is no mean
//! of items: of each resample it is computed anew, of both sides, from the texts that were drawn.

use super::statistics;
use domain::TrialId;
use domain::metric;
use domain::rng;
use domain::trial::{ItemScores, TextScores, Trial};
use std::collections::BTreeMap;
use std::f64::consts::LN_2;

/// Times that runs and items are drawn anew.
const RESAMPLES: usize = 2_000;

/// What is kept of single documents.
#[derive(Debug)]
pub(super) struct Items<'a>(BTreeMap<&'a TrialId, &'a [ItemScores]>);

/// What two things make of the documents of a task: what these are, and what is known of each.
type OfTask<'a> = (&'a str, Task);

/// What two things make of the items of a task, item after item, of each that of all runs.
#[derive(Debug, Clone, PartialEq)]
enum Task {
    /// What their scores differ by.
    Scores(Vec<f32>),
    /// How likely each finds every text, and how many words or bytes that has.
    Texts { scale: Scale, log_likelihoods: Vec<[f32; 2]>, weights: Vec<u32> },
}

/// What a log-likelihood of a word or byte is told as.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Scale {
    Perplexity,
    Bits,
}

impl Scale {
    fn of(name: &str) -> Self {
        match metric::task_and_metric(name) {
            Some((_, "bits_per_byte")) => Self::Bits,
            _ => Self::Perplexity,
        }
    }

    fn value(self, mean: f64) -> f64 {
        match self {
            Self::Perplexity => (-mean).exp(),
            Self::Bits => -mean / LN_2,
        }
    }

    /// What a little more of the mean adds to the value, for each of it.
    fn slope(self, mean: f64) -> f64 {
        match self {
            Self::Perplexity => -(-mean).exp(),
            Self::Bits => -1.0 / LN_2,
        }
    }
}

/// What two things differ by on each item, in each of some pairs of runs.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Paired {
    /// Pairs of runs.
    runs: usize,
    /// Of each task that their metric is a mean of.
    tasks: Vec<Task>,
}

impl<'a> Items<'a> {
    /// Of trials.
    pub(super) fn of(kept: &'a [(TrialId, Vec<ItemScores>)]) -> Self {
        Self(kept.iter().map(|(trial, items)| (trial, items.as_slice())).collect())
    }

    /// Whether what is kept of a trial was left out.
    pub(super) fn lack(&self, trial: &Trial) -> bool {
        let kept = trial.summary.as_ref().is_some_and(|summary| summary.items.is_some());
        kept && !self.0.contains_key(&trial.id)
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
            both.map(|(a, b)| of_task(a, Side::adapter(a), Side::adapter(b))).collect()
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
            tasks.map(|task| of_task(task, Side::adapter(task), Side::base(task))).collect()
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

/// What one of two things makes of the documents of a task.
enum Side<'a> {
    Scores(&'a [u8]),
    Texts(&'a [f32], &'a [u32]),
}

impl<'a> Side<'a> {
    fn adapter(items: &'a ItemScores) -> Self {
        let texts = |texts: &'a TextScores| Self::Texts(&texts.log_likelihoods, &texts.weights);
        items.texts.as_ref().map_or(Self::Scores(&items.scores), texts)
    }

    fn base(items: &'a ItemScores) -> Self {
        let texts = |texts: &'a TextScores| Self::Texts(&texts.base, &texts.weights);
        items.texts.as_ref().map_or(Self::Scores(&items.base), texts)
    }
}

/// What two things make of the documents of a task; `None` if they have not as many, or none.
fn of_task<'a>(items: &'a ItemScores, a: Side, b: Side) -> Option<OfTask<'a>> {
    let task = match (a, b) {
        (Side::Scores(a), Side::Scores(b)) if !a.is_empty() && a.len() == b.len() => {
            let difference = |(a, b): (&u8, &u8)| (f32::from(*a) - f32::from(*b)) / 255.0;
            Task::Scores(a.iter().zip(b).map(difference).collect())
        }
        (Side::Texts(a, of), Side::Texts(b, of_other)) if of == of_other => Task::Texts {
            scale: Scale::of(&items.metric),
            log_likelihoods: a.iter().zip(b).map(|(a, b)| [*a, *b]).collect(),
            weights: of.into(),
        },
        _ => return None,
    };
    Some((&items.asked, task))
}

impl Task {
    /// Of several runs, each of one; `None` unless they are of the same items.
    fn joined(runs: &[&Self]) -> Option<Self> {
        fn interleaved<T: Copy>(runs: &[&[T]]) -> Option<Vec<T>> {
            let items = runs.first()?.len();
            let alike = runs.iter().all(|run| run.len() == items);
            alike.then(|| (0..items).flat_map(|item| runs.iter().map(move |run| run[item])).collect())
        }
        match runs.first()? {
            Self::Scores(_) => {
                let scores = runs.iter().map(|run| match run {
                    Self::Scores(differences) => Some(differences.as_slice()),
                    Self::Texts { .. } => None,
                });
                Some(Self::Scores(interleaved(&scores.collect::<Option<Vec<_>>>()?)?))
            }
            Self::Texts { scale, weights: of, .. } => {
                let texts = runs.iter().map(|run| match run {
                    Self::Texts { log_likelihoods, weights, .. } if weights == of => {
                        Some(log_likelihoods.as_slice())
                    }
                    Self::Texts { .. } | Self::Scores(_) => None,
                });
                let log_likelihoods = interleaved(&texts.collect::<Option<Vec<_>>>()?)?;
                Some(Self::Texts { scale: *scale, log_likelihoods, weights: of.clone() })
            }
        }
    }

    /// Items, of each of which so many runs tell.
    fn items(&self, runs: usize) -> usize {
        match self {
            Self::Scores(differences) => differences.len() / runs,
            Self::Texts { weights, .. } => weights.len(),
        }
    }

    /// What the two differ by on some of the items, so many, where each run counts as much as its share.
    fn difference(&self, shares: &[f64], at: impl ExactSizeIterator<Item = usize>) -> f64 {
        let runs = shares.len();
        match self {
            Self::Scores(differences) => {
                let items = at.len() as f64;
                let item = |at: usize| {
                    let values = differences[at * runs..(at + 1) * runs].iter().zip(shares);
                    values.map(|(value, share)| f64::from(*value) * share).sum::<f64>()
                };
                at.map(item).sum::<f64>() / items
            }
            Self::Texts { scale, log_likelihoods, weights } => {
                let (mut sums, mut weight) = (vec![[0.0; 2]; runs], 0.0);
                for at in at {
                    weight += f64::from(weights[at]);
                    for (sum, values) in sums.iter_mut().zip(&log_likelihoods[at * runs..]) {
                        sum[0] += f64::from(values[0]);
                        sum[1] += f64::from(values[1]);
                    }
                }
                let run = |([a, b], share): ([f64; 2], &f64)| {
                    share * (scale.value(a / weight) - scale.value(b / weight))
                };
                sums.into_iter().zip(shares).map(run).sum()
            }
        }
    }

    /// What each item contributes to the mean over runs of what the two differ by, but for what is the same of all items: of a
    /// perplexity as far as it is linear in them (the delta method).
    fn contributions(&self, runs: usize) -> Vec<f64> {
        match self {
            Self::Scores(differences) => {
                let mean = |item: &[f32]| item.iter().copied().map(f64::from).sum::<f64>() / runs as f64;
                differences.chunks(runs).map(mean).collect()
            }
            Self::Texts { scale, log_likelihoods, weights } => {
                let weight: f64 = weights.iter().copied().map(f64::from).sum();
                // Of each run and side: the mean, and what a text's log-likelihood more than that changes.
                let means = |run: usize| {
                    [0, 1].map(|side| {
                        let values = log_likelihoods.iter().skip(run).step_by(runs);
                        let mean = values.map(|values| f64::from(values[side])).sum::<f64>() / weight;
                        (mean, scale.slope(mean) * weights.len() as f64 / weight)
                    })
                };
                let means: Vec<_> = (0..runs).map(means).collect();
                let item = |(values, of): (&[[f32; 2]], &u32)| {
                    let side = |(mean, slope): (f64, f64), value: f32| {
                        slope * (f64::from(value) - mean * f64::from(*of))
                    };
                    let run = |([a, b], values): (&[(f64, f64); 2], &[f32; 2])| {
                        side(*a, values[0]) - side(*b, values[1])
                    };
                    means.iter().zip(values).map(run).sum::<f64>() / runs as f64
                };
                log_likelihoods.chunks(runs).zip(weights).map(item).collect()
            }
        }
    }
}

impl Paired {
    /// Of pairs of runs, each with its tasks; `None` of none, or unless all are of the same documents.
    fn of(runs: Vec<Vec<OfTask<'_>>>) -> Option<Self> {
        let first = runs.first().filter(|tasks| !tasks.is_empty())?;
        let asked = |run: &[OfTask]| run.iter().map(|(asked, _)| (*asked).to_owned()).collect::<Vec<_>>();
        if runs.iter().any(|run| asked(run) != asked(first)) {
            return None;
        }
        let of_task = |task: usize| Task::joined(&runs.iter().map(|run| &run[task].1).collect::<Vec<_>>());
        Some(Self { runs: runs.len(), tasks: (0..first.len()).map(of_task).collect::<Option<_>>()? })
    }

    /// Items in all.
    pub(super) fn items(&self) -> usize {
        self.tasks.iter().map(|task| task.items(self.runs)).sum()
    }

    /// The variance, over items, of the mean of all: that of each task's mean over runs is the sample's, by its items.
    /// `None` if a task has but one.
    pub(super) fn variance(&self) -> Option<f64> {
        let of_task = |task: &Task| {
            let values = task.contributions(self.runs);
            let (n, mean) = (values.len() as f64, values.iter().sum::<f64>() / values.len() as f64);
            let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
            (n > 1.0).then(|| squares / (n - 1.0) / n)
        };
        let sum: f64 = self.tasks.iter().map(of_task).sum::<Option<_>>()?;
        Some(sum / (self.tasks.len() as f64).powi(2))
    }

    /// The percentile interval of the mean of all, of one of so many `comparisons`.
    pub(super) fn bootstrap(&self, comparisons: usize) -> (f64, f64) {
        let (of_runs, of_items) =
            (rng::key(0, "bootstrap/paired/runs"), rng::key(0, "bootstrap/paired/items"));
        let mut drawn = 0;
        let mut shares = vec![0.0; self.runs];
        let mean = |sample: usize| {
            shares.fill(0.0);
            for run in 0..self.runs {
                let place = (sample * self.runs + run) as u64;
                shares[pick(rng::bits(of_runs, place), self.runs)] += 1.0 / self.runs as f64;
            }
            let of_task = |task: &Task| {
                let (items, from) = (task.items(self.runs), drawn);
                drawn += items;
                let at = (from..from + items).map(|place| pick(rng::bits(of_items, place as u64), items));
                task.difference(&shares, at)
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

#[cfg(test)]
mod tests;
