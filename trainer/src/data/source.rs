//! Which files a data set's name means, and all their rows, good and bad.

use super::record::{Bad, Columns, Content};
use super::{jsonl, parquet};
use crate::error::{Result, TrainError};
use crate::locate;
use std::path::{Path, PathBuf};

/// A data set's rows.
#[derive(Debug)]
pub struct Found {
    /// The rows that can be used, in the files' order.
    pub rows: Vec<Content>,
    /// How many cannot.
    pub skipped: u64,
    /// The files that were read, by name.
    pub files: Vec<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Format {
    JsonLines,
    Parquet,
}

impl Format {
    fn of(path: &Path) -> Option<Self> {
        match path.extension()?.to_str()?.to_ascii_lowercase().as_str() {
            "jsonl" => Some(Self::JsonLines),
            "parquet" => Some(Self::Parquet),
            _ => None,
        }
    }
}

/// Reads the file or directory that the parameter `key` names.
///
/// # Errors
/// There is no such file, it is of another kind, it has no rows or none that can be used; a row is bad and bad
/// rows are not to be skipped.
pub fn read(key: &'static str, name: &str, columns: &Columns, skip_bad_rows: bool) -> Result<Found> {
    let files = files(key, name)?;
    let (mut rows, mut bad) = (Vec::new(), Vec::new());
    for (index, (path, format)) in files.iter().enumerate() {
        let read = match format {
            Format::JsonLines => jsonl::read(path, columns)?,
            Format::Parquet => parquet::read(path, columns)?,
        };
        for (number, row) in read {
            match row {
                Ok(row) => rows.push(row),
                Err(problem) => bad.push((index, number, problem)),
            }
        }
    }
    // If no row can be used, the missing column is the likelier cause.
    let worst = match rows.is_empty() {
        true => bad.iter().find(|(_, _, bad)| matches!(bad, Bad::NoColumn(_))).or(bad.first()),
        false => bad.first().filter(|_| !skip_bad_rows),
    };
    if let Some((index, number, problem)) = worst {
        let (path, format) = &files[*index];
        return Err(error(path, *format, *number, problem, columns.text, rows.is_empty()));
    }
    if rows.is_empty() {
        return Err(TrainError::data(
            Path::new(name),
            "has no rows",
            format!("give {key} a data set with rows"),
        ));
    }
    let files = files.into_iter().map(|(path, _)| path).collect();
    Ok(Found { rows, skipped: bad.len() as u64, files })
}

/// The file itself, or a directory's data files by name.
fn files(key: &'static str, name: &str) -> Result<Vec<(PathBuf, Format)>> {
    let remedy = || format!("give {key} a .jsonl or .parquet file, or a directory of them");
    if name.is_empty() {
        return Err(TrainError::parameter(key, "is not given", remedy()));
    }
    let path = locate::dataset(key, name)?;
    let path = path.as_path();
    let about = std::fs::metadata(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => TrainError::data(path, "does not exist", remedy()),
        _ => TrainError::io(path)(error),
    })?;
    if !about.is_dir() {
        let format = Format::of(path)
            .ok_or_else(|| TrainError::data(path, "is neither a .jsonl nor a .parquet file", remedy()))?;
        return Ok(vec![(path.to_owned(), format)]);
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(TrainError::io(path))? {
        let file = entry.map_err(TrainError::io(path))?.path();
        files.extend(Format::of(&file).filter(|_| file.is_file()).map(|format| (file, format)));
    }
    files.sort_by(|a, b| a.0.cmp(&b.0));
    match files.is_empty() {
        true => Err(TrainError::data(path, "is a directory without .jsonl or .parquet files", remedy())),
        false => Ok(files),
    }
}

/// The error for a bad row; `alone` if no row of the data set can be used.
fn error(path: &Path, format: Format, number: usize, bad: &Bad, column: &str, alone: bool) -> TrainError {
    let (path, row) = match format {
        Format::JsonLines => (PathBuf::from(format!("{}:{number}", path.display())), String::new()),
        Format::Parquet => (path.to_owned(), format!("row {number}: ")),
    };
    let (problem, mut remedy) = match bad {
        Bad::Row { problem, remedy } => (problem.clone(), (*remedy).to_owned()),
        Bad::NoColumn(names) => missing_column(column, names),
    };
    match alone {
        true if matches!(bad, Bad::Row { .. }) => remedy += " (no row of the data set can be used)",
        true => {}
        false => remedy += ", or leave bad rows out with skip_bad_rows",
    }
    TrainError::data(&path, format!("{row}{problem}"), remedy)
}

fn missing_column(column: &str, names: &[String]) -> (String, String) {
    const SHOWN: usize = 12;
    let mut near: Vec<_> =
        names.iter().map(|name| (strsim::damerau_levenshtein(column, name), name)).collect();
    near.sort();
    let has = match near.is_empty() {
        true => "no columns at all".to_owned(),
        false => {
            let more = if near.len() > SHOWN { ", …" } else { "" };
            let shown: Vec<_> = near.iter().take(SHOWN).map(|(_, name)| format!("`{name}`")).collect();
            format!("{}{more}", shown.join(", "))
        }
    };
    let guess = near.first().filter(|(distance, _)| *distance <= (column.chars().count() / 2).max(1));
    let guess = guess.map_or(String::new(), |(_, name)| format!("did you mean `{name}`? "));
    let problem = format!("has no column `{column}` (and no `input_ids`); it has {has}");
    (problem, format!("{guess}name the text's column with instruct_column_in_dataset"))
}
