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
