//! What the programs make of a machine's GPUs, where the driver's library is one that the test builds: it knows two cards,
//! one of them in MIG slices, and measures what a real one does. It shows that the library is found, asked and believed;
//! what a real driver says is for a machine that has one.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::path::Path;
use std::process::Command;
use tests::http::{free_address, get};
use tests::program::{self, Program};

/// Two cards: 0 is whole and has had a memory error; 1 is in two slices, and does not say what it draws.
const LIBRARY: &str = r#"
#include <string.h>
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } Memory;
typedef struct { unsigned gpu, memory; } Rates;
static int devices[4]; /* two cards, then the slices of the second */
static int number(void *device) { return (int)((int *)device - devices); }
static int text(char *to, unsigned size, const char *from) {
  if (strlen(from) >= size) return 7;
  strcpy(to, from);
  return 0;
}
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = 12090; return 0; }
int nvmlSystemGetDriverVersion(char *to, unsigned size) { return text(to, size, "575.12"); }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **device) { *device = &devices[i]; return 0; }
int nvmlDeviceGetCudaComputeCapability(void *d, int *major, int *minor) { *major = 8; *minor = 0; return 0; }
int nvmlDeviceGetNumGpuCores(void *d, unsigned *cores) { *cores = 6912; return 0; }
int nvmlDeviceGetMaxClockInfo(void *d, int kind, unsigned *mhz) { *mhz = 1410; return 0; }
int nvmlDeviceGetMigMode(void *d, unsigned *now, unsigned *then) { *now = *then = number(d) == 1; return 0; }
int nvmlDeviceGetName(void *d, char *to, unsigned size) {
  return text(to, size, number(d) < 2 ? "NVIDIA A100-SXM4-40GB" : "NVIDIA A100-SXM4-40GB MIG 3g.20gb");
}
int nvmlDeviceGetUUID(void *d, char *to, unsigned size) {
  static const char *of[] = {"GPU-a", "GPU-b", "MIG-c", "MIG-d"};
  return text(to, size, of[number(d)]);
}
int nvmlDeviceGetMemoryInfo_v2(void *d, Memory *memory) {
  memory->total = number(d) < 2 ? 42000000000ull : 21000000000ull;
  memory->used = 3000000000ull;
  memory->reserved = 0;
  memory->free = memory->total - memory->used;
  return 0;
}
int nvmlDeviceGetTotalEccErrors(void *d, int type, int counter, unsigned long long *errors) {
  if (type != 1 || counter != 0) return 2;
  *errors = number(d) == 0;
  return 0;
}
int nvmlDeviceGetUtilizationRates(void *d, Rates *rates) { rates->gpu = 37; rates->memory = 5; return 0; }
int nvmlDeviceGetPowerUsage(void *d, unsigned *milliwatts) { *milliwatts = 123400; return number(d) ? 3 : 0; }
int nvmlDeviceGetTemperature(void *d, int sensor, unsigned *celsius) { *celsius = 61; return 0; }
int nvmlDeviceGetMaxMigDeviceCount(void *d, unsigned *count) { *count = 7; return 0; }
int nvmlDeviceGetMigDeviceHandleByIndex(void *d, unsigned i, void **slice) {
  if (i > 1) return 6;
  *slice = &devices[2 + i];
  return 0;
}
"#;

/// Builds it as the driver's is called.
fn build(dir: &Path) {
    let source = dir.join("nvml.c");
    std::fs::write(&source, LIBRARY).unwrap();
    let library = dir.join("libnvidia-ml.so.1");
    let output =
        Command::new("cc").args(["-shared", "-fPIC", "-o"]).arg(library).arg(source).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn the_drivers_library_is_asked() {
    let dir = tempfile::tempdir().unwrap();
    build(dir.path());
    let path = dir.path().to_str().unwrap();

    let doctor = ["doctor", "--data-dir", path, "--listen", "127.0.0.1:0"];
    let (_, said, errors) = program::output("lorafleet", &doctor, &[("LD_LIBRARY_PATH", path)]);
    assert!(said.contains("ok       driver       NVIDIA 575.12 with CUDA 12.9"), "{said}{errors}");
    // Of this program, which is built without CUDA.
    assert!(said.contains("has an NVIDIA A100-SXM4-40GB"), "{said}{errors}");

    // An agent with no coordinator yet: it tells of its GPUs, whatever it trains on.
    let (http, data) = (free_address(), dir.path().join("agent"));
    let arguments =
        ["--coordinator", "http://127.0.0.1:1", "--devices", "all", "--http", &http, "--data-dir"];
    let arguments = [&arguments[..], &[data.to_str().unwrap()]].concat();
    let mut agent = Program::start_heard_with("gpu-agent", &arguments, |command| {
        command.env("LD_LIBRARY_PATH", path).env("LORAFLEET_LOG", "info").env("LORAFLEET_LOG_FORMAT", "json");
    });
    agent.hears("metrics and health at");
    let gpus: Vec<_> = std::iter::repeat_with(|| agent.hears("\"message\":\"a GPU\"")).take(2).collect();
    for (line, has) in gpus.iter().zip([
        &["\"uuid\":\"GPU-a\"", "\"uncorrected_errors\":1", "\"milliwatts\":123400"][..],
        &["\"uuid\":\"GPU-b\"", "\"uncorrected_errors\":0", "\"slices\":2"],
    ]) {
        assert!(has.iter().all(|part| line.contains(part)), "{line}");
    }
    // Then it has all that it tells of.
    agent.hears("not connected to the coordinator");
    let (status, text) = get(&http, "/metrics");
    assert_eq!(status, 200);
    let own = |uuid: &str| format!("hw_id=\"{uuid}\",hw_name=\"NVIDIA A100-SXM4-40GB\"");
    let (first, second) = (own("GPU-a"), own("GPU-b"));
    let series = |name: &str, labels: &[&str]| {
        let line = |line: &&str| line.starts_with(name) && labels.iter().all(|label| line.contains(label));
        text.lines().find(line).and_then(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok())
    };
    for (name, labels, value) in [
        ("hw_gpu_utilization_ratio{", &[first.as_str()][..], Some(0.37)),
        ("hw_gpu_utilization_ratio{", &[second.as_str()], Some(0.37)),
        ("hw_gpu_memory_usage_bytes{", &[first.as_str()], Some(3e9)),
        ("hw_gpu_memory_limit_bytes{", &[second.as_str()], Some(42e9)),
        ("hw_temperature_celsius{", &[first.as_str(), "hw_type=\"gpu\""], Some(61.0)),
        ("hw_power_watts{", &[first.as_str()], Some(123.4)),
        // What a card does not measure is not told.
        ("hw_power_watts{", &[second.as_str()], None),
        ("hw_errors_total{", &[first.as_str(), "error_type=\"uncorrected\""], Some(1.0)),
        ("hw_errors_total{", &[second.as_str()], Some(0.0)),
    ] {
        assert_eq!(series(name, labels), value, "{name}{labels:?}:\n{text}");
    }
}
