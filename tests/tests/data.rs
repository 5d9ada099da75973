//! A submitter, a coordinator and agents that share no directory: models and rows are uploaded, fetched, and the same
//! everywhere.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use actor::Scope;
use common::{results, until};
use proto::v1;
use serde_json::Value;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tests::program::{self, Program};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// What a test waits for at most.
const PATIENCE: Duration = Duration::from_secs(120);

/// The sweep of [`common::submit`], on files beside it.
const SWEEP: &str = "name: two
pretrained_model_id: ./base
dataset_name: instruct.jsonl
eval_size: 2
batch_size: 1
max_sequence_length: 32
max_steps: 240
save_steps: 4
search: { algorithm: grid }
parameters: { lora_rank: [2, 4] }
evaluations: { tasks: [arc_easy], task_data: { arc_easy: documents } }
";

async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("waited in vain for {what}"))
}

/// A sweep with its model and rows in a directory of its own.
fn submitter(dir: &Path) {
    let quickstart = tests::root().join("config/quickstart");
    std::fs::create_dir_all(dir.join("base")).unwrap();
    std::fs::write(dir.join("sweep.yaml"), SWEEP).unwrap();
    std::fs::copy(quickstart.join("instruct.jsonl"), dir.join("instruct.jsonl")).unwrap();
    // In the folder of the task's part of its data set, as it comes from the hub.
    std::fs::create_dir_all(dir.join("documents/ARC-Easy")).unwrap();
    let choices = serde_json::json!({ "text": ["a cat", "two dogs"], "label": ["A", "B"] });
    let document = serde_json::json!({ "question": "Who is it?", "answerKey": "B", "choices": choices });
    std::fs::write(dir.join("documents/ARC-Easy/test.jsonl"), format!("{document}\n").repeat(5)).unwrap();
    for entry in std::fs::read_dir(quickstart.join("base")).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, dir.join("base").join(path.file_name().unwrap())).unwrap();
    }
}

/// What `lorafleet` prints as JSON in a directory, and what it says.
fn lorafleet(dir: &Path, arguments: &[&str]) -> (Value, String) {
    let mut command = Command::new(program::path("lorafleet"));
    command.args(arguments).args(["-o", "json"]).current_dir(dir).env("XDG_CONFIG_HOME", dir);
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{arguments:?}: {said}");
    (serde_json::from_slice(&output.stdout).unwrap(), said)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sweep_on_data_that_only_the_submitter_has() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let path = |name: &str| at(name).to_str().unwrap().to_string();
    let options = ["--listen", "127.0.0.1:0", "--assignment-lease", "8", "--data-dir", &path("coordinator")];
    let mut coordinator = Program::start("coordinator", &options);
    let endpoint = coordinator.says("listening on ");
    let agent = |name: &str| {
        let options = ["--coordinator", &endpoint, "--devices", "cpu", "--data-dir", &path(name)];
        Program::start("gpu-agent", &options)
    };

    // Uploaded once; the same again needs nothing.
    submitter(&at("submitter"));
    let submit = ["submit", "sweep.yaml", "--endpoint", &endpoint];
    let (sweep, said) = lorafleet(&at("submitter"), &submit);
    assert!(said.contains("instruct.jsonl: ") && !said.contains("of which 0 B"), "{said}");
    let id = sweep["id"].as_str().unwrap().to_string();
    for (key, end) in [("pretrained_model_id", "/base/"), ("dataset_name", "/instruct.jsonl")] {
        let name = sweep["spec"][key].as_str().unwrap();
        assert!(name.starts_with("blob:sha256:") && name.ends_with(end), "{name}");
    }
    let (again, said) = lorafleet(&at("submitter"), &submit);
    assert_eq!(said.matches("of which 0 B were uploaded now").count(), 3, "{said}");
    let again = again["id"].as_str().unwrap();
    lorafleet(&at("submitter"), &["cancel", again, "--endpoint", &endpoint]);

    // Nobody can read it there any more. One agent begins, another goes on, each with files of its own.
    std::fs::rename(at("submitter"), at("gone")).unwrap();
    let first = agent("first");
    soon("training", until(&endpoint, &id, 10)).await;
    first.kill();
    let second = agent("second");
    soon("the end", until(&endpoint, &id, u64::MAX)).await;
    let uploaded = results(&endpoint, &id).await;

    // In place, on the same machine: the same losses, to the last bit.
    let in_place = common::submit(&endpoint).await;
    soon("the end in place", until(&endpoint, &in_place, u64::MAX)).await;
    for (number, trial) in results(&endpoint, &in_place).await {
        assert_eq!(trial.losses, uploaded[&number].losses, "trial {number}");
        assert_eq!((uploaded[&number].state, uploaded[&number].attempts), (v1::TrialState::Completed, 2));
    }
    let digests = |id: &str| {
        let (trials, _) = lorafleet(dir.path(), &["trials", "list", id, "--endpoint", &endpoint]);
        let digests =
            |trial: &Value| (trial["digests"]["base_model"].clone(), trial["digests"]["dataset"].clone());
        trials.as_array().unwrap().iter().map(digests).collect::<Vec<_>>()
    };
    assert_eq!(digests(&id), digests(&in_place));

    // What its sweep asks lay with the submitter, too.
    let place = sweep["spec"]["evaluations"]["task_data"]["arc_easy"].as_str().unwrap();
    assert!(place.starts_with("blob:sha256:") && place.ends_with("/ARC-Easy/"), "{place}");
    let (trials, _) = lorafleet(dir.path(), &["trials", "list", &id, "--endpoint", &endpoint]);
    for trial in trials.as_array().unwrap() {
        let score = &trial["summary"]["evaluations"][0];
        assert_eq!(
            (score["task"].as_str(), score["documents"].as_u64()),
            (Some("arc_easy"), Some(5)),
            "{trial:#}"
        );
    }

    // People read the name that the submitter had.
    let (report, _) = lorafleet(dir.path(), &["report", &id, "--endpoint", &endpoint]);
    let html = std::fs::read_to_string(dir.path().join(report["report"].as_str().unwrap())).unwrap();
    assert!(html.contains("instruct.jsonl (uploaded, sha256:"), "the report names the rows");
    assert!(second.terminate() && coordinator.terminate());
    let found = coordinator::fsck::check(&at("coordinator")).unwrap();
    assert!(found.problems.is_empty(), "{:#?}", found.problems);
    assert!(
        found.checked.iter().any(|(what, count)| *what == "uploaded files" && *count >= 3),
        "{:?}",
        found.checked
    );
}

/// What is not on this machine is read where it lies, as is everything if one says so.
#[test]
fn paths_of_other_machines_stay() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("coordinator");
    let options = ["--listen", "127.0.0.1:0", "--data-dir", data.to_str().unwrap()];
    let mut coordinator = Program::start("coordinator", &options);
    let endpoint = coordinator.says("listening on ");
    let here = dir.path().join("submitter");
    submitter(&here);
    let submit = |more: &[&str]| {
        lorafleet(&here, &[&["submit", "sweep.yaml", "--endpoint", &endpoint], more].concat()).0["spec"]
            .clone()
    };
    let spec = submit(&["--set", "dataset_name=/of/agents/rows.jsonl"]);
    assert_eq!(spec["dataset_name"], "/of/agents/rows.jsonl");
    assert!(spec["pretrained_model_id"].as_str().unwrap().starts_with("blob:"));
    let spec = submit(&["--data", "in-place"]);
    let base = here.canonicalize().unwrap().join("base");
    assert_eq!(spec["pretrained_model_id"].as_str(), base.to_str());
    // A relative one is here or nowhere.
    let mut refused = Command::new(program::path("lorafleet"));
    refused.args(["submit", "sweep.yaml", "--endpoint", &endpoint, "--set", "dataset_name=gone.jsonl"]);
    let refused = refused.current_dir(&here).output().unwrap();
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("gone.jsonl is not there"));
}

/// Passes connections on to a server, and cuts the one over which byte `cut` comes. Counts what clients send.
async fn cutting(server: &str, cut: u64, scope: &Scope) -> (String, Arc<AtomicU64>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let (server, sent) = (server.trim_start_matches("http://").to_string(), Arc::new(AtomicU64::new(0)));
    let (counted, each) = (sent.clone(), scope.clone());
    scope.spawn("proxy", async move {
        loop {
            let (mut client, _) = listener.accept().await.unwrap();
            let mut server = TcpStream::connect(&server).await.unwrap();
            let counted = counted.clone();
            each.spawn("connection", async move {
                let (mut from_client, mut to_client) = client.split();
                let (mut from_server, mut to_server) = server.split();
                let up = async {
                    let mut buffer = vec![0; 1 << 16];
                    while let Ok(read @ 1..) = from_client.read(&mut buffer).await {
                        let before = counted.fetch_add(read as u64, Ordering::Relaxed);
                        let is_cut = (before..before + read as u64).contains(&cut);
                        if is_cut || to_server.write_all(&buffer[..read]).await.is_err() {
                            break;
                        }
                    }
                };
                tokio::select! {
                    () = up => {}
                    _ = tokio::io::copy(&mut from_server, &mut to_client) => {}
                }
            });
        }
    });
    (endpoint, sent)
}

/// A connection that breaks in the middle of a file costs a piece of it, not the file.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upload_that_is_cut_off_goes_on_by_itself() {
    const MIB: u64 = 1 << 20;
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("coordinator");
    let options = ["--listen", "127.0.0.1:0", "--data-dir", data.to_str().unwrap()];
    let mut coordinator = Program::start("coordinator", &options);
    let scope = Scope::new();
    let (endpoint, sent) = cutting(&coordinator.says("listening on "), 20 * MIB, &scope).await;
    let here = dir.path().join("submitter");
    submitter(&here);
    let row = format!("{{\"text\": \"{}\"}}\n", "word ".repeat(200));
    let rows = row.repeat((30 * MIB) as usize / row.len());
    std::fs::write(here.join("instruct.jsonl"), &rows).unwrap();

    let (sweep, said) = lorafleet(&here, &["submit", "sweep.yaml", "--endpoint", &endpoint]);
    assert!(said.contains("the upload was cut off"), "{said}");
    assert!(sweep["spec"]["dataset_name"].as_str().unwrap().starts_with("blob:"));
    // From its beginning again it would be 50 MiB.
    let sent = sent.load(Ordering::Relaxed);
    assert!(sent > 30 * MIB && sent < 45 * MIB, "{sent} bytes were sent");
    scope.cancel();
    assert!(coordinator.terminate());
    let found = coordinator::fsck::check(&data).unwrap();
    assert!(found.problems.is_empty() && found.notes.is_empty(), "{found:#?}");
}
