#![doc = include_str!("README.md")]

mod quota;

pub use quota::{Quota, Quotas};

use domain::machine::ComputeCapability;

/// A trial that waits.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Waiting {
    /// Its base model, as trials name it.
    pub base: String,
    /// Whose quota it counts for.
    pub namespace: String,
    /// Accelerators it may run on; empty means any.
    pub accelerators: Vec<String>,
    /// Trials that may be on its device, itself among them; `None`: as many as the device takes.
    pub max_pack_size: Option<u32>,
    /// Predicted bytes of the base; 0 is unknown.
    pub base_bytes: u64,
    /// Most bytes that it is predicted to hold beside the base; 0 is unknown.
    pub own_bytes: u64,
    /// Whether its sweep is one of simulated devices; `None` until a trial of it has started.
    pub simulated: Option<bool>,
    /// Whether evaluations are asked of it.
    pub evaluated: bool,
    /// The least compute capability of a GPU that has its numbers; `None`: any.
    pub compute_capability: Option<ComputeCapability>,
}

impl Waiting {
    /// Whether it may run on a device of that accelerator, which is simulated or trains.
    pub fn suits(&self, accelerator: &str, simulated: bool) -> bool {
        self.simulated.is_none_or(|of_sweep| of_sweep == simulated) && self.names(accelerator)
    }

    /// Whether that accelerator is one that it may run on.
    pub fn names(&self, accelerator: &str) -> bool {
        let named = |a: &String| a.eq_ignore_ascii_case(accelerator);
        self.accelerators.is_empty() || self.accelerators.iter().any(named)
    }

    /// Whether a device of that compute capability has its numbers. One of which it is not known may have them.
    pub fn computes_with(&self, has: Option<ComputeCapability>) -> bool {
        self.compute_capability.zip(has).is_none_or(|(needed, has)| has >= needed)
    }
}

/// A device and what it holds.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Slot {
    /// `CPU`, `A100-40GB`, ….
    pub accelerator: String,
    /// Bytes that trials may use.
    pub memory_bytes: u64,
    /// Trials that may share it: as many as it takes, or fewer if one that it holds says so.
    pub max_pack_size: u32,
    /// US dollars an hour.
    pub price_per_hour: f64,
    /// Whether it trains nothing.
    pub simulated: bool,
    /// Whether its agent asks evaluations; one of an earlier version would leave them out.
    pub evaluates: bool,
    /// Its compute capability; `None`: it is not known, or it is no GPU.
    pub compute_capability: Option<ComputeCapability>,
    /// The base that is loaded, whether a trial uses it or not.
    pub resident: Option<String>,
    /// The base of the trials it holds; `None` if it holds none.
    pub base: Option<String>,
    /// Trials it holds.
    pub held: u32,
    /// Predicted bytes of that base.
    pub base_bytes: u64,
    /// Most bytes that its trials are predicted to hold beside the base, together.
    pub own_bytes: u64,
}

impl Slot {
    /// Whether it counts as a GPU.
    pub fn is_gpu(&self) -> bool {
        is_gpu(&self.accelerator)
    }

    fn is_full(&self) -> bool {
        self.held >= self.max_pack_size
    }

    fn admits(&self, trial: &Waiting) -> bool {
        !self.is_full()
            && trial.max_pack_size.is_none_or(|most| self.held < most)
            && trial.suits(&self.accelerator, self.simulated)
            && (self.evaluates || !trial.evaluated)
            && trial.computes_with(self.compute_capability)
            && self.base.as_ref().is_none_or(|base| *base == trial.base)
            && (self.fits(trial) || self.held == 0)
    }

    /// Whether the trial is predicted to fit beside what the device holds.
    fn fits(&self, trial: &Waiting) -> bool {
        let own = self.own_bytes.saturating_add(trial.own_bytes);
        self.base_bytes.max(trial.base_bytes).saturating_add(own) <= self.memory_bytes
    }

    fn has_base(&self, base: &str) -> bool {
        self.base.as_deref().or(self.resident.as_deref()) == Some(base)
    }

    fn take(&mut self, trial: &Waiting) {
        self.held += 1;
        self.max_pack_size = self.max_pack_size.min(trial.max_pack_size.unwrap_or(u32::MAX));
        self.base_bytes = self.base_bytes.max(trial.base_bytes);
        self.own_bytes = self.own_bytes.saturating_add(trial.own_bytes);
        self.base = Some(trial.base.clone());
    }
}

/// Whether an accelerator is one that quotas count.
pub fn is_gpu(accelerator: &str) -> bool {
    !accelerator.eq_ignore_ascii_case("CPU")
}

/// Assignments `(index of the trial, index of the device)`, in the order of the queue. A trial whose namespace has no more
/// is passed by.
pub fn solve<'a>(
    queue: impl IntoIterator<Item = &'a Waiting>,
    devices: &[Slot],
    mut quotas: Quotas,
) -> Vec<(usize, usize)> {
    let mut devices = devices.to_vec();
    let mut assignments = Vec::new();
    for (trial, waiting) in queue.into_iter().enumerate() {
        // A long queue before a busy fleet costs a look at the devices, not one at each trial.
        if devices.iter().all(Slot::is_full) {
            break;
        }
        let mut quota = quotas.get_mut(&waiting.namespace);
        if quota.as_ref().is_some_and(|quota| !quota.has_trials_left()) {
            continue;
        }
        let may = |d: usize| quota.as_ref().is_none_or(|quota| quota.admits(d, &devices[d]));
        let best = (0..devices.len()).filter(|&d| devices[d].admits(waiting) && may(d)).min_by(|&a, &b| {
            let (a, b) = (&devices[a], &devices[b]);
            b.fits(waiting)
                .cmp(&a.fits(waiting))
                .then(b.has_base(&waiting.base).cmp(&a.has_base(&waiting.base)))
                .then(a.price_per_hour.total_cmp(&b.price_per_hour))
                .then(a.held.cmp(&b.held))
        });
        if let Some(device) = best {
            if let Some(quota) = &mut quota {
                quota.take(device, &devices[device]);
            }
            devices[device].take(waiting);
            assignments.push((trial, device));
        }
    }
    assignments
}

#[cfg(test)]
mod tests {
    use super::*;

    const GB: u64 = 1_000_000_000;

    fn trial(base: &str, gb: u64) -> Waiting {
        Waiting { base: base.into(), own_bytes: gb * GB, ..Waiting::default() }
    }

    fn on(accelerator: &str, base: &str) -> Waiting {
        Waiting { accelerators: vec![accelerator.into()], ..trial(base, 0) }
    }

    fn device(pack: u32, gb: u64, price: f64) -> Slot {
        Slot {
            accelerator: "A100-40GB".into(),
            memory_bytes: gb * GB,
            max_pack_size: pack,
            price_per_hour: price,
            ..Slot::default()
        }
    }

    fn resident(base: &str, slot: Slot) -> Slot {
        Slot { resident: Some(base.into()), ..slot }
    }

    fn holding(base: &str, held: u32, gb: u64, slot: Slot) -> Slot {
        Slot { base: Some(base.into()), held, own_bytes: gb * GB, ..slot }
    }

    #[test]
    fn placements() {
        let check = |what: &str, queue: &[Waiting], devices: &[Slot], want: &[(usize, usize)]| {
            assert_eq!(solve(queue, devices, Quotas::new()), want, "{what}");
        };
        let three = [trial("a", 1), trial("a", 1), trial("a", 1)];
        check("nothing waits", &[], &[device(2, 40, 1.0)], &[]);
        check("no device", &three, &[], &[]);
        check("pack size bounds", &three, &[device(2, 40, 1.0)], &[(0, 0), (1, 0)]);
        check(
            "equal devices share",
            &three[..2],
            &[device(2, 40, 1.0), device(2, 40, 1.0)],
            &[(0, 0), (1, 0)],
        );
        check(
            "one base a device",
            &[trial("a", 1), trial("b", 1), trial("a", 1)],
            &[device(4, 40, 1.0)],
            &[(0, 0), (2, 0)],
        );
        check(
            "the resident base before the cheap device",
            &[trial("a", 1)],
            &[device(1, 40, 1.0), resident("a", device(1, 40, 9.0))],
            &[(0, 1)],
        );
        check(
            "a resident base that nothing uses gives way",
            &[trial("b", 1)],
            &[resident("a", device(1, 40, 1.0))],
            &[(0, 0)],
        );
        check("cheapest", &[trial("a", 1)], &[device(1, 40, 2.0), device(1, 40, 1.0)], &[(0, 1)]);
        check(
            "fewest trials",
            &[trial("a", 1)],
            &[holding("a", 2, 2, device(4, 40, 1.0)), holding("a", 1, 1, device(4, 40, 1.0))],
            &[(0, 1)],
        );
        check(
            "memory bounds; a smaller one passes",
            &[trial("a", 30), trial("a", 5)],
            &[holding("a", 1, 20, device(4, 40, 1.0))],
            &[(1, 0)],
        );
        let on_14 = |gb| Waiting { base_bytes: 14 * GB, ..trial("a", gb) };
        check(
            "a pack holds its base once",
            &[on_14(10), on_14(10), on_14(10)],
            &[device(4, 40, 1.0)],
            &[(0, 0), (1, 0)],
        );
        let holds_14 = Slot { base_bytes: 14 * GB, ..holding("a", 1, 10, device(4, 40, 1.0)) };
        check("nor is it held again", &[on_14(16), on_14(1)], std::slice::from_ref(&holds_14), &[(0, 0)]);
        check(
            "what may not fit at all goes alone, to be judged by who has read its data",
            &[trial("a", 50), trial("a", 1)],
            &[device(4, 40, 1.0)],
            &[(0, 0)],
        );
        check("but not to others", &[on_14(50)], &[holds_14], &[]);
        check(
            "where it fits before where its base is",
            &[trial("a", 50)],
            &[resident("a", device(4, 40, 1.0)), device(4, 80, 9.0)],
            &[(0, 1)],
        );
        check("unknown peaks count as nothing", &[trial("a", 0)], &[device(1, 0, 1.0)], &[(0, 0)]);
        let (real, made_up) = (device(1, 40, 9.0), Slot { simulated: true, ..device(1, 40, 1.0) });
        let begun = |simulated| Waiting { simulated: Some(simulated), ..trial("a", 1) };
        check(
            "what was trained goes on where something is trained, and what was simulated where it is simulated",
            &[begun(false), begun(true), begun(false)],
            &[made_up.clone(), real],
            &[(0, 1), (1, 0)],
        );
        check("what has not begun goes anywhere", &[trial("a", 1)], &[made_up], &[(0, 0)]);
        let of_at_most = |most| Waiting { max_pack_size: Some(most), ..trial("a", 1) };
        let two = [device(4, 40, 1.0), device(4, 40, 2.0)];
        check(
            "those that want a device for themselves take one each, and nobody joins them",
            &[of_at_most(1), of_at_most(1), of_at_most(1), trial("a", 1)],
            &two,
            &[(0, 0), (1, 1)],
        );
        check(
            "nor do they join others",
            &[trial("a", 1), of_at_most(1), of_at_most(1), trial("a", 1)],
            &two,
            &[(0, 0), (1, 1), (3, 0)],
        );
        check(
            "nor what the device holds already",
            &[of_at_most(1), of_at_most(2), of_at_most(2)],
            &[holding("a", 1, 1, device(4, 40, 1.0))],
            &[(1, 0)],
        );
        check(
            "the smallest pack counts",
            &[of_at_most(3), of_at_most(2), of_at_most(3), trial("a", 1)],
            &[device(4, 40, 1.0)],
            &[(0, 0), (1, 0)],
        );
        check(
            "never more than the device takes",
            &[of_at_most(9), of_at_most(9)],
            &[device(1, 40, 1.0)],
            &[(0, 0)],
        );
        let asked = Waiting { evaluated: true, ..trial("a", 1) };
        let asks = Slot { evaluates: true, ..device(1, 40, 9.0) };
        check(
            "what is to be evaluated waits for who does that",
            &[asked.clone(), asked, trial("a", 1)],
            &[device(2, 40, 1.0), asks],
            &[(0, 1), (2, 0)],
        );
        let [volta, ampere] = [(7, 0), (8, 0)].map(|(major, minor)| ComputeCapability { major, minor });
        let brain = || Waiting { compute_capability: Some(ComputeCapability::BFLOAT16), ..trial("a", 1) };
        let of = |has, price| Slot { compute_capability: has, ..device(1, 40, price) };
        check(
            "bfloat16 waits for a GPU that has it, and lets others pass",
            &[brain(), trial("a", 1)],
            &[of(Some(volta), 1.0)],
            &[(1, 0)],
        );
        check("or takes one", &[brain()], &[of(Some(volta), 1.0), of(Some(ampere), 9.0)], &[(0, 1)]);
        check(
            "or one of which nothing is known",
            &[brain()],
            &[of(Some(volta), 1.0), of(None, 9.0)],
            &[(0, 1)],
        );
        check("accelerators", &[on("H100", "a"), on("a100-40gb", "a")], &[device(2, 40, 1.0)], &[(1, 0)]);
    }

    #[test]
    fn namespaces_within_their_quotas() {
        let of = |namespace: &str, base: &str| Waiting { namespace: namespace.into(), ..trial(base, 1) };
        let quota = |max_trials: Option<u32>, max_gpus: Option<u32>| Quota {
            max_trials,
            max_gpus,
            ..Quota::default()
        };
        let check =
            |what: &str, queue: &[Waiting], devices: &[Slot], mine: Quota, want: &[(usize, usize)]| {
                let quotas = [("mine".to_string(), mine)].into();
                assert_eq!(solve(queue, devices, quotas), want, "{what}");
            };
        let four = ["mine", "mine", "mine", "other"].map(|namespace| of(namespace, "a"));
        let wide = [device(9, 400, 1.0)];
        check("no limit", &four, &wide, Quota::default(), &[(0, 0), (1, 0), (2, 0), (3, 0)]);
        check("trials; others are placed", &four, &wide, quota(Some(2), None), &[(0, 0), (1, 0), (3, 0)]);
        let holds = Quota { trials: 2, ..quota(Some(3), None) };
        check("with those that it has", &four, &wide, holds, &[(0, 0), (3, 0)]);
        check("none at all", &four, &wide, quota(Some(0), None), &[(3, 0)]);
        let two = [device(2, 400, 1.0), device(2, 400, 2.0)];
        check(
            "a GPU that it has may be filled",
            &four,
            &two,
            quota(None, Some(1)),
            &[(0, 0), (1, 0), (3, 1)],
        );
        let on_second = Quota { trials: 1, gpus: [1].into(), ..quota(None, Some(1)) };
        check("where it is already", &four[..1], &two, on_second, &[(0, 1)]);
        let elsewhere = Quota { trials: 1, other_gpus: 1, ..quota(None, Some(1)) };
        check("also on one that gets no trials now", &four[..1], &two, elsewhere, &[]);
        let cpu = [Slot { accelerator: "CPU".into(), ..device(2, 400, 1.0) }];
        check("a CPU is no GPU", &four[..1], &cpu, quota(None, Some(0)), &[(0, 0)]);
    }
}
