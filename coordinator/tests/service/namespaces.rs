//! What the sweeps and uploads of a namespace may take.

use crate::agent::{FakeAgent, hello};
use crate::fixture::{Fixture, LONG, access_by, grid};
use crate::page::{Events, ask};
use config::limits::Limits;
use config::tokens::{self, Principal, Role};
use coordinator::Access;
use domain::data::ContentHash;
use proto::convert;
use proto::convert::data::hash;
use proto::status::QUOTA_REASON;
use proto::v1;
use proto::v1::data_service_client::DataServiceClient;
use proto::v1::sweep_service_client::SweepServiceClient;
use proto::v1::upload_file_request::Piece;
use security::watched::Watched;
use security::{FileError, Line};
use serde_json::{Value, json};
use std::path::Path;
use std::sync::Arc;
use tonic::{Code, Status};
use tonic_types::StatusExt;

/// Ada of team-a, Bob of the default namespace, and an agent; each one's token is called like them.
fn access(dir: &Path, limits: &str) -> Access {
    let known = [
        Principal { namespace: "team-a".into(), ..Principal::new("ada", Role::Submitter) },
        Principal::new("bob", Role::Submitter),
        Principal::new("gpu", Role::Agent),
    ];
    let lines: Vec<_> = known.iter().map(|one| tokens::line(one, &tokens::hash(&one.name))).collect();
    let path = dir.join("tokens.yaml");
    std::fs::write(&path, lines.join("\n")).unwrap();
    let limits = Limits::parse(limits).unwrap();
    let limits = Watched::open(vec![], move || Ok::<_, FileError>(limits.clone())).unwrap();
    Access { limits: Some(Arc::new(limits)), ..access_by(&path) }
}

async fn submit(line: Line, request_id: &str, document: &Value) -> v1::Sweep {
    let request = v1::SubmitSweepRequest {
        request_id: request_id.into(),
        spec: Some(convert::to_struct(document.as_object().unwrap())),
        ..v1::SubmitSweepRequest::default()
    };
    SweepServiceClient::new(line).submit_sweep(request).await.unwrap().into_inner().sweep.unwrap()
}

#[tokio::test]
async fn trials_beyond_a_limit_wait_and_say_why() {
    let dir = tempfile::tempdir().unwrap();
    let access = access(dir.path(), "team-a: { max_concurrent_trials: 1 }");
    let fixture = Fixture::start_guarded(LONG, access, "ada").await;
    let bob = fixture.line("bob").await;
    let hers = submit(fixture.channel.clone(), "6f1c0c0e-9a43-4d0e-8c3a-52d1b6f4a001", &grid(&[2, 4])).await;
    let his = submit(bob, "6f1c0c0e-9a43-4d0e-8c3a-52d1b6f4a002", &grid(&[8])).await;
    assert_eq!((hers.namespace.as_str(), his.namespace.as_str()), ("team-a", "default"));

    let mut agent = FakeAgent::connect_over(fixture.line("gpu").await, hello("one", 3, vec![])).await;
    let (first, second) = (agent.assigned().await, agent.assigned().await);
    let mut both = [first.trial_id.as_str(), second.trial_id.as_str()];
    both.sort();
    let mut wanted = [format!("{}/1", hers.id), format!("{}/1", his.id)];
    wanted.sort();
    assert_eq!(both, wanted.each_ref().map(String::as_str));
    let (hers_first, his_first) =
        if first.trial_id.starts_with(&hers.id) { (first, second) } else { (second, first) };
    let why = async |id: &str| {
        let request = v1::GetSweepRequest { sweep_id: id.into() };
        fixture.sweeps().get_sweep(request).await.unwrap().into_inner().sweep.unwrap().waits_for
    };
    assert_eq!(why(&hers.id).await.as_deref(), Some("namespace team-a has 1 of its 1 trials on devices"));
    assert_eq!(why(&his.id).await, None);
    // So does the live page: in the list, of the sweep, and as it follows it.
    let headers = "Host: fleet.example.org\r\nAuthorization: Bearer ada\r\n";
    let waits = |sweep: &Value| (sweep["namespace"].clone(), sweep["waits_for"].clone());
    let wanted = (json!("team-a"), json!("namespace team-a has 1 of its 1 trials on devices"));
    let path = format!("/api/sweeps/{}", hers.id);
    assert_eq!(waits(&ask(&fixture, &format!("GET {path}"), headers, "").await.json()), wanted);
    let mut events = Events::open_as(&fixture, &format!("{path}/events"), headers).await;
    assert_eq!(waits(&events.next("sweep", |_| true).await), wanted);
    let mut overview = Events::open_as(&fixture, "/api/events", headers).await;
    let news = overview.next("sweeps", |_| true).await;
    let listed = news["changed"].as_array().unwrap().iter().find(|sweep| sweep["id"] == json!(hers.id));
    assert_eq!(waits(listed.unwrap()), wanted);

    // What another ends makes no room; what is its own does.
    agent.train(&his_first, 1.0).await;
    agent.train(&hers_first, 1.0).await;
    assert_eq!(agent.assigned().await.trial_id, format!("{}/2", hers.id));
    assert_eq!(why(&hers.id).await, None);
}

async fn upload(line: &Line, file: ContentHash, data: &[u8]) -> Result<(), Status> {
    announce(line, file, data.len() as u64, data).await
}

async fn announce(line: &Line, file: ContentHash, bytes: u64, data: &[u8]) -> Result<(), Status> {
    let header = v1::UploadFileHeader { sha256: hash(file), bytes, offset: 0 };
    let pieces = [Piece::Header(header), Piece::Data(data.to_vec().into())];
    let messages = pieces.map(|piece| v1::UploadFileRequest { piece: Some(piece) });
    DataServiceClient::new(line.clone()).upload_file(futures::stream::iter(messages)).await.map(drop)
}

#[tokio::test]
async fn uploads_beyond_a_quota_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let access = access(dir.path(), "team-a: { max_upload_bytes: 10 }");
    let mut fixture = Fixture::start_guarded(LONG, access, "ada").await;
    let ada = fixture.line("ada").await;
    let (six, five, four) = (b"666666", b"55555", b"4444");
    let refused = |done: Result<(), Status>| {
        let status = done.unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted, "{}", status.message());
        let numbers =
            "the namespace team-a has 6 bytes of uploaded data and may have 10: 5 more are too many";
        assert!(status.message().contains(numbers), "{}", status.message());
        assert_eq!(status.get_error_details().error_info().unwrap().reason, QUOTA_REASON);
    };
    // What does not arrive as it should does not count, and what is there counts once.
    let wrong = upload(&ada, ContentHash::of(five), b"77777").await.unwrap_err();
    assert_eq!(wrong.code(), Code::DataLoss);
    for _ in 0..2 {
        upload(&ada, ContentHash::of(six), six).await.unwrap();
    }
    refused(upload(&ada, ContentHash::of(five), five).await);
    // Nor does it help to announce less at first: a file counts with the most that was said of it.
    announce(&ada, ContentHash::of(five), 1, b"").await.unwrap_err();
    refused(upload(&ada, ContentHash::of(five), five).await);
    // It is counted over restarts.
    fixture.restart().await;
    let (ada, bob) = (fixture.line("ada").await, fixture.line("bob").await);
    refused(upload(&ada, ContentHash::of(five), five).await);
    upload(&ada, ContentHash::of(four), four).await.unwrap();
    // What somebody else uploaded is there for all.
    upload(&bob, ContentHash::of(five), five).await.unwrap();
    upload(&ada, ContentHash::of(five), five).await.unwrap();
}
