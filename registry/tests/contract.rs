//! What every registry does, run against each of them.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use futures::future::join_all;
use proptest::prelude::*;
use registry::{Fence, MemoryRegistry, Registry, RegistryError, SqliteRegistry, Write};
use std::future::Future;
use std::sync::Arc;

/// Runs a test on a fresh registry of each kind.
async fn each<T: Future<Output = ()>>(test: impl Fn(Arc<dyn Registry>) -> T) {
    test(Arc::new(MemoryRegistry::new())).await;
    let dir = tempfile::tempdir().unwrap();
    test(Arc::new(SqliteRegistry::open(&dir.path().join("registry.db")).unwrap())).await;
}

fn put(key: &str, value: &str) -> Write {
    Write::Put(key.into(), value.into())
}

fn delete(key: &str) -> Write {
    Write::Delete(key.into())
}

async fn keys(registry: &dyn Registry, prefix: &str, after: Option<&str>, limit: usize) -> Vec<String> {
    registry.list(prefix, after, limit).await.unwrap().into_iter().map(|(key, _)| key).collect()
}

#[tokio::test]
async fn a_batch_applies_in_order_and_reads_back() {
    each(|registry| async move {
        let fence = registry.lead("test").await.unwrap();
        registry.commit(fence, vec![]).await.unwrap();
        assert_eq!(registry.get("a").await.unwrap(), None);
        registry
            .commit(fence, vec![put("a", "1"), put("b", "1"), put("a", "2"), delete("none")])
            .await
            .unwrap();
        assert_eq!(registry.get("a").await.unwrap(), Some(b"2".to_vec()));
        registry.commit(fence, vec![delete("a"), put("b", ""), put("c", "3"), delete("c")]).await.unwrap();
        assert_eq!(registry.list("", None, 10).await.unwrap(), [("b".to_string(), vec![])]);
    })
    .await;
}

#[tokio::test]
async fn only_the_latest_leader_commits() {
    each(|registry| async move {
        let early = registry.commit(Fence(0), vec![put("a", "0")]).await;
        assert!(matches!(early, Err(RegistryError::Fenced { held: 0, current: 0 })));
        let first = registry.lead("first").await.unwrap();
        registry.commit(first, vec![put("a", "1")]).await.unwrap();
        let second = registry.lead("second").await.unwrap();
        assert!(second > first);
        for (fence, batch) in [(first, vec![put("a", "2"), delete("a")]), (first, vec![])] {
            let refusal = registry.commit(fence, batch).await.unwrap_err();
            assert_eq!(refusal.to_string(), "fenced off: leadership 1 was replaced by 2");
        }
        let future = registry.commit(Fence(3), vec![put("a", "3")]).await;
        assert!(matches!(future, Err(RegistryError::Fenced { held: 3, current: 2 })));
        assert_eq!(registry.get("a").await.unwrap(), Some(b"1".to_vec()));
        registry.commit(second, vec![put("a", "2")]).await.unwrap();
        assert_eq!(registry.get("a").await.unwrap(), Some(b"2".to_vec()));
    })
    .await;
}

#[tokio::test]
async fn a_listing_is_the_prefix_in_byte_order() {
    const KEYS: &[&str] = &[
        "",
        "a",
        "a/",
        "a/1",
        "a/10",
        "a/2",
        "a0",
        "aé",
        "a\u{10ffff}",
        "a\u{10ffff}x",
        "b/%_",
        "b/\0",
        "Z",
        "é",
    ];
    // (prefix, after, limit) -> keys
    const ROWS: &[(&str, Option<&str>, usize, &[&str])] = &[
        ("a/", None, 9, &["a/", "a/1", "a/10", "a/2"]),
        ("a/", None, 2, &["a/", "a/1"]),
        ("a/", Some("a/1"), 2, &["a/10", "a/2"]),
        ("a/", Some("a/1x"), 9, &["a/2"]),
        ("a/", Some("a/2"), 9, &[]),
        ("a/", Some("A"), 1, &["a/"]),
        ("a/", Some("b"), 9, &[]),
        ("a/", Some(""), 9, &["a/", "a/1", "a/10", "a/2"]),
        ("a/", None, 0, &[]),
        ("a0", None, 9, &["a0"]),
        ("a\u{10ffff}", None, 9, &["a\u{10ffff}", "a\u{10ffff}x"]),
        ("b/%", None, 9, &["b/%_"]),
        ("b/", None, 9, &["b/\0", "b/%_"]),
        ("b/", Some("b/\0"), 9, &["b/%_"]),
        ("c", None, 9, &[]),
        ("", None, 3, &["", "Z", "a"]),
        ("", Some(""), 2, &["Z", "a"]),
        ("", Some("b/%_"), usize::MAX, &["é"]),
    ];
    each(|registry| async move {
        let fence = registry.lead("test").await.unwrap();
        let batch = KEYS.iter().rev().map(|key| put(key, key)).collect();
        registry.commit(fence, batch).await.unwrap();
        for (prefix, after, limit, expected) in ROWS {
            let found = keys(&*registry, prefix, *after, *limit).await;
            assert_eq!(found, *expected, "{prefix:?} after {after:?}, {limit}");
        }
        for (key, value) in registry.list("", None, 99).await.unwrap() {
            assert_eq!(key.as_bytes(), value);
        }
    })
    .await;
}

#[tokio::test]
async fn large_values_and_large_batches() {
    each(|registry| async move {
        let fence = registry.lead("test").await.unwrap();
        let value: Vec<u8> = (0..8_000_000_u32).map(|i| (i % 251) as u8).collect();
        registry.commit(fence, vec![Write::Put("large".into(), value.clone())]).await.unwrap();
        assert_eq!(registry.get("large").await.unwrap(), Some(value));
        let batch = (0..5_000).map(|i| put(&format!("many/{i:05}"), "x")).collect();
        registry.commit(fence, batch).await.unwrap();
        assert_eq!(registry.list("many/", None, 10_000).await.unwrap().len(), 5_000);
    })
    .await;
}

#[tokio::test]
async fn concurrent_commits_each_apply_whole_or_not_at_all() {
    each(|registry| async move {
        let fence = registry.lead("test").await.unwrap();
        let commits = (0..1_500).map(|i| {
            // Every fifth comes from an old leader.
            let fence = if i % 5 == 0 { Fence(0) } else { fence };
            let value = i.to_string();
            registry.commit(fence, vec![put("last", &value), put(&format!("each/{i:04}"), &value)])
        });
        let answers = join_all(commits).await;
        for (i, answer) in answers.iter().enumerate() {
            assert_eq!(answer.is_ok(), i % 5 != 0, "{i}: {answer:?}");
        }
        let last: u32 =
            String::from_utf8(registry.get("last").await.unwrap().unwrap()).unwrap().parse().unwrap();
        assert!(!last.is_multiple_of(5) && last < 1_500, "{last}");
        let found = keys(&*registry, "each/", None, 2_000).await;
        let expected: Vec<String> =
            (0..1_500).filter(|i| i % 5 != 0).map(|i| format!("each/{i:04}")).collect();
        assert_eq!(found, expected);
    })
    .await;
}

#[tokio::test]
async fn sqlite_keeps_state_and_fences_across_a_reopen() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("registry.db");
    let mut last = Fence(0);
    for round in 0..3 {
        let registry = SqliteRegistry::open(&path).unwrap();
        let found = keys(&registry, "", None, 10).await;
        assert_eq!(found, (0..round).map(|r| format!("round/{r}")).collect::<Vec<_>>());
        let fence = registry.lead("test").await.unwrap();
        assert!(fence > last);
        let stale = registry.commit(last, vec![put("stale", "")]).await;
        assert!(matches!(stale, Err(RegistryError::Fenced { .. })));
        registry.commit(fence, vec![put(&format!("round/{round}"), "x")]).await.unwrap();
        last = fence;
    }
    let files: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|f| f.unwrap().file_name()).collect();
    assert_eq!(files, ["registry.db"], "closing folds the log into the file");
}

#[test]
fn sqlite_names_a_file_that_it_cannot_open() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("none/registry.db");
    let error = SqliteRegistry::open(&path).unwrap_err().to_string();
    assert!(error.contains(&path.display().to_string()), "{error}");
}

/// One step of a random history.
#[derive(Debug, Clone)]
enum Op {
    Lead,
    /// Commits sent together, each with how many leaderships its fence lies back. So few keep their order.
    Commits(Vec<(u64, Vec<Write>)>),
    Get(String),
    List(String, Option<String>, usize),
}

/// Few keys, so that they meet; with the characters around `/`, a zero and a letter of two bytes.
fn any_key() -> impl Strategy<Value = String> {
    "[a/0.é\0]{0,3}"
}

fn any_write() -> impl Strategy<Value = Write> {
    let value = prop::collection::vec(any::<u8>(), 0..4);
    prop_oneof![
        3 => (any_key(), value).prop_map(|(key, value)| Write::Put(key, value)),
        1 => any_key().prop_map(Write::Delete),
    ]
}

fn any_op() -> impl Strategy<Value = Op> {
    let back = prop_oneof![4 => Just(0_u64), 1 => 1..3_u64];
    let commits = prop::collection::vec((back, prop::collection::vec(any_write(), 0..4)), 1..5);
    prop_oneof![
        1 => Just(Op::Lead),
        4 => commits.prop_map(Op::Commits),
        2 => any_key().prop_map(Op::Get),
        3 => (any_key(), prop::option::of(any_key()), 0..8_usize).prop_map(|(p, a, l)| Op::List(p, a, l)),
    ]
}

/// What an operation answers, as text that compares.
async fn answer(registry: &dyn Registry, op: &Op, leaderships: u64) -> String {
    match op {
        Op::Lead => format!("{:?}", registry.lead("test").await),
        Op::Commits(commits) => {
            let sent = commits.iter().map(|(back, batch)| {
                registry.commit(Fence(leaderships.saturating_sub(*back)), batch.clone())
            });
            format!("{:?}", join_all(sent).await)
        }
        Op::Get(key) => format!("{:?}", registry.get(key).await),
        Op::List(prefix, after, limit) => {
            format!("{:?}", registry.list(prefix, after.as_deref(), *limit).await)
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn sqlite_agrees_with_the_model(ops in prop::collection::vec(any_op(), 1..30)) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let sqlite = SqliteRegistry::open(&dir.path().join("registry.db")).unwrap();
        let model = MemoryRegistry::new();
        let mut leaderships = 0;
        for op in &ops {
            let (found, expected) = runtime.block_on(async {
                (answer(&sqlite, op, leaderships).await, answer(&model, op, leaderships).await)
            });
            prop_assert_eq!(found, expected, "{:?}", op);
            leaderships += u64::from(matches!(op, Op::Lead));
        }
        let all = Op::List(String::new(), None, usize::MAX);
        let (found, expected) = runtime.block_on(async {
            (answer(&sqlite, &all, 0).await, answer(&model, &all, 0).await)
        });
        prop_assert_eq!(found, expected);
    }
}
