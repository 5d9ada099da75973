//! A model's tokenizer: text to token ids and back. It is read from `tokenizer.json` (Hugging Face's format) or,
//! where there is none, from `tokenizer.model` (SentencePiece's); a directory that holds both gives the same
//! ids either way.

mod chat;
mod protobuf;
mod sentencepiece;

pub use chat::ChatSettings;

use crate::error::{Result, TrainError};
use crate::files;
use serde_json::Value;
use std::path::{Path, PathBuf};

/// A model's tokenizer.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// The file it was read from.
    path: PathBuf,
    eos: Option<u32>,
    ends: Vec<u32>,
    bos: Option<u32>,
    vocab_size: usize,
    digest: String,
    chat: ChatSettings,
}

/// A text's tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoding {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Where each token starts, in characters of the text. A token that the tokenizer puts in front (BOS) has 0,
    /// one that it appends has the text's length.
    pub starts: Vec<usize>,
}

impl Tokenizer {
    /// Reads the tokenizer of a model directory. Truncation and padding that the file asks for are dropped.
    ///
    /// # Errors
    /// The directory holds no tokenizer, or one that cannot be read.
    pub fn load(model_dir: &Path) -> Result<Self> {
        let json = model_dir.join("tokenizer.json");
        let pieces = model_dir.join("tokenizer.model");
        let (path, mut inner, own_eos) = if json.exists() {
            let bytes = std::fs::read(&json).map_err(TrainError::io(&json))?;
            let inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(|error| unreadable(&json, error))?;
            (json, inner, None)
        } else if pieces.exists() {
            let add_bos = settings(model_dir, "tokenizer_config.json")?.get("add_bos_token").cloned();
            let (inner, eos) = sentencepiece::load(&pieces, add_bos != Some(Value::Bool(false)))?;
            (pieces, inner, eos)
        } else {
            return Err(TrainError::model(
                model_dir,
                "holds neither tokenizer.json nor tokenizer.model",
                "copy one of them there, from where the model came from",
            ));
        };
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|error| unreadable(&path, error))?;
        let eos = declared(model_dir, &inner, "eos")?.or(own_eos);
        let mut ends = listed(model_dir, &inner, "eos_token_id")?;
        ends.extend(eos.filter(|eos| !ends.contains(eos)));
        let bos = declared(model_dir, &inner, "bos")?;
        let vocab_size = inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        let mut read = vec![path.clone()];
        for name in ["tokenizer_config.json", "special_tokens_map.json"] {
            read.extend(Some(model_dir.join(name)).filter(|file| file.exists()));
        }
        Ok(Self {
            inner,
            path,
            eos,
            ends,
            bos,
            vocab_size,
            chat: ChatSettings::read(model_dir)?,
            digest: files::digest_files(read.iter().map(PathBuf::as_path))?,
        })
    }

    /// The text's tokens, with the special tokens that the tokenizer itself adds (BOS, as a rule).
    ///
    /// # Errors
    /// The tokenizer fails on the text.
    pub fn encode(&self, text: &str) -> Result<Encoding> {
        self.encoded(text, true)
    }

    /// The text's tokens, with those special tokens alone that are spelt out in it: a chat template's text has its own.
    ///
    /// # Errors
    /// The tokenizer fails on the text.
    pub fn encode_as_it_is(&self, text: &str) -> Result<Encoding> {
        self.encoded(text, false)
    }

    fn encoded(&self, text: &str, add_special_tokens: bool) -> Result<Encoding> {
        let encoding = self
            .inner
            .encode_char_offsets(text, add_special_tokens)
            .map_err(|error| TrainError::model(&self.path, error.to_string(), "use another tokenizer"))?;
        let mut starts: Vec<_> = encoding.get_offsets().iter().map(|(start, _)| *start).collect();
        // Special tokens that are no part of the text stand at 0; those behind it belong to its end.
        let added = encoding.get_special_tokens_mask();
        if let Some(last) = added.iter().rposition(|added| *added == 0) {
            let length = text.chars().count();
            starts[last + 1..].fill(length);
        }
        Ok(Encoding { ids: encoding.get_ids().to_vec(), starts })
    }

    /// The text of tokens; special tokens are left out.
    ///
    /// # Errors
    /// The tokenizer fails on the ids.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.decoded(ids, true)
    }

    /// The text of tokens, special ones as they are called.
    ///
    /// # Errors
    /// The tokenizer fails on the ids.
    pub fn decode_as_it_is(&self, ids: &[u32]) -> Result<String> {
        self.decoded(ids, false)
    }

    fn decoded(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        self.inner
            .decode(ids, skip_special_tokens)
            .map_err(|error| TrainError::model(&self.path, error.to_string(), "use another tokenizer"))
    }

    /// The end-of-sequence token: the `eos_token` of `tokenizer_config.json` or `special_tokens_map.json`, else
    /// the (first) `eos_token_id` of `generation_config.json` or `config.json`, else that of `tokenizer.model`.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// The tokens of which each ends what a model generates: all that the `eos_token_id` of `generation_config.json` (else
    /// that of `config.json`) lists, as transformers has it, and [`Tokenizer::eos`].
    pub fn ends(&self) -> &[u32] {
        &self.ends
    }

    /// The beginning-of-sequence token, named where [`Tokenizer::eos`] is.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// A token's piece of text as it stands in the vocabulary.
    pub fn piece(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Its highest token id plus 1.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// What the model's directory says of its chats.
    pub fn chat(&self) -> &ChatSettings {
        &self.chat
    }

    /// The file it was read from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// `sha256:…` of its files.
    pub fn digest(&self) -> &str {
        &self.digest
    }
}

fn unreadable(path: &Path, error: impl std::fmt::Display) -> TrainError {
    TrainError::model(path, format!("is no tokenizer that can be read: {error}"), "copy the file again")
}

/// A settings file of the model directory; null if it is not there.
fn settings(dir: &Path, name: &str) -> Result<Value> {
    let path = dir.join(name);
    match std::fs::read(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| {
            TrainError::model(&path, format!("is no JSON: {error}"), "copy the file again or remove it")
        }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Value::Null),
        Err(error) => Err(TrainError::io(&path)(error)),
    }
}

/// The first token of a kind (`eos`, `bos`) that the directory's settings name and the tokenizer knows.
fn declared(dir: &Path, inner: &tokenizers::Tokenizer, kind: &str) -> Result<Option<u32>> {
    let name_of_token = format!("{kind}_token");
    for name in ["tokenizer_config.json", "special_tokens_map.json"] {
        let settings = settings(dir, name)?;
        // Either the piece itself or an object that describes it.
        let token =
            settings.get(&name_of_token).and_then(|t| t.as_str().or_else(|| t.get("content")?.as_str()));
        if let Some(id) = token.and_then(|token| inner.token_to_id(token)) {
            return Ok(Some(id));
        }
    }
    Ok(listed(dir, inner, &format!("{kind}_token_id"))?.first().copied())
}

/// The tokens that `generation_config.json`, else `config.json`, has under a key: those that the tokenizer knows.
fn listed(dir: &Path, inner: &tokenizers::Tokenizer, key: &str) -> Result<Vec<u32>> {
    for name in ["generation_config.json", "config.json"] {
        let settings = settings(dir, name)?;
        // Either an id or a list of them.
        let ids = settings
            .get(key)
            .map_or(&[][..], |ids| ids.as_array().map_or_else(|| std::slice::from_ref(ids), Vec::as_slice));
        let ids = ids.iter().filter_map(|id| u32::try_from(id.as_u64()?).ok());
        let known: Vec<_> = ids.filter(|id| inner.id_to_token(*id).is_some()).collect();
        if !known.is_empty() {
            return Ok(known);
        }
    }
    Ok(Vec::new())
}
