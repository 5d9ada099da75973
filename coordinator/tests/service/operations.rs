//! What a person asks of a sweep: to hold it and to go on.

use crate::agent::{FakeAgent, hello, holding};
use crate::fixture::{Fixture, LONG, grid};
use proto::v1::session_response::Message as Hear;
use proto::v1::trial_event::Event;
use proto::v1::{self, StopReason, SweepState, TrialState};
use tonic::{Code, Status};

impl Fixture {
    async fn pause(&self, id: &str) -> Result<SweepState, Status> {
        let request = v1::PauseSweepRequest { sweep_id: id.into() };
        Ok(self.sweeps().pause_sweep(request).await?.into_inner().sweep.unwrap().state())
    }

    async fn resume(&self, id: &str) -> Result<SweepState, Status> {
        let request = v1::ResumeSweepRequest { sweep_id: id.into() };
        Ok(self.sweeps().resume_sweep(request).await?.into_inner().sweep.unwrap().state())
    }

    /// Trials that agents hold.
    async fn held(&self) -> Vec<String> {
        let agents = self.fleet().list_agents(v1::ListAgentsRequest::default()).await.unwrap();
        agents.into_inner().agents.into_iter().flat_map(|a| a.trial_ids).collect()
    }
}

impl FakeAgent {
    /// Does what a stop with the reason `Release` asks.
    async fn give_back(&mut self, assign: &v1::Assign, step: u64) {
        let stop = self.stopped().await;
        assert_eq!((stop.trial_id.as_str(), stop.reason()), (assign.trial_id.as_str(), StopReason::Release));
        self.upload(assign, step).await.unwrap();
        self.drop_holding(assign);
        self.event(assign, Event::Released(v1::Released { reason: "asked".into() })).await;
        self.acknowledged().await;
    }
}

#[tokio::test]
async fn a_paused_sweep_gives_its_devices_back_and_goes_on_from_its_checkpoints() {
    let fixture = Fixture::start(LONG).await;
    let sweep = fixture.submit(&grid(&[2, 4, 8])).await;
    let mut agent = FakeAgent::connect(&fixture, hello("a", 1, vec![])).await;
    let first = agent.assigned().await;
    agent.start(&first).await;
    assert_eq!(fixture.pause(&sweep.id).await.unwrap(), SweepState::Paused);
    assert_eq!(fixture.pause(&sweep.id).await.unwrap(), SweepState::Paused, "again changes nothing");
    agent.give_back(&first, 2).await;
    assert_eq!(fixture.trial(&first.trial_id).await.state(), TrialState::Queued);
    let _idle = FakeAgent::connect(&fixture, hello("b", 1, vec![])).await;
    assert_eq!(fixture.held().await, [""; 0], "nothing waits for a device");
    // Another sweep may have them.
    let other = fixture.submit(&grid(&[2])).await;
    assert_eq!(agent.assigned().await.trial_id, format!("{}/1", other.id));
    assert_eq!(fixture.resume(&sweep.id).await.unwrap(), SweepState::Running);
    assert_eq!(fixture.resume(&sweep.id).await.unwrap(), SweepState::Running);
    let mut held = fixture.held().await;
    held.sort();
    assert_eq!(held.len(), 2, "{held:?}");
    assert!(held.contains(&first.trial_id));
}

/// An agent that was asked to give a trial back does not leave.
#[tokio::test]
async fn a_pause_outlives_the_coordinator_and_the_agent_stays() {
    let mut fixture = Fixture::start(LONG).await;
    let sweep = fixture.submit(&grid(&[2])).await;
    let mut agent = FakeAgent::connect(&fixture, hello("a", 1, vec![])).await;
    let first = agent.assigned().await;
    agent.start(&first).await;
    fixture.pause(&sweep.id).await.unwrap();
    fixture.restart().await;
    assert_eq!(fixture.sweep(&sweep.id).await.state(), SweepState::Paused);
    let held = vec![crate::holding(&first, 2)];
    let mut agent = FakeAgent::connect(&fixture, hello("a", 1, held)).await;
    agent.give_back(&first, 2).await;
    fixture.restart().await;
    let mut agent = FakeAgent::connect(&fixture, hello("a", 1, vec![])).await;
    fixture.resume(&sweep.id).await.unwrap();
    let second = agent.assigned().await;
    assert_eq!((second.attempt, second.resume_step), (2, Some(2)));
    fixture.pause(&sweep.id).await.unwrap();
    agent.give_back(&second, 4).await;
    fixture.resume(&sweep.id).await.unwrap();
    let third = agent.assigned().await;
    assert_eq!((third.attempt, third.resume_step), (3, Some(4)), "the agent did not leave");
    agent.train(&third, 1.0).await;
    assert_eq!(fixture.watch(&sweep.id).await.end().await.state(), SweepState::Completed);
    for refused in [fixture.pause(&sweep.id).await, fixture.resume(&sweep.id).await] {
        assert_eq!(refused.unwrap_err().code(), Code::FailedPrecondition);
    }
    assert_eq!(fixture.pause("none").await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn a_paused_sweep_can_be_cancelled() {
    let fixture = Fixture::start(LONG).await;
    let sweep = fixture.submit(&grid(&[2, 4])).await;
    fixture.pause(&sweep.id).await.unwrap();
    let request = v1::CancelSweepRequest { sweep_id: sweep.id.clone() };
    let cancelled = fixture.sweeps().cancel_sweep(request).await.unwrap().into_inner().sweep.unwrap();
    assert_eq!(cancelled.state(), SweepState::Cancelled);
    let mut agent = FakeAgent::connect(&fixture, hello("a", 1, vec![])).await;
    let next = fixture.submit(&grid(&[2])).await;
    loop {
        if let Hear::Assign(assign) = agent.hear().await.unwrap() {
            assert_eq!(assign.trial_id, format!("{}/1", next.id));
            break;
        }
    }
}

#[tokio::test]
async fn an_extended_sweep_runs_again() {
    let mut fixture = Fixture::start(LONG).await;
    let sweep = fixture.submit(&grid(&[2])).await;
    let mut agent = FakeAgent::connect(&fixture, hello("a", 1, vec![])).await;
    let first = agent.assigned().await;
    agent.train(&first, 2.0).await;
    assert_eq!(fixture.watch(&sweep.id).await.end().await.state(), SweepState::Completed);
    let request = |document: &serde_json::Value, request_id: &str| v1::ExtendSweepRequest {
        sweep_id: sweep.id.clone(),
        request_id: request_id.into(),
        spec: Some(proto::convert::to_struct(document.as_object().unwrap())),
    };
    let (one, other) = ("6f1c0c0e-9a43-4d0e-8c3a-52d1b6f4a001", "6f1c0c0e-9a43-4d0e-8c3a-52d1b6f4a002");
    let mut wrong = grid(&[2, 4]);
    wrong["max_steps"] = 7.into();
    let refused = fixture.sweeps().extend_sweep(request(&wrong, one)).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(refused.message().starts_with("spec.max_steps: cannot change"), "{refused:?}");
    for _ in 0..2 {
        let extended = fixture.sweeps().extend_sweep(request(&grid(&[2, 4]), one)).await;
        let extended = extended.unwrap().into_inner().sweep.unwrap();
        assert_eq!((extended.state(), extended.max_trials), (SweepState::Running, Some(2)));
    }
    let second = agent.assigned().await;
    assert_eq!(second.trial_id, format!("{}/2", sweep.id));
    agent.train(&second, 1.0).await;
    let over = fixture.watch(&sweep.id).await.end().await;
    assert_eq!((over.state(), over.best_value), (SweepState::Completed, Some(1.0)));
    fixture.restart().await;
    let again = fixture.sweeps().extend_sweep(request(&grid(&[2, 4]), one)).await.unwrap().into_inner();
    assert_eq!(again.sweep, Some(over), "the same request changes nothing");
    let extended = fixture.sweeps().extend_sweep(request(&grid(&[2, 4, 8]), other)).await.unwrap();
    assert_eq!(extended.into_inner().sweep.unwrap().state(), SweepState::Running);
    let mut agent = FakeAgent::connect(&fixture, hello("a", 1, vec![])).await;
    assert_eq!(agent.assigned().await.trial_id, format!("{}/3", sweep.id));
}

#[tokio::test]
async fn a_failed_trial_is_tried_again() {
    let fixture = Fixture::start(LONG).await;
    let sweep = fixture.submit(&grid(&[2])).await;
    let mut agent = FakeAgent::connect(&fixture, hello("a", 1, vec![])).await;
    let first = agent.assigned().await;
    agent.start(&first).await;
    agent.upload(&first, 3).await.unwrap();
    let class = v1::FailureClass::User.into();
    agent.event(&first, Event::Failed(v1::Failure { class, message: "no".into() })).await;
    assert_eq!(fixture.watch(&sweep.id).await.end().await.state(), SweepState::Failed);
    let retry = |id: &str| {
        let request = v1::RetryTrialRequest { trial_id: id.into() };
        let mut trials = fixture.trials();
        async move { trials.retry_trial(request).await.map(|r| r.into_inner().trial.unwrap()) }
    };
    let trial = retry(&first.trial_id).await.unwrap();
    assert_eq!((trial.failure, trial.finished_at), (None, None));
    let second = agent.assigned().await;
    assert_eq!((second.attempt, second.resume_step), (2, Some(3)));
    agent.train(&second, 1.0).await;
    assert_eq!(fixture.watch(&sweep.id).await.end().await.state(), SweepState::Completed);
    assert_eq!(retry(&first.trial_id).await.unwrap_err().code(), Code::FailedPrecondition);
    assert_eq!(retry(&format!("{}/9", sweep.id)).await.unwrap_err().code(), Code::NotFound);
    assert_eq!(retry("none/1").await.unwrap_err().code(), Code::NotFound);
}

/// Files of checkpoints below a data directory.
fn artifacts(fixture: &Fixture) -> usize {
    fn files(dir: &std::path::Path) -> usize {
        let Ok(entries) = std::fs::read_dir(dir) else { return 0 };
        entries.flatten().map(|e| if e.path().is_dir() { files(&e.path()) } else { 1 }).sum()
    }
    files(&fixture.dir().join("artifacts"))
}

#[tokio::test]
async fn a_deleted_sweep_is_gone_with_all_that_was_its() {
    let mut fixture = Fixture::start(LONG).await;
    let request_id = "6f1c0c0e-9a43-4d0e-8c3a-52d1b6f4a001";
    let sweep = fixture.submit_as(request_id, &grid(&[2, 4])).await.unwrap();
    let mut agent = FakeAgent::connect(&fixture, hello("a", 1, vec![])).await;
    let first = agent.assigned().await;
    agent.start(&first).await;
    agent.points(&first, &[(1, 3.0)]).await;
    agent.upload(&first, 1).await.unwrap();
    let sweeps = fixture.sweeps();
    let delete = |force| {
        let request = v1::DeleteSweepRequest { sweep_id: sweep.id.clone(), force };
        let mut sweeps = sweeps.clone();
        async move { sweeps.delete_sweep(request).await.map(|r| r.into_inner()) }
    };
    let refused = delete(false).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains("--force"), "{refused:?}");
    let trains = async {
        assert_eq!(agent.stopped().await.reason(), StopReason::Cancelled);
        agent.upload(&first, 2).await.unwrap();
        agent.finish(&first, v1::Ending::Stopped, Some(2.0)).await;
    };
    let (deleted, ()) = tokio::join!(delete(true), trains);
    let deleted = deleted.unwrap();
    assert_eq!(artifacts(&fixture), 0);
    assert_eq!(delete(false).await.unwrap(), deleted, "again changes nothing");
    // What its agent still says is refused, and what it uploads does not stay.
    assert_eq!(agent.upload(&first, 3).await.unwrap_err().code(), Code::NotFound);
    for restart in [false, true] {
        if restart {
            fixture.restart().await;
        }
        let get = v1::GetSweepRequest { sweep_id: sweep.id.clone() };
        assert_eq!(fixture.sweeps().get_sweep(get).await.unwrap_err().code(), Code::NotFound);
        let get = v1::GetTrialRequest { trial_id: first.trial_id.clone() };
        assert_eq!(fixture.trials().get_trial(get).await.unwrap_err().code(), Code::NotFound);
        let list = fixture.sweeps().list_sweeps(v1::ListSweepsRequest::default()).await.unwrap();
        assert_eq!(list.into_inner().sweeps, []);
        let again = fixture.submit_as(request_id, &grid(&[2, 4])).await.unwrap_err();
        assert_eq!(again.code(), Code::NotFound, "a late repetition does not begin it anew");
        assert_eq!(artifacts(&fixture), 0);
    }
}

/// A coordinator that was killed between the two halves of a deletion leaves a tombstone and files.
#[tokio::test]
async fn an_interrupted_deletion_goes_on_at_the_next_start() {
    let mut fixture = Fixture::start(LONG).await;
    let left = fixture.dir().join("artifacts/sweeps/gone-00ff/1/adapter-a1-s1");
    fixture
        .stop_and(|dir| {
            std::fs::create_dir_all(&left).unwrap();
            std::fs::write(left.join("manifest.json"), "{}").unwrap();
            std::fs::write(left.join("adapter_model.safetensors"), "x").unwrap();
            let registry = registry::SqliteRegistry::open(&dir.join("coordinator.db")).unwrap();
            let tombstone = br#"{"sweep":"gone-00ff","deleted_at":1,"completed_at":null}"#.to_vec();
            async move {
                use registry::{Registry, Write};
                let fence = registry.lead("test").await.unwrap();
                registry
                    .commit(fence, vec![Write::Put("deleted/gone-00ff".into(), tombstone)])
                    .await
                    .unwrap();
            }
        })
        .await;
    // The answer comes when the deletion is complete.
    let request = v1::DeleteSweepRequest { sweep_id: "gone-00ff".into(), force: false };
    fixture.sweeps().delete_sweep(request).await.unwrap();
    assert!(!left.exists());
}

/// The events of a trial's log, each with its message.
pub async fn log(fixture: &Fixture, id: &str, follow: bool) -> Vec<(String, u32, String)> {
    let request = v1::GetTrialLogRequest { trial_id: id.into(), follow };
    let mut stream = fixture.trials().get_trial_log(request).await.unwrap().into_inner();
    let mut log = Vec::new();
    while let Some(entry) = stream.message().await.unwrap() {
        assert!(entry.time.is_some());
        log.push((entry.event, entry.attempt, entry.message));
    }
    log
}

#[tokio::test]
async fn a_trials_log_tells_its_life_over_restarts() {
    let mut fixture = Fixture::start(LONG).await;
    let sweep = fixture.submit(&grid(&[2])).await;
    let mut agent = FakeAgent::connect(&fixture, hello("a", 1, vec![])).await;
    let first = agent.assigned().await;
    agent.start(&first).await;
    fixture.pause(&sweep.id).await.unwrap();
    agent.give_back(&first, 2).await;
    drop(agent);
    fixture.restart().await;
    fixture.resume(&sweep.id).await.unwrap();
    let mut agent = FakeAgent::connect(&fixture, hello("b", 1, vec![])).await;
    let second = agent.assigned().await;
    let failure = |class: v1::FailureClass, message: &str| {
        Event::Failed(v1::Failure { class: class.into(), message: message.into() })
    };
    agent.event(&second, failure(v1::FailureClass::Infrastructure, "disk full")).await;
    agent.drop_holding(&second);
    let third = agent.assigned().await;
    agent.start(&third).await;
    // What its agent has to say, once, also when that is said again; and no more than there is room for.
    let note = |number, severity: v1::Severity, message: &str| {
        Event::Noted(v1::Note { number, severity: severity.into(), message: message.into() })
    };
    agent.event(&third, note(1, v1::Severity::Warning, "an upload failed")).await;
    drop(agent);
    fixture.restart().await;
    let mut agent = FakeAgent::connect(&fixture, hello("b", 1, vec![holding(&third, 0)])).await;
    agent.event(&third, note(1, v1::Severity::Warning, "an upload failed")).await;
    agent.event(&third, note(100, v1::Severity::Error, "no room on the disk")).await;
    agent.event(&third, note(101, v1::Severity::Info, "and more")).await;
    let following = log(&fixture, &first.trial_id, true);
    let ends = async {
        agent.event(&third, failure(v1::FailureClass::User, "no such column")).await;
        fixture.watch(&sweep.id).await.end().await
    };
    let (followed, _) = tokio::join!(following, ends);
    let want = [
        ("proposed", 0, "the search proposed it"),
        ("assigned", 1, "to a, cpu, as attempt 1 from step 0"),
        ("started", 1, "6 steps in all"),
        ("told_to_release", 1, "its sweep is paused"),
        ("checkpoint", 1, "of step 2 is stored"),
        ("queued", 1, "its agent gave it back"),
        ("assigned", 2, "to b, cpu, as attempt 2 from step 2"),
        ("queued", 2, "disk full"),
        ("assigned", 3, "to b, cpu, as attempt 3 from step 2"),
        ("started", 3, "6 steps in all"),
        ("warning", 3, "an upload failed"),
        ("error", 3, "no room on the disk"),
        ("failed", 3, "user: no such column"),
    ];
    let want = want.map(|(event, attempt, message)| (event.to_string(), attempt, message.to_string()));
    assert_eq!(followed, want);
    fixture.restart().await;
    assert_eq!(log(&fixture, &first.trial_id, false).await, want);
}

#[tokio::test]
async fn a_drained_agent_gives_its_trials_back_and_gets_none_over_restarts() {
    let mut fixture = Fixture::start(LONG).await;
    fixture.submit(&grid(&[2])).await;
    let mut agent = FakeAgent::connect(&fixture, hello("a", 1, vec![])).await;
    let first = agent.assigned().await;
    agent.start(&first).await;
    let drain = |mut fleet: proto::v1::fleet_service_client::FleetServiceClient<_>, id: &str, undo| {
        let request = v1::DrainAgentRequest { agent_id: id.into(), undo };
        async move { fleet.drain_agent(request).await.map(|r| r.into_inner().agent.unwrap()) }
    };
    let unknown = drain(fixture.fleet(), "none", false).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);
    for _ in 0..2 {
        assert!(drain(fixture.fleet(), "a", false).await.unwrap().drained);
    }
    agent.give_back(&first, 2).await;
    let mut other = FakeAgent::connect(&fixture, hello("b", 1, vec![])).await;
    let second = other.assigned().await;
    assert_eq!((second.attempt, second.resume_step), (2, Some(2)));
    // What an agent holds that was drained while it was away, it is asked for when it comes.
    drain(fixture.fleet(), "b", false).await.unwrap();
    drop(other);
    fixture.restart().await;
    let held = vec![crate::holding(&second, 2)];
    let mut other = FakeAgent::connect(&fixture, hello("b", 1, held)).await;
    other.give_back(&second, 4).await;
    let mut agent = FakeAgent::connect(&fixture, hello("a", 1, vec![])).await;
    assert_eq!(fixture.held().await, [""; 0], "both are drained");
    let get = v1::GetAgentRequest { agent_id: "a".into() };
    assert!(fixture.fleet().get_agent(get).await.unwrap().into_inner().agent.unwrap().drained);
    assert!(!drain(fixture.fleet(), "a", true).await.unwrap().drained);
    assert_eq!(agent.assigned().await.resume_step, Some(4));
}
