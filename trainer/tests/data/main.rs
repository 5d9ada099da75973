//! Data files to rows: what may stand in them, what is refused and in which words, which rows are held out.
//! Where the real data are not on the machine, those tests say so and check nothing.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod files;
mod forms;
mod mixed;
mod parquet_files;
mod rows;

use domain::trial::TrialConfig;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;
use trainer::data::Dataset;
use trainer::pack::Row;
use trainer::tokenizer::Tokenizer;

const BOS: u32 = 1;
const EOS: u32 = 2;
/// Rows of the embedding in most tests: more than [`letters`] has tokens.
const VOCAB: usize = 200;

/// A path under the folder of real data and reference figures, if it is on this machine.
fn shared(path: &str) -> Option<PathBuf> {
    let root = std::env::var_os("LORAFLEET_SHARED")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared"), PathBuf::from);
    let path = root.join(path);
    if !path.exists() {
        println!("not checked: {} is not on this machine", path.display());
        return None;
    }
    Some(path)
}

/// A tokenizer with one token a character (ASCII, `é`, `🙂`) and BOS in front. `eos` names EOS or does not.
fn letters(eos: bool) -> Tokenizer {
    letters_with(&if eos { json!({ "eos_token": "</s>" }) } else { json!({}) })
}

/// That tokenizer with these settings; one called after a file becomes that file.
fn letters_with(settings: &Value) -> Tokenizer {
    let mut vocab = json!({"<unk>": 0, "<s>": 1, "</s>": 2});
    for c in (0u8..128).map(char::from).chain(['é', '🙂']) {
        vocab[c.to_string()] = json!(letter(c));
    }
    let special = |id, content| {
        json!({"id": id, "content": content, "special": true, "normalized": false, "single_word": false,
               "lstrip": false, "rstrip": false})
    };
    let bos = json!({"SpecialToken": {"id": "<s>", "type_id": 0}});
    let text = |id| json!({"Sequence": {"id": id, "type_id": 0}});
    let tokenizer = json!({
        "version": "1.0",
        "added_tokens": [special(1, "<s>"), special(2, "</s>")],
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(?s)."}, "behavior": "Isolated", "invert": false},
        "post_processor": {"type": "TemplateProcessing", "single": [bos, text("A")], "pair": [bos, text("A"), text("B")],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    });
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    fs::write(dir.path().join("tokenizer_config.json"), settings.to_string()).unwrap();
    if let Some(template) = settings["chat_template.jinja"].as_str() {
        fs::write(dir.path().join("chat_template.jinja"), template).unwrap();
    }
    Tokenizer::load(dir.path()).unwrap()
}

/// The id of a character of [`letters`].
fn letter(c: char) -> u32 {
    match c {
        'é' => 131,
        '🙂' => 132,
        c => 3 + c as u32,
    }
}

/// BOS, the characters, EOS.
fn ids(text: &str) -> Vec<u32> {
    [BOS].into_iter().chain(text.chars().map(letter)).chain([EOS]).collect()
}

fn directory(files: &[(&str, &[u8])]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    files.iter().for_each(|(name, bytes)| fs::write(dir.path().join(name), bytes).unwrap());
    dir
}

/// All rows for training, in their order.
fn all_of(path: &Path) -> TrialConfig {
    TrialConfig { dataset_name: path.to_str().unwrap().to_owned(), eval_size: 0.0, ..TrialConfig::default() }
}

fn load(config: &TrialConfig) -> trainer::Result<Dataset> {
    Dataset::load(config, Some(&letters(true)), VOCAB, 512)
}

fn input_ids(rows: &[Row]) -> Vec<Vec<u32>> {
    rows.iter().map(|row| row.input_ids.clone()).collect()
}
