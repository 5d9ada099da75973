//! What namespaces hold, against what they may.

use super::{Place, State};
use crate::placement::{self, Quota, Quotas};
use config::limits::Limit;
use std::collections::HashMap;

/// How many trials of each namespace each device holds: of those that hold any, and of all namespaces, because the limits may
/// change. Who asks what a namespace holds need not look at every trial for it.
#[derive(Default)]
pub(super) struct Usage(HashMap<String, HashMap<Place, u32>>);

impl Usage {
    /// A trial of the namespace is on the device.
    pub(super) fn add(&mut self, namespace: &str, place: &Place) {
        let places = self.0.entry(namespace.into()).or_default();
        *places.entry(place.clone()).or_default() += 1;
    }

    /// A trial of the namespace has left the device.
    pub(super) fn remove(&mut self, namespace: &str, place: &Place) {
        let Some(places) = self.0.get_mut(namespace) else { return };
        if let Some(trials) = places.get_mut(place) {
            *trials -= 1;
            if *trials == 0 {
                places.remove(place);
            }
        }
        if places.is_empty() {
            self.0.remove(namespace);
        }
    }

    /// The devices that hold trials of the namespace, and how many.
    fn of(&self, namespace: &str) -> impl Iterator<Item = (&Place, u32)> {
        self.0.get(namespace).into_iter().flatten().map(|(place, trials)| (place, *trials))
    }
}

impl State {
    /// What namespaces with limits may hold and do hold; GPUs by their index among `places`.
    pub(super) fn quotas(&self, places: &[Place]) -> Quotas {
        let mut limits = self.in_force.iter().peekable();
        if limits.peek().is_none() {
            return Quotas::new();
        }
        let index = places.iter().enumerate().map(|(index, place)| (place, index)).collect();
        limits
            .map(|(namespace, limit)| (namespace.to_string(), self.quota(namespace, limit, &index)))
            .collect()
    }

    fn quota(&self, namespace: &str, limit: Limit, index: &HashMap<&Place, usize>) -> Quota {
        let (max_trials, max_gpus) = (limit.max_concurrent_trials, limit.max_gpus);
        let mut quota = Quota { max_trials, max_gpus, ..Quota::default() };
        for (place, trials) in self.usage.of(namespace) {
            quota.trials += trials;
            let (agent, device) = place;
            let devices = self.agents.get(agent).map_or(&[][..], |entry| &entry.agent.devices);
            let known = devices.iter().find(|known| known.id == *device);
            // Of a device that is not known yet it is not known that it is none.
            if !known.is_none_or(|known| placement::is_gpu(&known.accelerator)) {
                continue;
            }
            match index.get(place) {
                Some(index) => drop(quota.gpus.insert(*index)),
                None => quota.other_gpus += 1,
            }
        }
        quota
    }

    pub(super) fn held_back(&self, namespace: &str) -> Option<String> {
        let quota = self.quota(namespace, self.in_force.of(namespace), &HashMap::new());
        let (trials, gpus) = (quota.trials, quota.used_gpus());
        let why = match (quota.max_trials, quota.max_gpus) {
            (Some(most), _) if trials >= most => {
                format!("namespace {namespace} has {trials} of its {most} trials on devices")
            }
            (_, Some(most)) if gpus >= most => {
                format!("namespace {namespace} uses {gpus} of its {most} GPUs")
            }
            _ => return None,
        };
        let waits = self.queue.values().any(|request| request.needs.namespace == namespace);
        waits.then_some(why)
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::Terms;
    use super::*;
    use crate::placement::Waiting;
    use config::limits::Limits;
    use domain::{AgentId, Attempt, DeviceId, SystemClock, TrialId};
    use std::collections::BTreeSet;
    use std::sync::Arc;
    use std::time::Duration;
    use tokio::sync::oneshot;

    #[tokio::test(start_paused = true)]
    async fn what_is_held_is_counted_as_it_comes_and_goes() {
        let terms = Terms { heartbeat: Duration::from_secs(2), lease: Duration::from_secs(10) };
        let mut state = State::new(Arc::new(SystemClock::new()), terms, BTreeSet::new());
        state.in_force = Arc::new(Limits::parse("mine: { max_gpus: 9 }\nidle: { max_gpus: 9 }").unwrap());
        let place = |device: &str| (AgentId::new("a"), DeviceId::new(device));
        let hold = |state: &mut State, trial: &str, namespace: &str, device: &str| {
            let needs = Waiting { namespace: namespace.into(), ..Waiting::default() };
            let lost = oneshot::channel().0;
            state.hold(TrialId::new(trial), Attempt(1), place(device), needs, None, lost);
        };
        let check = |state: &State, what: &str, trials: u32, gpus: &[usize], others: u32| {
            let quotas = state.quotas(&[place("0"), place("1")]);
            let mine = &quotas["mine"];
            assert_eq!((mine.trials, mine.other_gpus), (trials, others), "{what}");
            assert_eq!(mine.gpus, gpus.iter().copied().collect(), "{what}");
            assert_eq!((quotas.len(), quotas["idle"].trials), (2, 0), "{what}");
        };
        check(&state, "nothing yet", 0, &[], 0);
        hold(&mut state, "s/1", "mine", "1");
        hold(&mut state, "s/2", "mine", "1");
        hold(&mut state, "s/3", "mine", "away");
        hold(&mut state, "s/4", "yours", "0");
        check(&state, "three on two GPUs", 3, &[1], 1);
        hold(&mut state, "s/2", "mine", "0");
        check(&state, "one is elsewhere now", 3, &[0, 1], 1);
        for (trial, trials, gpus, others) in
            [("s/1", 2, &[0][..], 1), ("s/1", 2, &[0], 1), ("s/4", 2, &[0], 1), ("s/3", 1, &[0], 0)]
        {
            state.end(&TrialId::new(trial));
            check(&state, trial, trials, gpus, others);
        }
        state.end(&TrialId::new("s/2"));
        check(&state, "all have ended", 0, &[], 0);
        assert!(state.usage.0.is_empty(), "nothing is kept of what is over");
    }
}
