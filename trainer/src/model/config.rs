//! The `config.json` of a model: a Llama or one of its kin, as transformers 4 and 5 write it.

use super::Quantization;
use super::family::Family;
use crate::error::{Result, TrainError};
use domain::footprint::ModelShape;
use serde::Deserialize;
use std::path::Path;

/// The shape of a Llama, a Mistral, a Qwen2 or a Qwen3: the last three are Llamas but for biases, norms of heads, and
/// windows.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; each serves `num_attention_heads / num_key_value_heads` query heads.
    pub num_key_value_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// The longest sequence the model knows.
    pub max_position_embeddings: usize,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// How the rotary frequencies are stretched.
    pub rope_scaling: RopeScaling,
    /// Whether the output head is the embedding.
    pub tie_word_embeddings: bool,
    /// Whether queries, keys and values have a bias (Qwen2).
    pub query_key_value_bias: bool,
    /// Whether each query head and each key head has an RMSNorm (Qwen3).
    pub query_key_norms: bool,
    /// By layer, how many keys a query sees at most, its own among them. `None`, or a layer beyond the last: all.
    pub sliding_windows: Vec<Option<usize>>,
    /// How its linear layers lie in its files, if they were quantised before.
    pub quantization: Option<Quantization>,
}

/// How rotary frequencies are stretched for long sequences.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// All frequencies divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1's: low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 {
        /// The divisor of low frequencies.
        factor: f64,
        /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are low frequencies.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position_embeddings / high_freq_factor` are high frequencies.
        high_freq_factor: f64,
        /// The length the model was first trained on.
        original_max_position_embeddings: f64,
    },
}

#[derive(Deserialize)]
struct RawConfig {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    max_position_embeddings: Option<usize>,
    rms_norm_eps: Option<f64>,
    rope_theta: Option<f64>,
    rope_scaling: Option<RawRope>,
    rope_parameters: Option<RawRope>,
    tie_word_embeddings: Option<bool>,
    hidden_act: Option<String>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
}

#[derive(Deserialize, Default, Clone)]
struct RawRope {
    rope_theta: Option<f64>,
    rope_type: Option<String>,
    #[serde(rename = "type")]
    legacy_type: Option<String>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
}

impl ModelConfig {
    /// Reads `config.json` in a model directory.
    ///
    /// # Errors
    /// The file is missing, is no JSON, is of no kin of Llama's, or asks for something that the trainer does not have.
    pub fn load(dir: &Path) -> Result<Self> {
        let path = dir.join("config.json");
        if !dir.is_dir() {
            return Err(TrainError::model(
                dir,
                "no such directory",
                "set pretrained_model_id to a directory with config.json, weights and a tokenizer",
            ));
        }
        let text = std::fs::read_to_string(&path).map_err(|e| {
            TrainError::model(&path, format!("cannot be read ({e})"), "a model directory needs a config.json")
        })?;
        Self::parse(&text).map_err(|(problem, remedy)| TrainError::model(&path, problem, remedy))
    }

    /// Reads the text of a `config.json`; the error is `(problem, remedy)`.
    pub fn parse(text: &str) -> std::result::Result<Self, (String, String)> {
        let value: serde_json::Value = serde_json::from_str(text)
            .map_err(|e| (format!("is no JSON ({e})"), "restore the file from the hub".to_string()))?;
        let family = Family::of(&value)?;
        let raw: RawConfig = serde_json::from_value(value.clone())
            .map_err(|e| (e.to_string(), "restore config.json from the model's authors".into()))?;
        let sliding_windows = family.sliding_windows(&value, raw.num_hidden_layers)?;
        let quantization = Quantization::of(&value)?;
        Ok(Self { sliding_windows, quantization, ..raw.check(family)? })
    }

    /// What the footprint model needs of it.
    pub fn shape(&self) -> ModelShape {
        ModelShape {
            vocab_size: self.vocab_size as u64,
            hidden_size: self.hidden_size as u64,
            intermediate_size: self.intermediate_size as u64,
            num_hidden_layers: self.num_hidden_layers as u64,
            num_attention_heads: self.num_attention_heads as u64,
            num_key_value_heads: self.num_key_value_heads as u64,
            head_dim: self.head_dim as u64,
            tie_word_embeddings: self.tie_word_embeddings,
            query_key_value_bias: self.query_key_value_bias,
            query_key_norms: self.query_key_norms,
            // All windows of a model are as long.
            sliding_window: self.sliding_windows.iter().flatten().next().map(|window| *window as u64),
            sliding_window_layers: self.sliding_windows.iter().flatten().count() as u64,
        }
    }

    /// Rotary frequencies of one head, `head_dim / 2` of them: θ^(−2i/d), stretched by `rope_scaling`.
    ///
    /// The `llama3` ramp is that of Llama 3.1's reference implementation.
    pub fn inverse_frequencies(&self) -> Vec<f32> {
        let d = self.head_dim as f64;
        (0..self.head_dim / 2)
            .map(|i| {
                let frequency = self.rope_theta.powf(-2.0 * i as f64 / d);
                let stretched = match self.rope_scaling {
                    RopeScaling::Default => frequency,
                    RopeScaling::Linear { factor } => frequency / factor,
                    RopeScaling::Llama3 {
                        factor,
                        low_freq_factor,
                        high_freq_factor,
                        original_max_position_embeddings: original,
                    } => {
                        let wavelength = 2.0 * std::f64::consts::PI / frequency;
                        if wavelength < original / high_freq_factor {
                            frequency
                        } else if wavelength > original / low_freq_factor {
                            frequency / factor
                        } else {
                            let smooth = (original / wavelength - low_freq_factor)
                                / (high_freq_factor - low_freq_factor);
                            (1.0 - smooth) * frequency / factor + smooth * frequency
                        }
                    }
                };
                stretched as f32
            })
            .collect()
    }
}

impl RawConfig {
    fn check(self, family: Family) -> std::result::Result<ModelConfig, (String, String)> {
        let fix = |what: &str| format!("{what}; restore config.json from the model's authors");
        if self.attention_bias == Some(true) || self.mlp_bias == Some(true) {
            let problem = "attention_bias or mlp_bias is true";
            return Err((problem.into(), "use a model without those biases; Qwen2's own need no key".into()));
        }
        if let Some(act) = self.hidden_act.as_deref().filter(|a| *a != "silu") {
            return Err((format!("hidden_act is {act}"), "only silu can be trained".into()));
        }
        let heads = self.num_attention_heads;
        let kv_heads = match self.num_key_value_heads {
            None if family != Family::Llama => {
                return Err(("num_key_value_heads is missing".into(), fix("heads are not known without it")));
            }
            given => given.unwrap_or(heads),
        };
        if heads == 0 || kv_heads == 0 || !heads.is_multiple_of(kv_heads) {
            return Err((
                format!("num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}"),
                fix("the heads disagree"),
            ));
        }
        let head_dim = self.head_dim.unwrap_or(family.head_dim(self.hidden_size, heads));
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            return Err((format!("head_dim is {head_dim}"), fix("rotary embedding needs an even head_dim")));
        }
        let nested = self.rope_parameters.unwrap_or_default();
        let rope = self.rope_scaling.unwrap_or_else(|| nested.clone());
        let kind = rope.rope_type.as_deref().or(rope.legacy_type.as_deref()).unwrap_or("default");
        let need = |name: &str, value: Option<f64>| {
            value.filter(|v| *v > 0.0).ok_or_else(|| {
                (format!("rope scaling {kind} lacks a positive {name}"), fix("the rope scaling is cut"))
            })
        };
        let rope_scaling = match kind {
            "default" => RopeScaling::Default,
            "linear" => RopeScaling::Linear { factor: need("factor", rope.factor)? },
            "llama3" => RopeScaling::Llama3 {
                factor: need("factor", rope.factor)?,
                low_freq_factor: need("low_freq_factor", rope.low_freq_factor)?,
                high_freq_factor: need("high_freq_factor", rope.high_freq_factor)?,
                original_max_position_embeddings: need(
                    "original_max_position_embeddings",
                    rope.original_max_position_embeddings,
                )?,
            },
            other => {
                return Err((
                    format!("rope scaling is {other}"),
                    "default, linear and llama3 can be trained".into(),
                ));
            }
        };
        Ok(ModelConfig {
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            num_hidden_layers: self.num_hidden_layers,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim,
            max_position_embeddings: self.max_position_embeddings.unwrap_or(2048),
            rms_norm_eps: self.rms_norm_eps.unwrap_or(1e-6),
            rope_theta: self.rope_theta.or(nested.rope_theta).unwrap_or(10_000.0),
            rope_scaling,
            tie_word_embeddings: self.tie_word_embeddings.unwrap_or(false),
            query_key_value_bias: family == Family::Qwen2,
            query_key_norms: family == Family::Qwen3,
            sliding_windows: Vec::new(),
            quantization: None,
        })
    }
}
