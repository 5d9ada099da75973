//! Many who ask at once, and a clock that jumps.

use super::agent::{FakeAgent, hello};
use super::fixture::{Fixture, LONG, SHORT, grid};
use super::{check_refusal, check_serves, watch_for_panics};
use domain::{Clock, SystemClock, Timestamp};
use futures::future::join_all;
use proto::v1::{SweepState, TrialState};
use proto::{convert, v1};
use serde_json::json;
use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

#[tokio::test(flavor = "multi_thread")]
async fn one_request_sent_at_once_over_many_connections_is_one_sweep() {
    watch_for_panics();
    let fixture = Fixture::start(LONG).await;
    let request_id = "6f1c0c0e-9a43-4d0e-8c3a-52d1b6f4a001";
    let document = grid(&[2, 4]);
    let sweeps = join_all((0..16).map(|_| fixture.submit_as(request_id, &document))).await;
    let ids: BTreeSet<_> = sweeps.into_iter().map(|sweep| sweep.unwrap().id).collect();
    assert_eq!(ids.len(), 1);
    let all = fixture.sweeps().list_sweeps(v1::ListSweepsRequest::default()).await.unwrap();
    assert_eq!(all.into_inner().sweeps.len(), 1);
}

/// Cancelling, pausing, resuming, extending, retrying and stopping at once: each answer is a state or a refusal, and
/// in the end the sweep is over.
#[tokio::test(flavor = "multi_thread")]
async fn people_who_contradict_each_other_leave_a_sound_sweep() {
    watch_for_panics();
    let mut fixture = Fixture::start(LONG).await;
    let mut agent = FakeAgent::connect(&fixture, hello("a", 1, vec![])).await;
    for round in 0..8_u32 {
        let sweep_id = fixture.submit(&grid(&[2, 4, 8])).await.id;
        let ask = |who: u32| {
            let (sweep_id, trial_id) = (sweep_id.clone(), format!("{sweep_id}/{}", 1 + who % 3));
            let (mut sweeps, mut trials) = (fixture.sweeps(), fixture.trials());
            async move {
                match (who + round) % 7 {
                    0 => sweeps.cancel_sweep(v1::CancelSweepRequest { sweep_id }).await.err(),
                    1 => sweeps.pause_sweep(v1::PauseSweepRequest { sweep_id }).await.err(),
                    2 => sweeps.resume_sweep(v1::ResumeSweepRequest { sweep_id }).await.err(),
                    3 => {
                        let spec = Some(convert::to_struct(grid(&[2, 4, 8, 16]).as_object().unwrap()));
                        let request_id = uuid::Uuid::new_v4().to_string();
                        sweeps.extend_sweep(v1::ExtendSweepRequest { sweep_id, request_id, spec }).await.err()
                    }
                    4 => trials.stop_trial(v1::StopTrialRequest { trial_id }).await.err(),
                    5 => trials.retry_trial(v1::RetryTrialRequest { trial_id }).await.err(),
                    _ => sweeps.cancel_sweep(v1::CancelSweepRequest { sweep_id }).await.err(),
                }
            }
        };
        for status in join_all((0..21).map(ask)).await.into_iter().flatten() {
            check_refusal("at once", &status);
        }
        // Whatever came last, deleting ends it; what the agent holds of it is fenced or told to stop.
        drop(agent);
        let cancel = v1::CancelSweepRequest { sweep_id: sweep_id.clone() };
        if let Err(status) = fixture.sweeps().cancel_sweep(cancel).await {
            check_refusal("over already", &status);
        }
        agent = FakeAgent::connect(&fixture, hello("a", 1, vec![])).await;
        check_serves(&fixture).await;
    }
    fixture.restart().await;
    let all = fixture.sweeps().list_sweeps(v1::ListSweepsRequest::default()).await.unwrap();
    assert_eq!(all.into_inner().sweeps.len(), 8);
}

/// Nobody trains, so that cancelling ends the sweep at once and retrying begins it again: whoever asks the actor
/// that just ended is answered for the one that runs since.
#[tokio::test(flavor = "multi_thread")]
async fn a_sweep_that_ends_and_runs_again_under_its_callers_answers_all() {
    watch_for_panics();
    let fixture = Fixture::start(LONG).await;
    let sweep_id = fixture.submit(&grid(&[2])).await.id;
    let trial_id = format!("{sweep_id}/1");
    let ask = |who: u32| {
        let (sweep_id, trial_id) = (sweep_id.clone(), trial_id.clone());
        let (mut sweeps, mut trials) = (fixture.sweeps(), fixture.trials());
        async move {
            match who % 4 {
                0 => sweeps.cancel_sweep(v1::CancelSweepRequest { sweep_id }).await.err(),
                1 => trials.retry_trial(v1::RetryTrialRequest { trial_id }).await.err(),
                2 => sweeps.pause_sweep(v1::PauseSweepRequest { sweep_id }).await.err(),
                _ => trials.stop_trial(v1::StopTrialRequest { trial_id }).await.err(),
            }
        }
    };
    for _ in 0..24 {
        for status in join_all((0..32).map(ask)).await.into_iter().flatten() {
            check_refusal("at once", &status);
        }
    }
    check_serves(&fixture).await;
}

/// A clock whose hour a test sets.
struct Jumping {
    real: SystemClock,
    offset_ms: AtomicI64,
}

impl Clock for Jumping {
    fn now(&self) -> Timestamp {
        Timestamp(self.real.now().0.saturating_add_signed(self.offset_ms.load(Ordering::Relaxed)))
    }

    fn monotonic(&self) -> Duration {
        self.real.monotonic()
    }
}

/// A jump of the hour takes no lease, spends no budget and costs nothing.
#[tokio::test]
async fn an_hour_that_jumps_ends_nothing() {
    watch_for_panics();
    for hours in [1, -1] {
        let clock = Arc::new(Jumping { real: SystemClock::new(), offset_ms: AtomicI64::new(0) });
        let fixture = Fixture::start_at(SHORT, clock.clone()).await;
        let mut document = grid(&[2]);
        document["budget"] = json!({"max_cost_usd": 1, "max_wall_clock": "30m"});
        let sweep = fixture.submit(&document).await.id;
        let mut agent = FakeAgent::connect(&fixture, hello("a", 1, vec![])).await;
        let assign = agent.assigned().await;
        agent.start(&assign).await;
        clock.offset_ms.store(hours * 3_600_000, Ordering::Relaxed);
        // As long as a lease, in which the budget is looked at four times.
        let mut watch = fixture.watch(&sweep).await;
        let mut seen = 0.0;
        while seen < 3.6 / 3600.0 * 2.0 * SHORT.as_secs_f64() {
            if let Some(v1::watch_sweep_response::Event::Sweep(sweep)) = watch.next().await {
                assert_eq!((sweep.state(), sweep.ended_early), (SweepState::Running, None), "{hours} h");
                seen = sweep.cost_usd;
            }
        }
        assert!(seen < 0.1, "{hours} h: {seen} dollars");
        assert_eq!(fixture.trial(&assign.trial_id).await.attempt, 1, "{hours} h: the lease was lost");
        agent.points(&assign, &[(1, 1.0)]).await;
        agent.finish(&assign, v1::Ending::Completed, Some(1.0)).await;
        let over = fixture.watch(&sweep).await.end().await;
        assert_eq!((over.state(), over.ended_early), (SweepState::Completed, None), "{hours} h");
        assert_eq!(fixture.trial(&assign.trial_id).await.state(), TrialState::Completed);
        check_serves(&fixture).await;
    }
}
