//! A fleet whose etcd is lost and started again from a snapshot. What metrics, checkpoints and agents know goes on beyond it.

use crate::common::{results, submit_as, until};
use crate::{ASSIGNMENT_LEASE, ELECTION_TTL, Fleet, soon};
use proto::v1::TrialState;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use tests::etcd::Etcd;
use tests::program::{self, Program};
use tests::s3::S3;

impl Fleet {
    /// One over an object store, whose trials' lease a test can wait for.
    fn coordinator_over(&self, store: &S3) -> Program {
        let etcd = ["--listen", "127.0.0.1:0", "--election-ttl", ELECTION_TTL, "--etcd", &self.endpoints];
        let rest = ["--assignment-lease", ASSIGNMENT_LEASE, "--artifacts", "s3://fleet/of/tests"];
        Program::start_with("coordinator", &[&etcd[..], &rest].concat(), |command| {
            command.envs(store.variables());
        })
    }

    fn snapshot(&self) -> PathBuf {
        self.dir.path().join("snapshot.db")
    }

    /// Loses all that etcd holds, and starts it at the same address on what the snapshot holds.
    fn restore(&mut self) {
        self.etcd.clear();
        std::fs::remove_dir_all(self.dir.path().join("etcd")).unwrap();
        let restored = self.dir.path().join("restored");
        Etcd::restore(&self.snapshot(), &restored);
        let address = self.endpoints.trim_start_matches("http://");
        self.etcd.extend(Etcd::start_at(&restored, address));
    }
}

fn lorafleet(endpoint: &str, arguments: &[&str]) -> String {
    let (code, said, problem) =
        program::output("lorafleet", &[arguments, &["--endpoint", endpoint]].concat(), &[]);
    assert_eq!(code, Some(0), "{arguments:?}: {problem}");
    said
}

/// The sweeps that there are.
fn listed(endpoint: &str) -> BTreeSet<String> {
    let sweeps: Vec<Value> = serde_json::from_str(&lorafleet(endpoint, &["list", "-o", "json"])).unwrap();
    sweeps.iter().map(|sweep| sweep["id"].as_str().unwrap().to_string()).collect()
}

/// The files of a sweep's two adapters, fetched to a new folder, by trial and name.
fn adapters(endpoint: &str, sweep: &str, to: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    for number in ["1", "2"] {
        let to = to.join(number);
        let trial = format!("{sweep}/{number}");
        lorafleet(endpoint, &["adapters", "pull", &trial, "--to", to.to_str().unwrap()]);
        for file in std::fs::read_dir(&to).unwrap().map(Result::unwrap) {
            let name = format!("{number}/{}", file.file_name().to_str().unwrap());
            files.insert(name, std::fs::read(file.path()).unwrap());
        }
    }
    assert!(files.len() >= 4, "{:?}", files.keys());
    files
}

/// The object store went on: a leader, the end of a sweep and another sweep came after the snapshot, and what the snapshot's
/// trials were to go on from is gone.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fleet_is_restored_under_an_object_store_that_went_on() {
    let Some(mut fleet) = Fleet::new() else { return };
    let store = S3::start();
    let mut first = fleet.coordinator_over(&store);
    let endpoint = first.says("listening on ");
    first.says("leading");
    let agent = fleet.agent("agent");
    let over = submit_as(&endpoint, 1).await.unwrap();
    soon("the first sweep", until(&endpoint, &over, u64::MAX)).await;
    let undisturbed = results(&endpoint, &over).await;
    let kept = adapters(&endpoint, &over, &fleet.dir.path().join("before"));
    let running = submit_as(&endpoint, 2).await.unwrap();
    soon("training", until(&endpoint, &running, 10)).await;
    if !fleet.etcd[0].snapshot(&fleet.snapshot()) {
        return;
    }

    assert!(first.terminate());
    let mut second = fleet.coordinator_over(&store);
    let endpoint = second.says("listening on ");
    second.says("leading");
    soon("the second sweep", until(&endpoint, &running, u64::MAX)).await;
    let forgotten = submit_as(&endpoint, 3).await.unwrap();
    soon("training of the third", until(&endpoint, &forgotten, 10)).await;
    agent.kill();
    second.kill();
    fleet.restore();

    let mut third = fleet.coordinator_over(&store);
    let endpoint = third.says("listening on ");
    third.says("leading");
    assert_eq!(listed(&endpoint), BTreeSet::from([over.clone(), running.clone()]));
    assert_eq!(results(&endpoint, &over).await, undisturbed);
    assert_eq!(adapters(&endpoint, &over, &fleet.dir.path().join("after")), kept);
    // It ends again, and as it did before.
    let agent = fleet.agent("agent");
    soon("the second sweep again", until(&endpoint, &running, u64::MAX)).await;
    for (number, trial) in results(&endpoint, &running).await {
        assert_eq!((trial.state, &trial.losses), (TrialState::Completed, &undisturbed[&number].losses));
        assert!(trial.attempts > 1, "trial {number}: {}", trial.attempts);
    }
    assert_eq!(adapters(&endpoint, &running, &fleet.dir.path().join("again")), kept);
    // The third is not known: the same request is another sweep.
    let anew = submit_as(&endpoint, 3).await.unwrap();
    soon("the third sweep", until(&endpoint, &anew, u64::MAX)).await;
    for (number, trial) in results(&endpoint, &anew).await {
        assert_eq!((trial.state, &trial.losses), (TrialState::Completed, &undisturbed[&number].losses));
    }
    assert!(agent.terminate() && third.terminate());
}

/// An agent that trained on while etcd was gone is adopted by the leader of the restored fleet.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_that_stays_is_adopted_by_a_restored_fleet() {
    let Some(mut fleet) = Fleet::new() else { return };
    let mut first = fleet.coordinator();
    let endpoint = first.says("listening on ");
    first.says("leading");
    let agent = fleet.agent("agent");
    let sweep = submit_as(&endpoint, 1).await.unwrap();
    soon("training", until(&endpoint, &sweep, 10)).await;
    // However long that takes, the sweep is not over then.
    tests::signal(agent.id(), "STOP");
    let saved = fleet.etcd[0].snapshot(&fleet.snapshot());
    tests::signal(agent.id(), "CONT");
    if !saved {
        return;
    }
    // It has checkpoints that the snapshot does not name.
    soon("more training", until(&endpoint, &sweep, 20)).await;
    first.kill();
    fleet.restore();

    let mut second = fleet.coordinator();
    let endpoint = second.says("listening on ");
    second.says("leading");
    soon("the sweep", until(&endpoint, &sweep, u64::MAX)).await;
    let found = results(&endpoint, &sweep).await;
    for (number, trial) in &found {
        assert_eq!((trial.state, trial.attempts), (TrialState::Completed, 1), "trial {number}");
    }
    adapters(&endpoint, &sweep, &fleet.dir.path().join("after"));
    assert!(agent.terminate() && second.terminate());
}
