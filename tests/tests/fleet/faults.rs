//! Faults of what is between the programs of a fleet: nodes of etcd, ways that are cut, coordinators that stay away.

use crate::common::{Trial, results, submit, submit_as, until};
use crate::{ELECTION_TTL, Fleet, attempts, now, placed_again, seconds, soon, there};
use coordinator::grpc::health::{LIVE, READY};
use proto::v1;
use proto::v1::fleet_service_client::FleetServiceClient;
use proto::v1::sweep_service_client::SweepServiceClient;
use proto::v1::trial_service_client::TrialServiceClient;
use proto::v1::{agent_service_server, sweep_service_server};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;
use tests::etcd::Etcd;
use tests::http::{free_address, get};
use tests::proxy::Proxy;
use tonic::Code;
use tonic::transport::Endpoint;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

/// Seconds without a sign of life after which a trial goes elsewhere.
const LEASE: &str = "3";

/// Host and port of an address.
fn socket(endpoint: &str) -> SocketAddr {
    endpoint.trim_start_matches("http://").parse().unwrap()
}

pub(crate) async fn agents(endpoint: &str) -> Vec<v1::Agent> {
    let mut client = FleetServiceClient::connect(endpoint.to_string()).await.unwrap();
    client.list_agents(v1::ListAgentsRequest::default()).await.unwrap().into_inner().agents
}

/// Returns once an agent is as wanted.
async fn agent(endpoint: &str, id: &str, is: impl Fn(&v1::Agent) -> bool) -> v1::Agent {
    loop {
        if let Some(found) = agents(endpoint).await.into_iter().find(|agent| agent.id == id && is(agent)) {
            return found;
        }
        tokio::task::yield_now().await;
    }
}

/// Both trials of the sweep made all their steps, in so many attempts each.
pub(crate) fn completed(trials: &BTreeMap<String, Trial>, attempts: u32) {
    assert_eq!(trials.len(), 2);
    for (number, trial) in trials {
        assert_eq!((trial.state, trial.attempts), (v1::TrialState::Completed, attempts), "trial {number}");
    }
}

/// One node of three is no loss, be it the one that leads. With `LORAFLEET_FULL`: without two of them nothing is acknowledged,
/// and whoever asks is told so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_of_etcd_are_lost_one_after_the_other() {
    let Some(mut fleet) = Fleet::of_three_nodes() else { return };
    // Longer than three nodes take to elect another leader.
    let mut coordinator = fleet.coordinator_with(&["--election-ttl", "8", "--assignment-lease", "60"]);
    let endpoint = coordinator.says("listening on ");
    coordinator.says("leading");
    let _agent = fleet.agent("agent");
    let whole = async |number| {
        let sweep = submit_as(&endpoint, number).await.unwrap();
        soon("the sweep", until(&endpoint, &sweep, u64::MAX)).await;
        let found = results(&endpoint, &sweep).await;
        completed(&found, 1);
        found
    };
    let undisturbed = whole(1).await;

    // One that follows is killed, and comes back.
    let follows = fleet.etcd.iter().position(|node| !node.leads()).unwrap();
    fleet.etcd[follows].kill();
    assert_eq!(whole(2).await, undisturbed);
    fleet.etcd[follows].start_again();

    // The one that leads is killed, in the middle of a sweep.
    let leads = fleet.etcd.iter().position(Etcd::leads).unwrap();
    let sweep = submit_as(&endpoint, 3).await.unwrap();
    soon("training", until(&endpoint, &sweep, 10)).await;
    drop(fleet.etcd.remove(leads));
    soon("the sweep", until(&endpoint, &sweep, u64::MAX)).await;
    assert_eq!(results(&endpoint, &sweep).await, undisturbed);
    assert_eq!(whole(4).await, undisturbed);

    if std::env::var_os("LORAFLEET_FULL").is_none() {
        return;
    }
    // Of the two that are left one stands still: no majority.
    let sweep = submit_as(&endpoint, 5).await.unwrap();
    soon("training", until(&endpoint, &sweep, 10)).await;
    fleet.etcd[0].signal("STOP");
    let refused = soon("a refusal", submit_as(&endpoint, 6)).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    coordinator.says("standing by");
    fleet.etcd[0].signal("CONT");
    coordinator.says("leading");
    soon("the sweep", until(&endpoint, &sweep, u64::MAX)).await;
    assert_eq!(results(&endpoint, &sweep).await, undisturbed, "nobody made a step again");
    assert_eq!(whole(6).await, undisturbed);
    assert!(coordinator.terminate());
}

/// What a list of sweeps is refused with, as soon as it says so.
async fn without_majority(endpoint: &str) -> String {
    loop {
        let mut client = SweepServiceClient::connect(endpoint.to_string()).await.unwrap();
        let refused = client.list_sweeps(v1::ListSweepsRequest::default()).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unavailable, "{refused}");
        if refused.message().contains("has no majority") {
            return refused.message().to_string();
        }
        tokio::task::yield_now().await;
    }
}

/// Without etcd's majority a coordinator listens all the same and says what is missing; it leads once that is back.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_coordinator_that_starts_without_etcds_majority_says_so() {
    let Some(fleet) = Fleet::of_three_nodes() else { return };
    let stopped = &fleet.etcd[..2];
    stopped.iter().for_each(|node| node.signal("STOP"));
    let http = free_address();
    let mut coordinator = fleet.coordinator_with(&["--election-ttl", "8", "--http", &http]);
    let endpoint = coordinator.says("listening on ");
    let said = soon("the reason", without_majority(&endpoint)).await;
    assert!(said.contains(&fleet.endpoints), "{said}");
    let refused = submit_as(&endpoint, 1).await.unwrap_err();
    assert_eq!((refused.code(), refused.message()), (Code::Unavailable, said.as_str()));
    let (status, why) = get(&http, "/readyz");
    assert!(status == 503 && why.contains("has no majority"), "{status} {why}");
    let health = async |service: &str| {
        let channel = Endpoint::from_shared(endpoint.clone()).unwrap().connect().await.unwrap();
        let mut client = HealthClient::new(channel);
        let request = HealthCheckRequest { service: service.into() };
        client.check(request).await.unwrap().into_inner().status()
    };
    let services = ["", sweep_service_server::SERVICE_NAME, agent_service_server::SERVICE_NAME, READY];
    assert_eq!(health(LIVE).await, ServingStatus::Serving);
    for service in services {
        assert_eq!(health(service).await, ServingStatus::NotServing, "{service}");
    }

    stopped.iter().for_each(|node| node.signal("CONT"));
    coordinator.says("leading");
    for service in services {
        assert_eq!(health(service).await, ServingStatus::Serving, "{service}");
    }
    assert_eq!(get(&http, "/readyz"), (200, "ready\n".into()));
    submit_as(&endpoint, 1).await.unwrap();
    assert!(coordinator.terminate());
}

/// What fails of etcd is counted by what was asked of it and by gRPC's code, also while nobody leads.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_to_etcd_that_fail_are_counted() {
    let Some(mut fleet) = Fleet::new() else { return };
    let http = free_address();
    let mut coordinator = fleet.coordinator_with(&["--election-ttl", ELECTION_TTL, "--http", &http]);
    coordinator.says("leading");
    let counted = || {
        let (status, text) = get(&http, "/metrics");
        assert_eq!(status, 200);
        let lines = text.lines().filter_map(|line| line.strip_prefix("lorafleet_etcd_errors_total"));
        let lines = lines.map(|line| line.rsplit_once(' ').unwrap());
        lines.map(|(of, count)| (of.to_string(), count.parse().unwrap())).collect::<BTreeMap<_, f64>>()
    };
    assert_eq!(counted(), BTreeMap::new());

    fleet.etcd[0].kill();
    coordinator.says("standing by");
    let renewals = r#"{operation="LeaseKeepAlive",rpc_response_status_code="UNAVAILABLE"}"#;
    let found = counted();
    assert!(found.get(renewals).is_some_and(|count| *count >= 1.0), "{found:?}");
}

/// The way between an agent and its coordinator is cut, while both reach etcd: its trials go on elsewhere, and what it still says
/// of them, once it can, does not count.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_is_cut_from_its_coordinator_and_not_from_etcd() {
    let Some(fleet) = Fleet::new() else { return };
    let way = Proxy::start().await;
    let advertised = format!("http://{}", way.address);
    let mut coordinator = fleet.coordinator_with(&["--advertise", &advertised, "--assignment-lease", LEASE]);
    let endpoint = coordinator.says("listening on ");
    way.lead(socket(&endpoint));
    coordinator.says("leading");
    let cut = fleet.agent("cut");
    let sweep = submit(&endpoint).await;
    soon("the sweep", until(&endpoint, &sweep, u64::MAX)).await;
    let undisturbed = results(&endpoint, &sweep).await;
    completed(&undisturbed, 1);
    let id = agents(&endpoint).await.remove(0).id;
    let first = agent(&endpoint, &id, |agent| agent.first_step_seconds.is_some());
    let first = soon("its next sign of life", first).await;
    let (trial, step) = (first.first_trial_seconds.unwrap(), first.first_step_seconds.unwrap());
    assert!(0.0 <= trial && trial <= step, "it trained: {first:?}");

    let sweep = submit_as(&endpoint, 2).await.unwrap();
    soon("training", until(&endpoint, &sweep, 10)).await;
    let silent_at = now();
    way.cut(true);
    // It trains on meanwhile, with nobody to tell.
    let other = fleet.agent_of("other", &["--coordinator", &endpoint]);
    let placed = async {
        while attempts(&endpoint, &sweep).await.values().any(|attempt| *attempt < 2) {
            tokio::task::yield_now().await;
        }
    };
    soon("the trials to be placed again", placed).await;
    placed_again(&endpoint, &sweep, silent_at, LEASE).await;
    let alone = soon("the agent to be missed", agent(&endpoint, &first.id, |agent| !agent.connected)).await;
    assert!(alone.registered, "its machine lives, and etcd knows it: {alone:?}");
    way.cut(false);
    soon("the sweep", until(&endpoint, &sweep, u64::MAX)).await;
    let found = results(&endpoint, &sweep).await;
    completed(&found, 2);
    for (number, trial) in &found {
        assert_eq!(trial.losses, undisturbed[number].losses, "trial {number}");
    }
    let back = soon("the agent to come back", agent(&endpoint, &first.id, |agent| agent.connected)).await;
    assert_eq!(back.trial_ids, Vec::<String>::new(), "what it held is another's");
    assert!(cut.terminate() && other.terminate() && coordinator.terminate());
}

/// The reverse: the agent's entry in etcd goes, and its trials stay its own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_is_cut_from_etcd_and_not_from_its_coordinator() {
    let Some(fleet) = Fleet::new() else { return };
    let way = Proxy::start().await;
    way.lead(socket(&fleet.endpoints));
    let mut coordinator = fleet.coordinator();
    let endpoint = coordinator.says("listening on ");
    coordinator.says("leading");
    let agent = fleet.agent_of("agent", &["--etcd", &format!("http://{}", way.address)]);
    let members = fleet.members().await;
    let sweep = submit(&endpoint).await;
    soon("training", until(&endpoint, &sweep, 10)).await;
    soon("the entry", there(&members, 1)).await;
    way.cut(true);
    soon("its lease in etcd to end", there(&members, 0)).await;
    assert!(agents(&endpoint).await.iter().all(|agent| agent.connected && !agent.registered));
    soon("the sweep", until(&endpoint, &sweep, u64::MAX)).await;
    completed(&results(&endpoint, &sweep).await, 1);
    way.cut(false);
    soon("it to register again", there(&members, 1)).await;
    assert!(agent.terminate() && coordinator.terminate());
}

/// No coordinator for a while: training goes on, and all of it arrives. Longer with `LORAFLEET_FULL`.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_coordinators_are_away() {
    let full = std::env::var_os("LORAFLEET_FULL").is_some();
    for seconds in if full { vec![0, 20, 60] } else { vec![0, 3] } {
        let Some(fleet) = Fleet::new() else { return };
        let mut first = fleet.coordinator();
        let endpoint = first.says("listening on ");
        first.says("leading");
        let agent = fleet.agent("agent");
        let sweep = submit(&endpoint).await;
        soon("training", until(&endpoint, &sweep, 10)).await;
        first.kill();
        let away = now();
        tokio::time::sleep(Duration::from_secs(seconds)).await;
        let back = now();
        let mut second = fleet.coordinator();
        let endpoint = second.says("listening on ");
        second.says("leading");
        soon("the sweep", until(&endpoint, &sweep, u64::MAX)).await;
        completed(&results(&endpoint, &sweep).await, 1);
        let meanwhile = times(&endpoint, &sweep).await.into_iter().filter(|at| (away..back).contains(at));
        assert!(seconds == 0 || meanwhile.count() > 0, "it trained in {seconds} s without a coordinator");
        assert!(agent.terminate() && second.terminate());
    }
}

/// When each point of a sweep's trials was made.
async fn times(endpoint: &str, sweep_id: &str) -> Vec<f64> {
    let mut client = TrialServiceClient::connect(endpoint.to_string()).await.unwrap();
    let mut times = Vec::new();
    for trial_id in attempts(endpoint, sweep_id).await.into_keys() {
        let request = v1::GetTrialMetricsRequest { trial_id, first_step: 0 };
        let mut answers = client.get_trial_metrics(request).await.unwrap().into_inner();
        while let Some(answer) = answers.message().await.unwrap() {
            let at = answer.points.into_iter().filter_map(|point| point.time);
            times.extend(at.map(|at| seconds(at.seconds, at.nanos)));
        }
    }
    times
}
