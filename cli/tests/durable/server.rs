//! A server that is killed and started again, and what its sweep came to.

use crate::common::Sandbox;
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;

/// A small sweep on the quickstart's model and rows.
pub fn sweep(steps: u32, rest: &str) -> String {
    let quickstart = concat!(env!("CARGO_MANIFEST_DIR"), "/../config/quickstart");
    format!(
        "name: small
pretrained_model_id: {quickstart}/base
dataset_name: {quickstart}/instruct.jsonl
eval_size: 2
batch_size: 1
max_sequence_length: 32
lora_dropout: 0.1
max_steps: {steps}
save_steps: 3
eval_steps: 6
{rest}"
    )
}

/// A server as a process.
pub struct Server {
    child: Child,
    log: Option<JoinHandle<String>>,
}

/// Starts a server, with a crash point armed or none. Answers once it serves; with what it said if it died before.
pub fn up(sandbox: &Sandbox, armed: Option<&str>) -> Result<Server, String> {
    start(sandbox, armed.map(|armed| (domain::crash::VARIABLE, armed)))
}

/// Starts a server whose engine is a process of its own.
pub fn up_with_engine(sandbox: &Sandbox) -> Result<Server, String> {
    start(sandbox, Some(("LORAFLEET_ENGINE_HOST", "process")))
}

fn start(sandbox: &Sandbox, variable: Option<(&str, &str)>) -> Result<Server, String> {
    let mut command = sandbox.command(&["up", "--listen", "127.0.0.1:0"]);
    command.env_remove(domain::crash::VARIABLE).envs(variable);
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut said = String::new();
    while !said.contains(" · serving ") {
        if stderr.read_line(&mut said).unwrap() == 0 {
            child.wait().unwrap();
            return Err(said);
        }
    }
    let log = std::thread::spawn(move || {
        let _ = stderr.read_to_string(&mut said);
        said
    });
    Ok(Server { child, log: Some(log) })
}

impl Server {
    /// Its process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal and waits for the end. Answers with how it ended and all that it said.
    pub fn signal(mut self, name: &str) -> (ExitStatus, String) {
        // It may be dead already, and is then no more than waited for.
        let _ = Command::new("kill")
            .args([name, &self.child.id().to_string()])
            .stderr(Stdio::null())
            .status()
            .unwrap();
        self.wait()
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> (ExitStatus, String) {
        let status = self.child.wait().unwrap();
        (status, self.log.take().unwrap().join().unwrap())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The one sweep of a server, submitted if it is not there. None if the server dies of that.
pub fn the_sweep(sandbox: &Sandbox) -> Option<String> {
    let listed = sandbox.lorafleet(&["list", "-o", "json"]);
    let sweeps: Value = serde_json::from_slice(&listed.stdout).ok()?;
    if let Some(sweep) = sweeps.get(0) {
        assert_eq!(sweeps.as_array().unwrap().len(), 1, "one submission, one sweep: {sweeps:#}");
        return Some(sweep["id"].as_str().unwrap().into());
    }
    let submitted = sandbox.lorafleet(&["submit", "sweep.yaml"]);
    submitted.status.success().then(|| String::from_utf8(submitted.stdout).unwrap().trim().into())
}

/// Whether the sweep came to its end while it was watched.
pub fn watched_to_its_end(sandbox: &Sandbox, id: &str) -> bool {
    // A server that crashes here does not come back.
    sandbox.lorafleet(&["watch", id, "--reconnect-for", "0", "-o", "json"]).status.success()
}

/// Expects that nothing in the data directory is wrong.
#[track_caller]
pub fn expect_sound(sandbox: &Sandbox, when: &str) {
    let checked = sandbox.lorafleet(&["fsck", "lorafleet-data"]);
    let (out, err) = (String::from_utf8_lossy(&checked.stdout), String::from_utf8_lossy(&checked.stderr));
    assert_eq!(checked.status.code(), Some(0), "{when}: {out}{err}");
}

/// A trial: how it ended, and its curve of what does not depend on the hour.
#[derive(Debug, Clone, PartialEq)]
pub struct Trial {
    pub state: String,
    pub parameters: Value,
    pub curve: Vec<(u64, Vec<Value>)>,
}

/// A sweep's trials by number, which is checked to be there once.
pub fn results(sandbox: &Sandbox, id: &str) -> BTreeMap<String, Trial> {
    let mut results = BTreeMap::new();
    for trial in sandbox.json(&["trials", "list", id]).as_array().unwrap() {
        let id = trial["id"].as_str().unwrap();
        let points = sandbox.json(&["trials", "metrics", id]);
        let names = ["loss", "grad_norm", "learning_rate", "tokens", "eval/loss"];
        let point = |p: &Value| {
            (
                p["step"].as_u64().unwrap(),
                names.iter().map(|name| p.get(*name).cloned().unwrap_or_default()).collect(),
            )
        };
        let curve: Vec<(u64, Vec<Value>)> = points.as_array().unwrap().iter().map(point).collect();
        let steps = curve.iter().map(|(step, _)| *step);
        assert!(steps.eq(0..curve.len() as u64), "{id}: no point is lost or doubled: {points:#}");
        let number = id.rsplit_once('/').unwrap().1.to_string();
        let state = trial["state"].as_str().unwrap().to_string();
        let known = results.insert(number, Trial { state, parameters: trial["parameters"].clone(), curve });
        assert!(known.is_none(), "{id} is there twice");
    }
    results
}

/// Goes on without crashes to the sweep's end, stops the server, and checks what it leaves. Answers with the results.
pub fn finish(sandbox: &Sandbox, what: &str) -> BTreeMap<String, Trial> {
    let server = up(sandbox, None).unwrap_or_else(|said| panic!("{what}: it does not start again: {said}"));
    let id = the_sweep(sandbox).unwrap();
    let ended = watched_to_its_end(sandbox, &id);
    let results = results(sandbox, &id);
    let (status, said) = server.signal("-TERM");
    assert!(ended, "{what}: {results:#?} {said}");
    assert_eq!(status.code(), Some(0), "{what}: {said}");
    expect_sound(sandbox, what);
    results
}
