//! SentencePiece's `tokenizer.model` (BPE, as Llama has it), read without SentencePiece.
//!
//! The file is a protobuf message: pieces with scores and kinds, how the model was trained, how text is
//! normalised. SentencePiece's BPE joins, again and again, the two neighbours whose joint piece has the highest
//! score. A list of merges says the same if each piece gives one merge for each way to split it into two
//! pieces, by falling score: that is the form in which the `tokenizers` crate takes it.

use super::protobuf::{Fields, Wire};
use crate::error::{Result, TrainError};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::Path;

/// What stands for a space.
const SPACE: &str = "\u{2581}";
const TO_JSON: &str = "save the tokenizer as tokenizer.json (transformers' \
                       AutoTokenizer.from_pretrained(dir).save_pretrained(dir) does) and put it beside this file";

/// `SentencePiece.Type` in SentencePiece's schema.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Normal,
    Unknown,
    Control,
    Byte,
    /// User-defined or unused.
    Other,
}

#[derive(Debug)]
struct Piece {
    text: String,
    score: f32,
    kind: Kind,
}

/// The file's content, as far as tokens depend on it.
#[derive(Debug)]
struct Model {
    pieces: Vec<Piece>,
    bpe: bool,
    byte_fallback: bool,
    whitespace_as_suffix: bool,
    bos: i32,
    eos: i32,
    /// Whether a table of character replacements is applied first.
    character_map: bool,
    add_dummy_prefix: bool,
    remove_extra_whitespaces: bool,
    escape_whitespaces: bool,
}

/// Reads `tokenizer.model`: the tokenizer, and its end-of-sequence id. `add_bos` puts BOS in front of each text,
/// as Llama's tokenizer does; EOS is never added.
pub fn load(path: &Path, add_bos: bool) -> Result<(tokenizers::Tokenizer, Option<u32>)> {
    let bytes = std::fs::read(path).map_err(TrainError::io(path))?;
    let refuse = |problem: String| TrainError::model(path, problem, TO_JSON);
    let model = Model::parse(&bytes).map_err(|problem| {
        TrainError::model(path, format!("is no SentencePiece model: {problem}"), "copy the file again")
    })?;
    model.check().map_err(refuse)?;
    let text = model.tokenizer_json(add_bos).to_string();
    let tokenizer = tokenizers::Tokenizer::from_bytes(text).map_err(|error| refuse(error.to_string()))?;
    Ok((tokenizer, model.special(model.eos)))
}

impl Model {
    /// Field numbers are those of SentencePiece's `sentencepiece_model.proto`; what is missing has the default
    /// that stands there.
    fn parse(bytes: &[u8]) -> std::result::Result<Self, String> {
        let mut model = Self {
            pieces: Vec::new(),
            bpe: false,
            byte_fallback: false,
            whitespace_as_suffix: false,
            bos: 1,
            eos: 2,
            character_map: false,
            add_dummy_prefix: true,
            remove_extra_whitespaces: true,
            escape_whitespaces: true,
        };
        for field in Fields(bytes) {
            match field? {
                (1, Wire::Bytes(piece)) => model.pieces.push(Piece::parse(piece, model.pieces.len())?),
                (2, Wire::Bytes(trainer)) => model.parse_trainer(trainer)?,
                (3, Wire::Bytes(normalizer)) => model.parse_normalizer(normalizer)?,
                _ => {}
            }
        }
        if model.pieces.is_empty() { Err("it holds no pieces".to_owned()) } else { Ok(model) }
    }

    fn parse_trainer(&mut self, bytes: &[u8]) -> std::result::Result<(), String> {
        for field in Fields(bytes) {
            match field? {
                (3, Wire::Varint(kind)) => self.bpe = kind == 2,
                (24, Wire::Varint(yes)) => self.whitespace_as_suffix = yes != 0,
                (35, Wire::Varint(yes)) => self.byte_fallback = yes != 0,
                // Negative ids (no such token) are sign-extended to 64 bits.
                (41, Wire::Varint(id)) => self.bos = id as i32,
                (42, Wire::Varint(id)) => self.eos = id as i32,
                _ => {}
            }
        }
        Ok(())
    }

    fn parse_normalizer(&mut self, bytes: &[u8]) -> std::result::Result<(), String> {
        for field in Fields(bytes) {
            match field? {
                (2, Wire::Bytes(map)) => self.character_map = !map.is_empty(),
                (3, Wire::Varint(yes)) => self.add_dummy_prefix = yes != 0,
                (4, Wire::Varint(yes)) => self.remove_extra_whitespaces = yes != 0,
                (5, Wire::Varint(yes)) => self.escape_whitespaces = yes != 0,
                _ => {}
            }
        }
        Ok(())
    }

    /// Refuses what would give other ids than SentencePiece gives.
    fn check(&self) -> std::result::Result<(), String> {
        for (foreign, what) in [
            (!self.bpe, "is no BPE model"),
            (self.character_map, "replaces characters before it splits (its normaliser is not identity)"),
            (!self.escape_whitespaces, "does not escape spaces"),
            (self.whitespace_as_suffix, "puts the space behind the word"),
            (self.pieces.iter().any(|p| p.kind == Kind::Other), "has user-defined or unused pieces"),
        ] {
            if foreign {
                return Err(format!("{what}, which is not supported in tokenizer.model"));
            }
        }
        Ok(())
    }

    fn special(&self, id: i32) -> Option<u32> {
        let id = u32::try_from(id).ok()?;
        self.pieces.get(id as usize).map(|_| id)
    }

    /// The same tokenizer in Hugging Face's format.
    fn tokenizer_json(&self, add_bos: bool) -> Value {
        let vocab: serde_json::Map<_, _> =
            self.pieces.iter().enumerate().map(|(id, piece)| (piece.text.clone(), json!(id))).collect();
        let unknown = self.pieces.iter().find(|piece| piece.kind == Kind::Unknown).map(|piece| &piece.text);
        let added: Vec<_> = self
            .pieces
            .iter()
            .enumerate()
            .filter(|(_, piece)| matches!(piece.kind, Kind::Unknown | Kind::Control))
            .map(|(id, piece)| {
                json!({"id": id, "content": piece.text, "special": true, "normalized": false,
                       "single_word": false, "lstrip": false, "rstrip": false})
            })
            .collect();
        json!({
            "version": "1.0",
            "added_tokens": added,
            "normalizer": self.normalizer(),
            "post_processor": add_bos.then(|| self.special(self.bos)).flatten().map(|bos| self.bos_in_front(bos)),
            "decoder": self.decoder(),
            "model": {"type": "BPE", "vocab": vocab, "merges": self.merges(), "unk_token": unknown,
                      "fuse_unk": true, "byte_fallback": self.byte_fallback},
        })
    }

    /// Every split of a piece into two pieces, by falling score of the piece.
    fn merges(&self) -> Vec<(&str, &str)> {
        let normal = || self.pieces.iter().enumerate().filter(|(_, piece)| piece.kind == Kind::Normal);
        let ids: HashMap<&str, usize> = normal().map(|(id, piece)| (piece.text.as_str(), id)).collect();
        let mut merges = Vec::new();
        for (id, piece) in normal() {
            for (at, _) in piece.text.char_indices().skip(1) {
                let (left, right) = piece.text.split_at(at);
                if let (Some(l), Some(r)) = (ids.get(left), ids.get(right)) {
                    merges.push((piece.score, id, *l, *r, (left, right)));
                }
            }
        }
        merges.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2, a.3).cmp(&(b.1, b.2, b.3))));
        merges.into_iter().map(|merge| merge.4).collect()
    }

    fn normalizer(&self) -> Value {
        let replace = |pattern: Value, content: &str| json!({"type": "Replace", "pattern": pattern, "content": content});
        let mut steps = Vec::new();
        if self.remove_extra_whitespaces {
            steps.push(replace(json!({"Regex": r"\A +| +\z"}), ""));
            steps.push(replace(json!({"Regex": " {2,}"}), " "));
        }
        if self.add_dummy_prefix {
            steps.push(json!({"type": "Prepend", "prepend": SPACE}));
        }
        steps.push(replace(json!({"String": " "}), SPACE));
        json!({"type": "Sequence", "normalizers": steps})
    }

    fn decoder(&self) -> Value {
        let mut steps = vec![
            json!({"type": "Replace", "pattern": {"String": SPACE}, "content": " "}),
            json!({"type": "ByteFallback"}),
            json!({"type": "Fuse"}),
        ];
        if self.add_dummy_prefix {
            steps.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        }
        json!({"type": "Sequence", "decoders": steps})
    }

    fn bos_in_front(&self, bos: u32) -> Value {
        let piece = &self.pieces[bos as usize].text;
        let special = json!({"SpecialToken": {"id": piece, "type_id": 0}});
        let text = |name: &str| json!({"Sequence": {"id": name, "type_id": 0}});
        json!({"type": "TemplateProcessing",
               "single": [special, text("A")],
               "pair": [special, text("A"), special, text("B")],
               "special_tokens": {piece: {"id": piece, "ids": [bos], "tokens": [piece]}}})
    }
}

impl Piece {
    fn parse(bytes: &[u8], id: usize) -> std::result::Result<Self, String> {
        let mut piece = Self { text: String::new(), score: 0.0, kind: Kind::Normal };
        for field in Fields(bytes) {
            match field? {
                (1, Wire::Bytes(text)) => {
                    let text = std::str::from_utf8(text).map_err(|_| format!("piece {id} is not UTF-8"))?;
                    piece.text = text.to_owned();
                }
                (2, Wire::Float(score)) => piece.score = score,
                (3, Wire::Varint(kind)) => {
                    piece.kind = match kind {
                        1 => Kind::Normal,
                        2 => Kind::Unknown,
                        3 => Kind::Control,
                        6 => Kind::Byte,
                        _ => Kind::Other,
                    }
                }
                _ => {}
            }
        }
        Ok(piece)
    }
}
