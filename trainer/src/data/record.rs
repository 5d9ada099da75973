//! One row of a data file: which of its columns count, and what they may hold.

use super::chat::Chat;
use super::marked::Marked;
use crate::pack::Row;
pub use serde_json::Value;

/// The label of a token that is not to be predicted, as in PyTorch's cross-entropy.
const IGNORED: i64 = -100;

/// What rows are read by.
#[derive(Debug, Clone, Copy)]
pub struct Columns<'a> {
    /// The column of a row's text.
    pub text: &'a str,
    /// Token ids must be below.
    pub vocab_size: usize,
    /// What makes text of a conversation.
    pub chat: &'a Chat<'a>,
}

/// The columns of tokenised rows; the last two may be missing.
const TOKENS: [&str; 3] = ["input_ids", "labels", "attention_mask"];
/// The columns of conversations.
const CONVERSATIONS: [&str; 2] = ["messages", "conversations"];
/// The columns of a prompt and what is to follow it.
const COMPLETION: [&str; 2] = ["prompt", "completion"];
/// Alpaca's columns; the middle one may be missing or empty.
const ALPACA: [&str; 3] = ["instruction", "input", "output"];

/// What a row may have instead of the text column, in words.
pub const OTHER_FORMS: &str =
    "`messages`, `prompt` and `completion`, `instruction` and `output`, nor `input_ids`";

/// Whether a column of this name is read at all.
pub fn counts(columns: &Columns, name: &str) -> bool {
    let known = [&TOKENS[..], &CONVERSATIONS, &COMPLETION, &ALPACA];
    name == columns.text || known.iter().any(|names| names.contains(&name))
}

/// What a row holds.
#[derive(Debug, Clone, PartialEq)]
pub enum Content {
    /// Text to tokenise.
    Marked(Marked),
    /// Tokens.
    Tokens(Row),
}

/// Why a row cannot be used.
#[derive(Debug, Clone, PartialEq)]
pub enum Bad {
    /// It is no row, or a column holds what it may not.
    Row {
        /// What is wrong.
        problem: String,
        /// What to do.
        remedy: &'static str,
    },
    /// It has none of the forms that a row may have; these are the columns that it has.
    NoColumn(Vec<String>),
}

impl Bad {
    fn value(problem: String) -> Self {
        Self::Row { problem, remedy: "correct the row" }
    }
}

/// Makes a row of its columns. The column that the configuration names goes before all others; then come tokens, a
/// conversation, a prompt with its completion, an instruction with its output.
///
/// # Errors
/// What makes it a bad row.
pub fn content(
    columns: &Columns,
    mut cell: impl FnMut(&str) -> Option<Value>,
    names: impl FnOnce() -> Vec<String>,
) -> Result<Content, Bad> {
    let [input_ids, labels, mask] = TOKENS;
    if columns.text != input_ids
        && let Some(value) = cell(columns.text)
    {
        return match value {
            Value::String(text) => Ok(Content::Marked(Marked::of_text(text))),
            Value::Array(items) if items.iter().any(Value::is_object) => {
                conversation(columns, columns.text, items)
            }
            other => Err(holds(columns.text, &other, "text")),
        };
    }
    if let Some(ids) = cell(input_ids) {
        let (labels, mask) = (cell(labels), cell(mask));
        return tokens(&ids, labels.as_ref(), mask.as_ref(), columns.vocab_size).map(Content::Tokens);
    }
    for name in CONVERSATIONS {
        match cell(name) {
            Some(Value::Array(items)) => return conversation(columns, name, items),
            Some(Value::Null) | None => {}
            Some(other) => return Err(holds(name, &other, "a list of messages")),
        }
    }
    if let (Some(prompt), Some(completion)) = (cell(COMPLETION[0]), cell(COMPLETION[1])) {
        return completed(columns, prompt, completion);
    }
    match (cell(ALPACA[0]), cell(ALPACA[2])) {
        (Some(instruction), Some(output)) => {
            let input = cell(ALPACA[1]).filter(|input| !input.is_null());
            let input = input.map_or(Ok(String::new()), |input| text(ALPACA[1], input))?;
            let (instruction, output) = (text(ALPACA[0], instruction)?, text(ALPACA[2], output)?);
            Ok(Content::Marked(Marked::of_instruction(&instruction, &input, &output)))
        }
        _ => Err(Bad::NoColumn(names())),
    }
}

/// A prompt and its completion: texts, or the messages of one conversation.
fn completed(columns: &Columns, prompt: Value, completion: Value) -> Result<Content, Bad> {
    let [first, second] = COMPLETION;
    match (prompt, completion) {
        (Value::Array(mut messages), Value::Array(rest)) => {
            messages.extend(rest);
            conversation(columns, first, messages)
        }
        (prompt, completion) => {
            let (prompt, completion) = (text(first, prompt)?, text(second, completion)?);
            Ok(Content::Marked(Marked::of_completion(prompt, &completion)))
        }
    }
}

fn conversation(columns: &Columns, column: &str, messages: Vec<Value>) -> Result<Content, Bad> {
    let rendered = columns.chat.marked(messages);
    rendered
        .map(Content::Marked)
        .map_err(|(problem, remedy)| Bad::Row { problem: format!("column `{column}` {problem}"), remedy })
}

fn text(column: &str, value: Value) -> Result<String, Bad> {
    match value {
        Value::String(text) => Ok(text),
        other => Err(holds(column, &other, "text")),
    }
}

fn holds(column: &str, value: &Value, wanted: &str) -> Bad {
    let held = match value {
        Value::Array(items) if items.iter().all(Value::is_i64) => "a list of numbers",
        Value::Array(_) => "a list of other things than whole numbers",
        other => kind(other),
    };
    Bad::value(format!("column `{column}` holds {held}, not {wanted}"))
}

/// What a value is, in words.
pub fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn numbers(column: &str, value: &Value) -> Result<Vec<i64>, Bad> {
    let numbers = value.as_array().and_then(|items| items.iter().map(Value::as_i64).collect());
    numbers.ok_or_else(|| holds(column, value, "a list of whole numbers"))
}

/// A tokenised row; tokens that the attention mask hides (padding) are left out.
fn tokens(ids: &Value, labels: Option<&Value>, mask: Option<&Value>, vocab_size: usize) -> Result<Row, Bad> {
    let ids = numbers(TOKENS[0], ids)?;
    let optional = |name: &str, value: Option<&Value>| match value {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match numbers(name, value)? {
            list if list.len() == ids.len() => Ok(Some(list)),
            list => Err(Bad::value(format!("`{name}` has {} items, `input_ids` {}", list.len(), ids.len()))),
        },
    };
    let (labels, mask) = (optional(TOKENS[1], labels)?, optional(TOKENS[2], mask)?);
    let mut row = Row { input_ids: Vec::with_capacity(ids.len()), targets: Vec::with_capacity(ids.len()) };
    for (at, id) in ids.iter().enumerate() {
        if mask.as_ref().is_some_and(|mask| mask[at] == 0) {
            continue;
        }
        let label = labels.as_ref().map_or(*id, |labels| labels[at]);
        if label != *id && label != IGNORED {
            return Err(Bad::value(format!(
                "label {at} is {label}, neither its token's id {id} nor {IGNORED} (labels are not shifted)"
            )));
        }
        let known = u32::try_from(*id).ok().filter(|id| (*id as usize) < vocab_size);
        let Some(known) = known else {
            return Err(Bad::Row {
                problem: format!("token id {id} has no embedding row: the model has {vocab_size} of them"),
                remedy: "tokenise with the model's own tokenizer",
            });
        };
        row.targets.push(!row.input_ids.is_empty() && label != IGNORED);
        row.input_ids.push(known);
    }
    Ok(row)
}
