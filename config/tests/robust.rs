//! No text makes the reader panic: it is a sweep or it says what is wrong, one line for each thing.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use config::sweep_file;
use proptest::prelude::*;
use std::path::Path;

/// Pieces of sweep files, sound and unsound, that together make odd documents.
const PIECES: &[&str] = &[
    "name: a\n",
    "parameters:\n",
    "search:\n",
    "  lora_rank: ",
    "  when: ",
    "[8, 16]",
    "{ choices: [",
    "] }",
    "{",
    "}",
    "\n",
    "  ",
    "- ",
    "constraints: [\"",
    "lora_rank < ",
    "((",
    "))",
    "\"",
    "]",
    ":",
    "1e-4",
    ".nan",
    "1e999",
    "-9223372036854775808",
    "uniform: [0, 1e300]",
    "step: 1e-300",
    "integer: [-9007199254740992, 9007199254740992]",
    "log_uniform: [1e-320, 1]",
    "otherwise: ",
    "null",
    "~",
    "&a",
    "*a",
    "!!int",
    "? ",
    "| \n",
    "> \n",
    "\t",
    "#",
    "---\n",
    "…",
    "max_wall_clock: 1h",
    "budget: { max_wall_clock: 1é }\n",
    "dataset_name: ~\n",
    "pretrained_model_id: m\n",
    "target_modules: [a, b]\n",
];

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn odd_documents(pieces in prop::collection::vec(prop::sample::select(PIECES), 0..24)) {
        let text = pieces.concat();
        if let Err(error) = sweep_file::parse_only(&text, Path::new("x.yaml")) {
            for line in error.to_string().lines() {
                prop_assert!(line.starts_with("x.yaml:"), "{:?}: {}", text, error);
            }
        }
    }

    #[test]
    fn odd_overrides(key in "[a-z_.\\[\\]]{0,12}", value in "[\\[\\]{}:, a-z0-9.'\"*&!-]{0,16}") {
        let text = "name: a\npretrained_model_id: m\ndataset_name: d\nsearch: { max_trials: 1 }\n";
        let folder = tempfile::tempdir().unwrap();
        let _ = sweep_file::parse(text, Path::new("x.yaml"), folder.path(), &[(key, value)], folder.path());
    }
}
