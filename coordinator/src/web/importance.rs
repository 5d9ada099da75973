//! How much each parameter matters to be among the best, as the report computes it, while trials complete.

use super::form::roughly;
use crate::actors::sweep::{Change, View};
use crate::report::{self, Observed};
use domain::sweep::{Distribution, Goal, Sweep};
use domain::trial::{Trial, TrialState};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::Instant;

/// The time between two calculations at least: many trials may complete in a second.
const EVERY: Duration = Duration::from_secs(5);

/// What it is computed from, and whether that has changed since.
pub struct Importance {
    parameters: Vec<(String, Distribution)>,
    goal: Goal,
    /// The parameters and the value of each completed trial that has one, by number.
    completed: BTreeMap<u32, (BTreeMap<String, Value>, f64)>,
    changed: bool,
    /// When it may be computed again.
    next: Instant,
}

impl Importance {
    /// Of a sweep as it stands; nobody has been told yet.
    pub fn of(view: &View) -> Self {
        let spec = &view.sweep.spec;
        let mut importance = Self {
            parameters: spec.parameters.clone(),
            goal: spec.search.goal,
            completed: BTreeMap::new(),
            changed: true,
            next: Instant::now(),
        };
        view.trials.iter().for_each(|record| importance.trial(&record.trial, record.value));
        importance
    }

    /// Hears of a change.
    pub fn hear(&mut self, change: &Change) {
        match change {
            Change::Sweep(sweep) => self.sweep(sweep),
            Change::Trial(trial, value) => self.trial(trial, *value),
            Change::Progress(..) => {}
        }
    }

    /// One that was extended may draw from another space.
    fn sweep(&mut self, sweep: &Sweep) {
        if self.parameters != sweep.spec.parameters {
            self.parameters.clone_from(&sweep.spec.parameters);
            self.changed = true;
        }
    }

    fn trial(&mut self, trial: &Trial, value: Option<f64>) {
        // The search did not choose a run with another seed.
        let completed = trial.state == TrialState::Completed && trial.replicate_of.is_none();
        let value = value.filter(|value| completed && value.is_finite());
        let (Some(number), Some(value)) = (trial.id.number(), value) else { return };
        // It changes once more when its adapter is removed.
        if self.completed.get(&number).is_none_or(|(_, known)| *known != value) {
            self.completed.insert(number, (trial.parameters.clone(), value));
            self.changed = true;
        }
    }

    /// Returns when there is something new to tell, and it is time for it.
    pub async fn due(&self) {
        match self.changed {
            true => tokio::time::sleep_until(self.next).await,
            false => std::future::pending().await,
        }
    }

    /// What is new, if anything: how many trials it is computed from, and each parameter with its part, the largest first.
    pub fn news(&mut self) -> Option<Value> {
        if !std::mem::take(&mut self.changed) {
            return None;
        }
        self.next = Instant::now() + EVERY;
        let trials: Vec<Observed> = self.completed.values().map(|(values, value)| (values, *value)).collect();
        let parts = report::importance(&self.parameters, &trials, self.goal);
        let parts: Vec<_> = parts.into_iter().map(|(name, part)| (name, roughly(part))).collect();
        Some(json!({ "trials": trials.len(), "parts": parts }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::made;
    use domain::sweep::{SweepSpec, SweepState};
    use domain::trial::TrialConfig;
    use domain::{Timestamp, TrialId};

    fn sweep(ranks: &[u32]) -> Sweep {
        let document = json!({
            "name": "s", "pretrained_model_id": "/m", "dataset_name": "/d", "max_steps": 6,
            "search": {"algorithm": "grid"},
            "parameters": {"lora_rank": ranks, "learning_rate": [0.001, 0.002]},
        });
        let spec = SweepSpec::from_document(document.as_object().unwrap()).unwrap();
        Sweep { spec, state: SweepState::Running, ..made::sweep() }
    }

    /// A trial whose rank alone says how good it is.
    fn change(number: u32, state: TrialState, value: Option<f64>) -> Change {
        let parameters = [
            ("lora_rank".to_string(), json!(2 << (number % 5))),
            ("learning_rate".to_string(), json!([0.001, 0.002][(number / 5 % 2) as usize])),
        ];
        let id = TrialId::of(&made::sweep().id, number);
        let mut trial = Trial::new(id, TrialConfig::default(), parameters.into(), Timestamp(0));
        trial.state = state;
        Change::Trial(Box::new(trial), value)
    }

    /// It is told once a change, and no more often than every few seconds.
    #[tokio::test(start_paused = true)]
    async fn it_is_computed_when_trials_complete() {
        let view = View { sweep: sweep(&[2, 4, 8, 16, 32]), trials: Vec::new() };
        let mut importance = Importance::of(&view);
        importance.due().await;
        assert_eq!(importance.news(), Some(json!({ "trials": 0, "parts": [] })));
        assert_eq!(importance.news(), None);
        let start = Instant::now();
        for (number, state, value) in [
            (100, TrialState::Stopped, Some(0.5)),
            (101, TrialState::Running, Some(0.5)),
            (102, TrialState::Completed, None),
            (103, TrialState::Completed, Some(f64::INFINITY)),
        ] {
            importance.hear(&change(number, state, value));
            assert_eq!(importance.news(), None, "{number} has no result");
        }
        for number in 0..20 {
            importance.hear(&change(number, TrialState::Completed, Some(f64::from(number % 5))));
        }
        importance.due().await;
        assert!(start.elapsed() >= EVERY, "{:?}", start.elapsed());
        let news = importance.news().unwrap();
        assert_eq!((&news["trials"], &news["parts"][0]), (&json!(20), &json!(["lora_rank", 1.0])), "{news}");
        importance.hear(&change(7, TrialState::Completed, Some(2.0)));
        assert_eq!(importance.news(), None, "nothing that it is computed from changed");
        importance.hear(&Change::Sweep(Box::new(sweep(&[2, 4, 8, 16, 32]))));
        assert_eq!(importance.news(), None);
        // Trials of ranks that the space has no more say nothing of them.
        importance.hear(&Change::Sweep(Box::new(sweep(&[2, 4]))));
        assert_eq!(importance.news(), Some(json!({ "trials": 20, "parts": [] })));
    }
}
