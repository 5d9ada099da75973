//! Uploaded data over the wire: what submitters send, what agents get, and what a sweep may name of it.

use crate::agent::{FakeAgent, hello};
use crate::fixture::{Fixture, LONG, grid};
use domain::data::{ContentHash, Reference, Tree};
use domain::{Clock, SystemClock, Timestamp};
use proto::convert::data::{hash, to_tree};
use proto::v1;
use proto::v1::data_service_client::DataServiceClient;
use proto::v1::session_response::Message as Hear;
use proto::v1::upload_file_request::Piece;
use security::Line;
use serde_json::json;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tonic::{Code, Status};

fn client(fixture: &Fixture) -> DataServiceClient<Line> {
    DataServiceClient::new(fixture.channel.clone())
}

/// Sends a header and bytes.
async fn send(
    fixture: &Fixture,
    file: ContentHash,
    bytes: u64,
    offset: u64,
    data: &[u8],
) -> Result<(), Status> {
    let header = v1::UploadFileHeader { sha256: hash(file), bytes, offset };
    let data = data.chunks(1 << 20).map(|data| Piece::Data(data.to_vec().into()));
    let pieces: Vec<_> = [Piece::Header(header)].into_iter().chain(data).collect();
    let messages = pieces.into_iter().map(|piece| v1::UploadFileRequest { piece: Some(piece) });
    client(fixture).upload_file(futures::stream::iter(messages.collect::<Vec<_>>())).await.map(drop)
}

async fn missing(fixture: &Fixture, files: &[ContentHash]) -> Vec<(Vec<u8>, u64)> {
    let request = v1::FindMissingRequest { sha256: files.iter().copied().map(hash).collect() };
    let missing = client(fixture).find_missing(request).await.unwrap().into_inner().missing;
    missing.into_iter().map(|file| (file.sha256, file.offset)).collect()
}

async fn commit(fixture: &Fixture, files: &[(&str, &[u8])]) -> Result<ContentHash, Status> {
    let file = |(name, data): &(&str, &[u8])| v1::DataFile {
        name: (*name).into(),
        bytes: data.len() as u64,
        sha256: hash(ContentHash::of(data)),
    };
    let files: Vec<_> = files.iter().map(file).collect();
    let answer = client(fixture).commit_tree(v1::CommitTreeRequest { files: files.clone() }).await?;
    let tree = to_tree(files).unwrap();
    assert_eq!(answer.into_inner().id, hash(tree.id()));
    Ok(tree.id())
}

async fn download(fixture: &Fixture, file: ContentHash, offset: u64) -> Result<Vec<u8>, Status> {
    let request = v1::DownloadFileRequest { sha256: hash(file), offset };
    let mut stream = client(fixture).download_file(request).await?.into_inner();
    let mut found = Vec::new();
    while let Some(message) = stream.message().await? {
        assert!(message.data.len() <= 1 << 20);
        found.extend_from_slice(&message.data);
    }
    Ok(found)
}

#[tokio::test]
async fn data_goes_up_and_comes_down_over_restarts() {
    let mut fixture = Fixture::start(LONG).await;
    let rows: Vec<u8> = (0..2_500_000_u32).map(|i| (i % 251) as u8).collect();
    let file = ContentHash::of(&rows);
    assert_eq!(missing(&fixture, &[file, file]).await, [(hash(file), 0)]);
    send(&fixture, file, rows.len() as u64, 0, &rows).await.unwrap();
    // Once more, at once.
    send(&fixture, file, rows.len() as u64, 0, &[]).await.unwrap();
    let id = commit(&fixture, &[("rows.jsonl", &rows)]).await.unwrap();
    fixture.restart().await;
    assert_eq!(missing(&fixture, &[file]).await, []);
    let answer = client(&fixture).get_tree(v1::GetTreeRequest { id: hash(id) }).await.unwrap().into_inner();
    assert_eq!(to_tree(answer.files).unwrap().id(), id);
    for offset in [0, 1, 1 << 20, rows.len()] {
        assert!(download(&fixture, file, offset as u64).await.unwrap() == rows[offset..], "{offset}");
    }
}

#[tokio::test]
async fn what_is_refused_and_how() {
    let fixture = Fixture::start(LONG).await;
    let data = b"{}\n";
    let file = ContentHash::of(data);
    let refused = |code: Code, said: &'static str| {
        move |status: Status| {
            assert_eq!(status.code(), code, "{said}: {}", status.message());
            assert!(status.message().contains(said), "{said}: {}", status.message());
        }
    };
    let check = |result: Result<(), Status>, code, said| refused(code, said)(result.unwrap_err());
    check(send(&fixture, file, 3, 0, b"[]\n").await, Code::DataLoss, "did the file change");
    check(send(&fixture, file, 3, 0, b"{}").await, Code::FailedPrecondition, "1 bytes early");
    check(send(&fixture, file, 3, 1, b"}\n").await, Code::FailedPrecondition, "goes on at byte 0");
    check(send(&fixture, file, 3, 0, b"{}\n\n").await, Code::InvalidArgument, "cannot have 3 bytes");
    check(send(&fixture, file, u64::MAX, 0, b"").await, Code::InvalidArgument, "a TiB at most");
    check(commit(&fixture, &[("rows.jsonl", data)]).await.map(drop), Code::FailedPrecondition, "rows.jsonl");
    for name in ["../rows.jsonl", "/etc/passwd", "a/b", "", ".hidden"] {
        let file = v1::DataFile { name: name.into(), bytes: 3, sha256: hash(file) };
        let done = client(&fixture).commit_tree(v1::CommitTreeRequest { files: vec![file] }).await;
        check(done.map(drop), Code::InvalidArgument, "rename it");
    }
    let none = v1::UploadFileRequest { piece: Some(Piece::Data(data.to_vec().into())) };
    let done = client(&fixture).upload_file(futures::stream::iter([none])).await;
    check(done.map(drop), Code::InvalidArgument, "must come first");
    let many = v1::FindMissingRequest { sha256: vec![hash(file); 1001] };
    check(client(&fixture).find_missing(many).await.map(drop), Code::InvalidArgument, "ask in parts");
    let short = v1::FindMissingRequest { sha256: vec![vec![1; 31]] };
    check(client(&fixture).find_missing(short).await.map(drop), Code::InvalidArgument, "has 31 bytes");
    check(download(&fixture, file, 0).await.map(drop), Code::NotFound, "uploaded data");
    let none = v1::GetTreeRequest { id: hash(file) };
    check(client(&fixture).get_tree(none).await.map(drop), Code::NotFound, "uploaded data");
    // Nothing of all this stayed.
    assert_eq!(missing(&fixture, &[file]).await, [(hash(file), 0)]);
}

/// A sweep can name what is there, and its data outlives what nobody names.
#[tokio::test]
async fn a_sweep_names_what_was_uploaded() {
    let clock = Arc::new(Ahead::default());
    let mut fixture = Fixture::start_at(LONG, clock.clone()).await;
    let (rows, other) = (b"{}\n".as_slice(), b"{}\n{}\n".as_slice());
    let nobodys = b"{}\n{}\n{}\n".as_slice();
    for data in [rows, other, nobodys] {
        send(&fixture, ContentHash::of(data), data.len() as u64, 0, data).await.unwrap();
    }
    let tree = commit(&fixture, &[("rows.jsonl", rows), ("more.jsonl", other)]).await.unwrap();
    let one = commit(&fixture, &[("rows.jsonl", rows)]).await.unwrap();
    commit(&fixture, &[("nobodys.jsonl", nobodys)]).await.unwrap();
    let name =
        |tree, name: &str, is_directory| Reference { tree, name: name.into(), is_directory }.to_string();
    let never = ContentHash::of(b"never");
    for (rows, said) in [
        (name(never, "rows.jsonl", false), "was not uploaded"),
        (name(tree, "rows.jsonl", false), "is no file of that name"),
        (name(one, "other.jsonl", false), "is no file of that name"),
        ("blob:sha256:x/rows.jsonl".into(), "names no uploaded data"),
    ] {
        let mut document = grid(&[2]);
        document["dataset_name"] = json!(rows);
        let status = fixture.submit_as("6f1c0c0e-9a43-4d0e-8c3a-52d1b6f4a001", &document).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        let text = status.message();
        assert!(text.contains(said) && text.contains("spec.dataset_name"), "{rows}: {text}");
    }
    let mut document = grid(&[2]);
    document["dataset_name"] = json!(name(tree, "sets", true));
    document["eval_dataset_name"] = json!(name(one, "rows.jsonl", false));
    let sweep = fixture.submit(&document).await;
    let kept = proto::convert::from_struct(sweep.spec.unwrap());
    assert_eq!(kept["dataset_name"], document["dataset_name"]);

    // What one sweep names and nobody else does is lost: a look at the directory says so.
    let gone =
        Tree::parse(&format!("lorafleet tree 1\n{} 3 rows.jsonl\n", ContentHash::of(rows))).unwrap().id();
    assert_eq!(gone, one);
    fixture
        .stop_and(|dir| async move {
            let found = coordinator::fsck::check(&dir).unwrap();
            assert_eq!(found.problems, []);
            assert!(found.checked.contains(&("uploaded files", 3)), "{:?}", found.checked);
            std::fs::remove_file(dir.join(format!("artifacts/data/trees/{gone}"))).unwrap();
            let found = coordinator::fsck::check(&dir).unwrap();
            assert!(
                found.problems.iter().any(|problem| problem.what.contains(&gone.to_string())),
                "{found:?}"
            );
        })
        .await;
    let (of_sweeps, nobodys) = ([rows, other].map(ContentHash::of), ContentHash::of(nobodys));
    assert_eq!(missing(&fixture, &[nobodys]).await, [], "young data is kept");
    clock.0.store(2 * 24 * 3_600_000, Ordering::Relaxed);
    fixture.stop_and(|_| async {}).await;
    assert_eq!(missing(&fixture, &of_sweeps).await, [], "what a sweep names is kept");
    assert_eq!(missing(&fixture, &[nobodys]).await, [(hash(nobodys), 0)]);
}

/// While one of two trials trains, the agent is told of what the other one needs.
#[tokio::test]
async fn what_a_waiting_trial_names_is_fetched_ahead() {
    let fixture = Fixture::start(LONG).await;
    let rows = b"{}\n".as_slice();
    send(&fixture, ContentHash::of(rows), rows.len() as u64, 0, rows).await.unwrap();
    let tree = commit(&fixture, &[("rows.jsonl", rows)]).await.unwrap();
    let named = Reference { tree, name: "rows.jsonl".into(), is_directory: false }.to_string();
    let mut document = grid(&[2, 4]);
    document["dataset_name"] = json!(named);
    fixture.submit(&document).await;
    let mut agent = FakeAgent::connect(&fixture, hello("one", 1, vec![])).await;
    // Either may come first.
    let (mut first, mut hint) = (None, Vec::new());
    while first.is_none() || hint.is_empty() {
        match agent.hear().await.unwrap() {
            Hear::Assign(assign) => first = Some(assign),
            Hear::Prefetch(prefetch) => hint = prefetch.data,
            _ => {}
        }
    }
    assert_eq!(hint, [named]);
    agent.train(&first.unwrap(), 1.0).await;
    agent.assigned().await;
}

/// So many milliseconds ahead of the system's clock.
#[derive(Default)]
struct Ahead(AtomicU64, SystemClock);

impl Clock for Ahead {
    fn now(&self) -> Timestamp {
        Timestamp(self.1.now().0 + self.0.load(Ordering::Relaxed))
    }

    fn monotonic(&self) -> Duration {
        self.1.monotonic()
    }
}
