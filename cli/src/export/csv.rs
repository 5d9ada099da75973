//! Tables as comma-separated values (RFC 4180); what has no value is empty.

use super::place;
use super::table::{Cell, Column, Sheet};
use crate::Failure;
use serde_json::json;
use std::fs::File;
use std::path::{Path, PathBuf};

/// A CSV file.
pub(super) struct Csv {
    path: PathBuf,
    writer: csv::Writer<File>,
}

impl Csv {
    fn failed(&self) -> impl Fn(csv::Error) -> Failure {
        let path = self.path.display().to_string();
        move |error| Failure::failed(format!("{path}: {error}"))
    }

    /// Adds a row of texts.
    pub(super) fn texts<T: AsRef<[u8]>>(
        &mut self,
        cells: impl IntoIterator<Item = T>,
    ) -> Result<(), Failure> {
        self.writer.write_record(cells).map_err(self.failed())
    }
}

impl Sheet for Csv {
    const ENDING: &'static str = "csv";

    fn create(path: &Path, columns: &[Column]) -> Result<Self, Failure> {
        // The writer has a buffer of its own.
        let file = File::create(path).map_err(place::at(path))?;
        let mut sheet = Self { path: path.into(), writer: csv::Writer::from_writer(file) };
        sheet.texts(columns.iter().map(|column| column.name.as_bytes()))?;
        Ok(sheet)
    }

    fn row(&mut self, cells: &[Cell]) -> Result<(), Failure> {
        self.texts(cells.iter().map(text))
    }

    fn close(mut self) -> Result<(), Failure> {
        self.writer.flush().map_err(place::at(&self.path))
    }
}

/// A cell's text. Numbers read back as the same numbers.
fn text(cell: &Cell) -> String {
    match cell {
        Cell::None => String::new(),
        Cell::Text(text) => text.to_string(),
        Cell::Whole(number) => number.to_string(),
        Cell::Number(number) if number.is_finite() => json!(number).to_string(),
        // NaN, inf, -inf.
        Cell::Number(number) => number.to_string(),
        Cell::Flag(flag) => flag.to_string(),
        Cell::Time(time) => chrono::DateTime::from_timestamp_millis(time.0 as i64)
            .map_or_else(String::new, |t| t.format("%Y-%m-%dT%H:%M:%S%.3fZ").to_string()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use crate::export::table::Kind;
    use domain::Timestamp;

    #[test]
    fn every_kind_of_cell_reads_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.csv");
        let cells = [
            Cell::Text("a,b\n\"c\"".into()),
            Cell::None,
            Cell::Whole(-3),
            Cell::Number(0.1 + 0.2),
            Cell::Number(1e-300),
            Cell::Number(f64::NAN),
            Cell::Number(f64::NEG_INFINITY),
            Cell::Flag(true),
            Cell::Time(Timestamp(1_700_000_000_120)),
        ];
        let column = |n: usize| Column { name: format!("c{n}").into(), kind: Kind::Text };
        let columns: Vec<_> = (0..cells.len()).map(column).collect();
        let mut sheet = Csv::create(&path, &columns).unwrap();
        sheet.row(&cells).unwrap();
        sheet.close().unwrap();
        let mut reader = csv::Reader::from_path(&path).unwrap();
        assert_eq!(reader.headers().unwrap().len(), cells.len());
        let rows: Vec<_> = reader.records().map(Result::unwrap).collect();
        let want = [
            "a,b\n\"c\"",
            "",
            "-3",
            "0.30000000000000004",
            "1e-300",
            "NaN",
            "-inf",
            "true",
            "2023-11-14T22:13:20.120Z",
        ];
        assert_eq!(rows, [want.to_vec()]);
    }
}
