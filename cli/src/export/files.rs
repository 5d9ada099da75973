//! Everything about a sweep as files of their own: its documents, its tables, its report, its adapters.

use super::csv::Csv;
use super::table::{Cell, Column, Kind, Sheet, Trials};
use super::{Source, place};
use crate::{Failure, adapters, output, sweeps, view};
use serde_json::Value;
use std::collections::HashSet;
use std::path::Path;

/// Writes them into a directory, which is there.
pub(super) async fn write(source: &Source<'_>, to: &Path, with_adapters: bool) -> Result<(), Failure> {
    let file = |name: &str, text: String| {
        let path = to.join(name);
        std::fs::write(&path, text).map_err(place::at(&path))
    };
    let pretty = |value: &Value| serde_json::to_string_pretty(value).map_err(Failure::failed);
    file("spec.yaml", output::yaml(&source.document["spec"])? + "\n")?;
    file("sweep.json", pretty(&source.document)? + "\n")?;
    let documents = Value::Array(source.trials.iter().map(view::trial_document).collect());
    file("trials.json", pretty(&documents)? + "\n")?;
    trials::<Csv>(source, to)?;
    curves(source, &to.join("metrics.csv")).await?;
    let report = to.join("report.html");
    sweeps::save_report(source.connection, &source.id, Some(&report), to).await?;
    for (name, bytes) in sweeps::report_tables(source.connection, &source.id).await? {
        let path = to.join(name);
        std::fs::write(&path, bytes).map_err(place::at(&path))?;
    }
    if with_adapters {
        for trial in source.trials.iter().filter(|trial| trial.adapter.is_some()) {
            let number = trial.id.number().unwrap_or_default();
            let dir = to.join("adapters").join(number.to_string());
            adapters::fetch(source.connection, trial.id.as_str(), &dir).await?;
        }
    }
    Ok(())
}

/// Writes the table of trials.
pub(super) fn trials<S: Sheet>(source: &Source<'_>, to: &Path) -> Result<(), Failure> {
    let table = Trials::new(&source.trials);
    let mut sheet = S::create(&to.join(format!("trials.{}", S::ENDING)), &table.columns)?;
    table.rows().try_for_each(|row| sheet.row(&row))?;
    sheet.close()
}

/// Writes the table of points, trial after trial.
pub(super) async fn points<S: Sheet>(source: &Source<'_>, to: &Path) -> Result<(), Failure> {
    let columns = super::table::point_columns();
    let mut sheet = S::create(&to.join(format!("points.{}", S::ENDING)), &columns)?;
    for trial in &source.trials {
        let points = source.points(trial).await?;
        super::table::point_rows(trial, &points).try_for_each(|row| sheet.row(&row))?;
    }
    sheet.close()
}

/// Writes a line a trial and step, a column a metric. The curves are read twice, for their metrics and for their
/// values, so that one of them is in memory at a time.
async fn curves(source: &Source<'_>, path: &Path) -> Result<(), Failure> {
    let (mut names, mut known) = (Vec::new(), HashSet::new());
    for trial in &source.trials {
        let points = source.points(trial).await?;
        for (name, _) in points.into_iter().flat_map(|point| point.values) {
            if known.insert(name.clone()) {
                names.push(name);
            }
        }
    }
    let first = [("trial", Kind::Text), ("step", Kind::Whole), ("time", Kind::Time)];
    let first = first.into_iter().map(|(name, kind)| Column { name: name.into(), kind });
    let metrics = names.iter().map(|name| Column { name: name.clone().into(), kind: Kind::Number });
    let mut sheet = Csv::create(path, &first.chain(metrics).collect::<Vec<_>>())?;
    for trial in &source.trials {
        for point in source.points(trial).await? {
            let step = i64::try_from(point.step).unwrap_or(i64::MAX);
            let first = [Cell::Text(trial.id.as_str().into()), Cell::Whole(step), Cell::Time(point.time)];
            let values = names.iter().map(|name| point.get(name).map_or(Cell::None, Cell::Number));
            sheet.row(&first.into_iter().chain(values).collect::<Vec<_>>())?;
        }
    }
    sheet.close()
}
