//! Who says that it is ready: whoever leads, and agents that are connected.

use super::{ELECTION_TTL, Fleet, soon, there};
use registry::etcd::{EtcdOptions, Members};
use std::net::TcpStream;
use tests::etcd::Etcd;
use tests::http::{free_address, get};
use tests::program::Program;

/// Returns once `/readyz` answers with that status, and says that.
async fn answers(address: &str, status: u16, says: &str) {
    answers_as(address, status, |said| said == says).await;
}

async fn answers_as(address: &str, status: u16, wanted: impl Fn(&str) -> bool) {
    loop {
        // A program that has just been started does not listen yet.
        if TcpStream::connect(address).is_ok() {
            let (found, said) = get(address, "/readyz");
            if found == status && wanted(&said) {
                return;
            }
        }
        // It is looked once a second at most, and the answer before is given until then.
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_leads_and_agents_that_are_connected_are_ready() {
    let Some(fleet) = Fleet::new() else { return };
    let [first_http, second_http, agent_http] = [(); 3].map(|()| free_address());
    let coordinator = |http: &str| fleet.coordinator_with(&["--election-ttl", ELECTION_TTL, "--http", http]);
    let mut first = coordinator(&first_http);
    let first_at = first.says("listening on ");
    first.says("leading");
    let mut second = coordinator(&second_http);
    second.says("listening on ");
    let ready = "ready\n";
    soon("the leader", answers(&first_http, 200, ready)).await;
    let stands_by = format!("not ready: this coordinator stands by; {first_at} leads\n");
    soon("the other", answers(&second_http, 503, &stands_by)).await;
    assert_eq!(get(&second_http, "/healthz").0, 200, "it lives");

    let agent = fleet.agent_with("agent", &["--http", &agent_http]);
    soon("the agent", answers(&agent_http, 200, ready)).await;
    first.kill();
    second.says("leading");
    soon("the second", answers(&second_http, 200, ready)).await;
    soon("the agent at the second", answers(&agent_http, 200, ready)).await;
    second.kill();
    let alone = "not ready: not connected to the coordinator\n";
    soon("the agent alone", answers(&agent_http, 503, alone)).await;
    assert!(agent.terminate());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_waits_for_an_etcd_that_comes_later() {
    let dir = tempfile::tempdir().unwrap();
    let [etcd_at, http] = [(); 2].map(|()| free_address());
    let (endpoint, data) = (format!("http://{etcd_at}"), dir.path().join("agent"));
    let etcd = ["--etcd", endpoint.as_str(), "--devices", "cpu", "--http", &http];
    let mut agent =
        Program::start_heard("gpu-agent", &[&etcd[..], &["--data-dir", data.to_str().unwrap()]].concat());
    let said = agent.hears("etcd does not answer; trying again in");
    assert!(said.contains(&endpoint), "{said}");
    let waits = |said: &str| said.starts_with("not ready: etcd does not answer") && said.contains(&endpoint);
    soon("that it is not ready", answers_as(&http, 503, waits)).await;

    let Some(_etcd) = Etcd::start_at(&dir.path().join("etcd"), &etcd_at) else { return };
    let members = Members::connect(&EtcdOptions::new(vec![endpoint])).await.unwrap();
    soon("the agent", there(&members, 1)).await;
    soon("its readiness", answers(&http, 503, "not ready: not connected to the coordinator\n")).await;
    assert!(agent.terminate());
}
