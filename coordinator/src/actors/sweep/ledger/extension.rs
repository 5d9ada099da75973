//! What a sweep's extension may change: its space, its number of trials, its budget, the runs of its best trials.

use crate::actors::sweep::budget::spent;
use crate::error::{CoordinatorError, Result};
use crate::store::SweepRecord;
use domain::sweep::SweepSpec;
use serde_json::{Map, Value};
use std::collections::BTreeSet;

/// Sections of a document that an extension may change, in whole or in part.
const SECTIONS: [&str; 5] = ["search", "parameters", "budget", "replicates", "finalists"];

/// Checks a changed spec against the sweep as it stands, whose search has proposed so many trials.
///
/// # Errors
/// Every field that may not be what it is.
pub(super) fn check(record: &SweepRecord, proposed: u32, spec: &SweepSpec) -> Result<()> {
    let old = &record.sweep.spec;
    if old == spec {
        let problem =
            "changes nothing; give more trials, more budget, more runs or other values under parameters";
        return Err(CoordinatorError::invalid("spec", problem));
    }
    let (before, after) = (old.to_document(), spec.to_document());
    let searched = |key: &str| spec.distribution(key).is_some();
    let mut fields: Vec<(String, String)> = differing(&before, &after)
        .filter(|key| !SECTIONS.contains(key) && !searched(key))
        .map(|key| (format!("spec.{key}"), fixed()))
        .collect();
    // Finalists are compared by runs of the same seed; a constant among the parameters could give new trials another.
    let seed = |spec: &SweepSpec| (!spec.varies("seed")).then(|| spec.common().seed);
    let told = fields.iter().any(|(field, _)| field == "spec.seed");
    if (old.replicates.or(spec.replicates)).is_some() && seed(old) != seed(spec) && !told {
        fields.push(("spec.seed".into(), fixed()));
    }
    let search = differing(section(&before), section(&after)).filter(|key| *key != "max_trials");
    fields.extend(search.map(|key| (format!("spec.search.{key}"), fixed())));
    if let Some(most) = spec.search.max_trials.filter(|most| *most < proposed) {
        let problem = format!("is {most}, and {proposed} trials were proposed already; give more");
        fields.push(("spec.search.max_trials".into(), problem));
    }
    for (key, old, new) in [
        ("max_cost_usd", old.budget.max_cost_usd, spec.budget.max_cost_usd),
        ("max_wall_clock", old.budget.max_wall_clock_seconds, spec.budget.max_wall_clock_seconds),
    ] {
        if let Some(new) = new
            && old.is_none_or(|old| new < old)
        {
            let old = old.map_or_else(|| "unlimited".into(), |old| old.to_string());
            let problem = format!("is {new} and was {old}; a budget can only be raised");
            fields.push((format!("spec.budget.{key}"), problem));
        }
    }
    if fields.is_empty()
        && let Some(spent) = spent(&spec.budget, record.sweep.cost_usd, record.active_seconds())
    {
        fields.push(("spec.budget".into(), format!("{spent}; raise it to more than that")));
    }
    if fields.is_empty() { Ok(()) } else { Err(CoordinatorError::Invalid { fields }) }
}

fn fixed() -> String {
    "cannot change while a sweep goes on; submit another sweep".into()
}

fn section(document: &Map<String, Value>) -> &Map<String, Value> {
    static NONE: std::sync::LazyLock<Map<String, Value>> = std::sync::LazyLock::new(Map::new);
    document.get("search").and_then(Value::as_object).unwrap_or(&NONE)
}

/// Keys at which two documents differ.
fn differing<'a>(a: &'a Map<String, Value>, b: &'a Map<String, Value>) -> impl Iterator<Item = &'a str> {
    let keys: BTreeSet<&str> = a.keys().chain(b.keys()).map(String::as_str).collect();
    keys.into_iter().filter(|key| a.get(*key) != b.get(*key))
}
