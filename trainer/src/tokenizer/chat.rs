//! What a model's directory says of its chats.

use super::settings;
use crate::error::{Result, TrainError};
use serde_json::{Map, Value};
use std::path::Path;

/// The file that holds nothing but the template.
const FILE: &str = "chat_template.jinja";

/// A chat template and what it may name.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ChatSettings {
    /// The template: that of `chat_template.jinja`, else that of `tokenizer_config.json`, the one named `default` where
    /// there are several.
    pub template: Option<String>,
    /// Special tokens by the names that templates use: `bos_token`, `eos_token` and so on.
    pub special_tokens: Map<String, Value>,
}

impl ChatSettings {
    /// Reads a model's directory.
    ///
    /// # Errors
    /// A file is there and cannot be read.
    pub(super) fn read(dir: &Path) -> Result<Self> {
        let config = settings(dir, "tokenizer_config.json")?;
        let mut special_tokens = Map::new();
        for about in [settings(dir, "special_tokens_map.json")?, config.clone()] {
            for (name, token) in about.as_object().into_iter().flatten() {
                // Either the piece itself or an object that describes it.
                let piece = token.as_str().or_else(|| token.get("content")?.as_str());
                if let Some(piece) = piece.filter(|_| name.ends_with("_token")) {
                    special_tokens.insert(name.clone(), piece.into());
                }
            }
        }
        let file = dir.join(FILE);
        if file.exists() {
            let template = std::fs::read_to_string(&file).map_err(TrainError::io(&file))?;
            return Ok(Self { template: Some(template), special_tokens });
        }
        let template = match &config["chat_template"] {
            Value::String(template) => Some(template.clone()),
            Value::Array(named) => {
                let default = named.iter().find(|template| template["name"] == "default");
                default.and_then(|template| template["template"].as_str()).map(Into::into)
            }
            _ => None,
        };
        Ok(Self { template, special_tokens })
    }
}
