//! What several tests need: the folder of reference figures, and a model and data small enough to make here.
//! The command's tests include this file too.

#![allow(dead_code, reason = "each test uses its part")]

use domain::trial::Precision;
use domain::trial::TrialConfig;
use serde_json::{Map, Value, json};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use trainer::model::{Base, ModelConfig};
use trainer::quant::{CODE, Nf4};
use trainer::{Device, Tensor, rng};

pub const CPU: Device = Device::Cpu;

/// The device that the engine's tests run on: `LORAFLEET_TEST_DEVICE`, by default the CPU.
pub fn device() -> &'static Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    DEVICE.get_or_init(|| {
        let name = std::env::var("LORAFLEET_TEST_DEVICE").unwrap_or_else(|_| "cpu".into());
        trainer::device::open(&name).unwrap()
    })
}

/// A path under the folder of reference figures, if they are on this machine.
pub fn shared(path: &str) -> Option<PathBuf> {
    let root = std::env::var_os("LORAFLEET_SHARED")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared"), PathBuf::from);
    let path = root.join(path);
    if !path.exists() {
        println!("not checked: {} is not on this machine", path.display());
        return None;
    }
    Some(path)
}

/// The tiny models of Llama's kin that `fixtures/families/make.py` made.
pub const FAMILIES: [&str; 4] = ["qwen2", "qwen2_windows", "qwen3", "mistral"];

/// The folder of one of them.
pub fn family(name: &str) -> PathBuf {
    fixture("families").join(name)
}

/// A path under this crate's fixtures: `LORAFLEET_FIXTURES` says where they are on a machine that did not build the tests.
pub fn fixture(path: &str) -> PathBuf {
    let built = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    std::env::var_os("LORAFLEET_FIXTURES").map_or_else(built, PathBuf::from).join(path)
}

pub fn json_file(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// The shape of the tiny model: two query heads a key-value head, a head of its own.
pub fn tiny_shape() -> Value {
    json!({
        "model_type": "llama", "hidden_act": "silu", "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 40,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": false,
    })
}

/// Writes a model directory without a tokenizer, its weights drawn from a fixed stream.
pub fn write_tiny_model(dir: &Path) {
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("config.json"), tiny_shape().to_string()).unwrap();
    let config = ModelConfig::load(dir).unwrap();
    let (h, f, v) = (config.hidden_size, config.intermediate_size, config.vocab_size);
    let kv = config.num_key_value_heads * config.head_dim;
    let mut shapes = vec![
        ("model.embed_tokens.weight".to_string(), vec![v, h]),
        ("model.norm.weight".into(), vec![h]),
        ("lm_head.weight".into(), vec![v, h]),
    ];
    for i in 0..config.num_hidden_layers {
        let layer = [
            ("self_attn.q_proj", vec![h, h]),
            ("self_attn.k_proj", vec![kv, h]),
            ("self_attn.v_proj", vec![kv, h]),
            ("self_attn.o_proj", vec![h, h]),
            ("mlp.gate_proj", vec![f, h]),
            ("mlp.up_proj", vec![f, h]),
            ("mlp.down_proj", vec![h, f]),
            ("input_layernorm", vec![h]),
            ("post_attention_layernorm", vec![h]),
        ];
        shapes.extend(layer.map(|(name, shape)| (format!("model.layers.{i}.{name}.weight"), shape)));
    }
    // A safetensors file: the header's length, the header, the numbers.
    let (mut header, mut numbers) = (Map::new(), Vec::new());
    for (name, shape) in shapes {
        let (middle, spread) = if name.contains("norm") { (1.0, 0.2) } else { (0.0, 0.6) };
        let (key, start) = (rng::key(1, &name), numbers.len());
        for i in 0..shape.iter().product::<usize>() as u64 {
            let value = (middle + spread * (rng::uniform(key, i) - 0.5)) as f32;
            numbers.extend(value.to_le_bytes());
        }
        let about = json!({ "dtype": "F32", "shape": shape, "data_offsets": [start, numbers.len()] });
        header.insert(name, about);
    }
    let header = Value::Object(header).to_string();
    let file = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &numbers].concat();
    std::fs::write(dir.join("model.safetensors"), file).unwrap();
}

/// Adds a tokenizer of the words `w2`, `w3`, … to a model directory: `ids` token ids, `</s>` the EOS.
pub fn write_tokenizer(dir: &Path, ids: u64) {
    let mut words: Map<String, Value> = (2..ids).map(|i| (format!("w{i}"), json!(i))).collect();
    words.extend([("<unk>".to_string(), json!(0)), ("</s>".to_string(), json!(1))]);
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
        "added_tokens": [], "decoder": null, "pre_tokenizer": { "type": "WhitespaceSplit" },
        "model": { "type": "WordLevel", "vocab": words, "unk_token": "<unk>" },
    });
    std::fs::write(dir.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    std::fs::write(dir.join("tokenizer_config.json"), r#"{"eos_token": "</s>"}"#).unwrap();
}

/// `rows` rows of text for that tokenizer.
pub fn write_texts(file: &Path, rows: u64) {
    let row = |r: u64| {
        let word = |i: u64| format!("w{} ", 2 + rng::bits(3, 100 * r + i) % 38);
        let text: String = (0..8 + r % 5).map(word).collect();
        json!({ "text": format!("### Human: w5 w6 ### Assistant: {}", text.trim()) }).to_string() + "\n"
    };
    std::fs::write(file, (0..rows).map(row).collect::<String>()).unwrap();
}

/// What bitsandbytes 0.50.2 dequantises on a CPU where that differs from what it quantised: in a matrix whose rows
/// are a multiple of 16 but not of 64 elements long it takes magnitudes as if each row had ⌊columns / 64⌋ of its own.
/// Such numbers are further from the weights than NF4 allows. The reference's QLoRA runs have one such layer.
pub fn bitsandbytes_on_a_cpu(matrix: &Nf4) -> Option<Tensor> {
    let [rows, columns] = matrix.dims();
    if columns % 64 == 0 || columns % 16 != 0 {
        return None;
    }
    let matrix = matrix.to_device(&CPU).unwrap();
    let (codes, magnitudes) = (matrix.parts().unwrap().0, matrix.magnitudes().unwrap());
    let value = |i: usize| {
        let code = if i.is_multiple_of(2) { codes[i / 2] >> 4 } else { codes[i / 2] & 15 };
        CODE[usize::from(code)] * magnitudes[i / columns * (columns / 64) + i % columns / 64]
    };
    let values: Vec<f32> = (0..rows * columns).map(value).collect();
    Some(Tensor::from_vec(values, (rows, columns), &CPU).unwrap())
}

/// The tiny model, loaded.
pub fn tiny_base() -> Base {
    let dir = tempfile::tempdir().unwrap();
    write_tiny_model(dir.path());
    Base::load(dir.path(), Precision::default(), device()).unwrap()
}

/// `rows` pre-tokenised rows of 6 to 13 tokens, of which some runs are not predicted.
pub fn write_rows(file: &Path, rows: u64) {
    let key = rng::key(2, "rows");
    let row = |r: u64| {
        let at = |i: u64| rng::bits(key, 100 * r + i);
        let ids: Vec<u64> = (0..6 + at(99) % 8).map(|i| at(i) % 40).collect();
        let labels: Vec<i64> =
            ids.iter().enumerate().map(|(i, id)| if i < 3 { -100 } else { *id as i64 }).collect();
        json!({ "input_ids": ids, "labels": labels }).to_string() + "\n"
    };
    std::fs::write(file, (0..rows).map(row).collect::<String>()).unwrap();
}

/// A model directory, 30 rows, and a configuration that trains the one on the other with everything on that
/// a resumed run has to bring back: dropout, row order, accumulation, decay, a schedule.
pub fn tiny_run(dir: &Path) -> TrialConfig {
    write_tiny_model(&dir.join("model"));
    write_rows(&dir.join("rows.jsonl"), 30);
    TrialConfig {
        pretrained_model_id: dir.join("model").display().to_string(),
        dataset_name: dir.join("rows.jsonl").display().to_string(),
        eval_size: 6.0,
        lora_rank: 4,
        lora_dropout: 0.2,
        gradient_accumulation_steps: 2,
        max_sequence_length: 16,
        learning_rate: 1e-2,
        warmup_steps: 3,
        weight_decay: 0.1,
        max_steps: Some(20),
        ..TrialConfig::default()
    }
}

/// All weights of an adapter, in order.
pub fn flat(adapter: &trainer::lora::Adapter) -> Vec<f32> {
    adapter.named().flat_map(|(_, _, t)| t.flatten_all().unwrap().to_vec1::<f32>().unwrap()).collect()
}
