//! Which waiting trial goes to which device, by [`placement::solve`].

use super::super::{Grant, Request};
use super::{Entry, Place, State, Turn};
use crate::placement::{self, Slot, Waiting};
use domain::AgentId;
use domain::fleet::{Agent, Device, Feature};
use domain::trial::TrialDevice;
use std::collections::HashMap;
use telemetry::metrics;
use tokio::sync::oneshot;

impl State {
    /// Gives waiting trials to devices.
    pub(super) fn place(&mut self) {
        self.queue.retain(|_, request| !request.granted.is_closed());
        if self.queue.is_empty() {
            return;
        }
        let (places, slots): (Vec<_>, Vec<_>) = self.slots().into_iter().unzip();
        let lacks = !slots.is_empty()
            && !slots.iter().any(|slot| slot.evaluates)
            && self.queue.values().any(|request| request.needs.evaluated);
        if lacks && !self.lacks_version {
            tracing::warn!(
                "trials wait for an agent that asks evaluations: those that are there are of an earlier version"
            );
        }
        self.lacks_version = lacks;
        let started = self.clock.monotonic();
        let quotas = self.quotas(&places);
        let assignments = placement::solve(self.queue.values().map(|request| &request.needs), &slots, quotas);
        let took = self.clock.monotonic().saturating_sub(started);
        metrics::PLACEMENT_DURATION.record(took.as_secs_f64(), &[]);
        let mut turns = self.queue.keys().enumerate();
        let turn = |(trial, device)| Some((turns.find(|(index, _)| *index == trial)?.1.clone(), device));
        let granted: Vec<(Turn, usize)> = assignments.into_iter().filter_map(turn).collect();
        for (turn, device) in granted {
            if let Some(request) = self.queue.remove(&turn) {
                self.grant(request, places[device].clone());
            }
        }
    }

    fn grant(&mut self, request: Request, place: Place) {
        let Request { trial, attempt, needs, granted, .. } = request;
        let (lost, answer) = oneshot::channel();
        let (agent, device) = place.clone();
        let devices = self.agents.get(&agent).map_or(&[][..], |entry| &entry.agent.devices);
        let known = devices.iter().find(|known| known.id == device);
        let is = known.map(|known| TrialDevice {
            accelerator: known.accelerator.clone(),
            memory_bytes: known.memory_bytes,
            price_per_hour: known.price_per_hour,
            price_from: known.price_from.clone().map(Box::new),
        });
        let price_per_hour = known.map_or(0.0, Device::cost_per_hour);
        let grant = Grant { agent, device, price_per_hour, is, at: self.clock.now(), lost: answer };
        self.hold(trial.clone(), attempt, place, needs, None, lost);
        if granted.send(grant).is_err() {
            self.end(&trial);
        }
    }

    /// Whether an agent can be reached, is heard of, does not leave and is not drained.
    pub(super) fn is_open(&self, id: &AgentId, entry: &Entry) -> bool {
        entry.session.is_some() && !entry.leaving && !entry.silent && !self.drained.contains(id)
    }

    /// The devices of agents that can be given trials.
    fn slots(&self) -> Vec<(Place, Slot)> {
        let mut held: HashMap<&Place, Vec<&Waiting>> = HashMap::new();
        for trial in self.held.values() {
            held.entry(&trial.place).or_default().push(&trial.needs);
        }
        let open = self.agents.iter().filter(|(id, entry)| self.is_open(id, entry));
        let open = open.map(|(_, entry)| &entry.agent);
        let devices = open.flat_map(|agent| agent.devices.iter().map(move |device| (agent, device)));
        let slot = |(agent, device): (&Agent, &Device)| {
            let place = (agent.id.clone(), device.id.clone());
            let held = held.get(&place).map_or(&[][..], Vec::as_slice);
            (place, slot(agent, device, held))
        };
        devices.map(slot).collect()
    }
}

/// A device that holds trials of these needs.
fn slot(agent: &Agent, device: &Device, held: &[&Waiting]) -> Slot {
    Slot {
        accelerator: device.accelerator.clone(),
        memory_bytes: device.memory_bytes,
        max_pack_size: held
            .iter()
            .filter_map(|needs| needs.max_pack_size)
            .fold(device.max_pack_size, u32::min),
        price_per_hour: device.cost_per_hour(),
        simulated: device.simulated_speed.is_some(),
        evaluates: agent.understands.contains(&Feature::Evaluations),
        compute_capability: device.compute_capability,
        resident: device.resident_base.clone(),
        base: held.first().map(|needs| needs.base.clone()),
        held: held.len() as u32,
        base_bytes: held.iter().map(|needs| needs.base_bytes).max().unwrap_or_default(),
        own_bytes: held.iter().map(|needs| needs.own_bytes).fold(0, u64::saturating_add),
    }
}
