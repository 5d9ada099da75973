//! A hub on this machine: listings, file headers, redirects to a second server for large files, parts of files, and
//! the faults that a test asks for. Other crates' tests include this file too.

#![allow(dead_code, reason = "each test uses its part")]

use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};

/// The commit that every branch of every repository is at.
pub const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A request as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Whether it came to the server of large files.
    pub large: bool,
    pub method: String,
    pub path: String,
    pub range: Option<String>,
    pub token: Option<String>,
}

/// What the servers hold, and what they are to do wrong.
#[derive(Default)]
pub struct State {
    /// Repositories by `models/NAME` or `datasets/NAME`, their files by name.
    pub repos: BTreeMap<String, BTreeMap<String, Vec<u8>>>,
    /// Requests so far.
    pub seen: Vec<Seen>,
    /// Breaks each connection that sends this file after so many bytes, so many times.
    pub break_after: Option<(String, usize, usize)>,
    /// Sends so many bytes of this file and then nothing.
    pub stall_after: Option<(String, usize)>,
    /// Changes a byte of this file.
    pub corrupt: Option<String>,
    /// Sends whole files where parts are asked for.
    pub no_parts: bool,
    /// Answers every request so: status and X-Error-Code.
    pub refuse: Option<(u16, &'static str)>,
    /// Another name that redirects here, as a repository's old name does.
    pub moved: Option<(String, String)>,
    ports: [u16; 2],
}

/// Two servers, the hub and that of its large files.
pub struct LocalHub {
    state: Arc<Mutex<State>>,
}

/// Files that start so are large: the hub knows their SHA-256 and has them elsewhere.
const LARGE: &str = "model";

impl LocalHub {
    pub fn start() -> Self {
        let state = Arc::new(Mutex::new(State::default()));
        for large in [false, true] {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            state.lock().unwrap().ports[usize::from(large)] = listener.local_addr().unwrap().port();
            let state = state.clone();
            std::thread::spawn(move || {
                for stream in listener.incoming() {
                    let state = state.clone();
                    std::thread::spawn(move || answer(&stream.unwrap(), large, &state));
                }
            });
        }
        Self { state }
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.state().ports[0])
    }

    /// Puts a file into a repository.
    pub fn put(&self, repo: &str, file: &str, bytes: impl Into<Vec<u8>>) {
        self.state().repos.entry(repo.into()).or_default().insert(file.into(), bytes.into());
    }

    /// The requests since the last call.
    pub fn seen(&self) -> Vec<Seen> {
        std::mem::take(&mut self.state().seen)
    }
}

/// The SHA-256 of bytes in hexadecimal digits.
pub fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
}

fn answer(stream: &TcpStream, large: bool, state: &Mutex<State>) {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    if reader.read_line(&mut line).unwrap_or_default() == 0 {
        return;
    }
    let mut words = line.split_whitespace();
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let mut headers = BTreeMap::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).unwrap();
        let Some((name, value)) = line.trim().split_once(':') else { break };
        headers.insert(name.to_lowercase(), value.trim().to_string());
    }
    let mut state = state.lock().unwrap();
    state.seen.push(Seen {
        large,
        method: method.into(),
        path: path.into(),
        range: headers.get("range").cloned(),
        token: headers.get("authorization").and_then(|value| value.strip_prefix("Bearer ")).map(Into::into),
    });
    let reply = reply(&mut state, large, method, path, headers.get("range").map(String::as_str));
    let stalls =
        state.stall_after.as_ref().is_some_and(|(file, _)| method == "GET" && path.ends_with(file.as_str()));
    drop(state);
    // Who asked may be gone.
    let _ = (&mut &*stream).write_all(&reply);
    if stalls {
        // Until the other side ends.
        let _ = reader.read_line(&mut String::new());
    }
}

fn response(status: &str, headers: &str, length: usize, body: &[u8]) -> Vec<u8> {
    let head = format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n");
    [head.as_bytes(), body].concat()
}

fn reply(state: &mut State, large: bool, method: &str, path: &str, range: Option<&str>) -> Vec<u8> {
    let missing = || response("404 Not Found", "X-Error-Code: RepoNotFound\r\n", 0, b"");
    if let Some((status, code)) = state.refuse {
        return response(&format!("{status} No"), &format!("X-Error-Code: {code}\r\n"), 0, b"");
    }
    if let Some((from, to)) = state.moved.clone().filter(|(from, _)| path.contains(from.as_str())) {
        return response("307 Moved", &format!("Location: {}\r\n", path.replace(&from, &to)), 0, b"");
    }
    if let Some(rest) = path.strip_prefix("/api/") {
        let Some((repo, revision)) = rest.split_once("/revision/") else { return missing() };
        if !["main", "v1", COMMIT].contains(&revision) {
            return response("404 Not Found", "X-Error-Code: RevisionNotFound\r\n", 0, b"");
        }
        let Some(files) = state.repos.get(repo) else { return missing() };
        let names: Vec<_> = files.keys().map(|name| format!("{{\"rfilename\": \"{name}\"}}")).collect();
        let body = format!("{{\"sha\": \"{COMMIT}\", \"siblings\": [{}]}}", names.join(", "));
        return response("200 OK", "", body.len(), body.as_bytes());
    }
    let path = path.trim_start_matches('/');
    let key = if path.starts_with("datasets/") { path.to_string() } else { format!("models/{path}") };
    let Some((repo, rest)) = key.split_once("/resolve/") else { return missing() };
    let file = rest.split_once('/').map_or("", |(_, file)| file);
    let Some(bytes) = state.repos.get(repo).and_then(|files| files.get(file)).cloned() else {
        return missing();
    };
    let is_large = file.starts_with(LARGE);
    if is_large && !large {
        let headers = format!(
            "Location: http://127.0.0.1:{}/{path}\r\nX-Repo-Commit: {COMMIT}\r\nX-Linked-Etag: \"{}\"\r\nX-Linked-Size: {}\r\n",
            state.ports[1],
            sha256(&bytes),
            bytes.len()
        );
        return response("302 Found", &headers, 0, b"");
    }
    let mut sent = bytes.clone();
    if state.corrupt.as_deref() == Some(file) {
        sent[0] ^= 1;
    }
    let from = range
        .filter(|_| !state.no_parts)
        .and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
    let etag = format!("ETag: \"{}\"\r\nX-Repo-Commit: {COMMIT}\r\n", &sha256(&bytes)[..40]);
    let (status, headers, part) = match from {
        Some(from) if from >= sent.len() => return response("416 No", "", 0, b""),
        Some(from) => {
            let headers = format!("{etag}Content-Range: bytes {from}-{}/{}\r\n", sent.len() - 1, sent.len());
            ("206 Partial", headers, &sent[from..])
        }
        None => ("200 OK", etag, &sent[..]),
    };
    if method == "HEAD" {
        return response(status, &headers, part.len(), b"");
    }
    let mut end = part.len();
    if let Some((broken, after, times @ 1..)) = &mut state.break_after
        && broken == file
    {
        *times -= 1;
        end = end.min(*after);
    }
    if let Some((stalled, after)) = &state.stall_after
        && stalled == file
    {
        end = end.min(*after);
    }
    response(status, &headers, part.len(), &part[..end])
}
