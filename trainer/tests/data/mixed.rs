//! Rows of several data sets.

use super::{all_of, directory, ids, input_ids, load};
use domain::trial::{StoppingStrategy, TrialConfig};
use std::path::Path;
use trainer::data::Dataset;

/// Three data sets of 4, 2 and 3 rows: `a0` …, `b0` …, `c0` ….
fn three() -> tempfile::TempDir {
    let rows = |name: char, count: usize| {
        (0..count).map(|i| format!("{{\"text\": \"{name}{i}\"}}\n")).collect::<String>().into_bytes()
    };
    let files = [("a.jsonl", rows('a', 4)), ("b.jsonl", rows('b', 2)), ("c.jsonl", rows('c', 3))];
    directory(&files.each_ref().map(|(name, bytes)| (*name, bytes.as_slice())))
}

/// The rows of an epoch.
fn taken(data: &Dataset) -> Vec<Vec<u32>> {
    data.rows().map(|row| row.input_ids.clone()).collect()
}

fn mixed(dir: &Path) -> TrialConfig {
    let name = |file: &str| dir.join(file).display().to_string();
    TrialConfig {
        interleave_datasets: Some(vec![name("b.jsonl"), name("c.jsonl")]),
        ..all_of(&dir.join("a.jsonl"))
    }
}

#[test]
fn rows_are_mixed_and_held_out_of_each() {
    let dir = three();
    let check = |change: &dyn Fn(&mut TrialConfig), train: &[&str], eval: &[&str]| {
        let mut config = mixed(dir.path());
        change(&mut config);
        let data = load(&config).unwrap();
        let want = |texts: &[&str]| texts.iter().map(|text| ids(text)).collect::<Vec<_>>();
        assert_eq!((taken(&data), input_ids(&data.eval)), (want(train), want(eval)));
    };
    check(&|_| (), &["a0", "b0", "c0", "a1", "b1", "c1"], &[]);
    let all = StoppingStrategy::AllExhausted;
    let turns = ["a0", "b0", "c0", "a1", "b1", "c1", "a2", "b0", "c2", "a3", "b1", "c0"];
    check(&|c| c.stopping_strategy = all, &turns, &[]);
    check(&|c| c.interleave_probabilities = Some(vec![0.0, 2.0, 0.0]), &["b0", "b1"], &[]);
    check(
        &|c| {
            c.eval_size = 1.0;
            c.eval_split = domain::trial::EvalSplit::Last;
        },
        &["a0", "b0", "c0"],
        &["a3", "b1", "c2"],
    );
    // Which bytes are mixed, and in what order they are named, is in the digest; what is drawn is in the seed.
    let digest = |config: &TrialConfig| load(config).unwrap().digest;
    let config = mixed(dir.path());
    let mut turned = config.clone();
    turned.interleave_datasets.as_mut().unwrap().reverse();
    assert_ne!(digest(&config), digest(&turned));
    let drawn = |seed| {
        let weights = Some(vec![1.0, 1.0, 1.0]);
        let config = TrialConfig {
            interleave_probabilities: weights,
            stopping_strategy: all,
            seed,
            ..mixed(dir.path())
        };
        taken(&load(&config).unwrap())
    };
    assert_eq!(drawn(1), drawn(1));
    assert_ne!(drawn(1), drawn(2));
}

/// A row that is taken often is held once.
#[test]
fn rows_are_held_once() {
    let dir = three();
    let config = TrialConfig {
        interleave_probabilities: Some(vec![1.0, 1.0, 1e-3]),
        stopping_strategy: StoppingStrategy::AllExhausted,
        ..mixed(dir.path())
    };
    let data = load(&config).unwrap();
    assert_eq!(data.train.len(), 4 + 2 + 3);
    assert!(data.len() > 100, "{}", data.len());
    let in_order: Vec<_> = ["a0", "a1", "a2", "a3", "b0", "b1", "c0", "c1", "c2"].map(ids).into();
    assert_eq!(input_ids(&data.train), in_order);
}

/// What each file is for is in the digest, whatever their bytes one after another are. One set alone is its files.
#[test]
fn another_split_of_the_same_files_has_another_digest() {
    let dir = three();
    let name = |file: &str| dir.path().join(file).display().to_string();
    let one = all_of(&dir.path().join("a.jsonl"));
    let digest = |config: &TrialConfig| load(config).unwrap().digest;
    let held_out = |file| TrialConfig { eval_dataset_name: Some(name(file)), ..one.clone() };
    let with = |files: &[&str], eval: Option<&str>| TrialConfig {
        interleave_datasets: Some(files.iter().map(|file| name(file)).collect()),
        eval_dataset_name: eval.map(name),
        ..one.clone()
    };
    let digests = [
        digest(&one),
        digest(&held_out("b.jsonl")),
        digest(&with(&["b.jsonl"], None)),
        digest(&with(&["b.jsonl"], Some("c.jsonl"))),
        digest(&with(&["b.jsonl", "c.jsonl"], None)),
    ];
    for (i, digest) in digests.iter().enumerate() {
        assert!(!digests[..i].contains(digest), "{i}: {digests:?}");
    }
    let file = dir.path().join("a.jsonl");
    assert_eq!(digests[0], trainer::files::digest_files([file.as_path()]).unwrap());
}

#[test]
fn what_cannot_be_mixed_is_refused() {
    let dir = three();
    let check = |change: &dyn Fn(&mut TrialConfig), want: &str| {
        let mut config = mixed(dir.path());
        change(&mut config);
        let message =
            load(&config).unwrap_err().to_string().replace(&dir.path().display().to_string(), "DIR");
        assert_eq!(message, want);
    };
    let missing = dir.path().join("d.jsonl").display().to_string();
    check(
        &|c| c.interleave_datasets = Some(vec![missing.clone()]),
        "DIR/d.jsonl: does not exist; give interleave_datasets a .jsonl, .json or .parquet file, or a directory of them",
    );
    check(
        &|c| c.interleave_probabilities = Some(vec![1.0]),
        "interleave_probabilities: are 1, but there are 3 data sets; give one for dataset_name and then one for each of \
         interleave_datasets",
    );
    check(
        &|c| {
            c.interleave_datasets = None;
            c.interleave_probabilities = Some(vec![0.5, 0.5]);
        },
        "interleave_probabilities: are 2, but there are 1 data sets; give one for dataset_name and then one for each of \
         interleave_datasets",
    );
    check(
        &|c| c.interleave_probabilities = Some(vec![1.0, f64::NAN, 1.0]),
        "interleave_probabilities: hold NaN; give numbers from 0",
    );
}
