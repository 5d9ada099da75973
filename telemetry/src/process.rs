//! Metrics of the process and of tokio, by OpenTelemetry's names. They are read when they are collected.

use crate::metrics::{self, Reading};
use std::sync::OnceLock;
use tokio::runtime::{Handle, Runtime};

/// The runtime that is observed: a program has one.
static RUNTIME: OnceLock<Handle> = OnceLock::new();

/// Tells of this runtime, the program's own.
pub fn observe_runtime(runtime: &Runtime) {
    let _ = RUNTIME.set(runtime.handle().clone());
}

pub(crate) fn observe() {
    metrics::PROCESS_CPU_TIME.observe(|| {
        let times = stat().map(|stat| [("user", stat.user_seconds), ("system", stat.system_seconds)]);
        times
            .into_iter()
            .flatten()
            .map(|(mode, seconds)| Reading::new(seconds, &[("cpu.mode", mode)]))
            .collect()
    });
    metrics::PROCESS_MEMORY_USAGE
        .observe(|| stat().map(|stat| Reading::new(stat.resident_bytes, &[])).into_iter().collect());
    metrics::PROCESS_THREAD_COUNT
        .observe(|| stat().map(|stat| Reading::new(stat.threads, &[])).into_iter().collect());
    metrics::PROCESS_OPEN_FILES.observe(|| {
        let open = std::fs::read_dir("/proc/self/fd").map(|files| files.count());
        open.map(|open| Reading::new(open as f64, &[])).into_iter().collect()
    });
    metrics::RUNTIME_WORKERS.observe(|| of_runtime(|metrics| metrics.num_workers()));
    metrics::RUNTIME_TASKS.observe(|| of_runtime(|metrics| metrics.num_alive_tasks()));
    metrics::RUNTIME_QUEUE.observe(|| of_runtime(|metrics| metrics.global_queue_depth()));
}

fn of_runtime(read: impl Fn(&tokio::runtime::RuntimeMetrics) -> usize) -> Vec<Reading> {
    RUNTIME.get().map(|handle| Reading::new(read(&handle.metrics()) as f64, &[])).into_iter().collect()
}

/// Of `/proc/self/stat` (proc(5)); elsewhere than on Linux nothing is told.
struct Stat {
    user_seconds: f64,
    system_seconds: f64,
    threads: f64,
    resident_bytes: f64,
}

/// Ticks in a second (`CLK_TCK`) and bytes in a page, as Linux has them on the machines that we build for.
const TICKS: f64 = 100.0;
const PAGE: f64 = 4096.0;

fn stat() -> Option<Stat> {
    parse(&std::fs::read_to_string("/proc/self/stat").ok()?)
}

fn parse(text: &str) -> Option<Stat> {
    // The program's name stands in brackets and may hold anything.
    let fields: Vec<_> = text.get(text.rfind(')')? + 1..)?.split_whitespace().collect();
    // Field 3 of the manual is the first of these.
    let number = |field: usize| fields.get(field - 3)?.parse::<f64>().ok();
    Some(Stat {
        user_seconds: number(14)? / TICKS,
        system_seconds: number(15)? / TICKS,
        threads: number(20)?,
        resident_bytes: number(24)? * PAGE,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_line_is_read() {
        let line =
            "7 (a) b) S 1 7 7 0 -1 4194304 100 0 0 0 250 150 0 0 20 0 12 0 1 9000 300 18446744073709551615";
        let stat = parse(line).unwrap();
        assert_eq!((stat.user_seconds, stat.system_seconds, stat.threads), (2.5, 1.5, 12.0));
        assert_eq!(stat.resident_bytes, 300.0 * 4096.0);
        assert!(parse("7 (a").is_none());
    }
}
