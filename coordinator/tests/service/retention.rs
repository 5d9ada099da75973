//! Which adapters and checkpoints are kept, and that nothing else lies in the object store.

use crate::agent::{FakeAgent, hello};
use crate::fixture::{Fixture, LONG, PATIENCE, grid};
use proto::v1::trial_event::Event;
use proto::v1::{self, Ending, SweepState};
use std::path::Path;
use tokio::sync::mpsc;
use tonic::Code;

impl Fixture {
    /// The numbers of the trials whose adapters are listed, best first.
    async fn adapters_of(&self, sweep: &str) -> Vec<String> {
        let request = v1::ListAdaptersRequest { sweep_id: sweep.into(), ..Default::default() };
        let adapters = self.adapters().list_adapters(request).await.unwrap().into_inner().adapters;
        adapters.into_iter().map(|a| a.trial_id.rsplit_once('/').unwrap().1.to_string()).collect()
    }

    /// What lies in the object store, as paths below a sweep, and how sound the directory is once nobody uses it.
    async fn at_rest(&mut self, sweep: &str) -> Vec<String> {
        let mut found = Vec::new();
        let parts = |dir: &Path, found: &mut Vec<String>| {
            for trial in std::fs::read_dir(dir.join("artifacts/sweeps").join(sweep)).unwrap().flatten() {
                for part in std::fs::read_dir(trial.path()).unwrap().flatten() {
                    let (trial, part) = (trial.file_name(), part.file_name());
                    found.push(format!("{}/{}", trial.to_str().unwrap(), part.to_str().unwrap()));
                }
            }
        };
        self.stop_and(|dir| {
            let findings = coordinator::fsck::check(&dir).unwrap();
            assert_eq!((findings.problems, findings.notes), (vec![], vec![]));
            parts(&dir, &mut found);
            async {}
        })
        .await;
        found.sort();
        found
    }
}

#[tokio::test]
async fn a_sweep_keeps_the_adapters_of_its_best_trials() {
    let mut fixture = Fixture::start(LONG).await;
    let mut document = grid(&[1, 2, 4, 8]);
    document["keep_adapters"] = 2.into();
    let sweep = fixture.submit(&document).await;
    let mut agent = FakeAgent::connect(&fixture, hello("a", 1, vec![])).await;
    for (number, loss) in [(1, 3.0), (2, 1.0), (3, 2.0)] {
        let assign = agent.assigned().await;
        assert_eq!(assign.trial_id, format!("{}/{number}", sweep.id));
        agent.train(&assign, loss).await;
        agent.acknowledged().await;
    }
    assert_eq!(fixture.adapters_of(&sweep.id).await, ["2", "3"]);
    // One that failed keeps what it can go on from.
    let failing = agent.assigned().await;
    agent.start(&failing).await;
    agent.points(&failing, &[(1, 3.0), (2, 2.0), (3, 1.5)]).await;
    agent.upload(&failing, 3).await.unwrap();
    let class = v1::FailureClass::User.into();
    agent.event(&failing, Event::Failed(v1::Failure { class, message: "no".into() })).await;
    assert_eq!(fixture.watch(&sweep.id).await.end().await.state(), SweepState::Completed);
    agent.drop_holding(&failing);
    let kept = ["2/adapter-a1-s6", "3/adapter-a1-s6", "4/adapter-a1-s3", "4/resume-a1-s3"];
    assert_eq!(fixture.at_rest(&sweep.id).await, kept);
    assert_eq!(fixture.adapters_of(&sweep.id).await, ["2", "4", "3"]);
    let removed = format!("{}/1", sweep.id);
    let first = fixture.trial(&removed).await;
    assert_eq!((first.adapter, first.resume, first.resume_step), (None, None, None));
    let log = crate::operations::log(&fixture, &removed, false).await;
    let last = ("adapter_removed".to_string(), 1, "the sweep keeps those of better trials".to_string());
    assert_eq!(log.last(), Some(&last));
    let download = v1::DownloadAdapterRequest { trial_id: removed };
    assert_eq!(fixture.adapters().download_adapter(download).await.unwrap_err().code(), Code::NotFound);
    // It goes on, and pushes another out.
    let request = v1::RetryTrialRequest { trial_id: failing.trial_id.clone() };
    fixture.trials().retry_trial(request).await.unwrap();
    let mut agent = FakeAgent::connect(&fixture, hello("a", 1, vec![])).await;
    let again = agent.assigned().await;
    assert_eq!(again.resume_step, Some(3));
    agent.train(&again, 0.5).await;
    assert_eq!(fixture.watch(&sweep.id).await.end().await.state(), SweepState::Completed);
    assert_eq!(fixture.adapters_of(&sweep.id).await, ["4", "2"]);
    assert_eq!(fixture.at_rest(&sweep.id).await, ["2/adapter-a1-s6", "4/adapter-a2-s6"]);
}

/// What a trial is asked, and what its documents made of it: of a hundred, so many are right.
fn asked(loss: f64, right: usize) -> v1::TrialSummary {
    let bytes = |right: usize| (0..100).map(|item| if item < right { 255 } else { 0 }).collect();
    v1::TrialSummary {
        steps: 6,
        eval_loss: Some(loss),
        evaluations: vec![v1::TaskScore {
            task: "t".into(),
            metric: "acc".into(),
            value: right as f64 / 100.0,
            base_value: Some(0.5),
            documents: 100,
            ..v1::TaskScore::default()
        }],
        item_scores: vec![v1::ItemScores {
            metric: "eval/t/acc".into(),
            asked: "x".into(),
            scores: bytes(right),
            base: bytes(50),
            ..v1::ItemScores::default()
        }],
        ..v1::TrialSummary::default()
    }
}

impl Fixture {
    /// Whether the report says that its intervals are of items.
    async fn reports_items(&self, sweep: &str) -> bool {
        let request = v1::GetReportRequest { sweep_id: sweep.into(), format: 0 };
        let mut chunks = self.sweeps().get_report(request).await.unwrap().into_inner();
        let mut html = Vec::new();
        while let Some(piece) = chunks.message().await.unwrap() {
            html.extend(piece.chunk);
        }
        let html = String::from_utf8(html).unwrap();
        assert!(html.contains("What tasks say of them"), "{html}");
        html.contains("<td>paired bootstrap</td>")
    }
}

/// It is in no listing, for reports alone, and not part of the adapter, which the sweep may not keep.
#[tokio::test]
async fn what_documents_made_of_a_trial_outlives_its_adapter() {
    let mut fixture = Fixture::start(LONG).await;
    let mut document = grid(&[1, 2]);
    document["keep_adapters"] = 1.into();
    let sweep = fixture.submit(&document).await;
    let mut agent = FakeAgent::connect(&fixture, hello("a", 1, vec![])).await;
    for (loss, right) in [(1.0, 80), (2.0, 70)] {
        let assign = agent.assigned().await;
        agent.start(&assign).await;
        agent.points(&assign, &(1..=6).map(|step| (step, loss)).collect::<Vec<_>>()).await;
        agent.upload(&assign, 6).await.unwrap();
        agent.drop_holding(&assign);
        let (ending, message) = (Ending::Completed.into(), String::new());
        let finished = v1::Finished { ending, summary: Some(asked(loss, right)), message };
        agent.event(&assign, Event::Finished(finished)).await;
        agent.acknowledged().await;
    }
    assert_eq!(fixture.watch(&sweep.id).await.end().await.state(), SweepState::Completed);
    assert!(fixture.reports_items(&sweep.id).await);
    let summary = fixture.trial(&format!("{}/1", sweep.id)).await.summary.unwrap();
    assert_eq!((summary.evaluations.len(), summary.item_scores), (1, vec![]));
    let kept = ["1/adapter-a1-s6", "1/items-a1-s6", "2/items-a1-s6"];
    assert_eq!(fixture.at_rest(&sweep.id).await, kept);
    assert!(fixture.reports_items(&sweep.id).await, "a coordinator that is started again has them");
    // Without them there is a report all the same.
    let items = fixture.dir().join("artifacts/sweeps").join(&sweep.id).join("1/items-a1-s6");
    std::fs::remove_dir_all(items).unwrap();
    assert!(!fixture.reports_items(&sweep.id).await);
}

/// A better value with another seed is luck: what the search proposed comes first.
#[tokio::test]
async fn an_adapter_of_a_run_with_another_seed_is_never_the_best() {
    let fixture = Fixture::start(LONG).await;
    let mut document = grid(&[2, 4]);
    (document["replicates"], document["finalists"]) = (2.into(), 1.into());
    let sweep = fixture.submit(&document).await;
    let mut agent = FakeAgent::connect(&fixture, hello("a", 1, vec![])).await;
    for (number, loss) in [(1, 3.0), (2, 2.0), (3, 1.0)] {
        let assign = agent.assigned().await;
        assert_eq!(assign.trial_id, format!("{}/{number}", sweep.id));
        agent.train(&assign, loss).await;
        agent.acknowledged().await;
    }
    assert_eq!(fixture.adapters_of(&sweep.id).await, ["2", "1", "3"]);
}

#[tokio::test]
async fn a_stopped_trial_without_its_adapter_begins_anew() {
    let mut fixture = Fixture::start(LONG).await;
    let mut document = crate::fixture::halving();
    document["keep_adapters"] = 1.into();
    let sweep = fixture.submit(&document).await;
    let mut agent = FakeAgent::connect(&fixture, hello("a", 2, vec![])).await;
    let (good, weak) = (agent.assigned().await, agent.assigned().await);
    agent.start(&good).await;
    agent.start(&weak).await;
    agent.points(&good, &[(1, 1.0)]).await;
    if agent.points(&weak, &[(1, 2.0)]).await.is_none() {
        agent.stopped().await;
    }
    agent.upload(&weak, 1).await.unwrap();
    agent.finish(&weak, Ending::Stopped, Some(2.0)).await;
    agent.acknowledged().await;
    agent.points(&good, &[(2, 0.9), (3, 0.8), (4, 0.7), (5, 0.6), (6, 0.5)]).await;
    agent.upload(&good, 6).await.unwrap();
    agent.finish(&good, Ending::Completed, Some(0.5)).await;
    assert_eq!(fixture.watch(&sweep.id).await.end().await.state(), SweepState::Completed);
    let number = good.trial_id.rsplit_once('/').unwrap().1;
    assert_eq!(fixture.at_rest(&sweep.id).await, [format!("{number}/adapter-a1-s6")]);
    let request = v1::RetryTrialRequest { trial_id: weak.trial_id.clone() };
    fixture.trials().retry_trial(request).await.unwrap();
    let mut agent = FakeAgent::connect(&fixture, hello("a", 1, vec![])).await;
    let again = agent.assigned().await;
    assert_eq!((again.attempt, again.resume_step), (2, None));
    agent.train(&again, 3.0).await;
    assert_eq!(fixture.watch(&sweep.id).await.end().await.state(), SweepState::Completed);
    assert_eq!(fixture.adapters_of(&sweep.id).await, [number]);
    fixture.at_rest(&sweep.id).await;
}

/// A coordinator that is killed between an upload and its record, or between a record and a deletion, leaves parts
/// that no record points at.
#[tokio::test]
async fn parts_that_no_record_points_at_are_removed_at_the_next_start() {
    let mut fixture = Fixture::start(LONG).await;
    let sweep = fixture.submit(&grid(&[2])).await;
    let mut agent = FakeAgent::connect(&fixture, hello("a", 1, vec![])).await;
    let assign = agent.assigned().await;
    agent.start(&assign).await;
    agent.points(&assign, &[(1, 3.0), (2, 1.0), (3, 2.0), (4, 2.0)]).await;
    for step in [1, 2, 3, 4] {
        agent.upload(&assign, step).await.unwrap();
    }
    let kept = ["1/adapter-a1-s2", "1/adapter-a1-s4", "1/resume-a1-s2", "1/resume-a1-s4"];
    let id = sweep.id.clone();
    fixture
        .stop_and(|dir| async move {
            let sweeps = dir.join("artifacts/sweeps");
            let from = sweeps.join(&id).join("1/adapter-a1-s4");
            for to in [
                format!("{id}/1/adapter-a1-s1"),
                format!("{id}/7/adapter-a2-s9"),
                "gone/1/adapter-a1-s4".into(),
            ] {
                std::fs::create_dir_all(sweeps.join(&to)).unwrap();
                for file in std::fs::read_dir(&from).unwrap().flatten() {
                    std::fs::copy(file.path(), sweeps.join(&to).join(file.file_name())).unwrap();
                }
            }
            let notes = coordinator::fsck::check(&dir).unwrap().notes;
            let told = notes.iter().filter(|note| note.what.contains("removed at the next start"));
            assert_eq!(told.count(), 3, "{notes:?}");
        })
        .await;
    assert_eq!(fixture.at_rest(&sweep.id).await, kept, "the best and the newest of a trial that trains");
    assert!(!fixture.dir().join("artifacts/sweeps/gone/1/adapter-a1-s4").exists());
    let held = vec![crate::holding(&assign, 4)];
    let mut agent = FakeAgent::connect(&fixture, hello("a", 1, held)).await;
    assert_eq!(agent.download(&assign).await.unwrap().0, 4);
}

/// An attempt ends while checkpoints of it are on their way: what arrives then is nobody's, and does not stay. What had arrived
/// before does, though it was sent once more.
#[tokio::test]
async fn checkpoints_of_an_attempt_that_ended_meanwhile_leave_nothing() {
    let mut fixture = Fixture::start(LONG).await;
    let sweep = fixture.submit(&grid(&[2])).await;
    let mut agent = FakeAgent::connect(&fixture, hello("a", 1, vec![])).await;
    let assign = agent.assigned().await;
    agent.start(&assign).await;
    agent.points(&assign, &[(1, 3.0), (2, 2.0)]).await;
    agent.upload(&assign, 1).await.unwrap();

    let ways = [1, 2].map(|_| mpsc::channel(8));
    let [(to_first, first), (to_second, second)] = ways;
    let uploads = (agent.begin_upload(first), agent.begin_upload(second));
    let trial = fixture.dir().join("artifacts/sweeps").join(&sweep.id).join("1");
    let is_begun = |step: u64| {
        let files = std::fs::read_dir(trial.join(format!("adapter-a1-s{step}")));
        files.is_ok_and(|files| files.flatten().any(|file| file.file_name().to_string_lossy().contains('#')))
    };
    let meanwhile = async {
        let mut lasts = Vec::new();
        for (to, step) in [(to_first, 1), (to_second, 2)] {
            let mut pieces = FakeAgent::pieces(&assign, step);
            let last = pieces.pop().unwrap();
            pieces.into_iter().for_each(|piece| to.try_send(piece).unwrap());
            lasts.push((to, last));
            while !is_begun(step) {
                tokio::task::yield_now().await;
            }
        }
        agent.event(&assign, Event::Released(v1::Released { reason: "it leaves".into() })).await;
        agent.drop_holding(&assign);
        agent.acknowledged().await;
        lasts.into_iter().for_each(|(to, last)| to.try_send(last).unwrap());
    };
    let all = futures::future::join3(uploads.0, uploads.1, meanwhile);
    let (first, second, ()) = tokio::time::timeout(PATIENCE, all).await.unwrap();
    for refused in [first, second] {
        assert_eq!(refused.unwrap_err().code(), Code::Aborted);
    }
    assert_eq!(fixture.at_rest(&sweep.id).await, ["1/adapter-a1-s1", "1/resume-a1-s1"]);
}
