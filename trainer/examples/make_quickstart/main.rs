//! Makes the quickstart's base model, its tokenizer and its instruction set: the project's own texts and
//! weights, from a seed.
//!
//! ```sh
//! cargo run --release -p lorafleet-trainer --example make_quickstart               # writes config/quickstart
//! cargo run --release -p lorafleet-trainer --example make_quickstart -- --texts    # instruct.jsonl alone
//! ```
//!
//! | module | holds |
//! |---|---|
//! | [`world`] | the facts that all texts are about |
//! | [`stories`] | what the base is pretrained on |
//! | [`instruct`] | what people fine-tune it on |
//! | [`tokens`], [`pretrain`] | its tokenizer; its full-parameter training |

mod instruct;
mod pretrain;
mod stories;
mod tokens;
mod world;

use candle_core::{DType, Device, Tensor};
use pretrain::{BATCH, LENGTH, Model};
use serde_json::json;
use std::collections::BTreeMap;
use std::error::Error;
use std::path::{Path, PathBuf};
use trainer::model::{Base, ModelConfig};
use trainer::pack;

const SEED: u64 = 1;
/// Documents on which the tokenizer is trained.
const TOKENIZER_DOCUMENTS: u64 = 4000;
/// Documents from this number on are for evaluation alone.
const HELD_OUT: u64 = 1 << 40;

type Outcome<T> = Result<T, Box<dyn Error + Send + Sync>>;

fn main() -> Outcome<()> {
    let mut out = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../config/quickstart"));
    let (mut steps, mut texts_only) = (1000, false);
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        let mut value = || args.next().ok_or_else(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--out" => out = value()?.into(),
            "--steps" => steps = value()?.parse()?,
            "--texts" => texts_only = true,
            _ => return Err(format!("unknown flag {arg}; known: --out DIR, --steps N, --texts").into()),
        }
    }
    let base = out.join("base");
    std::fs::create_dir_all(&base)?;
    let rows = instruct::rows(instruct::SEED);
    let lines: String = rows.iter().map(|text| format!("{}\n", json!({ "text": text }))).collect();
    std::fs::write(out.join("instruct.jsonl"), lines)?;
    println!("{} rows in {}", rows.len(), out.join("instruct.jsonl").display());
    if texts_only {
        return Ok(());
    }
    make_base(&base, steps)?;
    show(&base, &rows)
}

fn config() -> serde_json::Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": tokens::VOCAB,
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 16,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": true,
        "attention_bias": false,
        "mlp_bias": false,
        "bos_token_id": tokens::BOS,
        "eos_token_id": tokens::EOS,
        "torch_dtype": "float16",
    })
}

fn make_base(dir: &Path, steps: usize) -> Outcome<()> {
    let tokenizer = tokens::train((0..TOKENIZER_DOCUMENTS).map(|i| stories::document(SEED, i)))?;
    tokenizer.save(dir.join("tokenizer.json"), false)?;
    write_json(
        &dir.join("tokenizer_config.json"),
        &json!({
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "model_max_length": 512,
        }),
    )?;
    let config = config();
    write_json(&dir.join("config.json"), &config)?;
    let shape = ModelConfig::parse(&config.to_string()).map_err(|(problem, _)| problem)?;
    let model = Model::new(shape, SEED)?;

    let mut next = 0;
    model.train(steps, |_| {
        let ids = batch(&tokenizer, &mut next).map_err(|e| candle_core::Error::Msg(e.to_string()))?;
        Ok(ids)
    })?;
    let mut next = HELD_OUT;
    let held_out = model.loss(&batch(&tokenizer, &mut next)?)?.to_scalar::<f32>()?;
    println!("held-out loss {held_out:.4} after {steps} steps on {} documents", next - HELD_OUT);
    save(&dir.join("model.safetensors"), &model.halves()?)
}

/// [`BATCH`] windows of `LENGTH + 1` tokens. A window begins with a document; others follow, each with BOS
/// and EOS, and the last is cut.
fn batch(tokenizer: &tokenizers::Tokenizer, next: &mut u64) -> Outcome<Vec<u32>> {
    let mut ids = Vec::with_capacity(BATCH * (LENGTH + 1));
    for window in 1..=BATCH {
        let end = window * (LENGTH + 1);
        while ids.len() < end {
            ids.extend(tokenizer.encode(stories::document(SEED, *next), true)?.get_ids());
            ids.push(tokens::EOS);
            *next += 1;
        }
        ids.truncate(end);
    }
    Ok(ids)
}

fn write_json(path: &Path, value: &serde_json::Value) -> Outcome<()> {
    Ok(std::fs::write(path, format!("{value:#}\n"))?)
}

/// A safetensors file with the `format` entry that transformers asks for, float16 alone.
fn save(path: &Path, tensors: &BTreeMap<String, Tensor>) -> Outcome<()> {
    let mut header = serde_json::Map::from_iter([("__metadata__".to_string(), json!({ "format": "pt" }))]);
    let mut data: Vec<u8> = Vec::new();
    for (name, tensor) in tensors {
        let start = data.len();
        tensor.to_dtype(DType::F16)?.write_bytes(&mut data)?;
        let entry = json!({ "dtype": "F16", "shape": tensor.dims(), "data_offsets": [start, data.len()] });
        header.insert(name.clone(), entry);
    }
    let mut header = serde_json::Value::Object(header).to_string();
    header += &" ".repeat(header.len().next_multiple_of(8) - header.len());
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(data);
    println!("{} bytes in {}", file.len(), path.display());
    Ok(std::fs::write(path, file)?)
}

/// What the saved base says to a few of the instruction set's prompts.
fn show(dir: &Path, rows: &[String]) -> Outcome<()> {
    let base = Base::load(dir, domain::trial::Precision::default(), &Device::Cpu)?;
    let tokenizer = tokenizers::Tokenizer::from_file(dir.join("tokenizer.json"))?;
    for row in rows.iter().take(8) {
        let Some((question, _)) = row.split_once("### Assistant:") else { continue };
        let prompt = format!("{question}### Assistant:");
        let ids = tokenizer.encode(prompt.as_str(), true)?;
        let said = pack::generate(&base, None, ids.get_ids(), 40, Some(tokens::EOS))?;
        println!("{prompt}|{}", tokenizer.decode(&said, true)?);
    }
    Ok(())
}
