//! Named servers: `contexts.yaml` in the user's configuration directory.
//!
//! ```yaml
//! current: "lab"
//! contexts:
//!   "lab":
//!     endpoint: "https://lab.example.org:7401"
//!     ca: "/home/me/lab-ca.crt"
//! ```

use crate::{user, yaml};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Servers by name, and the one that is used unless another is named.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Contexts {
    /// The name of the one in use.
    pub current: Option<String>,
    /// The servers by their names.
    pub servers: BTreeMap<String, Server>,
}

/// A server: where it is, and the files with which it is talked to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Server {
    /// Its address, or those of a fleet's coordinators.
    pub endpoint: String,
    /// Authorities of its certificate.
    pub ca: Option<PathBuf>,
    /// The certificate that it is shown.
    pub cert: Option<PathBuf>,
    /// The private key of that.
    pub key: Option<PathBuf>,
    /// The file of the token that says who calls.
    pub token_file: Option<PathBuf>,
}

impl Server {
    /// Its files, by the keys that they have in `contexts.yaml`.
    pub fn files(&self) -> impl Iterator<Item = (&'static str, &Path)> {
        let files =
            [("ca", &self.ca), ("cert", &self.cert), ("key", &self.key), ("token_file", &self.token_file)];
        files.into_iter().filter_map(|(key, file)| Some((key, file.as_deref()?)))
    }
}

/// Why the file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ContextsError {
    /// The file cannot be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// It does not say what it should.
    #[error("{}: {problem}; mend or remove the file", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
}

/// Where the file lies: in `$XDG_CONFIG_HOME`, else in `~/.config`; `None` without a home.
pub fn path() -> Option<PathBuf> {
    user::path("contexts.yaml")
}

impl Contexts {
    /// Reads the file; one that is not there names no servers.
    ///
    /// # Errors
    /// It cannot be read, or does not say what it should.
    pub fn read(path: &Path) -> Result<Self, ContextsError> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(source) => return Err(ContextsError::Io { path: path.into(), source }),
        };
        Self::parse(&text).map_err(|problem| ContextsError::Invalid { path: path.into(), problem })
    }

    fn parse(text: &str) -> Result<Self, String> {
        let parsed = yaml::parse(text).map_err(|(at, problem)| format!("line {}: {problem}", at.line))?;
        if let Some(problem) = parsed.problems.first() {
            return Err(problem.to_string());
        }
        let text_of = |value: &Value, key: &str| {
            value.as_str().map(String::from).ok_or_else(|| format!("{key}: must be a text"))
        };
        let mut contexts = Self::default();
        let Value::Object(document) = parsed.value else {
            return if parsed.value.is_null() { Ok(contexts) } else { Err("must be a mapping".into()) };
        };
        if let Some(current) = document.get("current").filter(|v| !v.is_null()) {
            contexts.current = Some(text_of(current, "current")?);
        }
        let entries = document.get("contexts").filter(|v| !v.is_null());
        if entries.is_some_and(|entries| !entries.is_object()) {
            return Err("contexts: must be a mapping of names".into());
        }
        for (name, entry) in entries.and_then(Value::as_object).into_iter().flatten() {
            let endpoint = entry.get("endpoint").unwrap_or(&Value::Null);
            let endpoint = text_of(endpoint, &format!("contexts.{name}.endpoint"))?;
            let file = |key: &str| {
                let named = entry.get(key).filter(|v| !v.is_null());
                named.map(|v| text_of(v, &format!("contexts.{name}.{key}")).map(PathBuf::from)).transpose()
            };
            let server = Server {
                endpoint,
                ca: file("ca")?,
                cert: file("cert")?,
                key: file("key")?,
                token_file: file("token_file")?,
            };
            if server.cert.is_some() != server.key.is_some() {
                return Err(format!("contexts.{name}: has one of cert and key; write both or none"));
            }
            contexts.servers.insert(name.clone(), server);
        }
        match &contexts.current {
            Some(current) if !contexts.servers.contains_key(current) => {
                Err(format!("current: there is no context {current}"))
            }
            _ => Ok(contexts),
        }
    }

    /// Writes the file, whole or not at all.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&self, path: &Path) -> Result<(), ContextsError> {
        user::write(path, &self.text()).map_err(|source| ContextsError::Io { path: path.into(), source })
    }

    fn text(&self) -> String {
        // A JSON text is a YAML text in double quotes.
        let quoted = |text: &str| Value::from(text).to_string();
        let current = self.current.as_ref().map_or_else(|| "null".into(), |name| quoted(name));
        let mut text = format!("current: {current}\ncontexts:\n");
        for (name, server) in &self.servers {
            text += &format!("  {}:\n    endpoint: {}\n", quoted(name), quoted(&server.endpoint));
            for (key, file) in server.files() {
                text += &format!("    {key}: {}\n", quoted(&file.to_string_lossy()));
            }
        }
        text
    }

    /// The one in use.
    pub fn server(&self) -> Option<&Server> {
        self.servers.get(self.current.as_ref()?)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_reads_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/contexts.yaml");
        assert_eq!(Contexts::read(&path).unwrap(), Contexts::default());
        let plain = Server { endpoint: "http://x:1".into(), ..Server::default() };
        let safe = Server {
            endpoint: "https://\"y\":2".into(),
            ca: Some("/a: b/ca.crt".into()),
            cert: Some("c.crt".into()),
            key: Some("c.key".into()),
            token_file: Some("t".into()),
        };
        let servers = [("a: b".to_string(), plain), ("lab".to_string(), safe.clone())].into();
        let mut contexts = Contexts { current: None, servers };
        for current in [None, Some("lab".to_string())] {
            contexts.current = current;
            contexts.write(&path).unwrap();
            assert_eq!(Contexts::read(&path).unwrap(), contexts);
        }
        assert_eq!(contexts.server(), Some(&safe));
        Contexts::default().write(&path).unwrap();
        assert_eq!(Contexts::read(&path).unwrap(), Contexts::default());
    }

    #[test]
    fn a_file_that_says_something_else_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = &dir.path().join("contexts.yaml");
        for (text, want) in [
            ("[1]", "must be a mapping"),
            ("current: x", "there is no context x"),
            ("current: 1", "current: must be a text"),
            ("contexts: []", "contexts: must be a mapping"),
            ("contexts: {a: {}}", "contexts.a.endpoint: must be a text"),
            ("contexts: {a: {endpoint: x, ca: 1}}", "contexts.a.ca: must be a text"),
            ("contexts: {a: {endpoint: x, cert: c}}", "contexts.a: has one of cert and key"),
            ("contexts: {a: {endpoint: x, key: c}}", "contexts.a: has one of cert and key"),
            ("a: [", "line"),
        ] {
            std::fs::write(path, text).unwrap();
            let error = Contexts::read(path).unwrap_err().to_string();
            assert!(error.contains(want) && error.contains("contexts.yaml"), "{error}");
        }
    }
}
