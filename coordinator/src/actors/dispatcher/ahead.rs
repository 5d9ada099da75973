//! Which uploaded data agents are told to fetch before the trials that need it are theirs.
//!
//! Data that so many waiting trials name goes to so many agents at most, which have a device that these trials could run
//! on: first to those that were told of it already, so that hints do not wander, then to those that hold the fewest trials. It
//! is a hint and nothing else: a trial goes where [`crate::placement`] says.

use super::Request;
use crate::placement::Waiting;
use domain::data::Reference;
use domain::fleet::Device;

/// Waiting trials that are looked at, the first in line.
const TRIALS: usize = 64;

/// What an agent is told to fetch at most.
const DATA: usize = 8;

/// An agent that can be given trials.
pub(super) struct Candidate<'a> {
    /// Its devices.
    pub(super) devices: &'a [Device],
    /// Trials that it holds.
    pub(super) held: usize,
    /// Whether it asks evaluations.
    pub(super) evaluates: bool,
    /// What it was told last.
    pub(super) told: &'a [Reference],
}

impl Candidate<'_> {
    fn suits(&self, needs: &Waiting) -> bool {
        let suits = |device: &Device| {
            needs.suits(&device.accelerator, device.simulated_speed.is_some())
                && needs.computes_with(device.compute_capability)
        };
        (self.evaluates || !needs.evaluated) && self.devices.iter().any(suits)
    }
}

/// What each agent is to fetch, what is needed first first.
pub(super) fn hints<'a>(
    queue: impl Iterator<Item = &'a Request>,
    agents: &[Candidate],
) -> Vec<Vec<Reference>> {
    // The trials of a sweep mostly need the same.
    let mut wanted: Vec<(&Waiting, &[Reference], usize)> = Vec::new();
    for request in queue.take(TRIALS).filter(|request| !request.data.is_empty()) {
        let alike = wanted.iter_mut().find(|(needs, data, _)| {
            *data == request.data
                && needs.accelerators == request.needs.accelerators
                && needs.simulated == request.needs.simulated
                && needs.evaluated == request.needs.evaluated
                && needs.compute_capability == request.needs.compute_capability
        });
        match alike {
            Some((_, _, trials)) => *trials += 1,
            None => wanted.push((&request.needs, &request.data[..], 1)),
        }
    }
    let mut hints = vec![Vec::new(); agents.len()];
    for (needs, data, trials) in wanted {
        let mut suited: Vec<_> = (0..agents.len()).filter(|i| agents[*i].suits(needs)).collect();
        let is_told = |i: usize| data.iter().all(|reference| agents[i].told.contains(reference));
        suited.sort_by_key(|i| (!is_told(*i), agents[*i].held, *i));
        for i in suited.into_iter().take(trials) {
            let hint: &mut Vec<Reference> = &mut hints[i];
            for reference in data {
                if hint.len() < DATA && !hint.contains(reference) {
                    hint.push(reference.clone());
                }
            }
        }
    }
    hints
}

#[cfg(test)]
mod tests {
    use super::*;
    use domain::data::ContentHash;
    use domain::{Attempt, DeviceId, Timestamp, TrialId};
    use tokio::sync::oneshot;

    fn data(name: &str) -> Reference {
        Reference { tree: ContentHash::of(name.as_bytes()), name: name.into(), is_directory: true }
    }

    fn request(accelerator: &str, names: &[&str]) -> Request {
        let accelerators = Some(accelerator.to_string()).filter(|name| !name.is_empty());
        Request {
            trial: TrialId::new("s/1"),
            attempt: Attempt(1),
            created_at: Timestamp(0),
            needs: Waiting { accelerators: accelerators.into_iter().collect(), ..Waiting::default() },
            data: names.iter().map(|name| data(name)).collect(),
            granted: oneshot::channel().0,
        }
    }

    fn device(accelerator: &str) -> Vec<Device> {
        vec![Device {
            id: DeviceId::new("0"),
            accelerator: accelerator.into(),
            memory_bytes: 1,
            max_pack_size: 1,
            price_per_hour: 0.0,
            price_from: None,
            resident_base: None,
            simulated_speed: None,
            compute_capability: None,
        }]
    }

    #[test]
    fn who_is_told_what() {
        let [cpu, gpu] = ["CPU", "A100-40GB"].map(device);
        let told = [data("b"), data("r")];
        let idle = || Candidate { devices: &cpu, held: 0, evaluates: true, told: &[] };
        let busy = || Candidate { held: 2, ..idle() };
        let knows = || Candidate { told: &told, ..busy() };
        let on_gpu = || Candidate { devices: &gpu, held: 9, ..idle() };
        let older = || Candidate { evaluates: false, ..idle() };
        let check = |what: &str, queue: &[Request], agents: &[Candidate], want: &[&[&str]]| {
            let want: Vec<Vec<_>> =
                want.iter().map(|names| names.iter().map(|name| data(name)).collect()).collect();
            assert_eq!(hints(queue.iter(), agents), want, "{what}");
        };
        let of_sweep = || request("", &["b", "r"]);
        check("nobody waits", &[], &[idle()], &[&[]]);
        check("nothing was uploaded", &[request("", &[])], &[idle()], &[&[]]);
        check("no agent", &[of_sweep()], &[], &[]);
        check("as many agents as trials", &[of_sweep()], &[busy(), idle()], &[&[], &["b", "r"]]);
        check("one each", &[of_sweep(), of_sweep()], &[busy(), idle()], &[&["b", "r"], &["b", "r"]]);
        check("hints do not wander", &[of_sweep()], &[idle(), knows()], &[&[], &["b", "r"]]);
        check(
            "where they can run",
            &[request("a100-40gb", &["b"]), request("CPU", &["r"])],
            &[idle(), on_gpu()],
            &[&["r"], &["b"]],
        );
        let evaluated = || {
            let plain = of_sweep();
            Request { needs: Waiting { evaluated: true, ..plain.needs }, ..plain }
        };
        check("who evaluates", &[evaluated()], &[older(), busy()], &[&[], &["b", "r"]]);
        check("each kind", &[evaluated(), of_sweep()], &[older(), busy()], &[&["b", "r"], &["b", "r"]]);
        check(
            "what is needed first comes first, and once",
            &[of_sweep(), request("", &["r", "x"])],
            &[idle()],
            &[&["b", "r", "x"]],
        );
        let many: Vec<String> = (0..DATA + 1).map(|i| i.to_string()).collect();
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        check("not too much", &[request("", &many)], &[idle()], &[&many[..DATA]]);
        let far: Vec<_> = (0..TRIALS).map(|_| request("", &[])).chain([of_sweep()]).collect();
        check("not too far", &far, &[idle()], &[&[]]);
    }
}
