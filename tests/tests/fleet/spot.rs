//! Machines that their cloud takes away.

use crate::common::{results, submit, until};
use crate::{Fleet, soon, there};
use proto::v1;
use registry::Leadership;
use tests::metadata::Metadata;
use tests::program::Program;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_machine_that_is_taken_away_hands_its_trials_over() {
    let Some(fleet) = Fleet::new() else { return };
    let metadata = Metadata::start().await;
    metadata.set("preempted", "FALSE");
    let mut coordinator = fleet.coordinator();
    let endpoint = coordinator.says("listening on ");
    coordinator.says("leading");
    let notice = format!("gce={}", metadata.endpoint);
    let taken = fleet.agent_with("taken", &["--spot-notice", &notice]);
    soon("a question", metadata.heard("preempted")).await;
    let sweep = submit(&endpoint).await;
    soon("training", until(&endpoint, &sweep, 10)).await;
    metadata.set("preempted", "TRUE");
    assert!(tokio::task::block_in_place(|| taken.ends()));
    let members = fleet.members().await;
    assert_eq!(members.members().await.unwrap(), [], "it left at once, and not when a lease ended");

    // What starts it again before the machine is gone brings nothing back: it waits.
    let mut again = fleet.agent_with("taken", &["--spot-notice", &notice]);
    soon("the second look", metadata.heard("preempted")).await;
    let _other = fleet.agent("other");
    soon("the end", until(&endpoint, &sweep, u64::MAX)).await;
    for (number, trial) in results(&endpoint, &sweep).await {
        assert_eq!((trial.state, trial.attempts), (v1::TrialState::Completed, 2), "trial {number}");
    }
    assert!(again.runs());
    soon("the other alone", there(&members, 1)).await;
    // The machine stays after all.
    metadata.set("preempted", "FALSE");
    soon("both", there(&members, 2)).await;
    assert!(again.terminate() && coordinator.terminate());
}

/// The server of one machine.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_is_taken_away_goes_on_once_the_machine_stays() {
    let (metadata, dir) = (Metadata::start().await, tempfile::tempdir().unwrap());
    metadata.set("preempted", "FALSE");
    let (notice, data) = (format!("gce={}", metadata.endpoint), dir.path().join("data"));
    let start = || {
        let place = ["up", "--listen", "127.0.0.1:0", "--data-dir", data.to_str().unwrap()];
        Program::start_heard("lorafleet", &[&place[..], &["--spot-notice", &notice]].concat())
    };
    let endpoint = || std::fs::read_to_string(data.join("endpoint")).unwrap().trim().to_string();
    let mut taken = start();
    taken.says("LoraFleet ");
    soon("a question", metadata.heard("preempted")).await;
    let sweep = submit(&endpoint()).await;
    soon("training", until(&endpoint(), &sweep, 10)).await;
    metadata.set("preempted", "TRUE");
    assert!(tokio::task::block_in_place(|| taken.ends()));

    // Started again before the machine is gone it trains nothing, until the machine stays after all.
    let mut again = start();
    again.says("waiting: ");
    metadata.set("preempted", "FALSE");
    again.says("LoraFleet ");
    soon("the end", until(&endpoint(), &sweep, u64::MAX)).await;
    for (number, trial) in results(&endpoint(), &sweep).await {
        assert_eq!((trial.state, trial.attempts), (v1::TrialState::Completed, 2), "trial {number}");
    }
    assert!(again.terminate());
}

/// What each cloud says, and whether the agent leaves.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_said_of_a_machine() {
    let of_gce = &["preempted", "maintenance-event"][..];
    let action = "spot/instance-action";
    let stop = r#"{"action": "stop", "time": "2026-01-01T00:00:00Z"}"#;
    let terminate = "TERMINATE_ON_HOST_MAINTENANCE";
    let rows = [
        ("gce", of_gce, "preempted", None, "TRUE"),
        ("gce", of_gce, "maintenance-event", Some("MIGRATE_ON_HOST_MAINTENANCE"), terminate),
        ("aws", &[action], action, None, stop),
    ];
    for (cloud, all, path, harmless, value) in rows {
        let (metadata, dir) = (Metadata::start().await, tempfile::tempdir().unwrap());
        let notice = format!("{cloud}={}", metadata.endpoint);
        let data = dir.path().to_str().unwrap();
        // Nobody listens there: it leaves without having been connected.
        let place = ["--coordinator", "http://127.0.0.1:1", "--devices", "cpu", "--data-dir", data];
        let mut agent =
            Program::start_heard("gpu-agent", &[&place[..], &["--spot-notice", &notice]].concat());
        for path in all {
            soon("a question", metadata.heard(path)).await;
        }
        if let Some(harmless) = harmless {
            metadata.set(path, harmless);
            soon(harmless, metadata.heard(path)).await;
            assert!(agent.runs(), "{harmless}");
        }
        metadata.set(path, value);
        let ends = tokio::task::block_in_place(|| agent.ends());
        assert!(ends, "{cloud} {path}");
    }
}
