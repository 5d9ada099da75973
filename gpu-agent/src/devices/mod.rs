//! What this machine has to train on.
//!
//! | module | holds |
//! |---|---|
//! | here | the CPU; all that this machine trains on |
//! | [`choose`] | which GPUs are trained on, decided from facts |
//! | `nvml` | those facts, asked of the driver |
//! | `names` | what accelerators are called |
//! | [`simulated`] | devices that are not there, as `--simulate` names them |

pub mod choose;
mod names;
mod nvml;
pub mod simulated;

use crate::{DeviceOptions, EngineHost};
use choose::{Found, Settings};
use config::machines::Catalogue;
use domain::DeviceId;
use std::path::Path;
use std::process::Command;

/// The id of the CPU as a device.
pub const CPU: &str = "cpu";
/// What it is called where accelerators are: no catalogue has it.
const CPU_ACCELERATOR: &str = "CPU";
/// Trials that share the CPU unless told otherwise.
const CPU_PACK_SIZE: u32 = 4;
/// The share of the machine's memory that is left to everything else.
const RESERVED_SHARE: u64 = 8;
/// Assumed where the system does not say how much memory there is.
const ASSUMED_BYTES: u64 = 4_000_000_000;

/// The CPU as a device: [`CPU`], free of charge, with seven eighths of the memory that this process may use.
pub fn cpu() -> DeviceOptions {
    let memory = memory_bytes();
    DeviceOptions {
        id: DeviceId::new(CPU),
        accelerator: CPU_ACCELERATOR.into(),
        memory_bytes: memory - memory / RESERVED_SHARE,
        max_pack_size: CPU_PACK_SIZE,
        price_per_hour: 0.0,
        price_from: None,
        compute_capability: None,
        host: EngineHost::Thread,
    }
}

/// The CUDA that this program was built with: major, minor; `None` without. `build.rs` asks the compiler.
fn built_with() -> Option<(u32, u32)> {
    // A compiler that does not say its version is one that no driver is too old for.
    let parsed = option_env!("LORAFLEET_CUDA").and_then(version).unwrap_or_default();
    cfg!(feature = "cuda").then_some(parsed)
}

fn version(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The GPUs that this program can train on, and what is to be said about others, a line each.
pub fn gpus() -> Found {
    let variable = |name| std::env::var(name).ok();
    let settings = Settings {
        visible: variable("CUDA_VISIBLE_DEVICES"),
        order: variable("CUDA_DEVICE_ORDER"),
        built_with: built_with(),
        built_for: trainer::device::built_for(),
    };
    choose::choose(&nvml::read(), &settings)
}

/// All that this machine trains on: every GPU that can be used, else the CPU; and what is to be said about it.
pub fn local() -> Found {
    let mut found = gpus();
    if found.devices.is_empty() {
        found.devices.push(cpu());
    }
    found
}

/// A machine's price, as it is written.
///
/// # Errors
/// It is no number of dollars that a coordinator takes.
pub fn price(text: &str) -> Result<f64, String> {
    let most = proto::limits::PRICE_PER_HOUR;
    let parsed = text.parse().ok().filter(|price| (0.0..=most).contains(price));
    parsed.ok_or_else(|| format!("write dollars an hour, from 0 to {most}"))
}

/// What is to be said of devices whose price nobody named, a line an accelerator.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Prices {
    /// What they cost, and who says so.
    pub known: Vec<String>,
    /// Those of which the catalogue has no price.
    pub unknown: Vec<String>,
}

/// Gives each of a machine's devices its price: its share of the machine's, if that is given; else, but for the CPU, what the
/// cheapest machine of the catalogue asks for one such accelerator on demand.
///
/// # Errors
/// The user's catalogue cannot be read.
pub fn priced(devices: &mut [DeviceOptions], price_per_hour: Option<f64>) -> Result<Prices, String> {
    if let Some(price) = price_per_hour {
        let each = price / devices.len() as f64;
        devices.iter_mut().for_each(|device| device.price_per_hour = each);
        return Ok(Prices::default());
    }
    if devices.iter().all(|device| device.accelerator == CPU_ACCELERATOR) {
        return Ok(Prices::default());
    }
    Ok(priced_by(&Catalogue::load().map_err(|error| error.to_string())?, devices))
}

fn priced_by(catalogue: &Catalogue, devices: &mut [DeviceOptions]) -> Prices {
    let mut prices = Prices::default();
    for device in devices.iter_mut().filter(|device| device.accelerator != CPU_ACCELERATOR) {
        let name = &device.accelerator;
        let (lines, line) = match catalogue.cheapest(name) {
            Some(machine) => {
                device.price_per_hour = machine.price_of_one();
                device.price_from = Some(machine.price_source());
                (&mut prices.known, machine.price_line())
            }
            None => (
                &mut prices.unknown,
                format!(
                    "{name}: no price is known, so what trials cost there is not counted; --price-per-hour gives one"
                ),
            ),
        };
        if !lines.contains(&line) {
            lines.push(line);
        }
    }
    prices
}

/// Has the metrics tell of this machine's GPUs.
pub(crate) fn observe() {
    nvml::observe();
}

/// The machine's name.
pub fn hostname() -> String {
    let kernel = std::fs::read_to_string("/proc/sys/kernel/hostname").ok();
    let name = kernel.or_else(|| output("hostname", &[])).unwrap_or_default();
    if name.trim().is_empty() { "unknown".into() } else { name.trim().into() }
}

/// Bytes that this process may use: the machine's, or its control group's if that is less.
fn memory_bytes() -> u64 {
    let machine = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| mem_total(&text));
    let machine = machine.or_else(|| output("sysctl", &["-n", "hw.memsize"])?.trim().parse().ok());
    let group = std::fs::read_to_string("/proc/self/cgroup").ok();
    let limit = group.and_then(|text| group_limit(&text, |path| std::fs::read_to_string(path).ok()));
    machine.into_iter().chain(limit).min().unwrap_or(ASSUMED_BYTES)
}

fn output(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).output().ok()?;
    String::from_utf8(output.stdout).ok()
}

/// `MemTotal` of `/proc/meminfo`, which counts in KiB.
fn mem_total(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

/// The smallest memory limit of the control groups that `/proc/self/cgroup` names, and of those above them.
fn group_limit(cgroup: &str, read: impl Fn(&Path) -> Option<String>) -> Option<u64> {
    let mut limits = Vec::new();
    for line in cgroup.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(group)) = (fields.next(), fields.next()) else { continue };
        let (root, file) = match controllers {
            "" => ("/sys/fs/cgroup", "memory.max"),
            c if c.split(',').any(|c| c == "memory") => ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
            _ => continue,
        };
        // In a container the group's own path may not be visible, but the mount's root is the container's.
        for above in Path::new(group.trim_start_matches('/')).ancestors() {
            let limit = read(&Path::new(root).join(above).join(file));
            limits.extend(limit.and_then(|text| text.trim().parse::<u64>().ok()));
        }
    }
    limits.into_iter().min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        for (text, want) in [("12.9", Some((12, 9))), ("13.0", Some((13, 0))), ("12", None), ("x.y", None)] {
            assert_eq!(version(text), want, "{text}");
        }
        assert_eq!(built_with().is_some(), cfg!(feature = "cuda"));
    }

    /// Whatever this machine has.
    #[test]
    fn there_is_always_a_device() {
        let found = local();
        let named: Vec<_> = found.devices.iter().map(|device| device.id.as_str()).collect();
        assert!(
            named == [CPU] || cfg!(feature = "cuda") && named.iter().all(|id| id.starts_with("cuda:")),
            "{found:?}"
        );
    }

    /// What is said of a machine's price goes before the catalogue, also that it is free; a CPU has none in it.
    #[test]
    fn devices_cost_what_is_said() {
        let gpu = |name: &str| DeviceOptions { accelerator: name.into(), ..cpu() };
        let price = |device: &DeviceOptions| (device.price_per_hour, device.price_from.is_some());
        for (names, said, want) in [
            (&["CPU"][..], None, &[(0.0, false)][..]),
            (&["CPU"], Some(0.5), &[(0.5, false)]),
            (&["A100-40GB", "A100-40GB"], Some(3.0), &[(1.5, false), (1.5, false)]),
            (&["A100-40GB"], Some(0.0), &[(0.0, false)]),
        ] {
            let mut devices: Vec<_> = names.iter().map(|name| gpu(name)).collect();
            assert_eq!(priced(&mut devices, said), Ok(Prices::default()), "{names:?} {said:?}");
            assert_eq!(devices.iter().map(price).collect::<Vec<_>>(), want, "{names:?} {said:?}");
        }
        let mut devices = ["A100-40GB", "CPU", "X-1GB"].map(gpu);
        let prices = priced_by(&Catalogue::shipped(), &mut devices);
        assert_eq!(devices.each_ref().map(price), [(3.673385, true), (0.0, false), (0.0, false)]);
        assert_eq!((prices.known.len(), prices.unknown.len()), (1, 1), "{prices:?}");
    }

    #[test]
    fn memory_of_the_machine() {
        assert_eq!(mem_total("MemFree: 1 kB\nMemTotal:       16384 kB\n"), Some(16384 * 1024));
        assert_eq!(mem_total("MemTotal: many"), None);
        assert!(cpu().memory_bytes > 0 && !hostname().is_empty());
    }

    #[test]
    fn memory_of_the_control_group() {
        let files = [
            ("/sys/fs/cgroup/a/b/memory.max", "max\n"),
            ("/sys/fs/cgroup/a/memory.max", "4000\n"),
            ("/sys/fs/cgroup/c/memory.max", "9000\n"),
            ("/sys/fs/cgroup/memory/d/memory.limit_in_bytes", "7000\n"),
        ];
        let read = |path: &Path| {
            files.iter().find(|(name, _)| Path::new(name) == path).map(|(_, text)| text.to_string())
        };
        for (cgroup, want) in [
            ("0::/a/b\n", Some(4000)),
            ("0::/c\n", Some(9000)),
            ("0::/\n", None),
            ("5:cpu,memory:/d\n4:pids:/a\n", Some(7000)),
            ("nonsense", None),
        ] {
            assert_eq!(group_limit(cgroup, read), want, "{cgroup:?}");
        }
    }
}
