//! Tables as Parquet files, for pandas, Polars, DuckDB and the like.

use super::place;
use super::table::{Cell, Column, Kind, Sheet};
use crate::Failure;
use parquet::basic::{Compression, LogicalType, Repetition, TimeUnit, Type as PhysicalType, ZstdLevel};
use parquet::data_type::{BoolType, ByteArray, ByteArrayType, DoubleType, Int64Type};
use parquet::errors::ParquetError;
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::types::Type;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Rows that are kept in memory and written together as a row group.
const GROUP_ROWS: usize = 1 << 17;

/// A Parquet file.
pub(super) struct Parquet {
    path: PathBuf,
    writer: SerializedFileWriter<File>,
    columns: Vec<Buffer>,
    rows: usize,
    /// Rows of a group.
    most: usize,
}

/// A column's cells since the last row group.
struct Buffer {
    values: Values,
    /// 1 for a cell with a value, 0 for one without.
    levels: Vec<i16>,
}

enum Values {
    Text(Vec<ByteArray>),
    Whole(Vec<i64>),
    Number(Vec<f64>),
    Flag(Vec<bool>),
}

impl Parquet {
    fn write_group(&mut self) -> Result<(), Failure> {
        let mut write = || -> Result<(), ParquetError> {
            let mut group = self.writer.next_row_group()?;
            for Buffer { values, levels } in &mut self.columns {
                let Some(mut column) = group.next_column()? else { break };
                match values {
                    Values::Text(values) => {
                        column.typed::<ByteArrayType>().write_batch(values, Some(levels.as_slice()), None)?;
                        values.clear();
                    }
                    Values::Whole(values) => {
                        column.typed::<Int64Type>().write_batch(values, Some(levels.as_slice()), None)?;
                        values.clear();
                    }
                    Values::Number(values) => {
                        column.typed::<DoubleType>().write_batch(values, Some(levels.as_slice()), None)?;
                        values.clear();
                    }
                    Values::Flag(values) => {
                        column.typed::<BoolType>().write_batch(values, Some(levels.as_slice()), None)?;
                        values.clear();
                    }
                }
                levels.clear();
                column.close()?;
            }
            group.close().map(drop)
        };
        write().map_err(failed(&self.path))?;
        self.rows = 0;
        Ok(())
    }
}

fn failed(path: &Path) -> impl Fn(ParquetError) -> Failure {
    move |error| Failure::failed(format!("{}: {error}", path.display()))
}

/// A column as the schema has it. Any cell may be without a value.
fn field(column: &Column) -> Result<Arc<Type>, ParquetError> {
    let (physical, logical) = match column.kind {
        Kind::Text => (PhysicalType::BYTE_ARRAY, Some(LogicalType::String)),
        Kind::Whole => (PhysicalType::INT64, None),
        Kind::Number => (PhysicalType::DOUBLE, None),
        Kind::Flag => (PhysicalType::BOOLEAN, None),
        Kind::Time => (PhysicalType::INT64, Some(LogicalType::timestamp(true, TimeUnit::MILLIS))),
    };
    let builder = Type::primitive_type_builder(&column.name, physical).with_repetition(Repetition::OPTIONAL);
    builder.with_logical_type(logical).build().map(Arc::new)
}

impl Sheet for Parquet {
    const ENDING: &'static str = "parquet";

    fn create(path: &Path, columns: &[Column]) -> Result<Self, Failure> {
        let file = File::create(path).map_err(place::at(path))?;
        let open = || -> Result<_, ParquetError> {
            let fields = columns.iter().map(field).collect::<Result<_, _>>()?;
            let schema = Type::group_type_builder("schema").with_fields(fields).build()?;
            let zstd = Compression::ZSTD(ZstdLevel::default());
            let properties = WriterProperties::builder().set_compression(zstd).build();
            SerializedFileWriter::new(file, Arc::new(schema), Arc::new(properties))
        };
        let buffer = |column: &Column| {
            let values = match column.kind {
                Kind::Text => Values::Text(Vec::new()),
                Kind::Whole | Kind::Time => Values::Whole(Vec::new()),
                Kind::Number => Values::Number(Vec::new()),
                Kind::Flag => Values::Flag(Vec::new()),
            };
            Buffer { values, levels: Vec::new() }
        };
        let writer = open().map_err(failed(path))?;
        Ok(Self {
            path: path.into(),
            writer,
            columns: columns.iter().map(buffer).collect(),
            rows: 0,
            most: GROUP_ROWS,
        })
    }

    fn row(&mut self, cells: &[Cell]) -> Result<(), Failure> {
        for (Buffer { values, levels }, cell) in self.columns.iter_mut().zip(cells) {
            let given = match (values, cell) {
                (_, Cell::None) => false,
                (Values::Text(values), Cell::Text(text)) => {
                    values.push(ByteArray::from(text.as_ref()));
                    true
                }
                (Values::Whole(values), Cell::Whole(number)) => {
                    values.push(*number);
                    true
                }
                (Values::Whole(values), Cell::Time(time)) => {
                    values.push(i64::try_from(time.0).unwrap_or(i64::MAX));
                    true
                }
                (Values::Number(values), Cell::Number(number)) => {
                    values.push(*number);
                    true
                }
                (Values::Flag(values), Cell::Flag(flag)) => {
                    values.push(*flag);
                    true
                }
                (_, other) => {
                    let problem = format!("{other:?} in a column of another kind: a bug of lorafleet's");
                    return Err(Failure::failed(format!("{}: {problem}", self.path.display())));
                }
            };
            levels.push(given.into());
        }
        self.rows += 1;
        if self.rows == self.most { self.write_group() } else { Ok(()) }
    }

    fn close(mut self) -> Result<(), Failure> {
        if self.rows > 0 {
            self.write_group()?;
        }
        self.writer.close().map(drop).map_err(failed(&self.path))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use domain::Timestamp;
    use parquet::file::reader::{FileReader, SerializedFileReader};
    use parquet::record::Field;

    #[test]
    fn every_kind_of_cell_reads_back() {
        let dir = tempfile::tempdir().unwrap();
        let kinds = [Kind::Text, Kind::Whole, Kind::Number, Kind::Flag, Kind::Time];
        let column = |(n, kind): (usize, &Kind)| Column { name: format!("c{n}").into(), kind: *kind };
        let columns: Vec<_> = kinds.iter().enumerate().map(column).collect();
        let rows = 101;
        let write = |name: &str, rows: usize| {
            let path = dir.path().join(name);
            let mut sheet = Parquet::create(&path, &columns).unwrap();
            sheet.most = 100;
            for n in 0..rows {
                sheet
                    .row(&match n % 2 {
                        0 => [
                            Cell::Text(format!("é{n}").into()),
                            Cell::Whole(n as i64 - 1),
                            Cell::Number(n as f64 / 3.0),
                            Cell::Flag(n % 4 == 0),
                            Cell::Time(Timestamp(1_700_000_000_000 + n as u64)),
                        ],
                        _ => [const { Cell::None }; 5],
                    })
                    .unwrap();
            }
            sheet.close().unwrap();
            path
        };
        let path = write("x.parquet", rows);
        let reader = SerializedFileReader::new(File::open(&path).unwrap()).unwrap();
        assert_eq!(reader.metadata().num_row_groups(), 2);
        let mut seen = 0;
        for (n, row) in reader.get_row_iter(None).unwrap().enumerate() {
            let row = row.unwrap();
            let fields: Vec<_> = row.get_column_iter().map(|(_, field)| field.clone()).collect();
            if n % 2 == 0 {
                assert_eq!(
                    fields,
                    [
                        Field::Str(format!("é{n}")),
                        Field::Long(n as i64 - 1),
                        Field::Double(n as f64 / 3.0),
                        Field::Bool(n % 4 == 0),
                        Field::TimestampMillis(1_700_000_000_000 + n as i64),
                    ]
                );
            } else {
                assert_eq!(fields, [const { Field::Null }; 5]);
            }
            seen += 1;
        }
        assert_eq!(seen, rows);
        let again = write("y.parquet", rows);
        assert_eq!(std::fs::read(path).unwrap(), std::fs::read(again).unwrap());
        let empty = SerializedFileReader::new(File::open(write("z.parquet", 0)).unwrap()).unwrap();
        assert_eq!(empty.metadata().file_metadata().num_rows(), 0);
    }

    #[test]
    fn a_cell_of_another_kind_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let columns = [Column { name: "c".into(), kind: Kind::Flag }];
        let mut sheet = Parquet::create(&dir.path().join("x.parquet"), &columns).unwrap();
        assert!(sheet.row(&[Cell::Whole(1)]).is_err());
    }
}
