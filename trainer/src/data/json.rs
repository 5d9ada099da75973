//! JSON Lines (one object a line) and JSON (one array of objects).

use super::record::{Bad, Columns, Content, Value, content, kind};
use crate::error::{Result, TrainError};
use rayon::prelude::*;
use serde_json::Map;
use std::path::Path;

/// A row's columns, or why it is none.
pub type Object = std::result::Result<Map<String, Value>, Bad>;

const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// A file's rows, each with its line or its place in the array (from 1).
type Rows = Vec<(usize, std::result::Result<Content, Bad>)>;

/// A file's bytes without a byte order mark.
///
/// # Errors
/// The file cannot be read.
pub fn bytes(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = std::fs::read(path).map_err(TrainError::io(path))?;
    if bytes.starts_with(BYTE_ORDER_MARK) {
        bytes.drain(..BYTE_ORDER_MARK.len());
    }
    Ok(bytes)
}

/// Whether a file holds one array, and not a row a line.
pub fn is_array(bytes: &[u8]) -> bool {
    bytes.trim_ascii_start().starts_with(b"[")
}

/// The rows of JSON Lines. Blank lines are no rows.
pub fn lines(bytes: &[u8], columns: &Columns) -> Rows {
    line_objects(bytes).map(|(number, object)| (number, object.and_then(|o| row(o, columns)))).collect()
}

/// The objects of JSON Lines, each with its line (from 1).
pub fn line_objects(bytes: &[u8]) -> impl IndexedParallelIterator<Item = (usize, Object)> {
    let lines: Vec<_> = bytes
        .split(|byte| *byte == b'\n')
        .enumerate()
        .map(|(index, line)| (index + 1, line.trim_ascii()))
        .filter(|(_, line)| !line.is_empty())
        .collect();
    lines.into_par_iter().map(|(number, line)| (number, line_object(line)))
}

/// The rows of an array.
///
/// # Errors
/// It is no JSON.
pub fn array(path: &Path, bytes: &[u8], columns: &Columns) -> Result<Rows> {
    let objects = array_objects(path, bytes)?;
    Ok(objects.map(|(number, object)| (number, object.and_then(|o| row(o, columns)))).collect())
}

/// The objects of an array, each with its place (from 1).
///
/// # Errors
/// It is no JSON.
pub fn array_objects(
    path: &Path,
    bytes: &[u8],
) -> Result<impl IndexedParallelIterator<Item = (usize, Object)> + use<>> {
    let items: Vec<Value> = serde_json::from_slice(bytes).map_err(|error| {
        TrainError::data(
            path,
            format!("is no JSON array: {error}"),
            "write an array of objects, or JSON Lines",
        )
    })?;
    let row = |(index, item)| (index + 1, object(item, "write an array of JSON objects"));
    Ok(items.into_par_iter().enumerate().map(row))
}

fn line_object(line: &[u8]) -> Object {
    const REMEDY: &str = "write one JSON object a line";
    let line = std::str::from_utf8(line).map_err(|error| Bad::Row {
        problem: format!("is not UTF-8 (byte {})", error.valid_up_to() + 1),
        remedy: "save the file as UTF-8",
    })?;
    let value: Value = serde_json::from_str(line).map_err(|error| {
        let text = error.to_string();
        let what = text.split(" at line ").next().unwrap_or_default();
        Bad::Row { problem: format!("is no JSON: {what} at column {}", error.column()), remedy: REMEDY }
    })?;
    object(value, REMEDY)
}

fn object(value: Value, remedy: &'static str) -> Object {
    match value {
        Value::Object(object) => Ok(object),
        other => Err(Bad::Row { problem: format!("is no JSON object but {}", kind(&other)), remedy }),
    }
}

fn row(mut object: Map<String, Value>, columns: &Columns) -> std::result::Result<Content, Bad> {
    let names = object.keys().cloned().collect();
    content(columns, |name| take(&mut object, name), || names)
}

/// Takes a column out of a row (texts may be long).
fn take(object: &mut Map<String, Value>, name: &str) -> Option<Value> {
    Some(object.get_mut(name)?.take())
}
