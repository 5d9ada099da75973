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
    #[cfg(feature = "etcd")]
    if let Some(server) = tests::etcd::Etcd::start(&dir.path().join("etcd")) {
        let scope = actor::Scope::new();
        let options = registry::etcd::EtcdOptions::new(vec![server.endpoint.clone()]);
        test(Arc::new(registry::EtcdRegistry::connect(&options, &scope).await.unwrap())).await;
        assert!(scope.finish(std::time::Duration::from_secs(10)).await, "it ends");
    }
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
            let (first, second) = (first.0, second.0);
            let expected = format!("fenced off: leadership {first} was replaced by {second}");
            assert_eq!(refusal.to_string(), expected);
        }
        let (future, current) = (second.0 + 1, second.0);
        let refusal = registry.commit(Fence(future), vec![put("a", "3")]).await.unwrap_err();
        assert_eq!(refusal.to_string(), format!("fenced off: leadership {future} was replaced by {current}"));
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

/// What an operation answers, as text that compares: registries count their leaderships in different ways.
async fn answer(registry: &dyn Registry, op: &Op, fences: &mut Vec<Fence>) -> String {
    match op {
        Op::Lead => {
            let fence = registry.lead("test").await.unwrap();
            let grows = fences.last().is_none_or(|last| fence > *last);
            fences.push(fence);
            format!("led {grows}")
        }
        Op::Commits(commits) => {
            let fence = |back: u64| {
                let index = (fences.len() as u64).checked_sub(back + 1);
                index.and_then(|index| fences.get(index as usize)).copied().unwrap_or(Fence(0))
            };
            let sent = commits.iter().map(|(back, batch)| registry.commit(fence(*back), batch.clone()));
            let answers = join_all(sent).await.into_iter().map(|answer| match answer {
                Err(RegistryError::Fenced { .. }) => "fenced".to_string(),
                other => format!("{other:?}"),
            });
            answers.collect::<Vec<_>>().join(", ")
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
        runtime.block_on(agrees_with_the_model(&sqlite, ops))?;
    }
}

/// Does the same to a registry and to the model, and compares what they say.
async fn agrees_with_the_model(registry: &dyn Registry, ops: Vec<Op>) -> Result<(), TestCaseError> {
    let model = MemoryRegistry::new();
    let (mut fences, mut of_model) = (Vec::new(), Vec::new());
    let all = Op::List(String::new(), None, usize::MAX);
    for op in ops.iter().chain([&all]) {
        let found = answer(registry, op, &mut fences).await;
        prop_assert_eq!(found, answer(&model, op, &mut of_model).await, "{:?}", op);
    }
    Ok(())
}

#[cfg(feature = "etcd")]
mod in_etcd {
    use super::*;
    use actor::Scope;
    use registry::etcd::{EtcdOptions, Members};
    use registry::{EtcdRegistry, Leadership, Member};
    use std::time::Duration;
    use tests::etcd::Etcd;

    /// What a test waits for at most.
    const PATIENCE: Duration = Duration::from_secs(60);

    fn options(server: &Etcd, prefix: &str) -> EtcdOptions {
        // Longer than any test waits: what goes goes because it is given back.
        let ttl = Duration::from_secs(300);
        EtcdOptions { prefix: prefix.into(), ttl, ..EtcdOptions::new(vec![server.endpoint.clone()]) }
    }

    async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
        tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("waited in vain for {what}"))
    }

    /// Whether one leads is asked of the majority: a node that was left alone knows only what was so.
    #[tokio::test]
    async fn a_look_at_who_leads_needs_the_majority() {
        let dir = tempfile::tempdir().unwrap();
        let Some([alone, second, third]) = Etcd::start_three(dir.path(), 5000) else { return };
        let scope = Scope::new();
        let registry = EtcdRegistry::connect(&options(&alone, "/test"), &scope).await.unwrap();
        let fence = soon("an election", registry.lead("test")).await.unwrap();
        registry.commit(fence, Vec::new()).await.unwrap();
        for node in [&second, &third] {
            node.signal("STOP");
        }
        // A node may still answer what reached it before the signal did.
        let refused = async {
            loop {
                if let Err(refusal) = registry.commit(fence, Vec::new()).await {
                    return refusal;
                }
            }
        };
        let refusal = soon("a refusal", refused).await;
        assert!(matches!(refusal, RegistryError::Unavailable(_)), "{refusal}");
        assert!(refusal.to_string().contains(&format!("{} has no majority", alone.endpoint)), "{refusal}");
        for node in [second, third] {
            node.signal("CONT");
        }
        scope.cancel();
    }

    #[test]
    fn etcd_agrees_with_the_model() {
        let dir = tempfile::tempdir().unwrap();
        let Some(server) = Etcd::start(dir.path()) else { return };
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(24));
        let mut case = 0;
        let ops = prop::collection::vec(any_op(), 1..20);
        let prefixes = std::cell::RefCell::new(&mut case);
        runner
            .run(&ops, |ops| {
                let prefix = {
                    let mut case = prefixes.borrow_mut();
                    **case += 1;
                    format!("/case-{case}")
                };
                runtime.block_on(async {
                    let scope = Scope::new();
                    let registry = EtcdRegistry::connect(&options(&server, &prefix), &scope).await.unwrap();
                    let agrees = agrees_with_the_model(&registry, ops).await;
                    scope.finish(PATIENCE).await;
                    agrees
                })
            })
            .unwrap();
    }

    #[tokio::test]
    async fn one_leads_and_the_next_takes_over_what_was_decided() {
        let dir = tempfile::tempdir().unwrap();
        let Some(server) = Etcd::start(dir.path()) else { return };
        let options = options(&server, "/fleet/");
        let (first_scope, second_scope) = (Scope::new(), Scope::new());
        let first = EtcdRegistry::connect(&options, &first_scope).await.unwrap();
        let second = EtcdRegistry::connect(&options, &second_scope).await.unwrap();
        let fence = soon("the first", first.lead("first")).await.unwrap();
        let large = vec![7_u8; 300_000];
        first.commit(fence, vec![Write::Put("large".into(), large.clone()), put("a", "1")]).await.unwrap();
        assert_eq!(first.members().leader().await.unwrap().as_deref(), Some("first"));
        {
            let waits = second.lead("second");
            tokio::pin!(waits);
            assert!(tokio::time::timeout(Duration::from_millis(300), &mut waits).await.is_err(), "one leads");
            // Gone without a word to its own.
            first_scope.cancel();
            let since = soon("the loss", first.lost()).await;
            assert_eq!(soon("the loss, asked for after it", first.lost()).await, since);
            let later = soon("the second", waits).await.unwrap();
            assert!(later > fence);
            let stale = first.commit(fence, vec![put("a", "2")]).await;
            assert!(stale.is_err(), "{stale:?}");
            assert_eq!(second.get("large").await.unwrap(), Some(large));
            second.commit(later, vec![delete("large")]).await.unwrap();
            assert_eq!(keys(&second, "", None, 9).await, ["a"]);
        }
        assert_eq!(second.members().leader().await.unwrap().as_deref(), Some("second"));
        second_scope.finish(PATIENCE).await;
    }

    /// Of whatever is kept, etcd is given pieces that it likes.
    #[tokio::test]
    async fn no_value_in_etcd_is_above_64_kib() {
        let dir = tempfile::tempdir().unwrap();
        let Some(server) = Etcd::start(dir.path()) else { return };
        let scope = Scope::new();
        let registry = EtcdRegistry::connect(&options(&server, "/fleet"), &scope).await.unwrap();
        let fence = soon("an election", registry.lead("test")).await.unwrap();
        let mut raw = etcd_client::Client::connect([&server.endpoint], None).await.unwrap();
        for bytes in [0, 1, 48 << 10, (48 << 10) + 1, 64 << 10, 1_500_000] {
            let value = vec![7_u8; bytes];
            // With a batch that takes more than a transaction.
            let many = (0..200).map(|i| put(&format!("many/{i}"), "x"));
            let batch = many.chain([Write::Put("a".into(), value.clone())]).collect();
            registry.commit(fence, batch).await.unwrap();
            assert_eq!(registry.get("a").await.unwrap(), Some(value));
            let all = etcd_client::GetOptions::new().with_prefix();
            let all = raw.get("/fleet/", Some(all)).await.unwrap();
            let largest = all.kvs().iter().map(|kv| kv.value().len()).max().unwrap();
            assert!(largest <= 64 << 10, "{bytes} bytes: {largest}");
        }
        scope.finish(PATIENCE).await;
    }

    #[tokio::test]
    async fn members_come_and_go() {
        let dir = tempfile::tempdir().unwrap();
        let Some(server) = Etcd::start(dir.path()) else { return };
        let members = Members::connect(&options(&server, "/fleet")).await.unwrap();
        assert_eq!(members.leader().await.unwrap(), None);
        let (scope, first) = (Scope::new(), Scope::new());
        let member = |id: &str| Member { id: id.into(), value: b"{}".to_vec() };
        members.register(member("one"), &first);
        members.register(member("two"), &scope);
        let listed = async |expected: &[&str]| {
            let there = async {
                while members.members().await.unwrap().iter().map(|m| m.id.as_str()).collect::<Vec<_>>()
                    != expected
                {
                    tokio::task::yield_now().await;
                }
            };
            soon("the members", there).await;
        };
        listed(&["one", "two"]).await;
        assert!(first.finish(PATIENCE).await);
        assert_eq!(members.members().await.unwrap(), [member("two")], "gone when its scope has finished");
        assert!(scope.finish(PATIENCE).await);
        assert_eq!(members.members().await.unwrap(), []);
    }

    #[tokio::test]
    async fn an_etcd_that_is_not_there_is_named() {
        let scope = Scope::new();
        let options = EtcdOptions::new(vec!["http://127.0.0.1:1".into()]);
        let error = soon("the error", EtcdRegistry::connect(&options, &scope)).await.unwrap_err().to_string();
        assert!(error.contains("http://127.0.0.1:1"), "{error}");
    }
}
