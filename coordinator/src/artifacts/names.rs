//! Which names are allowed, and where they lie.

use super::{ArtifactError, FileSpec, MANIFEST, Part};
use domain::data::ContentHash;
use domain::{Attempt, SweepId, TrialId};
use object_store::path::Path as ObjectPath;
use std::collections::BTreeSet;

/// The first element of every path.
const ROOT: &str = "sweeps";

/// Files of a checkpoint. Each is open until the last is whole.
pub(super) const MOST_FILES: usize = 64;

/// The path of a trial's part. The sweep's id is one element of it, whatever characters it has.
pub(super) fn part(
    trial: &TrialId,
    attempt: Attempt,
    step: u64,
    part: Part,
    term: Option<u64>,
) -> Result<ObjectPath, ArtifactError> {
    let wrong = || ArtifactError::Trial(trial.clone());
    let (sweep, number) = trial.sweep().zip(trial.number()).ok_or_else(wrong)?;
    if sweep.as_str().is_empty() {
        return Err(wrong());
    }
    let term = term.map(|term| format!("-t{term}")).unwrap_or_default();
    let name = format!("{}-a{attempt}-s{step}{term}", folder(part));
    Ok(ObjectPath::from_iter([ROOT, sweep.as_str(), &number.to_string(), &name]))
}

/// A part's path without the term at its end, and the term; 0 if there is none.
pub(crate) fn split_term(path: &str) -> (&str, u64) {
    let split = path.rsplit_once("-t").and_then(|(path, term)| Some((path, term.parse().ok()?)));
    split.unwrap_or((path, 0))
}

/// The path of everything.
pub(super) fn root() -> ObjectPath {
    ObjectPath::from(ROOT)
}

/// The path of everything of a sweep.
pub(super) fn sweep(sweep: &SweepId) -> Result<ObjectPath, ArtifactError> {
    if sweep.as_str().is_empty() {
        return Err(ArtifactError::Path(ROOT.into()));
    }
    Ok(ObjectPath::from_iter([ROOT, sweep.as_str()]))
}

/// What the names of specs begin with.
const SPEC: &str = "spec-";

/// The path of a sweep's spec of that content.
pub(super) fn spec(
    sweep: &SweepId,
    content: ContentHash,
    term: Option<u64>,
) -> Result<ObjectPath, ArtifactError> {
    let term = term.map(|term| format!("-t{term}")).unwrap_or_default();
    Ok(self::sweep(sweep)?.join(format!("{SPEC}{content}{term}")))
}

/// A path that [`spec`] made, read back, and what its content hashes to; nothing else.
pub(super) fn parse_spec(path: &str) -> Result<(ObjectPath, ContentHash), ArtifactError> {
    let wrong = || ArtifactError::Path(path.into());
    let parsed = ObjectPath::parse(path).map_err(|_| wrong())?;
    let parts: Vec<_> = parsed.parts().collect();
    let [root, _, name] = &parts[..] else { return Err(wrong()) };
    let content = name.as_ref().strip_prefix(SPEC).filter(|_| root.as_ref() == ROOT).ok_or_else(wrong)?;
    let content = split_term(content).0.parse().map_err(|_| wrong())?;
    Ok((parsed, content))
}

/// What the names of such a part's folders begin with.
pub(super) fn folder(part: Part) -> &'static str {
    match part {
        Part::Adapter => "adapter",
        Part::Resume => "resume",
        Part::Items => "items",
    }
}

/// Whether a folder of that name is a part's.
pub(super) fn is_part(name: &str) -> bool {
    Part::ALL.iter().any(|part| {
        name.strip_prefix(folder(*part))
            .and_then(|rest| rest.strip_prefix("-a"))
            .is_some_and(|rest| rest.contains("-s"))
    })
}

/// A path that [`part`] made, read back; nothing else, so that no other path can be read or deleted.
pub(super) fn parse_part(path: &str) -> Result<ObjectPath, ArtifactError> {
    let wrong = || ArtifactError::Path(path.into());
    let parsed = ObjectPath::parse(path).map_err(|_| wrong())?;
    let parts: Vec<_> = parsed.parts().collect();
    match &parts[..] {
        [root, _, number, name]
            if root.as_ref() == ROOT && number.as_ref().parse::<u32>().is_ok() && is_part(name.as_ref()) =>
        {
            Ok(parsed)
        }
        _ => Err(wrong()),
    }
}

/// Refuses names that could lie elsewhere or hide: paths, `..`, the manifest, hidden files, what stores escape.
pub(super) fn check(files: &[FileSpec]) -> Result<(), ArtifactError> {
    if files.len() > MOST_FILES {
        return Err(ArtifactError::TooMany(files.len()));
    }
    let mut seen = BTreeSet::new();
    for FileSpec { part, name, .. } in files {
        let plain = name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        if !plain || name.is_empty() || name.starts_with('.') || name.len() > 200 || name == MANIFEST {
            return Err(ArtifactError::Name(name.clone()));
        }
        if !seen.insert((*part, name)) {
            return Err(ArtifactError::Duplicate(name.clone()));
        }
    }
    if files.is_empty() { Err(ArtifactError::Empty) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_lie_where_the_trial_says() {
        let at = |trial: &str| {
            part(&TrialId::new(trial), Attempt(2), 30, Part::Resume, None).map(|path| path.to_string())
        };
        assert_eq!(at("quick-start-00ff/7").unwrap(), "sweeps/quick-start-00ff/7/resume-a2-s30");
        assert_eq!(at("../7").unwrap(), "sweeps/%2E%2E/7/resume-a2-s30");
        assert_eq!(at("a/b/7").unwrap(), "sweeps/a%2Fb/7/resume-a2-s30");
        for trial in ["", "sweep", "sweep/", "sweep/x", "/7", "sweep/-1"] {
            assert!(matches!(at(trial), Err(ArtifactError::Trial(_))), "{trial}");
        }
        for trial in ["a-00ff/1", "../7", "a/b/7", "é/1", "100%/1"] {
            let path = at(trial).unwrap();
            assert_eq!(parse_part(&path).unwrap().to_string(), path);
        }
    }

    #[test]
    fn terms_stand_at_the_end() {
        let path =
            part(&TrialId::new("a-t3/1"), Attempt(2), 30, Part::Adapter, Some(17)).unwrap().to_string();
        assert_eq!(path, "sweeps/a-t3/1/adapter-a2-s30-t17");
        assert_eq!(split_term(&path), ("sweeps/a-t3/1/adapter-a2-s30", 17));
        assert_eq!(parse_part(&path).unwrap().to_string(), path);
        let local = "sweeps/a-t3/1/adapter-a2-s30";
        assert_eq!(split_term(local), (local, 0));
    }

    #[test]
    fn no_other_path_is_taken() {
        for path in [
            "",
            "/",
            "sweeps",
            "sweeps/a",
            "sweeps/a/1",
            "sweeps/a/1/other",
            "other/a/1/adapter-a1-s1",
            "sweeps/a/x/adapter-a1-s1",
            "sweeps/a/1/adapter-a1-s1/file",
            "sweeps/../1/adapter-a1-s1",
            "sweeps//1/adapter-a1-s1",
        ] {
            assert!(matches!(parse_part(path), Err(ArtifactError::Path(_))), "{path}");
        }
    }

    #[test]
    fn specs_lie_beside_the_trials() {
        let content = ContentHash([0xab; 32]);
        let hex = "ab".repeat(32);
        for (sweep, term, expected) in [
            ("a-00ff", None, format!("sweeps/a-00ff/spec-{hex}")),
            ("a-t3", Some(17), format!("sweeps/a-t3/spec-{hex}-t17")),
            ("../x", Some(1), format!("sweeps/..%2Fx/spec-{hex}-t1")),
        ] {
            let path = spec(&SweepId::new(sweep), content, term).unwrap().to_string();
            assert_eq!(path, expected);
            let (parsed, found) = parse_spec(&path).unwrap();
            assert_eq!((parsed.to_string(), found), (path.clone(), content));
            assert_eq!(split_term(&path).1, term.unwrap_or_default());
            assert!(parse_part(&path).is_err(), "{path}");
        }
        assert!(spec(&SweepId::new(""), content, None).is_err());
        for path in [
            "sweeps/a/spec-",
            "sweeps/a/spec-ab",
            &format!("sweeps/a/1/spec-{hex}"),
            &format!("other/a/spec-{hex}"),
            &format!("sweeps/a/spec-{hex}-x1"),
            &format!("sweeps/../spec-{hex}"),
            "sweeps/a/1/adapter-a1-s1",
        ] {
            assert!(matches!(parse_spec(path), Err(ArtifactError::Path(_))), "{path}");
        }
    }

    #[test]
    fn names_with_tricks_are_refused() {
        let spec =
            |name: &str| FileSpec { part: Part::Adapter, name: name.into(), bytes: 0, sha256: [0; 32] };
        for name in ["adapter_model.safetensors", "adapter_config.json", "README.md", "a-b"] {
            check(&[spec(name)]).unwrap();
        }
        for name in [
            "",
            ".",
            "..",
            "../x",
            "/etc/passwd",
            "a/b",
            "a\\b",
            "C:x",
            "x#1",
            "a b",
            "é",
            "a\0",
            "a\n",
            ".hidden",
            "%2e%2e",
            MANIFEST,
            &"x".repeat(201),
        ] {
            assert!(matches!(check(&[spec(name)]), Err(ArtifactError::Name(_))), "{name:?}");
        }
        assert!(matches!(check(&[]), Err(ArtifactError::Empty)));
        assert!(matches!(check(&[spec("a"), spec("b"), spec("a")]), Err(ArtifactError::Duplicate(_))));
        check(&[spec("a"), FileSpec { part: Part::Resume, ..spec("a") }]).unwrap();
    }
}
