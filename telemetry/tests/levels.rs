//! What is logged is changed while a program runs.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use telemetry::http::{Readiness, serve};
use telemetry::{Options, Settings};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tracing_subscriber::filter::LevelFilter;

/// Asks for a change; the status, and what is said.
async fn put(address: std::net::SocketAddr, levels: &str) -> (u16, String) {
    put_with(address, &format!("Host: {address}\r\n"), levels).await
}

async fn put_with(address: std::net::SocketAddr, headers: &str, levels: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let head = format!("PUT /log HTTP/1.1\r\n{headers}Content-Length: {}\r\n\r\n", levels.len());
    stream.write_all(format!("{head}{levels}").as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_string())
}

#[tokio::test]
async fn levels_change_without_a_restart() {
    let options = Options { service: "tested", version: "0", level: "off", scraped: false };
    let _telemetry = telemetry::start(&options, &Settings::read(|_| None).unwrap()).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let asks = async {
        for (levels, status, says, want) in [
            ("error,coordinator=debug\n", 200, "logs error,coordinator=debug", LevelFilter::DEBUG),
            ("coordinator=loud", 400, "coordinator=loud", LevelFilter::DEBUG),
            // It would be a module's name, and nothing else be logged.
            ("debg", 400, "is no level", LevelFilter::DEBUG),
            ("warn", 200, "logs warn", LevelFilter::WARN),
            // As at the start.
            ("", 200, "logs off", LevelFilter::OFF),
        ] {
            let (found, said) = put(address, levels).await;
            assert_eq!(found, status, "{levels}: {said}");
            assert!(said.contains(says), "{levels}: {said}");
            assert_eq!(LevelFilter::current(), want, "{levels}");
        }
        // From this machine, and still not by somebody who is on it.
        let here = format!("Host: {address}\r\n");
        for headers in [
            "Host: evil.example\r\n".to_string(),
            String::new(),
            format!("{here}Origin: http://evil.example\r\n"),
            format!("{here}X-Forwarded-For: 10.0.0.7\r\n"),
            format!("{here}Forwarded: for=10.0.0.7\r\n"),
        ] {
            let (status, said) = put_with(address, &headers, "trace").await;
            assert_eq!((status, LevelFilter::current()), (403, LevelFilter::OFF), "{headers}: {said}");
        }
        assert_eq!(put_with(address, "Host: localhost:1\r\n", "").await.0, 200);
    };
    assert_eq!(LevelFilter::current(), LevelFilter::OFF);
    tokio::select! {
        () = asks => {}
        never = serve(listener, Readiness::not_yet("it starts")) => match never {},
    }
}
