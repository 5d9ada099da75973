//! Messages that are well-formed and cannot be meant.

use super::fixture::{Fixture, LONG, grid};
use super::{check_refusal, check_serves, watch_for_panics};
use prost_types::value::Kind;
use proto::{convert, v1};
use serde_json::json;
use tonic::{Code, Status};
use tonic_types::StatusExt;

fn tricky_ids(other: &str) -> Vec<String> {
    let plain = [
        "",
        "/",
        "//",
        "..",
        "../../etc/passwd",
        "a\0b",
        "a\nb",
        "\u{202e}a",
        "%2e%2e/1",
        "'; DROP TABLE x; --",
    ];
    let numbers = ["/1", "x/0", "x/-1", "x/99999999999999999999", "x/+1", "x/1/1", "x/ 1"];
    let mut ids: Vec<_> = plain.iter().chain(&numbers).map(ToString::to_string).collect();
    // Another way to write a trial that is there is not that trial.
    ids.extend(["+1", "01", "1 ", "1\n", "4294967297"].map(|number| format!("{other}/{number}")));
    ids.extend([
        format!("{other}/99"),
        format!("{other}/0"),
        "x".repeat(1 << 20),
        format!("{}/1", "y".repeat(1 << 20)),
    ]);
    ids
}

/// What every call that takes an id says to it.
async fn ask_all(fixture: &Fixture, id: &str) -> Vec<(&'static str, Option<Status>)> {
    let (sweep_id, trial_id, agent_id) = (|| id.to_string(), || id.to_string(), || id.to_string());
    let (page_size, page_token) = (1, String::new());
    macro_rules! ask {
        ($($client:ident.$method:ident($request:expr)),* $(,)?) => {
            vec![$((stringify!($method), fixture.$client().$method($request).await.err())),*]
        };
    }
    let request_id = || "6f1c0c0e-9a43-4d0e-8c3a-52d1b6f4a001".to_string();
    let spec = || Some(convert::to_struct(grid(&[2]).as_object().unwrap()));
    ask![
        sweeps.get_sweep(v1::GetSweepRequest { sweep_id: sweep_id() }),
        sweeps.cancel_sweep(v1::CancelSweepRequest { sweep_id: sweep_id() }),
        sweeps.pause_sweep(v1::PauseSweepRequest { sweep_id: sweep_id() }),
        sweeps.resume_sweep(v1::ResumeSweepRequest { sweep_id: sweep_id() }),
        sweeps.extend_sweep(v1::ExtendSweepRequest {
            sweep_id: sweep_id(),
            request_id: request_id(),
            spec: spec()
        }),
        sweeps.delete_sweep(v1::DeleteSweepRequest { sweep_id: sweep_id(), force: true }),
        sweeps.watch_sweep(v1::WatchSweepRequest { sweep_id: sweep_id() }),
        sweeps.get_report(v1::GetReportRequest { sweep_id: sweep_id(), format: 0 }),
        trials.get_trial(v1::GetTrialRequest { trial_id: trial_id() }),
        trials.list_trials(v1::ListTrialsRequest {
            sweep_id: sweep_id(),
            page_size,
            page_token: page_token.clone(),
            states: vec![],
            without_config: false
        }),
        trials.get_trial_metrics(v1::GetTrialMetricsRequest { trial_id: trial_id(), first_step: 0 }),
        trials.get_trial_log(v1::GetTrialLogRequest { trial_id: trial_id(), follow: true }),
        trials.stop_trial(v1::StopTrialRequest { trial_id: trial_id() }),
        trials.retry_trial(v1::RetryTrialRequest { trial_id: trial_id() }),
        adapters.list_adapters(v1::ListAdaptersRequest {
            sweep_id: sweep_id(),
            page_size,
            page_token: page_token.clone()
        }),
        adapters.download_adapter(v1::DownloadAdapterRequest { trial_id: trial_id() }),
        fleet.get_agent(v1::GetAgentRequest { agent_id: agent_id() }),
        fleet.drain_agent(v1::DrainAgentRequest { agent_id: agent_id(), undo: false }),
    ]
}

#[tokio::test]
async fn an_id_of_nothing_is_refused_by_every_call() {
    watch_for_panics();
    let fixture = Fixture::start(LONG).await;
    let other = fixture.submit(&grid(&[2])).await.id;
    for id in tricky_ids(&other) {
        for (call, status) in ask_all(&fixture, &id).await {
            let what = format!("{call} of {:?}", id.chars().take(40).collect::<String>());
            check_refusal(&what, &status.unwrap_or_else(|| panic!("{what}: answered")));
        }
    }
    assert_eq!(fixture.sweep(&other).await.state(), v1::SweepState::Running);
    assert_eq!(fixture.trial(&format!("{other}/1")).await.state(), v1::TrialState::Queued);
    check_serves(&fixture).await;
}

#[tokio::test]
async fn a_page_token_that_no_listing_gave_is_refused() {
    watch_for_panics();
    let fixture = Fixture::start(LONG).await;
    let sweep_id = fixture.submit(&grid(&[2, 4])).await.id;
    let mut trials = fixture.trials();
    let first = v1::ListTrialsRequest {
        sweep_id: sweep_id.clone(),
        page_size: 1,
        ..v1::ListTrialsRequest::default()
    };
    let good = trials.list_trials(first).await.unwrap().into_inner().next_page_token;
    for page_token in
        ["0", "é", "\0", "../..", "00000000", "ffffffffff", &good[1..], &"a".repeat(1 << 20), &good.repeat(2)]
    {
        let page_token = page_token.to_string();
        let request =
            v1::ListSweepsRequest { page_token: page_token.clone(), ..v1::ListSweepsRequest::default() };
        check_refusal("sweeps", &fixture.sweeps().list_sweeps(request).await.unwrap_err());
        let request = v1::ListAgentsRequest { page_token: page_token.clone(), page_size: 1 };
        check_refusal("agents", &fixture.fleet().list_agents(request).await.unwrap_err());
        let request = v1::ListAdaptersRequest {
            sweep_id: sweep_id.clone(),
            page_token: page_token.clone(),
            page_size: 1,
        };
        check_refusal("adapters", &fixture.adapters().list_adapters(request).await.unwrap_err());
        let request = v1::ListTrialsRequest {
            sweep_id: sweep_id.clone(),
            page_token,
            page_size: 1,
            states: vec![],
            without_config: false,
        };
        check_refusal("trials", &trials.list_trials(request).await.unwrap_err());
    }
    let other = v1::ListSweepsRequest { page_token: good, ..v1::ListSweepsRequest::default() };
    check_refusal("another listing's", &fixture.sweeps().list_sweeps(other).await.unwrap_err());
    check_serves(&fixture).await;
}

/// A spec that is wrong is refused with the field's name; nothing of it is kept.
#[tokio::test]
async fn a_spec_that_cannot_be_meant_is_refused_by_its_field() {
    watch_for_panics();
    let fixture = Fixture::start(LONG).await;
    let number = |n: f64| prost_types::Value { kind: Some(Kind::NumberValue(n)) };
    let text = |s: &str| prost_types::Value { kind: Some(Kind::StringValue(s.into())) };
    let range = |low: f64, high: f64| {
        let values = vec![number(low), number(high)];
        let list = prost_types::Value { kind: Some(Kind::ListValue(prost_types::ListValue { values })) };
        let uniform = prost_types::Struct { fields: [("uniform".to_string(), list)].into() };
        let range = prost_types::Value { kind: Some(Kind::StructValue(uniform)) };
        let fields = [("learning_rate".to_string(), range)].into();
        prost_types::Value { kind: Some(Kind::StructValue(prost_types::Struct { fields })) }
    };
    let many: Vec<_> = (1..30_000).map(f64::from).map(number).collect();
    let many = prost_types::Value { kind: Some(Kind::ListValue(prost_types::ListValue { values: many })) };
    let many = prost_types::Struct { fields: [("seed".to_string(), many)].into() };
    let cases = [
        ("name", text("../../etc"), "spec.name"),
        ("name", text("a\0b"), "spec.name"),
        ("name", text("a\nb"), "spec.name"),
        ("name", text(&"n".repeat(81)), "spec.name"),
        ("name", number(f64::NAN), "spec.name"),
        ("learning_rate", number(f64::INFINITY), "spec.learning_rate"),
        ("learning_rate", number(f64::NEG_INFINITY), "spec.learning_rate"),
        ("learning_rate", number(f64::NAN), "spec.learning_rate"),
        ("lora_rank", number(1e300), "spec.lora_rank"),
        ("lora_rank", number(-1.0), "spec.lora_rank"),
        ("max_steps", number(0.5), "spec.max_steps"),
        ("parameters", range(f64::NAN, 1.0), "spec.parameters"),
        ("parameters", range(1e-5, f64::INFINITY), "spec.parameters"),
        ("parameters", prost_types::Value { kind: Some(Kind::StructValue(many)) }, "spec"),
        ("budget", text("all of it"), "spec.budget"),
        ("a\0b", text("x"), "spec.a\0b"),
        ("dataset_name", text(&"d".repeat(1 << 20)), "spec"),
    ];
    for (key, value, field) in cases {
        let mut spec = convert::to_struct(grid(&[2]).as_object().unwrap());
        spec.fields.insert(key.into(), value);
        let request_id = uuid::Uuid::new_v4().to_string();
        let request = v1::SubmitSweepRequest { request_id, spec: Some(spec), base_models: [].into() };
        let status = fixture.sweeps().submit_sweep(request).await.expect_err(field);
        assert_eq!(status.code(), Code::InvalidArgument, "{key}: {status:?}");
        let fields = status.get_details_bad_request().unwrap().field_violations;
        assert!(fields.iter().any(|v| v.field.starts_with(field)), "{key}: {fields:?}");
    }
    let sweeps = fixture.sweeps().list_sweeps(v1::ListSweepsRequest::default()).await.unwrap();
    assert!(sweeps.into_inner().sweeps.is_empty());
    check_serves(&fixture).await;
}

/// What a search would list without end is not listed.
#[tokio::test]
async fn a_space_without_end_is_refused_in_time() {
    watch_for_panics();
    let fixture = Fixture::start(LONG).await;
    let long: Vec<_> = (1..=100).collect();
    for parameters in [
        json!({"seed": {"int_uniform": [0, 9_007_199_254_740_992_u64]}}),
        json!({"seed": {"int_uniform": [0, 9_007_199_254_740_992_u64], "step": 1}}),
        json!({"learning_rate": {"uniform": [1e-300, 1e300], "step": 1e-300}}),
        json!({"learning_rate": {"uniform": [0.1, 0.2]}}),
        json!({"seed": long, "lora_rank": long, "batch_size": long, "eval_steps": long, "max_steps": long}),
    ] {
        let mut document = grid(&[2]);
        document["parameters"] = parameters;
        let status = fixture.submit_as(&uuid::Uuid::new_v4().to_string(), &document).await.unwrap_err();
        check_refusal("a space", &status);
    }
    check_serves(&fixture).await;
}
