//! What `coordinator::fsck` finds: nothing in a directory that a real run left, and each of many mutilations of it
//! by name. The engine is the simulated one; coordinator, agent and files are real.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use actor::Scope;
use coordinator::fsck::{self, Findings};
use domain::data::ContentHash;
use domain::{Clock, SystemClock};
use gpu_agent::engine::pack::Pack;
use gpu_agent::engine::simulated::Simulated;
use proto::v1;
use proto::v1::sweep_service_client::SweepServiceClient;
use registry::{Registry, SqliteRegistry, Write};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Runs sweeps to their ends in a directory. Answers with their ids.
async fn run(dir: &Path, sweeps: &[Value]) -> Vec<String> {
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
    let (coordinator_scope, agent_scope) = (Scope::new(), Scope::new());
    let options = coordinator::Options {
        data_dir: dir.into(),
        listen: ([127, 0, 0, 1], 0).into(),
        clock: clock.clone(),
        heartbeat: Duration::from_millis(100),
        lease: Duration::from_secs(20),
        access: coordinator::Access::default(),
    };
    let server = coordinator::start(options, coordinator_scope.clone()).await.unwrap();
    let endpoint = format!("http://{}", server.address);
    let agent = gpu_agent::Options {
        coordinator: endpoint.clone().into(),
        data_dir: dir.join("agent"),
        devices: vec![gpu_agent::devices::cpu()],
        labels: BTreeMap::new(),
        cache_limit: gpu_agent::cache::DEFAULT_LIMIT,
        clock: clock.clone(),
    };
    let engines: gpu_agent::Engines = Arc::new(move |device| {
        let (clock, memory) = (clock.clone(), device.memory_bytes);
        Box::new(move || {
            let backend = Simulated::stepping(Duration::ZERO, clock.clone());
            Box::new(Pack::new(backend, memory, clock.clone()))
        })
    });
    gpu_agent::start_with(agent, engines, agent_scope.clone()).await.unwrap();
    let mut client = SweepServiceClient::connect(endpoint).await.unwrap();
    let mut ids = Vec::new();
    for document in sweeps {
        let spec = Some(proto::convert::to_struct(document.as_object().unwrap()));
        let request_id = format!("6f1c0c0e-9a43-4d0e-8c3a-52d1b6f4a00{}", ids.len());
        let request = v1::SubmitSweepRequest { request_id, spec, base_models: HashMap::new() };
        let id = client.submit_sweep(request).await.unwrap().into_inner().sweep.unwrap().id;
        let request = v1::WatchSweepRequest { sweep_id: id.clone() };
        let mut watched = client.watch_sweep(request).await.unwrap().into_inner();
        while watched.message().await.unwrap().is_some() {}
        ids.push(id);
    }
    assert!(
        agent_scope.finish(gpu_agent::SHUTDOWN_GRACE).await
            && coordinator_scope.finish(Duration::from_secs(10)).await
    );
    ids
}

/// Three trials, of which the third diverges; and six of which successive halving ends some.
fn sweeps() -> [Value; 2] {
    let rest = |name: &str, search: Value, rates: Value| {
        json!({
            "name": name, "pretrained_model_id": "base", "dataset_name": "rows.jsonl", "max_steps": 20,
            "save_steps": 5, "eval_steps": 5, "search": search, "parameters": { "learning_rate": rates },
        })
    };
    [
        rest("grid", json!({ "algorithm": "grid" }), json!([1e-3, 5e-3, 2.0])),
        rest(
            "halving",
            json!({ "algorithm": "asha", "max_trials": 6, "min_steps": 5, "reduction_factor": 2, "seed": 3 }),
            json!({ "log_uniform": [1e-5, 1e-1] }),
        ),
    ]
}

/// One mutilated copy of a directory.
struct Copy {
    dir: tempfile::TempDir,
    grid: String,
}

impl Copy {
    fn of(source: &Path, grid: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        copy(source, dir.path());
        Self { dir, grid: grid.into() }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.dir.path().join(path)
    }

    fn trial(&self) -> String {
        format!("trials/{}/0000000001", self.grid)
    }

    fn sweep(&self) -> String {
        format!("sweeps/{}", self.grid)
    }

    /// Changes the registry by its own door.
    fn write(&self, change: impl FnOnce(&mut Vec<(String, Vec<u8>)>)) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let registry = SqliteRegistry::open(&self.path("coordinator.db")).unwrap();
            let fence = registry.lead("test").await.unwrap();
            let before = registry.list("", None, 1000).await.unwrap();
            let mut after = before.clone();
            change(&mut after);
            let mut batch: Vec<_> = before.into_iter().map(|(key, _)| Write::Delete(key)).collect();
            batch.extend(after.into_iter().map(|(key, value)| Write::Put(key, value)));
            registry.commit(fence, batch).await.unwrap();
        });
    }

    /// Changes one record.
    fn edit(&self, key: &str, change: impl FnOnce(&mut Value)) {
        self.write(|entries| {
            let entry = entries.iter_mut().find(|(other, _)| other == key).unwrap();
            let mut value = serde_json::from_slice(&entry.1).unwrap();
            change(&mut value);
            entry.1 = serde_json::to_vec(&value).unwrap();
        });
    }

    /// Makes trials runs of the first one with seed 7, then changes their records.
    fn run_again(&self, numbers: &[u32], change: impl Fn(&mut Value)) {
        for number in numbers {
            self.edit(&format!("trials/{}/{number:010}", self.grid), |record| {
                record["trial"]["replicate_of"] = json!(format!("{}/1", self.grid));
                record["trial"]["config"]["seed"] = json!(7);
                change(record);
            });
        }
    }

    /// Moves what was asked of the sweep to an object, as a fleet's coordinator does where it is large; then does something with
    /// its file.
    fn move_specs(&self, then: impl FnOnce(&Path)) {
        self.edit(&self.sweep(), |record| {
            let [spec, revisions, extensions, base_models] =
                ["/sweep/spec", "/revisions", "/extensions", "/base_models"]
                    .map(|member| record.pointer_mut(member).unwrap().take());
            let specs = json!({
                "spec": spec, "revisions": revisions, "extensions": extensions, "base_models": base_models,
            });
            let bytes = specs.to_string().into_bytes();
            let hash = ContentHash(Sha256::digest(&bytes).into());
            let path = format!("sweeps/{}/spec-{hash}", self.grid);
            let file = self.path("artifacts").join(&path);
            std::fs::write(&file, &bytes).unwrap();
            record["specs"] = json!({ "path": path, "bytes": bytes.len() });
            then(&file);
        });
    }

    fn remove(&self, prefix: &str) {
        self.write(|entries| entries.retain(|(key, _)| !key.starts_with(prefix)));
    }

    /// The folder of the first trial's adapter.
    fn adapter(&self) -> PathBuf {
        let trial = self.path(&format!("artifacts/sweeps/{}/1", self.grid));
        let entries = std::fs::read_dir(trial).unwrap().map(|entry| entry.unwrap().path());
        entries.into_iter().find(|path| path.to_string_lossy().contains("adapter-")).unwrap()
    }

    fn segment(&self) -> PathBuf {
        self.path("history/segment-00000001.log")
    }
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(|entry| entry.unwrap()) {
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target)
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// Every file below a directory, with its bytes.
fn files(dir: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()) {
        if entry.is_dir() {
            found.extend(files(&entry))
        } else {
            found.push((entry.clone(), std::fs::read(entry).unwrap()))
        }
    }
    found.sort();
    found
}

fn flip(path: &Path, at: impl FnOnce(usize) -> usize) {
    let mut bytes = std::fs::read(path).unwrap();
    let at = at(bytes.len());
    bytes[at] ^= 0x10;
    std::fs::write(path, bytes).unwrap();
}

fn append(path: &Path, more: &[u8]) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes.extend(more);
    std::fs::write(path, bytes).unwrap();
}

fn texts(findings: &[fsck::Finding]) -> Vec<String> {
    findings.iter().map(|finding| format!("{}: {}", finding.place, finding.what)).collect()
}

/// A mutilation, and what must be said of it: where, and what.
type Row = (&'static str, fn(&Copy), &'static str, &'static str);

const PROBLEMS: &[Row] = &[
    (
        "a byte of an adapter flipped",
        |c| flip(&c.adapter().join("simulated.json"), |_| 0),
        "adapter-",
        "SHA-256 is",
    ),
    (
        "an adapter cut",
        |c| std::fs::write(c.adapter().join("simulated.json"), "").unwrap(),
        "adapter-",
        "has 0 bytes",
    ),
    (
        "an adapter's file removed",
        |c| std::fs::remove_file(c.adapter().join("simulated.json")).unwrap(),
        "adapter-",
        "No such file",
    ),
    ("an adapter removed", |c| std::fs::remove_dir_all(c.adapter()).unwrap(), "/1", "which is not there"),
    (
        "a manifest removed",
        |c| std::fs::remove_file(c.adapter().join("manifest.json")).unwrap(),
        "/1",
        "which is not there",
    ),
    (
        "a manifest damaged",
        |c| std::fs::write(c.adapter().join("manifest.json"), "{").unwrap(),
        "adapter-",
        "manifest.json cannot be read",
    ),
    (
        "a spec's object removed",
        |c| c.move_specs(|file| std::fs::remove_file(file).unwrap()),
        "sweeps/grid-",
        "its spec: there is no `sweeps/grid-",
    ),
    ("a byte of a spec flipped", |c| c.move_specs(|file| flip(file, |_| 0)), "sweeps/grid-", "is damaged"),
    (
        "uploaded data that a record ascribes to its spec",
        |c| {
            c.move_specs(|_| {});
            c.edit(&c.sweep(), |v| v["specs"]["trees"] = json!([TREE]));
        },
        "sweeps/grid-",
        "its spec names no uploaded data, and the record says 0123456789abcdef",
    ),
    (
        "another length of a spec",
        |c| {
            c.move_specs(|_| {});
            c.edit(&c.sweep(), |v| v["specs"]["bytes"] = json!(7));
        },
        "sweeps/grid-",
        "and the record says 7",
    ),
    ("a trial's record removed", |c| c.remove(&c.trial()), "grid-", "missing: [1]"),
    ("a sweep's record removed", |c| c.remove(&c.sweep()), "requests/", "there is no record"),
    ("a request's entry removed", |c| c.remove("requests/"), "grid-", "does not lead to it"),
    ("a listing's entry removed", |c| c.remove("newest/"), "grid-", "does not lead to it"),
    ("a record that is no JSON", |c| c.edit(&c.trial(), |v| *v = json!("text")), "trials/", "cannot be read"),
    (
        "a record under another's key",
        |c| c.edit(&c.trial(), |v| v["trial"]["id"] = json!(format!("{}/7", c.grid))),
        "trials/",
        "belongs to",
    ),
    (
        "a count too high",
        |c| c.edit(&c.sweep(), |v| v["sweep"]["proposed"] = json!(4)),
        "grid-",
        "missing: [4]",
    ),
    (
        "more adapters than are kept",
        |c| c.edit(&c.sweep(), |v| v["sweep"]["spec"]["keep_adapters"] = json!(1)),
        "grid-",
        "has 2 adapters, and keeps 1 at most",
    ),
    (
        "another run of a trial that is none",
        |c| c.edit(&c.trial(), |v| v["trial"]["replicate_of"] = json!("grid-0000/9")),
        "/1",
        "which is no trial that its search proposed",
    ),
    (
        "a run of another configuration",
        |c| c.run_again(&[2], |_| {}),
        "/2",
        "differs from it in more than its seed",
    ),
    (
        "a run with its first run's seed",
        |c| c.run_again(&[2], |v| v["trial"]["config"]["seed"] = json!(42)),
        "/2",
        "with seed 42, as another run does",
    ),
    ("a run that is there twice", |c| c.run_again(&[2, 3], |_| {}), "/3", "with seed 7, as another run does"),
    (
        "a completed trial's adapter forgotten",
        |c| c.edit(&c.trial(), |v| v["trial"]["adapter"] = json!(null)),
        "/1",
        "is completed, and has no adapter",
    ),
    (
        "a trial that runs in a sweep that is over",
        |c| c.edit(&c.trial(), |v| v["trial"]["state"] = json!("running")),
        "/1",
        "is running, and its sweep is completed",
    ),
    (
        "a trial that runs nowhere",
        |c| c.edit(&c.trial(), |v| v["trial"]["state"] = json!("running")),
        "/1",
        "has no device",
    ),
    (
        "a trial without its end",
        |c| c.edit(&c.trial(), |v| v["trial"]["finished_at"] = json!(null)),
        "/1",
        "not said when it ended",
    ),
    (
        "attempts that do not grow",
        |c| c.edit(&c.trial(), |v| v["trial"]["attempts"] = json!([[1, 0], [1, 0]])),
        "/1",
        "do not grow",
    ),
    (
        "an attempt from nowhere",
        |c| c.edit(&c.trial(), |v| v["trial"]["attempts"] = json!([[1, 500]])),
        "/1",
        "starts from step 500",
    ),
    (
        "an attempt that is over, and on its device still",
        |c| c.edit(&c.trial(), |v| v["trial"]["placements"][0]["ended_at"] = json!(null)),
        "/1",
        "is completed in attempt 1, and its devices are",
    ),
    (
        "points that are missing",
        |c| {
            c.edit(&c.trial(), |v| {
                for pointer in ["/trial/step", "/trial/total_steps", "/trial/summary/steps"] {
                    *v.pointer_mut(pointer).unwrap() = json!(23);
                }
            })
        },
        "/1",
        "3 metric points are missing: steps 21, 22, 23",
    ),
    (
        "points behind the end",
        |c| c.edit(&c.trial(), |v| v["trial"]["step"] = json!(15)),
        "/1",
        "has a point of step 20",
    ),
    (
        "an unfinished trial that is completed",
        |c| c.edit(&c.trial(), |v| v["trial"]["total_steps"] = json!(30)),
        "/1",
        "completed at step 20 of Some(30)",
    ),
    (
        "a byte of the metrics flipped",
        |c| flip(&c.segment(), |length| length / 2),
        "history",
        "checksum does not match",
    ),
    ("a segment lost", |c| std::fs::remove_file(c.segment()).unwrap(), "/1", "metric points are missing"),
    ("a damaged page", |c| flip(&c.path("coordinator.db"), |length| length - 4096 + 1), "coordinator.db", ""),
];

/// The name of uploaded data that is not there.
const TREE: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

/// What such an object is called.
const OLDER_SPEC: &str = "spec-0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef-t7";

const NOTES: &[Row] = &[
    (
        "a torn write of metrics",
        |c| append(&c.segment(), b"LFGC torn"),
        "segment-00000001.log",
        "9 bytes of a write that never was acknowledged",
    ),
    (
        "a segment just begun",
        |c| std::fs::write(c.path("history/segment-00000002.log"), "LFM").unwrap(),
        "segment-00000002.log",
        "just begun",
    ),
    (
        "an unfinished upload",
        |c| {
            let part = c.path(&format!("artifacts/sweeps/{}/1/adapter-a9-s9", c.grid));
            std::fs::create_dir_all(&part).unwrap();
            std::fs::write(part.join("simulated.json"), "9").unwrap();
        },
        "adapter-a9-s9",
        "never finished",
    ),
    (
        "a spec before an extension",
        |c| {
            c.move_specs(|file| {
                std::fs::copy(file, file.with_file_name(OLDER_SPEC)).unwrap();
            })
        },
        OLDER_SPEC,
        "no record points at it",
    ),
    (
        "a spec just begun",
        |c| c.move_specs(|file| std::fs::write(file.with_extension("#1"), "{").unwrap()),
        "spec-",
        "never finished",
    ),
    (
        "an older checkpoint",
        |c| copy(&c.adapter(), &c.adapter().with_file_name("adapter-a1-s1")),
        "adapter-a1-s1",
        "no record points at it",
    ),
];

fn expect(name: &str, found: &[fsck::Finding], place: &str, what: &str) {
    let named = found.iter().any(|f| f.place.contains(place) && f.what.contains(what));
    assert!(named, "{name}: `{place}` … `{what}` is not in {:#?}", texts(found));
}

#[test]
fn what_a_run_leaves_is_sound_and_every_mutilation_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let ids = runtime.block_on(run(dir.path(), &sweeps()));
    let before = files(dir.path());
    let Findings { checked, problems, notes } = fsck::check(dir.path()).unwrap();
    assert_eq!((texts(&problems), texts(&notes)), (vec![], vec![]));
    assert!(files(dir.path()) == before, "a look changes no byte");
    let count = |what| checked.iter().find(|(other, _)| *other == what).unwrap().1;
    assert_eq!((count("sweeps"), count("trials")), (2, 9));
    assert!(count("metric points") > 60 && count("checkpoint parts") >= 9, "{checked:?}");

    for (name, mutilate, place, what) in PROBLEMS {
        let copy = Copy::of(dir.path(), &ids[0]);
        mutilate(&copy);
        expect(name, &fsck::check(copy.dir.path()).unwrap().problems, place, what);
    }
    for (name, mutilate, place, what) in NOTES {
        let copy = Copy::of(dir.path(), &ids[0]);
        mutilate(&copy);
        let findings = fsck::check(copy.dir.path()).unwrap();
        assert_eq!(texts(&findings.problems), Vec::<String>::new(), "{name} is no problem");
        expect(name, &findings.notes, place, what);
    }
}
