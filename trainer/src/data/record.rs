//! One row of a data file: which of its columns count, and what they may hold.

use crate::pack::Row;

/// The label of a token that is not to be predicted, as in PyTorch's cross-entropy.
const IGNORED: i64 = -100;

/// What rows are read by.
#[derive(Debug, Clone, Copy)]
pub struct Columns<'a> {
    /// The column of a row's text.
    pub text: &'a str,
    /// Token ids must be below.
    pub vocab_size: usize,
}

/// The columns of tokenised rows; the last two may be missing.
pub const TOKENS: [&str; 3] = ["input_ids", "labels", "attention_mask"];

/// A value in a column.
#[derive(Debug, Clone, PartialEq)]
pub enum Cell {
    /// Text.
    Text(String),
    /// A list of whole numbers.
    Numbers(Vec<i64>),
    /// Anything else, in words: `null`, `a number`.
    Other(&'static str),
}

/// What a row holds.
#[derive(Debug, Clone, PartialEq)]
pub enum Content {
    /// Text to tokenise.
    Text(String),
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
    /// It has neither the text column nor tokens; these are the columns that it has.
    NoColumn(Vec<String>),
}

impl Bad {
    fn value(problem: String) -> Self {
        Self::Row { problem, remedy: "correct the row" }
    }
}

/// Makes a row of its columns. The text column goes before `input_ids`, unless it is `input_ids` that the
/// configuration names.
///
/// # Errors
/// What makes it a bad row.
pub fn content(
    columns: &Columns,
    mut cell: impl FnMut(&str) -> Option<Cell>,
    names: impl FnOnce() -> Vec<String>,
) -> Result<Content, Bad> {
    let [input_ids, labels, mask] = TOKENS;
    if columns.text != input_ids
        && let Some(value) = cell(columns.text)
    {
        return match value {
            Cell::Text(text) => Ok(Content::Text(text)),
            Cell::Numbers(_) => Err(holds(columns.text, "a list of numbers", "text")),
            Cell::Other(kind) => Err(holds(columns.text, kind, "text")),
        };
    }
    let Some(ids) = cell(input_ids) else { return Err(Bad::NoColumn(names())) };
    let numbers = |name: &str, value: Cell| match value {
        Cell::Numbers(numbers) => Ok(numbers),
        Cell::Text(_) => Err(holds(name, "text", "a list of whole numbers")),
        Cell::Other(kind) => Err(holds(name, kind, "a list of whole numbers")),
    };
    let ids = numbers(input_ids, ids)?;
    let mut optional = |name| match cell(name) {
        None | Some(Cell::Other("null")) => Ok(None),
        Some(value) => match numbers(name, value)? {
            list if list.len() == ids.len() => Ok(Some(list)),
            list => Err(Bad::value(format!("`{name}` has {} items, `input_ids` {}", list.len(), ids.len()))),
        },
    };
    let (labels, mask) = (optional(labels)?, optional(mask)?);
    tokens(&ids, labels.as_deref(), mask.as_deref(), columns.vocab_size).map(Content::Tokens)
}

fn holds(column: &str, kind: &str, wanted: &str) -> Bad {
    Bad::value(format!("column `{column}` holds {kind}, not {wanted}"))
}

/// A tokenised row; tokens that the attention mask hides (padding) are left out.
fn tokens(ids: &[i64], labels: Option<&[i64]>, mask: Option<&[i64]>, vocab_size: usize) -> Result<Row, Bad> {
    let mut row = Row { input_ids: Vec::with_capacity(ids.len()), targets: Vec::with_capacity(ids.len()) };
    for (at, id) in ids.iter().enumerate() {
        if mask.is_some_and(|mask| mask[at] == 0) {
            continue;
        }
        let label = labels.map_or(*id, |labels| labels[at]);
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
