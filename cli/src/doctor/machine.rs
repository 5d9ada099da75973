//! What this machine has: accelerators, memory, disk.

use super::Finding;
use crate::output::bytes;
use domain::{Clock, SystemClock};
use gpu_agent::devices::choose::Found;
use gpu_agent::devices::{cpu, gpus};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Less memory than this trains next to nothing.
const LITTLE_MEMORY: u64 = 4_000_000_000;
/// Less room than this is gone after a few adapters of a 7B model with their resume states, of half a gigabyte each.
const LITTLE_ROOM: u64 = 10_000_000_000;
/// A slower disk makes a checkpoint of half a gigabyte take more than ten seconds.
const SLOW_WRITE: f64 = 50e6;
/// What is written to measure the disk.
const WRITTEN: usize = 64 << 20;
/// Small writes, each brought to the disk: as many as the metrics of as many moments are.
const SMALL: usize = 20;
/// A slower one keeps fewer than 50 changes one after the other a second.
const SLOW_SYNC: Duration = Duration::from_millis(20);

/// The memory that trials on the CPU may use.
pub(super) fn memory() -> Finding {
    let usable = cpu().memory_bytes;
    let found = format!("{} for trials on the CPU", bytes(usable));
    match usable < LITTLE_MEMORY {
        true => Finding::warning("memory", found, "train a small model, or raise the limit of the container"),
        false => Finding::good("memory", found),
    }
}

/// The GPUs, and what is to be said of those that cannot be used.
pub(super) fn accelerators() -> Vec<Finding> {
    of_found(gpus())
}

fn of_found(Found { devices, notes, driver }: Found) -> Vec<Finding> {
    const CHECK: &str = "accelerator";
    let device = |device: gpu_agent::DeviceOptions| {
        Finding::good(CHECK, format!("{}: {}, {}", device.id, device.accelerator, bytes(device.memory_bytes)))
    };
    let driver = driver.map(|driver| Finding::good("driver", format!("NVIDIA {driver}")));
    let mut findings: Vec<_> = devices.into_iter().map(device).collect();
    let remedy = "see docs/gpu.md; until then this machine trains without it";
    findings.extend(notes.into_iter().map(|note| Finding::warning(CHECK, note, remedy)));
    if findings.is_empty() {
        findings.push(Finding::good(CHECK, "no GPU; trials run on the CPU"));
    }
    findings.extend(driver);
    findings
}

/// The disk under a data directory, or under where it would be made.
pub(super) fn disk(data_dir: &Path) -> Vec<Finding> {
    const CHECK: &str = "disk";
    let dir = existing(data_dir);
    let mut findings = Vec::new();
    match rustix::fs::statvfs(&dir) {
        Ok(stat) => {
            let free = stat.f_bavail.saturating_mul(stat.f_frsize);
            let found = format!("{} free for {}", bytes(free), data_dir.display());
            findings.push(match free < LITTLE_ROOM {
                true => Finding::warning(CHECK, found, "make room, or choose another --data-dir"),
                false => Finding::good(CHECK, found),
            });
            // What is written to measure it must not fill it.
            if free < 4 * WRITTEN as u64 {
                return findings;
            }
        }
        Err(error) => {
            let remedy = "choose another --data-dir";
            findings.push(Finding::bad(CHECK, format!("{}: {error}", dir.display()), remedy));
        }
    }
    findings.push(match measure(&dir) {
        Ok(Measured { bytes_per_second, sync }) => {
            let milliseconds = sync.as_secs_f64() * 1e3;
            let found = format!(
                "writes {}/s, brings a small write to the disk in {milliseconds:.1} ms",
                bytes(bytes_per_second as u64)
            );
            let remedy = "sweeps work, and acknowledge less a second; put the data directory on a local SSD";
            match bytes_per_second < SLOW_WRITE || sync > SLOW_SYNC {
                true => Finding::warning(CHECK, found, remedy),
                false => Finding::good(CHECK, found),
            }
        }
        Err(error) => {
            let remedy = "let this user write there, make room, or choose another --data-dir";
            Finding::bad(CHECK, format!("{} cannot be written: {error}", dir.display()), remedy)
        }
    });
    findings
}

/// A path, or the nearest above it that is there.
fn existing(dir: &Path) -> PathBuf {
    let whole = std::path::absolute(dir).unwrap_or_else(|_| dir.to_path_buf());
    whole.ancestors().find(|above| above.exists()).map_or_else(|| PathBuf::from("/"), Path::to_path_buf)
}

struct Measured {
    bytes_per_second: f64,
    /// The median of small writes.
    sync: Duration,
}

/// Writes a file that has no name, so that it is gone however this ends.
fn measure(dir: &Path) -> io::Result<Measured> {
    let clock = SystemClock::new();
    let mut out = tempfile::tempfile_in(dir)?;
    let started = clock.monotonic();
    // A file system that compresses does not take it for nothing.
    let block: Vec<u8> = (0..1u32 << 18).flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    for _ in 0..WRITTEN / block.len() {
        out.write_all(&block)?;
    }
    out.sync_all()?;
    let bytes_per_second = WRITTEN as f64 / (clock.monotonic() - started).as_secs_f64();
    let mut took = Vec::with_capacity(SMALL);
    for _ in 0..SMALL {
        let started = clock.monotonic();
        out.write_all(&block[..512])?;
        out.sync_data()?;
        took.push(clock.monotonic() - started);
    }
    took.sort();
    Ok(Measured { bytes_per_second, sync: took[SMALL / 2] })
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    #[test]
    fn what_the_driver_says_is_passed_on() {
        let gpu = gpu_agent::DeviceOptions {
            id: domain::DeviceId::new("cuda:0"),
            accelerator: "H200-141GB".into(),
            ..cpu()
        };
        let note = "cuda:1 is too old".to_string();
        let found = |devices: &[gpu_agent::DeviceOptions], notes: &[String]| {
            let driver = (!devices.is_empty()).then(|| "580.65 with CUDA 13.0".to_string());
            let found = of_found(Found { devices: devices.to_vec(), notes: notes.to_vec(), driver });
            found.into_iter().map(|finding| (finding.verdict, finding.found)).collect::<Vec<_>>()
        };
        let some = found(std::slice::from_ref(&gpu), std::slice::from_ref(&note));
        assert!(some[0].1.starts_with("cuda:0: H200-141GB, ") && some[0].0 == Verdict::Good, "{some:?}");
        assert_eq!(some[1], (Verdict::Warning, note));
        assert_eq!(some[2], (Verdict::Good, "NVIDIA 580.65 with CUDA 13.0".into()));
        assert_eq!(found(&[], &[])[0].0, Verdict::Good);
    }

    #[test]
    fn a_disk_is_measured_and_left_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let findings = disk(&dir.path().join("not/there/yet"));
        assert!(findings.iter().all(|finding| finding.verdict != Verdict::Bad), "{findings:?}");
        assert!(findings[1].found.contains("/s, brings a small write"), "{findings:?}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_directory_that_takes_nothing_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "x").unwrap();
        let findings = disk(&file.join("below"));
        let last = findings.last().unwrap();
        let found = format!("{} cannot be written: Not a directory", file.display());
        assert!(last.verdict == Verdict::Bad && last.found.contains(&found), "{last:?}");
        assert!(last.remedy.contains("--data-dir"));
    }
}
