//! The metrics file: one JSON object a line, one line a metric point.

use crate::Failure;
use domain::metric::MetricPoint;
use serde_json::{Map, Value};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

/// An open metrics file.
pub(crate) struct Metrics {
    path: PathBuf,
    file: File,
}

impl Metrics {
    /// Opens the file for a run that has made `step` steps: what it says about later ones is dropped, so that
    /// a resumed run's curve has no step twice.
    pub(crate) fn open(path: &Path, step: u64) -> Result<Self, Failure> {
        let unusable = |e: std::io::Error| {
            Failure::invalid(format!("--metrics: {}: {e}; name a file to write to", path.display()))
        };
        let known = |line: &&str| {
            serde_json::from_str::<Value>(line).is_ok_and(|v| v["step"].as_u64().is_some_and(|s| s <= step))
        };
        let kept: String = match std::fs::read_to_string(path) {
            Ok(text) if step > 0 => text.lines().filter(known).map(|line| format!("{line}\n")).collect(),
            _ => String::new(),
        };
        let mut file = File::create(path).map_err(unusable)?;
        file.write_all(kept.as_bytes()).map_err(unusable)?;
        Ok(Self { path: path.into(), file })
    }

    /// Adds a point.
    pub(crate) fn write(&mut self, point: &MetricPoint) -> Result<(), Failure> {
        let mut line = Map::from_iter([("step".to_string(), Value::from(point.step))]);
        line.extend(point.values.iter().map(|(name, value)| (name.clone(), number(*value))));
        let line = Value::Object(line).to_string() + "\n";
        let written = self.file.write_all(line.as_bytes());
        written.map_err(|e| Failure::failed(format!("{}: {e}", self.path.display())))
    }
}

/// A number; a whole one without a point.
fn number(value: f64) -> Value {
    let whole = value.fract() == 0.0 && value.abs() < 1e15;
    if whole && value != 0.0 { Value::from(value as i64) } else { Value::from(value) }
}
