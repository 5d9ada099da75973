//! Answers that a model writes: how, and where they end.

use crate::encode::Encoder;
use crate::run::Model;
use crate::task::Task;
use crate::{EvalError, Result};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};
use trainer::pack;

/// How answers are generated: greedily, each token the likeliest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct GenerationKwargs {
    /// Texts at which an answer ends, without them; EOS always is one. If nothing is said, what stands behind examples.
    #[serde(deserialize_with = "texts", skip_serializing_if = "Option::is_none")]
    pub until: Option<Vec<String>>,
    /// Tokens of an answer at most.
    pub max_gen_toks: usize,
    /// Whether tokens are drawn. They are not.
    pub do_sample: bool,
    /// What the draw's probabilities are sharpened by: 0, as there is none.
    pub temperature: f64,
    /// What else the file says.
    #[serde(flatten)]
    pub others: Map<String, Value>,
}

impl Default for GenerationKwargs {
    fn default() -> Self {
        Self { until: None, max_gen_toks: 256, do_sample: false, temperature: 0.0, others: Map::new() }
    }
}

/// One text, several, or nothing.
fn texts<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<Vec<String>>, D::Error> {
    match Value::deserialize(deserializer)? {
        Value::Null => Ok(None),
        Value::String(text) => Ok(Some(vec![text])),
        list => serde_json::from_value(list).map(Some).map_err(serde::de::Error::custom),
    }
}

impl GenerationKwargs {
    /// What it says that cannot be, in words.
    pub(crate) fn problem(&self) -> Option<String> {
        let unknown = self.others.keys().next().map(|key| format!("generation_kwargs.{key} is not followed"));
        let drawn = || self.do_sample.then(|| "generation_kwargs.do_sample draws tokens".to_owned());
        let sharpened = || {
            let temperature = self.temperature;
            (temperature != 0.0).then(|| format!("generation_kwargs.temperature is {temperature}"))
        };
        let nothing = || (self.max_gen_toks == 0).then(|| "generation_kwargs.max_gen_toks is 0".to_owned());
        unknown.or_else(drawn).or_else(sharpened).or_else(nothing)
    }
}

/// Writes the answers of a task.
pub(crate) struct Writer<'a> {
    model: Model<'a>,
    max_gen_toks: usize,
    /// Tokens of a prompt at most: it and its answer are what the model reads.
    most: usize,
    until: Vec<String>,
    /// Tokens that an end is looked for in: each has a byte of it at least, so that it is wholly among them.
    looked_at: usize,
}

impl<'a> Writer<'a> {
    /// One for a model that reads `max_length` tokens.
    ///
    /// # Errors
    /// Its answers alone would be as long.
    pub(crate) fn new(model: Model<'a>, task: &Task, max_length: usize) -> Result<Self> {
        let max_gen_toks = task.generation_kwargs.max_gen_toks;
        let most = max_length.saturating_sub(max_gen_toks);
        if most == 0 {
            let problem = format!(
                "its answers have up to {max_gen_toks} tokens, and prompt and answer may have {max_length} together"
            );
            return Err(EvalError::task(&task.task, problem, "lower max_gen_toks in its generation_kwargs"));
        }
        let named = task.generation_kwargs.until.clone();
        let mut until = named.unwrap_or_else(|| vec![task.fewshot_delimiter.clone()]);
        // A model may also write what its EOS is called.
        until.extend(model.tokenizer.eos().and_then(|id| model.tokenizer.piece(id)));
        until.retain(|text| !text.is_empty());
        let looked_at = until.iter().map(String::len).max().unwrap_or(0) + 2;
        Ok(Self { model, max_gen_toks, most, until, looked_at })
    }

    /// The answer to a prompt, of which the last tokens are read if it is too long; `None` if it has none.
    ///
    /// # Errors
    /// The tokenizer fails; the device runs out of memory.
    pub(crate) fn answer(&self, encoder: &Encoder, prompt: &str) -> trainer::Result<Option<String>> {
        let Model { base, adapter, tokenizer } = self.model;
        let mut prompt = encoder.encode(prompt)?;
        let prompt = prompt.split_off(prompt.len().saturating_sub(self.most));
        if prompt.is_empty() {
            return Ok(None);
        }
        let mut is_over = |answer: &[u32]| -> trainer::Result<bool> {
            let text = tokenizer.decode(&answer[answer.len().saturating_sub(self.looked_at)..])?;
            Ok(self.until.iter().any(|until| text.contains(until.as_str())))
        };
        let (most, eos) = (self.max_gen_toks, tokenizer.eos());
        let answer = pack::generate_until(base, adapter, &prompt, most, eos, &mut is_over)?;
        Ok(Some(cut(tokenizer.decode(&answer)?, &self.until)))
    }
}

/// A text up to each of the ends in turn.
fn cut(mut text: String, until: &[String]) -> String {
    for end in until {
        text.truncate(text.find(end.as_str()).unwrap_or(text.len()));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn texts_end_before_the_first_end() {
        for (text, until, want) in [
            ("a b. c", &["."][..], "a b"),
            ("a b. c", &["c", "b"], "a "),
            ("a b. c", &["d"], "a b. c"),
            ("a b. c", &["a"], ""),
            // The first that is named goes first: what it leaves has no whole "bcd".
            ("abcd", &["cd", "bcd"], "ab"),
        ] {
            let until: Vec<_> = until.iter().map(ToString::to_string).collect();
            assert_eq!(cut(text.into(), &until), want, "{text} until {until:?}");
        }
    }

    #[test]
    fn what_is_not_greedy_is_refused_by_name() {
        for (kwargs, want) in [
            (json!({}), None),
            (json!({ "until": "x", "do_sample": false, "temperature": 0, "max_gen_toks": 1 }), None),
            (json!({ "until": null, "temperature": 0.0 }), None),
            (json!({ "top_p": 0.9 }), Some("generation_kwargs.top_p is not followed")),
            (json!({ "do_sample": true }), Some("generation_kwargs.do_sample draws tokens")),
            (json!({ "temperature": 0.7 }), Some("generation_kwargs.temperature is 0.7")),
            (json!({ "max_gen_toks": 0 }), Some("generation_kwargs.max_gen_toks is 0")),
        ] {
            let read: GenerationKwargs = serde_json::from_value(kwargs.clone()).unwrap();
            assert_eq!(read.problem().as_deref(), want, "{kwargs}");
        }
        assert!(serde_json::from_value::<GenerationKwargs>(json!({ "until": [1] })).is_err());
    }
}
