//! Listings, adapters, reports: what people read.

use crate::agent::{FakeAgent, hello};
use crate::fixture::{Fixture, LONG, grid};
use domain::{Clock, SystemClock};
use proto::v1;
use proto::v1::TrialState;
use proto::v1::watch_sweep_response::Event;
use serde_json::json;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tonic::Code;

#[tokio::test]
async fn listings_come_page_by_page() {
    let fixture = Fixture::start(LONG).await;
    let mut newest_first = Vec::new();
    for rank in [2, 4, 8] {
        newest_first.insert(0, fixture.submit(&grid(&[rank, 2 * rank, 4 * rank])).await.id);
    }
    let request = |size, token: &str| v1::ListSweepsRequest {
        page_size: size,
        page_token: token.into(),
        states: vec![],
    };
    let first = fixture.sweeps().list_sweeps(request(2, "")).await.unwrap().into_inner();
    let rest = fixture.sweeps().list_sweeps(request(2, &first.next_page_token)).await.unwrap().into_inner();
    let mut ids: Vec<_> = first.sweeps.iter().chain(&rest.sweeps).map(|s| s.id.clone()).collect();
    assert_eq!((first.sweeps.len(), rest.next_page_token.as_str()), (2, ""));
    // Two sweeps of one millisecond may stand in either order.
    ids.sort();
    newest_first.sort();
    assert_eq!(ids, newest_first);

    let running = v1::ListSweepsRequest {
        states: vec![v1::SweepState::Completed.into()],
        ..v1::ListSweepsRequest::default()
    };
    assert_eq!(fixture.sweeps().list_sweeps(running).await.unwrap().into_inner().sweeps, []);

    let request = |token: &str, states: &[TrialState]| v1::ListTrialsRequest {
        sweep_id: ids[0].clone(),
        page_size: 2,
        page_token: token.into(),
        states: states.iter().map(|s| (*s).into()).collect(),
        without_config: false,
    };
    let list = |request| async { fixture.trials().list_trials(request).await.map(|r| r.into_inner()) };
    let first = list(request("", &[])).await.unwrap();
    let rest = list(request(&first.next_page_token, &[])).await.unwrap();
    let numbers: Vec<_> = first.trials.iter().chain(&rest.trials).map(|t| t.number).collect();
    assert_eq!((numbers, rest.next_page_token.as_str()), (vec![1, 2, 3], ""));
    assert_eq!(list(request("", &[TrialState::Running])).await.unwrap().trials, []);
    for (token, states) in [("xyz", &[][..]), (&first.next_page_token, &[TrialState::Queued])] {
        let status = list(request(token, states)).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{token} {states:?}");
    }
}

/// A page is a message that a client takes, however large its sweeps and trials are.
#[tokio::test]
async fn large_sweeps_and_trials_come_in_more_pages() {
    let fixture = Fixture::start(LONG).await;
    let mut document = grid(&(1..=20).collect::<Vec<_>>());
    document["pretrained_model_id"] = "/models/a".repeat(20_000).into();
    for _ in 0..20 {
        fixture.submit(&document).await;
    }
    let (mut seen, mut pages, mut request) =
        (0, 0, v1::ListSweepsRequest { page_size: 1000, ..Default::default() });
    let mut last = String::new();
    while pages == 0 || !request.page_token.is_empty() {
        let page = fixture.sweeps().list_sweeps(request.clone()).await.unwrap().into_inner();
        (seen, pages, request.page_token) = (seen + page.sweeps.len(), pages + 1, page.next_page_token);
        last = page.sweeps.last().unwrap().id.clone();
    }
    assert_eq!((seen, pages), (20, 2));
    let _agent = FakeAgent::connect(&fixture, hello("a", 64, vec![])).await;
    let (mut seen, mut pages) = (0, 0);
    let mut request = v1::ListTrialsRequest { sweep_id: last, page_size: 1000, ..Default::default() };
    while pages == 0 || !request.page_token.is_empty() {
        let page = fixture.trials().list_trials(request.clone()).await.unwrap().into_inner();
        (seen, pages, request.page_token) = (seen + page.trials.len(), pages + 1, page.next_page_token);
    }
    // As many wait as may.
    assert!(seen >= 8 && pages == seen.div_ceil(17), "{seen} trials on {pages} pages");
}

#[tokio::test]
async fn adapters_come_best_first_with_their_bytes_and_the_report_names_each_trial() {
    let fixture = Fixture::start(LONG).await;
    let sweep = fixture.submit(&grid(&[2, 4])).await;
    let mut agent = FakeAgent::connect(&fixture, hello("a", 2, vec![])).await;
    let agents = fixture.fleet().list_agents(v1::ListAgentsRequest::default()).await.unwrap().into_inner();
    assert_eq!((agents.agents[0].id.as_str(), agents.agents[0].connected), ("a", true));

    let (worse, better) = (agent.assigned().await, agent.assigned().await);
    agent.train(&worse, 2.0).await;
    agent.acknowledged().await;
    agent.train(&better, 1.0).await;
    agent.acknowledged().await;
    let request = v1::ListAdaptersRequest { sweep_id: sweep.id.clone(), ..Default::default() };
    let adapters = fixture.adapters().list_adapters(request).await.unwrap().into_inner().adapters;
    let ids: Vec<_> = adapters.iter().map(|a| a.trial_id.as_str()).collect();
    assert_eq!(ids, [better.trial_id.as_str(), worse.trial_id.as_str()]);
    let [(_, name, bytes), _] = FakeAgent::files(&better, 6);
    assert_eq!((adapters[0].step, adapters[0].bytes), (6, bytes.len() as u64));
    let on_disk = std::path::Path::new(adapters[0].local_path.as_ref().unwrap()).join(name);
    assert_eq!(std::fs::read(on_disk).unwrap(), bytes);

    let request = v1::DownloadAdapterRequest { trial_id: better.trial_id.clone() };
    let mut pieces = fixture.adapters().download_adapter(request).await.unwrap().into_inner();
    let (mut got, mut sha256) = (Vec::new(), Vec::new());
    while let Some(piece) = pieces.message().await.unwrap() {
        assert_eq!(piece.file, name);
        got.extend(piece.data);
        sha256 = piece.sha256;
    }
    assert_eq!(got, bytes);
    assert_eq!(sha256.len(), 32, "on the last piece");

    let request = v1::GetReportRequest { sweep_id: sweep.id.clone(), format: 0 };
    let mut chunks = fixture.sweeps().get_report(request).await.unwrap().into_inner();
    let mut html = Vec::new();
    while let Some(piece) = chunks.message().await.unwrap() {
        html.extend(piece.chunk);
    }
    let html = String::from_utf8(html).unwrap();
    assert!(html.contains("</html>") && html.contains("<svg"), "{html}");

    let format = v1::ReportFormat::Markdown.into();
    let request = v1::GetReportRequest { sweep_id: sweep.id, format };
    let mut chunks = fixture.sweeps().get_report(request).await.unwrap().into_inner();
    let mut files = Vec::new();
    while let Some(piece) = chunks.message().await.unwrap() {
        files.push(piece.file);
    }
    files.dedup();
    assert_eq!(files[0], "report.md");
    assert!(files.len() > 1 && files[1..].iter().all(|file| file.ends_with(".svg")), "{files:?}");
}

/// The parts of an answer leave as they come. Otherwise the last waits until the other side has acknowledged the first,
/// which takes it 40 ms, each time.
#[tokio::test]
async fn an_answer_does_not_wait_for_an_acknowledgement() {
    let fixture = Fixture::start(LONG).await;
    let clock = SystemClock::new();
    let mut quickest = LONG;
    for _ in 0..20 {
        let asked = clock.monotonic();
        fixture.fleet().get_server_info(v1::GetServerInfoRequest {}).await.unwrap();
        quickest = quickest.min(clock.monotonic() - asked);
    }
    assert!(quickest < Duration::from_millis(30), "{quickest:?}");
}

/// What waits for a watcher is bounded: one that reads nothing for a while gets a fresh picture instead of what it missed.
#[tokio::test]
async fn a_watcher_that_falls_behind_misses_no_end() {
    let fixture = Fixture::start(LONG).await;
    let rates: Vec<_> = (1..=500).map(|number| f64::from(number) * 1e-6).collect();
    let mut document = grid(&[2]);
    document["parameters"] = json!({ "learning_rate": rates });
    let sweep = fixture.submit(&document).await;
    let mut watch = fixture.watch(&sweep.id).await;
    watch.next().await.unwrap();
    // More changes than are kept for it, and than fit between here and there.
    let mut agent = FakeAgent::connect(&fixture, hello("a", 1, vec![])).await;
    for _ in &rates {
        let assign = agent.assigned().await;
        agent.start(&assign).await;
        agent.finish(&assign, v1::Ending::Completed, Some(1.0)).await;
    }
    let (mut newest, mut ran, mut state) = (BTreeMap::new(), BTreeSet::new(), None);
    while let Some(event) = watch.next().await {
        match event {
            Event::Sweep(sweep) => state = Some(sweep.state()),
            Event::Trial(trial) => {
                if trial.state() == TrialState::Running {
                    ran.insert(trial.number);
                }
                newest.insert(trial.number, trial.state());
            }
            Event::Progress(_) => {}
        }
    }
    assert_eq!((state, newest.len()), (Some(v1::SweepState::Completed), rates.len()));
    assert!(newest.values().all(|state| *state == TrialState::Completed), "{newest:?}");
    assert!(ran.len() < rates.len(), "it was kept waiting for, and heard that each trial ran");
}
