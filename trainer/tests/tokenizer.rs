//! Tokenizers: `tokenizer.json` and `tokenizer.model` of one directory agree on real text; what cannot be read is
//! refused in words. Where the real models are not on the machine, those tests say so and check nothing.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use tempfile::TempDir;
use trainer::tokenizer::Tokenizer;

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

/// The texts of all instruction rows.
fn texts(instruct: &Path) -> Vec<String> {
    let mut texts = Vec::new();
    for file in fs::read_dir(instruct).unwrap() {
        for line in fs::read_to_string(file.unwrap().path()).unwrap().lines() {
            let row: Value = serde_json::from_str(line).unwrap();
            texts.push(row["text"].as_str().unwrap().to_owned());
        }
    }
    texts
}

/// The directory's tokenizer without its `tokenizer.json`.
fn from_pieces(dir: &Path) -> (TempDir, Tokenizer) {
    let copy = tempfile::tempdir().unwrap();
    for name in ["tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"] {
        fs::copy(dir.join(name), copy.path().join(name)).unwrap();
    }
    let tokenizer = Tokenizer::load(copy.path()).unwrap();
    (copy, tokenizer)
}

#[test]
fn both_files_give_the_same_tokens() {
    let Some(data) = shared("data") else { return };
    let mut texts = texts(&data.join("instruct"));
    assert_eq!(texts.len(), 1157);
    let awkward = [
        "",
        " ",
        "   ",
        "a",
        " a  b ",
        "\n",
        "\t\t x",
        "a\u{a0}b",
        "\u{2581}a \u{2581}",
        "🙂🙂é€",
        "</s>",
        "x</s>y",
    ];
    texts.extend(awkward.map(str::to_owned));
    texts.extend(
        ["aaaaaaaaa", "======-----=", "  \n   \n    x", "0000000.000", "\u{0}\u{7f}"].map(str::to_owned),
    );
    for model in ["stories260K-hf", "llama2-tokenizer"] {
        let dir = data.join("models").join(model);
        let json = Tokenizer::load(&dir).unwrap();
        let (_copy, pieces) = from_pieces(&dir);
        assert_eq!((json.eos(), json.vocab_size()), (pieces.eos(), pieces.vocab_size()));
        assert_eq!(json.eos(), Some(2));
        assert_ne!(json.digest(), pieces.digest());
        for text in &texts {
            let (a, b) = (json.encode(text).unwrap(), pieces.encode(text).unwrap());
            assert_eq!(a, b, "{model}: {text}");
            assert_eq!(a.ids[0], 1);
            assert_eq!(json.decode(&a.ids).unwrap(), pieces.decode(&b.ids).unwrap(), "{model}: {text}");
        }
        println!("{model}: {} texts equal", texts.len());
    }
}

#[test]
fn what_is_decoded_is_what_was_encoded() {
    let Some(data) = shared("data") else { return };
    let llama = Tokenizer::load(&data.join("models/llama2-tokenizer")).unwrap();
    for text in texts(&data.join("instruct")) {
        let encoding = llama.encode(&text).unwrap();
        assert_eq!(llama.decode(&encoding.ids).unwrap(), text);
        assert!(encoding.starts.is_sorted(), "{text}");
        assert!(*encoding.starts.last().unwrap() < text.chars().count());
    }
}

/// As much of a protobuf writer as makes a `tokenizer.model`.
#[derive(Default)]
struct Message(Vec<u8>);

impl Message {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn number(mut self, field: u64, value: i64) -> Self {
        self.varint(field << 3);
        self.varint(value as u64);
        self
    }

    fn float(mut self, field: u64, value: f32) -> Self {
        self.varint(field << 3 | 5);
        self.0.extend(value.to_le_bytes());
        self
    }

    fn bytes(mut self, field: u64, value: &[u8]) -> Self {
        self.varint(field << 3 | 2);
        self.varint(value.len() as u64);
        self.0.extend(value);
        self
    }
}

const NORMAL: i64 = 1;
const CONTROL: i64 = 3;
const BPE: i64 = 2;

/// A model of `pieces` (text, kind; scores fall by id) behind `<unk>`, `<s>`, `</s>`.
fn pieces(pieces: &[(&str, i64)], trainer: Message, normalizer: Message) -> Vec<u8> {
    let specials = [("<unk>", 2), ("<s>", CONTROL), ("</s>", CONTROL)];
    let mut model = Message::default();
    for (id, (text, kind)) in specials.iter().chain(pieces).enumerate() {
        let piece = Message::default().bytes(1, text.as_bytes()).float(2, -(id as f32)).number(3, *kind);
        model = model.bytes(1, &piece.0);
    }
    model.bytes(2, &trainer.0).bytes(3, &normalizer.0).0
}

fn directory(files: &[(&str, &[u8])]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    files.iter().for_each(|(name, bytes)| fs::write(dir.path().join(name), bytes).unwrap());
    dir
}

/// Scores fall in this order: `▁ab` can only be had as `▁a` + `b`, which has the higher score than `ab`.
const SMALL: [(&str, i64); 7] = [
    ("\u{2581}a", NORMAL),
    ("ab", NORMAL),
    ("\u{2581}ab", NORMAL),
    ("\u{2581}", NORMAL),
    ("a", NORMAL),
    ("b", NORMAL),
    ("c", NORMAL),
];

#[test]
fn small_sentencepiece_models() {
    let bytes: Vec<String> = (0..256).map(|byte| format!("<0x{byte:02X}>")).collect();
    let fallback: Vec<_> = SMALL.into_iter().chain(bytes.iter().map(|piece| (piece.as_str(), 6))).collect();
    let bpe = || Message::default().number(3, BPE);
    let untouched = || Message::default().number(3, 0).number(4, 0);
    let defaults = Message::default;
    let no_bos = br#"{"add_bos_token": false}"#;
    type Row<'a> = (&'a [(&'a str, i64)], Message, Message, &'a [u8], &'a str, Vec<u32>, Vec<usize>);
    let rows: Vec<Row> = vec![
        // By default: trimmed, runs of spaces collapsed, a space in front.
        (&SMALL, bpe(), defaults(), b"{}", "ab", vec![1, 5], vec![0, 0]),
        (&SMALL, bpe(), defaults(), b"{}", "  ab  cab ", vec![1, 5, 6, 9, 4], vec![0, 2, 5, 6, 7]),
        (&SMALL, bpe(), defaults(), b"{}", "   ", vec![1], vec![0]),
        (&SMALL, bpe(), untouched(), b"{}", " ab  a", vec![1, 5, 6, 3], vec![0, 0, 3, 4]),
        (&SMALL, bpe(), untouched(), no_bos, "cab", vec![9, 4], vec![0, 1]),
        // Without byte pieces, neighbouring unknown characters are one <unk>.
        (&SMALL, bpe(), defaults(), b"{}", "xyc", vec![1, 6, 0, 9], vec![0, 0, 0, 2]),
        (
            &fallback,
            bpe().number(35, 1),
            defaults(),
            b"{}",
            "é",
            vec![1, 6, 10 + 0xc3, 10 + 0xa9],
            vec![0, 0, 0, 0],
        ),
        (&SMALL, bpe().number(41, -1), defaults(), b"{}", "ab", vec![5], vec![0]),
    ];
    for (list, trainer, normalizer, config, text, ids, starts) in rows {
        let model = pieces(list, trainer, normalizer);
        let dir = directory(&[("tokenizer.model", &model), ("tokenizer_config.json", config)]);
        let tokenizer = Tokenizer::load(dir.path()).unwrap();
        let encoding = tokenizer.encode(text).unwrap();
        assert_eq!(encoding.ids, ids, "{text:?}");
        assert_eq!(encoding.starts, starts, "{text:?}");
        assert_eq!(tokenizer.eos(), Some(2));
        assert_eq!(tokenizer.vocab_size(), list.len() + 3);
    }
}

#[test]
fn what_cannot_be_read_is_refused() {
    let bpe = || Message::default().number(3, BPE);
    let model = |trainer, normalizer| pieces(&SMALL, trainer, normalizer);
    let good = model(bpe(), Message::default());
    let user_defined = pieces(&[("<|x|>", 4)], bpe(), Message::default());
    let rows: [(&str, Vec<u8>, &str, &str); 10] = [
        ("other", vec![], "holds neither tokenizer.json nor tokenizer.model", "copy one of them there"),
        ("tokenizer.json", b"{".to_vec(), "tokenizer.json: is no tokenizer", "copy the file again"),
        ("tokenizer.json", b"{\"a\": 1}".to_vec(), "tokenizer.json: is no tokenizer", "copy the file again"),
        (
            "tokenizer.model",
            vec![],
            "tokenizer.model: is no SentencePiece model: it holds no pieces",
            "copy the file",
        ),
        ("tokenizer.model", good[..good.len() - 1].to_vec(), "ends inside a field", "copy the file again"),
        (
            "tokenizer.model",
            model(Message::default(), Message::default()),
            "is no BPE model",
            "tokenizer.json",
        ),
        (
            "tokenizer.model",
            model(bpe(), Message::default().bytes(2, b"map")),
            "not identity",
            "tokenizer.json",
        ),
        (
            "tokenizer.model",
            model(bpe(), Message::default().number(5, 0)),
            "does not escape spaces",
            "tokenizer.json",
        ),
        (
            "tokenizer.model",
            model(bpe().number(24, 1), Message::default()),
            "behind the word",
            "tokenizer.json",
        ),
        ("tokenizer.model", user_defined, "user-defined or unused pieces", "tokenizer.json"),
    ];
    for (name, bytes, problem, remedy) in rows {
        let dir = directory(&[(name, &bytes)]);
        let error = Tokenizer::load(dir.path()).unwrap_err().to_string();
        assert!(error.starts_with(dir.path().to_str().unwrap()), "{error}");
        assert!(error.contains(problem) && error.contains(remedy), "{error}");
    }
}

/// A tokenizer.json of single characters, with truncation and padding that training must not use.
fn characters() -> Value {
    let vocab = json!({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4, "é": 5});
    let special = |id, content| {
        json!({"id": id, "content": content, "special": true, "normalized": false, "single_word": false,
               "lstrip": false, "rstrip": false})
    };
    json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
                    "pad_type_id": 0, "pad_token": "<unk>"},
        "added_tokens": [special(1, "<s>"), special(2, "</s>")],
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": false},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                       {"SpecialToken": {"id": "</s>", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]},
                               "</s>": {"id": "</s>", "ids": [2], "tokens": ["</s>"]}}},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
    })
}

#[test]
fn starts_are_characters_and_nothing_is_cut_or_padded() {
    let dir = directory(&[("tokenizer.json", characters().to_string().as_bytes())]);
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    let encoding = tokenizer.encode("éaéb").unwrap();
    assert_eq!(encoding.ids, [1, 5, 3, 5, 4, 2]);
    assert_eq!(encoding.starts, [0, 0, 1, 2, 3, 4]);
    assert_eq!(tokenizer.vocab_size(), 6);
    assert_eq!(tokenizer.piece(5).as_deref(), Some("é"));
}

#[test]
fn the_first_eos_that_resolves() {
    type Files<'a> = &'a [(&'a str, &'a str)];
    let rows: [(Files, Option<u32>); 9] = [
        (&[], None),
        (
            &[
                ("tokenizer_config.json", r#"{"eos_token": "</s>"}"#),
                ("config.json", r#"{"eos_token_id": 3}"#),
            ],
            Some(2),
        ),
        (&[("tokenizer_config.json", r#"{"eos_token": {"content": "b"}}"#)], Some(4)),
        (
            &[
                ("tokenizer_config.json", r#"{"eos_token": null}"#),
                ("special_tokens_map.json", r#"{"eos_token": "a"}"#),
            ],
            Some(3),
        ),
        (
            &[
                ("tokenizer_config.json", r#"{"eos_token": "nowhere"}"#),
                ("config.json", r#"{"eos_token_id": 2}"#),
            ],
            Some(2),
        ),
        (
            &[
                ("generation_config.json", r#"{"eos_token_id": [4, 2]}"#),
                ("config.json", r#"{"eos_token_id": 2}"#),
            ],
            Some(4),
        ),
        (
            &[
                ("generation_config.json", r#"{"eos_token_id": 99}"#),
                ("config.json", r#"{"eos_token_id": 3}"#),
            ],
            Some(3),
        ),
        (&[("config.json", r#"{"eos_token_id": -1}"#)], None),
        (&[("config.json", "{}")], None),
    ];
    let json = characters().to_string();
    for (files, want) in rows {
        let dir = directory(&[("tokenizer.json", json.as_bytes())]);
        files.iter().for_each(|(name, text)| fs::write(dir.path().join(name), text).unwrap());
        assert_eq!(Tokenizer::load(dir.path()).unwrap().eos(), want, "{files:?}");
    }
    // Each of a list ends what is generated, and the tokenizer's own too.
    let dir = directory(&[
        ("tokenizer.json", json.as_bytes()),
        ("tokenizer_config.json", br#"{"eos_token": "</s>"}"#),
        ("generation_config.json", br#"{"eos_token_id": [4, 99, 3]}"#),
        ("config.json", br#"{"eos_token_id": 1}"#),
    ]);
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    assert_eq!((tokenizer.eos(), tokenizer.ends()), (Some(2), &[4, 3, 2][..]));
    let dir = directory(&[("tokenizer.json", json.as_bytes()), ("tokenizer_config.json", b"{")]);
    let error = Tokenizer::load(dir.path()).unwrap_err().to_string();
    assert!(error.contains("tokenizer_config.json: is no JSON"), "{error}");
}

#[test]
fn a_damaged_sentencepiece_model_brings_nothing_down() {
    let good = pieces(&SMALL, Message::default().number(3, BPE), Message::default());
    let load = |bytes: &[u8]| {
        let dir = directory(&[("tokenizer.model", bytes)]);
        Tokenizer::load(dir.path()).map(|tokenizer| tokenizer.encode(" ab  cé").map(|encoding| encoding.ids))
    };
    for at in 0..good.len() {
        let _ = load(&good[..at]);
        for flip in [0xff, 0x01, 0x04, 0x10] {
            let mut bytes = good.clone();
            bytes[at] ^= flip;
            if let Err(error) = load(&bytes) {
                assert!(error.to_string().contains("tokenizer.model: "), "{error}");
            }
        }
    }
}

/// OpenLLaMA's own file, if `LORAFLEET_OPENLLAMA_TOKENIZER` says where it is: the ids that its users report.
#[test]
fn openllamas_ids() {
    let Some(file) = std::env::var_os("LORAFLEET_OPENLLAMA_TOKENIZER") else {
        println!("not checked: LORAFLEET_OPENLLAMA_TOKENIZER names no tokenizer.model");
        return;
    };
    let dir = directory(&[("tokenizer.model", &fs::read(file).unwrap())]);
    let tokenizer = Tokenizer::load(dir.path()).unwrap();
    for (text, want) in [
        ("hello world", vec![1, 27701, 924]),
        ("hello\nworld", vec![1, 27701, 13, 7904]),
        ("a    b", vec![1, 260, 284]),
    ] {
        assert_eq!(tokenizer.encode(text).unwrap().ids, want, "{text:?}");
    }
}
