//! A real etcd with TLS and users: what the programs need of it, and no more. The roles are those of docs/security.md.

#![cfg(feature = "etcd")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use actor::Scope;
use etcd_client::{Client as Raw, ConnectOptions, Permission};
use registry::etcd::{EtcdOptions, Members};
use registry::{EtcdRegistry, Leadership, Member, Registry, RegistryError, Write};
use security::{Client, Secret};
use std::path::Path;
use std::time::Duration;
use tests::certificates::{Authority, Pair};
use tests::etcd::Etcd;

const PATIENCE: Duration = Duration::from_secs(60);

async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("waited in vain for {what}"))
}

fn client(authority: &Path, pair: &Pair) -> Client {
    Client { ca: Some(authority.into()), identity: Some(pair.both()), ..Client::default() }
}

/// etcd as a person's own client has it, under the name of a certificate.
async fn raw(endpoint: &str, client: &Client) -> Raw {
    let options = ConnectOptions::new().with_tls(client.tls().unwrap());
    Raw::connect([endpoint], Some(options)).await.unwrap()
}

/// What docs/security.md does with etcdctl.
async fn grant(root: &mut Raw) {
    root.user_add("root", "root's password", None).await.unwrap();
    root.user_grant_role("root", "root").await.unwrap();
    root.role_add("coordinator").await.unwrap();
    let all = Permission::read_write("/lorafleet/").with_prefix();
    root.role_grant_permission("coordinator", all).await.unwrap();
    root.user_add("coordinator", "coordinator's password", None).await.unwrap();
    root.user_grant_role("coordinator", "coordinator").await.unwrap();
    root.role_add("gpu-1").await.unwrap();
    root.role_grant_permission("gpu-1", Permission::read("/lorafleet/leader/").with_prefix()).await.unwrap();
    root.role_grant_permission("gpu-1", Permission::read_write("/lorafleet/agents/gpu-1")).await.unwrap();
    root.user_add("gpu-1", "gpu-1's password", None).await.unwrap();
    root.user_grant_role("gpu-1", "gpu-1").await.unwrap();
    root.auth_enable().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_has_the_rights_that_it_needs_and_no_more() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path(), "authority");
    let own = authority.issue("etcd");
    let Some(etcd) = Etcd::start_secured(&dir.path().join("etcd"), &own, &authority.ca) else { return };
    let ca = authority.ca.as_path();
    let root = client(ca, &authority.issue("root"));
    soon("root", async { grant(&mut raw(&etcd.endpoint, &root).await).await }).await;

    // The coordinator by its password, the agent by its certificate's name.
    let options = |client: Client, user: Option<(&str, &str)>| EtcdOptions {
        client,
        user: user.map(|(name, password)| (name.to_string(), Secret::from(password.to_string()))),
        ..EtcdOptions::new(vec![etcd.endpoint.clone()])
    };
    let some = client(ca, &authority.issue("some-machine"));
    let scope = Scope::new();
    let coordinator = options(some.clone(), Some(("coordinator", "coordinator's password")));
    let registry = soon("the registry", EtcdRegistry::connect(&coordinator, &scope)).await.unwrap();
    let fence = soon("leading", registry.lead("https://c1:7401")).await.unwrap();
    let write = Write::Put("a".into(), b"1".to_vec());
    soon("a write", registry.commit(fence, vec![write])).await.unwrap();

    let agent = options(client(ca, &authority.issue("gpu-1")), None);
    let members = soon("members", Members::connect(&agent)).await.unwrap();
    let leader = soon("the leader", members.leader()).await.unwrap();
    assert_eq!(leader.as_deref(), Some("https://c1:7401"));
    let entered = Scope::new();
    members.register(Member { id: "gpu-1".into(), value: b"it".to_vec() }, &entered);
    soon("the member", async {
        while registry.members().members().await.unwrap().len() != 1 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let mut thief = raw(&etcd.endpoint, &agent.client).await;
    for key in ["/lorafleet/state/a", "/lorafleet/agents/gpu-2", "/lorafleet/leader/1", "/other"] {
        let refused = thief.put(key, "mine", None).await.unwrap_err().to_string();
        assert!(refused.contains("permission denied"), "{key}: {refused}");
    }
    for key in ["/lorafleet/state/a", "/lorafleet/agents/gpu-2"] {
        let refused = thief.get(key, None).await.unwrap_err().to_string();
        assert!(refused.contains("permission denied"), "{key}: {refused}");
    }
    assert!(entered.finish(PATIENCE).await);
    assert_eq!(soon("the list", registry.members().members()).await.unwrap(), []);

    // What is said where it fails.
    let stranger = Authority::new(dir.path(), "stranger");
    let trusting = Client { ca: Some(ca.into()), ..Client::default() };
    let cases = [
        (options(some.clone(), Some(("coordinator", "wrong secret"))), "authentication failed"),
        (options(some, None), "permission denied"),
        (options(trusting, None), "with --etcd-cert and --etcd-key"),
        (options(client(&stranger.ca, &own), None), "with --etcd-ca"),
        (EtcdOptions::new(vec![etcd.endpoint.replace("https", "http")]), "https://"),
    ];
    for (options, want) in cases {
        let refusal = soon("a refusal", Members::connect(&options)).await.unwrap_err();
        let error = refusal.to_string();
        // Who waits for an etcd that does not answer does not wait for one that refuses them.
        let refuses = ["authentication failed", "permission denied"].contains(&want);
        assert!(!refuses || matches!(refusal, RegistryError::Storage(_)), "{refusal:?}");
        assert!(error.contains(want), "{error}, not {want}");
        assert!(!error.contains("wrong secret"), "{error}");
    }
    assert!(scope.finish(PATIENCE).await);
}
