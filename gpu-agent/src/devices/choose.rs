//! Which GPUs are trained on, decided from what the driver says of them. Nothing here asks the machine anything.

use super::names::accelerator;
use crate::{DeviceOptions, EngineHost};
use domain::DeviceId;
use domain::machine::ComputeCapability;
use std::collections::BTreeSet;

/// What the driver says of this machine's GPUs.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Facts {
    /// The driver's version.
    pub driver: String,
    /// The newest CUDA that it has: major, minor.
    pub cuda: (u32, u32),
    /// The GPUs in the order of their places on the bus.
    pub gpus: Vec<Gpu>,
    /// What is wrong with GPUs of which it says nothing else, a line each.
    pub silent: Vec<String>,
}

/// A GPU.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Gpu {
    /// Such as `NVIDIA A100-SXM4-40GB`.
    pub name: String,
    /// `GPU-…`.
    pub uuid: String,
    /// All bytes that it has.
    pub memory_bytes: u64,
    /// Its compute capability: major, minor.
    pub compute: (u32, u32),
    /// Cores times clock: by such a product CUDA tells the faster of two GPUs, unless told to go by the bus.
    pub speed: u64,
    /// Memory errors since the driver was loaded that it could not correct; 0 where it does not count.
    pub uncorrected_errors: u64,
    /// Its slices; `None` if it is not sliced (MIG).
    pub slices: Option<Vec<Slice>>,
    /// Per cent of the time in which something ran on it lately.
    pub utilisation: Option<u32>,
    /// Milliwatts that it draws.
    pub power: Option<u32>,
    /// Its temperature in degrees Celsius.
    pub temperature: Option<u32>,
}

/// A MIG slice.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Slice {
    /// Such as `NVIDIA A100-SXM4-40GB MIG 1g.5gb`.
    pub name: String,
    /// `MIG-…`.
    pub uuid: String,
    /// All bytes that it has.
    pub memory_bytes: u64,
}

/// Why the driver says nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Absent {
    /// Its library is not on this machine.
    Missing,
    /// Its library is, and does not work.
    Broken(String),
}

/// What else counts.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Settings {
    /// `CUDA_VISIBLE_DEVICES`.
    pub visible: Option<String>,
    /// `CUDA_DEVICE_ORDER`.
    pub order: Option<String>,
    /// The CUDA with which this program was built: major, minor; `None` without.
    pub built_with: Option<(u32, u32)>,
    /// The compute capability that its kernels were compiled for: major, minor; `None` without.
    pub built_for: Option<(u32, u32)>,
}

/// The GPUs to train on, and what a person is to be told, a line each.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Found {
    /// GPUs and slices, as CUDA counts them.
    pub devices: Vec<DeviceOptions>,
    /// What is wrong.
    pub notes: Vec<String>,
    /// The driver's version and its CUDA's, if there is one that works.
    pub driver: Option<String>,
}

/// The oldest compute capability: the kernels use tensor cores' instructions and 16-bit arithmetic.
const OLDEST: (u32, u32) = (7, 0);
/// Bytes of a GPU that trials may not have: the CUDA context with its kernels (three to six hundred MB on recent cards),
/// cuBLAS's workspaces and what the driver rounds up, none of which the footprint model knows of.
pub const RESERVE: u64 = 1_000_000_000;
/// Trials that share a GPU unless told otherwise; its memory usually ends first.
pub(super) const PACK_SIZE: u32 = 8;

/// Decides.
pub fn choose(read: &Result<Facts, Absent>, settings: &Settings) -> Found {
    let mut found = Found::default();
    let facts = match (read, settings.built_with) {
        (Ok(facts), _) => facts,
        // Without CUDA and without a GPU all is as it should be.
        (Err(_), None) => return found,
        (Err(Absent::Missing), Some(_)) => {
            found.notes.push("no NVIDIA driver was found; install it to train on a GPU".into());
            return found;
        }
        (Err(Absent::Broken(why)), Some(_)) => {
            found.notes.push(format!("the NVIDIA driver does not work: {why}; see what nvidia-smi says"));
            return found;
        }
    };
    found.driver = Some(format!("{} with CUDA {}.{}", facts.driver, facts.cuda.0, facts.cuda.1));
    let (gpus, invalid) = visible(facts, settings);
    let Some(built_with) = settings.built_with else {
        let named = gpus.iter().find(|(gpu, _)| gpu.compute >= OLDEST).map(|(gpu, _)| &gpu.name);
        found.notes.extend(named.map(|name| {
            format!(
                "this machine has {} {name}, but this program was built without CUDA; build it with \
                 --features cuda (docs/gpu.md) to train on it",
                article(name)
            )
        }));
        return found;
    };
    found.notes.extend(facts.silent.iter().cloned());
    found.notes.extend(invalid.map(|entry| {
        format!(
            "CUDA_VISIBLE_DEVICES: {entry:?} is no GPU of this machine, or one twice; it hides what follows"
        )
    }));
    if gpus.is_empty() {
        return found;
    }
    let Facts { driver, cuda, .. } = facts;
    let versions = format!(
        "the NVIDIA driver {driver} has CUDA {}.{}, and this program was built with CUDA {}.{}",
        cuda.0, cuda.1, built_with.0, built_with.1
    );
    if cuda.0 < built_with.0 {
        found.notes.push(format!("{versions}; update the driver, or build with its CUDA"));
        return found;
    }
    if *cuda < built_with {
        // The kernels are PTX, which only a driver of its version or a later one is sure to compile.
        found.notes.push(format!("{versions}; if it refuses the kernels, update the driver"));
    }
    for (n, (gpu, slice)) in gpus.into_iter().enumerate() {
        let id = format!("cuda:{n}");
        if gpu.compute < OLDEST {
            let (major, minor) = gpu.compute;
            let what = format!("{id} ({}) has compute capability {major}.{minor}", gpu.name);
            found.notes.push(format!("{what}, which is too old: {}.{} is needed", OLDEST.0, OLDEST.1));
            continue;
        }
        if let Some(built_for) =
            settings.built_for.filter(|built_for| !trainer::device::runs_on(*built_for, gpu.compute))
        {
            let (major, minor) = gpu.compute;
            found.notes.push(format!(
                "{id} ({}) has compute capability {major}.{minor}, and this program was built for {}.{}; build it with \
                 CUDA_COMPUTE_CAP={major}{minor} (docs/gpu.md) to train on it",
                gpu.name, built_for.0, built_for.1
            ));
            continue;
        }
        if gpu.uncorrected_errors > 0 {
            let what = format!("{id} ({}) has had {} memory errors", gpu.name, gpu.uncorrected_errors);
            found.notes.push(format!(
                "{what} that it could not correct since its driver was loaded; see nvidia-smi -q"
            ));
        }
        let (name, uuid, memory_bytes) = match slice {
            Some(slice) => (&slice.name, &slice.uuid, slice.memory_bytes),
            None => (&gpu.name, &gpu.uuid, gpu.memory_bytes),
        };
        found.devices.push(DeviceOptions {
            id: DeviceId::new(id),
            accelerator: accelerator(name, memory_bytes),
            memory_bytes: memory_bytes.saturating_sub(RESERVE),
            max_pack_size: PACK_SIZE,
            price_per_hour: 0.0,
            price_from: None,
            compute_capability: Some(capability(settings.built_for.unwrap_or(gpu.compute).min(gpu.compute))),
            // By its UUID, so that the process opens this very one, however CUDA counts; and because CUDA shows a process
            // no more than one slice.
            host: EngineHost::Process {
                device: "cuda:0".into(),
                variables: vec![("CUDA_VISIBLE_DEVICES".into(), uuid.clone())],
            },
        });
    }
    found
}

/// A GPU, or a slice of it.
type Seen<'a> = (&'a Gpu, Option<&'a Slice>);

/// The GPUs and slices that CUDA shows, in its order, and the entry of `CUDA_VISIBLE_DEVICES` that is none, if one is.
fn visible<'a>(facts: &'a Facts, settings: &Settings) -> (Vec<Seen<'a>>, Option<String>) {
    let mut gpus: Vec<&Gpu> = facts.gpus.iter().collect();
    if settings.order.as_deref() != Some("PCI_BUS_ID") {
        gpus.sort_by_key(|gpu| std::cmp::Reverse(gpu.speed));
    }
    let Some(list) = &settings.visible else {
        return (gpus.into_iter().flat_map(parts).collect(), None);
    };
    let mut seen: Vec<Seen> = Vec::new();
    let mut known = BTreeSet::new();
    let list = list.trim();
    for entry in list.split(',').map(str::trim).filter(|_| !list.is_empty()) {
        let Some(named) = named(entry, &gpus) else {
            // `-1` is how people say "none".
            return (seen, Some(entry.to_string()).filter(|entry| entry != "-1"));
        };
        for part in named {
            if !known.insert(uuid(part)) {
                // CUDA shows nothing at all then.
                return (Vec::new(), Some(entry.to_string()));
            }
            seen.push(part);
        }
    }
    (seen, None)
}

/// What an entry names: a GPU by its number or by how its UUID begins, and with it all its slices, or one slice.
fn named<'a>(entry: &str, gpus: &[&'a Gpu]) -> Option<Vec<Seen<'a>>> {
    if entry.starts_with("GPU-") || entry.starts_with("MIG-") {
        let all = gpus.iter().flat_map(|gpu| parts(gpu).into_iter());
        let gpu: Vec<_> = gpus.iter().filter(|gpu| gpu.uuid.starts_with(entry)).collect();
        let slices: Vec<_> =
            all.filter(|(_, slice)| slice.is_some_and(|s| s.uuid.starts_with(entry))).collect();
        return match (&gpu[..], &slices[..]) {
            ([gpu], []) => Some(parts(gpu)),
            ([], [slice]) => Some(vec![*slice]),
            _ => None,
        };
    }
    // As CUDA reads it: the digits that it begins with.
    let digits = entry.find(|c: char| !c.is_ascii_digit()).unwrap_or(entry.len());
    let number: usize = entry.get(..digits)?.parse().ok()?;
    gpus.get(number).map(|gpu| parts(gpu))
}

fn parts(gpu: &Gpu) -> Vec<Seen<'_>> {
    match &gpu.slices {
        Some(slices) => slices.iter().map(|slice| (gpu, Some(slice))).collect(),
        None => vec![(gpu, None)],
    }
}

fn capability((major, minor): (u32, u32)) -> ComputeCapability {
    ComputeCapability { major, minor }
}

fn uuid<'a>((gpu, slice): Seen<'a>) -> &'a str {
    slice.map_or(&gpu.uuid, |slice| &slice.uuid)
}

fn article(name: &str) -> &'static str {
    if name.starts_with('N') { "an" } else { "a" }
}

#[cfg(test)]
mod tests;
