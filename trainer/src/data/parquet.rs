//! Parquet files, by the record interface (no Arrow).

use super::record::{Bad, Columns, Content, Value, content, counts};
use crate::error::{Result, TrainError};
use ::parquet::errors::ParquetError;
use ::parquet::file::reader::{FileReader, SerializedFileReader};
use ::parquet::record::Field;
use ::parquet::schema::types::Type;
use serde_json::Map;
use std::panic::AssertUnwindSafe;
use std::path::Path;

/// A file's rows, each with its number (from 1).
type Rows = Vec<(usize, std::result::Result<Content, Bad>)>;

/// The file's rows.
///
/// # Errors
/// The file cannot be read, is damaged or is no Parquet file.
pub fn read(path: &Path, columns: &Columns) -> Result<Rows> {
    // Nothing outlives a panic but the columns, which no one changes. The record interface believes what a file says of itself, and panics where a damaged one misleads it.
    std::panic::catch_unwind(AssertUnwindSafe(|| read_rows(path, columns)))
        .unwrap_or_else(|_| Err(damaged(path)))
}

/// The file's rows with all their columns.
///
/// # Errors
/// Those of [`read`].
pub fn objects(path: &Path) -> Result<Vec<Map<String, Value>>> {
    let read = || {
        let reader = open(path)?;
        let rows = reader.get_row_iter(None).map_err(|error| unreadable(path, 1, &error))?;
        let row = |(index, row): (usize, std::result::Result<::parquet::record::Row, _>)| {
            let row = row.map_err(|error| unreadable(path, index + 1, &error))?;
            Ok(row.get_column_iter().map(|(name, field)| (name.clone(), cell(field))).collect())
        };
        rows.enumerate().map(row).collect()
    };
    std::panic::catch_unwind(read).unwrap_or_else(|_| Err(damaged(path)))
}

fn damaged(path: &Path) -> TrainError {
    TrainError::data(path, "is damaged", "copy or write the file again")
}

fn unreadable(path: &Path, row: usize, error: &ParquetError) -> TrainError {
    let remedy = "write the file again, uncompressed or with snappy, gzip or zstd";
    TrainError::data(path, format!("row {row} cannot be read: {error}"), remedy)
}

fn open(path: &Path) -> Result<SerializedFileReader<std::fs::File>> {
    let file = std::fs::File::open(path).map_err(TrainError::io(path))?;
    SerializedFileReader::new(file).map_err(|error| {
        TrainError::data(path, format!("is no Parquet file: {error}"), "copy or write the file again")
    })
}

fn read_rows(path: &Path, columns: &Columns) -> Result<Rows> {
    let reader = open(path)?;
    let unreadable = |row: usize, error: ParquetError| unreadable(path, row, &error);
    let schema = reader.metadata().file_metadata().schema();
    let names: Vec<_> = schema.get_fields().iter().map(|field| field.name().to_owned()).collect();
    let wanted = schema.get_fields().iter().filter(|field| counts(columns, field.name()));
    let wanted: Vec<_> = wanted.cloned().collect();
    if wanted.is_empty() {
        let rows = reader.metadata().file_metadata().num_rows().max(0) as usize;
        return Ok((1..=rows).map(|row| (row, Err(Bad::NoColumn(names.clone())))).collect());
    }
    let projection = Type::group_type_builder(schema.name()).with_fields(wanted).build();
    let rows = projection.and_then(|projection| reader.get_row_iter(Some(projection)));
    let rows = rows.map_err(|error| unreadable(1, error))?;
    let row = |(index, row): (usize, std::result::Result<::parquet::record::Row, _>)| {
        let row = row.map_err(|error| unreadable(index + 1, error))?;
        let column =
            |name: &str| row.get_column_iter().find(|(n, _)| *n == name).map(|(_, field)| cell(field));
        Ok((index + 1, content(columns, column, || names.clone())))
    };
    rows.enumerate().map(row).collect()
}

fn cell(field: &Field) -> Value {
    match field {
        Field::Null => Value::Null,
        Field::Bool(value) => Value::Bool(*value),
        Field::Str(text) => Value::String(text.clone()),
        // A string column that its writer did not mark as one.
        Field::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
            Ok(text) => Value::String(text.to_owned()),
            Err(_) => Value::Array(bytes.data().iter().map(|byte| (*byte).into()).collect()),
        },
        Field::ListInternal(list) => Value::Array(list.elements().iter().map(cell).collect()),
        Field::Group(row) => {
            Value::Object(row.get_column_iter().map(|(name, field)| (name.clone(), cell(field))).collect())
        }
        Field::Byte(n) => (*n).into(),
        Field::Short(n) => (*n).into(),
        Field::Int(n) => (*n).into(),
        Field::Long(n) => (*n).into(),
        Field::UByte(n) => (*n).into(),
        Field::UShort(n) => (*n).into(),
        Field::UInt(n) => (*n).into(),
        Field::ULong(n) => (*n).into(),
        Field::Float16(n) => f32::from(*n).into(),
        Field::Float(n) => (*n).into(),
        Field::Double(n) => (*n).into(),
        other => Value::String(other.to_string()),
    }
}
