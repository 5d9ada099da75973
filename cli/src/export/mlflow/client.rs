//! Calls to an MLflow tracking server, and what its refusals mean. The paths and fields are those of MLflow's REST API,
//! version 2.0.

use crate::Failure;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;
use std::time::Duration;
use ureq::http::{Response, StatusCode};
use ureq::{Agent, Body};

/// How long the server may take to accept a connection, to answer, and between two pieces of an answer.
const PATIENCE: Duration = Duration::from_secs(30);

/// Bytes of an answer at most: a page of runs with all their parameters has some megabytes.
const ANSWER_BYTES: u64 = 64 << 20;

/// What can go wrong with a tracking server. Each names the address and what to do about it.
#[derive(Debug, thiserror::Error)]
pub(super) enum MlflowError {
    /// The address is none of a tracking server.
    #[error(
        "--tracking-uri{uri}: {problem}; write http://HOST:PORT or https://HOST of an MLflow tracking server"
    )]
    Address {
        /// The address behind a space, unless it holds a secret.
        uri: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The environment says something that cannot be used.
    #[error("{variable}: {problem}")]
    Setting {
        /// The variable.
        variable: &'static str,
        /// What is wrong with it, and what it may be.
        problem: &'static str,
    },
    /// No answer came.
    #[error(
        "{url}: no answer ({why}); see that the MLflow server runs, and that --tracking-uri is its address"
    )]
    Unreachable {
        /// What was called.
        url: String,
        /// What happened.
        why: String,
    },
    /// The server refuses.
    #[error("{url}: answered {status}, {code}: {message}; {remedy}")]
    Refused {
        /// What was called.
        url: String,
        /// The HTTP status.
        status: u16,
        /// MLflow's `error_code`.
        code: String,
        /// MLflow's message.
        message: String,
        /// What to do.
        remedy: &'static str,
    },
    /// The answer is not one of MLflow's.
    #[error(
        "{url}: answered {status} with what is no answer of MLflow; see that --tracking-uri is a tracking server's address"
    )]
    Odd {
        /// What was called.
        url: String,
        /// The HTTP status.
        status: u16,
    },
    /// The experiment was deleted.
    #[error(
        "the experiment {name} was deleted at {uri}; restore it (mlflow experiments restore --experiment-id {id}), or name \
         another with --experiment"
    )]
    Deleted {
        /// The server.
        uri: String,
        /// The experiment's name.
        name: String,
        /// Its id.
        id: String,
    },
}

impl MlflowError {
    /// Whether the server refused with this of MLflow's codes.
    pub(super) fn is(&self, wanted: &str) -> bool {
        matches!(self, Self::Refused { code, .. } if code == wanted)
    }
}

impl From<MlflowError> for Failure {
    fn from(error: MlflowError) -> Self {
        match &error {
            MlflowError::Address { .. } | MlflowError::Setting { .. } | MlflowError::Deleted { .. } => {
                Self::invalid(error)
            }
            MlflowError::Unreachable { .. } => Self::unreachable(error),
            // It may answer otherwise later.
            MlflowError::Refused { status: 429 | 500.., .. }
            | MlflowError::Odd { status: 429 | 500.., .. } => Self::unreachable(error),
            MlflowError::Refused { .. } | MlflowError::Odd { .. } => Self::failed(error),
        }
    }
}

/// A tracking server.
pub(super) struct Client {
    agent: Agent,
    uri: String,
    authorization: Option<String>,
}

/// Who calls, as MLflow's own client takes it from the environment.
#[derive(Default)]
pub(super) struct Credentials {
    /// `MLFLOW_TRACKING_USERNAME` and `MLFLOW_TRACKING_PASSWORD`, which go before a token.
    pub(super) username: Option<String>,
    pub(super) password: Option<String>,
    /// `MLFLOW_TRACKING_TOKEN`.
    pub(super) token: Option<String>,
}

impl Credentials {
    /// Those of the environment; what is empty is not given.
    pub(super) fn from_env() -> Self {
        let given = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        Self {
            username: given("MLFLOW_TRACKING_USERNAME"),
            password: given("MLFLOW_TRACKING_PASSWORD"),
            token: given("MLFLOW_TRACKING_TOKEN"),
        }
    }

    /// The header that tells it.
    fn authorization(&self) -> Result<Option<String>, MlflowError> {
        match (&self.username, &self.password, &self.token) {
            (Some(username), Some(password), _) => {
                Ok(Some(format!("Basic {}", STANDARD.encode(format!("{username}:{password}")))))
            }
            (_, _, Some(token)) if token.bytes().all(|byte| byte.is_ascii_graphic()) => {
                Ok(Some(format!("Bearer {token}")))
            }
            (_, _, Some(_)) => Err(MlflowError::Setting {
                variable: "MLFLOW_TRACKING_TOKEN",
                problem: "is no token: it has blanks or control characters in it; set it to the token alone",
            }),
            (Some(_), None, None) => Err(MlflowError::Setting {
                variable: "MLFLOW_TRACKING_PASSWORD",
                problem: "is not set, but MLFLOW_TRACKING_USERNAME is; set both, or MLFLOW_TRACKING_TOKEN",
            }),
            (None, _, None) => Ok(None),
        }
    }
}

impl Client {
    /// A client of the server at an address.
    ///
    /// # Errors
    /// The address or the credentials cannot be used.
    pub(super) fn new(uri: &str, credentials: &Credentials) -> Result<Self, MlflowError> {
        let uri = uri.trim_end_matches('/');
        let wrong = |problem| MlflowError::Address { uri: format!(" {uri}"), problem };
        let rest = uri.strip_prefix("http://").or_else(|| uri.strip_prefix("https://"));
        let host = rest.and_then(|rest| rest.split('/').next()).unwrap_or_default();
        if host.contains('@') {
            // It is not shown.
            return Err(MlflowError::Address {
                uri: String::new(),
                problem: "holds a user; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead",
            });
        }
        if host.is_empty() || uri.parse::<ureq::http::Uri>().is_err() {
            return Err(wrong("is no address of a server"));
        }
        let config = Agent::config_builder()
            .http_status_as_error(false)
            // Credentials stay with the server.
            .max_redirects(0)
            .timeout_connect(Some(PATIENCE))
            .timeout_recv_response(Some(PATIENCE))
            .timeout_per_read(Some(PATIENCE))
            .timeout_per_write(Some(PATIENCE))
            .user_agent(concat!("lorafleet/", env!("CARGO_PKG_VERSION")))
            .build();
        let authorization = credentials.authorization()?;
        if let Some(secret) = &authorization {
            telemetry::secrets::keep(secret);
        }
        Ok(Self { agent: config.new_agent(), uri: uri.into(), authorization })
    }

    /// The server's address.
    pub(super) fn uri(&self) -> &str {
        &self.uri
    }

    /// What a path answers to a question.
    ///
    /// # Errors
    /// It refuses, or does not answer.
    pub(super) fn get(&self, path: &str, key: &str, value: &str) -> Result<Value, MlflowError> {
        let url = self.url(path);
        let mut request = self.agent.get(&url).query(key, value);
        if let Some(authorization) = &self.authorization {
            request = request.header("authorization", authorization);
        }
        answer(url, request.call())
    }

    /// What a path answers to a document.
    ///
    /// # Errors
    /// It refuses, or does not answer.
    pub(super) fn post(&self, path: &str, document: &Value) -> Result<Value, MlflowError> {
        let url = self.url(path);
        let mut request = self.agent.post(&url).header("content-type", "application/json");
        if let Some(authorization) = &self.authorization {
            request = request.header("authorization", authorization);
        }
        answer(url, request.send(document.to_string()))
    }

    fn url(&self, path: &str) -> String {
        format!("{}/api/2.0/mlflow/{path}", self.uri)
    }
}

fn answer(url: String, response: Result<Response<Body>, ureq::Error>) -> Result<Value, MlflowError> {
    let lost = |error: ureq::Error| MlflowError::Unreachable { url: url.clone(), why: error.to_string() };
    let mut response = response.map_err(lost)?;
    let status = response.status();
    let bytes = response.body_mut().with_config().limit(ANSWER_BYTES).read_to_vec().map_err(lost)?;
    let document: Option<Value> = serde_json::from_slice(&bytes).ok();
    let text = |key: &str| document.as_ref().and_then(|document| Some(document[key].as_str()?.to_string()));
    if status.is_success()
        && let Some(document) = document.as_ref().filter(|document| document.is_object())
    {
        return Ok(document.clone());
    }
    // A proxy in front of it has no words of MLflow.
    if status.is_success() || (text("error_code").is_none() && !is_for_people(status)) {
        return Err(MlflowError::Odd { url, status: status.as_u16() });
    }
    Err(MlflowError::Refused {
        code: text("error_code").unwrap_or_else(|| status.canonical_reason().unwrap_or_default().into()),
        message: text("message").unwrap_or_else(|| "no reason given".into()),
        remedy: remedy(status),
        status: status.as_u16(),
        url,
    })
}

/// Statuses whose remedy is known whoever answers.
fn is_for_people(status: StatusCode) -> bool {
    matches!(status.as_u16(), 401 | 403)
}

fn remedy(status: StatusCode) -> &'static str {
    match status.as_u16() {
        401 | 403 => {
            "set MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, to those of somebody who may \
             write there"
        }
        429 | 500.. => "export again later: what is there is not written twice",
        _ => "export again; if it refuses again, export to a new experiment with --experiment",
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    fn credentials(username: &str, password: &str, token: &str) -> Credentials {
        let given = |value: &str| Some(value.to_string()).filter(|value| !value.is_empty());
        Credentials { username: given(username), password: given(password), token: given(token) }
    }

    #[test]
    fn who_calls() {
        for (username, password, token, want) in [
            ("", "", "", Ok(None)),
            ("ann", "b:c", "", Ok(Some("Basic YW5uOmI6Yw=="))),
            ("ann", "b:c", "t", Ok(Some("Basic YW5uOmI6Yw=="))),
            ("", "", "abc", Ok(Some("Bearer abc"))),
            ("ann", "", "abc", Ok(Some("Bearer abc"))),
            ("", "lost", "", Ok(None)),
            ("ann", "", "", Err("MLFLOW_TRACKING_PASSWORD: is not set")),
            ("", "", "a\nb", Err("MLFLOW_TRACKING_TOKEN: is no token")),
        ] {
            let got = credentials(username, password, token).authorization();
            match (got, want) {
                (Ok(got), Ok(want)) => assert_eq!(got.as_deref(), want),
                (Err(error), Err(want)) => {
                    let said = error.to_string();
                    assert!(said.starts_with(want) && !said.contains("a\nb"), "{said}");
                }
                (got, want) => unreachable!("{:?}, not {want:?}", got.is_ok()),
            }
        }
    }

    #[test]
    fn addresses() {
        for (uri, refused) in [
            ("http://localhost:5000", None),
            ("https://mlflow.example.org/team/", None),
            ("localhost:5000", Some("--tracking-uri localhost:5000: is no address")),
            ("sqlite:///mlflow.db", Some("--tracking-uri sqlite:///mlflow.db: is no address")),
            ("databricks", Some("write http://HOST:PORT")),
            ("http://", Some("is no address")),
            ("http://a b", Some("is no address")),
            ("https://ann:secret@mlflow.example.org", Some("MLFLOW_TRACKING_USERNAME")),
        ] {
            let made = Client::new(uri, &Credentials::default());
            let said = made.as_ref().err().map(ToString::to_string);
            assert_eq!(said.is_some(), refused.is_some(), "{uri}: {said:?}");
            let said = said.unwrap_or_default();
            assert!(said.contains(refused.unwrap_or_default()) && !said.contains("secret"), "{said}");
        }
    }
}
