//! JSON Lines: one object a line.

use super::record::{Bad, Cell, Columns, Content, content};
use crate::error::{Result, TrainError};
use rayon::prelude::*;
use serde_json::{Map, Value};
use std::path::Path;

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// The file's rows, each with its line number (from 1). Blank lines are no rows.
///
/// # Errors
/// The file cannot be read.
pub fn read(path: &Path, columns: &Columns) -> Result<Vec<(usize, std::result::Result<Content, Bad>)>> {
    let bytes = std::fs::read(path).map_err(TrainError::io(path))?;
    let bytes = bytes.strip_prefix(BYTE_ORDER_MARK).unwrap_or(&bytes);
    let lines: Vec<_> = bytes
        .split(|byte| *byte == b'\n')
        .enumerate()
        .map(|(index, line)| (index + 1, line.trim_ascii()))
        .filter(|(_, line)| !line.is_empty())
        .collect();
    Ok(lines.into_par_iter().map(|(number, line)| (number, row(line, columns))).collect())
}

fn row(line: &[u8], columns: &Columns) -> std::result::Result<Content, Bad> {
    let line = std::str::from_utf8(line).map_err(|error| Bad::Row {
        problem: format!("is not UTF-8 (byte {})", error.valid_up_to() + 1),
        remedy: "save the file as UTF-8",
    })?;
    let no_row = |problem| Bad::Row { problem, remedy: "write one JSON object a line" };
    let value: Value = serde_json::from_str(line).map_err(|error| {
        let text = error.to_string();
        let what = text.split(" at line ").next().unwrap_or_default();
        no_row(format!("is no JSON: {what} at column {}", error.column()))
    })?;
    let Value::Object(mut object) = value else {
        return Err(no_row(format!("is no JSON object but {}", kind(&value))));
    };
    let names = object.keys().cloned().collect();
    content(columns, |name| take(&mut object, name), || names)
}

/// Takes a column out of a row (texts may be long).
fn take(object: &mut Map<String, Value>, name: &str) -> Option<Cell> {
    Some(match object.get_mut(name)?.take() {
        Value::String(text) => Cell::Text(text),
        Value::Array(items) => match items.iter().map(Value::as_i64).collect() {
            Some(numbers) => Cell::Numbers(numbers),
            None => Cell::Other("a list of other things than whole numbers"),
        },
        value => Cell::Other(kind(&value)),
    })
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}
