//! Who may call what, on a server that asks for tokens.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use actor::Scope;
use clap::Parser;
use config::tokens::{self, Principal, Role};
use coordinator::Access;
use coordinator::access::AccessArgs;
use coordinator::grpc::guard::{TABLE, Who};
use domain::SystemClock;
use proto::v1;
use proto::v1::fleet_service_client::FleetServiceClient;
use proto::v1::sweep_service_client::SweepServiceClient;
use security::client::Token;
use security::watched::INTERVAL;
use security::{Client, Line, Secret};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tests::after;
use tokio_stream::wrappers::ReceiverStream;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::{Code, Request, Status};
use tonic_prost::ProstCodec;
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_types::StatusExt;

/// What a test waits for at most.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Parser)]
struct Flags {
    #[command(flatten)]
    access: AccessArgs,
}

/// What flags make of a server at an address.
fn flags(flags: &[&str], listen: &str) -> Result<Access, String> {
    let flags = Flags::try_parse_from([&["coordinator"], flags].concat()).map_err(|e| e.to_string())?;
    flags.access.access(listen.parse().unwrap()).map_err(|e| e.to_string())
}

/// A server with tokens.
struct Fixture {
    dir: tempfile::TempDir,
    scope: Scope,
    endpoint: String,
}

impl Fixture {
    async fn start(known: &[(&str, Role)]) -> Self {
        Self::start_with(known, &[]).await
    }

    async fn start_with(known: &[(&str, Role)], more: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), known);
        let file = tokens_file(dir.path());
        let given = [&["--tokens", file.to_str().unwrap()], more].concat();
        let access = flags(&given, "127.0.0.1:0").unwrap();
        let scope = Scope::new();
        let options = coordinator::Options {
            data_dir: dir.path().join("data"),
            listen: "127.0.0.1:0".parse().unwrap(),
            clock: Arc::new(SystemClock::new()),
            heartbeat: Duration::from_secs(5),
            lease: Duration::from_secs(20),
            access,
        };
        let server = coordinator::start(options, scope.clone()).await.unwrap();
        Self { dir, scope, endpoint: format!("http://{}", server.address) }
    }

    async fn line(&self, token: Option<&str>) -> Line {
        let token = token.map(|token| Token::Given(Secret::from(token.to_string())));
        let client = Client { token, ..Client::default() };
        let channel = client.endpoint(&self.endpoint).unwrap().connect().await.unwrap();
        client.line(channel).unwrap()
    }
}

fn tokens_file(dir: &Path) -> PathBuf {
    dir.join("tokens.yaml")
}

/// The token of somebody, in these tests.
fn token(name: &str) -> String {
    format!("lft_{name}")
}

fn write(dir: &Path, known: &[(&str, Role)]) {
    let line = |(name, role): &(&str, Role)| {
        tokens::line(&Principal::new(*name, *role), &tokens::hash(&token(name)))
    };
    let lines: Vec<_> = known.iter().map(line).collect();
    std::fs::write(tokens_file(dir), lines.join("\n")).unwrap();
}

/// Calls a method with an empty message; what the answer begins with.
async fn call(line: &Line, path: &'static str) -> Result<(), Status> {
    let mut client = tonic::client::Grpc::new(line.clone());
    client.ready().await.map_err(|e| Status::unknown(format!("{e:?}")))?;
    let codec: ProstCodec<(), ()> = ProstCodec::default();
    let path = PathAndQuery::from_static(path);
    client.server_streaming(Request::new(()), path, codec).await.map(drop)
}

fn reason(status: &Status) -> String {
    status.get_details_error_info().map(|info| info.reason).unwrap_or_default()
}

#[tokio::test]
async fn each_role_may_call_what_its_row_says() {
    let known: Vec<_> = Role::ALL.iter().map(|role| (role.name(), *role)).collect();
    let fixture = Fixture::start(&known).await;
    for role in Role::ALL {
        let line = fixture.line(Some(&token(role.name()))).await;
        for (path, who) in TABLE {
            let refused = call(&line, path)
                .await
                .err()
                .filter(|status| matches!(status.code(), Code::Unauthenticated | Code::PermissionDenied));
            assert_eq!(refused.is_none(), who.permits(role), "{role} {path}: {refused:?}");
            if let Some(status) = refused {
                assert_eq!(reason(&status), "PERMISSION_DENIED");
                assert!(status.message().contains("ask who runs the server"), "{}", status.message());
            }
        }
        let status = call(&line, "/lorafleet.v1.SweepService/Unknown").await.unwrap_err();
        assert_eq!(status.code(), Code::PermissionDenied, "what is not in the table is closed");
    }
    for stranger in [None, Some("lft_x"), Some(""), Some("viewer")] {
        let line = fixture.line(stranger).await;
        for (path, who) in TABLE {
            let refused = call(&line, path).await.err().filter(|s| s.code() == Code::Unauthenticated);
            assert_eq!(refused.is_none(), *who == Who::Anyone, "{stranger:?} {path}");
            if let Some(status) = refused {
                assert_eq!(reason(&status), "UNAUTHENTICATED");
                assert!(!status.message().contains("lft_"), "{}", status.message());
            }
        }
    }
    assert!(fixture.scope.finish(Duration::from_secs(20)).await);
}

#[tokio::test]
async fn a_token_that_is_taken_back_ends_what_it_opened() {
    let all = [("reader", Role::Viewer), ("writer", Role::Submitter)];
    let fixture = Fixture::start(&all).await;
    let (reader, writer) = (fixture.line(Some("lft_reader")).await, fixture.line(Some("lft_writer")).await);
    let document = json!({
        "name": "s", "pretrained_model_id": "/m", "dataset_name": "/d", "max_steps": 6,
        "search": { "algorithm": "grid" }, "parameters": { "lora_rank": [2, 4] },
    });
    let request = v1::SubmitSweepRequest {
        request_id: uuid::Uuid::new_v4().to_string(),
        spec: Some(proto::convert::to_struct(document.as_object().unwrap())),
        ..v1::SubmitSweepRequest::default()
    };
    let mut sweeps = SweepServiceClient::new(writer);
    let id = sweeps.submit_sweep(request).await.unwrap().into_inner().sweep.unwrap().id;
    let request = v1::WatchSweepRequest { sweep_id: id.clone() };
    let mut watched =
        SweepServiceClient::new(reader.clone()).watch_sweep(request).await.unwrap().into_inner();
    // The sweep and its trials as they are.
    for _ in 0..3 {
        watched.message().await.unwrap().unwrap();
    }

    write(fixture.dir.path(), &all[1..]);
    after(INTERVAL).await;
    sweeps.cancel_sweep(v1::CancelSweepRequest { sweep_id: id }).await.unwrap();
    let status = loop {
        match watched.message().await {
            Ok(message) => assert!(message.is_some(), "the stream ended as if nothing was"),
            Err(status) => break status,
        }
    };
    assert_eq!((status.code(), reason(&status).as_str()), (Code::Unauthenticated, "UNAUTHENTICATED"));
    let mut fleet = FleetServiceClient::new(reader);
    let status = fleet.get_server_info(v1::GetServerInfoRequest {}).await.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);

    // A file that cannot be read takes nobody's token, and gives none back.
    std::fs::write(tokens_file(fixture.dir.path()), "- {").unwrap();
    after(INTERVAL).await;
    sweeps.list_sweeps(v1::ListSweepsRequest::default()).await.unwrap();
    write(fixture.dir.path(), &all);
    after(INTERVAL).await;
    fleet.get_server_info(v1::GetServerInfoRequest {}).await.unwrap();
    assert!(fixture.scope.finish(Duration::from_secs(20)).await);
}

#[test]
fn a_server_that_others_reach_says_who_may() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &[("a", Role::Viewer)]);
    let file = tokens_file(dir.path());
    let file = file.to_str().unwrap();
    let rows: &[(&[&str], &str, Option<&str>)] = &[
        (&[], "127.0.0.1:0", None),
        (&["--tokens", file], "127.0.0.1:0", None),
        (&[], "0.0.0.0:0", Some("--tls-cert and --tls-key")),
        (&["--allow-plaintext"], "0.0.0.0:0", None),
        (&["--allow-plaintext", "--tokens", file], "0.0.0.0:0", Some("others could read the tokens")),
        (
            &["--allow-path", "models"],
            "127.0.0.1:0",
            Some("--allow-path \"models\": must be an absolute path"),
        ),
        (&["--allow-hub", "org/name@main"], "127.0.0.1:0", Some("without a revision")),
        (&["--tokens", "gone.yaml"], "127.0.0.1:0", Some("gone.yaml: No such file")),
        (&["--client-ca", "x"], "127.0.0.1:0", Some("--tls-cert")),
    ];
    for (given, listen, want) in rows {
        match (flags(given, listen), want) {
            (Ok(_), None) => {}
            (Err(error), Some(want)) => assert!(error.contains(want), "{given:?}: {error}"),
            (found, want) => panic!("{given:?} {listen}: {found:?}, not {want:?}"),
        }
    }
    let authority = tests::certificates::Authority::new(dir.path(), "authority");
    let pair = authority.issue("server");
    let tls = ["--tls-cert", pair.cert.to_str().unwrap(), "--tls-key", pair.key.to_str().unwrap()];
    let with = |more: &[&str]| flags(&[&tls[..], more].concat(), "0.0.0.0:0");
    assert!(with(&[]).unwrap_err().contains("--allow-anonymous"));
    // What it says is of the connection, which is encrypted here.
    assert!(with(&["--allow-plaintext"]).unwrap_err().contains("--allow-anonymous"));
    for more in
        [&["--tokens", file][..], &["--client-ca", authority.ca.to_str().unwrap()], &["--allow-anonymous"]]
    {
        assert!(with(more).unwrap().tls.is_some(), "{more:?}");
    }
}

/// More calls than a client may have open are refused with what to do, and another client's are not.
#[tokio::test]
async fn a_client_that_asks_too_much_is_told_so() {
    let known = [("one", Role::Viewer), ("other", Role::Viewer)];
    let fixture = Fixture::start_with(&known, &["--max-calls", "2"]).await;
    let (one, other) = (fixture.line(Some("lft_one")).await, fixture.line(Some("lft_other")).await);
    let watch = async |line: &Line| {
        // Reflection stays open as long as the asker does.
        let (asks, asked) = tokio::sync::mpsc::channel::<ServerReflectionRequest>(1);
        let mut reflection = ServerReflectionClient::new(line.clone());
        let stream = ReceiverStream::new(asked);
        let answer = reflection.server_reflection_info(stream).await;
        answer.map(|answer| (asks, answer.into_inner()))
    };
    let open = (watch(&one).await.unwrap(), watch(&one).await.unwrap());
    let status = watch(&one).await.unwrap_err();
    assert_eq!((status.code(), reason(&status).as_str()), (Code::ResourceExhausted, "EXHAUSTED"));
    assert!(status.message().contains("one has 2 calls open"), "{}", status.message());
    let details = status.get_error_details();
    assert!(details.retry_info().is_some());
    assert_eq!(details.quota_failure().unwrap().violations[0].subject, "one");
    watch(&other).await.unwrap();
    drop(open);
    // Told of the end, the server counts less.
    let counted = async {
        while watch(&one).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, counted).await.expect("it may ask again");
    fixture.scope.cancel();
}

/// Tokens that are tried out count against their address, and so do calls that a token may not make against its name.
/// Whoever has a token goes on, from the same address too.
#[tokio::test]
async fn who_is_refused_is_limited_too() {
    let known = [("reader", Role::Viewer), ("other", Role::Viewer)];
    let fixture = Fixture::start_with(&known, &["--max-calls-per-second", "1"]).await;
    let (read, denied) =
        ("/lorafleet.v1.FleetService/GetServerInfo", "/lorafleet.v1.FleetService/DrainAgent");
    let none = fixture.line(None).await;
    let (bad, reader, other) = (
        fixture.line(Some("lft_x")).await,
        fixture.line(Some("lft_reader")).await,
        fixture.line(Some("lft_other")).await,
    );
    let exhausted = async |line: &Line, path: &'static str, subject: &str| {
        // Time passes meanwhile, so that it may be some more than five.
        for _ in 0..1000 {
            let status = call(line, path).await.unwrap_err();
            if status.code() == Code::ResourceExhausted {
                return assert!(status.message().starts_with(subject), "{}", status.message());
            }
        }
        panic!("{subject} was never refused for asking too much");
    };
    exhausted(&bad, read, "127.0.0.1 makes").await;
    // They share an address, which is a client of its own.
    exhausted(&none, read, "127.0.0.1 makes").await;
    call(&other, read).await.unwrap();
    exhausted(&reader, denied, "reader makes").await;
    call(&other, read).await.unwrap();
    fixture.scope.cancel();
}
