//! An etcd of three nodes, of which one stands still: it takes connections and never answers.

#![cfg(feature = "etcd")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use actor::Scope;
use registry::etcd::{EtcdOptions, Members};
use registry::{EtcdRegistry, Leadership, Member, Registry, RegistryError, Write};
use std::future::Future;
use std::time::Duration;
use tests::etcd::Etcd;
use tokio::time::Instant;

/// What a test waits for at most.
const PATIENCE: Duration = Duration::from_secs(60);
/// The time for six calls, of which one waits for the node that stands still, or for an election, on a machine that is busy. If
/// each of them waited it would be 12 s.
const ROUND: Duration = Duration::from_secs(10);
/// The time for one call that finds the node out, where to wait for its answer would take 10 s.
const FIRST: Duration = Duration::from_secs(8);
/// The time for an election over such a node.
const ELECTION: Duration = Duration::from_secs(12);

/// A leader's lease. A third of it passes between renewals, and each node that does not answer costs 2 s: on a machine that is
/// busy, one that has just gone on may be such a node as well.
const TTL: Duration = Duration::from_secs(9);

fn options(nodes: &[Etcd]) -> EtcdOptions {
    EtcdOptions { ttl: TTL, ..EtcdOptions::new(nodes.iter().map(|node| node.endpoint.clone()).collect()) }
}

async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("waited in vain for {what}"))
}

async fn within<T>(limit: Duration, what: &str, future: impl Future<Output = T>) -> T {
    let begun = Instant::now();
    let done = soon(what, future).await;
    assert!(begun.elapsed() <= limit, "{what} took {:?}, of {limit:?}", begun.elapsed());
    done
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_stands_still_is_waited_for_once() {
    let dir = tempfile::tempdir().unwrap();
    let Some(nodes) = Etcd::start_three(dir.path(), 1000) else { return };
    let (scope, options) = (Scope::new(), options(&nodes));
    let registry = EtcdRegistry::connect(&options, &scope).await.unwrap();
    let fence = soon("an election", registry.lead("test")).await.unwrap();
    let lost = registry.lost();
    tokio::pin!(lost);
    let members = registry.members();
    members.register(Member { id: "agent".into(), value: Vec::new() }, &scope);
    soon("the member", async { while members.members().await.unwrap().is_empty() {} }).await;

    let mut written = 0_u32;
    for (number, node) in nodes.iter().enumerate() {
        let renews = node.under_way("LeaseKeepAlive") > 0.0;
        node.signal("STOP");
        for round in 0..2 {
            written += 1;
            let put = vec![Write::Put("a".into(), written.to_string().into_bytes())];
            let calls = async {
                registry.commit(fence, put).await.unwrap();
                registry.commit(fence, Vec::new()).await.unwrap();
                let found = registry.get("a").await.unwrap();
                assert_eq!(found, Some(written.to_string().into_bytes()));
                assert_eq!(registry.list("", None, 9).await.unwrap().len(), 1);
                assert_eq!(members.leader().await.unwrap().as_deref(), Some("test"));
                members.members().await.unwrap();
            };
            within(ROUND, &format!("node {number}, round {round}"), calls).await;
        }
        // Whoever comes to it anew waits once, whichever node it draws.
        within(FIRST, "a new client", Members::connect(&options)).await.unwrap();
        if renews {
            // Longer than a lease: it is renewed at another node.
            let whole = tokio::time::timeout(TTL + Duration::from_secs(1), &mut lost).await;
            assert!(whole.is_err(), "node {number}: the leadership is lost");
            assert_eq!(members.members().await.unwrap().len(), 1, "node {number}: the member is gone");
        }

        // It goes on with what it was asked: none of that counts any more.
        node.signal("CONT");
        let alone = EtcdOptions::new(vec![node.endpoint.clone()]);
        soon("the node", async { while Members::connect(&alone).await.is_err() {} }).await;
        assert_eq!(registry.get("a").await.unwrap(), Some(written.to_string().into_bytes()));
    }
    assert!(scope.finish(PATIENCE).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_election_over_a_node_that_stands_still_moves_on() {
    let dir = tempfile::tempdir().unwrap();
    let Some(nodes) = Etcd::start_three(dir.path(), 1000) else { return };
    let (first_scope, second_scope, options) = (Scope::new(), Scope::new(), options(&nodes));
    let first = EtcdRegistry::connect(&options, &first_scope).await.unwrap();
    soon("an election", first.lead("first")).await.unwrap();
    let second = EtcdRegistry::connect(&options, &second_scope).await.unwrap();
    let waits = second.lead("second");
    tokio::pin!(waits);
    let stands = async {
        loop {
            if let Some(node) = nodes.iter().find(|node| node.under_way("Campaign") > 0.0) {
                return node;
            }
            tokio::task::yield_now().await;
        }
    };
    let node = tokio::select! {
        node = soon("the second to stand", stands) => node,
        _ = &mut waits => panic!("the first leads"),
    };
    node.signal("STOP");
    // The lease that the second stands with is renewed by the same node: it finds out within a third of the lease, and before
    // its connection would break.
    tokio::select! {
        left = first_scope.finish(PATIENCE) => assert!(left),
        _ = &mut waits => panic!("the first leads"),
    }
    within(ELECTION, "the second", waits).await.unwrap();
    node.signal("CONT");
    assert!(second_scope.finish(PATIENCE).await);
}

/// Without a majority the node that is left tells what it knows, and nothing is written.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_last_known_is_read_without_a_majority() {
    let dir = tempfile::tempdir().unwrap();
    let Some(mut nodes) = Etcd::start_three(dir.path(), 1000) else { return };
    let (scope, options) = (Scope::new(), options(&nodes));
    let registry = EtcdRegistry::connect(&options, &scope).await.unwrap();
    let fence = soon("an election", registry.lead("test")).await.unwrap();
    // The second is so large that it lies in parts.
    let (small, large) = (b"1".to_vec(), vec![7; 200_000]);
    let put = |key: &str, value: &Vec<u8>| Write::Put(key.into(), value.clone());
    registry.commit(fence, vec![put("a/small", &small), put("a/large", &large)]).await.unwrap();
    let (last_known, members) = (registry.last_known(), registry.last_members());
    // The one that leads has written it, and so has heard of it.
    for node in nodes.iter_mut().filter(|node| !node.leads()).collect::<Vec<_>>() {
        node.kill();
    }
    let read = async {
        assert_eq!(last_known.get("a/small").await.unwrap(), Some(small.clone()));
        assert_eq!(last_known.get("nothing").await.unwrap(), None);
        let want = [("a/large".to_string(), large), ("a/small".to_string(), small)];
        assert_eq!(last_known.list("a/", None, 9).await.unwrap(), want);
        assert_eq!(members.leader().await.unwrap().as_deref(), Some("test"));
        let refused = last_known.commit(fence, Vec::new()).await.unwrap_err();
        assert!(matches!(refused, RegistryError::Unavailable(_)), "{refused}");
    };
    soon("what was known", read).await;
    let refused = soon("a refusal", registry.get("a/small")).await.unwrap_err();
    assert!(matches!(refused, RegistryError::Unavailable(_)), "{refused}");
    // Its lease cannot be given back; nobody waits for that.
    scope.cancel();
}
