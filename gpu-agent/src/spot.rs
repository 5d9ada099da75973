//! Whether this machine is about to be taken away, as its cloud's metadata server says.
//!
//! The server is a neighbour that speaks plain HTTP: a question is a connection of its own over hyper, without proxies,
//! redirects or TLS, and ends with the task that asks, however long its answer takes.

use actor::Scope;
use futures::future::{join, join_all};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Bytes;
use hyper::header::{ETAG, HOST, HeaderMap};
use hyper::{Method, Request, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use std::convert::Infallible;
use std::future::pending;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::sync::watch;

/// Where Google's and Amazon's machines find their metadata server.
const NEIGHBOUR: &str = "169.254.169.254:80";
/// For how long Google's server may wait for a change before it answers.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// The time that a server may take to answer, beyond that.
const LIMIT: Duration = Duration::from_secs(5);
/// Bytes of an answer at most.
const MOST_BYTES: usize = 16 << 10;
/// The name of no version of a value: the server answers at once.
const NO_VERSION: &str = "NONE";
/// Where the firmware says who made the machine.
const FIRMWARE: &str = "/sys/class/dmi/id";

/// Who is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// Nobody.
    Off,
    /// Google's metadata server, at host and port.
    Gce(String),
    /// Amazon's.
    Aws(String),
}

impl Source {
    /// Reads `auto`, `off`, `gce`, `aws`, or the latter two with an address, as in `gce=http://127.0.0.1:8080`.
    ///
    /// # Errors
    /// What it may be.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (cloud, address) = match text.split_once('=') {
            Some((cloud, address)) => (cloud, Some(address)),
            None => (text, None),
        };
        let at = || address.map_or_else(|| Ok(NEIGHBOUR.into()), authority);
        match (cloud, address) {
            ("auto", None) => {
                let said = |name| std::fs::read_to_string(format!("{FIRMWARE}/{name}")).unwrap_or_default();
                Ok(Self::of_machine(&said("product_name"), &said("sys_vendor"), &said("bios_version")))
            }
            ("off", None) => Ok(Self::Off),
            ("gce", _) => Ok(Self::Gce(at()?)),
            ("aws", _) => Ok(Self::Aws(at()?)),
            _ => Err("write auto, off, gce, aws, or gce=http://HOST:PORT".into()),
        }
    }

    /// The neighbour of a machine whose firmware says this of it.
    fn of_machine(product: &str, vendor: &str, bios: &str) -> Self {
        if product.trim() == "Google Compute Engine" {
            return Self::Gce(NEIGHBOUR.into());
        }
        // The older of Amazon's machines name Xen as their vendor.
        if vendor.trim() == "Amazon EC2" || bios.trim().ends_with("amazon") {
            return Self::Aws(NEIGHBOUR.into());
        }
        Self::Off
    }

    fn questions(self) -> (String, &'static [Question]) {
        match self {
            Self::Off => (String::new(), &[]),
            Self::Gce(at) => (at, &[Question::Preempted, Question::Maintenance]),
            Self::Aws(at) => (at, &[Question::Action]),
        }
    }
}

/// Host and port of an address.
fn authority(address: &str) -> Result<String, String> {
    let uri = address.parse::<Uri>().ok().filter(|uri| uri.scheme_str() == Some("http") && uri.path() == "/");
    let host = uri.as_ref().and_then(|uri| Some((uri.host()?, uri.port_u16().unwrap_or(80))));
    let (host, port) = host.ok_or_else(|| format!("{address}: write http://HOST:PORT"))?;
    Ok(format!("{host}:{port}"))
}

/// What is known of the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Seen {
    /// Nobody has answered yet.
    Nothing,
    /// It stays, as far as anybody can tell.
    Stays,
    /// It is about to be taken away, for this reason.
    Leaves(String),
}

/// What is said of the machine from now on.
#[derive(Debug)]
pub struct Notices(watch::Receiver<Vec<Seen>>);

impl Notices {
    /// Asks until the scope is cancelled.
    pub fn watch(source: Source, scope: &Scope) -> Self {
        let (at, questions) = source.questions();
        let (told, seen) = watch::channel(vec![Seen::Nothing; questions.len()]);
        let stop = scope.clone();
        scope.spawn("spot notices", async move {
            let each =
                questions.iter().enumerate().map(|(index, question)| follow(*question, index, &at, &told));
            tokio::select! {
                _ = join_all(each) => stop.cancelled().await,
                () = stop.cancelled() => {}
            }
        });
        Self(seen)
    }

    /// Returns once nobody says that the machine is about to be taken away: at once where nobody is asked.
    pub async fn stays(&mut self) {
        let all = |seen: &Vec<Seen>| seen.iter().all(|seen| *seen == Seen::Stays);
        if self.0.wait_for(all).await.is_err() {
            pending().await
        }
    }

    /// Returns once it is about to be taken away, with what is said of that.
    pub async fn leaves(&mut self) -> String {
        let reason = |seen: &Seen| match seen {
            Seen::Leaves(why) => Some(why.clone()),
            Seen::Nothing | Seen::Stays => None,
        };
        match self.0.wait_for(|seen| seen.iter().any(|seen| reason(seen).is_some())).await {
            Ok(seen) => seen.iter().find_map(reason).unwrap_or_default(),
            Err(_) => pending().await,
        }
    }
}

/// Asks again and again. Who cannot be asked says nothing against the machine.
async fn follow(question: Question, index: usize, at: &str, told: &watch::Sender<Vec<Seen>>) -> Infallible {
    let mut version = NO_VERSION.to_string();
    let mut failed = false;
    loop {
        let limit = LIMIT + question.wait(&version);
        let asked = tokio::time::timeout(limit, question.ask(at, &mut version)).await;
        let seen = match asked.unwrap_or(Err(AskError::Late(limit))) {
            Ok(seen) => {
                failed = false;
                Some(seen)
            }
            Err(error) => {
                if !std::mem::replace(&mut failed, true) {
                    tracing::warn!(%error, at, "the metadata server does not say whether this machine stays; asking on");
                }
                None
            }
        };
        told.send_if_modified(|all| {
            let Some(known) = all.get_mut(index) else { return false };
            let now = match seen {
                Some(seen) => seen,
                None if *known == Seen::Nothing => Seen::Stays,
                None => return false,
            };
            std::mem::replace(known, now.clone()) != now
        });
        tokio::time::sleep(question.pause()).await;
    }
}

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Question {
    /// Whether Google takes a spot machine back: 30 seconds before.
    Preempted,
    /// Whether it ends a machine with GPUs for maintenance: up to an hour before.
    Maintenance,
    /// What Amazon does to a spot machine: two minutes before.
    Action,
}

impl Question {
    /// The pause between two questions. Where the server waits for a change, none is missed in it.
    fn pause(self) -> Duration {
        Duration::from_secs(match self {
            Self::Preempted | Self::Maintenance => 1,
            Self::Action => 5,
        })
    }

    /// For how long the server waits before it answers.
    fn wait(self, version: &str) -> Duration {
        let waits = self != Self::Action && version != NO_VERSION;
        if waits { LONGEST_WAIT } else { Duration::ZERO }
    }

    async fn ask(self, at: &str, version: &mut String) -> Result<Seen, AskError> {
        Ok(match self {
            Self::Preempted => match changed(at, "preempted", version).await?.as_str() {
                "TRUE" => Seen::Leaves("it is preempted".into()),
                _ => Seen::Stays,
            },
            Self::Maintenance => match changed(at, "maintenance-event", version).await?.as_str() {
                "TERMINATE_ON_HOST_MAINTENANCE" => Seen::Leaves("it ends for maintenance of its host".into()),
                // Elsewhere it lives on.
                _ => Seen::Stays,
            },
            Self::Action => {
                let ttl = [("x-aws-ec2-metadata-token-ttl-seconds", "60")];
                let (status, _, token) = ask(at, Method::PUT, "/latest/api/token", &ttl).await?;
                if !status.is_success() {
                    return Err(AskError::Status(status));
                }
                let token = [("x-aws-ec2-metadata-token", token.as_str())];
                match ask(at, Method::GET, "/latest/meta-data/spot/instance-action", &token).await? {
                    (StatusCode::NOT_FOUND, ..) => Seen::Stays,
                    (status, _, action) if status.is_success() => Seen::Leaves(action),
                    (status, ..) => return Err(AskError::Status(status)),
                }
            }
        })
    }
}

/// A value of Google's, once it is of another version; or after [`LONGEST_WAIT`].
async fn changed(at: &str, key: &str, version: &mut String) -> Result<String, AskError> {
    let wait = LONGEST_WAIT.as_secs();
    let path = format!(
        "/computeMetadata/v1/instance/{key}?wait_for_change=true&last_etag={version}&timeout_sec={wait}"
    );
    let (status, headers, value) = ask(at, Method::GET, &path, &[("metadata-flavor", "Google")]).await?;
    if !status.is_success() {
        return Err(AskError::Status(status));
    }
    let named = headers.get(ETAG).and_then(|name| name.to_str().ok());
    // Of a value without a name the next is asked for at once.
    *version = named.unwrap_or(NO_VERSION).to_string();
    Ok(value.trim().to_string())
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
enum AskError {
    #[error("no answer within {0:?}")]
    Late(Duration),
    #[error("cannot connect: {0}")]
    Connect(#[from] std::io::Error),
    #[error("cannot be asked: {0}")]
    Http(#[from] hyper::Error),
    #[error("cannot be asked: {0}")]
    Request(#[from] hyper::http::Error),
    #[error("its answer broke off, or has more than {MOST_BYTES} bytes: {0}")]
    Body(Box<dyn std::error::Error + Send + Sync>),
    #[error("it answered {0}")]
    Status(StatusCode),
}

/// One question over a connection of its own.
async fn ask(
    at: &str,
    method: Method,
    path: &str,
    headers: &[(&str, &str)],
) -> Result<(StatusCode, HeaderMap, String), AskError> {
    let stream = TcpStream::connect(at).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let request = Request::builder().method(method).uri(path).header(HOST, at);
    let request = headers.iter().fold(request, |request, (name, value)| request.header(*name, *value));
    let request = request.body(Empty::<Bytes>::new())?;
    let answer = async move {
        let (head, body) = sender.send_request(request).await?.into_parts();
        let body = Limited::new(body, MOST_BYTES).collect().await.map_err(AskError::Body)?;
        Ok((head.status, head.headers, String::from_utf8_lossy(&body.to_bytes()).into_owned()))
    };
    // The connection ends with whoever sends on it; what is wrong with it the answer says too.
    let (answer, _) = join(answer, connection).await;
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_is_asked() {
        let gce = |at: &str| Source::Gce(at.into());
        let rows = [
            ("off", Some(Source::Off)),
            ("gce", Some(gce(NEIGHBOUR))),
            ("aws", Some(Source::Aws(NEIGHBOUR.into()))),
            ("gce=http://127.0.0.1:8080", Some(gce("127.0.0.1:8080"))),
            ("gce=http://metadata.google.internal/", Some(gce("metadata.google.internal:80"))),
            ("aws=http://[::1]:8080", Some(Source::Aws("[::1]:8080".into()))),
            ("gce=https://127.0.0.1", None),
            ("gce=http://127.0.0.1/path", None),
            ("gce=127.0.0.1:80", None),
            ("off=http://127.0.0.1", None),
            ("azure", None),
        ];
        for (text, expected) in rows {
            assert_eq!(Source::parse(text).ok(), expected, "{text}");
        }
    }

    #[test]
    fn the_firmware_says_whose_machine_it_is() {
        let at = || NEIGHBOUR.to_string();
        let rows = [
            ("Google Compute Engine\n", "Google\n", "Google\n", Source::Gce(at())),
            ("p4d.24xlarge\n", "Amazon EC2\n", "1.0\n", Source::Aws(at())),
            ("HVM domU\n", "Xen\n", "4.11.amazon\n", Source::Aws(at())),
            ("HVM domU\n", "Xen\n", "4.11\n", Source::Off),
            ("", "", "", Source::Off),
        ];
        for (product, vendor, bios, expected) in rows {
            assert_eq!(Source::of_machine(product, vendor, bios), expected, "{product}{vendor}{bios}");
        }
    }
}
