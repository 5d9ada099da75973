//! What `--device` means: `auto`, `cpu`, `cuda` or `cuda:N`.

use crate::Failure;
use gpu_agent::DeviceOptions;
use gpu_agent::devices::choose::Found;
use gpu_agent::devices::{CPU, cpu, gpus};

/// The device of a run in this process.
pub(crate) fn of(requested: &str) -> Result<DeviceOptions, Failure> {
    let found = if requested == CPU { Found::default() } else { gpus() };
    if requested == AUTO {
        for note in &found.notes {
            tracing::warn!("{note}");
        }
    }
    choose(requested, found, cfg!(feature = "cuda"))
}

/// The first GPU that can be used, else the CPU.
pub(crate) const AUTO: &str = "auto";

fn choose(requested: &str, found: Found, with_cuda: bool) -> Result<DeviceOptions, Failure> {
    let Found { devices, notes, .. } = found;
    let wanted = match requested {
        CPU => return Ok(cpu()),
        AUTO => return Ok(devices.into_iter().next().unwrap_or_else(cpu)),
        "cuda" => "cuda:0",
        other => other,
    };
    if wanted.strip_prefix("cuda:").is_none_or(|number| number.parse::<usize>().is_err()) {
        return Err(Failure::invalid(format!(
            "--device {requested}: is no device; give auto, cpu, cuda or cuda:N"
        )));
    }
    if !with_cuda {
        return Err(Failure::invalid(format!(
            "--device {requested}: this program was built without CUDA; build it with --features cuda (docs/gpu.md), or \
             use cpu"
        )));
    }
    let ids: Vec<_> = devices.iter().map(|device| device.id.to_string()).collect();
    devices.into_iter().find(|device| device.id.as_str() == wanted).ok_or_else(|| {
        let there = if ids.is_empty() { CPU.to_string() } else { ids.join(", ") };
        let why: String = notes.iter().map(|note| format!("; {note}")).collect();
        Failure::invalid(format!("--device {requested}: cannot be used{why}; there is {there}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use gpu_agent::EngineHost;

    #[test]
    fn devices_by_name() {
        let gpu = |id: &str| DeviceOptions {
            id: domain::DeviceId::new(id),
            accelerator: "H200-141GB".into(),
            memory_bytes: 1,
            max_pack_size: 1,
            price_per_hour: 0.0,
            price_from: None,
            compute_capability: None,
            host: EngineHost::Thread,
        };
        let note = "cuda:0 is too old";
        // The first card is too old.
        let some = || Found {
            devices: vec![gpu("cuda:1"), gpu("cuda:2")],
            notes: vec![note.into()],
            ..Found::default()
        };
        // (what is asked for, of what, with CUDA, the device or what is said)
        for (requested, found, with_cuda, want) in [
            ("cpu", some(), true, Ok("cpu")),
            ("auto", some(), true, Ok("cuda:1")),
            ("auto", Found::default(), true, Ok("cpu")),
            ("auto", Found::default(), false, Ok("cpu")),
            ("cuda:2", some(), true, Ok("cuda:2")),
            ("cuda", some(), true, Err("cuda:0 is too old; there is cuda:1, cuda:2")),
            ("cuda:3", some(), true, Err("there is cuda:1, cuda:2")),
            ("cuda", Found::default(), true, Err("there is cpu")),
            ("cuda:0", Found::default(), false, Err("--features cuda")),
            ("cuda:x", some(), true, Err("is no device")),
            ("gpu", some(), true, Err("is no device")),
        ] {
            match (choose(requested, found, with_cuda), want) {
                (Ok(device), Ok(want)) => assert_eq!(device.id.as_str(), want, "{requested}"),
                (Err(error), Err(want)) => {
                    assert!(format!("{error:?}").contains(want), "{requested}: {error:?}")
                }
                (got, want) => panic!("{requested}: {got:?}, not {want:?}"),
            }
        }
    }
}
