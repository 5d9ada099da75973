//! Who is told what to fetch ahead.

use super::super::ahead::{self, Candidate};
use super::{Entry, Request, State, ToAgent};
use crate::placement::Quota;
use domain::AgentId;
use domain::fleet::Feature;
use std::collections::HashMap;

impl State {
    /// Tells agents what to fetch ahead, where that is not what they were told last.
    pub(super) fn hint(&mut self) {
        let any = self.queue.values().any(|request| !request.data.is_empty());
        if !any && self.agents.values().all(|entry| entry.ahead.is_empty()) {
            return;
        }
        self.withdraw();
        let mut held: HashMap<&AgentId, usize> = HashMap::new();
        for trial in self.held.values() {
            *held.entry(&trial.place.0).or_default() += 1;
        }
        let told = |(id, entry): &(&AgentId, &Entry)| {
            self.is_open(id, entry) && entry.agent.understands.contains(&Feature::Prefetch)
        };
        let open: Vec<_> = self.agents.iter().filter(told).collect();
        let candidates = open.iter().map(|(id, entry)| Candidate {
            devices: &entry.agent.devices,
            held: held.get(id).copied().unwrap_or_default(),
            evaluates: entry.agent.understands.contains(&Feature::Evaluations),
            told: &entry.ahead,
        });
        let candidates: Vec<_> = candidates.collect();
        // What waits for its namespace's quota does not wait for its data.
        let quotas = self.quotas(&[]);
        let may =
            |request: &&Request| quotas.get(&request.needs.namespace).is_none_or(Quota::has_trials_left);
        let hints = ahead::hints(self.queue.values().filter(may), &candidates);
        let news = open.iter().zip(hints).filter(|((_, entry), hint)| entry.ahead != *hint);
        let news: Vec<_> = news.map(|((id, _), hint)| ((*id).clone(), hint)).collect();
        for (agent, hint) in news {
            if let Some(entry) = self.agents.get_mut(&agent) {
                entry.ahead = hint.clone();
            }
            self.reach(&agent, ToAgent::Prefetch(hint));
        }
    }

    /// Takes back what agents were told that get no trials now.
    fn withdraw(&mut self) {
        let is_told = |(id, entry): &(&AgentId, &Entry)| !entry.ahead.is_empty() && !self.is_open(id, entry);
        let told: Vec<_> = self.agents.iter().filter(is_told).map(|(id, _)| id.clone()).collect();
        for agent in told {
            if let Some(entry) = self.agents.get_mut(&agent) {
                entry.ahead.clear();
            }
            self.reach(&agent, ToAgent::Prefetch(Vec::new()));
        }
    }
}
