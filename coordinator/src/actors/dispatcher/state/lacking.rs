//! Which trials wait for what nobody has who can be given trials.

use super::super::Request;
use super::State;
use domain::SweepId;
use domain::fleet::Device;
use std::collections::BTreeSet;

impl State {
    /// What waiting trials of a sweep must run on and none of the devices is that there are, if there are any.
    pub(super) fn lacking(&self, sweep: &SweepId) -> Option<String> {
        let open = self.agents.iter().filter(|(id, entry)| self.is_open(id, entry));
        let devices: Vec<_> = open.flat_map(|(_, entry)| &entry.agent.devices).collect();
        if devices.is_empty() {
            return None;
        }
        let of_sweep = self.queue.iter().filter(|((_, of, _), _)| of.as_ref() == Some(sweep));
        let waiting = of_sweep.map(|(_, request)| request).filter(|request| !request.granted.is_closed());
        let waiting: Vec<_> = waiting.collect();
        no_accelerator(&waiting, &devices)
            .or_else(|| waiting.iter().find_map(|waits| no_numbers(waits, &devices)))
    }
}

/// The accelerators that these trials must run on and that are not there.
fn no_accelerator(waiting: &[&Request], devices: &[&Device]) -> Option<String> {
    let there: BTreeSet<_> = devices.iter().map(|device| device.accelerator.as_str()).collect();
    let lacks = waiting.iter().filter(|request| !there.iter().any(|name| request.needs.names(name)));
    let lacking: BTreeSet<_> = lacks.map(|request| request.needs.accelerators.join(" or ")).collect();
    let lacking: Vec<_> = lacking.into_iter().collect();
    (!lacking.is_empty()).then(|| format!("no agent that is connected has {}", lacking.join(", nor ")))
}

/// Why none of the devices that a trial may run on computes with its numbers, if that is so.
fn no_numbers(Request { needs, .. }: &Request, devices: &[&Device]) -> Option<String> {
    needs.compute_capability?;
    let suits = |device: &&&Device| needs.suits(&device.accelerator, device.simulated_speed.is_some());
    let mut suited = devices.iter().filter(suits).peekable();
    let first = *suited.peek()?;
    let none = !suited.any(|device| needs.computes_with(device.compute_capability));
    first.compute_capability.filter(|_| none)?.lacks_bfloat16(&first.accelerator)
}
