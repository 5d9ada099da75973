//! Every sweep file that ships can be read.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use config::sweep_file;
use domain::sweep::SweepSpec;
use std::path::Path;

#[test]
fn every_sweep_file_reads_and_comes_back_from_its_document() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("sweeps");
    let mut read = 0;
    for entry in std::fs::read_dir(&folder).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|e| e != "yaml") {
            continue;
        }
        let text = std::fs::read_to_string(&path).unwrap();
        let loaded = sweep_file::parse_only(&text, &path).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(SweepSpec::from_document(&loaded.document), Ok(loaded.spec), "{}", path.display());
        read += 1;
    }
    assert!(read >= 2, "{read} sweep files in {}", folder.display());
}

/// The examples of the format's page: each block of YAML that begins with a name is a whole file.
#[test]
fn every_example_of_the_page_reads() {
    let page = include_str!("../../docs/sweep-file.md");
    let blocks: Vec<_> =
        page.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    let whole: Vec<_> = blocks.iter().filter(|block| block.starts_with("name:")).collect();
    assert!(!whole.is_empty());
    for block in whole {
        let loaded = sweep_file::parse_only(block, Path::new("docs/sweep-file.md"));
        loaded.unwrap_or_else(|e| panic!("{e}\n{block}"));
    }
}

/// The runs of the reference: the same rows, seeds apart, for the sweep file as for PEFT.
#[test]
fn the_stories_sweep_finds_its_model_and_rows() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let shared = std::env::var_os("LORAFLEET_SHARED").map_or_else(|| root.join("../shared"), Into::into);
    if !shared.join("data").exists() || !root.join("../shared").exists() {
        println!("not checked: {} has no data", shared.display());
        return;
    }
    let loaded = sweep_file::load(&root.join("config/sweeps/stories260k.yaml"), &[], &root).unwrap();
    assert!(loaded.spec.base.dataset_name.ends_with("shared/data/instruct/instruct_500_guanaco.jsonl"));
    assert!(Path::new(&loaded.spec.base.pretrained_model_id).join("config.json").exists());
}
