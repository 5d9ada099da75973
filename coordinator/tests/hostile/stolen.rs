//! Agents with a token of their own that speak for another.

use super::agent::{FakeAgent, hello, holding};
use super::fixture::{Fixture, LONG, access_by, grid, write_tokens};
use super::{check_serves, watch_for_panics};
use config::tokens::Role;
use proto::v1;
use proto::v1::agent_service_client::AgentServiceClient;
use proto::v1::session_request::Message as Say;
use proto::v1::session_response::Message as Hear;
use security::Line;
use security::watched::INTERVAL;
use tonic::{Code, Status};
use tonic_types::StatusExt;

/// What a session with this `Hello` is answered.
async fn session(line: Line, hello: v1::Hello) -> Result<Hear, Status> {
    let said = v1::SessionRequest { message: Some(Say::Hello(hello)) };
    let mut stream = AgentServiceClient::new(line).session(tokio_stream::iter([said])).await?.into_inner();
    Ok(stream.message().await?.unwrap().message.unwrap())
}

fn check_denied<T: std::fmt::Debug>(what: &str, answer: Result<T, Status>) {
    let status = answer.expect_err(what);
    assert_eq!(status.code(), Code::PermissionDenied, "{what}: {status:?}");
    assert_eq!(status.get_details_error_info().unwrap().reason, "PERMISSION_DENIED", "{what}");
    assert!(status.message().contains("belongs to the token honest"), "{what}: {}", status.message());
}

/// An agent speaks for itself alone, after the coordinator's restart too.
#[tokio::test]
async fn an_agent_of_another_token_is_not_let_near() {
    watch_for_panics();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tokens.yaml");
    let known = [("op", Role::Operator), ("thief", Role::Agent), ("honest", Role::Agent)];
    write_tokens(&file, &known);
    let mut fixture = Fixture::start_guarded(LONG, access_by(&file), "op").await;
    fixture.submit(&grid(&[2])).await;
    let mut honest = FakeAgent::connect_over(fixture.line("honest").await, hello("a", 1, vec![])).await;
    let assign = honest.assigned().await;
    honest.start(&assign).await;
    honest.upload(&assign, 2).await.unwrap();

    let thief = fixture.line("thief").await;
    let held = || hello("a", 1, vec![holding(&assign, 3)]);
    check_denied("its session", session(thief.clone(), held()).await);
    // Under its own name it is let in, and told that the trial is not its own.
    let mut own = FakeAgent::connect_over(thief.clone(), hello("b", 1, vec![])).await;
    check_denied("its checkpoint, read", own.download(&assign).await);
    check_denied("its checkpoint, written", own.upload(&assign, 4).await);
    let points = vec![v1::MetricPoint {
        step: 3,
        time: Some(prost_types::Timestamp::default()),
        values: vec![v1::MetricValue { name: "loss".into(), value: 0.0 }],
    }];
    let (trial_id, attempt) = (assign.trial_id.clone(), assign.attempt);
    own.say(Say::Metrics(v1::MetricBatch { trial_id: trial_id.clone(), attempt, sequence: 1, points })).await;
    let released = v1::trial_event::Event::Released(v1::Released { reason: "mine".into() });
    own.say(Say::Event(v1::TrialEvent { trial_id, attempt, sequence: 2, event: Some(released) })).await;
    for _ in 0..2 {
        let stop = own.stopped().await;
        assert_eq!(stop.reason(), v1::StopReason::Fenced);
    }
    honest.points(&assign, &[(3, 1.0)]).await;
    assert_eq!(honest.download(&assign).await.unwrap().0, 2);
    assert_eq!(fixture.curve(&assign.trial_id).await, [(3, 1.0)]);
    assert_eq!(fixture.trial(&assign.trial_id).await.state(), v1::TrialState::Running);

    drop((honest, own));
    fixture.restart().await;
    let thief = fixture.line("thief").await;
    check_denied("its session, after a restart", session(thief.clone(), held()).await);
    // Whose token was taken back owns nothing any more.
    write_tokens(&file, &known[..2]);
    tests::after(INTERVAL).await;
    let refused = session(fixture.line("honest").await, held()).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unauthenticated);
    assert!(matches!(session(thief, held()).await, Ok(Hear::Welcome(_))));
    fixture.channel = fixture.line("op").await;
    check_serves(&fixture).await;
}
