#![doc = include_str!("README.md")]

/// A trial that waits.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Waiting {
    /// Its base model, as trials name it.
    pub base: String,
    /// Accelerators it may run on; empty means any.
    pub accelerators: Vec<String>,
    /// Predicted peak bytes; 0 is unknown.
    pub peak_bytes: u64,
}

/// A device and what it holds.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Slot {
    /// `CPU`, `A100-40GB`, ….
    pub accelerator: String,
    /// Bytes that trials may use.
    pub memory_bytes: u64,
    /// Trials that may share it.
    pub max_pack_size: u32,
    /// US dollars an hour.
    pub price_per_hour: f64,
    /// The base that is loaded, whether a trial uses it or not.
    pub resident: Option<String>,
    /// The base of the trials it holds; `None` if it holds none.
    pub base: Option<String>,
    /// Trials it holds.
    pub held: u32,
    /// Predicted peak bytes of the trials it holds, together.
    pub reserved_bytes: u64,
}

impl Slot {
    fn admits(&self, trial: &Waiting) -> bool {
        let named = |a: &String| a.eq_ignore_ascii_case(&self.accelerator);
        self.held < self.max_pack_size
            && self.base.as_ref().is_none_or(|base| *base == trial.base)
            && (trial.accelerators.is_empty() || trial.accelerators.iter().any(named))
            && trial.peak_bytes <= self.memory_bytes.saturating_sub(self.reserved_bytes)
    }

    fn has_base(&self, base: &str) -> bool {
        self.base.as_deref().or(self.resident.as_deref()) == Some(base)
    }

    fn take(&mut self, trial: &Waiting) {
        self.held += 1;
        self.reserved_bytes += trial.peak_bytes;
        self.base = Some(trial.base.clone());
    }
}

/// Assignments `(index of the trial, index of the device)`, in the order of the queue.
pub fn solve(queue: &[Waiting], devices: &[Slot]) -> Vec<(usize, usize)> {
    let mut devices = devices.to_vec();
    let mut assignments = Vec::new();
    for (trial, waiting) in queue.iter().enumerate() {
        let best = (0..devices.len()).filter(|&d| devices[d].admits(waiting)).min_by(|&a, &b| {
            let (a, b) = (&devices[a], &devices[b]);
            b.has_base(&waiting.base)
                .cmp(&a.has_base(&waiting.base))
                .then(a.price_per_hour.total_cmp(&b.price_per_hour))
                .then(a.held.cmp(&b.held))
        });
        if let Some(device) = best {
            devices[device].take(waiting);
            assignments.push((trial, device));
        }
    }
    assignments
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trial(base: &str, gb: u64) -> Waiting {
        Waiting { base: base.into(), peak_bytes: gb * 1_000_000_000, ..Waiting::default() }
    }

    fn on(accelerator: &str, base: &str) -> Waiting {
        Waiting { accelerators: vec![accelerator.into()], ..trial(base, 0) }
    }

    fn device(pack: u32, gb: u64, price: f64) -> Slot {
        Slot {
            accelerator: "A100-40GB".into(),
            memory_bytes: gb * 1_000_000_000,
            max_pack_size: pack,
            price_per_hour: price,
            ..Slot::default()
        }
    }

    fn resident(base: &str, slot: Slot) -> Slot {
        Slot { resident: Some(base.into()), ..slot }
    }

    fn holding(base: &str, held: u32, gb: u64, slot: Slot) -> Slot {
        Slot { base: Some(base.into()), held, reserved_bytes: gb * 1_000_000_000, ..slot }
    }

    #[test]
    fn placements() {
        let check = |what: &str, queue: &[Waiting], devices: &[Slot], want: &[(usize, usize)]| {
            assert_eq!(solve(queue, devices), want, "{what}");
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
        check("unknown peaks count as nothing", &[trial("a", 0)], &[device(1, 0, 1.0)], &[(0, 0)]);
        check("accelerators", &[on("H100", "a"), on("a100-40gb", "a")], &[device(2, 40, 1.0)], &[(1, 0)]);
    }
}
