//! A real etcd, of one node or of three, for as long as a test has it.

use crate::certificates::Pair;
use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// Where others of a cluster of one would reach it: it speaks to no peer, so that nobody needs to.
const PEER: &str = "http://127.0.0.1:1";

/// A running etcd on a free port of this machine. It is killed when it is dropped.
#[derive(Debug)]
pub struct Etcd {
    process: Child,
    /// What it was started with.
    arguments: Vec<OsString>,
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

    /// The same at this address, as `127.0.0.1:<port>`, which was free a moment ago.
    ///
    /// # Panics
    /// It does not start.
    pub fn start_at(dir: &Path, address: &str) -> Option<Self> {
        Self::start_listening(dir, &format!("http://{address}"), |_| {})
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

    /// Three nodes that take each other for gone after so many milliseconds only.
    ///
    /// # Panics
    /// They do not start.
    #[allow(clippy::expect_used, reason = "a test fails by panicking")]
    pub fn start_three(dir: &Path, gone_after: u32) -> Option<[Self; 3]> {
        // Each must know the others' before it starts: held at once, so that they are three, and then let go.
        let free = [(); 6].map(|()| TcpListener::bind("127.0.0.1:0").expect("there is a free port"));
        let free = free.map(|held| format!("http://{}", held.local_addr().expect("it is bound")));
        let (peers, clients) = free.split_at(3);
        let cluster: Vec<_> = peers.iter().enumerate().map(|(i, peer)| format!("node{i}={peer}")).collect();
        let cluster = cluster.join(",");
        let started = [0, 1, 2].map(|i| {
            let (name, peer) = (format!("node{i}"), peers[i].as_str());
            let clients = &clients[i];
            spawn(&dir.join(&name), clients, |command| {
                command.args(["--name", &name, "--listen-peer-urls", peer]);
                command.args(["--initial-advertise-peer-urls", peer, "--initial-cluster", &cluster]);
                let beat = (gone_after / 10).to_string();
                command.args(["--heartbeat-interval", &beat, "--election-timeout", &gone_after.to_string()]);
            })
        });
        // None of them serves before they have found each other.
        let [Some(a), Some(b), Some(c)] = started else { return None };
        Some([a, b, c].map(|started| serving(started, "http")))
    }

    /// Saves a snapshot of it to a file. False, with a line that says so, where etcd's command line is not installed.
    ///
    /// # Panics
    /// It cannot be saved.
    #[allow(clippy::panic, reason = "a test fails by panicking")]
    pub fn snapshot(&self, to: &Path) -> bool {
        let mut command = Command::new("etcdctl");
        command.args(["--endpoints", &self.endpoint, "snapshot", "save"]).arg(to).env("ETCDCTL_API", "3");
        match command.output() {
            Ok(saved) if saved.status.success() => true,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                crate::skipped("etcdctl is not installed (Debian: apt-get install etcd-client)");
                false
            }
            failed => panic!("etcdctl snapshot save: {failed:?}"),
        }
    }

    /// Makes a snapshot the folder of a cluster of one, for [`Etcd::start`] and [`Etcd::start_at`].
    ///
    /// # Panics
    /// It is none, or there is such a folder.
    #[allow(clippy::panic, reason = "a test fails by panicking")]
    pub fn restore(snapshot: &Path, dir: &Path) {
        // From 3.6 on it is another tool's.
        for tool in ["etcdutl", "etcdctl"] {
            let mut command = Command::new(tool);
            command.args(["snapshot", "restore"]).arg(snapshot).arg("--data-dir").arg(dir);
            command.args(["--name", "default", "--initial-advertise-peer-urls", PEER]);
            command.args(["--initial-cluster", &format!("default={PEER}")]).env("ETCDCTL_API", "3");
            match command.output() {
                Ok(restored) if restored.status.success() => return,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                failed => panic!("{tool} snapshot restore: {failed:?}"),
            }
        }
        panic!("there is neither etcdutl nor etcdctl");
    }

    fn start_with(dir: &Path, scheme: &str, how: impl FnOnce(&mut Command)) -> Option<Self> {
        Self::start_listening(dir, &format!("{scheme}://127.0.0.1:0"), how)
    }

    fn start_listening(dir: &Path, clients: &str, how: impl FnOnce(&mut Command)) -> Option<Self> {
        let started = spawn(dir, clients, |command| {
            how(command);
            command.args(["--listen-peer-urls", "http://127.0.0.1:0", "--initial-advertise-peer-urls", PEER]);
            command.args(["--initial-cluster", &format!("default={PEER}")]);
        });
        let scheme = clients.split("://").next().unwrap_or_default();
        started.map(|started| serving(started, scheme))
    }

    /// Whether it leads the others, by its own word.
    ///
    /// # Panics
    /// It does not answer over plain HTTP.
    pub fn leads(&self) -> bool {
        self.metrics().lines().any(|line| line == "etcd_server_is_leader 1")
    }

    /// Calls of a method of its API that it has begun and not answered.
    ///
    /// # Panics
    /// It does not answer over plain HTTP.
    pub fn under_way(&self, method: &str) -> f64 {
        let (metrics, method) = (self.metrics(), format!("grpc_method=\"{method}\""));
        let count = |name: &str| {
            let lines = metrics.lines().filter(|line| line.starts_with(name) && line.contains(&method));
            lines.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok()).sum::<f64>()
        };
        count("grpc_server_started_total{") - count("grpc_server_handled_total{")
    }

    #[allow(clippy::expect_used, reason = "a test fails by panicking")]
    fn metrics(&self) -> String {
        let address = self.endpoint.strip_prefix("http://").expect("it serves without TLS");
        let mut stream = TcpStream::connect(address).expect("it listens");
        stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").expect("it listens");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("it answers");
        answer
    }

    /// Kills its process; [`Etcd::start_again`] has it back.
    pub fn kill(&mut self) {
        // It is gone already, or goes now.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }

    /// Starts one of three that was killed, where it was. The others do not wait for it.
    ///
    /// # Panics
    /// It does not start.
    #[allow(clippy::expect_used, reason = "a test fails by panicking")]
    pub fn start_again(&mut self) {
        let process = started(Command::new("etcd").args(&self.arguments));
        *self = serving((process.expect("it starts"), std::mem::take(&mut self.arguments)), "http");
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
        self.kill();
    }
}

/// A process, and what it was started with.
type Started = (Child, Vec<OsString>);

/// `None`, with a line that says so, where etcd is not installed.
#[allow(clippy::panic, reason = "a test fails by panicking")]
fn spawn(dir: &Path, clients: &str, how: impl FnOnce(&mut Command)) -> Option<Started> {
    let mut command = Command::new("etcd");
    how(&mut command);
    command.arg("--data-dir").arg(dir);
    command.args(["--listen-client-urls", clients, "--advertise-client-urls", clients]);
    command.args(["--logger", "zap", "--log-outputs", "stderr"]);
    let process = started(&mut command);
    match process {
        Ok(process) => Some((process, command.get_args().map(Into::into).collect())),
        // Who runs all tests has installed it.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && !is_required() => {
            crate::skipped("etcd is not installed (Debian: apt-get install etcd-server)");
            None
        }
        Err(error) => panic!("etcd: {error}"),
    }
}

fn is_required() -> bool {
    std::env::var_os("LORAFLEET_REQUIRE_ETCD").is_some()
}

fn started(command: &mut Command) -> std::io::Result<Child> {
    command.env("ETCD_UNSUPPORTED_ARCH", std::env::consts::ARCH.replace("aarch64", "arm64"));
    command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn()
}

/// Waits until it serves.
#[allow(clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]
fn serving((mut process, arguments): Started, scheme: &str) -> Etcd {
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
    Etcd { process, arguments, endpoint: format!("{scheme}://{address}") }
}
