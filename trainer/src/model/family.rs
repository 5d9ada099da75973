//! Llama and its kin: what `model_type` says, and what it means where `config.json` says nothing.
//!
//! Defaults are those of transformers' configuration classes of the same names.

use serde_json::Value;

/// A problem and its remedy.
type Refusal = (String, String);

/// An architecture that can be trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    /// Llama 1 to 3, OpenLLaMA, TinyLlama.
    Llama,
    /// A Llama whose queries see a window of keys.
    Mistral,
    /// Qwen2 and 2.5: a Llama with biases at queries, keys and values, and windows in some layers if asked for.
    Qwen2,
    /// Norms of query and key heads in place of the biases.
    Qwen3,
}

/// The window of a configuration that does not say it.
const DEFAULT_WINDOW: usize = 4096;

/// The layer from which on Qwens have windows if their configuration does not say it.
const DEFAULT_MAX_WINDOW_LAYERS: usize = 28;

const RESTORE: &str = "restore config.json from the model's authors";

impl Family {
    /// The family that a configuration names.
    pub(super) fn of(config: &Value) -> Result<Self, Refusal> {
        Ok(match config["model_type"].as_str().unwrap_or("missing") {
            "llama" => Self::Llama,
            "mistral" => Self::Mistral,
            "qwen2" => Self::Qwen2,
            "qwen3" => Self::Qwen3,
            other => {
                let remedy = "the model types llama, mistral, qwen2 and qwen3 can be trained";
                return Err((format!("model_type is {other}"), remedy.into()));
            }
        })
    }

    /// The width of a head where the configuration leaves it out.
    pub(super) fn head_dim(self, hidden_size: usize, heads: usize) -> usize {
        if self == Self::Qwen3 { 128 } else { hidden_size / heads }
    }

    /// How many keys a query of each layer sees at most, its own among them; `None` for all before it.
    pub(super) fn sliding_windows(
        self,
        config: &Value,
        layers: usize,
    ) -> Result<Vec<Option<usize>>, Refusal> {
        let window = match self {
            Self::Llama => None,
            Self::Mistral => window(config)?,
            Self::Qwen2 | Self::Qwen3 if config["use_sliding_window"] == Value::Bool(true) => window(config)?,
            Self::Qwen2 | Self::Qwen3 => None,
        };
        if matches!(self, Self::Llama | Self::Mistral) {
            return Ok(vec![window; layers]);
        }
        let Some(types) = config["layer_types"].as_array() else {
            let first = whole_number(config, "max_window_layers", 0)?.unwrap_or(DEFAULT_MAX_WINDOW_LAYERS);
            return Ok((0..layers).map(|layer| window.filter(|_| layer >= first)).collect());
        };
        if types.len() != layers {
            let problem = format!("layer_types has {} layers, num_hidden_layers is {layers}", types.len());
            return Err((problem, RESTORE.into()));
        }
        let of_layer = |(layer, kind): (usize, &Value)| match (kind.as_str().unwrap_or_default(), window) {
            ("full_attention", _) => Ok(None),
            ("sliding_attention", Some(window)) => Ok(Some(window)),
            ("sliding_attention", None) => {
                let problem =
                    format!("layer_types has sliding_attention for layer {layer}, but there is no window");
                Err((problem, "set use_sliding_window to true and sliding_window to a number".into()))
            }
            _ => {
                let remedy = "layers of full_attention and sliding_attention can be trained";
                Err((format!("layer_types has {kind} for layer {layer}"), remedy.into()))
            }
        };
        types.iter().enumerate().map(of_layer).collect()
    }
}

/// `sliding_window`: null for none.
fn window(config: &Value) -> Result<Option<usize>, Refusal> {
    match config.get("sliding_window") {
        None => Ok(Some(DEFAULT_WINDOW)),
        Some(_) => whole_number(config, "sliding_window", 1),
    }
}

/// A number of at least `least`, if it is there and not null.
fn whole_number(config: &Value, key: &str, least: u64) -> Result<Option<usize>, Refusal> {
    let value = &config[key];
    if value.is_null() {
        return Ok(None);
    }
    let number = value.as_u64().filter(|number| *number >= least).and_then(|n| usize::try_from(n).ok());
    number
        .map(Some)
        .ok_or_else(|| (format!("{key} is {value}"), format!("write a whole number from {least} on")))
}
