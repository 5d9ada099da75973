//! Parquet files.

use crate::{all_of, ids, input_ids, load};
use domain::trial::TrialConfig;
use parquet::basic::{Compression, ZstdLevel};
use parquet::data_type::{ByteArray, ByteArrayType, Int64Type};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use std::fs;
use std::path::Path;
use std::sync::Arc;

/// Writes columns that a Parquet file may have: `text` (with a null), `raw` (bytes without the mark of a string),
/// `n`, `input_ids`: two rows in each of the row groups.
fn write_parquet(path: &Path, compression: Compression, groups: usize) {
    let schema = "message schema { optional binary text (UTF8); required binary raw; required int64 n;
                  optional group input_ids (LIST) { repeated group list { optional int64 element; } } }";
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let properties = Arc::new(WriterProperties::builder().set_compression(compression).build());
    let mut writer = SerializedFileWriter::new(fs::File::create(path).unwrap(), schema, properties).unwrap();
    for _ in 0..groups {
        let mut group = writer.next_row_group().unwrap();
        let text = |values: &[&str]| values.iter().map(|v| ByteArray::from(*v)).collect::<Vec<_>>();
        let mut index = 0;
        while let Some(mut column) = group.next_column().unwrap() {
            match index {
                0 => column.typed::<ByteArrayType>().write_batch(&text(&["é"]), Some(&[1, 0]), None),
                1 => column.typed::<ByteArrayType>().write_batch(&text(&["x", "yz"]), None, None),
                2 => column.typed::<Int64Type>().write_batch(&[7, 8], None, None),
                _ => column.typed::<Int64Type>().write_batch(&[5, 6, 9], Some(&[3, 3, 3]), Some(&[0, 1, 0])),
            }
            .unwrap();
            column.close().unwrap();
            index += 1;
        }
        group.close().unwrap();
    }
    writer.close().unwrap();
}

#[test]
fn parquet_files() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.parquet");
    let config = |column: &str, skip_bad_rows| TrialConfig {
        instruct_column_in_dataset: column.into(),
        skip_bad_rows,
        ..all_of(&path)
    };
    let zstd = Compression::ZSTD(ZstdLevel::default());
    for compression in
        [Compression::UNCOMPRESSED, Compression::SNAPPY, Compression::GZIP(Default::default()), zstd]
    {
        write_parquet(&path, compression, 1);
        let dataset = load(&config("text", true)).unwrap();
        assert_eq!((input_ids(&dataset.train), dataset.skipped_rows), (vec![ids("é")], 1));
        assert_eq!(input_ids(&load(&config("raw", false)).unwrap().train), [ids("x"), ids("yz")]);
        for column in ["input_ids", "nothing of the kind"] {
            assert_eq!(input_ids(&load(&config(column, false)).unwrap().train), [vec![5, 6], vec![9]]);
        }
    }
    for (column, words) in [
        (
            "text",
            "a.parquet: row 2: column `text` holds null, not text; correct the row, or leave bad rows out",
        ),
        ("n", "a.parquet: row 1: column `n` holds a number, not text"),
    ] {
        let error = load(&config(column, false)).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    // A missing column is named beside those that the file has.
    let mut writer = SerializedFileWriter::new(
        fs::File::create(&path).unwrap(),
        Arc::new(parse_message_type("message schema { required binary txt (UTF8); }").unwrap()),
        Default::default(),
    )
    .unwrap();
    let mut group = writer.next_row_group().unwrap();
    let mut column = group.next_column().unwrap().unwrap();
    column.typed::<ByteArrayType>().write_batch(&[ByteArray::from("x")], None, None).unwrap();
    column.close().unwrap();
    group.close().unwrap();
    writer.close().unwrap();
    for skip_bad_rows in [false, true] {
        let error = load(&config("text", skip_bad_rows)).unwrap_err().to_string();
        assert!(error.contains("a.parquet: row 1: has no column `text`"), "{error}");
        assert!(
            error.ends_with(
                "it has `txt`; did you mean `txt`? name the text's column with instruct_column_in_dataset"
            ),
            "{error}"
        );
    }
    // A file whose end is missing.
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 3]).unwrap();
    let error = load(&config("txt", false)).unwrap_err().to_string();
    assert!(error.contains("a.parquet: is no Parquet file: "), "{error}");
}

#[test]
fn row_groups_follow_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.parquet");
    write_parquet(&path, Compression::SNAPPY, 3);
    let config = TrialConfig { instruct_column_in_dataset: "raw".into(), ..all_of(&path) };
    assert_eq!(input_ids(&load(&config).unwrap().train), vec![[ids("x"), ids("yz")]; 3].concat());
    let config = TrialConfig { skip_bad_rows: true, ..all_of(&path) };
    assert_eq!(load(&config).unwrap().skipped_rows, 3);
}

#[test]
fn damaged_files_bring_nothing_down() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.parquet");
    write_parquet(&path, Compression::SNAPPY, 1);
    let good = fs::read(&path).unwrap();
    for column in ["text", "input_ids"] {
        let config = TrialConfig { instruct_column_in_dataset: column.into(), ..all_of(&path) };
        for at in (0..good.len()).step_by(5) {
            let mut bytes = good.clone();
            bytes[at] ^= 0xff;
            fs::write(&path, &bytes).unwrap();
            // Damage inside a text cannot be told from another text.
            if let Err(error) = load(&config) {
                let error = error.to_string();
                assert!(
                    error.contains("a.parquet: ") || error.contains("no training row"),
                    "byte {at}: {error}"
                );
            }
        }
    }
}
