//! A coordinator whose records are older than what lies beside them: they were restored from a copy, and the store was not.

use crate::agent::{FakeAgent, hello};
use crate::fixture::{Fixture, SHORT, grid};
use crate::operations;
use proto::v1::{SweepState, TrialState};
use registry::{Entries, Registry, SqliteRegistry, Write};
use std::path::Path;
use tonic::Code;

impl Fixture {
    /// Removes a part of a trial's checkpoint, as a leader does once a newer one is recorded.
    fn lose(&self, trial: &str, part: &str) {
        std::fs::remove_dir_all(self.dir().join("artifacts/sweeps").join(trial).join(part)).unwrap();
    }
}

async fn records(dir: &Path) -> Entries {
    let registry = SqliteRegistry::open(&dir.join("coordinator.db")).unwrap();
    registry.list("", None, 1000).await.unwrap()
}

/// Makes these the records of a directory.
async fn restore(dir: &Path, records: Entries) {
    let registry = SqliteRegistry::open(&dir.join("coordinator.db")).unwrap();
    let fence = registry.lead("test").await.unwrap();
    let newer = registry.list("", None, 1000).await.unwrap();
    let mut batch: Vec<_> = newer.into_iter().map(|(key, _)| Write::Delete(key)).collect();
    batch.extend(records.into_iter().map(|(key, value)| Write::Put(key, value)));
    registry.commit(fence, batch).await.unwrap();
}

#[tokio::test]
async fn a_trial_whose_checkpoint_is_gone_goes_on_from_one_before_and_then_begins_anew() {
    let mut fixture = Fixture::start(SHORT).await;
    let sweep = fixture.submit(&grid(&[2])).await;
    let mut lost = FakeAgent::connect(&fixture, hello("a", 1, vec![])).await;
    let first = lost.assigned().await;
    let trial = first.trial_id.clone();
    lost.start(&first).await;
    // The best of them, and the newest.
    lost.points(&first, &[(1, 5.0), (2, 1.0)]).await;
    lost.upload(&first, 2).await.unwrap();
    lost.points(&first, &[(3, 3.0), (4, 2.0)]).await;
    lost.upload(&first, 4).await.unwrap();
    drop(lost);

    fixture.lose(&trial, "resume-a1-s4");
    let mut agent = FakeAgent::connect(&fixture, hello("b", 1, vec![])).await;
    let second = agent.assigned().await;
    assert_eq!((second.attempt, second.resume_step), (2, Some(4)));
    assert_eq!(agent.download(&second).await.unwrap_err().code(), Code::NotFound);
    agent.drop_holding(&second);
    let third = agent.assigned().await;
    assert_eq!((third.attempt, third.resume_step), (3, Some(2)));
    assert_eq!(agent.download(&third).await.unwrap().0, 2);
    fixture.lose(&trial, "adapter-a1-s2");
    assert_eq!(agent.download(&third).await.unwrap_err().code(), Code::NotFound);
    // Asked again it is an old attempt's question.
    assert_eq!(agent.download(&third).await.unwrap_err().code(), Code::Aborted);
    agent.drop_holding(&third);
    let fourth = agent.assigned().await;
    assert_eq!((fourth.attempt, fourth.resume_step), (4, None));
    let shown = fixture.trial(&trial).await;
    assert_eq!((shown.adapter, shown.resume, shown.resume_step), (None, None, None));
    agent.train(&fourth, 1.0).await;
    assert_eq!(fixture.watch(&sweep.id).await.end().await.state(), SweepState::Completed);
    assert_eq!(fixture.curve(&trial).await.len(), 6);

    let log = operations::log(&fixture, &trial, false).await;
    let queued = log.iter().filter(|(event, ..)| event == "queued");
    let queued: Vec<_> = queued.map(|(_, attempt, why)| (*attempt, why.split(';').next().unwrap())).collect();
    let expected = [
        (1, "its agent was not heard from for a whole lease"),
        (2, "its checkpoint of step 4 is not in the store any more"),
        (3, "its checkpoint of step 2 is not in the store any more"),
    ];
    assert_eq!(queued, expected);
    let told = log.iter().filter(|(event, ..)| event == "adapter_removed").count();
    assert_eq!(told, 0, "no better trial took its place: {log:?}");
    fixture
        .stop_and(|dir| async move {
            let findings = coordinator::fsck::check(&dir).unwrap();
            assert_eq!((findings.problems, findings.notes), (vec![], vec![]));
        })
        .await;
}

#[tokio::test]
async fn an_attempt_that_only_the_metrics_know_of_is_not_made_again() {
    let mut fixture = Fixture::start(SHORT).await;
    let sweep = fixture.submit(&grid(&[2])).await;
    let mut agent = FakeAgent::connect(&fixture, hello("a", 1, vec![])).await;
    let first = agent.assigned().await;
    agent.start(&first).await;
    agent.points(&first, &[(1, 5.0), (2, 4.0)]).await;
    drop(agent);
    let mut copy = Entries::new();
    let saved = &mut copy;
    fixture.stop_and(|dir| async move { *saved = records(&dir).await }).await;

    let mut agent = FakeAgent::connect(&fixture, hello("b", 1, vec![])).await;
    let second = agent.assigned().await;
    assert_eq!(second.attempt, 2);
    agent.start(&second).await;
    agent.points(&second, &[(1, 9.0), (2, 8.0), (3, 7.0)]).await;
    drop(agent);
    fixture.stop_and(|dir| async move { restore(&dir, copy).await }).await;

    assert_eq!(fixture.trial(&first.trial_id).await.attempt, 1);
    assert_eq!(fixture.curve(&first.trial_id).await, [(1, 5.0), (2, 4.0)], "as it was when it was copied");
    let mut agent = FakeAgent::connect(&fixture, hello("c", 1, vec![])).await;
    let third = agent.assigned().await;
    assert_eq!((third.attempt, third.resume_step), (3, None));
    agent.start(&third).await;
    agent.points(&third, &[(1, 3.0)]).await;
    assert_eq!(fixture.curve(&third.trial_id).await, [(1, 3.0)]);
    agent.train(&third, 1.0).await;
    assert_eq!(fixture.watch(&sweep.id).await.end().await.state(), SweepState::Completed);
    let trial = fixture.trial(&third.trial_id).await;
    let attempts: Vec<_> = trial.attempts.iter().map(|attempt| attempt.attempt).collect();
    assert_eq!((trial.state(), attempts), (TrialState::Completed, vec![1, 3]));
}
