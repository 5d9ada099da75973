//! The nodes of an etcd, in the order in which they are asked.
//!
//! gRPC's own balancer draws a node for each call, and one again that takes connections but never answers: its process stands
//! still, or the way to it swallows what is sent. Signs of life on the connection find that out late, as etcd drops
//! clients that ask for them more often than every 5 s. So one node is asked as long as it answers. One that does not goes to
//! the end, and its turn comes again once all before it went the same way.

use etcd_client::{Client, ConnectOptions};
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::futures::Notified;
use tokio::sync::{Notify, OnceCell};

/// A node, and the client that speaks to it alone.
pub(super) struct Node {
    pub(super) endpoint: String,
    settings: ConnectOptions,
    client: OnceCell<Client>,
    silent: Notify,
}

impl Node {
    /// The client, which signs in first, where it has a user; clones share its connection.
    pub(super) async fn client(&self) -> Result<Client, etcd_client::Error> {
        let connect = || Client::connect([&self.endpoint], Some(self.settings.clone()));
        self.client.get_or_try_init(connect).await.cloned()
    }

    /// Returns when somebody finds that it does not answer, from the moment of this call on.
    pub(super) fn silent(&self) -> Notified<'_> {
        self.silent.notified()
    }
}

/// All nodes. Clones have the same order.
#[derive(Clone)]
pub(super) struct Nodes(Arc<Mutex<Vec<Arc<Node>>>>);

impl Nodes {
    /// Each program of a fleet begins with another, so that they spread.
    pub(super) fn new(endpoints: &[String], settings: &ConnectOptions) -> Self {
        let node = |endpoint: &String| {
            let (endpoint, settings) = (endpoint.clone(), settings.clone());
            Arc::new(Node { endpoint, settings, client: OnceCell::new(), silent: Notify::new() })
        };
        let mut nodes: Vec<_> = endpoints.iter().map(node).collect();
        let drawn = RandomState::new().hash_one(0) as usize;
        let first = drawn.checked_rem(nodes.len()).unwrap_or_default();
        nodes.rotate_left(first);
        Self(Arc::new(Mutex::new(nodes)))
    }

    /// A poisoned lock is no matter: no method can panic half-way through a change.
    fn order(&self) -> MutexGuard<'_, Vec<Arc<Node>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The one to ask; `None` if there is none at all.
    pub(super) fn first(&self) -> Option<Arc<Node>> {
        self.order().first().cloned()
    }

    /// All of them, the one to ask first.
    pub(super) fn all(&self) -> Vec<Arc<Node>> {
        self.order().clone()
    }

    /// Whether there is no other to ask.
    pub(super) fn is_one(&self) -> bool {
        self.order().len() == 1
    }

    /// It is asked from now on.
    pub(super) fn answers(&self, node: &Arc<Node>) {
        let mut order = self.order();
        if let Some(at) = order.iter().position(|other| Arc::ptr_eq(other, node)) {
            order[..=at].rotate_right(1);
        }
    }

    /// The others are asked before it from now on.
    pub(super) fn fails(&self, node: &Arc<Node>) {
        let mut order = self.order();
        if let Some(at) = order.iter().position(|other| Arc::ptr_eq(other, node)) {
            order[at..].rotate_left(1);
        }
    }

    /// The same, and whoever waits for a long answer of it hears that.
    pub(super) fn is_silent(&self, node: &Arc<Node>) {
        self.fails(node);
        node.silent.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(nodes: &Nodes) -> String {
        nodes.order().iter().map(|node| node.endpoint.as_str()).collect()
    }

    #[test]
    fn one_is_asked_as_long_as_it_answers() {
        let names = ["a", "b", "c"].map(String::from);
        let nodes = Nodes::new(&names, &ConnectOptions::new());
        // As if "a" had been drawn.
        let at = |name: &str| nodes.order().iter().find(|node| node.endpoint == name).cloned().unwrap();
        let (a, b, c) = (at("a"), at("b"), at("c"));
        for node in [&c, &b, &a] {
            nodes.answers(node);
        }
        assert_eq!(order(&nodes), "abc");
        nodes.answers(&a);
        assert_eq!(order(&nodes), "abc");
        nodes.fails(&a);
        assert_eq!(order(&nodes), "bca");
        nodes.fails(&a);
        assert_eq!(order(&nodes), "bca", "whoever else was waiting for it");
        nodes.answers(&c);
        assert_eq!(order(&nodes), "cba");
        nodes.is_silent(&c);
        nodes.is_silent(&b);
        assert_eq!(order(&nodes), "acb", "the one that was silent first is asked first");
    }

    #[tokio::test]
    async fn whoever_waits_hears_of_silence_and_not_of_a_failure() {
        let nodes = Nodes::new(&["a".into(), "b".into()], &ConnectOptions::new());
        let node = nodes.first().unwrap();
        let mut silent = std::pin::pin!(node.silent());
        nodes.fails(&node);
        assert!(futures::poll!(silent.as_mut()).is_pending());
        nodes.is_silent(&node);
        assert!(futures::poll!(silent.as_mut()).is_ready());
        assert!(!nodes.is_one());
        assert!(Nodes::new(&[], &ConnectOptions::new()).first().is_none());
    }
}
