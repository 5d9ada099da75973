//! Metrics of the process and of tokio, by OpenTelemetry's names. They are read when they are collected.

use crate::metrics::{self, Reading};
use std::sync::OnceLock;
use tokio::runtime::{Handle, Runtime};

/// The runtime that is observed: a program has one.
static RUNTIME: OnceLock<Handle> = OnceLock::new();

/// Tells of this runtime, the program's own.
pub(crate) fn observe_runtime(runtime: &Runtime) {
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
        .observe(|| status("VmRSS").map(|kib| Reading::new(kib * 1024.0, &[])).into_iter().collect());
    metrics::PROCESS_THREAD_COUNT
        .observe(|| status("Threads").map(|threads| Reading::new(threads, &[])).into_iter().collect());
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

/// CPU seconds of `/proc/self/stat` (proc(5)); elsewhere than on Linux nothing is told.
struct Stat {
    user_seconds: f64,
    system_seconds: f64,
}

/// Ticks in a second (`CLK_TCK`) as Linux has them for programs, on every machine.
const TICKS: f64 = 100.0;

fn stat() -> Option<Stat> {
    parse(&std::fs::read_to_string("/proc/self/stat").ok()?)
}

fn parse(text: &str) -> Option<Stat> {
    // The program's name stands in brackets and may hold anything.
    let fields: Vec<_> = text.get(text.rfind(')')? + 1..)?.split_whitespace().collect();
    // Field 3 of the manual is the first of these.
    let number = |field: usize| fields.get(field - 3)?.parse::<f64>().ok();
    Some(Stat { user_seconds: number(14)? / TICKS, system_seconds: number(15)? / TICKS })
}

/// A number of `/proc/self/status`, whose bytes are in KiB: `stat` has them in pages, which are not of one size
/// everywhere.
fn status(name: &str) -> Option<f64> {
    of_status(&std::fs::read_to_string("/proc/self/status").ok()?, name)
}

fn of_status(text: &str, name: &str) -> Option<f64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    rest.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_says_is_read() {
        let line =
            "7 (a) b) S 1 7 7 0 -1 4194304 100 0 0 0 250 150 0 0 20 0 12 0 1 9000 300 18446744073709551615";
        let stat = parse(line).unwrap();
        assert_eq!((stat.user_seconds, stat.system_seconds), (2.5, 1.5));
        assert!(parse("7 (a").is_none());
        let text = "Name:\tThreads: 3\nVmRSS:\t    1200 kB\nThreads:\t12\n";
        assert_eq!((of_status(text, "VmRSS"), of_status(text, "Threads")), (Some(1200.0), Some(12.0)));
        assert_eq!(of_status(text, "Vm"), None);
    }
}
