//! What the environment says of the hub, in the variables that Hugging Face's own tools read.

use crate::error::{HubError, Result};
use std::ffi::OsString;
use std::path::PathBuf;

/// Where the hub is, where its files are kept, and who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The cache's folder: `HF_HUB_CACHE`, else `HF_HOME/hub`, else `~/.cache/huggingface/hub`.
    pub cache: PathBuf,
    /// `HF_ENDPOINT`, without a slash at its end; `https://huggingface.co` unless set.
    pub endpoint: String,
    /// `HF_TOKEN`, else what the token file holds that `HF_TOKEN_PATH` names or that lies in `HF_HOME`.
    pub token: Option<String>,
    /// Whether nothing may be asked over the network: `HF_HUB_OFFLINE`.
    pub offline: bool,
}

const ENDPOINT: &str = "https://huggingface.co";

impl Settings {
    /// The process's environment.
    ///
    /// # Errors
    /// A variable has a value that cannot be used.
    pub fn from_env() -> Result<Self> {
        Self::from_variables(|name| std::env::var_os(name))
    }

    /// An environment.
    ///
    /// # Errors
    /// A variable has a value that cannot be used.
    pub fn from_variables(variable: impl Fn(&str) -> Option<OsString>) -> Result<Self> {
        let set = |name: &str| variable(name).filter(|value| !value.is_empty());
        let text = |name: &'static str| match set(name).map(OsString::into_string) {
            Some(Err(_)) => {
                Err(HubError::Setting { variable: name, problem: "is not UTF-8; set it anew".into() })
            }
            Some(Ok(text)) => Ok(Some(text)),
            None => Ok(None),
        };
        let path = |name: &str| set(name).map(PathBuf::from);
        let user_home = path("HOME").unwrap_or_default();
        let cache_home = path("XDG_CACHE_HOME").unwrap_or_else(|| user_home.join(".cache"));
        let home = path("HF_HOME").unwrap_or_else(|| cache_home.join("huggingface"));
        let expanded = |path: PathBuf| match path.strip_prefix("~") {
            Ok(rest) => user_home.join(rest),
            Err(_) => path,
        };
        let home = expanded(home);
        let cache = path("HF_HUB_CACHE").or_else(|| path("HUGGINGFACE_HUB_CACHE"));
        let endpoint = text("HF_ENDPOINT")?.unwrap_or_else(|| ENDPOINT.into());
        if !["http://", "https://"].iter().any(|scheme| endpoint.starts_with(scheme)) {
            let problem = format!("{endpoint:?} is no address; write one such as {ENDPOINT}");
            return Err(HubError::Setting { variable: "HF_ENDPOINT", problem });
        }
        let offline = text("HF_HUB_OFFLINE")?.unwrap_or_default();
        let token_file = path("HF_TOKEN_PATH").map_or_else(|| home.join("token"), expanded);
        let token = text("HF_TOKEN")?.or_else(|| std::fs::read_to_string(token_file).ok());
        let token = token.map(|token| token.trim().to_string()).filter(|token| !token.is_empty());
        if token.as_ref().is_some_and(|token| token.chars().any(|c| !c.is_ascii_graphic())) {
            let problem = "holds a space or a control character; copy the token again".into();
            return Err(HubError::Setting { variable: "HF_TOKEN", problem });
        }
        Ok(Self {
            cache: cache.map_or_else(|| home.join("hub"), expanded),
            endpoint: endpoint.trim_end_matches('/').to_string(),
            token,
            offline: ["1", "ON", "YES", "TRUE"].contains(&offline.to_uppercase().as_str()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(variables: &[(&str, &str)]) -> Result<Settings> {
        Settings::from_variables(|name| {
            let found = variables.iter().find(|(variable, _)| *variable == name);
            found.map(|(_, value)| OsString::from(value))
        })
    }

    #[test]
    fn variables_and_what_they_say() {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().to_str().unwrap();
        std::fs::write(dir.path().join("token"), "hf_file\n").unwrap();
        std::fs::write(dir.path().join("other"), "hf_other").unwrap();
        let other = dir.path().join("other").to_str().unwrap().to_string();
        type Row<'a> = (&'a [(&'a str, &'a str)], String, &'a str, Option<&'a str>, bool);
        let hub = format!("{home}/hub");
        let rows: [Row; 9] = [
            (&[("HOME", "/h")], "/h/.cache/huggingface/hub".into(), ENDPOINT, None, false),
            (&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")], "/x/huggingface/hub".into(), ENDPOINT, None, false),
            (&[("HF_HOME", home)], hub.clone(), ENDPOINT, Some("hf_file"), false),
            (&[("HF_HOME", home), ("HF_HUB_CACHE", "/c")], "/c".into(), ENDPOINT, Some("hf_file"), false),
            (&[("HOME", "/h"), ("HF_HUB_CACHE", "~/c")], "/h/c".into(), ENDPOINT, None, false),
            (&[("HF_HOME", home), ("HF_TOKEN", "hf_env")], hub.clone(), ENDPOINT, Some("hf_env"), false),
            (&[("HF_HOME", home), ("HF_TOKEN_PATH", &other)], hub.clone(), ENDPOINT, Some("hf_other"), false),
            (
                &[("HF_HOME", "/n"), ("HF_ENDPOINT", "http://m:8/"), ("HF_HUB_OFFLINE", "true")],
                "/n/hub".into(),
                "http://m:8",
                None,
                true,
            ),
            (
                &[("HF_HOME", "/n"), ("HF_HUB_OFFLINE", "0"), ("HF_TOKEN", "")],
                "/n/hub".into(),
                ENDPOINT,
                None,
                false,
            ),
        ];
        for (variables, cache, endpoint, token, offline) in rows {
            let token = token.map(Into::into);
            let want = Settings { cache: cache.into(), endpoint: endpoint.into(), token, offline };
            assert_eq!(settings(variables).unwrap(), want, "{variables:?}");
        }
        for (variable, value, want) in [
            (
                "HF_ENDPOINT",
                "huggingface.co",
                "HF_ENDPOINT: \"huggingface.co\" is no address; write one such as https",
            ),
            ("HF_TOKEN", "hf_a b", "HF_TOKEN: holds a space"),
        ] {
            let message = settings(&[(variable, value)]).unwrap_err().to_string();
            assert!(message.contains(want), "{message}");
        }
    }
}
