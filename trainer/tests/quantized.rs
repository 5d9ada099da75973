//! Models that bitsandbytes quantised before their files were written. `fixtures/quantized/make.py` wrote them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use candle_core::{DType, Tensor};
use common::{CPU, json_file};
use domain::trial::{ComputeDtype, Precision, PrecisionMode, TargetModules};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use trainer::adapter_file::{self, PeftConfig, resolve};
use trainer::checkpoint::Checkpoint;
use trainer::files::Outlives;
use trainer::lora::Adapter;
use trainer::merge::{Merge, MergeInto};
use trainer::model::{Base, LoadProgress, ModelConfig};
use trainer::new_model::SHARD_BYTES;
use trainer::pack;
use trainer::quantize::{Quantize, QuantizedModel};
use trainer::weight::Weight;

/// A fixture and whether its magnitudes are quantised too.
const FIXTURES: [(&str, bool); 2] = [("single", false), ("double", true)];

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/quantized").join(name)
}

fn four_bit(double_quant: bool) -> Precision {
    Precision { mode: PrecisionMode::FourBit, compute_dtype: Some(ComputeDtype::Float32), double_quant }
}

fn tensors(dir: &Path) -> HashMap<String, Tensor> {
    candle_core::safetensors::load(dir.join("model.safetensors"), &CPU).unwrap()
}

/// The largest difference, relative to the largest value.
fn difference(got: &Tensor, want: &Tensor) -> f32 {
    let largest = |t: &Tensor| -> f32 { t.abs().unwrap().max_all().unwrap().to_scalar().unwrap() };
    largest(&(got - want).unwrap()) / largest(want)
}

#[test]
fn codes_and_magnitudes_are_the_files() {
    for (name, double) in FIXTURES {
        let file = tensors(&fixture(name));
        let base = Base::load(&fixture(name), four_bit(double), &CPU).unwrap();
        for linear in &base.layers[0].linears {
            let Weight::Nf4(matrix) = &linear.weight else { panic!("{name}: {} is dense", linear.path) };
            let part = |part: &str| &file[&format!("{}.weight{part}", linear.path)];
            let bytes = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<u8>().unwrap();
            let floats = |tensor: &Tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let (codes, nested) = matrix.parts().unwrap();
            assert_eq!(codes, bytes(part("")), "{name}: {}", linear.path);
            let Some((scales, absmax, offset)) = nested else {
                assert!(!double);
                assert_eq!(matrix.magnitudes().unwrap(), floats(part(".absmax")), "{name}: {}", linear.path);
                continue;
            };
            let state = bytes(part(".quant_state.bitsandbytes__nf4"));
            let state: Value = serde_json::from_slice(&state).unwrap();
            assert!(double);
            assert_eq!(scales, bytes(part(".absmax")), "{name}: {}", linear.path);
            assert_eq!(absmax, floats(part(".nested_absmax")), "{name}: {}", linear.path);
            assert_eq!(
                f64::from(offset),
                state["nested_offset"].as_f64().unwrap(),
                "{name}: {}",
                linear.path
            );
        }
    }
}

#[test]
fn logits_are_transformers_and_those_of_the_dequantised_weights() {
    for (name, double) in FIXTURES {
        let log = json_file(&fixture(name).join("logits.json"));
        let ids: Vec<u32> = serde_json::from_value(log["input_ids"].clone()).unwrap();
        let want: Vec<Vec<f32>> = serde_json::from_value(log["logits"].clone()).unwrap();
        let want = Tensor::new(want, &CPU).unwrap();
        let logits = |precision| {
            let base = Base::load(&fixture(name), precision, &CPU).unwrap();
            pack::logits(&base, None, &ids).unwrap()
        };
        let (quantized, dequantized) = (logits(four_bit(double)), logits(Precision::default()));
        println!(
            "{name}: {:e} from transformers, {:e} from the dequantised",
            difference(&quantized, &want),
            difference(&quantized, &dequantized)
        );
        assert!(difference(&quantized, &want) < 1e-5, "{name}");
        assert!(difference(&quantized, &dequantized) < 1e-5, "{name}");
        // In 16 bits the numbers are those of the dequantised weights, rounded.
        let sixteen = logits(Precision { mode: PrecisionMode::Bfloat16, ..Precision::default() });
        assert!(difference(&sixteen, &want) < 3e-2, "{name}");
    }
}

#[test]
fn what_it_takes_is_predicted() {
    for (name, double) in FIXTURES {
        let sixteen = Precision { mode: PrecisionMode::Bfloat16, ..Precision::default() };
        for precision in [four_bit(double), Precision::default(), sixteen] {
            let outline = Base::outline(&fixture(name), precision).unwrap();
            let mut watched = Vec::new();
            let base = Base::load_watched(&fixture(name), precision, &CPU, &mut |progress| {
                watched.push(progress);
            })
            .unwrap();
            assert_eq!(outline.bytes(), base.bytes(), "{name} {precision}");
            assert_eq!(base.config.shape().base_bytes(precision), base.bytes(), "{name} {precision}");
            assert_eq!(outline.parameters(), base.config.shape().parameters(), "{name} {precision}");
            let is_read = |progress: &LoadProgress| matches!(progress, LoadProgress::Read { .. });
            assert!(watched.iter().all(is_read), "{name}: nothing is quantised that is so already");
            let Some(LoadProgress::Read { bytes, of }) = watched.last() else { panic!("{watched:?}") };
            assert_eq!(bytes, of, "{name}: all of the file is read");
        }
    }
}

const Q: &str = "model.layers.0.self_attn.q_proj.weight";
const STATE: &str = "model.layers.0.self_attn.q_proj.weight.quant_state.bitsandbytes__nf4";

/// A copy of a fixture with its tensors and its configuration changed.
fn changed(name: &str, change: impl Fn(&mut HashMap<String, Tensor>, &mut Value)) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let (mut tensors, mut config) = (tensors(&fixture(name)), json_file(&fixture(name).join("config.json")));
    change(&mut tensors, &mut config);
    candle_core::safetensors::save(&tensors, dir.path().join("model.safetensors")).unwrap();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    dir
}

/// Changes a key of the state of [`Q`].
fn state(tensors: &mut HashMap<String, Tensor>, key: &str, value: Value) {
    let text = tensors[STATE].to_vec1::<u8>().unwrap();
    let mut state: Value = serde_json::from_slice(&text).unwrap();
    state[key] = value;
    let text = state.to_string().into_bytes();
    let count = text.len();
    tensors.insert(STATE.into(), Tensor::from_vec(text, count, &CPU).unwrap());
}

fn part(tensors: &mut HashMap<String, Tensor>, part: &str, tensor: Tensor) {
    tensors.insert(format!("{Q}{part}"), tensor);
}

fn zeros(shape: impl Into<candle_core::Shape>, dtype: DType) -> Tensor {
    Tensor::zeros(shape, dtype, &CPU).unwrap()
}

#[test]
fn what_cannot_be_read_is_named() {
    type Change = fn(&mut HashMap<String, Tensor>, &mut Value);
    let file = format!("model.safetensors: {Q}");
    let cases: [(Change, String); 24] = [
        (
            |t, _| drop(t.remove(&format!("{Q}.absmax"))),
            format!("{file} is quantised, but {Q}.absmax is missing"),
        ),
        (
            |t, _| drop(t.remove(&format!("{Q}.quant_map"))),
            format!("{file} is quantised, but {Q}.quant_map is missing"),
        ),
        (|t, _| drop(t.remove(STATE)), format!("{file} is quantised, but {STATE} is missing")),
        (
            |t, _| drop(t.remove(&format!("{Q}.nested_quant_map"))),
            format!("{file} is quantised, but {Q}.nested_quant_map is missing"),
        ),
        (
            // Without nested magnitudes, those that are there ought to be float32.
            |t, _| {
                t.remove(&format!("{Q}.nested_absmax"));
                state(t, "nested_offset", json!(null));
            },
            format!("{Q}.absmax has 64 elements of type U8, but a matrix of 64 x 64 needs 64 of type F32"),
        ),
        (
            |t, _| drop(t.remove(&format!("{Q}.nested_absmax"))),
            format!("{file} is quantised, but {Q}.nested_absmax is missing"),
        ),
        (
            |t, _| state(t, "nested_offset", json!(null)),
            format!("{file} has nested magnitudes, but {STATE} no nested_offset"),
        ),
        (
            |t, _| state(t, "nested_offset", json!(1e300)),
            format!("{file} has a nested_offset beyond float32"),
        ),
        (
            |t, _| part(t, "", zeros((100, 1), DType::U8)),
            format!("{file} has 100 elements of type U8, but a matrix of 64 x 64 needs 2048 of type U8"),
        ),
        (
            |t, _| part(t, "", zeros((2048, 1), DType::F32)),
            format!("{file} has 2048 elements of type F32, but a matrix of 64 x 64 needs 2048 of type U8"),
        ),
        (
            |t, _| part(t, ".nested_absmax", zeros(9, DType::F32)),
            format!("{file}.nested_absmax has 9 elements of type F32"),
        ),
        (
            |t, _| part(t, ".quant_map", zeros(16, DType::F32)),
            format!("{file}.quant_map has other values than bitsandbytes'"),
        ),
        (|t, _| part(t, ".quant_map", zeros(15, DType::F32)), format!("{file}.quant_map has 15 elements")),
        (
            |t, _| part(t, ".nested_quant_map", zeros(256, DType::F32)),
            format!("{file}.nested_quant_map has other values than bitsandbytes'"),
        ),
        (
            |t, _| state(t, "shape", json!([32, 128])),
            format!("{file} has shape [32, 128], but config.json says [64, 64]"),
        ),
        (
            |t, _| state(t, "shape", json!([1u64 << 40, 1u64 << 40])),
            format!("{file} has shape [1099511627776, 1099511627776], but config.json says [64, 64]"),
        ),
        (|t, _| state(t, "shape", json!([4096])), format!("{STATE} says shape [4096], which is no matrix's")),
        (|t, _| state(t, "shape", json!([-1, 4])), format!("{STATE} is no state of a matrix (invalid value")),
        (|t, _| state(t, "blocksize", json!(128)), format!("{file} has blocksize 128; 64 can be read")),
        (
            |t, _| state(t, "nested_blocksize", json!(64)),
            format!("{file} has nested_blocksize 64; 256 can be read"),
        ),
        (|t, _| state(t, "dtype", json!("int4")), format!("{file} has dtype int4, which cannot be read")),
        (
            |t, _| {
                let parts = ["", ".absmax", ".nested_absmax"];
                let state = t.remove(STATE).unwrap();
                assert!(parts.iter().all(|part| t.contains_key(&format!("{Q}{part}"))));
                t.insert(format!("{Q}.quant_state.bitsandbytes__fp4"), state);
            },
            format!("{file} is in fp4, which cannot be read; nf4 can be"),
        ),
        (
            |t, _| drop(t.insert(Q.replace(".weight", ".SCB"), zeros(64, DType::F32))),
            format!("{file} is in LLM.int8() (it has model.layers.0.self_attn.q_proj.SCB)"),
        ),
        (
            |_, config| drop(config.as_object_mut().unwrap().remove("quantization_config")),
            format!("{Q} is quantised, but config.json has no quantization_config"),
        ),
    ];
    for (change, want) in cases {
        let dir = changed("double", change);
        for precision in [four_bit(true), Precision::default()] {
            let message = Base::outline(dir.path(), precision).unwrap_err().to_string();
            assert!(message.contains(&want), "{message}\nlacks {want}");
        }
    }
}

/// A file that says of itself what it is not, and a trial that asks for what it is not.
#[test]
fn the_trial_the_configuration_and_the_files_agree_on_double_quantisation() {
    for (name, double) in FIXTURES {
        let message = Base::outline(&fixture(name), four_bit(!double)).unwrap_err().to_string();
        let want = format!("was quantised with bnb_4bit_use_double_quant {double}; set it to {double}");
        assert!(message.starts_with("double_quant: is ") && message.ends_with(&want), "{message}");
        let dir = changed(name, |_, config| {
            config["quantization_config"]["bnb_4bit_use_double_quant"] = json!(!double);
        });
        let message = Base::outline(dir.path(), four_bit(double)).unwrap_err().to_string();
        assert!(message.contains("config.json: bnb_4bit_use_double_quant is "), "{message}");
    }
    for (key, value) in [("quant_method", json!("awq")), ("bnb_4bit_quant_type", json!("fp4"))] {
        let dir = changed("double", |_, config| config["quantization_config"][key] = value.clone());
        let message = Base::outline(dir.path(), four_bit(true)).unwrap_err().to_string();
        assert!(message.contains(&format!("config.json: quantization_config: {key} is ")), "{message}");
    }
}

/// Embedding and head that are quantised too are held, and merged, as others are: dequantised.
#[test]
fn a_quantised_embedding_and_head_are_dequantised() {
    for tied in [false, true] {
        let dir = changed("double", |tensors, config| {
            // Some matrix of the files serves as a table of as many rows.
            let parts = tensors.iter().filter(|(name, _)| name.starts_with(Q));
            let parts: Vec<_> = parts.map(|(name, part)| (name.clone(), part.clone())).collect();
            for table in ["lm_head.weight", "model.embed_tokens.weight"].into_iter().skip(usize::from(tied)) {
                tensors.extend(parts.iter().map(|(name, part)| (name.replace(Q, table), part.clone())));
            }
            config["vocab_size"] = json!(64);
            config["tie_word_embeddings"] = json!(tied);
        });
        for precision in [four_bit(true), Precision::default()] {
            let base = Base::load(dir.path(), precision, &CPU).unwrap();
            let want = base.linear(Q.trim_end_matches(".weight")).unwrap().weight.to_float32().unwrap();
            let Weight::Dense(head) = &base.head.weight else { panic!("{precision}: the head is in 4 bits") };
            assert_eq!(difference(head, &want), 0.0, "{precision}");
            assert_eq!(difference(&base.embedding, &want), 0.0, "{precision}");
            assert_eq!(base.config.shape().base_bytes(precision), base.bytes(), "{precision}");
        }
        let (to, at) = (dir.path().join("merged"), dir.path().join("adapter"));
        let mut trained_on = Base::load(dir.path(), four_bit(true), &CPU).unwrap();
        // An adapter of the head unties it.
        trained_on.config.tie_word_embeddings = false;
        let adapter = write_adapter(&at, &trained_on, &["q_proj", "lm_head"]);
        merge(dir.path(), &at, &to, MergeInto::Dequantized { double_quant: true }).unwrap();
        let ids: Vec<u32> = (0..12).map(|i| 5 * i + 2).collect();
        let merged = Base::load(&to, Precision::default(), &CPU).unwrap();
        let got = pack::logits(&merged, None, &ids).unwrap();
        let off = difference(&got, &pack::logits(&trained_on, Some(&adapter), &ids).unwrap());
        assert!(off < 1e-4, "tied: {tied}: {off}");
        let files = Checkpoint::open(&to).unwrap();
        assert!(files.names().all(|name| files.dtype(name).unwrap() == DType::F32), "tied: {tied}");
    }
}

/// Files whose linear layers are quantised but for some, as with `llm_int8_skip_modules`.
#[test]
fn a_layer_that_was_left_out_is_read_but_not_in_four_bits() {
    let dense = |tensors: &mut HashMap<String, Tensor>| {
        let base = Base::load(&fixture("single"), Precision::default(), &CPU).unwrap();
        tensors.retain(|name, _| !name.starts_with(Q));
        tensors.insert(
            Q.into(),
            base.linear(Q.trim_end_matches(".weight")).unwrap().weight.clone().dense().unwrap(),
        );
    };
    let dir = changed("single", |tensors, _| dense(tensors));
    let message = Base::outline(dir.path(), four_bit(false)).unwrap_err().to_string();
    assert!(message.starts_with(&format!("precision_mode: is 4bit, but {Q} is the one that ")), "{message}");
    let ids: Vec<u32> = (0..12).collect();
    let logits =
        |dir: &Path| pack::logits(&Base::load(dir, Precision::default(), &CPU).unwrap(), None, &ids).unwrap();
    assert_eq!(difference(&logits(dir.path()), &logits(&fixture("single"))), 0.0);
    assert!(ModelConfig::load(dir.path()).unwrap().quantization.is_some());
}

fn quantize(model: &Path, to: &Path, double_quant: bool, shard_bytes: u64) -> QuantizedModel {
    let compute_dtype = Some(ComputeDtype::Float32);
    let quantize = Quantize { model, to, double_quant, compute_dtype, shard_bytes, overwrite: false };
    quantize.run(&mut |_, _| false).unwrap().unwrap()
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// What is written is what a 4-bit base is in memory, to the last bit; all else is the model's. Where
/// `LORAFLEET_KEEP_MODELS` names a directory, the models stay there with their logits, for `make.py --load`.
#[test]
fn a_model_that_is_quantised_reads_back_bit_for_bit() {
    let quickstart = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../config/quickstart/base");
    let temporary = tempfile::tempdir().unwrap();
    let kept = std::env::var_os("LORAFLEET_KEEP_MODELS").map(PathBuf::from);
    let dir = kept.as_deref().unwrap_or(temporary.path());
    let mut models = vec![
        ("quickstart", quickstart, SHARD_BYTES),
        ("qwen2", common::family("qwen2").join("base"), SHARD_BYTES),
        ("mistral", common::family("mistral").join("base"), 3000),
    ];
    models.extend(common::shared("data/models/stories260K-hf").map(|dir| ("stories260k", dir, SHARD_BYTES)));
    for (name, model, shard_bytes) in models {
        for double in [false, true] {
            let to = dir.join(format!("{name}-{}", if double { "double" } else { "single" }));
            let written = quantize(&model, &to, double, shard_bytes);
            let want = Base::load(&model, four_bit(double), &CPU).unwrap();
            let got = Base::load(&to, four_bit(double), &CPU).unwrap();
            assert_eq!(written.layers, 7 * want.layers.len(), "{name}");
            for (got, want) in
                got.layers.iter().flat_map(|l| &l.linears).zip(want.layers.iter().flat_map(|l| &l.linears))
            {
                let (Weight::Nf4(a), Weight::Nf4(b)) = (&got.weight, &want.weight) else {
                    panic!("{name}: {} is dense", got.path)
                };
                assert_eq!(a.parts().unwrap(), b.parts().unwrap(), "{name}: {}", got.path);
                assert_eq!(a.magnitudes().unwrap(), b.magnitudes().unwrap(), "{name}: {}", got.path);
            }
            let ids: Vec<u32> = (0..12).map(|i| (7 * i + 3) % 40).collect();
            let logits = pack::logits(&got, None, &ids).unwrap();
            assert_eq!(difference(&logits, &pack::logits(&want, None, &ids).unwrap()), 0.0, "{name}");
            check_files(&model, &to, double, &written, shard_bytes);
            if kept.is_some() {
                let log = json!({ "input_ids": ids, "logits": logits.to_vec2::<f32>().unwrap() });
                std::fs::write(to.join("logits.json"), log.to_string()).unwrap();
            }
        }
    }
}

/// The new directory's configuration and files; every tensor is aligned, as torch wants it.
fn check_files(model: &Path, to: &Path, double: bool, written: &QuantizedModel, shard_bytes: u64) {
    let mut config = json_file(&to.join("config.json"));
    let quantization = config.as_object_mut().unwrap().remove("quantization_config").unwrap();
    assert_eq!(config, json_file(&model.join("config.json")));
    let fixture = json_file(&fixture(if double { "double" } else { "single" }).join("config.json"));
    assert_eq!(quantization, fixture["quantization_config"]);
    let files = names(to);
    let weights: Vec<_> = files.iter().filter(|name| name.ends_with(".safetensors")).collect();
    assert_eq!(weights.len(), written.weight_files);
    assert_eq!(weights.len() == 1, written.bytes <= shard_bytes, "{files:?}");
    for name in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        assert_eq!(std::fs::read(to.join(name)).ok(), std::fs::read(model.join(name)).ok(), "{name}");
    }
    let mut bytes = 0;
    for file in weights {
        let file = std::fs::read(to.join(file)).unwrap();
        let length = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
        let header: Value = serde_json::from_slice(&file[8..8 + length]).unwrap();
        for (name, about) in header.as_object().unwrap() {
            let Some(start) = about["data_offsets"][0].as_u64() else { continue };
            let size = match about["dtype"].as_str().unwrap() {
                "F32" => 4,
                "F16" | "BF16" => 2,
                _ => 1,
            };
            assert_eq!((8 + length as u64 + start) % size, 0, "{name} is not aligned");
            bytes += about["data_offsets"][1].as_u64().unwrap() - start;
        }
    }
    assert_eq!(bytes, written.bytes);
    let checkpoint = Checkpoint::open(to).unwrap();
    assert_eq!(checkpoint.names().map(|name| checkpoint.bytes(name).unwrap()).sum::<u64>(), written.bytes);
}

#[test]
fn what_cannot_be_quantised_is_named_and_nothing_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let (model, to) = (dir.path().join("model"), dir.path().join("models/new"));
    common::write_tiny_model(&model);
    let run = |model: &Path, overwrite, stop_at| {
        let mut asked = 0;
        let (compute_dtype, shard_bytes) = (None, 4000);
        let quantize = Quantize { model, to: &to, double_quant: true, compute_dtype, shard_bytes, overwrite };
        quantize.run(&mut |_, _| {
            asked += 1;
            asked == stop_at
        })
    };
    let refused = |model: &Path, overwrite, want: &str| {
        let message = run(model, overwrite, 0).unwrap_err().to_string();
        assert!(message.contains(want), "{message}\nlacks {want}");
    };
    refused(&fixture("double"), false, "double: is quantised in 4 bits already; ");
    refused(&dir.path().join("none"), false, "none: no such directory");
    assert_eq!(run(&model, false, 15).unwrap(), None, "interrupted");
    assert_eq!(names(&dir.path().join("models")), [""; 0]);
    assert_eq!(run(&model, false, 0).unwrap().unwrap().compute_dtype, ComputeDtype::Float32);
    refused(&model, false, "new: is not empty; ");
    refused(&to, true, "new: holds what the new model is made of");
    assert!(run(&model, true, 0).unwrap().is_some());
    assert_eq!(names(&dir.path().join("models")), ["new"]);
}

/// Writes an adapter of linear layers, all if none is named, whose matrices are all drawn, and gives it back.
fn write_adapter(dir: &Path, base: &Base, names: &[&str]) -> Adapter {
    let named = TargetModules::Names(names.iter().map(ToString::to_string).collect());
    let config = PeftConfig {
        base_model_name_or_path: "base".into(),
        r: 4,
        lora_alpha: 6.0,
        target_modules: if names.is_empty() { TargetModules::default() } else { named },
        ..PeftConfig::default()
    };
    let trainable = resolve(base, &config).unwrap();
    let mut adapter = Adapter::new(base, &trainable, 0.0, 1).unwrap();
    for (number, module) in adapter.modules.iter_mut().enumerate() {
        let key = trainer::rng::key(number as u64, "b");
        let (rows, columns) = module.b.dims2().unwrap();
        let value = |i| (trainer::rng::uniform(key, i) - 0.5) as f32;
        let values: Vec<f32> = (0..(rows * columns) as u64).map(value).collect();
        module.b = Tensor::from_vec(values, (rows, columns), &CPU).unwrap();
    }
    adapter_file::save(dir, &adapter, &config, Outlives::Process).unwrap();
    adapter
}

fn merge(base: &Path, adapter: &Path, to: &Path, into: MergeInto) -> Result<(), trainer::TrainError> {
    let merge = Merge { base, adapter, to, into, shard_bytes: SHARD_BYTES, overwrite: true };
    merge.run(&mut || false).map(|merged| assert!(merged.is_some()))
}

/// What was trained on 4 bits is merged into what these mean, be the files in 4 bits or not.
#[test]
fn a_merged_model_is_the_dequantised_base_and_the_adapter() {
    for (name, base, double) in [
        ("single", fixture("single"), false),
        ("double", fixture("double"), true),
        ("mistral", common::family("mistral").join("base"), false),
        ("qwen2", common::family("qwen2").join("base"), true),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let (to, at) = (dir.path().join("merged"), dir.path().join("adapter"));
        let trained_on = Base::load(&base, four_bit(double), &CPU).unwrap();
        let adapter = write_adapter(&at, &trained_on, &[]);
        let ids: Vec<u32> = (0..12).map(|i| (5 * i + 2) % 40).collect();
        let logits = |dir: &Path| {
            pack::logits(&Base::load(dir, Precision::default(), &CPU).unwrap(), None, &ids).unwrap()
        };
        let want = pack::logits(&trained_on, Some(&adapter), &ids).unwrap();
        let into = MergeInto::Dequantized { double_quant: double };
        merge(&base, &at, &to, into).unwrap();
        let off = difference(&logits(&to), &want);
        println!("{name}: {off:e}");
        assert!(off < 1e-4, "{name}: {off}");
        let config = json_file(&to.join("config.json"));
        assert!(config.get("quantization_config").is_none(), "{name}");
        assert_eq!(MergeInto::of_files(&to).unwrap(), MergeInto::Original, "{name}");
        let merged = Checkpoint::open(&to).unwrap();
        assert!(merged.names().all(|name| merged.dtype(name).unwrap() == DType::F32), "{name}");
        if trained_on.config.quantization.is_some() {
            assert_eq!(MergeInto::of_files(&base).unwrap(), into, "{name}");
            for other in [MergeInto::Original, MergeInto::Dequantized { double_quant: !double }] {
                let message = merge(&base, &at, &to, other).unwrap_err().to_string();
                let want = format!("{name}: is in 4 bits (bnb_4bit_use_double_quant {double}), so that");
                assert!(message.contains(&want), "{message}\nlacks {want}");
            }
            continue;
        }
        assert_eq!(MergeInto::of_files(&base).unwrap(), MergeInto::Original, "{name}");
        // Into the base's own weights it is another model.
        merge(&base, &at, &to, MergeInto::Original).unwrap();
        let dense = Base::load(&base, Precision::default(), &CPU).unwrap();
        assert!(
            difference(&logits(&to), &pack::logits(&dense, Some(&adapter), &ids).unwrap()) < 1e-4,
            "{name}"
        );
        assert!(difference(&logits(&to), &want) > 1e-2, "{name}: 4 bits change nothing");
    }
}
