//! YAML 1.2 text to JSON, and where each key and item stands.

use domain::sweep::Problem;
use saphyr::{LoadableYamlNode, MarkedYaml, Marker, Scalar, YamlData};
use serde_json::{Map, Number, Value};
use std::collections::BTreeMap;

/// A place in a file; both count from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// The line.
    pub line: usize,
    /// The character in the line.
    pub column: usize,
}

impl From<Marker> for Position {
    fn from(marker: Marker) -> Self {
        Self { line: marker.line(), column: marker.col() + 1 }
    }
}

/// Where each key (`parameters.lora_rank`) and item (`constraints[0]`) stands.
pub(crate) type Positions = BTreeMap<String, Position>;

/// What a YAML text says.
pub(crate) struct Parsed {
    pub(crate) value: Value,
    pub(crate) positions: Positions,
    /// What has no JSON form: infinite numbers, tags that do not fit.
    pub(crate) problems: Vec<Problem>,
}

/// Reads a text of one document.
///
/// # Errors
/// Where it is no YAML, and why: syntax, a key that stands twice, a second document.
pub(crate) fn parse(text: &str) -> Result<Parsed, (Position, String)> {
    let documents =
        MarkedYaml::load_from_str(text).map_err(|e| (Position::from(*e.marker()), message(e.info())))?;
    if let Some(second) = documents.get(1) {
        return Err((second.span.start.into(), "a second document begins here; keep one in the file".into()));
    }
    let mut parsed = Parsed { value: Value::Null, positions: Positions::new(), problems: Vec::new() };
    if let Some(document) = documents.first() {
        parsed.value = parsed.node("", document);
    }
    Ok(parsed)
}

/// The parser's words, with what to do.
fn message(info: &str) -> String {
    match info {
        "duplicated key in mapping" => "the key stands twice in its mapping; remove one of the two".into(),
        info => format!("{info}; mend the YAML here or just before"),
    }
}

impl Parsed {
    fn node(&mut self, path: &str, node: &MarkedYaml) -> Value {
        match &node.data {
            YamlData::Value(scalar) => self.scalar(path, scalar),
            YamlData::Sequence(items) => {
                let item = |(i, item): (usize, &MarkedYaml)| {
                    let at = format!("{path}[{i}]");
                    self.positions.insert(at.clone(), item.span.start.into());
                    self.node(&at, item)
                };
                items.iter().enumerate().map(item).collect()
            }
            YamlData::Mapping(mapping) => {
                let mut object = Map::new();
                for (key, value) in mapping {
                    let Some(key_text) = key_text(key) else {
                        self.problem(path, "a key that is no word", "write keys as plain words");
                        continue;
                    };
                    let at = if path.is_empty() { key_text.clone() } else { format!("{path}.{key_text}") };
                    self.positions.insert(at.clone(), key.span.start.into());
                    let value = self.node(&at, value);
                    object.insert(key_text, value);
                }
                Value::Object(object)
            }
            YamlData::Tagged(tag, _) => {
                self.problem(path, &format!("the tag {tag} means nothing here"), "remove the tag");
                Value::Null
            }
            YamlData::BadValue | YamlData::Alias(_) | YamlData::Representation(..) => {
                self.problem(path, "a value that does not fit its tag", "remove the tag or mend the value");
                Value::Null
            }
        }
    }

    fn scalar(&mut self, path: &str, scalar: &Scalar) -> Value {
        match scalar {
            Scalar::Null => Value::Null,
            Scalar::Boolean(flag) => Value::Bool(*flag),
            Scalar::Integer(whole) => Value::Number((*whole).into()),
            Scalar::FloatingPoint(x) => match Number::from_f64(x.into_inner()) {
                Some(number) => Value::Number(number),
                None => {
                    self.problem(path, &format!("{x} is no finite number"), "give a finite one");
                    Value::Null
                }
            },
            Scalar::String(text) => Value::String(text.to_string()),
        }
    }

    fn problem(&mut self, path: &str, problem: &str, remedy: &str) {
        self.problems.push(Problem::new(path, problem, remedy));
    }
}

/// A key as text: numbers and booleans as they are written in JSON.
fn key_text(key: &MarkedYaml) -> Option<String> {
    match &key.data {
        YamlData::Value(Scalar::String(text)) => Some(text.to_string()),
        YamlData::Value(Scalar::Integer(whole)) => Some(whole.to_string()),
        YamlData::Value(Scalar::Boolean(flag)) => Some(flag.to_string()),
        YamlData::Value(Scalar::FloatingPoint(x)) => Some(x.to_string()),
        _ => None,
    }
}
