//! A merged model says what its base says with the adapter.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use candle_core::{DType, Tensor};
use common::{CPU, json_file, write_tiny_model, write_tokenizer};
use domain::trial::{Precision, TargetModules};
use serde_json::json;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use trainer::adapter_file::{self, CONFIG_FILE, PeftConfig, resolve, written_targets};
use trainer::files::Outlives;
use trainer::lora::Adapter;
use trainer::merge::{Merge, MergeInto, Merged};
use trainer::model::Base;
use trainer::new_model::SHARD_BYTES;
use trainer::{TrainError, pack};

fn names(names: &[&str]) -> TargetModules {
    TargetModules::Names(names.iter().map(ToString::to_string).collect())
}

/// Writes an adapter of a base whose matrices are all drawn, and gives it back.
fn write_adapter(dir: &Path, base: &Base, targets: &TargetModules) -> Adapter {
    let config = PeftConfig {
        base_model_name_or_path: "base".into(),
        r: 4,
        lora_alpha: 6.0,
        lora_dropout: 0.1,
        target_modules: written_targets(base, targets),
        ..PeftConfig::default()
    };
    let modules = resolve(base, &config).unwrap();
    let fresh = |dropout, seed| Adapter::new(base, &modules, dropout, seed).unwrap();
    let (mut adapter, drawn) = (fresh(0.1, 1), fresh(0.0, 2));
    for (module, other) in adapter.modules.iter_mut().zip(drawn.modules) {
        // Values of A, in another order, make a B of its own shape.
        let rows = module.b.dims()[0];
        let values: Vec<f32> = other.a.flatten_all().unwrap().to_vec1().unwrap();
        let values: Vec<f32> = values.into_iter().cycle().take(rows * 4).collect();
        module.b = Tensor::from_vec(values, (rows, 4), &CPU).unwrap();
    }
    adapter_file::save(dir, &adapter, &config, Outlives::Process).unwrap();
    adapter
}

/// Copies the quickstart's base, its weights as `dtype`.
fn write_quickstart(dir: &Path, dtype: DType) {
    let from = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../config/quickstart/base");
    std::fs::create_dir_all(dir).unwrap();
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(from.join(name), dir.join(name)).unwrap();
    }
    let tensors = candle_core::safetensors::load(from.join("model.safetensors"), &CPU).unwrap();
    let tensors: HashMap<_, _> =
        tensors.into_iter().map(|(name, tensor)| (name, tensor.to_dtype(dtype).unwrap())).collect();
    candle_core::safetensors::save(&tensors, dir.join("model.safetensors")).unwrap();
}

/// Writes the tiny model, its head untied or tied.
fn write_tiny(dir: &Path, tied: bool) {
    write_tiny_model(dir);
    write_tokenizer(dir, 40);
    std::fs::write(dir.join("generation_config.json"), r#"{"eos_token_id": 1}"#).unwrap();
    if tied {
        edit(&dir.join("config.json"), "tie_word_embeddings", json!(true));
    }
}

fn edit(path: &Path, key: &str, value: serde_json::Value) {
    let mut document = json_file(path);
    document[key] = value;
    std::fs::write(path, document.to_string()).unwrap();
}

fn merge(dir: &Path, shard_bytes: u64, overwrite: bool) -> Result<Option<Merged>, TrainError> {
    let (base, adapter, to) = (dir.join("base"), dir.join("adapter"), dir.join("models/merged"));
    Merge { base: &base, adapter: &adapter, to: &to, into: MergeInto::Original, shard_bytes, overwrite }
        .run(&mut || false)
}

/// The base's head as its own tensor, which an adapter of it needs.
fn untied(mut base: Base) -> Base {
    base.config.tie_word_embeddings = false;
    base
}

/// The largest difference of two tensors, relative to the largest value.
fn difference(a: &Tensor, b: &Tensor) -> f32 {
    let largest = |t: &Tensor| -> f32 { t.abs().unwrap().max_all().unwrap().to_scalar().unwrap() };
    largest(&(a - b).unwrap()) / largest(b)
}

/// Merges an adapter of `targets` into the base that `write` writes, and compares logits.
fn check(name: &str, write: impl Fn(&Path), targets: &TargetModules, shard_bytes: u64, tolerance: f32) {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    write(&dir.join("base"));
    let base = untied(Base::load(&dir.join("base"), Precision::default(), &CPU).unwrap());
    let adapter = write_adapter(&dir.join("adapter"), &base, targets);
    let merged = merge(dir, shard_bytes, false).unwrap().unwrap();
    assert_eq!(merged.layers, adapter.modules.len(), "{name}");
    let to = dir.join("models/merged");
    let result = Base::load(&to, Precision::default(), &CPU).unwrap();
    let ids: Vec<u32> = (0..12).map(|i| (7 * i + 3) % 40).collect();
    let want = pack::logits(&base, Some(&adapter), &ids).unwrap();
    let got = pack::logits(&result, None, &ids).unwrap();
    assert!(difference(&got, &want) < tolerance, "{name}: {} off", difference(&got, &want));
    let bare = pack::logits(&base, None, &ids).unwrap();
    assert!(difference(&got, &bare) > 30.0 * tolerance, "{name}: the adapter does nothing");

    // Everything beside the weights is the base's; tensors keep their type; nothing else is left.
    let has_head = adapter.position("lm_head").is_some();
    for file in ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"] {
        let read = |dir: &Path| std::fs::read(dir.join(file)).ok();
        if !(has_head && file == "config.json") {
            assert_eq!(read(&to), read(&dir.join("base")), "{name}: {file}");
        }
    }
    let base_tensors = tensors(&dir.join("base"));
    let mut tensors = tensors(&to);
    let files = weight_files(&to);
    assert_eq!(files.len(), merged.weight_files, "{name}");
    assert_eq!(files.len() == 1, merged.bytes <= shard_bytes, "{name}");
    let sizes = files.iter().map(|file| candle_core::safetensors::load(file, &CPU).unwrap());
    let sizes: Vec<(usize, u64)> = sizes.map(|held| (held.len(), held.values().map(bytes).sum())).collect();
    assert!(sizes.iter().all(|(count, bytes)| *count == 1 || *bytes <= shard_bytes), "{name}: {sizes:?}");
    assert_eq!(sizes.iter().map(|(_, bytes)| bytes).sum::<u64>(), merged.bytes, "{name}");
    if !base_tensors.contains_key("lm_head.weight") && has_head {
        assert!(tensors.remove("lm_head.weight").is_some(), "{name}");
    }
    let types = |tensors: &BTreeMap<String, Tensor>| -> Vec<_> {
        tensors.iter().map(|(name, t)| (name.clone(), t.dtype(), t.dims().to_vec())).collect()
    };
    assert_eq!(types(&tensors), types(&base_tensors), "{name}");
    let left: Vec<_> =
        std::fs::read_dir(dir.join("models")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["merged"], "{name}");
}

fn bytes(tensor: &Tensor) -> u64 {
    (tensor.elem_count() * tensor.dtype().size_in_bytes()) as u64
}

fn weight_files(dir: &Path) -> Vec<PathBuf> {
    let files = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    files.filter(|file| file.extension().is_some_and(|e| e == "safetensors")).collect()
}

/// All tensors of a model directory.
fn tensors(dir: &Path) -> BTreeMap<String, Tensor> {
    weight_files(dir)
        .into_iter()
        .flat_map(|file| candle_core::safetensors::load(file, &CPU).unwrap())
        .collect()
}

#[test]
fn a_merged_model_is_base_and_adapter() {
    let all = TargetModules::default();
    let head = names(&["q_proj", "down_proj", "lm_head"]);
    let quickstart = |dtype| move |dir: &Path| write_quickstart(dir, dtype);
    check("quickstart", quickstart(DType::F32), &all, SHARD_BYTES, 1e-5);
    check("quickstart in shards", quickstart(DType::F32), &all, 400_000, 1e-5);
    // What is left is the rounding of the weights themselves.
    check("quickstart as it is", quickstart(DType::F16), &all, SHARD_BYTES, 1e-2);
    check("quickstart's tied head", quickstart(DType::F32), &head, 400_000, 1e-5);
    let tiny = |tied| move |dir: &Path| write_tiny(dir, tied);
    check("untied", tiny(false), &all, SHARD_BYTES, 1e-5);
    check("untied, its head too", tiny(false), &head, 4000, 1e-5);
    // Below the size of any tensor: each has its own file.
    check("untied, a file a tensor", tiny(false), &all, 1, 1e-5);
    // The tiny model's files hold a head that tying makes void.
    check("tied, its head untied", tiny(true), &head, SHARD_BYTES, 1e-5);
}

#[test]
fn an_index_names_the_file_of_every_tensor() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    write_tiny(&dir.join("base"), false);
    let base = Base::load(&dir.join("base"), Precision::default(), &CPU).unwrap();
    write_adapter(&dir.join("adapter"), &base, &TargetModules::default());
    let merged = merge(dir, 4000, false).unwrap().unwrap();
    let to = dir.join("models/merged");
    let index = json_file(&to.join("model.safetensors.index.json"));
    assert_eq!(index["metadata"]["total_size"], json!(merged.bytes));
    let map = index["weight_map"].as_object().unwrap();
    assert_eq!(map.len(), 21);
    for (name, file) in map {
        let file = to.join(file.as_str().unwrap());
        assert!(candle_core::safetensors::load(&file, &CPU).unwrap().contains_key(name), "{name}");
    }
    // Another merge, of one file, leaves none of these.
    merge(dir, SHARD_BYTES, true).unwrap().unwrap();
    let mut left: Vec<_> = std::fs::read_dir(&to).unwrap().map(|e| e.unwrap().file_name()).collect();
    left.sort();
    let want = [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(left, want);
}

#[test]
fn what_cannot_be_merged_is_named_and_nothing_is_written() {
    type Change = fn(&Path);
    let cases: [(Change, bool, &str); 13] = [
        (|d| std::fs::remove_dir_all(d.join("base")).unwrap(), false, "base: no such directory"),
        (
            |d| std::fs::remove_file(d.join("base/model.safetensors")).unwrap(),
            false,
            "has neither model.safetensors",
        ),
        (|d| cut(&d.join("base/model.safetensors")), false, "is cut off"),
        (|d| edit(&d.join("base/config.json"), "model_type", json!("gpt2")), false, "model_type is gpt2"),
        (|d| std::fs::remove_dir_all(d.join("adapter")).unwrap(), false, "name a PEFT adapter directory"),
        (|d| cut(&d.join("adapter/adapter_model.safetensors")), false, "copy the adapter directory again"),
        (
            |d| edit(&d.join("adapter").join(CONFIG_FILE), "use_qalora", json!(true)),
            false,
            "use_qalora is true",
        ),
        (
            |d| edit(&d.join("adapter").join(CONFIG_FILE), "r", json!(8)),
            false,
            "has shape [4, 16], not [8, 16]",
        ),
        (
            |d| {
                write_tiny(&d.join("base"), true);
                edit(&d.join("adapter").join(CONFIG_FILE), "ensure_weight_tying", json!(true));
            },
            false,
            "ensure_weight_tying is true for an adapter of the tied lm_head",
        ),
        (
            |d| fill(&d.join("models/merged/config.json")),
            false,
            "is not empty; name another directory, or replace",
        ),
        (|d| fill(&d.join("models/merged/letter.txt")), true, "is not empty and no model"),
        (|d| fill(&d.join("models/merged")), true, "is no directory that can be read"),
        (
            |d| {
                fill(&d.join("models/merged/config.json"));
                std::fs::rename(d.join("adapter"), d.join("models/merged/adapter")).unwrap();
                #[cfg(unix)]
                std::os::unix::fs::symlink(d.join("models/merged/adapter"), d.join("adapter")).unwrap();
            },
            true,
            "holds what the new model is made of",
        ),
    ];
    for (change, overwrite, want) in cases {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        write_tiny(&dir.join("base"), false);
        let base = Base::load(&dir.join("base"), Precision::default(), &CPU).unwrap();
        write_adapter(&dir.join("adapter"), &base, &names(&["q_proj", "lm_head"]));
        change(dir);
        let files = || std::fs::read_dir(dir.join("models")).map_or(0, Iterator::count);
        let before = files();
        let message = merge(dir, SHARD_BYTES, overwrite).unwrap_err().to_string();
        assert!(message.contains(want), "{message}\nlacks {want}");
        assert_eq!(files(), before, "{want}");
    }
}

/// Takes the last byte of a file away.
fn cut(path: &Path) {
    let bytes = std::fs::read(path).unwrap();
    std::fs::write(path, &bytes[..bytes.len() - 1]).unwrap();
}

fn fill(path: &Path) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, "{}").unwrap();
}

/// A merge that is interrupted leaves neither a model nor a trace, and the model that was there stays.
#[test]
fn an_interrupted_merge_leaves_what_was() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    write_tiny(&dir.join("base"), false);
    let base = Base::load(&dir.join("base"), Precision::default(), &CPU).unwrap();
    write_adapter(&dir.join("adapter"), &base, &TargetModules::default());
    fill(&dir.join("models/merged/config.json"));
    // What a killed one left is in nobody's way.
    fill(&dir.join("models/.merged.partial/model.safetensors"));
    let (from, adapter, to) = (dir.join("base"), dir.join("adapter"), dir.join("models/merged"));
    let merge = Merge {
        base: &from,
        adapter: &adapter,
        to: &to,
        into: MergeInto::Original,
        shard_bytes: 4000,
        overwrite: true,
    };
    let mut asked = 0;
    let stopped = merge.run(&mut || {
        asked += 1;
        asked == 15
    });
    assert_eq!(stopped.unwrap(), None);
    let left: Vec<_> =
        std::fs::read_dir(dir.join("models")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left, ["merged"]);
    assert_eq!(std::fs::read_to_string(to.join("config.json")).unwrap(), "{}");
}
