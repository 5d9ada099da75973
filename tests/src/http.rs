//! What programs serve over HTTP, as a scraper asks for it.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

/// The time in which an answer comes.
const PATIENCE: Duration = Duration::from_secs(20);

/// A port of this machine that was free a moment ago.
///
/// # Panics
/// There is none.
#[allow(clippy::expect_used, reason = "a test fails by panicking")]
pub fn free_address() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("there is a free port");
    listener.local_addr().expect("it is bound").to_string()
}

/// What is served at a path: the status, and the text.
///
/// # Panics
/// Nobody answers.
#[allow(clippy::expect_used, reason = "a test fails by panicking")]
pub fn get(address: &str, path: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).expect("it listens");
    stream.set_read_timeout(Some(PATIENCE)).expect("it is a time");
    write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").expect("it listens");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("it answers");
    let (head, body) = answer.split_once("\r\n\r\n").expect("an answer has a head");
    let status = head.split(' ').nth(1).expect("a head has a status");
    (status.parse().expect("a status is a number"), body.to_string())
}
