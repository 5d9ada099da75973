//! Every call is counted once, by how it ended: also one that was given up before its answer came.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::convert::Infallible;
use telemetry::grpc::{ServerLayer, Traced};
use telemetry::{Options, Settings};
use tonic::Code;
use tonic::codegen::http::{Request, Response};
use tower::{Layer, Service, service_fn};

/// A service that answers with a code, or never.
fn service(
    code: Option<Code>,
) -> impl Service<
    Request<()>,
    Response = Response<()>,
    Error = Infallible,
    Future = impl Future<Output = Result<Response<()>, Infallible>> + Send + 'static,
> {
    service_fn(move |_: Request<()>| async move {
        match code {
            Some(Code::Ok) => Ok(Response::new(())),
            Some(code) => Ok(tonic::Status::new(code, "why").into_http()),
            None => std::future::pending().await,
        }
    })
}

fn request(method: &str) -> Request<()> {
    Request::builder().uri(format!("/a.B/{method}")).body(()).unwrap()
}

/// How often such a call was counted.
fn counted(side: &str, labels: &[&str]) -> Option<String> {
    let text = telemetry::http::text();
    let name = format!("rpc_{side}_call_duration_seconds_count{{");
    let mut lines = text.lines().filter(|line| line.starts_with(&name));
    let line = lines.find(|line| labels.iter().all(|label| line.contains(label)))?;
    // One that did not fail has no type of error.
    let fails = labels.iter().any(|label| label.starts_with("error_type"));
    assert_eq!(line.contains("error_type"), fails, "{line}");
    Some(line.rsplit_once(' ')?.1.to_string())
}

#[tokio::test]
async fn every_call_is_counted_by_how_it_ended() {
    let options = Options { service: "tested", version: "0", level: "off", scraped: true };
    let _telemetry = telemetry::start(&options, &Settings::read(|_| None).unwrap()).unwrap();
    let server = "https://coordinator.example:7401".parse().unwrap();
    let layer = ServerLayer { serves: |path| path.starts_with("/a.B/") };
    // (method, its answer, what is counted; whether that is a fault of the server's, whether of the client's call)
    for (method, code, name, of_server, of_client) in [
        ("Good", Some(Code::Ok), "OK", false, false),
        ("Refused", Some(Code::NotFound), "NOT_FOUND", false, true),
        ("Broken", Some(Code::Internal), "INTERNAL", true, true),
        ("GivenUp", None, "CANCELLED", false, true),
    ] {
        let mut client = Traced::client(service(code), &server);
        let mut served = layer.layer(service(code));
        let (of_caller, of_served) = (client.call(request(method)), served.call(request(method)));
        if code.is_some() {
            of_caller.await.unwrap();
            of_served.await.unwrap();
        } else {
            drop((of_caller, of_served));
        }
        for (side, failed) in [("server", of_server), ("client", of_client)] {
            let labels = [format!("\"a.B/{method}\""), format!("rpc_response_status_code=\"{name}\"")];
            let error = failed.then(|| format!("error_type=\"{name}\""));
            let labels: Vec<_> = labels.iter().chain(&error).map(String::as_str).collect();
            assert_eq!(counted(side, &labels).as_deref(), Some("1"), "{side} {method}");
        }
    }
}
