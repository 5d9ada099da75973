//! Devices that are small, and agents that are away.

use super::agent::{FakeAgent, hello};
use super::fixture::{Fixture, LONG, grid};
use proto::v1::{self, Ending, SweepState, TrialState};

#[tokio::test]
async fn trials_are_placed_by_the_memory_that_they_are_predicted_to_need() {
    let fixture = Fixture::start(LONG).await;
    let sweep = fixture.submit(&grid(&[2, 4])).await;
    let mut small = hello("a", 2, vec![]);
    // Room for one trial of some 70 MB, of which 15 are the base; two need 125.
    small.agent.as_mut().unwrap().devices[0].memory_bytes = 100_000_000;
    let mut agent = FakeAgent::connect(&fixture, small).await;
    let first = agent.assigned().await;
    assert!((60_000_000..80_000_000).contains(&first.predicted_peak_memory_bytes), "{first:?}");
    agent.start(&first).await;
    assert_eq!(fixture.trial(&format!("{}/2", sweep.id)).await.state(), TrialState::Queued);
    let mut large = hello("b", 2, vec![]);
    large.agent.as_mut().unwrap().devices[0].memory_bytes = 150_000_000;
    let mut other = FakeAgent::connect(&fixture, large).await;
    let second = other.assigned().await;
    assert_eq!(second.trial_id, format!("{}/2", sweep.id));
    agent.finish(&first, Ending::Completed, Some(1.0)).await;
    other.train(&second, 2.0).await;
    assert_eq!(fixture.watch(&sweep.id).await.end().await.state(), SweepState::Completed);
}

#[tokio::test]
async fn a_model_shape_that_cannot_be_is_refused() {
    let fixture = Fixture::start(LONG).await;
    let spec = Some(proto::convert::to_struct(grid(&[2]).as_object().unwrap()));
    for hidden_size in [0, u64::MAX] {
        let shape = v1::ModelShape { hidden_size, ..super::fixture::shape() };
        let base_models = [("/models/a".to_string(), shape)].into();
        let request_id = uuid::Uuid::new_v4().to_string();
        let request = v1::SubmitSweepRequest { request_id, spec: spec.clone(), base_models };
        let status = fixture.sweeps().submit_sweep(request).await.unwrap_err();
        assert_eq!(status.code(), tonic::Code::InvalidArgument);
        assert!(status.message().contains("hidden_size"), "{status:?}");
    }
}

#[tokio::test]
async fn cancelling_does_not_wait_for_an_agent_that_is_away() {
    let mut fixture = Fixture::start(LONG).await;
    let sweep = fixture.submit(&grid(&[2, 4])).await;
    let mut agent = FakeAgent::connect(&fixture, hello("a", 1, vec![])).await;
    let assign = agent.assigned().await;
    agent.start(&assign).await;
    agent.upload(&assign, 1).await.unwrap();
    // The next coordinator knows of the agent only from the trial's record.
    drop(agent);
    fixture.restart().await;
    let request = v1::CancelSweepRequest { sweep_id: sweep.id.clone() };
    let cancelled = fixture.sweeps().cancel_sweep(request).await.unwrap().into_inner().sweep.unwrap();
    assert_eq!(cancelled.state(), SweepState::Cancelled);
    let trial = fixture.trial(&assign.trial_id).await;
    assert_eq!((trial.state(), trial.adapter.is_some()), (TrialState::Cancelled, true));
}
