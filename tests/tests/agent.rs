//! A real coordinator and a real agent in one process: a sweep over stories260K from its submission to the
//! adapters in the object store, over real gRPC.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use actor::Scope;
use domain::metric;
use domain::{Clock, SystemClock};
use proto::v1;
use proto::v1::adapter_service_client::AdapterServiceClient;
use proto::v1::sweep_service_client::SweepServiceClient;
use proto::v1::trial_service_client::TrialServiceClient;
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tonic::transport::Channel;
use v1::watch_sweep_response::Event;

/// Longer than a sweep of a few steps takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

fn shared(path: &str) -> Option<PathBuf> {
    let root =
        std::env::var_os("LORAFLEET_SHARED").map_or_else(|| tests::root().join("../shared"), PathBuf::from);
    let path = root.join(path);
    if !path.exists() {
        println!("not checked: {} is not on this machine", path.display());
        return None;
    }
    Some(path)
}

/// A sweep of two trials on real text.
fn document() -> Option<Value> {
    Some(json!({
        "name": "two",
        "pretrained_model_id": shared("data/models/stories260K-hf")?,
        "dataset_name": shared("data/instruct/instruct_500_guanaco.jsonl")?,
        "eval_size": 8,
        "eval_split": "last",
        "max_sequence_length": 64,
        "max_steps": 6,
        "save_steps": 3,
        "learning_rate": 1e-3,
        "search": { "algorithm": "grid" },
        "parameters": { "lora_rank": [2, 4] },
    }))
}

async fn coordinator(dir: &Path, clock: Arc<dyn Clock>, scope: &Scope) -> String {
    let options = coordinator::Options {
        data_dir: dir.into(),
        listen: ([127, 0, 0, 1], 0).into(),
        clock,
        heartbeat: Duration::from_millis(100),
        lease: Duration::from_secs(20),
        access: coordinator::Access::default(),
    };
    let server = coordinator::start(options, scope.clone()).await.unwrap();
    format!("http://{}", server.address)
}

async fn agent(dir: &Path, endpoint: &str, clock: Arc<dyn Clock>, scope: &Scope) {
    let options = gpu_agent::Options {
        coordinator: endpoint.to_string().into(),
        data_dir: dir.into(),
        devices: vec![gpu_agent::devices::cpu()],
        labels: BTreeMap::new(),
        cache_limit: gpu_agent::cache::DEFAULT_LIMIT,
        clock,
    };
    gpu_agent::start(options, scope.clone()).await.unwrap();
}

async fn submit(channel: &Channel, document: &Value) -> String {
    let spec = Some(proto::convert::to_struct(document.as_object().unwrap()));
    let request_id = "6f1c0c0e-9a43-4d0e-8c3a-52d1b6f4a001".into();
    let request = v1::SubmitSweepRequest { request_id, spec, base_models: HashMap::new() };
    let mut sweeps = SweepServiceClient::new(channel.clone());
    sweeps.submit_sweep(request).await.unwrap().into_inner().sweep.unwrap().id
}

/// Watches a sweep to its end.
async fn end_of(channel: &Channel, sweep_id: &str) -> v1::Sweep {
    let mut sweeps = SweepServiceClient::new(channel.clone());
    let request = v1::WatchSweepRequest { sweep_id: sweep_id.into() };
    let mut watched = sweeps.watch_sweep(request).await.unwrap().into_inner();
    let mut newest = None;
    while let Some(change) = watched.message().await.unwrap() {
        if let Some(Event::Sweep(sweep)) = change.event {
            newest = Some(sweep);
        }
    }
    newest.expect("the sweep is told of")
}

async fn curve(trials: &mut TrialServiceClient<Channel>, trial_id: &str) -> Vec<v1::MetricPoint> {
    let request = v1::GetTrialMetricsRequest { trial_id: trial_id.into(), first_step: 0 };
    let mut answers = trials.get_trial_metrics(request).await.unwrap().into_inner();
    let mut points = Vec::new();
    while let Some(answer) = answers.message().await.unwrap() {
        points.extend(answer.points);
    }
    points
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sweep_from_submission_to_adapters() {
    let Some(document) = document() else { return };
    let dir = tempfile::tempdir().unwrap();
    let clock: Arc<dyn Clock> = Arc::new(SystemClock::new());
    let root = Scope::new();
    let (coordinator_scope, agent_scope) = (root.child(), root.child());
    let endpoint = coordinator(&dir.path().join("coordinator"), clock.clone(), &coordinator_scope).await;
    agent(&dir.path().join("agent"), &endpoint, clock, &agent_scope).await;
    let channel = Channel::from_shared(endpoint).unwrap().connect().await.unwrap();

    let sweep_id = submit(&channel, &document).await;
    let sweep = tokio::time::timeout(PATIENCE, end_of(&channel, &sweep_id)).await.expect("it ends");
    assert_eq!(sweep.state(), v1::SweepState::Completed, "{:?}", sweep.failure);

    let mut trials = TrialServiceClient::new(channel.clone());
    let request = v1::ListTrialsRequest { sweep_id: sweep_id.clone(), ..v1::ListTrialsRequest::default() };
    let listed = trials.list_trials(request).await.unwrap().into_inner().trials;
    assert_eq!(listed.len(), 2);
    for trial in &listed {
        assert_eq!((trial.state(), trial.step), (v1::TrialState::Completed, 6), "{:?}", trial.failure);
        let summary = trial.summary.as_ref().unwrap();
        assert!(summary.eval_loss < summary.base_eval_loss, "training helps");
        let points = curve(&mut trials, &trial.id).await;
        assert_eq!(points.iter().map(|p| p.step).collect::<Vec<_>>(), (0..=6).collect::<Vec<_>>());
        let names: Vec<_> = points[6].values.iter().map(|v| v.name.as_str()).collect();
        assert!(names.contains(&metric::LOSS) && names.contains(&metric::EVAL_LOSS), "{names:?}");
    }

    let mut adapters = AdapterServiceClient::new(channel);
    let request = v1::ListAdaptersRequest { sweep_id, ..v1::ListAdaptersRequest::default() };
    let stored = adapters.list_adapters(request).await.unwrap().into_inner().adapters;
    assert_eq!(stored.len(), 2);
    for adapter in stored {
        assert_eq!(adapter.step, 6);
        let dir = PathBuf::from(adapter.local_path.expect("a local store tells where"));
        assert!(dir.join("adapter_config.json").exists() && dir.join("adapter_model.safetensors").exists());
    }

    assert!(agent_scope.finish(gpu_agent::SHUTDOWN_GRACE).await, "the agent ends");
    assert!(coordinator_scope.finish(Duration::from_secs(10)).await, "the coordinator ends");
    let left = |sub: &str| std::fs::read_dir(dir.path().join("agent").join(sub)).map_or(0, Iterator::count);
    assert_eq!((left("spool"), left("trials")), (0, 0), "the agent has nothing left to say");
}
