//! A sweep of two small trials, and how it went.

use proto::v1;
use proto::v1::sweep_service_client::SweepServiceClient;
use proto::v1::trial_service_client::TrialServiceClient;
use serde_json::json;
use std::collections::{BTreeMap, HashMap};
use v1::watch_sweep_response::Event;

/// The end of a trial: its state, its attempts, and its losses to the last bit.
#[derive(Debug, PartialEq)]
pub struct Trial {
    pub attempts: u32,
    pub state: v1::TrialState,
    pub losses: Vec<(u64, Option<u64>)>,
}

/// A sweep of two trials, of 240 steps each: longer than it takes to replace a leader.
fn document() -> serde_json::Value {
    let quickstart = tests::root().join("config/quickstart");
    json!({
        "name": "two",
        "pretrained_model_id": quickstart.join("base"),
        "dataset_name": quickstart.join("instruct.jsonl"),
        "eval_size": 2, "batch_size": 1, "max_sequence_length": 32, "max_steps": 240, "save_steps": 4,
        "search": { "algorithm": "grid" },
        "parameters": { "lora_rank": [2, 4] },
    })
}

/// Submits it; answers with its id.
pub async fn submit(endpoint: &str) -> String {
    submit_as(endpoint, 1).await.unwrap()
}

/// Submits it as the sweep of that number: the same again is the same sweep.
pub async fn submit_as(endpoint: &str, number: u32) -> Result<String, tonic::Status> {
    let spec = Some(proto::convert::to_struct(document().as_object().unwrap()));
    let request_id = format!("6f1c0c0e-9a43-4d0e-8c3a-52d1b6f4a{number:03x}");
    let request = v1::SubmitSweepRequest { request_id, spec, base_models: HashMap::new() };
    let mut client = SweepServiceClient::connect(endpoint.to_string()).await.unwrap();
    Ok(client.submit_sweep(request).await?.into_inner().sweep.unwrap().id)
}

/// Watches until a trial has come to a step, or the sweep is over.
pub async fn until(endpoint: &str, sweep_id: &str, step: u64) {
    let mut client = SweepServiceClient::connect(endpoint.to_string()).await.unwrap();
    let request = v1::WatchSweepRequest { sweep_id: sweep_id.into() };
    let mut watched = client.watch_sweep(request).await.unwrap().into_inner();
    while let Some(change) = watched.message().await.unwrap() {
        match change.event {
            Some(Event::Progress(progress)) if progress.point.as_ref().is_some_and(|p| p.step >= step) => {
                return;
            }
            _ => {}
        }
    }
    assert_eq!(step, u64::MAX, "the sweep was over before the kill");
}

/// Its trials by their numbers.
pub async fn results(endpoint: &str, sweep_id: &str) -> BTreeMap<String, Trial> {
    let mut client = TrialServiceClient::connect(endpoint.to_string()).await.unwrap();
    let request = v1::ListTrialsRequest { sweep_id: sweep_id.into(), ..v1::ListTrialsRequest::default() };
    let mut results = BTreeMap::new();
    for trial in client.list_trials(request).await.unwrap().into_inner().trials {
        let request = v1::GetTrialMetricsRequest { trial_id: trial.id.clone(), first_step: 0 };
        let mut answers = client.get_trial_metrics(request).await.unwrap().into_inner();
        let mut losses = Vec::new();
        while let Some(answer) = answers.message().await.unwrap() {
            losses.extend(answer.points.iter().map(|point| {
                let loss = point.values.iter().find(|v| v.name == domain::metric::LOSS);
                (point.step, loss.map(|loss| loss.value.to_bits()))
            }));
        }
        assert!(losses.iter().map(|(step, _)| *step).eq(0..=240), "{}: {losses:?}", trial.id);
        let number = trial.id.rsplit_once('/').unwrap().1.to_string();
        results.insert(number, Trial { attempts: trial.attempt, state: trial.state(), losses });
    }
    results
}
