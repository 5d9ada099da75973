//! Which files a data set's name means, which of them are held out, and all their rows, good and bad.

use super::record::{Bad, Columns, Content, OTHER_FORMS, Value};
use super::{json, parquet};
use crate::error::{Result, TrainError};
use crate::locate;
use rayon::prelude::*;
use serde_json::Map;
use std::path::{Path, PathBuf};

/// A file of rows.
#[derive(Debug)]
pub struct DataFile {
    /// Where it lies.
    pub path: PathBuf,
    format: Format,
}

/// A data set's files.
#[derive(Debug, Default)]
pub struct Found {
    /// The files to train on, by name.
    pub train: Vec<DataFile>,
    /// The files of a directory that are held out by their names.
    pub held_out: Vec<DataFile>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Format {
    JsonLines,
    Json,
    Parquet,
}

impl Format {
    fn of(path: &Path) -> Option<Self> {
        match path.extension()?.to_str()?.to_ascii_lowercase().as_str() {
            "jsonl" => Some(Self::JsonLines),
            "json" => Some(Self::Json),
            "parquet" => Some(Self::Parquet),
            _ => None,
        }
    }
}

/// A bad row: its file's place, how rows are numbered there, and its number.
type Place = (usize, Numbers, usize);

/// How the rows of a file are numbered.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Numbers {
    Lines,
    Rows,
}

/// Reads files that the parameter `key` names: their rows in order, and how many were left out.
///
/// # Errors
/// A file is of another kind than its name says; there are no rows or none that can be used; a row is bad and bad
/// rows are not to be skipped.
pub fn read(
    key: &'static str,
    files: &[DataFile],
    columns: &Columns,
    skip_bad_rows: bool,
) -> Result<(Vec<Content>, u64)> {
    let mut rows = Vec::new();
    let mut bad: Vec<(Place, Bad)> = Vec::new();
    for (index, DataFile { path, format }) in files.iter().enumerate() {
        let (numbers, read) = match format {
            Format::JsonLines => (Numbers::Lines, json::lines(&json::bytes(path)?, columns)),
            // Many a .json file on the hub holds JSON Lines.
            Format::Json => match json::bytes(path)? {
                bytes if json::is_array(&bytes) => (Numbers::Rows, json::array(path, &bytes, columns)?),
                bytes => (Numbers::Lines, json::lines(&bytes, columns)),
            },
            Format::Parquet => (Numbers::Rows, parquet::read(path, columns)?),
        };
        for (number, row) in read {
            match row {
                Ok(row) => rows.push(row),
                Err(problem) => bad.push(((index, numbers, number), problem)),
            }
        }
    }
    // If no row can be used, the missing column is the likelier cause.
    let worst = match rows.is_empty() {
        true => bad.iter().find(|(_, bad)| matches!(bad, Bad::NoColumn(_))).or(bad.first()),
        false => bad.first().filter(|_| !skip_bad_rows),
    };
    if let Some(((index, numbers, number), problem)) = worst {
        return Err(error(&files[*index].path, *numbers, *number, problem, columns.text, rows.is_empty()));
    }
    if rows.is_empty() {
        let path = match files {
            [file] => file.path.as_path(),
            several => several.first().and_then(|file| file.path.parent()).unwrap_or(Path::new("")),
        };
        return Err(TrainError::data(path, "has no rows", format!("give {key} a data set with rows")));
    }
    Ok((rows, bad.len() as u64))
}

/// The file itself, or a directory's data files by name. Where some of them are called after a split (`train-0.parquet`,
/// `rows_train.jsonl`), those to train on are these, and those called `validation` or, without one, `test` are held out.
///
/// # Errors
/// There is no such file, or it is of another kind.
pub fn find(key: &'static str, name: &str) -> Result<Found> {
    let remedy = || format!("give {key} a .jsonl, .json or .parquet file, or a directory of them");
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
            .ok_or_else(|| TrainError::data(path, "is no .jsonl, .json or .parquet file", remedy()))?;
        return Ok(Found { train: vec![DataFile { path: path.to_owned(), format }], ..Found::default() });
    }
    let mut files = Vec::new();
    for entry in std::fs::read_dir(path).map_err(TrainError::io(path))? {
        let path = entry.map_err(TrainError::io(path))?.path();
        // Hidden ones are some system's own, such as macOS's `._train.jsonl`.
        let is_hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        let format = Format::of(&path).filter(|_| path.is_file() && !is_hidden);
        files.extend(format.map(|format| DataFile { path, format }));
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    match files.is_empty() {
        true => {
            Err(TrainError::data(path, "is a directory without .jsonl, .json or .parquet files", remedy()))
        }
        false => Ok(by_split(files)),
    }
}

/// The part of a data set that a file's name says it is.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Split {
    Train,
    Validation,
    Test,
}

impl Split {
    fn of(path: &Path) -> Option<Self> {
        let name = path.file_stem()?.to_str()?.to_lowercase();
        name.split(|c: char| !c.is_alphanumeric()).find_map(|word| match word {
            "train" | "training" => Some(Self::Train),
            "validation" | "valid" | "val" | "dev" | "eval" => Some(Self::Validation),
            "test" | "testing" => Some(Self::Test),
            _ => None,
        })
    }
}

/// A directory's files by split; all of them to train on if none is called after training.
fn by_split(files: Vec<DataFile>) -> Found {
    let split = |file: &DataFile| Split::of(&file.path);
    if !files.iter().any(|file| split(file) == Some(Split::Train)) {
        return Found { train: files, held_out: Vec::new() };
    }
    let has_validation = files.iter().any(|file| split(file) == Some(Split::Validation));
    let held_out = if has_validation { Split::Validation } else { Split::Test };
    let mut found = Found::default();
    for file in files {
        match split(&file) {
            Some(Split::Train) => found.train.push(file),
            Some(other) if other == held_out => found.held_out.push(file),
            _ => {}
        }
    }
    found
}

/// All rows of a .jsonl, .json or .parquet file with all their columns, as they stand there.
///
/// # Errors
/// The file cannot be read or is of another kind than its name says; a row is no object.
pub fn objects(path: &Path) -> Result<Vec<Map<String, Value>>> {
    let (numbers, rows): (_, Vec<(usize, json::Object)>) = match Format::of(path) {
        None => {
            let remedy = "name a .jsonl, .json or .parquet file";
            return Err(TrainError::data(path, "is no .jsonl, .json or .parquet file", remedy));
        }
        Some(Format::Parquet) => return parquet::objects(path),
        Some(format) => match json::bytes(path)? {
            bytes if format == Format::Json && json::is_array(&bytes) => {
                (Numbers::Rows, json::array_objects(path, &bytes)?.collect())
            }
            bytes => (Numbers::Lines, json::line_objects(&bytes).collect()),
        },
    };
    let row = |(number, row): (usize, json::Object)| {
        row.map_err(|bad| {
            let (place, row) = place(path, numbers, number);
            match bad {
                Bad::Row { problem, remedy } => TrainError::data(&place, format!("{row}{problem}"), remedy),
                Bad::NoColumn(_) => {
                    TrainError::data(&place, format!("{row}has no columns"), "correct the row")
                }
            }
        })
    };
    rows.into_iter().map(row).collect()
}

/// A row's place: the file with its line, or the file and words for its number.
fn place(path: &Path, numbers: Numbers, number: usize) -> (PathBuf, String) {
    match numbers {
        Numbers::Lines => (PathBuf::from(format!("{}:{number}", path.display())), String::new()),
        Numbers::Rows => (path.to_owned(), format!("row {number}: ")),
    }
}

/// The error for a bad row; `alone` if no row of the data set can be used.
fn error(path: &Path, numbers: Numbers, number: usize, bad: &Bad, column: &str, alone: bool) -> TrainError {
    let (path, row) = place(path, numbers, number);
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
    let problem = format!("has no column `{column}` (and neither {OTHER_FORMS}); it has {has}");
    (problem, format!("{guess}name the text's column with instruct_column_in_dataset"))
}
