//! A real etcd, of one node or of three, for as long as a test has it.

use crate::certificates::Pair;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// A running etcd on a free port of this machine. It is killed when it is dropped.
#[derive(Debug)]
pub struct Etcd {
    process: Child,
    /// Where it serves, as `http://127.0.0.1:<port>` or `https://127.0.0.1:<port>`.
    pub endpoint: String,
}

impl Etcd {
    /// Starts one on an empty folder. `None`, with a line that says so, where etcd is not installed.
    ///
    /// # Panics
    /// It does not start.
    pub fn start(dir: &Path) -> Option<Self> {
        Self::start_with(dir, "http", |_| {})
    }

    /// The same over TLS, for clients with a certificate of that authority. Their common name is their user.
    ///
    /// # Panics
    /// It does not start.
    pub fn start_secured(dir: &Path, own: &Pair, authority: &Path) -> Option<Self> {
        Self::start_with(dir, "https", |command| {
            command.arg("--cert-file").arg(&own.cert).arg("--key-file").arg(&own.key);
            command.arg("--client-cert-auth").arg("--trusted-ca-file").arg(authority);
        })
    }

    /// Three nodes that take each other for gone after five seconds only.
    ///
    /// # Panics
    /// They do not start.
    #[allow(clippy::expect_used, reason = "a test fails by panicking")]
    pub fn start_three(dir: &Path) -> Option<[Self; 3]> {
        // Each must know the others' before it starts: held at once, so that they are three, and then let go.
        let free = [(); 3].map(|()| TcpListener::bind("127.0.0.1:0").expect("there is a free port"));
        let peers = free.map(|held| format!("http://{}", held.local_addr().expect("it is bound")));
        let cluster: Vec<_> = peers.iter().enumerate().map(|(i, peer)| format!("node{i}={peer}")).collect();
        let cluster = cluster.join(",");
        let started = [0, 1, 2].map(|i| {
            let (name, peer) = (format!("node{i}"), peers[i].as_str());
            spawn(&dir.join(&name), "http", |command| {
                command.args(["--name", &name, "--listen-peer-urls", peer]);
                command.args(["--initial-advertise-peer-urls", peer, "--initial-cluster", &cluster]);
                command.args(["--heartbeat-interval", "500", "--election-timeout", "5000"]);
            })
        });
        // None of them serves before they have found each other.
        let [Some(a), Some(b), Some(c)] = started else { return None };
        Some([a, b, c].map(|process| serving(process, "http")))
    }

    fn start_with(dir: &Path, scheme: &str, how: impl FnOnce(&mut Command)) -> Option<Self> {
        let process = spawn(dir, scheme, |command| {
            how(command);
            // A cluster of one speaks to no peer: nobody needs to reach it at this address.
            let peer = "http://127.0.0.1:1";
            command.args(["--listen-peer-urls", "http://127.0.0.1:0"]);
            command.args([
                "--initial-advertise-peer-urls",
                peer,
                "--initial-cluster",
                &format!("default={peer}"),
            ]);
        });
        process.map(|process| serving(process, scheme))
    }

    /// Whether it leads the others, by its own word.
    ///
    /// # Panics
    /// It does not answer over plain HTTP.
    #[allow(clippy::expect_used, reason = "a test fails by panicking")]
    pub fn leads(&self) -> bool {
        let address = self.endpoint.strip_prefix("http://").expect("it serves without TLS");
        let mut stream = TcpStream::connect(address).expect("it listens");
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").expect("it listens");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("it answers");
        answer.lines().any(|line| line == "etcd_server_is_leader 1")
    }

    /// Sends its process a signal, such as `STOP`.
    ///
    /// # Panics
    /// It cannot be sent.
    pub fn signal(&self, name: &str) {
        crate::signal(self.process.id(), name);
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        // It is gone already, or goes now.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// `None`, with a line that says so, where etcd is not installed.
#[allow(clippy::panic, reason = "a test fails by panicking")]
fn spawn(dir: &Path, scheme: &str, how: impl FnOnce(&mut Command)) -> Option<Child> {
    let any = &format!("{scheme}://127.0.0.1:0");
    let mut command = Command::new("etcd");
    how(&mut command);
    let started = command
        .arg("--data-dir")
        .arg(dir)
        .args(["--listen-client-urls", any, "--advertise-client-urls", any])
        .args(["--logger", "zap", "--log-outputs", "stderr"])
        .env("ETCD_UNSUPPORTED_ARCH", std::env::consts::ARCH.replace("aarch64", "arm64"))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    match started {
        Ok(process) => Some(process),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            crate::skipped("etcd is not installed (Debian: apt-get install etcd-server)");
            None
        }
        Err(error) => panic!("etcd: {error}"),
    }
}

/// Waits until it serves.
#[allow(clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]
fn serving(mut process: Child, scheme: &str) -> Etcd {
    let mut lines = BufReader::new(process.stderr.take().expect("it is piped")).lines();
    let mut said = Vec::new();
    let address = lines.by_ref().map_while(Result::ok).find_map(|line| {
        let entry: serde_json::Value = serde_json::from_str(&line).unwrap_or_default();
        said.push(line);
        let serves = entry["msg"].as_str()?.starts_with("serving client traffic");
        serves.then(|| entry["address"].as_str().map(String::from))?
    });
    let address = address.unwrap_or_else(|| panic!("etcd did not start:\n{}", said.join("\n")));
    // Its pipe must not run full.
    std::thread::spawn(move || lines.for_each(drop));
    Etcd { process, endpoint: format!("{scheme}://{address}") }
}
