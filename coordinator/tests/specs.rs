//! Specs that are too large for etcd: where they lie, who names them, what removes them, and what a damaged one does. On the
//! registry's model with objects in memory, and on a real etcd with objects behind a real protocol.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use actor::Scope;
use bytes::Bytes;
use common::client;
use coordinator::actors::agent_session::Desk;
use coordinator::actors::dispatcher::Terms;
use coordinator::artifacts::Artifacts;
use coordinator::place::{Objects, Place};
use coordinator::store::{Batch, Revision, Store, SweepRecord, Tombstone, TrialRecord};
use coordinator::{CoordinatorError, Kept, go_on};
use domain::data::{ContentHash, Reference};
use domain::footprint::ModelShape;
use domain::sweep::{StateCounts, Sweep, SweepSpec, SweepState};
use domain::trial::TrialState;
use domain::{Attempt, SweepId, SystemClock, Timestamp, TrialId};
use futures::TryStreamExt;
use object_store::memory::InMemory;
use object_store::path::Path as ObjectPath;
use object_store::{ObjectStore, ObjectStoreExt};
use proto::status::RpcError;
use registry::{INLINE_LIMIT, MemoryRegistry, Registry, RegistryError, Write};
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tests::s3::S3;

/// What the state says of a sweep whose spec is elsewhere takes no more.
const HEAD_BYTES: usize = 1024;

/// What leaders share.
struct Fleet {
    registry: Arc<dyn Registry>,
    objects: Arc<dyn ObjectStore>,
}

/// A leader's state, and its checkpoints.
struct Leader {
    store: Store,
    artifacts: Artifacts,
}

impl Fleet {
    async fn lead(&self) -> Leader {
        let store = Store::lead(self.registry.clone(), "test").await.unwrap();
        let artifacts = Artifacts::on(self.objects.clone()).in_term(store.term(), Scope::new());
        Leader { store: store.beside(artifacts.clone()), artifacts }
    }

    /// The names of all objects, in their order.
    async fn names(&self) -> Vec<String> {
        let objects: Vec<_> = self.objects.list(None).try_collect().await.unwrap();
        let mut names: Vec<_> = objects.into_iter().map(|object| object.location.to_string()).collect();
        names.sort_unstable();
        names
    }

    /// What the state has of a sweep.
    async fn kept(&self, id: &str) -> Vec<u8> {
        self.registry.get(&format!("sweeps/{id}")).await.unwrap().unwrap()
    }
}

impl Leader {
    async fn put(&self, record: &SweepRecord) {
        self.store.commit(batch(record)).await.unwrap();
    }

    async fn sweep(&self, id: &str) -> Result<SweepRecord, CoordinatorError> {
        self.store.sweep(&SweepId::new(id)).await.map(Option::unwrap)
    }

    /// What a leader does when it begins.
    async fn clean(&self) {
        self.artifacts.delete_all_but(&self.store.paths().await.unwrap()).await.unwrap();
    }
}

/// Runs a test on each pair of stores.
async fn each<T: Future<Output = ()>>(test: impl Fn(Fleet) -> T) {
    test(Fleet { registry: Arc::new(MemoryRegistry::new()), objects: Arc::new(InMemory::new()) }).await;
    #[cfg(feature = "etcd")]
    {
        let dir = tempfile::tempdir().unwrap();
        let Some(server) = tests::etcd::Etcd::start(dir.path()) else { return };
        let (scope, s3) = (Scope::new(), S3::start());
        let options = registry::etcd::EtcdOptions::new(vec![server.endpoint.clone()]);
        let registry = registry::EtcdRegistry::connect(&options, &scope).await.unwrap();
        test(Fleet { registry: Arc::new(registry), objects: client(&s3) }).await;
        assert!(scope.finish(Duration::from_secs(60)).await, "it ends");
    }
}

fn batch(record: &SweepRecord) -> Batch {
    let mut batch = Batch::default();
    batch.submission(record);
    batch
}

/// A spec with so many letters more than the least.
fn spec(letters: usize) -> SweepSpec {
    spec_on("/m", letters)
}

fn spec_on(model: &str, letters: usize) -> SweepSpec {
    let document = json!({
        "name": "s", "pretrained_model_id": model, "dataset_name": format!("/d{}", "x".repeat(letters)),
        "max_steps": 7, "search": { "algorithm": "grid", "metric": "loss" },
        "parameters": { "learning_rate": [1e-4, 0.1, 3.0e-5] },
    });
    SweepSpec::from_document(document.as_object().unwrap()).unwrap()
}

fn record(id: &str, letters: usize) -> SweepRecord {
    let sweep = Sweep {
        id: SweepId::new(id),
        spec: spec(letters),
        state: SweepState::Running,
        request_id: format!("request of {id}"),
        namespace: "default".into(),
        proposed: 0,
        max_trials: Some(3),
        counts: StateCounts::default(),
        best: None,
        cost_usd: 0.1,
        failure: None,
        ended_early: None,
        created_at: Timestamp(1_700_000_000_000),
        finished_at: None,
    };
    SweepRecord::new(sweep, BTreeMap::from([("/m".to_string(), shape())]))
}

fn shape() -> ModelShape {
    let shape = json!({
        "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "tie_word_embeddings": false,
    });
    serde_json::from_value(shape).unwrap()
}

/// The letters with which what is asked of a sweep takes so many bytes.
fn letters_for(bytes: usize) -> usize {
    let record = serde_json::to_vec(&record("a-0001", 0)).unwrap();
    let record: serde_json::Value = serde_json::from_slice(&record).unwrap();
    let asked = json!({
        "spec": record["sweep"]["spec"], "revisions": record["revisions"],
        "extensions": record["extensions"], "base_models": record["base_models"],
    });
    bytes - asked.to_string().len()
}

#[tokio::test]
async fn what_is_too_large_for_the_state_is_an_object() {
    each(|fleet| async move {
        let rows = [
            ("small-0001", 0, false),
            ("limit-0001", letters_for(INLINE_LIMIT), false),
            ("above-0001", letters_for(INLINE_LIMIT + 1), true),
            ("large-0001", 250_000, true),
        ];
        for (id, letters, is_object) in rows {
            let (first, before) = (fleet.lead().await, fleet.names().await);
            let mut written = record(id, letters);
            first.put(&written).await;
            assert_eq!(first.sweep(id).await.unwrap(), written, "{id}");
            let after = fleet.names().await;
            let made: Vec<_> = after.iter().filter(|name| !before.contains(name)).collect();
            assert_eq!(made.len(), usize::from(is_object), "{id}: {made:?}");
            let (begins, ends) = (format!("sweeps/{id}/spec-"), format!("-t{}", first.store.term()));
            assert!(made.iter().all(|name| name.starts_with(&begins) && name.ends_with(&ends)), "{made:?}");
            let kept = fleet.kept(id).await.len();
            assert!(kept <= HEAD_BYTES + if is_object { 0 } else { INLINE_LIMIT }, "{id}: {kept} bytes");

            // What changes with each trial changes no object, also under the next leader, to whom it is of use.
            let second = fleet.lead().await;
            assert_eq!(second.sweep(id).await.unwrap(), written, "{id}");
            written.sweep.cost_usd = 0.3;
            second.put(&written).await;
            second.clean().await;
            assert_eq!(second.sweep(id).await.unwrap(), written, "{id}");
            assert_eq!(fleet.names().await, after, "{id}");
        }
    })
    .await;
}

#[tokio::test]
async fn records_of_the_version_before_are_read() {
    each(|fleet| async move {
        let fence = fleet.registry.lead("the version before").await.unwrap();
        let mut old = record("old-0001", 100_000);
        let value = serde_json::to_vec(&old).unwrap();
        fleet
            .registry
            .commit(fence, vec![Write::Put("sweeps/old-0001".into(), value.clone())])
            .await
            .unwrap();
        let leader = fleet.lead().await;
        assert_eq!(leader.sweep("old-0001").await.unwrap(), old);
        assert_eq!(leader.store.sweep_heads().await.unwrap().len(), 1);
        assert_eq!(leader.store.trees().await.unwrap(), BTreeSet::new());
        assert_eq!((fleet.kept("old-0001").await, fleet.names().await), (value, vec![]));
        // Written anew, it is as others are.
        old.sweep.state = SweepState::Paused;
        leader.put(&old).await;
        assert_eq!(leader.sweep("old-0001").await.unwrap(), old);
        assert_eq!(fleet.names().await.len(), 1);
        assert!(fleet.kept("old-0001").await.len() <= HEAD_BYTES);
    })
    .await;
}

fn uploaded(tree: ContentHash) -> SweepSpec {
    spec_on(&Reference { tree, name: "m".into(), is_directory: true }.to_string(), 9_000)
}

/// Of a record that does not say what its object names, everything is kept while that cannot be read.
#[tokio::test]
async fn what_is_uploaded_is_known_without_the_objects() {
    each(|fleet| async move {
        let first = fleet.lead().await;
        let mut sweep = record("a-0001", 9_000);
        let (before, after) = (ContentHash([1; 32]), ContentHash([2; 32]));
        sweep.revisions.push(Revision { from: 1, spec: uploaded(before) });
        sweep.sweep.spec = uploaded(after);
        first.put(&sweep).await;
        first.put(&record("small-0001", 0)).await;
        let (trees, kept) = (BTreeSet::from([before, after]), fleet.kept("a-0001").await);
        let mut unsaid: serde_json::Value = serde_json::from_slice(&kept).unwrap();
        unsaid["specs"].as_object_mut().unwrap().remove("trees").unwrap();
        let unsaid = serde_json::to_vec(&unsaid).unwrap();
        let damaged = ObjectPath::from(fleet.names().await.remove(0));

        for (is_damaged, value, known) in
            [(false, &kept, true), (false, &unsaid, true), (true, &kept, true), (true, &unsaid, false)]
        {
            if is_damaged {
                fleet.objects.put(&damaged, Bytes::new().into()).await.unwrap();
            }
            let fence = fleet.registry.lead("another version").await.unwrap();
            let write = Write::Put("sweeps/a-0001".into(), value.clone());
            fleet.registry.commit(fence, vec![write]).await.unwrap();
            let found = fleet.lead().await.store.trees().await;
            match known {
                true => assert_eq!(found.unwrap(), trees),
                false => assert!(matches!(found, Err(CoordinatorError::Unreadable { .. })), "{found:?}"),
            }
        }
    })
    .await;
}

/// Each extension keeps the specs before it.
#[tokio::test]
async fn what_an_extension_replaces_goes_with_the_next_leader() {
    each(|fleet| async move {
        let first = fleet.lead().await;
        let mut record = record("a-0001", 10_000);
        first.put(&record).await;
        let begun = fleet.names().await;
        let extend = |record: &mut SweepRecord, letters: usize| {
            record.revisions.push(Revision { from: 1, spec: record.sweep.spec.clone() });
            record.sweep.spec = spec(letters);
        };
        extend(&mut record, 20_000);
        first.put(&record).await;
        let extended: Vec<_> = fleet.names().await.into_iter().filter(|name| !begun.contains(name)).collect();
        assert_eq!((begun.len(), extended.len()), (1, 1));

        let second = fleet.lead().await;
        second.clean().await;
        assert_eq!(fleet.names().await, extended);
        assert_eq!(second.sweep("a-0001").await.unwrap(), record);
        // Back to what it was: what is named anew is of the leader's own term.
        (record.sweep.spec, record.revisions) = (spec(10_000), Vec::new());
        second.put(&record).await;
        assert_eq!(second.sweep("a-0001").await.unwrap(), record);
        let named = serde_json::from_slice::<serde_json::Value>(&fleet.kept("a-0001").await).unwrap();
        let path = named["specs"]["path"].as_str().unwrap();
        assert!(path.ends_with(&format!("-t{}", second.store.term())), "{path}");
        assert_eq!(path.split("-t").next(), begun[0].split("-t").next(), "the same content");
    })
    .await;
}

/// An object without the transaction that was to name it: its leader was killed in between, or was replaced.
#[tokio::test]
async fn what_nobody_came_to_name_is_removed_and_nothing_else() {
    each(|fleet| async move {
        let first = fleet.lead().await;
        let killed = SweepId::new("killed-0001");
        first.artifacts.keep_spec(&killed, Bytes::from_static(b"{}")).await.unwrap();
        let (second, sweep) = (fleet.lead().await, record("a-0001", 9_000));
        let refusal = first.store.commit(batch(&sweep)).await.unwrap_err();
        let is_fenced = matches!(refusal, CoordinatorError::Registry(RegistryError::Fenced { .. }));
        assert!(is_fenced, "{refusal}");
        assert_eq!(fleet.registry.get("sweeps/a-0001").await.unwrap(), None);
        assert_eq!(fleet.names().await.len(), 2);
        second.put(&sweep).await;
        assert_eq!(fleet.names().await.len(), 3);

        // Whoever was replaced goes on with what it does at its beginning: nothing of a later term goes, nor of its own.
        first.artifacts.delete_all_but(&BTreeSet::new()).await.unwrap();
        assert_eq!(fleet.names().await.len(), 3);
        second.clean().await;
        let own = format!("-t{}", second.store.term());
        let left = fleet.names().await;
        assert!(
            left.len() == 1 && left[0].starts_with("sweeps/a-0001/") && left[0].ends_with(&own),
            "{left:?}"
        );
        assert_eq!(second.sweep("a-0001").await.unwrap(), sweep);
    })
    .await;
}

/// Its coordinator was killed between the transaction that deleted it and its objects.
#[tokio::test]
async fn a_deleted_sweeps_object_goes_after_a_kill_too() {
    each(|fleet| async move {
        let (leader, sweep) = (fleet.lead().await, record("a-0001", 9_000));
        leader.put(&sweep).await;
        let id = sweep.sweep.id;
        let mut batch = Batch::default();
        batch.remove(&leader.store.sweep_head(&id).await.unwrap().unwrap(), Vec::new());
        batch.tombstone(&Tombstone { sweep: id, deleted_at: Timestamp(1), completed_at: None });
        leader.store.commit(batch).await.unwrap();
        let is_object = |name: &String| name.starts_with("sweeps/");
        assert_eq!(fleet.names().await.iter().filter(|name| is_object(name)).count(), 1);

        let scope = Scope::new();
        let _desk = serve(&fleet, &scope).await;
        assert_eq!(fleet.names().await.iter().filter(|name| is_object(name)).count(), 0);
        scope.finish(Duration::from_secs(60)).await;
    })
    .await;
}

async fn serve(fleet: &Fleet, scope: &Scope) -> Desk {
    let store = Store::lead(fleet.registry.clone(), "test").await.unwrap();
    let place = Place::Objects(Objects::on(fleet.objects.clone(), "test"));
    let kept = Kept::open(store, &place, scope).await.unwrap();
    let terms = Terms { heartbeat: Duration::from_secs(5), lease: Duration::from_secs(30) };
    go_on(kept, Arc::new(SystemClock::new()), terms, scope).await.unwrap()
}

/// Its actor knows all of it, and writes its record again.
#[tokio::test]
async fn a_sweep_that_runs_is_not_over_because_its_object_is_damaged() {
    let fleet = Fleet { registry: Arc::new(MemoryRegistry::new()), objects: Arc::new(InMemory::new()) };
    let (leader, sweep) = (fleet.lead().await, record("a-0001", 9_000));
    leader.put(&sweep).await;
    let (id, scope) = (sweep.sweep.id, Scope::new());
    let desk = serve(&fleet, &scope).await;
    let directory = &desk.directory;
    let names = fleet.names().await;
    let name = names.into_iter().find(|name| name.starts_with("sweeps/a-0001/spec-")).unwrap();
    fleet.objects.put(&ObjectPath::from(name), Bytes::new().into()).await.unwrap();
    // So large that nothing that was read before stays in memory.
    let mut large = record("large-0001", 33 << 20);
    large.sweep.state = SweepState::Completed;
    directory.store().commit(batch(&large)).await.unwrap();
    assert!(directory.store().is_unreadable(&id).await.unwrap());

    let refusal = directory.delete(&id, false).await.unwrap_err();
    assert!(matches!(refusal, CoordinatorError::Over { .. }), "{refusal}");
    assert_eq!(directory.sweep(&id).await.unwrap().state, SweepState::Running);
    directory.delete(&id, true).await.unwrap();
    let refusal = directory.sweep(&id).await.unwrap_err();
    assert!(matches!(refusal, CoordinatorError::NotFound { .. }), "{refusal}");
    assert_eq!(fleet.registry.get("sweeps/a-0001").await.unwrap(), None);
    scope.finish(Duration::from_secs(60)).await;
}

#[tokio::test]
async fn a_sweep_that_cannot_be_read_is_no_matter_to_others() {
    each(|fleet| async move {
        let leader = fleet.lead().await;
        let rows: [(&str, Option<&[u8]>, &str); 3] = [
            ("gone-0001", None, "there is no `"),
            ("other-0001", Some(b"{}"), "is damaged"),
            ("cut-0001", Some(b""), "is damaged"),
        ];
        for (id, bytes, _) in rows {
            leader.put(&record(id, 9_000)).await;
            let mut trial = TrialRecord::new(
                TrialId::of(&SweepId::new(id), 1),
                Default::default(),
                BTreeMap::new(),
                Timestamp(1),
            );
            (trial.trial.state, trial.trial.attempt) = (TrialState::Running, Attempt(1));
            let mut batch = Batch::default();
            batch.trial(&trial);
            leader.store.commit(batch).await.unwrap();
            let prefix = format!("sweeps/{id}/spec-");
            let name = fleet.names().await.into_iter().find(|name| name.starts_with(&prefix)).unwrap();
            let object = ObjectPath::from(name);
            match bytes {
                Some(bytes) => drop(fleet.objects.put(&object, bytes.into()).await.unwrap()),
                None => fleet.objects.delete(&object).await.unwrap(),
            }
        }
        leader.put(&record("sound-0001", 9_000)).await;

        let scope = Scope::new();
        let desk = serve(&fleet, &scope).await;
        let directory = &desk.directory;
        assert_eq!(directory.sweep(&SweepId::new("sound-0001")).await.unwrap().state, SweepState::Running);
        assert_eq!(directory.store().sweep_heads().await.unwrap().len(), 4);
        for (id, _, what) in rows {
            let sweep = SweepId::new(id);
            let refusal = directory.sweep(&sweep).await.unwrap_err();
            let said = refusal.to_string();
            for part in [id, what, &format!("sweeps/{id}/spec-"), "restore it from a copy"] {
                assert!(said.contains(part), "{said}, not {part}");
            }
            assert_eq!(said.matches("restore it").count(), 1, "{said}");
            assert!(matches!(RpcError::from(refusal), RpcError::DataLoss(_)));
            // An agent that still has a trial of it lets go of that, and is heard about others.
            let trial = TrialId::of(&sweep, 1);
            let refusal = directory.metrics(&trial, Attempt(1), Vec::new()).await.unwrap_err();
            assert!(matches!(refusal, CoordinatorError::Fenced { .. }), "{refusal}");
            // It can be deleted.
            directory.delete(&sweep, false).await.unwrap();
            let refusal = directory.sweep(&sweep).await.unwrap_err();
            assert!(matches!(refusal, CoordinatorError::NotFound { .. }), "{refusal}");
        }
        directory.delete(&SweepId::new("sound-0001"), true).await.unwrap();
        let left: Vec<_> =
            fleet.names().await.into_iter().filter(|name| name.starts_with("sweeps/")).collect();
        assert_eq!(left, [""; 0]);
        scope.finish(Duration::from_secs(60)).await;
    })
    .await;
}
