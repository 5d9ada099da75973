//! A model that is merged or quantised, and the process ends at a point of its writing.

use crate::common::Sandbox;
use crate::points::points;
use crate::server::sweep;
use std::collections::BTreeMap;
use std::path::Path;

/// Each file of a directory and what stands in it; `None` if it is not there.
fn files(dir: &Path) -> Option<BTreeMap<String, Vec<u8>>> {
    let file = |entry: std::io::Result<std::fs::DirEntry>| {
        let entry = entry.unwrap();
        (entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap())
    };
    Some(std::fs::read_dir(dir).ok()?.map(file).collect())
}

fn names(dir: &Path) -> Vec<String> {
    std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

/// Runs a command with a point armed. Whether it came to it.
fn crashes_at(sandbox: &Sandbox, args: &[&str], armed: &str) -> bool {
    let output = sandbox.command(args).env(domain::crash::VARIABLE, armed).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let crashed = said.contains("crash point ");
    assert_eq!(output.status.success(), !crashed, "{armed}: {said}");
    crashed
}

/// At each point the directory holds nothing, the model that was there, or the new one, whole; the same command then
/// writes it, and leaves nothing else.
#[test]
fn a_crash_while_a_model_is_written_leaves_none_that_is_half() {
    let sandbox = Sandbox::new(&sweep(1, ""));
    let result = sandbox.json(&["run", "sweep.yaml"]);
    let trial = result["trials"][0]["id"].as_str().unwrap();
    sandbox.json(&["adapters", "pull", trial, "--to", "adapter"]);
    let base = concat!(env!("CARGO_MANIFEST_DIR"), "/../config/quickstart/base");
    let (models, to) = (sandbox.path().join("models"), sandbox.path().join("models/new"));
    let points: Vec<_> = points()
        .into_iter()
        .filter(|point| point.starts_with("model/") || point.starts_with("file/"))
        .collect();
    assert!(points.len() >= 6, "{points:?}");
    let commands: [&[&str]; 2] =
        [&["adapters", "merge", "adapter", "--to", "models/new"], &["quantize", base, "--to", "models/new"]];
    for command in commands {
        let _ = std::fs::remove_dir_all(&models);
        sandbox.json(command);
        let new = files(&to);
        for overwrite in [false, true] {
            let args = [command, if overwrite { &["--overwrite"][..] } else { &[] }].concat();
            let mut reached = Vec::new();
            for armed in points.iter().flat_map(|point| [format!("{point}:1"), format!("{point}:3")]) {
                let _ = std::fs::remove_dir_all(&models);
                let mut old = None;
                if overwrite {
                    std::fs::create_dir_all(&to).unwrap();
                    std::fs::write(to.join("config.json"), "{}").unwrap();
                    old = files(&to);
                }
                let what = format!("{args:?}, {armed}");
                if !crashes_at(&sandbox, &args, &armed) {
                    assert_eq!(files(&to), new, "{what}");
                    continue;
                }
                reached.push(armed.clone());
                let found = files(&to);
                assert!(
                    found.is_none() || found == old || found == new,
                    "{what}: neither the old nor the new"
                );
                let others: Vec<_> =
                    names(&models).into_iter().filter(|name| !name.starts_with('.')).collect();
                assert!(others.iter().all(|name| name == "new"), "{what}: {others:?}");
                // Once the new model is there, only --overwrite writes it again.
                let whole = found == new;
                let again = sandbox.lorafleet(&args);
                assert_eq!(again.status.success(), overwrite || !whole, "{what}, again");
                assert_eq!(files(&to), new, "{what}, again");
                let left: Vec<_> = names(&models).into_iter().filter(|name| *name != "new").collect();
                assert!(left.is_empty(), "{what}, again: {left:?}");
            }
            let reached = |point: &str| reached.iter().any(|armed| armed.starts_with(point));
            assert!(
                points.iter().all(|point| reached(point) || point == "model/replaced" && !overwrite),
                "{args:?}"
            );
        }
    }
}

/// A model that was to be replaced when the process ended is put back by the next command, whatever comes of that.
#[test]
fn a_model_that_was_to_be_replaced_comes_back() {
    let sandbox = Sandbox::new("");
    let base = concat!(env!("CARGO_MANIFEST_DIR"), "/../config/quickstart/base");
    sandbox.json(&["quantize", base, "--to", "quantized"]);
    sandbox.json(&["quantize", base, "--to", "models/new", "--double-quant", "false"]);
    let to = sandbox.path().join("models/new");
    let old = files(&to);
    let replace = ["quantize", base, "--to", "models/new", "--overwrite"];
    assert!(crashes_at(&sandbox, &replace, "model/replaced:1"));
    assert_eq!(files(&to), None);
    let refused = sandbox.lorafleet(&["quantize", "quantized", "--to", "models/new", "--overwrite"]);
    assert!(!refused.status.success());
    assert_eq!(files(&to), old);
}
