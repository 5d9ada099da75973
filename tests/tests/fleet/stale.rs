//! A fleet whose etcd has no majority: what was known is told and said to be old, what would change it is refused; and
//! what coordinators refuse is counted.

use crate::common::{results, submit_as, until};
use crate::faults::agents;
use crate::{ELECTION_TTL, Fleet, browse, soon};
use proto::STALE_SECONDS;
use proto::v1;
use proto::v1::sweep_service_client::SweepServiceClient;
use proto::v1::trial_service_client::TrialServiceClient;
use std::collections::BTreeSet;
use std::time::Duration;
use tests::etcd::Etcd;
use tests::http::{free_address, get};
use tests::program;
use tonic::Code;

/// Between two times that something is asked, so that those who are asked can work.
const PAUSE: Duration = Duration::from_millis(50);

/// The sweeps, and how many seconds old that is, if it is.
async fn list(endpoint: &str) -> Result<(BTreeSet<String>, Option<u64>), tonic::Status> {
    let mut client = SweepServiceClient::connect(endpoint.to_string()).await.unwrap();
    let answer = client.list_sweeps(v1::ListSweepsRequest::default()).await?;
    let age = answer.metadata().get(STALE_SECONDS).map(|age| age.to_str().unwrap().parse().unwrap());
    Ok((answer.into_inner().sweeps.into_iter().map(|sweep| sweep.id).collect(), age))
}

/// Which of these nodes leads, once one does.
async fn leader(etcd: &[Etcd], nodes: &[usize]) -> usize {
    let found = async {
        loop {
            if let Some(leads) = nodes.iter().find(|node| etcd[**node].leads()) {
                return *leads;
            }
            tokio::time::sleep(PAUSE).await;
        }
    };
    soon("a node that leads", found).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_etcds_majority_reads_are_answered_and_say_how_old_they_are() {
    let Some(mut fleet) = Fleet::of_three_nodes() else { return };
    let http = free_address();
    // Longer than three nodes take to elect another leader.
    let mut coordinator =
        fleet.coordinator_with(&["--election-ttl", "8", "--assignment-lease", "60", "--http", &http]);
    let endpoint = coordinator.says("listening on ");
    coordinator.says("leading");
    let agent = fleet.agent("agent");
    let over = submit_as(&endpoint, 1).await.unwrap();
    soon("the sweep", until(&endpoint, &over, u64::MAX)).await;
    let undisturbed = results(&endpoint, &over).await;
    let running = submit_as(&endpoint, 2).await.unwrap();
    soon("training", until(&endpoint, &running, 10)).await;
    let sweeps = BTreeSet::from([over.clone(), running.clone()]);
    assert_eq!(list(&endpoint).await.unwrap(), (sweeps.clone(), None));

    // The one that is left has heard of all that was written: it leads two, of which each has part in whatever is written.
    let leads = leader(&fleet.etcd, &[0, 1, 2]).await;
    let first = (leads + 1) % 3;
    fleet.etcd[first].kill();
    let left: Vec<_> = (0..3).filter(|node| *node != first).collect();
    let leads = leader(&fleet.etcd, &left).await;
    let second = 3 - first - leads;
    fleet.etcd[second].kill();
    coordinator.says("standing by");
    let (listed, age) = list(&endpoint).await.unwrap();
    assert_eq!(listed, sweeps);
    // It was renewed for the last time before its lease began to run out.
    assert!(age.is_some_and(|seconds| seconds >= 7), "{age:?}");
    assert_eq!(results(&endpoint, &over).await, undisturbed);
    let mut client = TrialServiceClient::connect(endpoint.clone()).await.unwrap();
    let request = v1::ListTrialsRequest { sweep_id: running.clone(), ..v1::ListTrialsRequest::default() };
    let trial = client.list_trials(request).await.unwrap().into_inner().trials.remove(0);
    let request = v1::GetTrialLogRequest { trial_id: trial.id, follow: false };
    let mut log = client.get_trial_log(request).await.unwrap().into_inner();
    assert_eq!(log.message().await.unwrap().unwrap().event, "proposed");
    let known = agents(&endpoint).await;
    assert!(known.len() == 1 && known[0].registered, "{known:?}");
    // The same for people and for scripts.
    let list_as =
        |format: &str| program::output("lorafleet", &["list", "-o", format, "--endpoint", &endpoint], &[]);
    let (code, said, warned) = list_as("json");
    assert_eq!(code, Some(0), "{warned}");
    let rows: serde_json::Value = serde_json::from_str(&said).unwrap();
    assert_eq!(rows.as_array().map(Vec::len), Some(2), "{said}");
    let warnings: Vec<_> =
        warned.lines().filter(|line| line.contains("s old: etcd has no majority")).collect();
    assert_eq!(warnings.len(), 1, "{warned}");
    let page = browse(&endpoint);
    assert!(page.starts_with("HTTP/1.1 200 ") && page.contains(STALE_SECONDS), "{page}");
    // It says why, as soon as etcd was asked in vain.
    let refused = soon("a reason", async {
        loop {
            let refused = submit_as(&endpoint, 3).await.unwrap_err();
            assert_eq!(refused.code(), Code::Unavailable, "{refused}");
            if refused.message().contains("has no majority") {
                return refused.message().to_string();
            }
            tokio::time::sleep(PAUSE).await;
        }
    });
    let refused = refused.await;
    assert!(refused.contains(&fleet.endpoints), "{refused}");
    let (code, _, said) = program::output("lorafleet", &["cancel", &running, "--endpoint", &endpoint], &[]);
    assert!(code != Some(0) && said.contains("it is not known who leads"), "{said}");
    assert_eq!(get(&http, "/readyz").0, 503);
    assert_eq!(get(&http, "/healthz").0, 200);

    [first, second].iter().for_each(|node| fleet.etcd[*node].start_again());
    coordinator.says("leading");
    assert_eq!(list(&endpoint).await.unwrap(), (sweeps, None));
    soon("the sweep", until(&endpoint, &running, u64::MAX)).await;
    assert_eq!(results(&endpoint, &running).await, undisturbed, "nobody made a step again");
    submit_as(&endpoint, 3).await.unwrap();
    assert!(agent.terminate() && coordinator.terminate());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_standby_refuses_is_counted() {
    let Some(fleet) = Fleet::new() else { return };
    let mut first = fleet.coordinator();
    first.says("leading");
    let http = free_address();
    let mut second = fleet.coordinator_with(&["--election-ttl", ELECTION_TTL, "--http", &http]);
    let endpoint = second.says("listening on ");
    let calls = 3;
    for _ in 0..calls {
        assert_eq!(list(&endpoint).await.unwrap_err().code(), Code::Unavailable);
    }
    let (_, text) = get(&http, "/metrics");
    let counts = text.lines().filter(|line| {
        line.starts_with("rpc_server_call_duration_seconds_count{")
            && line.contains("SweepService/ListSweeps")
            && line.contains("\"UNAVAILABLE\"")
    });
    let counts: Vec<_> = counts.filter_map(|line| line.rsplit_once(' ')).map(|(_, count)| count).collect();
    assert_eq!(counts, [calls.to_string()], "{text}");
    assert!(second.terminate() && first.terminate());
}
