//! Dependencies point one way (ARCHITECTURE.md, invariant 1). Read from `cargo metadata`, not from memory.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use serde_json::Value;
use std::collections::BTreeSet;
use std::process::Command;

/// Each crate of ours and the crates of ours that it may know.
const MAY_KNOW: &[(&str, &[&str])] = &[
    ("domain", &[]),
    ("actor", &[]),
    ("telemetry", &[]),
    ("proto", &["domain"]),
    ("config", &["domain"]),
    ("security", &[]),
    ("registry", &["domain", "actor", "security", "telemetry"]),
    ("hub", &[]),
    ("trainer", &["domain", "hub"]),
    ("eval", &["domain", "config", "trainer"]),
    ("coordinator", &["domain", "proto", "config", "actor", "security", "telemetry", "registry"]),
    (
        "gpu-agent",
        &[
            "domain",
            "proto",
            "config",
            "actor",
            "security",
            "telemetry",
            "registry",
            "hub",
            "trainer",
            "eval",
        ],
    ),
    (
        "cli",
        &[
            "domain",
            "proto",
            "config",
            "actor",
            "security",
            "telemetry",
            "registry",
            "hub",
            "trainer",
            "eval",
            "coordinator",
            "gpu-agent",
        ],
    ),
    (
        "tests",
        &[
            "domain",
            "proto",
            "config",
            "actor",
            "security",
            "telemetry",
            "registry",
            "hub",
            "trainer",
            "eval",
            "coordinator",
            "gpu-agent",
            "cli",
        ],
    ),
];

/// Foreign crates that only some crates of ours may name.
const ONLY: &[(&str, &[&str])] = &[
    ("candle-core", &["trainer"]),
    ("candle-nn", &["trainer"]),
    ("rusqlite", &["registry"]),
    ("etcd-client", &["registry"]),
    ("ureq", &["hub", "telemetry", "cli"]),
    ("tokio-rustls", &["security"]),
    ("opentelemetry", &["telemetry"]),
    ("opentelemetry_sdk", &["telemetry"]),
    ("opentelemetry-otlp", &["telemetry"]),
    ("tracing-opentelemetry", &["telemetry"]),
    ("tracing-subscriber", &["telemetry", "tests"]),
    ("hyper", &["telemetry", "gpu-agent", "tests"]),
    ("reqwest", &["coordinator"]),
];

fn packages() -> Vec<(String, BTreeSet<String>)> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--no-deps", "--format-version", "1", "--offline"])
        .current_dir(tests::root())
        .output()
        .expect("cargo metadata runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo metadata prints JSON");
    let name = |v: &Value| v["name"].as_str().expect("a package has a name").to_string();
    metadata["packages"]
        .as_array()
        .expect("packages")
        .iter()
        .map(|package| {
            // Tests may use what they like: the layering is of the product.
            let dependencies = package["dependencies"].as_array().expect("dependencies").iter();
            let product = dependencies.filter(|d| d["kind"].as_str() != Some("dev")).map(name).collect();
            (name(package), product)
        })
        .collect()
}

fn ours(package: &str) -> Option<&str> {
    package.strip_prefix("lorafleet-")
}

#[test]
fn dependencies_point_one_way() {
    let mut wrong = Vec::new();
    for (package, dependencies) in packages() {
        let from = ours(&package).unwrap_or(&package);
        let Some((_, allowed)) = MAY_KNOW.iter().find(|(name, _)| *name == from) else {
            wrong.push(format!("{from} is not in the table of tests/tests/layering.rs"));
            continue;
        };
        for to in &dependencies {
            if let Some(to) = ours(to)
                && !allowed.contains(&to)
            {
                wrong.push(format!("{from} may not know {to}"));
            }
            if let Some((_, only)) = ONLY.iter().find(|(name, _)| name == to)
                && !only.contains(&from)
            {
                wrong.push(format!("only {} may know {to}, but {from} does", only.join(" and ")));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_table_has_no_cycle() {
    // Each crate may know only crates that stand above it in the table.
    for (i, (name, allowed)) in MAY_KNOW.iter().enumerate() {
        for other in *allowed {
            assert!(MAY_KNOW[..i].iter().any(|(n, _)| n == other), "{name} stands above {other}");
        }
    }
}
