//! Requests to the hub, and what its refusals mean.

use crate::error::{HubError, Result};
use crate::files::is_safe;
use crate::id::{Kind, RepoId, is_commit};
use crate::settings::Settings;
use std::time::Duration;
use ureq::http::{HeaderMap, Response, StatusCode};
use ureq::{Agent, Body};

/// Hops of a request at most.
pub(crate) const MOST_REDIRECTS: u32 = 10;

/// Bytes of a listing at most; a repository of a hundred thousand files has some 20 MB.
const LISTING_BYTES: u64 = 64 << 20;

/// How long the hub may take to accept a connection, and to send anything.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// A client of one hub.
#[derive(Debug)]
pub(crate) struct Client {
    agent: Agent,
    endpoint: String,
    token: Option<String>,
}

/// A repository's files at a commit.
#[derive(Debug)]
pub(crate) struct Listing {
    pub(crate) commit: String,
    pub(crate) files: Vec<String>,
}

/// What the hub says of a file.
#[derive(Debug)]
pub(crate) struct Meta {
    /// The name of its content: the SHA-256 of a large file, git's hash of another.
    pub(crate) etag: String,
    /// Its bytes, if they are told.
    pub(crate) size: Option<u64>,
}

/// What is asked for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Asked<'a> {
    pub(crate) kind: Kind,
    pub(crate) id: &'a RepoId,
}

impl Client {
    pub(crate) fn new(settings: &Settings) -> Self {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            // Followed here: the token stays with the hub, and headers on the way count.
            .max_redirects(0)
            .timeout_connect(Some(PATIENCE))
            .timeout_recv_response(Some(PATIENCE))
            .timeout_per_read(Some(PATIENCE))
            .user_agent(concat!("lorafleet/", env!("CARGO_PKG_VERSION")))
            .build();
        let agent = config.new_agent();
        Self { agent, endpoint: settings.endpoint.clone(), token: settings.token.clone() }
    }

    /// The files of a repository, and the commit that its revision is at.
    pub(crate) fn list(&self, asked: Asked) -> Result<Listing> {
        #[derive(serde::Deserialize)]
        struct Answer {
            sha: String,
            siblings: Vec<Sibling>,
        }
        #[derive(serde::Deserialize)]
        struct Sibling {
            rfilename: String,
        }
        let (kind, name) = (asked.kind.plural(), asked.id.name());
        let url =
            format!("{}/api/{kind}/{name}/revision/{}", self.endpoint, encoded(asked.id.revision(), false));
        let mut response = self.send(asked, &url, &Request::Get(0))?;
        let odd = |problem: String| {
            HubError::unavailable(asked.id, problem, format!("check that {} is a hub", self.endpoint))
        };
        let bytes = response.body_mut().with_config().limit(LISTING_BYTES).read_to_vec();
        let bytes = bytes.map_err(|error| self.failed(asked, &error))?;
        let answer: Answer = serde_json::from_slice(&bytes)
            .map_err(|error| odd(format!("{url} answered no list of files ({error})")))?;
        if !is_commit(&answer.sha) {
            return Err(odd(format!("{url} names the commit {:?}", answer.sha)));
        }
        let names = answer.siblings.into_iter().map(|sibling| sibling.rfilename);
        Ok(Listing { commit: answer.sha, files: names.filter(|name| is_safe(name)).collect() })
    }

    /// What the hub says of a file.
    pub(crate) fn head(&self, asked: Asked, commit: &str, file: &str) -> Result<Meta> {
        let url = self.file(asked, commit, file);
        let response = self.send(asked, &url, &Request::Head)?;
        let headers = response.headers();
        let etag = header(headers, "x-linked-etag").or_else(|| header(headers, "etag")).unwrap_or_default();
        let etag = etag.trim_start_matches("W/").trim_matches('"');
        // It becomes a file's name.
        if etag.is_empty() || !etag.chars().all(|c| c.is_ascii_alphanumeric() || "-_".contains(c)) {
            let problem = format!("{url} came without a usable ETag ({etag:?})");
            return Err(HubError::unavailable(
                asked.id,
                problem,
                format!("check that {} is a hub", self.endpoint),
            ));
        }
        let size = header(headers, "x-linked-size").or_else(|| header(headers, "content-length"));
        Ok(Meta { etag: etag.into(), size: size.and_then(|size| size.parse().ok()) })
    }

    /// A file's bytes from byte `from` on, or all where the server does not know parts: status 206 or 200. `None`
    /// if there are no such bytes.
    pub(crate) fn get(
        &self,
        asked: Asked,
        commit: &str,
        file: &str,
        from: u64,
    ) -> Result<Option<Response<Body>>> {
        let response = self.send(asked, &self.file(asked, commit, file), &Request::Get(from))?;
        Ok(Some(response).filter(|response| response.status() != StatusCode::RANGE_NOT_SATISFIABLE))
    }

    fn file(&self, asked: Asked, commit: &str, file: &str) -> String {
        let folder = match asked.kind {
            Kind::Model => "",
            Kind::Dataset => "datasets/",
        };
        format!("{}/{folder}{}/resolve/{commit}/{}", self.endpoint, asked.id.name(), encoded(file, true))
    }

    /// Sends a request where redirects lead. One for a file's headers ends where they are known: at the hub.
    fn send(&self, asked: Asked, url: &str, request: &Request) -> Result<Response<Body>> {
        let mut url = url.to_string();
        for _ in 0..MOST_REDIRECTS {
            let mut builder = match request {
                Request::Head => self.agent.head(&url),
                Request::Get(_) => self.agent.get(&url),
            };
            builder = builder.header("accept-encoding", "identity");
            if let Request::Get(from @ 1..) = request {
                builder = builder.header("range", format!("bytes={from}-"));
            }
            if let Some(token) = self.token.as_ref().filter(|_| origin(&url) == origin(&self.endpoint)) {
                builder = builder.header("authorization", format!("Bearer {token}"));
            }
            let response = builder.call().map_err(|error| self.failed(asked, &error))?;
            let status = response.status();
            if status.is_success() || status == StatusCode::RANGE_NOT_SATISFIABLE {
                return Ok(response);
            }
            if !status.is_redirection() {
                return Err(self.refused(asked, status, response.headers()));
            }
            if matches!(request, Request::Head) && response.headers().contains_key("x-linked-etag") {
                return Ok(response);
            }
            let location = header(response.headers(), "location").unwrap_or_default();
            url = match location.strip_prefix('/') {
                Some(path) => format!("{}/{path}", origin(&url)),
                None => location.to_string(),
            };
        }
        let problem = format!("{url} is redirected again and again");
        Err(HubError::unavailable(asked.id, problem, "try again later"))
    }

    /// No answer came.
    pub(crate) fn failed(&self, asked: Asked, error: &ureq::Error) -> HubError {
        let problem = format!("{} cannot be reached ({error})", self.endpoint);
        let remedy = format!(
            "check the network and HF_ENDPOINT, or name a {} that is on this machine",
            match asked.kind {
                Kind::Model => "model's directory",
                Kind::Dataset => "file or folder",
            }
        );
        HubError::unavailable(asked.id, problem, remedy)
    }

    /// What the hub means by refusing.
    fn refused(&self, asked: Asked, status: StatusCode, headers: &HeaderMap) -> HubError {
        let Asked { kind, id } = asked;
        let page = match kind {
            Kind::Model => format!("{}/{}", self.endpoint, id.name()),
            Kind::Dataset => format!("{}/datasets/{}", self.endpoint, id.name()),
        };
        let with = if self.token.is_some() { "with the token that is set" } else { "without a token" };
        match (header(headers, "x-error-code").unwrap_or_default(), status.as_u16()) {
            ("GatedRepo", _) | (_, 403) => HubError::repo(
                id,
                format!("is gated, and cannot be read {with}"),
                format!("ask for access at {page}, then set HF_TOKEN to a token of that account"),
            ),
            ("RevisionNotFound", _) => HubError::repo(
                id,
                format!("has no revision {}", id.revision()),
                "name a branch, a tag or a commit behind the @",
            ),
            ("EntryNotFound", _) => {
                HubError::repo(id, "lacks a file that it lists", "name another revision behind an @")
            }
            (_, 401 | 404) => HubError::repo(
                id,
                format!(
                    "is neither a path on this machine nor a {} that {} shows {with}",
                    kind.noun(),
                    self.endpoint
                ),
                "correct the name, or set HF_TOKEN if it is private or gated",
            ),
            (_, 429 | 500..) => HubError::unavailable(
                id,
                format!("{} answered {status}", self.endpoint),
                "try again later; what is downloaded already stays",
            ),
            _ => HubError::repo(id, format!("{} answered {status}", self.endpoint), "correct the name"),
        }
    }
}

enum Request {
    Head,
    /// From this byte on.
    Get(u64),
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// Scheme, host and port of an address.
fn origin(url: &str) -> &str {
    let host = url.find("://").map_or(0, |at| at + 3);
    let end = url[host..].find(['/', '?', '#']).map_or(url.len(), |at| host + at);
    &url[..end]
}

/// A text as a part of an address; slashes stay in a path.
fn encoded(text: &str, path: bool) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) || (path && byte == b'/');
    text.bytes().fold(String::new(), |done, byte| match plain(byte) {
        true => done + char::from(byte).encode_utf8(&mut [0; 4]),
        false => done + &format!("%{byte:02X}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses() {
        for (url, want) in [
            ("https://a.b:8/c/d", "https://a.b:8"),
            ("https://a.b", "https://a.b"),
            ("http://a?b=http://c/", "http://a"),
            ("https://huggingface.co.evil.org/x", "https://huggingface.co.evil.org"),
            ("nonsense", "nonsense"),
        ] {
            assert_eq!(origin(url), want);
        }
        assert_eq!(encoded("refs/pr/1", false), "refs%2Fpr%2F1");
        assert_eq!(encoded("data/a b+é.jsonl", true), "data/a%20b%2B%C3%A9.jsonl");
    }
}
