//! Answers that a model writes: how, and where they end.

use crate::encode::Encoder;
use crate::run::Model;
use crate::task::Task;
use crate::{EvalError, Result};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};
use trainer::model::ModelConfig;
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
}

/// Tokens of a task's prompts at most: one and its answer are what the model reads, which is no more than it knows
/// positions.
///
/// # Errors
/// The answers alone would be as long.
pub(crate) fn room(task: &Task, config: &ModelConfig, max_length: Option<usize>) -> Result<usize> {
    let known = config.max_position_embeddings;
    let length = max_length.map_or(known, |length| length.min(known));
    let max_gen_toks = task.generation_kwargs.max_gen_toks;
    let most = length.saturating_sub(max_gen_toks);
    if most == 0 {
        let problem = format!(
            "its answers have up to {max_gen_toks} tokens, and prompt and answer may have {length} together"
        );
        return Err(EvalError::task(&task.task, problem, "lower max_gen_toks in its generation_kwargs"));
    }
    Ok(most)
}

impl<'a> Writer<'a> {
    /// One for a model that reads `max_length` tokens, or all that it can.
    ///
    /// # Errors
    /// Those of [`room`].
    pub(crate) fn new(model: Model<'a>, task: &Task, max_length: Option<usize>) -> Result<Self> {
        let most = room(task, &model.base.config, max_length)?;
        let max_gen_toks = task.generation_kwargs.max_gen_toks;
        let named = task.generation_kwargs.until.clone();
        let mut until = named.unwrap_or_else(|| vec![task.fewshot_delimiter.clone()]);
        // A model may also write what its EOS is called.
        until.extend(model.tokenizer.eos().and_then(|id| model.tokenizer.piece(id)));
        until.retain(|text| !text.is_empty());
        Ok(Self { model, max_gen_toks, most, until })
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
        // A special token ends an answer by its name, of which the answer's own text has nothing.
        let mut is_over = |answer: &[u32]| ends(answer, &self.until, |ids| tokenizer.decode_as_it_is(ids));
        let (most, eos) = (self.max_gen_toks, tokenizer.ends());
        let answer = pack::generate_until(base, adapter, &prompt, most, eos, &mut is_over)?;
        Ok(Some(cut(tokenizer.decode(&answer)?, &self.until)))
    }
}

/// Whether the last tokens of an answer have one of the ends: as many as are sure to have it wholly, as each has a byte of
/// it at least.
fn ends(
    answer: &[u32],
    until: &[String],
    decode: impl Fn(&[u32]) -> trainer::Result<String>,
) -> trainer::Result<bool> {
    let looked_at = until.iter().map(String::len).max().unwrap_or(0) + 2;
    let text = decode(&answer[answer.len().saturating_sub(looked_at)..])?;
    Ok(until.iter().any(|until| text.contains(until.as_str())))
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

    /// A tokenizer whose tokens are bytes.
    #[test]
    fn an_end_is_seen_once_it_is_whole() {
        let bytes = |ids: &[u32]| {
            let bytes: Vec<_> = ids.iter().map(|id| u8::try_from(*id).unwrap()).collect();
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        for (text, until, want) in [
            (&b"so ab"[..], &["ab"][..], true),
            (b"so a", &["ab"], false),
            (b"so b", &["ab", "b"], true),
            (b"stop", &["stop"], true),
            (b"a text that is longer than its end, stop", &["stop"], true),
            // One of several bytes, of which not all are there, and behind half a character.
            (b"so \xc3\xa9", &["\u{e9}"], true),
            (b"so \xc3", &["\u{e9}"], false),
            (b"\xe2\x82\xac\xc3\xa9", &["\u{e9}"], true),
            // What an answer has there already has ended it.
            (b"ab and much behind it", &["ab"], false),
            (b"so", &[], false),
        ] {
            let ids: Vec<_> = text.iter().map(|byte| u32::from(*byte)).collect();
            let until: Vec<_> = until.iter().map(ToString::to_string).collect();
            assert_eq!(ends(&ids, &until, bytes).unwrap(), want, "{} until {until:?}", text.escape_ascii());
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
