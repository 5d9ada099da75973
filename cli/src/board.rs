//! A sweep as its watchers see it: what a stream of changes amounts to so far. Pure; who shows it is
//! elsewhere.

use crate::{Failure, output, view};
use domain::metric::{self, MetricPoint};
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
    latest: BTreeMap<u32, Latest>,
}

/// The newest value of each metric that is shown while a trial trains.
#[derive(Default, Clone, Copy)]
struct Latest {
    step: u64,
    loss: Option<f64>,
    eval_loss: Option<f64>,
    tokens_per_second: Option<f64>,
}

impl Latest {
    fn add(&mut self, point: &MetricPoint) {
        self.step = self.step.max(point.step);
        for (mine, name) in [
            (&mut self.loss, metric::LOSS),
            (&mut self.eval_loss, metric::EVAL_LOSS),
            (&mut self.tokens_per_second, metric::TOKENS_PER_SECOND),
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
    /// Takes a message in.
    pub(crate) fn apply(&mut self, message: v1::WatchSweepResponse) -> Result<Change, Failure> {
        Ok(match message.event {
            Some(Event::Sweep(sweep)) => {
                self.sweep = Some(sweep);
                Change::Sweep
            }
            Some(Event::Trial(trial)) => {
                let trial = view::trial(trial)?;
                let Some(number) = trial.id.number() else { return Ok(Change::Nothing) };
                let before = self.trials.get(&number).map(|t| t.state);
                let entered = before != Some(trial.state);
                self.trials.insert(number, trial);
                Change::Trial { number, entered }
            }
            Some(Event::Progress(progress)) => {
                let number = domain::TrialId::new(progress.trial_id).number();
                let (Some(number), Some(point)) = (number, progress.point) else {
                    return Ok(Change::Nothing);
                };
                let point = MetricPoint::try_from(point).map_err(Failure::failed)?;
                self.latest.entry(number).or_default().add(&point);
                Change::Progress(number)
            }
            None => Change::Nothing,
        })
    }

    /// Whether the sweep is over.
    pub(crate) fn is_over(&self) -> bool {
        self.sweep
            .as_ref()
            .is_some_and(|s| !matches!(s.state(), v1::SweepState::Running | v1::SweepState::Unspecified))
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
        parts.extend(eval.map(|l| format!("eval/loss {l:.4}")));
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
        let all =
            self.sweep.as_ref().and_then(|s| s.max_trials).map_or_else(|| "?".into(), |m| m.to_string());
        let mut parts = vec![format!("{over}/{all} trials over")];
        if let Some(sweep) = &self.sweep
            && let (Some(id), Some(value)) = (&sweep.best_trial_id, sweep.best_value)
        {
            let number = domain::TrialId::new(id.clone()).number().unwrap_or_default();
            parts.push(format!("best trial {number} at {value:.4}"));
        }
        parts.push(format!("{} elapsed", output::duration(elapsed_seconds)));
        parts.extend(self.eta(elapsed_seconds).map(|s| format!("about {} left", output::duration(s))));
        parts.join(" · ")
    }

    /// Seconds left, if what is left goes as what is done: trials that are over made, on average, as many
    /// steps as those to come will make. `None` until a trial is over.
    fn eta(&self, elapsed_seconds: f64) -> Option<f64> {
        let max = f64::from(self.sweep.as_ref()?.max_trials?);
        let over: Vec<_> = self.trials.values().filter(|t| t.state.is_terminal()).collect();
        if over.is_empty() || self.is_over() {
            return None;
        }
        let steps_over: f64 = over.iter().map(|t| t.step as f64).sum();
        let running: f64 = self.training().map(|(n, _)| self.step(n) as f64).sum();
        let expected = max * (steps_over / over.len() as f64).max(1.0);
        let done = steps_over + running;
        (done > 0.0).then(|| elapsed_seconds * ((expected - done) / done).max(0.0))
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

#[cfg(test)]
mod tests {
    use super::*;
    use domain::{Attempt, Timestamp, TrialId};

    fn trial(number: u32, state: TrialState, step: u64) -> v1::WatchSweepResponse {
        let trial = Trial {
            id: TrialId::new(format!("s-0000/{number}")),
            config: Default::default(),
            parameters: [("lora_rank".into(), serde_json::json!(8))].into(),
            state,
            attempt: Attempt(1),
            step,
            total_steps: Some(40),
            agent: None,
            adapter: None,
            resume: None,
            attempts: vec![],
            eval_loss: None,
            cost_usd: None,
            summary: None,
            failure: None,
            digests: None,
            created_at: Timestamp(0),
            started_at: None,
            finished_at: None,
        };
        v1::WatchSweepResponse { event: Some(Event::Trial(trial.into())) }
    }

    fn progress(number: u32, step: u64, loss: f64) -> v1::WatchSweepResponse {
        let point = MetricPoint {
            step,
            time: Timestamp(0),
            values: vec![("loss".into(), loss), ("tokens_per_second".into(), 900.0)],
        };
        v1::WatchSweepResponse {
            event: Some(Event::Progress(v1::TrialProgress {
                trial_id: format!("s-0000/{number}"),
                attempt: 1,
                point: Some(point.into()),
            })),
        }
    }

    #[test]
    fn a_stream_becomes_lines() {
        let mut board = Board::default();
        let sweep = v1::Sweep {
            max_trials: Some(4),
            state: v1::SweepState::Running.into(),
            best_trial_id: Some("s-0000/1".into()),
            best_value: Some(1.25),
            ..Default::default()
        };
        assert_eq!(
            board.apply(v1::WatchSweepResponse { event: Some(Event::Sweep(sweep)) }).unwrap(),
            Change::Sweep
        );
        for (message, want) in [
            (trial(1, TrialState::Running, 10), Change::Trial { number: 1, entered: true }),
            (trial(1, TrialState::Running, 20), Change::Trial { number: 1, entered: false }),
            (trial(1, TrialState::Completed, 40), Change::Trial { number: 1, entered: true }),
            (trial(2, TrialState::Running, 0), Change::Trial { number: 2, entered: true }),
            (progress(2, 40, 2.5), Change::Progress(2)),
        ] {
            assert_eq!(board.apply(message).unwrap(), want);
        }
        assert_eq!(
            board.trial_line(2),
            "trial  2 running   step 40/40 · loss 2.5000 · 900 tokens/s · lora_rank 8"
        );
        // Two of four trials' steps are done after ten seconds: ten more.
        assert_eq!(
            board.sweep_line(10.0),
            "1/4 trials over · best trial 1 at 1.2500 · 10 s elapsed · about 10 s left"
        );
        assert!(!board.is_over());
    }
}
