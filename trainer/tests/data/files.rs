//! JSON Lines, and what every kind of data file has in common.

use crate::{BOS, all_of, directory, ids, input_ids, letter, load};
use domain::trial::TrialConfig;
use proptest::prelude::*;

/// A row of the tables below: a file of this name with these bytes gives these rows and skips so many.
type Good<'a> = (&'a str, &'a [u8], fn(&mut TrialConfig), Vec<Vec<u32>>, u64);

#[test]
fn files_that_can_be_read() {
    let rows: Vec<Good> = vec![
        ("a.jsonl", b"{\"text\": \"x\"}\n{\"text\": \"yz\"}\n", |_| {}, vec![ids("x"), ids("yz")], 0),
        ("no-end.jsonl", b"{\"text\": \"x\"}", |_| {}, vec![ids("x")], 0),
        (
            "windows.JSONL",
            b"\xef\xbb\xbf{\"text\": \"x\\n\"}\r\n\r\n{\"text\": \"y\"}\r\n",
            |_| {},
            vec![ids("x\n"), ids("y")],
            0,
        ),
        ("blank.jsonl", b"\n  \n{\"text\": \"x\"}\n\t\n", |_| {}, vec![ids("x")], 0),
        ("empty-text.jsonl", b"{\"text\": \"\"}\n{\"text\": \"x\"}", |_| {}, vec![ids(""), ids("x")], 0),
        ("wide.jsonl", "{\"text\": \"é🙂\", \"n\": 1}".as_bytes(), |_| {}, vec![ids("é🙂")], 0),
        (
            "column.jsonl",
            b"{\"q\": \"x\", \"text\": 7}",
            |c| c.instruct_column_in_dataset = "q".into(),
            vec![ids("x")],
            0,
        ),
        ("no-eos.jsonl", b"{\"text\": \"x\"}", |c| c.add_eos = false, vec![vec![BOS, letter('x')]], 0),
        ("own-eos.jsonl", b"{\"text\": \"x</s>\"}", |_| {}, vec![ids("x")], 0),
        (
            "cut.jsonl",
            b"{\"text\": \"xyz\"}",
            |c| c.max_sequence_length = 3,
            vec![ids("xy")[..3].to_vec()],
            0,
        ),
        (
            "skipped.jsonl",
            b"{\n{\"text\": \"x\"}\n[1]\n\xff\n{\"txet\": \"y\"}\n{\"text\": null}",
            |c| c.skip_bad_rows = true,
            vec![ids("x")],
            5,
        ),
        (
            "tokens.jsonl",
            b"{\"input_ids\": [5, 6, 7]}\n{\"input_ids\": [8, 9], \"labels\": null}",
            |_| {},
            vec![vec![5, 6, 7], vec![8, 9]],
            0,
        ),
        ("both.jsonl", b"{\"input_ids\": [5, 6], \"text\": \"x\"}", |_| {}, vec![ids("x")], 0),
        (
            "named.jsonl",
            b"{\"input_ids\": [5, 6], \"text\": \"x\"}",
            |c| c.instruct_column_in_dataset = "input_ids".into(),
            vec![vec![5, 6]],
            0,
        ),
        (
            "padded.jsonl",
            b"{\"input_ids\": [0, 5, 6, 0], \"attention_mask\": [0, 1, 1, 0]}",
            |_| {},
            vec![vec![5, 6]],
            0,
        ),
    ];
    for (name, bytes, change, want, skipped) in rows {
        let dir = directory(&[(name, bytes)]);
        let mut config = all_of(&dir.path().join(name));
        change(&mut config);
        let dataset = load(&config).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(input_ids(&dataset.train), want, "{name}");
        assert_eq!(dataset.skipped_rows, skipped, "{name}");
        let truncated = u64::from(name == "cut.jsonl");
        assert_eq!(dataset.truncated_rows, truncated, "{name}");
    }
}

/// A file of this name with these bytes is refused, with an error that says these words.
type Refused<'a> = (&'a str, &'a [u8], fn(&mut TrialConfig), &'a [&'a str]);

#[test]
fn files_that_are_refused() {
    let good = "{\"text\": \"x\"}\n";
    let second = |line: &str| format!("{good}{line}\n{good}").into_bytes();
    const LEAVE: &str = "or leave bad rows out with skip_bad_rows";
    let (not_json, cut, list, number, null, other, near) = (
        second("text"),
        second("{\"text\": \"x"),
        second("[\"x\"]"),
        second("{\"text\": 7}"),
        second("{\"text\": null}"),
        second("{\"instruction\": \"x\"}"),
        second("{\"Text\": \"x\", \"id\": 1}"),
    );
    let rows: Vec<Refused> = vec![
        (
            "a.jsonl",
            &not_json,
            |_| {},
            &["a.jsonl:2: is no JSON: ", " at column 2; write one JSON object a line, ", LEAVE],
        ),
        ("a.jsonl", &cut, |_| {}, &["a.jsonl:2: is no JSON: EOF while parsing a string at column 11; "]),
        (
            "a.jsonl",
            &list,
            |_| {},
            &["a.jsonl:2: is no JSON object but a list; write one JSON object a line", LEAVE],
        ),
        (
            "a.jsonl",
            &number,
            |_| {},
            &["a.jsonl:2: column `text` holds a number, not text; correct the row, ", LEAVE],
        ),
        ("a.jsonl", &null, |_| {}, &["a.jsonl:2: column `text` holds null, not text; correct the row, "]),
        (
            "a.jsonl",
            &other,
            |_| {},
            &[
                "a.jsonl:2: has no column `text` (and neither `messages`, `prompt` and `completion`, `instruction` and `output`, nor `input_ids`); it has `instruction`; ",
                LEAVE,
            ],
        ),
        (
            "a.jsonl",
            &near,
            |_| {},
            &[
                "a.jsonl:2: has no column `text`",
                "; it has `Text`, `id`; did you mean `Text`? name the text's column with instruct_column_in_dataset, ",
            ],
        ),
        (
            "a.jsonl",
            b"{\"text\": \"\xe9\"}",
            |_| {},
            &["a.jsonl:1: is not UTF-8 (byte 11); save the file as UTF-8"],
        ),
        (
            "a.jsonl",
            b"\n\n{}",
            |_| {},
            &["a.jsonl:3: has no column `text`", "it has no columns at all; name the text's column"],
        ),
        (
            "a.jsonl",
            b"{\"t\": 1}\n{",
            |c| c.skip_bad_rows = true,
            &["a.jsonl:1: has no column `text`", "it has `t`"],
        ),
        ("a.jsonl", b"{\n{\"t\": 1}", |c| c.skip_bad_rows = true, &["a.jsonl:2: has no column `text`"]),
        (
            "a.jsonl",
            b"{\n7",
            |c| c.skip_bad_rows = true,
            &["a.jsonl:1: is no JSON", "(no row of the data set can be used)"],
        ),
        ("a.jsonl", b"", |_| {}, &["a.jsonl: has no rows; give dataset_name a data set with rows"]),
        ("a.jsonl", b"\n\r\n", |_| {}, &["a.jsonl: has no rows"]),
        (
            "a.jsonl",
            b"{\"input_ids\": \"x\"}",
            |_| {},
            &["a.jsonl:1: column `input_ids` holds text, not a list of whole numbers"],
        ),
        (
            "a.jsonl",
            b"{\"input_ids\": [1.5]}",
            |_| {},
            &["a.jsonl:1: column `input_ids` holds a list of other things"],
        ),
        (
            "a.jsonl",
            b"{\"input_ids\": [5, 200]}",
            |_| {},
            &["a.jsonl:1: token id 200 has no embedding row: the model has 200", "model's own tokenizer"],
        ),
        ("a.jsonl", b"{\"input_ids\": [-1]}", |_| {}, &["a.jsonl:1: token id -1 has no embedding row"]),
        (
            "a.jsonl",
            b"{\"input_ids\": [5, 6], \"labels\": [5]}",
            |_| {},
            &["a.jsonl:1: `labels` has 1 items, `input_ids` 2"],
        ),
        (
            "a.jsonl",
            b"{\"input_ids\": [5, 6], \"labels\": [6, -100]}",
            |_| {},
            &["a.jsonl:1: label 0 is 6, neither its token's id 5 nor -100"],
        ),
        (
            "a.jsonl",
            b"{\"input_ids\": [5, 6]}",
            |c| c.assistant_only_loss = true,
            &["assistant_only_loss: tokenised rows have no text", "labels of -100"],
        ),
        (
            "a.jsonl",
            b"{\"input_ids\": [5, 6], \"labels\": [5, -100]}",
            |_| {},
            &["dataset_name: no training row has a token to predict in its first 512"],
        ),
        (
            "a.jsonl",
            b"{\"text\": \"x\"}",
            |c| c.assistant_only_loss = true,
            &["no training row has a token to predict", "assistant_only_loss: false"],
        ),
        (
            "a.jsonl",
            b"{\"text\": \"x\"}",
            |c| c.eval_size = 1.0,
            &["eval_size: holding out 1 of 1 rows leaves none to train on", "0 to hold none out"],
        ),
        (
            "a.jsonl",
            b"{\"text\": \"x\"}",
            |c| c.max_sequence_length = 513,
            &[
                "max_sequence_length: 513 is above the model's max_position_embeddings 512; set it from 2 to 512",
            ],
        ),
        (
            "a.jsonl",
            b"{\"text\": \"x\"}",
            |c| c.max_sequence_length = 1,
            &["max_sequence_length: 1 leaves no token to predict"],
        ),
        (
            "a.jsonl",
            b"{\"text\": \"x\"}",
            |c| c.dataset_name += "x",
            &[
                "a.jsonlx: does not exist; give dataset_name a .jsonl, .json or .parquet file, or a directory of them",
            ],
        ),
        ("a.jsonl", b"{\"text\": \"x\"}", |c| c.dataset_name.clear(), &["dataset_name: is not given"]),
        (
            "a.jsonl",
            b"{\"text\": \"x\"}",
            |c| c.eval_dataset_name = Some("/nowhere.jsonl".into()),
            &["nowhere.jsonl: does not exist; give eval_dataset_name a .jsonl, .json"],
        ),
        ("a.txt", b"x", |_| {}, &["a.txt: is no .jsonl, .json or .parquet file; give dataset_name"]),
        (
            "a.parquet",
            b"{\"text\": \"x\"}",
            |_| {},
            &["a.parquet: is no Parquet file: ", "; copy or write the file again"],
        ),
        (
            "a.txt",
            b"x",
            |c| c.dataset_name.truncate(c.dataset_name.len() - "/a.txt".len()),
            &["is a directory without .jsonl, .json or .parquet files; give"],
        ),
    ];
    for (name, bytes, change, words) in rows {
        let dir = directory(&[(name, bytes)]);
        let mut config = all_of(&dir.path().join(name));
        change(&mut config);
        let error = load(&config).expect_err(words[0]).to_string();
        words.iter().for_each(|word| assert!(error.contains(word), "{error}\ndoes not say: {word}"));
    }
}

proptest! {
    /// Whatever stands in a file, reading ends with rows or with an error that names it.
    #[test]
    fn no_bytes_bring_the_reader_down(
        lines in prop::collection::vec(prop_oneof![
            prop::collection::vec(any::<u8>(), 0..20),
            Just(b"{\"text\": \"x\"}".to_vec()),
            Just(b"{\"input_ids\": [1, 5], \"labels\": [-100, 5]}".to_vec()),
            Just(b"{\"input_ids\": [1e3, {}]}".to_vec()),
        ], 0..6),
        skip_bad_rows: bool,
    ) {
        let dir = directory(&[("a.jsonl", &lines.join(&b'\n'))]);
        let config = TrialConfig { skip_bad_rows, ..all_of(&dir.path().join("a.jsonl")) };
        match load(&config) {
            Ok(dataset) => prop_assert!(!dataset.train.is_empty()),
            Err(error) => prop_assert!(error.to_string().contains("a.jsonl"), "{}", error),
        }
    }
}
