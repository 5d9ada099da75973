//! The lists of `deny.toml`: banned crates and sources, held against every crate of `Cargo.lock`, and licenses, held against
//! every crate that is built on this machine. Known vulnerabilities are not looked up: that takes a database from the
//! network, and `cargo deny`.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use serde_json::Value;
use std::collections::BTreeSet;
use std::process::Command;

/// A list of `deny.toml`: one value a line, after `key = [`.
fn list(text: &str, section: &str, key: &str) -> Vec<String> {
    let section = text.split("\n[").find_map(|part| part.strip_prefix(&format!("{section}]"))).unwrap();
    let (_, list) = section.split_once(&format!("\n{key} = [\n")).unwrap();
    let (list, _) = list.split_once("\n]").unwrap();
    let value = |line: &str| line.trim().strip_prefix('"')?.strip_suffix("\",").map(String::from);
    list.lines().map(|line| value(line).unwrap_or_else(|| panic!("{line}: write one value a line"))).collect()
}

/// What a program prints.
fn printed(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).current_dir(tests::root()).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Name and license of each crate that is built on this machine, as its manifest has them.
fn built() -> Vec<(String, String)> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let version = printed("rustc", &["-vV"]);
    let host = version.lines().find_map(|line| line.strip_prefix("host: ")).unwrap();
    // What other machines build is not here to be read.
    let only = ["--filter-platform", host, "--locked", "--offline"];
    let metadata = printed(&cargo, &[&["metadata", "--format-version", "1"][..], &only].concat());
    let metadata: Value = serde_json::from_str(&metadata).unwrap();
    let text = |package: &Value, key: &str| package[key].as_str().unwrap_or_default().to_string();
    let packages = metadata["packages"].as_array().unwrap();
    packages.iter().map(|package| (text(package, "name"), text(package, "license"))).collect()
}

/// Name and source of each crate of `Cargo.lock`, for every machine and feature. Ours have no source.
fn locked() -> Vec<(String, Option<String>)> {
    let lock = std::fs::read_to_string(tests::root().join("Cargo.lock")).unwrap();
    let value = |package: &str, key: &str| {
        let found =
            package.lines().find_map(|line| line.strip_prefix(&format!("{key} = ")).map(String::from));
        found.map(|value| value.trim_matches('"').to_string())
    };
    let packages = lock.split("[[package]]").skip(1);
    packages.map(|package| (value(package, "name").unwrap(), value(package, "source"))).collect()
}

/// Whether licenses of that list satisfy an expression of SPDX. `/` is what older crates write for `OR`.
fn permits(allowed: &[String], expression: &str) -> bool {
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let words: Vec<_> = spaced.split_whitespace().collect();
    let mut at = 0;
    let permitted = either(allowed, &words, &mut at);
    assert_eq!(at, words.len(), "{expression} is no expression of licenses");
    permitted
}

fn either(allowed: &[String], words: &[&str], at: &mut usize) -> bool {
    let mut one = both(allowed, words, at);
    while words.get(*at) == Some(&"OR") {
        *at += 1;
        one |= both(allowed, words, at);
    }
    one
}

fn both(allowed: &[String], words: &[&str], at: &mut usize) -> bool {
    let mut all = license(allowed, words, at);
    while words.get(*at) == Some(&"AND") {
        *at += 1;
        all &= license(allowed, words, at);
    }
    all
}

fn license(allowed: &[String], words: &[&str], at: &mut usize) -> bool {
    let mut name = words.get(*at).copied().unwrap_or_default().to_string();
    *at += 1;
    if name == "(" {
        let inner = either(allowed, words, at);
        *at += 1;
        return inner;
    }
    if words.get(*at) == Some(&"WITH") {
        name = format!("{name} WITH {}", words.get(*at + 1).copied().unwrap_or_default());
        *at += 2;
    }
    allowed.contains(&name)
}

#[test]
fn every_dependency_is_one_that_may_be() {
    let rules = std::fs::read_to_string(tests::root().join("deny.toml")).unwrap();
    let licenses = list(&rules, "licenses", "allow");
    let banned = list(&rules, "bans", "deny");
    let mut wrong = Vec::new();
    let (built, locked) = (built(), locked());
    for (name, license) in &built {
        if !permits(&licenses, license) {
            wrong.push(format!("{name}: license {license:?}"));
        }
    }
    for (name, source) in &locked {
        if banned.contains(name) {
            wrong.push(format!("{name}: is banned"));
        }
        let ours = name.starts_with("lorafleet-");
        if source.as_ref().map_or(!ours, |source| !source.starts_with("registry+")) {
            wrong.push(format!("{name}: comes from {source:?}"));
        }
    }
    // All from one registry.
    let registries: BTreeSet<_> = locked.iter().filter_map(|(_, source)| source.as_ref()).collect();
    assert_eq!(registries.len(), 1, "{registries:?}");
    assert!(
        built.len() > 100 && locked.len() >= built.len(),
        "{} built, {} locked",
        built.len(),
        locked.len()
    );
    assert!(wrong.is_empty(), "see deny.toml:\n{}", wrong.join("\n"));
}

#[test]
fn expressions_of_licenses() {
    let allowed = ["MIT".to_string(), "ISC".into(), "Apache-2.0 WITH LLVM-exception".into()];
    for (expression, want) in [
        ("MIT", true),
        ("GPL-3.0", false),
        ("GPL-3.0 OR MIT", true),
        ("GPL-3.0/MIT", true),
        ("GPL-3.0 AND MIT", false),
        ("ISC AND MIT", true),
        ("(GPL-3.0 OR MIT) AND ISC", true),
        ("GPL-3.0 OR MIT AND ISC", true),
        ("(GPL-3.0 OR MIT) AND BSD", false),
        ("Apache-2.0 WITH LLVM-exception", true),
        ("Apache-2.0 WITH Other", false),
        ("Apache-2.0", false),
    ] {
        assert_eq!(permits(&allowed, expression), want, "{expression}");
    }
}
