//! What is logged is changed while a program runs.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use telemetry::http::{Readiness, serve};
use telemetry::{Options, Settings};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tracing_subscriber::filter::LevelFilter;

/// Asks for a change; the status, and what is said.
async fn put(address: std::net::SocketAddr, levels: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let head = format!("PUT /log HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n", levels.len());
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
            ("warn", 200, "logs warn", LevelFilter::WARN),
            // As at the start.
            ("", 200, "logs off", LevelFilter::OFF),
        ] {
            let (found, said) = put(address, levels).await;
            assert_eq!(found, status, "{levels}: {said}");
            assert!(said.contains(says), "{levels}: {said}");
            assert_eq!(LevelFilter::current(), want, "{levels}");
        }
    };
    assert_eq!(LevelFilter::current(), LevelFilter::OFF);
    tokio::select! {
        () = asks => {}
        never = serve(listener, Readiness::not_yet("it starts")) => match never {},
    }
}
