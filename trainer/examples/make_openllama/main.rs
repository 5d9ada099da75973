//! Makes a model directory of OpenLLaMA 7B's shapes and file layout, of random values: `config.json` without
//! `num_key_value_heads` and `rope_theta`, two pickled shards in float16 with an index, and the float32 `inv_freq`
//! buffers that nobody needs. With it goes a file of rows, as token ids.
//!
//! ```text
//! cargo run --release --example make_openllama -- DIR [LAYERS]
//! ```
//!
//! 13.5 GB for the 32 layers of the real one.

#![allow(clippy::print_stdout, reason = "a program of its own")]

mod pickle;

use domain::rng;
use half::f16;
use pickle::{Archive, Entry, Values};
use rayon::prelude::*;
use serde_json::{Map, Value, json};
use std::path::Path;

const VOCAB: usize = 32_000;
const HIDDEN: usize = 4096;
const INTERMEDIATE: usize = 11_008;
const HEADS: usize = 32;

/// Bytes of a shard at most, as the hub's tools write them.
const SHARD_BYTES: usize = 10_000_000_000;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let Some(dir) = arguments.next() else { return Err("give a directory to make".into()) };
    let layers: usize = arguments.next().map_or(Ok(32), |text| text.parse())?;
    let dir = Path::new(&dir);
    std::fs::create_dir_all(dir)?;
    std::fs::write(dir.join("config.json"), format!("{:#}", config(layers)))?;
    std::fs::write(dir.join("rows.jsonl"), rows())?;
    let shards = shards(layers);
    let (mut places, mut total) = (Map::new(), 0);
    for (index, entries) in shards.iter().enumerate() {
        let name = format!("pytorch_model-{:05}-of-{:05}.bin", index + 1, shards.len());
        println!("{name}: {} tensors", entries.len());
        let mut archive = Archive::create(&dir.join(&name), entries)?;
        for entry in entries {
            archive.write(&values(entry))?;
            places.insert(entry.name.clone(), json!(name));
            total += entry.bytes();
        }
        archive.finish()?;
    }
    let index = json!({ "metadata": { "total_size": total }, "weight_map": places });
    std::fs::write(dir.join("pytorch_model.bin.index.json"), format!("{index:#}"))?;
    Ok(())
}

fn config(layers: usize) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": INTERMEDIATE,
        "max_position_embeddings": 2048,
        "model_type": "llama",
        "num_attention_heads": HEADS,
        "num_hidden_layers": layers,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": false,
        "torch_dtype": "float16",
        "use_cache": true,
        "vocab_size": VOCAB,
    })
}

/// Rows of 128 token ids.
fn rows() -> String {
    let key = rng::key(1, "rows");
    let row = |r: u64| {
        let ids: Vec<u64> = (0..128).map(|i| rng::bits(key, 128 * r + i) % VOCAB as u64).collect();
        json!({ "input_ids": ids }).to_string() + "\n"
    };
    (0..8).map(row).collect()
}

/// The model's tensors in the order of the published files, in shards.
fn shards(layers: usize) -> Vec<Vec<Entry>> {
    let mut entries = vec![Entry::half("model.embed_tokens.weight", &[VOCAB, HIDDEN])];
    for layer in 0..layers {
        for (name, shape) in [
            ("self_attn.q_proj", [HIDDEN, HIDDEN]),
            ("self_attn.k_proj", [HIDDEN, HIDDEN]),
            ("self_attn.v_proj", [HIDDEN, HIDDEN]),
            ("self_attn.o_proj", [HIDDEN, HIDDEN]),
            ("mlp.gate_proj", [INTERMEDIATE, HIDDEN]),
            ("mlp.down_proj", [HIDDEN, INTERMEDIATE]),
            ("mlp.up_proj", [INTERMEDIATE, HIDDEN]),
        ] {
            entries.push(Entry::half(&format!("model.layers.{layer}.{name}.weight"), &shape));
        }
        for name in ["input_layernorm", "post_attention_layernorm"] {
            entries.push(Entry::half(&format!("model.layers.{layer}.{name}.weight"), &[HIDDEN]));
        }
        entries.push(Entry {
            half: false,
            ..Entry::half(
                &format!("model.layers.{layer}.self_attn.rotary_emb.inv_freq"),
                &[HIDDEN / HEADS / 2],
            )
        });
    }
    entries.push(Entry::half("model.norm.weight", &[HIDDEN]));
    entries.push(Entry::half("lm_head.weight", &[VOCAB, HIDDEN]));
    let mut shards: Vec<Vec<Entry>> = vec![Vec::new()];
    let mut room = SHARD_BYTES;
    for entry in entries {
        if entry.bytes() > room {
            shards.push(Vec::new());
            room = SHARD_BYTES;
        }
        room -= entry.bytes();
        if let Some(shard) = shards.last_mut() {
            shard.push(entry);
        }
    }
    shards
}

/// A tensor's values: norms near 1, matrices of a standard deviation near 0.02.
fn values(entry: &Entry) -> Values {
    let count: usize = entry.shape.iter().product();
    let key = rng::key(2, &entry.name);
    if !entry.half {
        let frequency = |i: usize| 10_000f32.powf(-(i as f32) / count as f32);
        return Values::Float((0..count).map(frequency).collect());
    }
    let (middle, spread) = if entry.shape.len() == 1 { (1.0, 0.2) } else { (0.0, 0.07) };
    let value = |i: usize| {
        // Four numbers of 16 bits from each of the stream's.
        let bits = rng::bits(key, i as u64 / 4) >> (16 * (i % 4)) & 0xffff;
        f16::from_f32(middle + spread * (bits as f32 / 65_536.0 - 0.5))
    };
    Values::Half((0..count).into_par_iter().map(value).collect())
}
