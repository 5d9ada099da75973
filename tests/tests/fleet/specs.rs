//! What was asked of a sweep, where it is too large for etcd.

use crate::common::submit;
use crate::{Fleet, soon};
use proto::v1;
use proto::v1::sweep_service_client::SweepServiceClient;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::path::PathBuf;
use tests::program;

/// Submits a sweep that is asked for in some 20 kB; answers with its id.
async fn submit_large(endpoint: &str) -> String {
    let quickstart = tests::root().join("config/quickstart");
    let document = json!({
        "name": "large", "pretrained_model_id": quickstart.join("base"),
        "dataset_name": quickstart.join("instruct.jsonl"), "max_steps": 4,
        "search": { "algorithm": "grid" }, "parameters": { "lora_rank": [2, 4] },
        "constraints": (0..800).map(|n| format!("lora_rank <= {}", 10_000 + n)).collect::<Vec<_>>(),
    });
    let spec = Some(proto::convert::to_struct(document.as_object().unwrap()));
    let request_id = "6f1c0c0e-9a43-4d0e-8c3a-52d1b6f4b001".into();
    let request = v1::SubmitSweepRequest { request_id, spec, base_models: HashMap::new() };
    let mut client = SweepServiceClient::connect(endpoint.to_string()).await.unwrap();
    client.submit_sweep(request).await.unwrap().into_inner().sweep.unwrap().id
}

fn lorafleet(endpoint: &str, arguments: &[&str]) -> (Option<i32>, String, String) {
    program::output("lorafleet", &[arguments, &["--endpoint", endpoint]].concat(), &[])
}

/// The state of each sweep, by its id, as `lorafleet list` says it.
fn listed(endpoint: &str) -> HashMap<String, String> {
    let (code, said, problem) = lorafleet(endpoint, &["list", "-o", "json"]);
    assert_eq!(code, Some(0), "{problem}");
    let sweeps: Vec<Value> = serde_json::from_str(&said).unwrap();
    let text = |value: &Value| value.as_str().unwrap().to_string();
    sweeps.iter().map(|sweep| (text(&sweep["id"]), text(&sweep["state"]))).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sweep_whose_object_is_damaged_is_shown_as_unreadable_and_the_others_go_on() {
    let Some(fleet) = Fleet::new() else { return };
    let mut first = fleet.coordinator();
    let endpoint = first.says("listening on ");
    first.says("leading");
    let (large, small) = (submit_large(&endpoint).await, submit(&endpoint).await);
    let running = |id: &String| (id.clone(), "running".to_string());
    assert_eq!(listed(&endpoint), [&large, &small].map(running).into());
    let objects = |id: &str| -> Vec<PathBuf> {
        let dir = std::fs::read_dir(fleet.dir.path().join("artifacts/artifacts/sweeps").join(id));
        dir.into_iter().flatten().map(|entry| entry.unwrap().path()).collect()
    };
    assert!(objects(&small).is_empty());
    let [object] = &objects(&large)[..] else { panic!("{:?}", objects(&large)) };
    let bytes = std::fs::read(object).unwrap();
    assert!(first.terminate());

    std::fs::write(object, &bytes[..bytes.len() - 1]).unwrap();
    let mut second = fleet.coordinator();
    let endpoint = second.says("listening on ");
    second.says("leading");
    assert_eq!(listed(&endpoint), [(large.clone(), "unreadable".to_string()), running(&small)].into());
    let name = object.file_name().unwrap().to_str().unwrap();
    let (code, _, problem) = lorafleet(&endpoint, &["get", &large]);
    assert!(code == Some(1) && problem.contains(name) && problem.contains("restore it"), "{problem}");
    assert!(second.terminate());

    // Put back it goes on, and deleted nothing is left of it.
    std::fs::write(object, bytes).unwrap();
    let mut third = fleet.coordinator();
    let endpoint = third.says("listening on ");
    third.says("leading");
    assert_eq!(listed(&endpoint), [&large, &small].map(running).into());
    let deleted = async { lorafleet(&endpoint, &["delete", &large, "--force"]) };
    let (code, _, problem) = soon("the deletion", deleted).await;
    assert_eq!((code, objects(&large)), (Some(0), vec![]), "{problem}");
    assert!(third.terminate());
}
