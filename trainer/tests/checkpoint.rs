//! A checkpoint in any of its forms gives the tensors that were written, and says what is wrong with a broken one.
//! `fixtures/make_pickles.py` wrote the files.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use candle_core::DType;
use common::CPU;
use domain::trial::{Precision, TargetModules};
use proptest::prelude::*;
use serde_json::json;
use std::path::{Path, PathBuf};
use trainer::adapter_file::{self, PeftConfig, resolve};
use trainer::checkpoint::{Checkpoint, digest};
use trainer::files::Outlives;
use trainer::lora::Adapter;
use trainer::merge::{Merge, MergeInto};
use trainer::model::Base;
use trainer::new_model::SHARD_BYTES;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/pickles").join(name)
}

/// A directory with these fixtures under these names.
fn directory(files: &[(&str, &str)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), "{}").unwrap();
    for (from, to) in files {
        std::fs::copy(fixture(from), dir.path().join(to)).unwrap();
    }
    dir
}

/// Two checkpoints hold the same names, types, shapes and bytes.
fn same(got: &Checkpoint, want: &Checkpoint, what: &str) {
    assert!(want.names().count() > 0, "{what}");
    for name in want.names() {
        let read = |checkpoint: &Checkpoint| {
            let tensor = checkpoint.read(name, &CPU).unwrap();
            assert_eq!(
                (tensor.dims(), tensor.dtype()),
                (checkpoint.shape(name).unwrap(), checkpoint.dtype(name).unwrap())
            );
            let values =
                tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap().to_vec1::<f64>().unwrap();
            (tensor.dims().to_vec(), tensor.dtype(), checkpoint.bytes(name).unwrap(), values)
        };
        assert_eq!(read(got), read(want), "{what}: {name}");
    }
}

#[test]
fn pickles_hold_what_safetensors_hold() {
    for (pickle, reference) in [
        ("float32.bin", "float32.safetensors"),
        ("float16.bin", "float16.safetensors"),
        ("bfloat16.bin", "bfloat16.safetensors"),
        ("protocol4.bin", "float32.safetensors"),
        ("mask.bin", "float32.safetensors"),
    ] {
        let dir = directory(&[(pickle, "pytorch_model.bin")]);
        let got = Checkpoint::open(dir.path()).unwrap();
        let reference = directory(&[(reference, "model.safetensors")]);
        let want = Checkpoint::open(reference.path()).unwrap();
        same(&got, &want, pickle);
        let more: Vec<_> = got.names().filter(|name| want.shape(name).is_err()).collect();
        assert_eq!(more, if pickle == "mask.bin" { vec!["mask"] } else { vec![] }, "{pickle}");
    }
    // A buffer of another type harms nobody who does not read it.
    let dir = directory(&[("mask.bin", "pytorch_model.bin")]);
    let message = Checkpoint::open(dir.path()).unwrap().read("mask", &CPU).unwrap_err().to_string();
    assert!(
        message.contains("pytorch_model.bin: mask is of type BoolStorage, which cannot be read"),
        "{message}"
    );
}

/// Copies the little Llama, its weights as pickles or as safetensors.
fn write_llama(dir: &Path, weights: impl Fn(&str) -> bool) {
    std::fs::create_dir_all(dir).unwrap();
    for entry in std::fs::read_dir(fixture("llama")).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        if name == "config.json" || weights(&name) {
            std::fs::copy(fixture("llama").join(&name), dir.join(&name)).unwrap();
        }
    }
}

#[test]
fn a_model_in_shards_of_pickles_is_loaded_and_merged() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    write_llama(&at("pickles"), |name| name.starts_with("pytorch_model"));
    write_llama(&at("safetensors"), |name| name == "model.safetensors");
    same(
        &Checkpoint::open(&at("pickles")).unwrap(),
        &Checkpoint::open(&at("safetensors")).unwrap(),
        "shards",
    );
    let precision = Precision::default();
    let base = Base::load(&at("pickles"), precision, &CPU).unwrap();
    assert_eq!(Base::outline(&at("pickles"), precision).unwrap().parameters(), base.parameters());
    let config = PeftConfig {
        base_model_name_or_path: "llama".into(),
        r: 2,
        lora_alpha: 4.0,
        target_modules: TargetModules::default(),
        ..PeftConfig::default()
    };
    let targets = resolve(&base, &config).unwrap();
    let mut adapter = Adapter::new(&base, &targets, 0.0, 1).unwrap();
    for module in &mut adapter.modules {
        module.b = module.b.ones_like().unwrap();
    }
    adapter_file::save(&at("adapter"), &adapter, &config, Outlives::Process).unwrap();
    for name in ["pickles", "safetensors"] {
        let (base, adapter, to) = (at(name), at("adapter"), at(&format!("merged-{name}")));
        let merge = Merge {
            base: &base,
            adapter: &adapter,
            to: &to,
            into: MergeInto::Original,
            shard_bytes: SHARD_BYTES,
            overwrite: false,
        };
        merge.run(&mut || false).unwrap().unwrap();
    }
    let merged = Checkpoint::open(&at("merged-pickles")).unwrap();
    same(&merged, &Checkpoint::open(&at("merged-safetensors")).unwrap(), "merged");
    let q = "model.layers.0.self_attn.q_proj.weight";
    let value = |checkpoint: &Checkpoint| {
        checkpoint.read(q, &CPU).unwrap().to_dtype(DType::F32).unwrap().to_vec2::<f32>().unwrap()
    };
    assert_ne!(value(&merged), value(&Checkpoint::open(&at("pickles")).unwrap()));
}

/// Names of files and what stands in them; an index is given by its `weight_map`.
type Files<'a> = &'a [(&'a str, &'a str)];

fn sharded(files: Files, index: &str, weight_map: &serde_json::Value) -> tempfile::TempDir {
    let dir = directory(files);
    std::fs::write(dir.path().join(index), json!({ "weight_map": weight_map }).to_string()).unwrap();
    dir
}

#[test]
fn an_index_names_the_shards() {
    const INDEX: &str = "pytorch_model.bin.index.json";
    let shards = [("float32.bin", "a.bin"), ("float16.bin", "b.bin")];
    // Where both have a tensor, the index says which one counts.
    let dir = sharded(&shards, INDEX, &json!({ "plain": "b.bin", "vector": "a.bin" }));
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.dtype("plain").unwrap(), DType::F16);
    assert_eq!(checkpoint.dtype("vector").unwrap(), DType::F32);
    for (weight_map, want) in [
        (json!({ "plain": "c.bin" }), "c.bin: is missing; download the shard"),
        (json!({ "plane": "a.bin" }), "a.bin: lacks the tensor plane, which the index places there"),
        (json!({ "plain": "../a.bin" }), "names \"../a.bin\", which is no file beside it"),
        (json!({ "plain": "/etc/passwd" }), "which is no file beside it"),
        (json!({ "plain": "" }), "which is no file beside it"),
        (json!([]), "is no index of a checkpoint"),
    ] {
        let dir = sharded(&shards, INDEX, &weight_map);
        let message = Checkpoint::open(dir.path()).unwrap_err().to_string();
        assert!(message.contains(want), "{message}\nlacks {want}");
    }
}

#[test]
fn safetensors_are_taken_before_pickles_and_the_digest_is_of_what_is_used() {
    let pickles = directory(&[("float16.bin", "pytorch_model.bin")]);
    let both =
        directory(&[("float16.bin", "pytorch_model.bin"), ("float32.safetensors", "model.safetensors")]);
    let safetensors = directory(&[("float32.safetensors", "model.safetensors")]);
    assert_eq!(Checkpoint::open(both.path()).unwrap().dtype("plain").unwrap(), DType::F32);
    let digest = |dir: &tempfile::TempDir| digest(dir.path()).unwrap();
    assert_eq!(digest(&both), digest(&safetensors));
    assert_ne!(digest(&both), digest(&pickles));
    std::fs::write(both.path().join("model.safetensors"), "torn").unwrap();
    assert!(Checkpoint::open(both.path()).is_err(), "a broken file is not passed over");
}

#[test]
fn what_cannot_be_read_is_named() {
    for (file, want) in [
        (
            "legacy.bin",
            "is written in the format of torch before 1.6; write it anew with a later torch: torch.save(",
        ),
        ("nested.bin", "holds \"epoch\", which is no tensor; use the model's safetensors"),
        (
            "expanded.bin",
            "has a tensor of shape [1000, 4] and strides [0, 1] that has more elements than its storage's 4",
        ),
        ("counter.bin", "uses collections.Counter, which is no part of a file of tensors"),
        ("module.bin", "uses torch.nn.modules.linear.Linear, which is no part of a file of tensors"),
        ("float32.safetensors", "is no file of torch: it is no zip archive; download the file again"),
    ] {
        let dir = directory(&[(file, "pytorch_model.bin")]);
        let message = Checkpoint::open(dir.path()).unwrap_err().to_string();
        assert!(
            message.contains(want) && message.contains("pytorch_model.bin: "),
            "{file}: {message}\nlacks {want}"
        );
    }
    let none = directory(&[]);
    let message = Checkpoint::open(none.path()).unwrap_err().to_string();
    assert!(message.contains("has neither model.safetensors nor pytorch_model.bin"), "{message}");
}

/// Cut off anywhere, a file is refused by its name; so is one that is cut off once it was opened.
#[test]
fn torn_files_are_refused() {
    for (file, name) in [("float32.bin", "pytorch_model.bin"), ("float32.safetensors", "model.safetensors")] {
        let dir = directory(&[(file, name)]);
        let path = dir.path().join(name);
        let whole = std::fs::read(&path).unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        for length in 0..whole.len() {
            std::fs::write(&path, &whole[..length]).unwrap();
            let message = Checkpoint::open(dir.path()).unwrap_err().to_string();
            assert!(message.contains(name) && message.contains("; "), "{length}: {message}");
        }
        std::fs::write(&path, &whole[..64]).unwrap();
        let message = checkpoint.read("vector", &CPU).unwrap_err().to_string();
        assert!(message.contains("was cut off while it was used: vector starts at byte"), "{message}");
    }
}

/// Opens a directory and reads whatever it offers; only a panic or memory without bounds would be wrong.
fn exercise(dir: &Path) {
    if let Ok(checkpoint) = Checkpoint::open(dir) {
        for name in checkpoint.names() {
            let _ = checkpoint.read(name, &CPU);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    /// Files with some bytes changed never end the process.
    #[test]
    fn changed_bytes_do_no_harm(
        which in 0usize..3, changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let (file, name) = [
            ("float32.bin", "pytorch_model.bin"),
            ("mask.bin", "pytorch_model.bin"),
            ("float32.safetensors", "model.safetensors"),
        ][which];
        let dir = directory(&[(file, name)]);
        let path = dir.path().join(name);
        let mut bytes = std::fs::read(&path).unwrap();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        std::fs::write(&path, bytes).unwrap();
        exercise(dir.path());
    }
}
