//! The coordinator as its callers see it: real gRPC on loopback, real SQLite, history and object store; the
//! agent alone is a fake, which speaks the protocol and trains nothing.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

#[allow(dead_code, reason = "the hostile tests use the rest of it")]
mod agent;
mod data;
mod devices;
#[allow(dead_code, reason = "the hostile tests use the rest of it")]
mod fixture;
mod listings;
mod namespaces;
mod operations;
mod page;
mod restored;
mod retention;

use agent::{FakeAgent, hello, holding};
use coordinator::grpc::health::{LIVE, READY};
use domain::trial::TrialConfig;
use fixture::{Fixture, LONG, PATIENCE, SHORT, grid, halving};
use proto::v1;
use proto::v1::session_response::Message as Hear;
use proto::v1::trial_event::Event;
use proto::v1::{Ending, StopReason, SweepState, TrialState};
use tonic::Code;
use tonic_types::StatusExt;

#[tokio::test]
async fn a_sweep_from_submission_to_its_best_trial() {
    let fixture = Fixture::start(LONG).await;
    let sweep = fixture.submit(&grid(&[2, 4, 8])).await;
    assert_eq!((sweep.state(), sweep.max_trials), (SweepState::Running, Some(3)));
    let mut watch = fixture.watch(&sweep.id).await;
    let mut agent = FakeAgent::connect(&fixture, hello("a", 1, vec![])).await;
    for (number, loss) in [(1, 3.0), (2, 1.0), (3, 2.0)] {
        let assign = agent.assigned().await;
        assert_eq!(assign.trial_id, format!("{}/{number}", sweep.id));
        assert_eq!((assign.attempt, assign.resume_step), (1, None));
        agent.train(&assign, loss).await;
    }
    let over = watch.end().await;
    assert_eq!(over.state(), SweepState::Completed);
    assert_eq!(over.best_trial_id.as_deref(), Some(format!("{}/2", sweep.id).as_str()));
    assert_eq!(over.best_value, Some(1.0));
    assert!(over.cost_usd > 0.0 && over.cost_usd < 0.36, "{} dollars", over.cost_usd);
    assert_eq!(fixture.sweep(&sweep.id).await, over);
    let trial = fixture.trial(&format!("{}/2", sweep.id)).await;
    assert_eq!((trial.state(), trial.step, trial.total_steps), (TrialState::Completed, 6, Some(6)));
    assert_eq!(trial.summary.unwrap().eval_loss, Some(1.0));
    assert!(trial.adapter.is_some() && trial.finished_at.is_some());
    assert_eq!(fixture.curve(&trial.id).await.len(), 6);
}

#[tokio::test]
async fn the_same_request_is_the_same_sweep() {
    let mut fixture = Fixture::start(LONG).await;
    let (one, other) = ("6f1c0c0e-9a43-4d0e-8c3a-52d1b6f4a001", "6f1c0c0e-9a43-4d0e-8c3a-52d1b6f4a002");
    let first = fixture.submit_as(one, &grid(&[2])).await.unwrap();
    assert_eq!(fixture.submit_as(one, &grid(&[4, 8])).await.unwrap().id, first.id);
    assert_eq!(fixture.submit_as(&one.to_uppercase(), &grid(&[2])).await.unwrap().id, first.id);
    assert_ne!(fixture.submit_as(other, &grid(&[2])).await.unwrap().id, first.id);
    fixture.restart().await;
    assert_eq!(fixture.submit_as(one, &grid(&[2])).await.unwrap().id, first.id);
}

/// An agent of the version before refuses a parameter that it does not know: it is told none that has its default.
#[tokio::test]
async fn an_agent_is_told_the_parameters_that_differ_from_their_defaults() {
    let fixture = Fixture::start(LONG).await;
    fixture.submit(&grid(&[4, 16])).await;
    let mut agent = FakeAgent::connect(&fixture, hello("a", 2, vec![])).await;
    for (rank, told) in [
        (4, &["dataset_name", "lora_rank", "max_steps", "pretrained_model_id"][..]),
        (16, &["dataset_name", "max_steps", "pretrained_model_id"]),
    ] {
        let config = agent.assigned().await.config;
        assert_eq!(config.as_ref().unwrap().fields.keys().collect::<Vec<_>>(), told);
        let config: TrialConfig = proto::convert::from_document("config", config).unwrap();
        assert_eq!((config.lora_rank, config.max_steps, config.batch_size), (rank, Some(6), 2));
    }
}

#[tokio::test]
async fn wrong_fields_are_named() {
    let fixture = Fixture::start(LONG).await;
    let mut document = grid(&[2]);
    document["lora_alfa"] = 1.into();
    document["batch_size"] = 0.into();
    let status = fixture.submit_as(&uuid::Uuid::new_v4().to_string(), &document).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    let fields: Vec<_> = status.get_details_bad_request().unwrap().field_violations;
    let fields: Vec<_> = fields.iter().map(|v| v.field.as_str()).collect();
    assert!(fields.contains(&"spec.lora_alfa") && fields.contains(&"spec.batch_size"), "{fields:?}");

    for id in ["", "x", "6f1c0c0e-9a43-4d0e-8c3a"] {
        let status = fixture.submit_as(id, &grid(&[2])).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{id}");
        assert_eq!(status.get_details_bad_request().unwrap().field_violations[0].field, "request_id", "{id}");
    }
    let request = v1::GetSweepRequest { sweep_id: "none".into() };
    assert_eq!(fixture.sweeps().get_sweep(request).await.unwrap_err().code(), Code::NotFound);
    let request = v1::GetTrialRequest { trial_id: "none/1".into() };
    assert_eq!(fixture.trials().get_trial(request).await.unwrap_err().code(), Code::NotFound);
    let request = v1::GetTrialRequest { trial_id: "none".into() };
    assert_eq!(fixture.trials().get_trial(request).await.unwrap_err().code(), Code::InvalidArgument);
}

/// Both versions of reflection tell the same services, and the health service knows each of them.
#[tokio::test]
async fn every_service_is_described_and_serving() {
    use tonic_health::pb::health_client::HealthClient;
    use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus};
    macro_rules! services {
        ($version:ident, $channel:expr) => {{
            use tonic_reflection::pb::$version as pb;
            let request = pb::ServerReflectionRequest {
                host: String::new(),
                message_request: Some(pb::server_reflection_request::MessageRequest::ListServices(
                    String::new(),
                )),
            };
            let mut client = pb::server_reflection_client::ServerReflectionClient::new($channel);
            let answers = client.server_reflection_info(tokio_stream::iter([request])).await.unwrap();
            let answer = answers.into_inner().message().await.unwrap().unwrap().message_response;
            let Some(pb::server_reflection_response::MessageResponse::ListServicesResponse(list)) = answer
            else {
                panic!("{answer:?}")
            };
            list.service.into_iter().map(|service| service.name).collect::<Vec<_>>()
        }};
    }
    let fixture = Fixture::start(LONG).await;
    let (v1, v1alpha) = (services!(v1, fixture.channel.clone()), services!(v1alpha, fixture.channel.clone()));
    assert_eq!((v1.len(), v1alpha.len()), (8, 8), "{v1:?} {v1alpha:?}");
    let health = async |service: &str| {
        let request = HealthCheckRequest { service: service.into() };
        let answer = HealthClient::new(fixture.channel.clone()).check(request).await;
        answer.map(|answer| answer.into_inner().status()).ok()
    };
    // It cannot write for a while.
    let away = fixture.dir().with_extension("away");
    std::fs::rename(fixture.dir(), &away).unwrap();
    assert_eq!(health(READY).await, Some(ServingStatus::NotServing));
    std::fs::rename(&away, fixture.dir()).unwrap();
    for service in v1.iter().chain(&v1alpha).map(String::as_str).chain(["", LIVE]) {
        assert_eq!(health(service).await, Some(ServingStatus::Serving), "{service}");
    }
    // It is looked once a second at most.
    let ready = async {
        while health(READY).await != Some(ServingStatus::Serving) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, ready).await.unwrap();
}

/// The best trial is that of the sweep's own metric and goal.
#[tokio::test]
async fn trials_are_compared_by_the_sweeps_metric() {
    for (metric, goal, best) in [
        ("loss", "minimize", 1),
        ("eval/loss", "minimize", 2),
        ("tokens_per_second", "maximize", 2),
        ("tokens_per_second", "minimize", 1),
    ] {
        let fixture = Fixture::start(LONG).await;
        let mut document = grid(&[2, 4]);
        document["search"] = serde_json::json!({"algorithm": "grid", "metric": metric, "goal": goal});
        let sweep = fixture.submit(&document).await;
        let mut agent = FakeAgent::connect(&fixture, hello("a", 1, vec![])).await;
        for (loss, eval_loss, speed) in [(1.0, 5.0, 10.0), (2.0, 4.0, 20.0)] {
            let assign = agent.assigned().await;
            agent.start(&assign).await;
            let values = [("loss", loss), ("tokens_per_second", speed), ("eval/loss", eval_loss)];
            agent.values(&assign, &[(6, &values)]).await;
            agent.finish(&assign, Ending::Completed, Some(eval_loss)).await;
        }
        let over = fixture.watch(&sweep.id).await.end().await;
        assert_eq!(over.best_trial_id, Some(format!("{}/{best}", sweep.id)), "{metric} {goal}");
    }
}

#[tokio::test]
async fn points_sent_twice_count_once() {
    let fixture = Fixture::start(LONG).await;
    fixture.submit(&grid(&[2])).await;
    let mut agent = FakeAgent::connect(&fixture, hello("a", 1, vec![])).await;
    let assign = agent.assigned().await;
    agent.start(&assign).await;
    agent.points(&assign, &[(1, 3.0), (2, 2.0)]).await;
    agent.points(&assign, &[(1, 3.0), (2, 2.0), (3, 1.0)]).await;
    assert_eq!(fixture.curve(&assign.trial_id).await, [(1, 3.0), (2, 2.0), (3, 1.0)]);
    assert_eq!(fixture.curve_from(&assign.trial_id, 2).await, [(2, 2.0), (3, 1.0)]);
    assert_eq!(fixture.curve_from(&assign.trial_id, 4).await, []);
    assert_eq!(fixture.trial(&assign.trial_id).await.step, 3);
    // The end, said twice, is acknowledged twice; so is what came before it.
    agent.finish(&assign, Ending::Completed, Some(1.0)).await;
    agent.acknowledged().await;
    agent.finish(&assign, Ending::Diverged, None).await;
    agent.acknowledged().await;
    agent.points(&assign, &[(3, 1.0)]).await;
    assert_eq!(fixture.trial(&assign.trial_id).await.state(), TrialState::Completed);
}

#[tokio::test]
async fn a_lost_agents_trial_goes_on_elsewhere_from_its_checkpoint() {
    let fixture = Fixture::start(SHORT).await;
    let sweep = fixture.submit(&grid(&[2])).await;
    let mut lost = FakeAgent::connect(&fixture, hello("a", 1, vec![])).await;
    let first = lost.assigned().await;
    lost.start(&first).await;
    lost.points(&first, &[(1, 5.0), (2, 4.0)]).await;
    lost.upload(&first, 2).await.unwrap();
    lost.points(&first, &[(3, 3.5), (4, 3.4)]).await;
    drop(lost);

    let mut other = FakeAgent::connect(&fixture, hello("b", 1, vec![])).await;
    let second = other.assigned().await;
    assert_eq!((second.trial_id.clone(), second.attempt), (first.trial_id.clone(), 2));
    assert_eq!(second.resume_step, Some(2));
    assert_eq!(second.digests.as_ref().unwrap().dataset, "sha256:d");
    let bytes = FakeAgent::files(&first, 2).map(|(_, _, data)| data).concat();
    assert_eq!(other.download(&second).await.unwrap(), (2, bytes));
    other.start(&second).await;
    other.points(&second, &[(3, 3.0), (4, 2.0)]).await;

    // The first agent comes back with what is no longer its own.
    let mut back = FakeAgent::connect(&fixture, hello("a", 1, vec![holding(&first, 4)])).await;
    assert_eq!(back.welcome.drop, [holding(&first, 4)]);
    back.event(&first, Event::Failed(v1::Failure { class: 1, message: "late".into() })).await;
    let stop = back.stopped().await;
    assert_eq!((stop.attempt, stop.reason()), (1, StopReason::Fenced));
    assert_eq!(back.upload(&first, 5).await.unwrap_err().code(), Code::Aborted);
    assert_eq!(back.download(&first).await.unwrap_err().code(), Code::Aborted);

    other.upload(&second, 6).await.unwrap();
    other.finish(&second, Ending::Completed, Some(1.0)).await;
    let over = fixture.watch(&sweep.id).await.end().await;
    assert_eq!(over.state(), SweepState::Completed);
    let curve = fixture.curve(&first.trial_id).await;
    assert_eq!(curve, [(1, 5.0), (2, 4.0), (3, 3.0), (4, 2.0)], "gap-free and single-valued");
    let log = operations::log(&fixture, &first.trial_id, false).await;
    let (_, attempt, why) = log.iter().find(|(event, ..)| event == "queued").unwrap();
    let again = "; 2 steps that it told of since its last checkpoint are made again";
    assert!(*attempt == 1 && why.ends_with(again), "{log:?}");
    let attempts = fixture.trial(&first.trial_id).await.attempts;
    let shown = attempts.iter().map(|a| (a.attempt, a.step, a.agent_id.as_deref(), a.device_id.as_deref()));
    assert_eq!(shown.collect::<Vec<_>>(), [(1, 0, Some("a"), Some("cpu")), (2, 2, Some("b"), Some("cpu"))]);
    assert!(attempts.iter().all(|attempt| attempt.started_at.is_some() && attempt.ended_at.is_some()));
}

#[tokio::test]
async fn halving_stops_the_weaker_trial() {
    let fixture = Fixture::start(LONG).await;
    let sweep = fixture.submit(&halving()).await;
    let mut agent = FakeAgent::connect(&fixture, hello("a", 2, vec![])).await;
    let (good, weak) = (agent.assigned().await, agent.assigned().await);
    agent.start(&good).await;
    agent.start(&weak).await;
    assert_eq!(agent.points(&good, &[(0, 9.0), (1, 1.0)]).await, None);
    // It may come on either side of the acknowledgement.
    let stop = match agent.points(&weak, &[(0, 9.0), (1, 2.0)]).await {
        Some(stop) => stop,
        None => agent.stopped().await,
    };
    assert_eq!((stop.trial_id.clone(), stop.reason()), (weak.trial_id.clone(), StopReason::Search));
    agent.upload(&weak, 1).await.unwrap();
    agent.finish(&weak, Ending::Stopped, Some(2.0)).await;
    agent.acknowledged().await;
    agent.upload(&good, 6).await.unwrap();
    agent.finish(&good, Ending::Completed, Some(0.5)).await;
    let over = fixture.watch(&sweep.id).await.end().await;
    assert_eq!((over.state(), over.best_value), (SweepState::Completed, Some(0.5)));
    let stopped = fixture.trial(&weak.trial_id).await;
    assert_eq!((stopped.state(), stopped.eval_loss), (TrialState::Stopped, Some(2.0)));
    assert!(stopped.adapter.is_some());
}

#[tokio::test]
async fn cancelling_ends_what_waits_at_once_and_what_trains_with_its_adapter() {
    let fixture = Fixture::start(LONG).await;
    let sweep = fixture.submit(&grid(&[2, 4])).await;
    let mut agent = FakeAgent::connect(&fixture, hello("a", 1, vec![])).await;
    let assign = agent.assigned().await;
    agent.start(&assign).await;
    let request = v1::CancelSweepRequest { sweep_id: sweep.id.clone() };
    fixture.sweeps().cancel_sweep(request.clone()).await.unwrap();
    let waiting = fixture.trial(&format!("{}/2", sweep.id)).await;
    assert_eq!(waiting.state(), TrialState::Cancelled);
    assert_eq!(agent.stopped().await.reason(), StopReason::Cancelled);
    agent.upload(&assign, 1).await.unwrap();
    agent.finish(&assign, Ending::Stopped, Some(2.0)).await;
    assert_eq!(fixture.watch(&sweep.id).await.end().await.state(), SweepState::Cancelled);
    let trial = fixture.trial(&assign.trial_id).await;
    assert_eq!((trial.state(), trial.adapter.is_some()), (TrialState::Cancelled, true));
    let again = fixture.sweeps().cancel_sweep(request).await.unwrap_err();
    assert_eq!(again.code(), Code::FailedPrecondition);
}

#[tokio::test]
async fn a_spent_budget_ends_the_sweep() {
    let fixture = Fixture::start(SHORT).await;
    let mut document = grid(&[2, 4]);
    document["budget"] = serde_json::json!({"max_cost_usd": 0.0001}); // a tenth of a second
    let sweep = fixture.submit(&document).await;
    let mut agent = FakeAgent::connect(&fixture, hello("a", 1, vec![])).await;
    let assign = agent.assigned().await;
    agent.start(&assign).await;
    assert_eq!(agent.stopped().await.reason(), StopReason::Search);
    agent.finish(&assign, Ending::Stopped, Some(2.0)).await;
    let over = fixture.watch(&sweep.id).await.end().await;
    assert_eq!((over.state(), over.cost_usd >= 0.0001), (SweepState::Completed, true));
    assert_eq!(over.ended_early(), "max_cost_usd of $0.0001 is spent");
    let states: Vec<_> = over.counts.iter().map(|c| (c.state(), c.trials)).collect();
    assert_eq!(states, [(TrialState::Stopped, 2)]);
}

#[tokio::test]
async fn a_single_trial_is_stopped() {
    let fixture = Fixture::start(LONG).await;
    let sweep = fixture.submit(&grid(&[2, 4])).await;
    let mut agent = FakeAgent::connect(&fixture, hello("a", 1, vec![])).await;
    let first = agent.assigned().await;
    agent.start(&first).await;
    let stop = |id: &str| v1::StopTrialRequest { trial_id: id.into() };
    fixture.trials().stop_trial(stop(&first.trial_id)).await.unwrap();
    assert_eq!(agent.stopped().await.reason(), StopReason::Cancelled);
    agent.finish(&first, Ending::Stopped, None).await;
    let second = agent.assigned().await;
    agent.train(&second, 1.0).await;
    assert_eq!(fixture.watch(&sweep.id).await.end().await.state(), SweepState::Completed);
    assert_eq!(fixture.trial(&first.trial_id).await.state(), TrialState::Cancelled);
    let again = fixture.trials().stop_trial(stop(&first.trial_id)).await.unwrap_err();
    assert_eq!(again.code(), Code::FailedPrecondition);
}

#[tokio::test]
async fn a_restart_goes_on_with_what_agents_hold() {
    let mut fixture = Fixture::start(LONG).await;
    let sweep = fixture.submit(&grid(&[2, 4])).await;
    let mut agent = FakeAgent::connect(&fixture, hello("a", 1, vec![])).await;
    let assign = agent.assigned().await;
    agent.start(&assign).await;
    agent.points(&assign, &[(1, 3.0), (2, 2.0)]).await;
    fixture.restart().await;
    let trial = fixture.trial(&assign.trial_id).await;
    assert_eq!((trial.state(), trial.step, trial.eval_loss), (TrialState::Running, 2, Some(2.0)));

    let mut agent = FakeAgent::connect(&fixture, hello("a", 1, vec![holding(&assign, 2)])).await;
    assert_eq!(agent.welcome.drop, []);
    agent.points(&assign, &[(3, 1.5)]).await;
    agent.upload(&assign, 6).await.unwrap();
    agent.finish(&assign, Ending::Completed, Some(1.0)).await;
    let second = agent.assigned().await;
    assert_eq!(second.trial_id, format!("{}/2", sweep.id));
    agent.train(&second, 2.0).await;
    let over = fixture.watch(&sweep.id).await.end().await;
    assert_eq!((over.state(), over.best_value), (SweepState::Completed, Some(1.0)));
    assert_eq!(fixture.curve(&assign.trial_id).await, [(1, 3.0), (2, 2.0), (3, 1.5)]);
    assert_eq!(fixture.trial(&assign.trial_id).await.attempt, 1, "nothing was interrupted");
    fixture.restart().await;
    assert_eq!(fixture.sweep(&sweep.id).await, over);
}

#[tokio::test]
async fn after_a_restart_what_no_agent_holds_is_assigned_anew() {
    let mut fixture = Fixture::start(SHORT).await;
    fixture.submit(&grid(&[2])).await;
    let mut agent = FakeAgent::connect(&fixture, hello("a", 1, vec![])).await;
    let first = agent.assigned().await;
    fixture.restart().await;
    let mut agent = FakeAgent::connect(&fixture, hello("a", 1, vec![])).await;
    let second = agent.assigned().await;
    assert_eq!((second.trial_id, second.attempt), (first.trial_id, 2));
}

#[tokio::test]
async fn how_trials_end() {
    let failure = |class: v1::FailureClass| {
        Event::Failed(v1::Failure { class: class.into(), message: "it broke".into() })
    };
    let diverged = Event::Finished(v1::Finished {
        ending: Ending::Diverged.into(),
        summary: Some(v1::TrialSummary::default()),
        message: "loss is NaN".into(),
    });
    for (event, state, sweep_state) in [
        (failure(v1::FailureClass::User), TrialState::Failed, SweepState::Failed),
        (failure(v1::FailureClass::OutOfMemory), TrialState::Failed, SweepState::Failed),
        (diverged, TrialState::Diverged, SweepState::Completed),
    ] {
        let fixture = Fixture::start(LONG).await;
        let sweep = fixture.submit(&grid(&[2])).await;
        let mut agent = FakeAgent::connect(&fixture, hello("a", 1, vec![])).await;
        let assign = agent.assigned().await;
        agent.start(&assign).await;
        agent.event(&assign, event.clone()).await;
        let over = fixture.watch(&sweep.id).await.end().await;
        assert_eq!(over.state(), sweep_state, "{event:?}");
        assert_eq!(over.failure.is_some(), sweep_state == SweepState::Failed, "{event:?}");
        let trial = fixture.trial(&assign.trial_id).await;
        assert_eq!((trial.state(), trial.failure.is_some()), (state, true), "{event:?}");
    }
}

#[tokio::test]
async fn failures_of_the_machine_are_tried_again_until_it_is_enough() {
    let fixture = Fixture::start(LONG).await;
    let sweep = fixture.submit(&grid(&[2])).await;
    let mut agent = FakeAgent::connect(&fixture, hello("a", 1, vec![])).await;
    for attempt in 1..=3 {
        let assign = agent.assigned().await;
        assert_eq!(assign.attempt, attempt);
        agent.start(&assign).await;
        let class = v1::FailureClass::Infrastructure.into();
        agent.event(&assign, Event::Failed(v1::Failure { class, message: "disk full".into() })).await;
    }
    let over = fixture.watch(&sweep.id).await.end().await;
    assert_eq!(over.state(), SweepState::Failed);
    let failure = over.failure.unwrap();
    assert!(failure.contains("disk full; 3 times since its last checkpoint"), "{failure}");
}

#[tokio::test]
async fn an_agent_that_leaves_gets_nothing_until_it_connects_anew() {
    let fixture = Fixture::start(LONG).await;
    fixture.submit(&grid(&[2])).await;
    let mut leaving = FakeAgent::connect(&fixture, hello("a", 1, vec![])).await;
    let first = leaving.assigned().await;
    leaving.start(&first).await;
    leaving.event(&first, Event::Released(v1::Released { reason: "shutting down".into() })).await;
    leaving.acknowledged().await;
    let mut again = FakeAgent::connect(&fixture, hello("a", 1, vec![])).await;
    assert_eq!(again.assigned().await.attempt, 2);
    // The stream that it replaced was not told anything more.
    while let Ok(message) = leaving.hear().await {
        assert!(!matches!(message, Hear::Assign(_)), "{message:?}");
    }
}

#[tokio::test]
async fn a_watcher_gets_a_picture_and_then_every_change() {
    use v1::watch_sweep_response::Event;
    let fixture = Fixture::start(LONG).await;
    let sweep = fixture.submit(&grid(&[2, 4])).await;
    let mut watch = fixture.watch(&sweep.id).await;
    assert!(matches!(watch.next().await, Some(Event::Sweep(s)) if s.id == sweep.id));
    for number in [1, 2] {
        let Some(Event::Trial(trial)) = watch.next().await else { panic!("no trial") };
        assert_eq!((trial.number, trial.state()), (number, TrialState::Queued));
    }
    let mut agent = FakeAgent::connect(&fixture, hello("a", 1, vec![])).await;
    let assign = agent.assigned().await;
    watch.trial(&assign.trial_id, |t| t.state() == TrialState::Assigned).await;
    agent.start(&assign).await;
    watch.trial(&assign.trial_id, |t| t.state() == TrialState::Running).await;
    // Both of one batch: each has a value that trials are compared by.
    agent.points(&assign, &[(1, 3.0), (2, 2.5)]).await;
    for step in [1, 2] {
        let progress = loop {
            if let Some(Event::Progress(progress)) = watch.next().await {
                break progress;
            }
        };
        let told = (progress.trial_id.as_str(), progress.point.unwrap().step);
        assert_eq!(told, (assign.trial_id.as_str(), step));
    }
    agent.finish(&assign, Ending::Completed, Some(1.0)).await;
    let second = agent.assigned().await;
    agent.train(&second, 2.0).await;
    let over = watch.end().await;
    let counts: Vec<_> = over.counts.iter().map(|c| (c.state(), c.trials)).collect();
    assert_eq!((over.state(), counts), (SweepState::Completed, vec![(TrialState::Completed, 2)]));
    assert_eq!(fixture.watch(&sweep.id).await.end().await, over, "a sweep that is over is a picture alone");
}
