//! A sweep file to a checked spec.

use crate::paths::Missing;
pub use crate::yaml::Position;
use crate::yaml::Positions;
use crate::{evaluations, overrides, paths, yaml};
use domain::sweep::{Problem, SweepSpec, is_within};
use serde_json::{Map, Value};
use std::fmt;
use std::path::{Path, PathBuf};

/// A sweep file, read, overridden, resolved and checked.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// What it asks for.
    pub spec: SweepSpec,
    /// The spec as a document with every default in force and absolute paths, as it is sent to a coordinator.
    pub document: Map<String, Value>,
    /// Where each key of the file stands.
    pub positions: Places,
}

impl Loaded {
    /// `file:line:column` of a document path, or `--set key` if it came from an override.
    pub fn locate(&self, path: &str) -> String {
        self.positions.locate(path)
    }
}

/// Where the keys of a sweep come from.
#[derive(Debug, Clone)]
pub struct Places {
    file: PathBuf,
    positions: Positions,
    /// Document path and `--set` key of each override.
    overrides: Vec<(String, String)>,
}

impl Places {
    /// `file:line:column` of a document path, or `--set key` if it came from an override. A path that is
    /// nowhere stands where its nearest parent does.
    pub fn locate(&self, path: &str) -> String {
        let overridden = self.overrides.iter().rev().find(|(set, _)| is_within(path, set));
        if let Some((_, key)) = overridden {
            return format!("--set {key}");
        }
        let Position { line, column } = self.position(path);
        format!("{}:{line}:{column}", self.file.display())
    }

    fn position(&self, path: &str) -> Position {
        let mut path = path;
        loop {
            if let Some(position) = self.positions.get(path) {
                return *position;
            }
            match path.rfind(['.', '[']) {
                Some(end) => path = &path[..end],
                None => return Position { line: 1, column: 1 },
            }
        }
    }
}

/// Why a sweep file gives no spec. Its `Display` is one line for each thing that is wrong.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// The file cannot be read.
    #[error("{}: cannot be read: {source}; name a sweep file, such as config/sweeps/quickstart.yaml", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The text is no YAML document.
    #[error("{}:{}:{}: {message}", path.display(), position.line, position.column)]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where it goes wrong.
        position: Position,
        /// Why.
        message: String,
    },
    /// The document asks for something that cannot be.
    #[error("{}", lines(.0))]
    Problems(Vec<Located>),
}

/// A problem and where it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Located {
    /// `file:line:column`, or `--set key`.
    pub place: String,
    /// What is wrong there.
    pub problem: Problem,
}

impl fmt::Display for Located {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A key or value may hold line breaks; the message may not.
        let line = format!("{}: {}", self.place, self.problem);
        f.write_str(&line.replace('\n', "\\n"))
    }
}

fn lines(problems: &[Located]) -> String {
    problems.iter().map(Located::to_string).collect::<Vec<_>>().join("\n")
}

/// Reads a sweep file, applies `--set key=value` overrides (the value is YAML; dots reach inside:
/// `search.max_trials=4`), makes local paths absolute (the file's are relative to its folder, the overrides'
/// to `cwd`), and checks it.
///
/// # Errors
/// Everything that is wrong with the file, or why it cannot be read.
pub fn load(path: &Path, overrides: &[(String, String)], cwd: &Path) -> Result<Loaded, SpecError> {
    load_with(path, overrides, cwd, Missing::Report)
}

/// [`load`] for machines elsewhere: an absolute path that is not here may be there.
///
/// # Errors
/// As [`load`]'s.
pub fn load_for_elsewhere(
    path: &Path,
    overrides: &[(String, String)],
    cwd: &Path,
) -> Result<Loaded, SpecError> {
    load_with(path, overrides, cwd, Missing::ReportRelative)
}

fn load_with(
    path: &Path,
    overrides: &[(String, String)],
    cwd: &Path,
    missing: Missing,
) -> Result<Loaded, SpecError> {
    let text = std::fs::read_to_string(path)
        .map_err(|source| SpecError::Unreadable { path: path.to_path_buf(), source })?;
    let dir = path.parent().unwrap_or(Path::new(""));
    read(&text, path, dir, overrides, cwd, missing)
}

/// [`load`] for a text: `name` is shown as its file, `dir` is the folder of its relative paths.
///
/// # Errors
/// Everything that is wrong with the text.
pub fn parse(
    text: &str,
    name: &Path,
    dir: &Path,
    overrides: &[(String, String)],
    cwd: &Path,
) -> Result<Loaded, SpecError> {
    read(text, name, dir, overrides, cwd, Missing::Report)
}

/// Checks a text alone: the model and the rows that it names need not be there.
///
/// # Errors
/// Everything that is wrong with the text.
pub fn parse_only(text: &str, name: &Path) -> Result<Loaded, SpecError> {
    let dir = name.parent().unwrap_or(Path::new(""));
    read(text, name, dir, &[], Path::new(""), Missing::Ignore)
}

/// Applies `--set key=value` overrides to a document that is there already, such as a submitted sweep's. Local paths
/// in them are relative to `cwd`.
///
/// # Errors
/// What is wrong with the overrides; the document as a whole is not checked.
pub fn change(
    mut document: Map<String, Value>,
    sets: &[(String, String)],
    cwd: &Path,
) -> Result<Map<String, Value>, SpecError> {
    let mut places = Places { file: PathBuf::new(), positions: Positions::default(), overrides: Vec::new() };
    let mut problems = Vec::new();
    for (key, text) in sets {
        match overrides::apply(&mut document, key, text) {
            Ok(path) => places.overrides.push((path, key.clone())),
            Err(problem) => {
                places.overrides.push((key.clone(), key.clone()));
                problems.push(problem);
            }
        }
    }
    // Paths that stand there already are absolute.
    problems.extend(paths::resolve(&mut document, &|_| cwd.to_path_buf(), Missing::Ignore));
    if problems.is_empty() { Ok(document) } else { Err(located(problems, &places)) }
}

fn read(
    text: &str,
    name: &Path,
    dir: &Path,
    sets: &[(String, String)],
    cwd: &Path,
    missing: Missing,
) -> Result<Loaded, SpecError> {
    let parsed = yaml::parse(text).map_err(|(position, message)| SpecError::Syntax {
        path: name.to_path_buf(),
        position,
        message,
    })?;
    let mut places = Places { file: name.to_path_buf(), positions: parsed.positions, overrides: Vec::new() };
    let mut problems = parsed.problems;
    let Value::Object(mut document) = parsed.value else {
        let message = "a sweep file is a mapping; begin with name: my-sweep".into();
        let position = Position { line: 1, column: 1 };
        return Err(SpecError::Syntax { path: name.to_path_buf(), position, message });
    };
    for (key, text) in sets {
        // A key that cannot be set stands under its own name, so that it is found there.
        let set = overrides::apply(&mut document, key, text);
        let path = set.unwrap_or_else(|problem| {
            problems.push(problem);
            key.clone()
        });
        places.overrides.push((path, key.clone()));
    }
    let base = |path: &str| {
        let overridden = places.overrides.iter().any(|(set, _)| is_within(path, set));
        if overridden { cwd.to_path_buf() } else { dir.to_path_buf() }
    };
    problems.extend(evaluations::inline(&mut document, &base, missing == Missing::Ignore));
    problems.extend(paths::resolve(&mut document, &base, missing));
    let spec = match SweepSpec::from_document(&document) {
        Ok(spec) if problems.is_empty() => spec,
        Ok(_) => return Err(located(problems, &places)),
        Err(more) => {
            // What has no JSON form, or is not there, has been told already.
            let told = |p: &Problem| problems.iter().any(|q| is_within(&q.path, &p.path));
            let more: Vec<_> = more.into_iter().filter(|p| !told(p)).collect();
            problems.extend(more);
            return Err(located(problems, &places));
        }
    };
    Ok(Loaded { document: spec.to_document(), spec, positions: places })
}

/// The problems in the order of the file, those of `--set` after them.
fn located(mut problems: Vec<Problem>, places: &Places) -> SpecError {
    let set = |path: &str| places.overrides.iter().position(|(set, _)| is_within(path, set));
    problems.sort_by_key(|p| (set(&p.path), places.position(&p.path)));
    let place = |problem: Problem| Located { place: places.locate(&problem.path), problem };
    SpecError::Problems(problems.into_iter().map(place).collect())
}
