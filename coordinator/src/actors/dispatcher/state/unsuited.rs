//! Which trials wait although there are devices for them, because none of these has their numbers.

use super::super::Request;
use super::State;
use domain::SweepId;
use domain::fleet::Device;

impl State {
    /// Why waiting trials of a sweep get no device, if there are devices for them and none has their numbers.
    pub(super) fn unsuited(&self, sweep: &SweepId) -> Option<String> {
        let waiting = self.queue.values().filter(|request| request.needs.compute_capability.is_some());
        let mut waiting = waiting.filter(|request| request.trial.sweep().as_ref() == Some(sweep)).peekable();
        waiting.peek()?;
        let open = self.agents.iter().filter(|(id, entry)| self.is_open(id, entry));
        let devices: Vec<_> = open.flat_map(|(_, entry)| &entry.agent.devices).collect();
        waiting.find_map(|Request { needs, .. }| {
            let suits =
                |device: &&&Device| needs.suits(&device.accelerator, device.simulated_speed.is_some());
            let mut suited = devices.iter().filter(suits).peekable();
            let first = *suited.peek()?;
            let none = !suited.any(|device| needs.computes_with(device.compute_capability));
            first.compute_capability.filter(|_| none)?.lacks_bfloat16(&first.accelerator)
        })
    }
}
