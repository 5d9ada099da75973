//! The files of `config/deploy` against the programs that they start.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use tests::certificates::Authority;

fn deploy(name: &str) -> PathBuf {
    tests::root().join("config/deploy").join(name)
}

fn text(name: &str) -> String {
    std::fs::read_to_string(deploy(name)).unwrap()
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let said = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{command:?}: {}{}", said(&output.stdout), said(&output.stderr));
    said(&output.stdout)
}

/// The settings of an environment file.
fn settings(file: &str) -> Vec<(String, String)> {
    let lines = text(file);
    let lines = lines.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
    lines.map(|line| line.split_once('=').map(|(name, value)| (name.into(), value.into())).unwrap()).collect()
}

/// Their names are the programs', and their values are valid: a program that gets them comes as far as what this
/// machine does not have.
#[test]
fn settings_are_the_programs() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path(), "authority");
    let pair = authority.issue("coordinator");
    let (tokens, token) = (dir.path().join("tokens.yaml"), dir.path().join("token"));
    std::fs::write(&tokens, "[]").unwrap();
    std::fs::write(&token, "lft_0").unwrap();
    let files = [
        ("LORAFLEET_TLS_CERT", &pair.cert),
        ("LORAFLEET_TLS_KEY", &pair.key),
        ("LORAFLEET_TOKENS", &tokens),
        ("LORAFLEET_CA", &authority.ca),
        ("LORAFLEET_TOKEN_FILE", &token),
    ];
    let dir = dir.path().to_str().unwrap();
    for (program, file, arguments, lacks) in [
        (
            "coordinator",
            "coordinator.env",
            &["--listen", "127.0.0.1:0", "--artifacts", dir, "--etcd", "ftp://127.0.0.1:1"][..],
            "ftp://127.0.0.1:1",
        ),
        ("gpu-agent", "gpu-agent.env", &["--data-dir", dir, "--devices", "99"], "99"),
    ] {
        let help = run(Command::new(tests::program::path(program)).arg("--help"));
        let settings = settings(file);
        assert!(settings.len() > 3, "{file} has settings");
        for (name, value) in &settings {
            // What is logged is said by a variable alone.
            assert!(
                name == "LORAFLEET_LOG" || help.contains(&format!("[env: {name}=")),
                "{program} knows no {name}"
            );
            assert!(!value.is_empty(), "{file}: {name} has no value");
        }
        let mut command = Command::new(tests::program::path(program));
        let output = command.envs(settings).envs(files).args(arguments).current_dir(dir).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && said.contains(lacks), "{program}: {said}");
    }
}

/// What systemd says of a unit that starts what is there.
fn verified(dir: &Path, unit: &str, content: &str) -> Vec<String> {
    let path = dir.join(unit);
    std::fs::write(&path, content).unwrap();
    let output = Command::new("systemd-analyze").arg("verify").arg(&path).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    // Of this machine's own units it may say something too.
    said.lines().filter(|line| line.contains(unit)).map(String::from).collect()
}

#[test]
fn systemd_takes_the_units() {
    if Command::new("systemd-analyze").arg("--version").output().is_err() {
        return tests::skipped(
            "systemd-analyze is not installed, so that the units in config/deploy are not verified",
        );
    }
    let dir = tempfile::tempdir().unwrap();
    for unit in ["coordinator.service", "gpu-agent.service"] {
        let program = unit.trim_end_matches(".service");
        let start = format!("ExecStart=/usr/local/bin/{program}\n");
        // systemd asks that what a unit starts is there.
        let there = format!("ExecStart={}\n", tests::program::path(program).display());
        let content = text(unit).replace(&start, &there);
        assert!(content.contains(&there), "{unit}");
        assert_eq!(verified(dir.path(), unit, &content), [""; 0]);
        // It ends well whatever it finds: that it finds something is seen with what is wrong.
        let wrong = content.replace("ProtectHome=true", "ProtectHomes=true");
        let said = verified(dir.path(), unit, &wrong);
        assert!(said.len() == 1 && said[0].contains("ProtectHomes"), "{said:#?}");
    }
}

/// The `docker run` with an environment file that a container file shows.
fn shown(container_file: &str, env: &str) -> Vec<String> {
    let comments = text(container_file).replace("\\\n#", "");
    let line = comments.lines().find(|line| line.contains(" run ") && line.contains(env)).unwrap();
    line.split_whitespace().map(String::from).collect()
}

/// Every file and directory of the settings is one that the container is given and that the unit may write, if it must.
#[test]
fn what_settings_name_can_be_reached() {
    for (env, unit, container_file) in [
        ("coordinator.env", "coordinator.service", "coordinator.Containerfile"),
        ("gpu-agent.env", "gpu-agent.service", "agent.Containerfile"),
    ] {
        let unit = text(unit);
        let state = |line: &str| Some(format!("/var/lib/{}", line.strip_prefix("StateDirectory=")?));
        let writable = |line| state(line).or_else(|| Some(line.strip_prefix("ReadWritePaths=")?.to_string()));
        let unit_writes: Vec<_> = unit.lines().filter_map(writable).collect();
        // What may be a mount of a network is waited for.
        for path in unit.lines().filter_map(|line| line.strip_prefix("ReadWritePaths=")) {
            assert!(unit.contains(&format!("RequiresMountsFor={path}\n")), "{path}");
        }
        let command = shown(container_file, env);
        assert!(command.contains(&"--user".to_string()), "{command:?}");
        let mounts: Vec<_> = command.windows(2).filter(|pair| pair[0] == "-v").map(|pair| &pair[1]).collect();
        let mounted = |path: &Path, to_write: bool| {
            mounts.iter().any(|mount| {
                let parts: Vec<_> = mount.split(':').collect();
                // At the same place, so that the settings are those of the unit.
                parts[0] == parts[1] && path.starts_with(parts[1]) && !(to_write && parts.contains(&"ro"))
            })
        };
        let mut paths = 0;
        for (name, value) in settings(env) {
            // Paths of the agents' machines are not the coordinator's.
            if !value.starts_with('/') || name == "LORAFLEET_ALLOW_PATH" {
                continue;
            }
            paths += 1;
            let to_write = ["LORAFLEET_ARTIFACTS", "LORAFLEET_DATA_DIR"].contains(&name.as_str());
            let path = Path::new(&value);
            assert!(mounted(path, to_write), "{container_file} gives it no {value}: {mounts:?}");
            let may = unit_writes.iter().any(|dir| path.starts_with(dir));
            assert!(may || !to_write, "the unit beside {env} may not write {value}: {unit_writes:?}");
        }
        assert!(paths >= 3, "{env} names files");
    }
    // What sweeps may name is where agents read it.
    let allowed = settings("coordinator.env").into_iter().find(|(name, _)| name == "LORAFLEET_ALLOW_PATH");
    let allowed = allowed.unwrap().1;
    assert!(shown("agent.Containerfile", "gpu-agent.env").contains(&format!("{allowed}:{allowed}:ro")));
}

#[test]
fn the_agents_container_trains_or_serves() {
    let dir = tempfile::tempdir().unwrap();
    for program in ["gpu-agent", "lorafleet"] {
        let path = dir.path().join(program);
        std::fs::write(&path, format!("#!/bin/sh\necho {program} \"$@\"\n")).unwrap();
        run(Command::new("chmod").arg("+x").arg(&path));
    }
    let path = format!("{}:/usr/bin:/bin", dir.path().display());
    for (arguments, expected) in [
        (&[][..], "gpu-agent"),
        (&["--devices", "0"], "gpu-agent --devices 0"),
        (&["train", "--lora-rank=8"], "lorafleet train --lora-rank=8"),
    ] {
        let said = run(Command::new(deploy("agent-entrypoint")).args(arguments).env("PATH", &path));
        assert_eq!(said.trim(), expected);
    }
}

/// What a container file copies from the repository and builds of it is there.
#[test]
fn container_files_name_what_there_is() {
    let packages: BTreeSet<_> =
        ["coordinator", "gpu-agent", "cli"].map(|name| format!("lorafleet-{name}")).into();
    let mut built = BTreeSet::new();
    for file in ["coordinator.Containerfile", "agent.Containerfile"] {
        let content = text(file).replace("\\\n", " ");
        let lines: Vec<_> = content.lines().filter(|line| !line.starts_with('#')).collect();
        for line in &lines {
            let words: Vec<_> = line.split_whitespace().collect();
            match words[..] {
                ["COPY", from, ..] if !from.starts_with("--") => {
                    assert!(tests::root().join(from).exists(), "{file}: {line}");
                }
                ["COPY", _, ref programs @ .., _] => {
                    for program in programs {
                        let name = Path::new(program).file_name().unwrap().to_str().unwrap();
                        assert!(tests::program::path(name).exists());
                    }
                }
                ["RUN", "cargo", "build", ..] => {
                    let names =
                        words.windows(2).filter(|pair| pair[0] == "-p").map(|pair| pair[1].to_string());
                    built.extend(names);
                    assert!(words.contains(&"--locked"), "{file}: {line}");
                }
                _ => {}
            }
        }
    }
    assert_eq!(built, packages);
}

/// A program that is told to stop has ended before systemd kills it, and before a machine that is taken away is gone.
#[test]
fn programs_end_before_they_are_killed() {
    let end = telemetry::program::END_LIMIT;
    for (unit, limit, most) in [
        ("coordinator.service", coordinator::STOP_LIMIT + end, 40),
        ("gpu-agent.service", gpu_agent::STOP_LIMIT + end, 30),
    ] {
        let text = text(unit);
        let timeout = text.lines().find_map(|line| line.strip_prefix("TimeoutStopSec="));
        assert_eq!(timeout, Some(most.to_string().as_str()), "{unit}");
        assert!(limit.as_secs() < most, "{unit}: {limit:?} of {most} s");
        // Who reads the unit, or the guide, is told so.
        let said = format!("within {}", limit.as_secs());
        assert!(text.contains(&said), "{unit}: {said}");
    }
    let guide = std::fs::read_to_string(tests::root().join("docs/fleet.md")).unwrap();
    let seconds = (gpu_agent::STOP_LIMIT + end).as_secs();
    for said in
        [format!("within {seconds} s: 20 for the trials"), format!("Leaving takes {seconds} s at most")]
    {
        assert!(guide.contains(&said), "{said}");
    }
}
