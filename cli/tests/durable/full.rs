//! A disk that is full for a while, or read-only: a real file system of a few megabytes, in a mount namespace of its
//! own.

use crate::common::{Sandbox, UNHURRIED, soon};
use crate::server::{results, sweep, watched_to_its_end};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, Command, Output, Stdio};
use tests::http::{free_address, get};

/// Mounts a small disk at the data directory, serves it, and checks it when the server has ended.
const SCRIPT: &str = "mkdir lorafleet-data && mount -t tmpfs -o size=24m tmpfs lorafleet-data || exit 77
\"$0\" up --listen 127.0.0.1:0 --http \"$1\" &
echo $! > pid
wait $!
\"$0\" fsck lorafleet-data";

/// The ways to a namespace of one's own: as root, and as a user where the system allows that.
const WAYS: [&str; 2] = ["-m", "-rm"];

/// Whether this machine lets a test mount a file system.
fn way() -> Option<&'static str> {
    let dir = tempfile::tempdir().unwrap();
    let mounts = |way: &&str| {
        let mut command = Command::new("unshare");
        let mount = command.args([way, "mount", "-t", "tmpfs", "tmpfs"]).arg(dir.path());
        mount.stderr(Stdio::null()).status().is_ok_and(|status| status.success())
    };
    let way = WAYS.into_iter().find(|way| mounts(way));
    if way.is_none() {
        let why = "SKIPPED: a full or read-only disk: this machine lets no test mount a file system (unshare -m, -rm)";
        eprintln!("{why}");
        // What a test that passes says is not shown; `tests/run` shows what stands in this file.
        if let Some(path) = std::env::var_os("LORAFLEET_SKIPPED") {
            let mut file = std::fs::OpenOptions::new().append(true).create(true).open(path).unwrap();
            writeln!(file, "{why}").unwrap();
        }
    }
    way
}

/// The shell that holds the disk, the server below it, and the disk as others see it.
struct Server {
    shell: Child,
    pid: String,
    disk: std::path::PathBuf,
    endpoint: String,
    http: String,
}

impl Server {
    fn start(sandbox: &Sandbox, way: &str) -> Self {
        let (mut command, http) = (Command::new("unshare"), free_address());
        command.args([way, "sh", "-c", SCRIPT, env!("CARGO_BIN_EXE_lorafleet"), &http]);
        command.current_dir(sandbox.path()).env_remove("LORAFLEET_ENDPOINT").env(UNHURRIED.0, UNHURRIED.1);
        let mut shell = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut stderr = BufReader::new(shell.stderr.take().unwrap());
        let mut line = String::new();
        while !line.contains(" · serving ") {
            line.clear();
            assert_ne!(stderr.read_line(&mut line).unwrap(), 0, "the server does not start");
        }
        let endpoint = line.split_whitespace().find(|word| word.starts_with("http://")).unwrap().to_string();
        // What it says later is not looked at, but must go somewhere.
        std::thread::spawn(move || std::io::copy(&mut stderr, &mut std::io::sink()));
        let pid = std::fs::read_to_string(sandbox.path().join("pid")).unwrap().trim().to_string();
        let below = sandbox.path().join("lorafleet-data");
        let disk = format!("/proc/{pid}/root{}", below.display()).into();
        Self { shell, pid, disk, endpoint, http }
    }

    /// Takes all the room that is left. Once is not enough: a checkpoint that a newer one replaced is removed, and makes
    /// room for the next.
    fn fill(&self) {
        let filler = self.disk.join("filler");
        let mut filler = std::fs::OpenOptions::new().append(true).create(true).open(filler).unwrap();
        while filler.write_all(&[1; 4096]).is_ok() {}
    }

    /// What `/readyz` says, if that is its status.
    fn readiness(&self, status: u16) -> Option<String> {
        let (found, said) = get(&self.http, "/readyz");
        (found == status).then_some(said)
    }

    fn make_room(&self) {
        std::fs::remove_file(self.disk.join("filler")).unwrap();
    }

    /// Ends it, and answers with what fsck says of the disk.
    fn stop(mut self) -> (Option<i32>, String) {
        assert!(Command::new("kill").args(["-TERM", &self.pid]).status().unwrap().success());
        let mut said = String::new();
        self.shell.stdout.take().unwrap().read_to_string(&mut said).unwrap();
        (self.shell.wait().unwrap().code(), said)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Over already unless the test failed.
        let _ = Command::new("kill").args(["-KILL", &self.pid]).stderr(Stdio::null()).status();
        let _ = self.shell.wait();
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_disk_that_was_full_for_a_while_lost_nothing() {
    let Some(way) = way() else { return };
    let small = sweep(120, "search: { algorithm: grid }\nparameters: { lora_rank: [2, 4] }\n");
    let mut sandbox = Sandbox::new(&small);
    let server = Server::start(&sandbox, way);
    sandbox.endpoint = Some(server.endpoint.clone());
    let submitted = sandbox.lorafleet(&["submit", "sweep.yaml"]);
    assert!(submitted.status.success(), "{}", said(&submitted));
    let id = String::from_utf8(submitted.stdout).unwrap().trim().to_string();
    let steps = || -> Vec<u64> {
        let trials: Value = sandbox.json(&["trials", "list", &id]);
        trials.as_array().unwrap().iter().map(|trial| trial["step"].as_u64().unwrap()).collect()
    };
    soon("some steps", || (steps().iter().sum::<u64>() >= 10).then_some(()));

    let told = soon("a word of the full disk", || {
        server.fill();
        let listed = sandbox.lorafleet(&["list", "-o", "json"]);
        assert!(listed.status.success(), "what is there can be read: {}", said(&listed));
        if said(&listed).contains("cannot write at the moment") {
            return Some(said(&listed));
        }
        let state = sandbox.json(&["get", &id])["state"].clone();
        assert_eq!(state, "running", "the sweep was over before the disk was full");
        None
    });
    assert!(told.contains("No space left") || told.contains("disk is full"), "{told}");
    server.fill();
    let refused = sandbox.lorafleet(&["cancel", &id]);
    assert_eq!(refused.status.code(), Some(1), "{}", said(&refused));
    assert!(said(&refused).contains("nothing was changed"), "{}", said(&refused));
    let why = soon("it not to be ready", || {
        server.fill();
        server.readiness(503)
    });
    assert!(why.starts_with("not ready: "), "{why}");
    assert!(why.contains("No space left") || why.contains("disk is full"), "{why}");

    server.make_room();
    assert_eq!(soon("it to be ready", || server.readiness(200)), "ready\n");
    assert!(watched_to_its_end(&sandbox, &id));
    let interrupted = results(&sandbox, &id);
    let (code, findings) = server.stop();
    assert_eq!(code, Some(0), "{findings}");

    // And nothing is other than without it.
    let quiet = Sandbox::new(&small);
    let run = quiet.json(&["run", "sweep.yaml"]);
    assert_eq!(interrupted, results(&quiet, run["sweep"]["id"].as_str().unwrap()));
}

/// Runs a sweep on a disk, makes the disk read-only, then checks it, reads it and serves it.
const READ_ONLY: &str = "mkdir lorafleet-data && mount -t tmpfs -o size=24m tmpfs lorafleet-data || exit 77
\"$0\" run sweep.yaml 2> /dev/null > /dev/null || exit 78
mount -o remount,ro lorafleet-data || exit 79
for verb in 'fsck lorafleet-data' 'list' 'up --listen 127.0.0.1:0'; do
    \"$0\" $verb 2>&1 > /dev/null
    echo \"exit code $?\"
done";

#[test]
fn a_disk_that_nobody_can_write_to_can_be_checked_and_is_refused_by_name() {
    let Some(way) = way() else { return };
    let sandbox = Sandbox::new(&sweep(6, "search: { algorithm: grid }\nparameters: { lora_rank: [2] }\n"));
    let mut command = Command::new("unshare");
    command.args([way, "sh", "-c", READ_ONLY, env!("CARGO_BIN_EXE_lorafleet")]).current_dir(sandbox.path());
    let output = command.env_remove("LORAFLEET_ENDPOINT").env_remove("LORAFLEET_DATA_DIR").output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let parts: Vec<_> = text.split("exit code ").collect();
    assert_eq!(parts[0], "", "a read-only directory that is sound: {text}");
    assert!(parts[1].starts_with('0'), "{text}");
    for part in &parts[2..] {
        assert!(part.starts_with('1'), "{text}");
    }
    for part in &parts[1..3] {
        assert!(part.contains("lorafleet-data"), "the file is named: {text}");
    }
}
