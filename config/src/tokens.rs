//! Who may call a server, and as what: the file of `--tokens`.
//!
//! ```yaml
//! - { name: "ada", role: operator, sha256: "9f86d0…" }
//! - { name: "bob", role: submitter, namespace: "team-a", sha256: "252f10…" }
//! - { name: "gpu-1", role: agent, sha256: "60303a…" }
//! ```
//!
//! Sweeps and uploads belong to the namespace of whoever makes them, `default` unless it is said; [`crate::limits`] says how
//! much each may take.
//!
//! The file holds no tokens, only their SHA-256. That is enough for a token of 256 random bits: nobody finds it by
//! trying, so that a slow hash would only slow down the server. Where a name stands twice, either token is good, for the
//! time in which one takes the place of the other.

use crate::yaml;
use domain::data::ContentHash;
use domain::sweep::DEFAULT_NAMESPACE;
use serde::Deserialize;
use sha2::{Digest, Sha256};
use std::fmt;
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};

/// What tokens begin with, so that people and programs that look for secrets know one when they see it.
pub const PREFIX: &str = "lft_";

/// The name under which `lorafleet up` knows its own agent; no file has it.
pub const THIS_MACHINE: &str = "this-machine";

/// What somebody may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Reads.
    Viewer,
    /// Reads, and starts, changes and ends sweeps.
    Submitter,
    /// All that people may do: deletes sweeps and drains agents too.
    Operator,
    /// Trains: what an agent does, and nothing else.
    Agent,
}

impl Role {
    /// Every one.
    pub const ALL: [Self; 4] = [Self::Viewer, Self::Submitter, Self::Operator, Self::Agent];

    /// Its name in the file.
    pub fn name(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Submitter => "submitter",
            Self::Operator => "operator",
            Self::Agent => "agent",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Somebody with a token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Principal {
    /// The name, for logs and for what it owns.
    pub name: String,
    /// What it may do.
    pub role: Role,
    /// What its sweeps and uploads belong to.
    pub namespace: String,
}

impl Principal {
    /// Somebody of the default namespace.
    pub fn new(name: impl Into<String>, role: Role) -> Self {
        Self { name: name.into(), role, namespace: DEFAULT_NAMESPACE.into() }
    }
}

/// A token's SHA-256.
pub type Hash = [u8; 32];

/// The hash by which a token is known.
pub fn hash(token: &str) -> Hash {
    Sha256::digest(token.as_bytes()).into()
}

/// The line of the file for a token.
pub fn line(principal: &Principal, hash: &Hash) -> String {
    let hex = ContentHash(*hash);
    // A JSON text is a YAML text in double quotes.
    let name = serde_json::Value::from(principal.name.as_str());
    let namespace = match principal.namespace.as_str() {
        DEFAULT_NAMESPACE => String::new(),
        other => format!("namespace: {}, ", serde_json::Value::from(other)),
    };
    format!("- {{ name: {name}, role: {}, {namespace}sha256: \"{hex}\" }}", principal.role)
}

/// A token of somebody.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Known {
    /// Whose it is.
    pub principal: Principal,
    hash: Hash,
}

/// Who may call.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tokens(Vec<Known>);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: String,
    role: Role,
    #[serde(default)]
    namespace: Option<String>,
    sha256: String,
}

impl Tokens {
    /// Reads the file's text.
    ///
    /// # Errors
    /// Where it does not say what it should, and what to do.
    pub fn parse(text: &str) -> Result<Self, String> {
        let parsed = yaml::parse(text).map_err(|(at, why)| format!("line {}: {why}", at.line))?;
        if let Some(problem) = parsed.problems.first() {
            return Err(problem.to_string());
        }
        let serde_json::Value::Array(items) = parsed.value else {
            return Err("must be a list; `lorafleet token create` prints its lines".into());
        };
        let mut tokens = Self::default();
        for (number, item) in items.into_iter().enumerate() {
            let line = parsed.positions.get(&format!("[{number}]")).map_or(0, |at| at.line);
            let entry: Entry = serde_json::from_value(item)
                .map_err(|why| format!("line {line}: {why}; `lorafleet token create` prints such a line"))?;
            tokens.add(entry).map_err(|why| format!("line {line}: {why}"))?;
        }
        Ok(tokens)
    }

    fn add(&mut self, Entry { name, role, namespace, sha256 }: Entry) -> Result<(), String> {
        check_name(&name)?;
        let hash = unhex(&sha256).ok_or(
            "sha256: must have 64 digits; `lorafleet token create` prints it, and not the token is it",
        )?;
        let namespace = namespace.unwrap_or_else(|| DEFAULT_NAMESPACE.into());
        check_name(&namespace).map_err(|why| format!("namespace: {why}"))?;
        let principal = Principal { name, role, namespace };
        let same = |known: &&Known| known.hash == hash || known.principal.name == principal.name;
        if let Some(Known { principal: other, .. }) = self.0.iter().find(same)
            && *other != principal
        {
            return Err(format!(
                "{}, {role}: {}, {} has the same name or token; give it another",
                principal.name, other.name, other.role
            ));
        }
        self.0.push(Known { principal, hash });
        Ok(())
    }

    /// Adds somebody who is in no file.
    pub fn with(mut self, principal: Principal, hash: Hash) -> Self {
        self.0.push(Known { principal, hash });
        self
    }

    /// Whose token this is. Takes as long for every token, known or not.
    pub fn find(&self, token: &str) -> Option<&Known> {
        let asked = hash(token);
        let mut found = u64::MAX;
        for (index, known) in self.0.iter().enumerate() {
            let same: Choice = known.hash.ct_eq(&asked);
            found.conditional_assign(&(index as u64), same);
        }
        self.0.get(usize::try_from(found).ok()?)
    }

    /// Whether a token is known still.
    pub fn knows(&self, token: &Known) -> bool {
        self.0.contains(token)
    }

    /// Whether somebody of that name has a token.
    pub fn names(&self, name: &str) -> bool {
        self.0.iter().any(|known| known.principal.name == name)
    }
}

/// Checks what somebody is to be called: it stands in logs and files.
///
/// # Errors
/// What is wrong with it.
pub fn check_name(name: &str) -> Result<(), String> {
    if name == THIS_MACHINE {
        return Err(format!("{name} is the agent of `lorafleet up` itself; give it another name"));
    }
    let fits = |c: char| c.is_ascii_alphanumeric() || "-_.@".contains(c);
    match !name.is_empty() && name.len() <= 64 && name.chars().all(fits) {
        true => Ok(()),
        false => Err(format!("{name:?} is no name; it has 1 to 64 of a-z, A-Z, 0-9, and - _ . @")),
    }
}

fn unhex(text: &str) -> Option<Hash> {
    let ContentHash(hash) = text.to_ascii_lowercase().parse().ok()?;
    Some(hash)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    fn principal(name: &str, role: Role) -> Principal {
        Principal::new(name, role)
    }

    #[test]
    fn a_namespace_of_ones_own() {
        let of_team = Principal { namespace: "team-a".into(), ..principal("bob", Role::Submitter) };
        let written = line(&of_team, &hash("lft_1"));
        assert!(written.contains(r#", namespace: "team-a", "#), "{written}");
        let tokens = Tokens::parse(&written).unwrap();
        assert_eq!(tokens.find("lft_1").unwrap().principal, of_team);
        let wrong = Tokens::parse(&written.replace("team-a", "a b")).unwrap_err();
        assert!(wrong.contains("namespace: \"a b\" is no name"), "{wrong}");
    }

    #[test]
    fn whose_token_it_is() {
        let known = [
            ("ada", Role::Operator, "lft_1"),
            ("gpu-1", Role::Agent, "lft_2"),
            ("ada", Role::Operator, "lft_3"),
        ];
        let lines: Vec<_> =
            known.iter().map(|(name, role, token)| line(&principal(name, *role), &hash(token))).collect();
        let tokens = Tokens::parse(&lines.join("\n")).unwrap();
        for (name, role, token) in known {
            assert_eq!(tokens.find(token).unwrap().principal, principal(name, role));
        }
        for unknown in ["", "lft_", "lft_4", "LFT_1", " lft_1"] {
            assert_eq!(tokens.find(unknown), None, "{unknown:?}");
        }
        let ada = tokens.find("lft_1").unwrap();
        let without = Tokens::parse(&lines[1..].join("\n")).unwrap();
        assert!(tokens.knows(ada) && !without.knows(ada), "another token of the same name is another");
        assert!(without.names("ada") && !without.names("bob"));
        assert!(!format!("{tokens:?} {lines:?}").contains("lft_"), "a token is nowhere");
        assert_eq!(Tokens::parse("[]").unwrap().find("lft_1"), None);
    }

    #[test]
    fn files_that_say_something_else_are_refused() {
        let hash = "0".repeat(64);
        for (text, want) in [
            (String::new(), "must be a list"),
            ("a: 1".into(), "must be a list"),
            ("- [".into(), "line"),
            ("- {name: a, role: viewer}".into(), "missing field `sha256`"),
            ("- {name: a, role: king, sha256: x}".into(), "unknown variant `king`"),
            ("- {name: a, role: viewer, sha256: x, token: y}".into(), "unknown field `token`"),
            ("- {name: a, role: viewer, sha256: lft_ab}".into(), "must have 64 digits"),
            (
                format!("- {{name: this-machine, role: agent, sha256: '{hash}'}}"),
                "is the agent of `lorafleet up`",
            ),
            (format!("- {{name: 'a b', role: viewer, sha256: '{hash}'}}"), "is no name"),
            (
                format!(
                    "- {{name: a, role: viewer, sha256: '{hash}'}}\n- {{name: b, role: viewer, sha256: '{hash}'}}"
                ),
                "line 2: b, viewer: a, viewer has the same name or token",
            ),
        ] {
            let error = Tokens::parse(&text).unwrap_err();
            assert!(error.contains(want), "{text}: {error}");
        }
    }
}
