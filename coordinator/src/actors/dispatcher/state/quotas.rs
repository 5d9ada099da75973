//! What namespaces hold, against what they may.

use super::{Place, State};
use crate::placement::{self, Quota, Quotas};
use config::limits::Limit;
use std::collections::{BTreeSet, HashMap};

impl State {
    /// What namespaces with limits may hold and do hold; GPUs by their index among `places`.
    pub(super) fn quotas(&self, places: &[Place]) -> Quotas {
        let quota = |(namespace, limit): (&str, Limit)| {
            let (max_trials, max_gpus) = (limit.max_concurrent_trials, limit.max_gpus);
            (namespace.to_string(), Quota { max_trials, max_gpus, ..Quota::default() })
        };
        let mut quotas: Quotas = self.in_force.iter().map(quota).collect();
        if quotas.is_empty() {
            return quotas;
        }
        let index: HashMap<_, _> = places.iter().enumerate().map(|(index, place)| (place, index)).collect();
        let mut others = BTreeSet::new();
        for held in self.held.values() {
            let Some(quota) = quotas.get_mut(&held.needs.namespace) else { continue };
            quota.trials += 1;
            let (agent, device) = &held.place;
            let devices = self.agents.get(agent).map_or(&[][..], |entry| &entry.agent.devices);
            let known = devices.iter().find(|known| known.id == *device);
            // Of a device that is not known yet it is not known that it is none.
            if !known.is_none_or(|known| placement::is_gpu(&known.accelerator)) {
                continue;
            }
            match index.get(&held.place) {
                Some(index) => drop(quota.gpus.insert(*index)),
                None if others.insert((&held.needs.namespace, &held.place)) => quota.other_gpus += 1,
                None => {}
            }
        }
        quotas
    }

    pub(super) fn held_back(&self, namespace: &str) -> Option<String> {
        let quota = self.quotas(&[]).remove(namespace)?;
        let waits = self.queue.values().any(|request| request.needs.namespace == namespace);
        let (trials, gpus) = (quota.trials, quota.used_gpus());
        match (quota.max_trials, quota.max_gpus) {
            _ if !waits => None,
            (Some(most), _) if trials >= most => {
                Some(format!("namespace {namespace} has {trials} of its {most} trials on devices"))
            }
            (_, Some(most)) if gpus >= most => {
                Some(format!("namespace {namespace} uses {gpus} of its {most} GPUs"))
            }
            _ => None,
        }
    }
}
