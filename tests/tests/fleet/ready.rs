//! Who says that it is ready: whoever leads, and agents that are connected.

use super::{ELECTION_TTL, Fleet, soon};
use std::net::TcpStream;
use tests::http::{free_address, get};

/// Returns once `/readyz` answers with that status, and says that.
async fn answers(address: &str, status: u16, says: &str) {
    loop {
        // A program that has just been started does not listen yet.
        if TcpStream::connect(address).is_ok() {
            let (found, said) = get(address, "/readyz");
            if found == status && said == says {
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
