//! The programs as people start them, with certificates and tokens.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use domain::{Clock, SystemClock};
use serde_json::json;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;
use tests::certificates::{Authority, Pair};
use tests::program::{Program, output};

/// What a test waits for at most.
const PATIENCE: Duration = Duration::from_secs(60);

/// Waits until a listing of agents has that in it: one that has just started is not connected yet.
fn listed(listing: &[&str], part: &str) {
    let clock = SystemClock::new();
    loop {
        let (_, listed, said) = output("lorafleet", listing, &[]);
        if listed.contains(part) {
            return;
        }
        assert!(clock.monotonic() < PATIENCE, "waited in vain for {part} in {listing:?}: {listed}{said}");
    }
}

/// The flags of a client.
fn client(authority: &Authority, pair: &Pair) -> [String; 6] {
    let text = |path: &Path| path.to_str().unwrap().to_string();
    ["--ca".into(), text(&authority.ca), "--cert".into(), text(&pair.cert), "--key".into(), text(&pair.key)]
}

/// A sweep of one small trial, in a file.
fn sweep_file(dir: &Path) -> String {
    let quickstart = tests::root().join("config/quickstart");
    let document = json!({
        "name": "one",
        "pretrained_model_id": quickstart.join("base"),
        "dataset_name": quickstart.join("instruct.jsonl"),
        "eval_size": 2, "batch_size": 1, "max_sequence_length": 32, "max_steps": 2,
        "search": { "algorithm": "grid" },
        "parameters": { "lora_rank": [2] },
    });
    let path = dir.join("sweep.yaml");
    std::fs::write(&path, document.to_string()).unwrap();
    path.to_str().unwrap().to_string()
}

#[test]
fn a_sweep_over_mutual_tls() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let authority = Authority::new(dir.path(), "authority");
    let (server, agent, person) =
        (authority.issue("server"), authority.issue("agent"), authority.issue("me"));
    let ca = authority.ca.to_str().unwrap();
    let (cert, key) = (server.cert.to_str().unwrap(), server.key.to_str().unwrap());
    let tls = ["--tls-cert", cert, "--tls-key", key, "--client-ca", ca];
    let options = ["--listen", "127.0.0.1:0", "--data-dir", &path("coordinator")];
    let mut coordinator = Program::start("coordinator", &[&options[..], &tls[..]].concat());
    let endpoint = coordinator.says("listening on ");
    assert!(endpoint.starts_with("https://127.0.0.1:"), "{endpoint}");

    let shows = client(&authority, &agent);
    let shows: Vec<_> = shows.iter().map(String::as_str).collect();
    let options = ["--coordinator", &endpoint, "--devices", "cpu", "--data-dir", &path("agent")];
    let agent = Program::start("gpu-agent", &[&options[..], &shows].concat());

    let lorafleet = |arguments: &[&str]| {
        output("lorafleet", arguments, &[("XDG_CONFIG_HOME", dir.path().to_str().unwrap())])
    };
    // By its flags, and by a context, whose files may be named from where one stands.
    let shows = client(&authority, &person);
    let shows: Vec<_> = shows.iter().map(String::as_str).collect();
    let sweep = sweep_file(dir.path());
    let (code, id, said) = lorafleet(&[&["submit", &sweep, "--endpoint", &endpoint][..], &shows].concat());
    assert_eq!(code, Some(0), "{said}");
    assert_eq!(lorafleet(&[&["context", "add", "safe", &endpoint][..], &shows].concat()).0, Some(0));
    assert_eq!(lorafleet(&["context", "use", "safe"]).0, Some(0));
    let (code, _, said) = lorafleet(&["watch", id.trim()]);
    assert_eq!(code, Some(0), "{said}");
    let (code, listed, said) = lorafleet(&["list", "-o", "json"]);
    assert!(code == Some(0) && listed.contains(id.trim()), "{listed}{said}");

    // Without a certificate, and without encryption.
    for (arguments, want) in [
        (vec!["list", "--endpoint", &endpoint, "--ca", ca], "show one with --cert and --key"),
        (vec!["list", "--endpoint", &endpoint], "name the fleet's with --ca"),
        (vec!["list", "--endpoint", &endpoint.replace("https", "http")], "write the address with https://"),
    ] {
        let (code, _, said) = lorafleet(&arguments);
        assert!(code == Some(3) && said.contains(want), "{arguments:?}: {code:?} {said}");
    }
    assert!(agent.terminate() && coordinator.terminate());
}

#[test]
fn this_machine_as_a_server_for_others() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data").to_str().unwrap().to_string();
    let authority = Authority::new(dir.path(), "authority");
    let server = authority.issue("server");
    let (cert, key) = (server.cert.to_str().unwrap(), server.key.to_str().unwrap());
    let options =
        ["up", "--listen", "127.0.0.1:0", "--data-dir", &data, "--tls-cert", cert, "--tls-key", key];
    let mut up = Program::start_heard("lorafleet", &options);
    let line = up.says("LoraFleet ");
    let endpoint = line.split_whitespace().find(|word| word.starts_with("https://")).unwrap();
    let ca = authority.ca.to_str().unwrap();
    let from_here = ["agents", "list", "-o", "json", "--data-dir", &data];
    let from_elsewhere = ["agents", "list", "-o", "json", "--endpoint", endpoint, "--ca", ca];
    for listing in [&from_here[..], &from_elsewhere[..]] {
        listed(listing, "devices");
    }
    assert!(up.terminate());
}

/// Who is not let in logs the coordinator's own words for it.
#[test]
fn an_agent_that_is_refused_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let mut lines = String::new();
    for (name, role) in [("gpu-1", "agent"), ("gpu-2", "agent"), ("eve", "viewer")] {
        let file = path(name);
        let arguments = ["token", "create", "--name", name, "--role", role, "--to", &file];
        let (code, line, said) = output("lorafleet", &arguments, &[]);
        assert_eq!(code, Some(0), "{said}");
        lines += &line;
    }
    std::fs::write(path("tokens.yaml"), lines).unwrap();
    let options = ["--listen", "127.0.0.1:0", "--data-dir", &path("data"), "--tokens", &path("tokens.yaml")];
    let mut coordinator = Program::start("coordinator", &options);
    let endpoint = coordinator.says("listening on ");
    let agent = |token: &str| {
        let options = ["--coordinator", &endpoint, "--devices", "cpu", "--data-dir", &path("agent")];
        Program::start_heard("gpu-agent", &[&options[..], &["--token-file", &path(token)]].concat())
    };
    let first = agent("gpu-1");
    let viewer = path("eve");
    let listing = ["agents", "list", "-o", "json", "--endpoint", &endpoint, "--token-file", &viewer];
    listed(&listing, "agent-");
    assert!(first.terminate());
    let mut second = agent("gpu-2");
    let said = second.hears("not connected to the coordinator");
    assert!(said.contains("belongs to the token gpu-1, and not to gpu-2"), "{said}");
    assert!(second.terminate() && coordinator.terminate());
}

/// Every program logs all that it can, and no token is in it, nor in the list of processes.
#[test]
fn tokens_are_seen_nowhere() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let mut lines = String::new();
    let mut secrets = Vec::new();
    for (name, role) in [("gpu-1", "agent"), ("ada", "submitter"), ("eve", "viewer"), ("gone", "operator")] {
        let file = path(&format!("{name}.token"));
        let arguments = ["token", "create", "--name", name, "--role", role, "--to", &file];
        let (code, line, said) = output("lorafleet", &arguments, &[]);
        assert_eq!(code, Some(0), "{said}");
        assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        secrets.push(std::fs::read_to_string(&file).unwrap().trim().to_string());
        if name != "gone" {
            lines += &line;
        }
    }
    std::fs::write(path("tokens.yaml"), lines).unwrap();
    let logged = |log: String| {
        move |command: &mut std::process::Command| {
            let log = std::fs::File::create(log).unwrap();
            command.env("LORAFLEET_LOG", "trace").stderr(log);
        }
    };
    let options = ["--listen", "127.0.0.1:0", "--data-dir", &path("data"), "--tokens", &path("tokens.yaml")];
    let mut coordinator = Program::start_with("coordinator", &options, logged(path("coordinator.log")));
    let endpoint = coordinator.says("listening on ");
    let file = path("gpu-1.token");
    let options = ["--coordinator", &endpoint, "--devices", "cpu", "--data-dir", &path("agent")];
    let options = [&options[..], &["--token-file", &file]].concat();
    let agent = Program::start_with("gpu-agent", &options, logged(path("agent.log")));

    let mut all = String::new();
    let mut lorafleet = |arguments: &[&str], token: &str| {
        let arguments = [arguments, &["--endpoint", &endpoint]].concat();
        let variables = [("LORAFLEET_TOKEN", token), ("LORAFLEET_LOG", "trace")];
        let (code, told, said) = output("lorafleet", &arguments, &variables);
        all += &told;
        all += &said;
        (code, told, said)
    };
    let sweep = sweep_file(dir.path());
    let (ada, eve, gone) = (secrets[1].clone(), secrets[2].clone(), secrets[3].clone());
    let (code, id, said) = lorafleet(&["submit", &sweep], &ada);
    assert_eq!(code, Some(0), "{said}");
    let id = id.trim();
    assert_eq!(lorafleet(&["watch", id], &eve).0, Some(0));
    for (arguments, token, want) in [
        (
            vec!["cancel", id],
            &eve,
            "eve is a token of the role viewer, and CancelSweep is for submitter or operator",
        ),
        (vec!["delete", id, "--force"], &ada, "DeleteSweep is for operator"),
        (vec!["list"], &gone, "none that this server knows"),
        (vec!["list"], &String::new(), "give --token-file or LORAFLEET_TOKEN"),
        (vec!["list"], &"no\u{1}ne".to_string(), "the token is none"),
    ] {
        let (code, _, said) = lorafleet(&arguments, token);
        assert!(code == Some(2) && said.contains(want), "{arguments:?}: {code:?} {said}");
    }
    for program in [&coordinator, &agent] {
        all += &std::fs::read_to_string(format!("/proc/{}/cmdline", program.id())).unwrap();
    }
    assert!(agent.terminate() && coordinator.terminate());
    for log in ["coordinator.log", "agent.log"] {
        let log = std::fs::read_to_string(path(log)).unwrap();
        assert!(log.contains("TRACE"), "it logs what it can");
        all += &log;
    }
    all += &std::fs::read_to_string(path("tokens.yaml")).unwrap();
    for secret in secrets {
        // Nor a part of it.
        let part = &secret[..20];
        let at = all.find(part).map(|at| all[at.saturating_sub(200)..at].to_string());
        assert_eq!(at, None, "a token is there");
    }
}
