//! A sweep as its watchers see it: what a stream of changes amounts to so far. Pure; who shows it is
//! elsewhere.

use crate::{Failure, forecast, output, view};
use domain::metric::{self, MetricPoint};
use domain::sweep::SweepSpec;
use domain::trial::{Trial, TrialState};
use proto::v1;
use proto::v1::watch_sweep_response::Event;
use std::collections::BTreeMap;

/// A sweep's trials, and the newest numbers of those that train.
#[derive(Default)]
pub(crate) struct Board {
    /// The sweep, once the first message has come.
    pub(crate) sweep: Option<v1::Sweep>,
    /// Its trials by number.
    pub(crate) trials: BTreeMap<u32, Trial>,
    /// Unfinished sweeps that were submitted before: their trials get the devices first.
    older: Vec<String>,
    /// What no agent has that is there, if there is one.
    pub(crate) lacks: Option<&'static str>,
    spec: Option<SweepSpec>,
    latest: BTreeMap<u32, Latest>,
    /// The step at which each trial was first seen.
    first_seen: BTreeMap<u32, u64>,
    /// When a trial was first seen to hold a device, in seconds since the watch began.
    training_since: Option<f64>,
}

/// The newest value of each metric that is shown while a trial trains. Step 0 is not among them: it measures
/// the base without an adapter, which is no trial's own value.
#[derive(Default, Clone, Copy)]
struct Latest {
    step: u64,
    loss: Option<f64>,
    eval_loss: Option<f64>,
    tokens_per_second: Option<f64>,
    /// The sweep's metric.
    value: Option<f64>,
}

impl Latest {
    fn add(&mut self, point: &MetricPoint, compared: &str) {
        if point.step == 0 {
            return;
        }
        self.step = self.step.max(point.step);
        for (mine, name) in [
            (&mut self.loss, metric::LOSS),
            (&mut self.eval_loss, metric::EVAL_LOSS),
            (&mut self.tokens_per_second, metric::TOKENS_PER_SECOND),
            (&mut self.value, compared),
        ] {
            *mine = point.get(name).or(*mine);
        }
    }
}

/// What a message changed.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// The sweep's own record.
    Sweep,
    /// A trial's record; whether its state is another than before.
    Trial {
        /// The trial.
        number: u32,
        /// Whether it entered its state just now.
        entered: bool,
    },
    /// A training trial's numbers.
    Progress(u32),
    /// Nothing that is shown.
    Nothing,
}

impl Board {
    /// An empty board of a sweep behind `older` ones, to which the agents that are there lack something.
    pub(crate) fn new(older: Vec<String>, lacks: Option<&'static str>) -> Self {
        Self { older, lacks, ..Self::default() }
    }

    /// Takes a message in that came `now` seconds after the watch began.
    pub(crate) fn apply(&mut self, message: v1::WatchSweepResponse, now: f64) -> Result<Change, Failure> {
        Ok(match message.event {
            Some(Event::Sweep(sweep)) => {
                // An extension changes it.
                let known = self.sweep.as_ref().and_then(|sweep| sweep.spec.as_ref());
                if let Some(document) = &sweep.spec
                    && known != Some(document)
                {
                    // A newer server's spec may hold what this version cannot read: then there is no forecast.
                    let document = proto::convert::from_struct(document.clone());
                    self.spec = SweepSpec::from_document(&document).ok();
                }
                self.sweep = Some(sweep);
                Change::Sweep
            }
            Some(Event::Trial(trial)) => {
                let trial = view::trial(trial)?;
                let Some(number) = trial.id.number() else { return Ok(Change::Nothing) };
                let before = self.trials.get(&number);
                let entered = before.map(|t| t.state) != Some(trial.state);
                if before.is_some_and(|t| t.attempt != trial.attempt) {
                    // The new attempt starts from a checkpoint, behind what the old one had reached.
                    self.latest.remove(&number);
                }
                self.first_seen.entry(number).or_insert(trial.step);
                if trial.state.holds_device() {
                    self.training_since.get_or_insert(now);
                }
                self.trials.insert(number, trial);
                Change::Trial { number, entered }
            }
            Some(Event::Progress(progress)) => {
                let number = domain::TrialId::new(progress.trial_id).number();
                let (Some(number), Some(point)) = (number, progress.point) else {
                    return Ok(Change::Nothing);
                };
                let point = MetricPoint::try_from(point).map_err(Failure::failed)?;
                let compared = self.metric().to_string();
                self.latest.entry(number).or_default().add(&point, &compared);
                Change::Progress(number)
            }
            None => Change::Nothing,
        })
    }

    /// Whether the sweep is over.
    pub(crate) fn is_over(&self) -> bool {
        use v1::SweepState::{Paused, Running, Unspecified};
        self.sweep.as_ref().is_some_and(|s| !matches!(s.state(), Running | Paused | Unspecified))
    }

    /// Whether a trial held a device since the watch began.
    pub(crate) fn has_trained(&self) -> bool {
        self.training_since.is_some()
    }

    /// Whether a person holds it.
    fn is_paused(&self) -> bool {
        self.sweep.as_ref().is_some_and(|s| s.state() == v1::SweepState::Paused)
    }

    /// Trials that train now.
    pub(crate) fn training(&self) -> impl Iterator<Item = (u32, &Trial)> {
        self.trials.iter().filter(|(_, t)| t.state.holds_device()).map(|(n, t)| (*n, t))
    }

    /// Finished steps of a trial, as far as is known.
    pub(crate) fn step(&self, number: u32) -> u64 {
        let latest = self.latest.get(&number).map_or(0, |l| l.step);
        self.trials.get(&number).map_or(0, |t| t.step).max(latest)
    }

    /// One trial's line: state, step, loss, speed, what the search chose.
    pub(crate) fn trial_line(&self, number: u32) -> String {
        let Some(trial) = self.trials.get(&number) else { return String::new() };
        let latest = self.latest.get(&number).copied().unwrap_or_default();
        let step = self.step(number);
        let of = trial.total_steps.map_or_else(String::new, |total| format!("/{total}"));
        let loss = if trial.state.is_terminal() { None } else { latest.loss };
        let eval = latest.eval_loss.or(trial.eval_loss);
        let mut parts = vec![format!("trial {number:>2} {:<9} step {step}{of}", trial.state.to_string())];
        parts.extend(loss.map(|l| format!("loss {l:.4}")));
        if step > 0 {
            parts.push(format!("eval/loss {}", output::loss(eval)));
        }
        if !trial.state.is_terminal() {
            parts.extend(latest.tokens_per_second.map(|t| format!("{t:.0} tokens/s")));
        }
        parts.push(view::parameters(trial));
        parts.extend(trial.failure.as_ref().map(|f| f.message.clone()));
        parts.join(" · ")
    }

    /// The sweep's line: trials over, the best so far, and what is left.
    pub(crate) fn sweep_line(&self, elapsed_seconds: f64) -> String {
        let over = self.trials.values().filter(|t| t.state.is_terminal()).count();
        let all = self.in_all().map_or_else(|| "?".into(), |all| all.to_string());
        let mut parts = vec![format!("{over}/{all} trials over")];
        if let Some((number, value)) = self.best_so_far() {
            let running = self.trials.get(&number).is_some_and(|t| !t.state.is_terminal());
            let running = if running { " (running)" } else { "" };
            parts.push(format!("best trial {number} at {value:.4}{running}"));
        }
        if self.is_paused() {
            parts.push("paused".into());
        } else if let Some(why) = self.sweep.as_ref().and_then(|sweep| sweep.waits_for.as_ref()) {
            parts.push(format!("waits: {why}"));
        } else if self.training_since.is_none() && !self.is_over() {
            parts.extend(self.lacks.map(|what| format!("waits for {what}")));
            if !self.older.is_empty() {
                parts.push(format!("waits behind {}", self.older.join(", ")));
            }
        }
        parts.push(format!("{} elapsed", output::duration(elapsed_seconds)));
        parts.extend(
            self.seconds_left(elapsed_seconds).map(|s| format!("about {} left", output::duration(s))),
        );
        parts.join(" · ")
    }

    /// Further runs of the best trials, if the search comes to all that it may propose.
    fn runs_again(&self) -> Option<u32> {
        let searched = self.sweep.as_ref()?.max_trials?;
        let replicates = self.spec.as_ref().and_then(|spec| spec.replicates);
        Some(replicates.map_or(0, |replicates| replicates.on_top_of(searched)))
    }

    /// Trials in all: those of the search, and further runs of the best of them. There may be more, where an extension had
    /// other finalists, and fewer, where the search or the sweep ended before.
    fn in_all(&self) -> Option<usize> {
        let sweep = self.sweep.as_ref()?;
        // The sweep counts those too that are still to be told of.
        let counted: u32 = sweep.counts.iter().map(|count| count.trials).sum();
        let there_are = self.trials.len().max(counted as usize);
        if self.is_over() {
            return Some(there_are);
        }
        Some(there_are.max((sweep.max_trials? + self.runs_again()?) as usize))
    }

    /// The metric by which the sweep compares its trials.
    pub(crate) fn metric(&self) -> &str {
        self.spec.as_ref().map_or(metric::EVAL_LOSS, |spec| spec.search.metric.as_str())
    }

    /// The best value so far with its trial's number: that of a trial that is over, or a better one that a
    /// running trial stands at.
    fn best_so_far(&self) -> Option<(u32, f64)> {
        let sweep = self.sweep.as_ref()?;
        let goal = self.spec.as_ref().map(|s| s.search.goal).unwrap_or_default();
        let over = sweep.best_trial_id.clone().zip(sweep.best_value);
        let over = over.and_then(|(id, value)| Some((domain::TrialId::new(id).number()?, value)));
        // A further run of a trial is better by luck.
        let searched = self.training().filter(|(_, trial)| trial.replicate_of.is_none());
        let running = searched.filter_map(|(number, trial)| Some((number, self.value(number, trial)?)));
        over.into_iter()
            .chain(running)
            .reduce(|best, next| if goal.better(next.1, best.1) { next } else { best })
    }

    /// Where a trial that trains stands by the sweep's metric.
    fn value(&self, number: u32, trial: &Trial) -> Option<f64> {
        let recorded = trial.recorded(self.metric());
        self.latest.get(&number).and_then(|l| l.value).or(recorded).filter(|value| !value.is_nan())
    }

    /// Seconds left: the steps to come by the search's rule, at the pace of those made since the watch began.
    /// `None` without a basis: the number of trials or their steps are not known, or no step was made.
    fn seconds_left(&self, now: f64) -> Option<f64> {
        let spec = self.spec.as_ref()?;
        let max = self.sweep.as_ref()?.max_trials? as usize;
        if self.is_over() || self.is_paused() {
            return None;
        }
        let known: Option<Vec<_>> = self.trials.iter().map(|(n, t)| Some((*n, t, total_steps(t)?))).collect();
        let known = known?;
        let open = known.iter().filter(|(_, trial, _)| !trial.state.is_terminal());
        let left = |trial: &Trial, from: u64, total: u64| match trial.replicate_of {
            None => forecast::steps_to_come(&spec.search, from, total),
            // The search ends none of these.
            Some(_) => total.saturating_sub(from) as f64,
        };
        let under_way: f64 = open.map(|(n, trial, total)| left(trial, self.step(*n), *total)).sum();
        let searched: Vec<_> = known.iter().filter(|(_, trial, _)| trial.replicate_of.is_none()).collect();
        let mean = |steps: &dyn Fn(u64) -> f64| {
            searched.iter().map(|(_, _, total)| steps(*total)).sum::<f64>() / searched.len() as f64
        };
        let unproposed = |all: usize, known: usize| all.saturating_sub(known) as f64;
        let again = unproposed(self.runs_again()? as usize, known.len() - searched.len());
        let to_come = under_way
            + mean(&|total| forecast::steps_to_come(&spec.search, 0, total))
                * unproposed(max, searched.len())
            + mean(&|total| total as f64) * again;
        let made = |(n, _, _): &(u32, &Trial, u64)| {
            self.step(*n).saturating_sub(self.first_seen.get(n).copied().unwrap_or_default())
        };
        let made: u64 = known.iter().map(made).sum();
        let seconds = now - self.training_since?;
        (made > 0 && to_come > 0.0).then(|| (to_come * seconds / made as f64).max(1.0))
    }

    /// The best trial's record, if there is one.
    pub(crate) fn best(&self) -> Option<&Trial> {
        let id = self.sweep.as_ref()?.best_trial_id.as_ref()?;
        self.trials.values().find(|t| t.id.as_str() == id)
    }

    /// Trials that ended in a state.
    pub(crate) fn count(&self, state: TrialState) -> usize {
        self.trials.values().filter(|t| t.state == state).count()
    }
}

/// Steps of a whole trial, as far as they are known before its rows are read.
fn total_steps(trial: &Trial) -> Option<u64> {
    let config = &trial.config;
    let by_rows = config.max_steps.is_none() && config.num_train_epochs.is_some();
    trial.total_steps.or_else(|| (!by_rows).then(|| config.total_steps(0)))
}

#[cfg(test)]
mod tests;
