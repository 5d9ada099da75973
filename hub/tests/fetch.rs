//! Downloads from a hub on this machine: what they leave in the cache, that they resume and verify, and what is said
//! where they cannot.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use common::{COMMIT, LocalHub, Seen, sha256};
use hub::{Hub, HubError, Kind, Progress, RepoId, Settings};
use std::path::{Path, PathBuf};

/// What a download told.
#[derive(Debug, Default)]
struct Told(Vec<(String, u64, u64)>, u64);

impl Progress for Told {
    fn file(&mut self, name: &str, done: u64, total: u64) {
        self.0.push((name.into(), done, total));
    }
    fn bytes(&mut self, count: u64) {
        self.1 += count;
    }
    fn finished(&mut self) {}
}

struct Fixture {
    server: LocalHub,
    dir: tempfile::TempDir,
}

/// Bytes of the model's weights.
const WEIGHTS: usize = 300_000;

fn weights() -> Vec<u8> {
    (0..WEIGHTS).map(|i| (i * i % 251) as u8).collect()
}

impl Fixture {
    fn new() -> Self {
        let server = LocalHub::start();
        for (file, bytes) in [
            ("config.json", b"{}".to_vec()),
            ("tokenizer.json", b"{\"a\": 1}".to_vec()),
            ("README.md", b"read me".to_vec()),
            ("model.safetensors", weights()),
            ("pytorch_model.bin", b"pickle".to_vec()),
        ] {
            server.put("models/org/one", file, bytes);
        }
        Self { server, dir: tempfile::tempdir().unwrap() }
    }

    fn settings(&self) -> Settings {
        Settings {
            cache: self.dir.path().into(),
            endpoint: self.server.endpoint(),
            token: None,
            offline: false,
        }
    }

    fn fetch(&self, kind: Kind, name: &str) -> Result<(PathBuf, Told), HubError> {
        fetch(self.settings(), kind, name)
    }

    fn blobs(&self, repo: &str) -> Vec<String> {
        names(&self.dir.path().join(repo).join("blobs"))
    }
}

fn fetch(settings: Settings, kind: Kind, name: &str) -> Result<(PathBuf, Told), HubError> {
    let mut told = Told::default();
    let path = Hub::new(settings).fetch(kind, &RepoId::parse(name).unwrap(), &mut told)?;
    Ok((path, told))
}

fn names(dir: &Path) -> Vec<String> {
    let entries =
        std::fs::read_dir(dir).map(|entries| entries.map(|e| e.unwrap().file_name().into_string().unwrap()));
    let mut names: Vec<_> = entries.map(Iterator::collect).unwrap_or_default();
    names.sort();
    names
}

fn gets(seen: &[Seen]) -> usize {
    seen.iter().filter(|seen| seen.method == "GET" && !seen.path.starts_with("/api/")).count()
}

#[test]
fn a_model_is_laid_out_as_other_tools_expect_it() {
    let hub = Fixture::new();
    let (path, told) = hub.fetch(Kind::Model, "org/one").unwrap();
    let repo = hub.dir.path().join("models--org--one");
    assert_eq!(path, repo.join("snapshots").join(COMMIT));
    assert_eq!(names(&path), ["config.json", "model.safetensors", "tokenizer.json"]);
    assert_eq!(std::fs::read(path.join("model.safetensors")).unwrap(), weights());
    assert_eq!(std::fs::read_to_string(repo.join("refs/main")).unwrap(), COMMIT);
    let link = std::fs::read_link(path.join("model.safetensors")).unwrap();
    assert_eq!(link, Path::new("../../blobs").join(sha256(&weights())));
    assert_eq!(hub.blobs("models--org--one").len(), 3);
    assert_eq!(told.1, WEIGHTS as u64 + 2 + 8);
    assert_eq!(told.0.last(), Some(&("model.safetensors".into(), 0, WEIGHTS as u64)));
    // A second time, only the listing is asked for; by its commit, nothing is.
    hub.server.seen();
    hub.fetch(Kind::Model, "org/one").unwrap();
    assert_eq!(hub.server.seen().len(), 1);
    assert_eq!(hub.fetch(Kind::Model, &format!("org/one@{COMMIT}")).unwrap().0, path);
    assert_eq!(hub.server.seen(), []);
    // Another revision of the same content takes no download.
    hub.fetch(Kind::Model, "org/one@v1").unwrap();
    assert_eq!(gets(&hub.server.seen()), 0);
    assert_eq!(std::fs::read_to_string(repo.join("refs/v1")).unwrap(), COMMIT);
}

#[test]
fn shards_and_pickles_are_found_by_the_index() {
    let hub = Fixture::new();
    let index = "{\"weight_map\": {\"a\": \"pytorch_model-1.bin\", \"b\": \"pytorch_model-2.bin\"}}";
    for (file, bytes) in [
        ("config.json", "{}"),
        ("pytorch_model.bin.index.json", index),
        ("pytorch_model-1.bin", "one"),
        ("pytorch_model-2.bin", "two"),
        ("pytorch_model-3.bin", "no part of it"),
    ] {
        hub.server.put("models/old", file, bytes);
    }
    let (path, _) = hub.fetch(Kind::Model, "old").unwrap();
    let want = ["config.json", "pytorch_model-1.bin", "pytorch_model-2.bin", "pytorch_model.bin.index.json"];
    assert_eq!(names(&path), want);
}

#[test]
fn rows_lie_in_one_folder() {
    let hub = Fixture::new();
    for file in ["data/train-0.parquet", "data/test-0.parquet", "README.md", "old.jsonl"] {
        hub.server.put("datasets/org/rows", file, file);
    }
    let (path, _) = hub.fetch(Kind::Dataset, "org/rows").unwrap();
    assert_eq!(path, hub.dir.path().join("datasets--org--rows/snapshots").join(COMMIT).join("data"));
    assert_eq!(names(&path), ["test-0.parquet", "train-0.parquet"]);
    assert_eq!(std::fs::read_to_string(path.join("test-0.parquet")).unwrap(), "data/test-0.parquet");
}

/// Of a data set of several parts one is downloaded, and another later beside it.
#[test]
fn a_part_of_a_data_set() {
    let hub = Fixture::new();
    for file in ["easy/test-0.parquet", "hard/test-0.parquet", "hard/train-0.parquet"] {
        hub.server.put("datasets/org/rows", file, file);
    }
    let whole = RepoId::parse("org/rows").unwrap();
    let fetch = |part: &str| {
        Hub::new(hub.settings()).fetch(Kind::Dataset, &whole.clone().part(part), &mut Told::default())
    };
    let several = "holds rows in several folders: easy, hard";
    assert!(hub.fetch(Kind::Dataset, "org/rows").unwrap_err().to_string().contains(several));
    let hard = fetch("hard").unwrap();
    let easy_is_there = Hub::cached(&hub.settings(), Kind::Dataset, &whole.clone().part("easy")).is_ok();
    assert!(!easy_is_there, "the one part is not the other");
    assert_eq!((names(&hard).len(), names(hard.parent().unwrap())), (2, vec!["hard".to_string()]));
    let easy = fetch("easy").unwrap();
    assert_eq!(std::fs::read_to_string(easy.join("test-0.parquet")).unwrap(), "easy/test-0.parquet");
    let cached = |id: &RepoId| Hub::cached(&hub.settings(), Kind::Dataset, id);
    assert_eq!(cached(&whole.clone().part("hard")).unwrap(), hard);
    assert!(fetch("medium").unwrap_err().to_string().contains("has no folder medium"));
    // What was not fetched is not there: neither another part nor the whole.
    for id in [whole.clone(), whole.clone().part("medium"), whole.clone().part("..")] {
        assert!(cached(&id).is_err(), "{id:?}");
    }
}

/// A connection that breaks is taken up where it broke, in the same call and in a later one.
#[test]
fn a_broken_download_goes_on() {
    let hub = Fixture::new();
    hub.server.state().break_after = Some(("model.safetensors".into(), 100_000, 2));
    let (path, told) = hub.fetch(Kind::Model, "org/one").unwrap();
    assert_eq!(std::fs::read(path.join("model.safetensors")).unwrap(), weights());
    assert_eq!(told.1, WEIGHTS as u64 + 2 + 8, "no byte comes twice");
    let ranges: Vec<_> = hub.server.seen().into_iter().filter(|s| s.large).filter_map(|s| s.range).collect();
    assert_eq!(ranges, ["bytes=100000-", "bytes=200000-"]);
}

#[test]
fn a_later_call_goes_on_where_an_earlier_one_ended() {
    for no_parts in [false, true] {
        let hub = Fixture::new();
        let blob = format!("{}.incomplete", sha256(&weights()));
        let blobs = hub.dir.path().join("models--org--one/blobs");
        std::fs::create_dir_all(&blobs).unwrap();
        std::fs::write(blobs.join(&blob), &weights()[..123_456]).unwrap();
        hub.server.state().no_parts = no_parts;
        let (path, told) = hub.fetch(Kind::Model, "org/one").unwrap();
        assert_eq!(std::fs::read(path.join("model.safetensors")).unwrap(), weights());
        let large: Vec<_> = hub.server.seen().into_iter().filter(|seen| seen.large).collect();
        assert_eq!(large.len(), 1);
        assert_eq!(large[0].range.as_deref(), Some("bytes=123456-"));
        // A server that knows no parts sends all of it.
        let done = if no_parts { 0 } else { 123_456 };
        assert_eq!(told.0.last(), Some(&("model.safetensors".into(), done, WEIGHTS as u64)));
        assert!(!blobs.join(blob).exists());
    }
}

#[test]
fn what_earlier_calls_left_wrong_is_put_right() {
    // Longer than the file, and with other bytes: the first is told by its length, the second by its digest.
    for (left, works) in [(vec![7; WEIGHTS + 5], true), (vec![7; 1000], false)] {
        let hub = Fixture::new();
        let blobs = hub.dir.path().join("models--org--one/blobs");
        std::fs::create_dir_all(&blobs).unwrap();
        std::fs::write(blobs.join(format!("{}.incomplete", sha256(&weights()))), left).unwrap();
        assert_eq!(hub.fetch(Kind::Model, "org/one").is_ok(), works);
        let (path, _) = hub.fetch(Kind::Model, "org/one").unwrap();
        assert_eq!(std::fs::read(path.join("model.safetensors")).unwrap(), weights());
    }
}

#[test]
fn a_changed_byte_is_refused() {
    let hub = Fixture::new();
    hub.server.state().corrupt = Some("model.safetensors".into());
    let message = hub.fetch(Kind::Model, "org/one").err().unwrap().to_string();
    assert!(message.contains("org/one: model.safetensors came with the SHA-256"), "{message}");
    assert!(message.contains(&sha256(&weights())), "{message}");
    let left = hub.dir.path().join("models--org--one/blobs").join(sha256(&weights()));
    assert!(!left.exists() && left.with_extension("incomplete").metadata().unwrap().len() == 0);
    let offline = Settings { offline: true, ..hub.settings() };
    assert!(fetch(offline, Kind::Model, "org/one").is_err(), "what is not whole is not found");
    hub.server.state().corrupt = None;
    hub.fetch(Kind::Model, "org/one").unwrap();
}

#[test]
fn the_cache_serves_without_a_network() {
    let hub = Fixture::new();
    let offline = || Settings { offline: true, ..hub.settings() };
    let message = fetch(offline(), Kind::Model, "org/one").err().unwrap().to_string();
    assert!(message.contains("org/one: is neither a path on this machine nor a model in"), "{message}");
    assert!(message.contains("HF_HUB_OFFLINE is set; correct the name, or unset"), "{message}");
    let (path, _) = hub.fetch(Kind::Model, "org/one").unwrap();
    hub.server.seen();
    for name in ["org/one".to_string(), "org/one@main".into(), format!("org/one@{COMMIT}")] {
        assert_eq!(fetch(offline(), Kind::Model, &name).unwrap().0, path);
        assert_eq!(Hub::cached(&hub.settings(), Kind::Model, &RepoId::parse(&name).unwrap()).unwrap(), path);
    }
    assert_eq!(hub.server.seen(), [], "not a word over the network");
    // A hub that is away, or has no time.
    let away = || Settings { endpoint: "http://127.0.0.1:1".into(), ..hub.settings() };
    assert_eq!(fetch(away(), Kind::Model, "org/one").unwrap().0, path);
    hub.server.state().refuse = Some((503, ""));
    assert_eq!(hub.fetch(Kind::Model, "org/one").unwrap().0, path);
    let error = fetch(away(), Kind::Model, "org/two").err().unwrap();
    assert!(matches!(error, HubError::Unavailable { .. }), "{error}");
    assert!(error.to_string().contains("http://127.0.0.1:1 cannot be reached"), "{error}");
    // What lost a file is not whole.
    std::fs::remove_file(path.join("model.safetensors")).unwrap();
    let message = fetch(offline(), Kind::Model, "org/one").err().unwrap().to_string();
    assert!(message.contains("what is there of it has neither model.safetensors"), "{message}");
}

#[test]
fn the_token_stays_with_the_hub() {
    let hub = Fixture::new();
    let settings = Settings { token: Some("hf_secret".into()), ..hub.settings() };
    hub.server.state().moved = Some(("org/former".into(), "org/one".into()));
    fetch(settings, Kind::Model, "org/former").unwrap();
    let seen = hub.server.seen();
    assert!(seen.iter().any(|seen| seen.large) && seen.iter().any(|seen| seen.path.contains("org/former")));
    for seen in seen {
        assert_eq!(seen.token.as_deref(), (!seen.large).then_some("hf_secret"), "{seen:?}");
    }
}

#[test]
fn refusals_say_what_to_do() {
    let hub = Fixture::new();
    let check = |name: &str, refuse, token: Option<&str>, want: &[&str]| {
        hub.server.state().refuse = refuse;
        let settings = Settings { token: token.map(Into::into), ..hub.settings() };
        let message = fetch(settings, Kind::Model, name).err().unwrap().to_string();
        for want in want {
            assert!(message.contains(want), "{message}\nlacks {want}");
        }
    };
    let token = Some("hf_x");
    check(
        "org/no",
        None,
        None,
        &["org/no: is neither a path on this machine nor a model that http://127", "set HF_TOKEN"],
    );
    check("org/one@v9", None, None, &["org/one@v9: has no revision v9; name a branch"]);
    check(
        "org/one",
        Some((401, "GatedRepo")),
        None,
        &["is gated, and cannot be read without a token", "HF_TOKEN"],
    );
    check(
        "org/one",
        Some((403, "GatedRepo")),
        token,
        &["is gated, and cannot be read with the token that is set", "ask for access at http"],
    );
    check("org/one", Some((401, "")), None, &["shows without a token; correct the name, or set HF_TOKEN"]);
    check("org/one", Some((429, "")), None, &["answered 429", "try again later"]);
    check("org/one", Some((418, "")), None, &["answered 418"]);
    hub.server.put("models/org/bare", "README.md", "");
    check("org/bare", None, None, &["org/bare: has no config.json; name a model in the layout"]);
    hub.server.put("models/org/gguf", "config.json", "{}");
    check("org/gguf", None, None, &["org/gguf: has neither model.safetensors nor"]);
    // A place that cannot be written to.
    std::fs::write(hub.dir.path().join("models--org--file"), "").unwrap();
    for file in ["config.json", "model.safetensors"] {
        hub.server.put("models/org/file", file, "{}");
    }
    check("org/file", None, None, &["models--org--file/blobs: "]);
}

/// Two that want the same model at once download it once.
#[test]
fn two_downloads_at_once_are_one() {
    let hub = Fixture::new();
    std::thread::scope(|scope| {
        let calls: Vec<_> =
            (0..4).map(|_| scope.spawn(|| hub.fetch(Kind::Model, "org/one").unwrap().0)).collect();
        for call in calls {
            assert_eq!(std::fs::read(call.join().unwrap().join("model.safetensors")).unwrap(), weights());
        }
    });
    assert_eq!(hub.server.seen().iter().filter(|seen| seen.large).count(), 1);
    assert_eq!(hub.blobs("models--org--one").len(), 3);
}
