//! `lorafleet up` as a process, the verbs of other terminals, and real signals.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use common::{Sandbox, soon};
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use tests::s3::{BUCKET, S3};

/// A sweep on the quickstart's own model and data, so that the test needs no other: two trials, each long enough
/// to be cut off in the middle.
fn sweep() -> String {
    let quickstart = concat!(env!("CARGO_MANIFEST_DIR"), "/../config/quickstart");
    format!(
        "name: two
pretrained_model_id: {quickstart}/base
dataset_name: {quickstart}/instruct.jsonl
eval_size: 8
batch_size: 2
max_sequence_length: 64
max_steps: 240
save_steps: 5
search: {{ algorithm: grid }}
parameters: {{ lora_rank: [2, 4] }}
"
    )
}

/// A server on a sandbox's data directory that has said that it serves.
fn up(sandbox: &Sandbox) -> Server {
    up_with(sandbox, &[])
}

fn up_with(sandbox: &Sandbox, options: &[&str]) -> Server {
    let mut command = sandbox.command(&[&["up", "--listen", "127.0.0.1:0"], options].concat());
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    stderr.read_line(&mut line).unwrap();
    assert!(line.contains("serving ./lorafleet-data at http://127.0.0.1:"), "{line:?}");
    // Kept open: a server whose messages nobody reads must not end of it.
    Server { child, _stderr: stderr }
}

struct Server {
    child: Child,
    _stderr: BufReader<std::process::ChildStderr>,
}

impl Server {
    fn signal(mut self, name: &str) -> ExitStatus {
        let sent = Command::new("kill").args([name, &self.child.id().to_string()]).status().unwrap();
        assert!(sent.success());
        self.child.wait().unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Over already unless the test failed.
        let _ = self.child.kill();
    }
}

/// Asks until both trials are as wanted. A sweep that is over first fails the test.
fn until(sandbox: &Sandbox, id: &str, wanted: impl Fn(&Value) -> bool) {
    soon("both trials", || {
        let sweep = sandbox.json(&["get", id]);
        assert_eq!(sweep["state"], "running", "{sweep:#}");
        let trials = sweep["trials"].as_array().unwrap();
        (trials.len() == 2 && trials.iter().all(&wanted)).then_some(())
    });
}

fn message(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_killed_server_goes_on_where_it_was() {
    let sandbox = Sandbox::new(&sweep());
    let refused = sandbox.lorafleet(&["submit", "sweep.yaml"]);
    assert_eq!(refused.status.code(), Some(3), "{}", message(&refused));

    let server = up(&sandbox);
    let second = sandbox.lorafleet(&["up", "--listen", "127.0.0.1:0"]);
    assert_eq!(second.status.code(), Some(2), "{}", message(&second));
    assert!(message(&second).contains("./lorafleet-data is in use"), "{}", message(&second));
    let submitted = sandbox.lorafleet(&["submit", "sweep.yaml"]);
    let id = String::from_utf8(submitted.stdout).unwrap().trim().to_string();
    assert!(submitted.status.success() && id.starts_with("two-"), "{id:?}");

    until(&sandbox, &id, |trial| trial["step"].as_u64() >= Some(10));
    assert_eq!(server.signal("-KILL").code(), None);

    // Nobody serves: records can be read, but nothing trains.
    let before = sandbox.json(&["get", &id]);
    let watch = sandbox.lorafleet(&["watch", &id]);
    assert_eq!(before["state"], "running", "it was killed in the middle");
    assert_eq!(watch.status.code(), Some(1), "{}", message(&watch));
    assert!(message(&watch).contains("nobody trains"), "{}", message(&watch));

    let server = up(&sandbox);
    let after = sandbox.json(&["watch", &id]);
    assert_eq!(after["sweep"]["state"], "completed", "{after:#}");
    for trial in after["trials"].as_array().unwrap() {
        assert_eq!((&trial["state"], &trial["step"]), (&"completed".into(), &240.into()), "{trial:#}");
        let curve = sandbox.json(&["trials", "metrics", trial["id"].as_str().unwrap()]);
        let steps: Vec<_> = curve.as_array().unwrap().iter().filter_map(|p| p["step"].as_u64()).collect();
        assert_eq!(steps, (0..=240).collect::<Vec<_>>(), "no point is lost or doubled");
    }
    assert_eq!(server.signal("-TERM").code(), Some(0), "it was told to stop");
    assert!(!sandbox.path().join("lorafleet-data/endpoint").exists());
}

#[test]
fn uploaded_data_beyond_the_limit_is_not_kept() {
    let mut sandbox = Sandbox::new(&sweep());
    let server = up_with(&sandbox, &["--cache-limit", "1KB"]);
    let endpoint = std::fs::read_to_string(sandbox.path().join("lorafleet-data/endpoint")).unwrap();
    sandbox.endpoint = Some(endpoint.trim().into());
    let id = sandbox.json(&["submit", "sweep.yaml"])["id"].as_str().unwrap().to_string();
    sandbox.lorafleet(&["watch", &id]);
    let trials = sandbox.json(&["trials", "list", &id]);
    assert_eq!(trials.as_array().unwrap().len(), 2);
    for trial in trials.as_array().unwrap() {
        let why = trial["failure"]["message"].as_str().unwrap();
        assert!(why.contains("cache 1000;") && why.contains("a larger --cache-limit"), "{trial:#}");
    }
    assert_eq!(server.signal("-TERM").code(), Some(0));
}

#[test]
fn a_sweep_whose_server_is_gone_can_be_cancelled() {
    let sandbox = Sandbox::new(&sweep());
    let server = up(&sandbox);
    let id = sandbox.json(&["submit", "sweep.yaml"])["id"].as_str().unwrap().to_string();
    until(&sandbox, &id, |trial| trial["state"] == "running");
    server.signal("-KILL");
    assert_eq!(sandbox.json(&["cancel", &id])["state"], "cancelled");
    for trial in sandbox.json(&["trials", "list", &id]).as_array().unwrap() {
        assert_eq!(trial["state"], "cancelled", "{trial:#}");
    }
}

#[test]
fn a_server_that_others_could_reach_is_refused() {
    let refused = Sandbox::new(&sweep()).lorafleet(&["up", "--listen", "0.0.0.0:7401"]);
    assert_eq!(refused.status.code(), Some(2));
    for way in ["--tls-cert", "through a tunnel", "--allow-plaintext"] {
        assert!(message(&refused).contains(way), "{}", message(&refused));
    }
}

#[test]
fn a_device_that_this_machine_will_never_have_is_refused() {
    let sandbox = Sandbox::new(&sweep());
    let set = "resources={accelerators: [H100-80GB, V100-16GB]}";
    let refused = sandbox.lorafleet(&["run", "sweep.yaml", "--set", set]);
    assert_eq!(refused.status.code(), Some(2), "{}", message(&refused));
    for fragment in ["resources.accelerators", "H100-80GB, V100-16GB", "--endpoint"] {
        assert!(message(&refused).contains(fragment), "{}", message(&refused));
    }
    assert!(!sandbox.path().join("lorafleet-data").exists(), "nothing was started");
}

/// A server that is killed and started again is followed on, from its new address.
#[test]
fn a_watch_survives_its_servers_restart() {
    let sandbox = Sandbox::new(&sweep());
    let server = up(&sandbox);
    let id = sandbox.json(&["submit", "sweep.yaml"])["id"].as_str().unwrap().to_string();
    let mut watch = sandbox.command(&["watch", &id, "-o", "json"]);
    let mut watch = watch.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(watch.stderr.take().unwrap());
    until(&sandbox, &id, |trial| trial["step"].as_u64() >= Some(5));
    server.signal("-KILL");
    let mut line = String::new();
    said.read_line(&mut line).unwrap();
    assert!(line.contains("the server is gone"), "{line:?}");
    let _server = up(&sandbox);
    let mut rest = String::new();
    std::io::Read::read_to_string(&mut said, &mut rest).unwrap();
    assert_eq!(rest, "the server is back; going on\n");
    let output = watch.wait_with_output().unwrap();
    assert!(output.status.success(), "{:?}", output.status);
    let document: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["sweep"]["state"], "completed");
}

/// The verbs that hold, extend, retry and delete, on a real server with a real agent.
#[test]
fn a_sweep_is_paused_resumed_extended_tried_again_and_deleted() {
    let sandbox = Sandbox::new(&sweep());
    let _server = up(&sandbox);
    let id = sandbox.json(&["submit", "sweep.yaml"])["id"].as_str().unwrap().to_string();
    until(&sandbox, &id, |trial| trial["step"].as_u64() >= Some(10));
    assert_eq!(sandbox.json(&["pause", &id])["state"], "paused");
    let trials = || sandbox.json(&["trials", "list", &id]).as_array().unwrap().clone();
    soon("both to be queued", || trials().iter().all(|trial| trial["state"] == "queued").then_some(()));
    let paused_at: Vec<_> = trials().iter().map(|trial| trial["resume"][1].clone()).collect();
    assert!(paused_at.iter().all(|step| step.as_u64() >= Some(5)), "{paused_at:?}");
    assert_eq!(sandbox.json(&["resume", &id])["state"], "running");
    let refused = sandbox.lorafleet(&["delete", &id]);
    assert_eq!(refused.status.code(), Some(2), "{}", message(&refused));
    assert!(message(&refused).contains("--force"), "{}", message(&refused));
    sandbox.json(&["trials", "stop", &format!("{id}/2")]);
    let refused = sandbox.lorafleet(&["extend", &id, "--set", "max_steps=9"]);
    assert_eq!(refused.status.code(), Some(2), "{}", message(&refused));
    assert!(message(&refused).contains("spec.max_steps"), "{}", message(&refused));
    let extended = sandbox.json(&["extend", &id, "--set", "parameters.lora_rank=[2, 4, 8]"]);
    assert_eq!(extended["max_trials"], 3);
    let after = sandbox.json(&["watch", &id]);
    let states: Vec<_> = after["trials"].as_array().unwrap().iter().map(|t| &t["state"]).collect();
    assert_eq!(states, ["completed", "cancelled", "completed"]);
    sandbox.json(&["trials", "retry", &format!("{id}/2")]);
    let after = sandbox.json(&["watch", &id]);
    assert_eq!(after["trials"][1]["state"], "completed", "{after:#}");
    // Every attempt began where the one before left its checkpoint, and the curve has no gap.
    for (trial, paused_at) in after["trials"].as_array().unwrap().iter().zip(&paused_at) {
        assert_eq!(&trial["attempts"][1][1], paused_at, "{trial:#}");
        let curve = sandbox.json(&["trials", "metrics", trial["id"].as_str().unwrap()]);
        assert_eq!(curve.as_array().unwrap().len(), 241);
    }
    let log = sandbox.json(&["trials", "logs", &format!("{id}/2")]);
    let events: Vec<_> = log.as_array().unwrap().iter().map(|e| e["event"].as_str().unwrap()).collect();
    for event in
        ["proposed", "assigned", "told_to_release", "told_to_stop", "cancelled", "queued_again", "completed"]
    {
        assert!(events.contains(&event), "{events:?} lacks {event}");
    }
    let best = ["trials", "list", &id, "--filter", "lora_rank>=4", "--sort", "-lora_rank", "--limit", "1"];
    assert_eq!(sandbox.json(&best)[0]["parameters"]["lora_rank"], 8);
    let adapters = sandbox.json(&["adapters", "list", &id, "--filter", "lora_rank<4"]);
    assert_eq!(adapters[0]["trial"], format!("{id}/1"));
    // A server that has a name is found by it, from any directory.
    let endpoint = std::fs::read_to_string(sandbox.path().join("lorafleet-data/endpoint")).unwrap();
    for args in [&["context", "add", "lab", endpoint.trim()][..], &["context", "use", "lab"]] {
        let done = sandbox.lorafleet(args);
        assert!(done.status.success(), "{}", message(&done));
    }
    assert_eq!(sandbox.json(&["context", "list"])[0]["current"], true);
    let elsewhere = sandbox.path().join("elsewhere");
    std::fs::create_dir(&elsewhere).unwrap();
    let mut export = sandbox.command(&["export", &id, "--to", "out", "--adapters"]);
    let exported = export.current_dir(&elsewhere).output().unwrap();
    assert!(exported.status.success(), "{}", message(&exported));
    let mut again = sandbox.command(&["export", &id, "--to", "out"]);
    let again = again.current_dir(&elsewhere).output().unwrap();
    assert_eq!(again.status.code(), Some(2), "{}", message(&again));
    let read = |name: &str| std::fs::read_to_string(elsewhere.join("out").join(name)).unwrap();
    assert_eq!(read("trials.csv").lines().count(), 1 + 3);
    assert_eq!(read("metrics.csv").lines().count(), 1 + 3 * 241);
    assert!(read("report.html").contains("</html>") && read("spec.yaml").contains("lora_rank"));
    let trials: Value = serde_json::from_str(&read("trials.json")).unwrap();
    assert_eq!(trials, after["trials"]);
    assert!(elsewhere.join("out/adapters/3/adapter_model.safetensors").exists());
    assert_eq!(sandbox.json(&["delete", &id])["sweep"].as_str(), Some(id.as_str()));
    let gone = sandbox.lorafleet(&["get", &id]);
    assert_eq!(gone.status.code(), Some(2), "{}", message(&gone));
}

/// A context is checked with what it holds, keeps what it is not told anew, and one that cannot be talked to is refused.
#[test]
fn a_context_is_what_was_given() {
    let sandbox = Sandbox::new(&sweep());
    let file = |name: &str| std::fs::write(sandbox.path().join(name), "lft_1").unwrap();
    file("me.token");
    let add = |arguments: &[&str]| {
        let mut command = sandbox.command(&[&["context", "add", "lab"], arguments].concat());
        command.env("LORAFLEET_TOKEN", "lft_2").output().unwrap()
    };
    for (arguments, refused, want) in [
        // The token of the environment is none of the context's.
        (&["http://10.0.0.5:7401"][..], None, vec![("endpoint", "http://10.0.0.5:7401")]),
        (&["http://10.0.0.5:7401", "--token-file", "me.token"], Some("write https://"), vec![]),
        (&["https://10.0.0.5:7401", "--token-file", "me.token"], None, vec![("token_file", "me.token")]),
        (
            &["https://10.0.0.6:7401"],
            None,
            vec![("endpoint", "https://10.0.0.6:7401"), ("token_file", "me.token")],
        ),
        (&["http://10.0.0.6:7401"], Some("write https://"), vec![("endpoint", "https://10.0.0.6:7401")]),
        (&["https://10.0.0.6:7401", "--cert", "c"], Some("--key"), vec![("token_file", "me.token")]),
    ] {
        let done = add(arguments);
        let said = message(&done);
        match refused {
            None => assert!(done.status.success(), "{arguments:?}: {said}"),
            Some(why) => assert!(!done.status.success() && said.contains(why), "{arguments:?}: {said}"),
        }
        let listed = sandbox.json(&["context", "list"]);
        for (key, end) in want {
            let value = listed[0][key].as_str().unwrap_or_default();
            assert!(value.ends_with(end), "{arguments:?}: {key} is {value}");
        }
    }
}

/// What a person asks before anything runs, and of a server that does.
#[test]
fn doctor() {
    let sandbox = Sandbox::new(&sweep());
    let _server = up(&sandbox);
    let endpoint = std::fs::read_to_string(sandbox.path().join("lorafleet-data/endpoint")).unwrap();
    let doctor = ["doctor", "--data-dir=d", "--listen=127.0.0.1:0"];
    let found = sandbox.json(&[&doctor[..], &["--endpoint", endpoint.trim()]].concat());
    let checks = found["checks"].as_array().unwrap();
    let of = |name: &str| checks.iter().filter(|check| check["check"] == name).collect::<Vec<_>>();
    for name in ["memory", "accelerator", "disk", "address", "server", "clock", "collector"] {
        assert!(!of(name).is_empty(), "{name}: {found:#}");
    }
    assert!(of("server")[0]["found"].as_str().unwrap().contains("answers, version"), "{found:#}");
    assert_eq!(of("clock")[0]["verdict"], "good", "one machine has one clock: {found:#}");
    assert!(!sandbox.path().join("d").exists(), "nothing is made");

    // Nobody listens at port 1.
    let bad = [&doctor[..], &["--endpoint=http://127.0.0.1:1", "--etcd=http://127.0.0.1:1"]].concat();
    let output = sandbox.lorafleet(&bad);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(1), "{text}");
    let said =
        ["BAD      server", "no server answers", "BAD      etcd", "nobody answers", "→ see that it runs"];
    assert!(said.iter().all(|part| text.contains(part)), "{text}");
    assert!(message(&output).contains("2 things are in the way"));

    // A store that takes what is written, and one whose bucket nobody made.
    let s3 = S3::start();
    for (named, code, said) in [
        (
            format!("s3://{BUCKET}/new"),
            0,
            "ok       store        s3://fleet/new takes objects, and gives them back",
        ),
        ("s3://nobodys".into(), 1, "make the bucket, or correct its name"),
    ] {
        let mut command =
            sandbox.command(&[&doctor[..], &["--http=127.0.0.1:0", "--artifacts", &named]].concat());
        let output = command.envs(s3.variables()).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.code() == Some(code) && text.contains(said), "{named}: {text}");
        assert_eq!(text.matches("is free to serve at").count(), 2, "{text}");
    }
    assert!(s3.keys("").is_empty(), "nothing is left there");
}
