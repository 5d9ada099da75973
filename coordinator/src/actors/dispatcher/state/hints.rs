//! Who is told what to fetch ahead.

use super::super::ahead::{self, Candidate};
use super::{State, ToAgent};
use domain::AgentId;
use std::collections::HashMap;

impl State {
    /// Tells agents what to fetch ahead, where that is not what they were told last.
    pub(super) fn hint(&mut self) {
        let any = self.queue.values().any(|request| !request.data.is_empty());
        if !any && self.agents.values().all(|entry| entry.ahead.is_empty()) {
            return;
        }
        let mut held: HashMap<&AgentId, usize> = HashMap::new();
        for trial in self.held.values() {
            *held.entry(&trial.place.0).or_default() += 1;
        }
        let open: Vec<_> = self.agents.iter().filter(|(id, entry)| self.is_open(id, entry)).collect();
        let candidates = open.iter().map(|(id, entry)| Candidate {
            devices: &entry.agent.devices,
            held: held.get(id).copied().unwrap_or_default(),
            told: &entry.ahead,
        });
        let candidates: Vec<_> = candidates.collect();
        let hints = ahead::hints(self.queue.values(), &candidates);
        let news = open.iter().zip(hints).filter(|((_, entry), hint)| entry.ahead != *hint);
        let news: Vec<_> = news.map(|((id, _), hint)| ((*id).clone(), hint)).collect();
        for (agent, hint) in news {
            if let Some(entry) = self.agents.get_mut(&agent) {
                entry.ahead = hint.clone();
            }
            self.reach(&agent, ToAgent::Prefetch(hint));
        }
    }
}
