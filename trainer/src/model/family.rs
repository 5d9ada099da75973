//! Llama and its kin: what `model_type` says, and what it means where `config.json` says nothing.
//!
//! Defaults are those of transformers' configuration classes of the same names.

use serde_json::Value;

/// A problem and its remedy.
pub(super) type Refusal = (String, String);

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

#[cfg(test)]
mod tests {
    use crate::model::ModelConfig;
    use serde_json::{Map, Value, json};

    /// A configuration with some keys set, or without those that are given as the word `absent`: its windows, or what
    /// the refusal says.
    #[track_caller]
    fn check(model_type: &str, change: Value, want: Result<&[Option<usize>], &str>) {
        let mut config = json!({
            "model_type": model_type, "vocab_size": 40, "hidden_size": 24, "intermediate_size": 32,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        });
        let keys: &mut Map<_, _> = config.as_object_mut().unwrap();
        keys.extend(change.as_object().unwrap().clone());
        keys.retain(|_, value| value != "absent");
        let got = ModelConfig::parse(&config.to_string()).map(|config| config.sliding_windows);
        match (got, want) {
            (Ok(got), Ok(want)) => assert_eq!(got, want, "{model_type} {change}"),
            (Err((problem, remedy)), Err(want)) => {
                assert_eq!(format!("{problem}; {remedy}"), want, "{model_type} {change}");
            }
            (got, want) => panic!("{model_type} {change}: {got:?}, not {want:?}"),
        }
    }

    #[test]
    fn windows_are_transformers() {
        let none: Result<&[_], _> = Ok(&[None; 3]);
        check("llama", json!({"sliding_window": 8}), none);
        check("mistral", json!({}), Ok(&[Some(4096); 3]));
        check("mistral", json!({"sliding_window": null}), none);
        check("mistral", json!({"sliding_window": 8}), Ok(&[Some(8); 3]));
        for family in ["qwen2", "qwen3"] {
            let windows = |change: Value| {
                let mut config = json!({"use_sliding_window": true, "sliding_window": 8});
                config.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
                config
            };
            check(family, json!({"sliding_window": 8, "max_window_layers": 1}), none);
            check(family, windows(json!({})), none);
            check(family, windows(json!({"max_window_layers": 1})), Ok(&[None, Some(8), Some(8)]));
            check(family, windows(json!({"sliding_window": null, "max_window_layers": 0})), none);
            check(
                family,
                windows(json!({"sliding_window": "absent", "max_window_layers": 2})),
                Ok(&[None, None, Some(4096)]),
            );
            let types = json!(["sliding_attention", "full_attention", "sliding_attention"]);
            check(family, windows(json!({"layer_types": types})), Ok(&[Some(8), None, Some(8)]));
        }
    }

    /// The footprint model knows how long windows are, and of how many layers.
    #[test]
    fn windows_are_counted_in_the_shape() {
        let some = ["full_attention", "sliding_attention", "full_attention"];
        for (family, change, want) in [
            ("llama", json!({}), (None, 0)),
            ("mistral", json!({}), (Some(4096), 3)),
            ("mistral", json!({"sliding_window": null}), (None, 0)),
            ("qwen2", json!({"sliding_window": 8}), (None, 0)),
            (
                "qwen2",
                json!({"use_sliding_window": true, "sliding_window": 8, "max_window_layers": 1}),
                (Some(8), 2),
            ),
            (
                "qwen3",
                json!({"use_sliding_window": true, "sliding_window": 8, "layer_types": some}),
                (Some(8), 1),
            ),
        ] {
            let mut config = json!({
                "model_type": family, "vocab_size": 40, "hidden_size": 24, "intermediate_size": 32,
                "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
            });
            config.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
            let shape = ModelConfig::parse(&config.to_string()).unwrap().shape();
            assert_eq!((shape.sliding_window, shape.sliding_window_layers), want, "{family} {change}");
        }
    }

    #[test]
    fn what_a_family_does_not_have_is_refused() {
        check(
            "gemma3",
            json!({}),
            Err("model_type is gemma3; the model types llama, mistral, qwen2 and qwen3 can be trained"),
        );
        check(
            "qwen3",
            json!({"attention_bias": true}),
            Err(
                "attention_bias or mlp_bias is true; use a model without those biases; Qwen2's own need no key",
            ),
        );
        check(
            "mistral",
            json!({"num_key_value_heads": "absent"}),
            Err(
                "num_key_value_heads is missing; heads are not known without it; restore config.json from the model's \
                 authors",
            ),
        );
        check(
            "mistral",
            json!({"sliding_window": 0}),
            Err("sliding_window is 0; write a whole number from 1 on"),
        );
        check(
            "qwen2",
            json!({"layer_types": ["sliding_attention", "full_attention", "full_attention"]}),
            Err(
                "layer_types has sliding_attention for layer 0, but there is no window; set use_sliding_window to true \
                 and sliding_window to a number",
            ),
        );
        check(
            "qwen2",
            json!({"layer_types": ["full_attention", "linear_attention", "full_attention"]}),
            Err(
                "layer_types has \"linear_attention\" for layer 1; layers of full_attention and sliding_attention can \
                 be trained",
            ),
        );
        check(
            "qwen3",
            json!({"layer_types": ["full_attention"]}),
            Err(
                "layer_types has 1 layers, num_hidden_layers is 3; restore config.json from the model's authors",
            ),
        );
    }

    #[test]
    fn heads_and_their_own_are_the_familys() {
        for (family, bias, norms, head_dim) in [
            ("llama", false, false, 6),
            ("mistral", false, false, 6),
            ("qwen2", true, false, 6),
            ("qwen3", false, true, 128),
        ] {
            let text = format!(
                r#"{{"model_type": "{family}", "vocab_size": 40, "hidden_size": 24, "intermediate_size": 32,
                "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}}"#
            );
            let config = ModelConfig::parse(&text).unwrap();
            let got = (config.query_key_value_bias, config.query_key_norms, config.head_dim);
            assert_eq!(got, (bias, norms, head_dim), "{family}");
            let shape = config.shape();
            assert_eq!((shape.query_key_value_bias, shape.query_key_norms), (bias, norms), "{family}");
        }
    }
}
