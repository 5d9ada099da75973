//! What listings sort, filter and cut by: the keys of the documents that they print.

use crate::Failure;
use serde_json::Value;
use std::cmp::Ordering;

/// The flags that every listing takes.
#[derive(Debug, Clone, Default, clap::Args)]
pub(crate) struct ListingArgs {
    /// Sorts by a key of the document, a parameter, or `value`, that of the sweep's metric; `-KEY` from the largest down.
    #[arg(long, value_name = "KEY", allow_hyphen_values = true)]
    sort: Option<String>,
    /// Only what meets a condition on a key or a parameter, such as `lora_rank>=8` or `precision_mode=4bit`. May be
    /// given several times.
    #[arg(long, value_name = "CONDITION")]
    filter: Vec<String>,
    /// At most this many.
    #[arg(long, value_name = "N")]
    limit: Option<usize>,
}

/// The word for the value of the sweep's metric, whichever that is.
pub(crate) const VALUE: &str = "value";

/// Objects in which a key is looked for, after the document itself.
const INSIDE: [&str; 4] = ["parameters", "config", "summary", "spec"];

/// Whether a condition holds of a value that compares so with the wanted one.
type Holds = fn(Ordering) -> bool;

/// Signs of conditions; of two that begin alike the longer stands first.
const SIGNS: [(&str, Holds); 7] = [
    (">=", Ordering::is_ge),
    ("<=", Ordering::is_le),
    ("!=", Ordering::is_ne),
    ("==", Ordering::is_eq),
    ("=", Ordering::is_eq),
    (">", Ordering::is_gt),
    ("<", Ordering::is_lt),
];

impl ListingArgs {
    /// Whether a listing is left as it is.
    pub(crate) fn is_plain(&self) -> bool {
        self.sort.is_none() && self.filter.is_empty()
    }

    /// Whether `value` is asked for.
    pub(crate) fn names_value(&self) -> bool {
        let sort = self.sort.as_deref().map(|sort| sort.trim_start_matches('-'));
        let mut keys = self.filter.iter().filter_map(|condition| Some(parse(condition).ok()?.0));
        sort == Some(VALUE) || keys.any(|key| key == VALUE)
    }

    /// The items that are asked for, in the order asked for; `document` is what is known of one, in which the key
    /// `value_key` holds what is called `value`.
    ///
    /// # Errors
    /// A condition cannot be read, or no item has such a key.
    pub(crate) fn apply<T>(
        &self,
        items: Vec<T>,
        value_key: &str,
        document: impl Fn(&T) -> Value,
    ) -> Result<Vec<T>, Failure> {
        let named = |key| if key == VALUE { value_key } else { key };
        if self.is_plain() {
            return Ok(items.into_iter().take(self.limit.unwrap_or(usize::MAX)).collect());
        }
        let mut known: Vec<(Value, T)> = items.into_iter().map(|item| (document(&item), item)).collect();
        for condition in &self.filter {
            let (key, holds, wanted) = parse(condition)?;
            let key = named(key);
            check(key, "--filter", known.iter().map(|(document, _)| document))?;
            known.retain(|(document, _)| value(document, key).is_some_and(|v| holds(compare(v, &wanted))));
        }
        if let Some(sort) = &self.sort {
            let (key, descending) = sort.strip_prefix('-').map_or((sort.as_str(), false), |key| (key, true));
            let key = named(key);
            check(key, "--sort", known.iter().map(|(document, _)| document))?;
            known.sort_by(|(a, _), (b, _)| match (value(a, key), value(b, key)) {
                (Some(a), Some(b)) if descending => compare(b, a),
                (Some(a), Some(b)) => compare(a, b),
                // What has no value comes last, whichever way.
                (a, b) => b.is_some().cmp(&a.is_some()),
            });
        }
        Ok(known.into_iter().map(|(_, item)| item).take(self.limit.unwrap_or(usize::MAX)).collect())
    }
}

fn parse(condition: &str) -> Result<(&str, Holds, Value), Failure> {
    // A key begins with none of the signs.
    let keyed = !condition.trim_start().starts_with(['>', '<', '=', '!']);
    let at = |sign: &str| condition.find(sign).filter(|_| keyed);
    let found = SIGNS.iter().filter_map(|(sign, holds)| Some((at(sign)?, *sign, *holds)));
    // The first sign; of those that begin there, the longest.
    let Some((at, sign, holds)) = found.min_by_key(|(at, sign, _)| (*at, usize::MAX - sign.len())) else {
        return Err(Failure::invalid(format!(
            "--filter {condition}: no condition; write a key, one of >= <= != = > <, and a value, as in lora_rank>=8"
        )));
    };
    let text = condition[at + sign.len()..].trim();
    let wanted = serde_json::from_str(text).unwrap_or_else(|_| Value::String(text.into()));
    Ok((condition[..at].trim(), holds, wanted))
}

fn check<'a>(key: &str, flag: &str, mut documents: impl Iterator<Item = &'a Value>) -> Result<(), Failure> {
    let Some(first) = documents.next() else { return Ok(()) };
    if find(first, key).is_some() || documents.any(|document| find(document, key).is_some()) {
        return Ok(());
    }
    let keys = |object: &Value| object.as_object().map(|o| o.keys().cloned().collect::<Vec<_>>());
    let mut known = keys(first).unwrap_or_default();
    known.extend(keys(&first["parameters"]).unwrap_or_default());
    Err(Failure::invalid(format!("{flag} {key}: there is no such key; known are {}", known.join(", "))))
}

/// A key's value, unless it has none.
fn value<'a>(document: &'a Value, key: &str) -> Option<&'a Value> {
    find(document, key).filter(|value| !value.is_null())
}

fn find<'a>(document: &'a Value, key: &str) -> Option<&'a Value> {
    let path = |value: &'a Value, path: &str| path.split('.').try_fold(value, |value, key| value.get(key));
    let inside = |name: &&str| document.get(*name).and_then(|object| path(object, key));
    path(document, key).or_else(|| INSIDE.iter().find_map(inside))
}

/// Numbers by size, everything else by its text; a number comes before a text.
fn compare(a: &Value, b: &Value) -> Ordering {
    let text = |value: &Value| value.as_str().map_or_else(|| value.to_string(), String::from);
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a.total_cmp(&b),
        (a, b) if a.is_some() != b.is_some() => b.is_some().cmp(&a.is_some()),
        _ => text(a).cmp(&text(b)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn ids(sort: Option<&str>, filter: &[&str], limit: Option<usize>) -> Result<Vec<u64>, Failure> {
        let items = vec![
            json!({"id": 1, "state": "running", "eval_loss": null, "parameters": {"lora_rank": 16}}),
            json!({"id": 2, "state": "completed", "eval_loss": 1.5, "parameters": {"lora_rank": 4}}),
            json!({"id": 3, "state": "completed", "eval_loss": 0.5, "parameters": {"lora_rank": 8}}),
            json!({"id": 4, "state": "failed", "eval_loss": 10.0, "parameters": {}, "summary": {"loss": 2.0}}),
        ];
        let filter = filter.iter().map(ToString::to_string).collect();
        let args = ListingArgs { sort: sort.map(String::from), filter, limit };
        let items = args.apply(items, "eval_loss", Value::clone)?;
        Ok(items.iter().map(|item| item["id"].as_u64().unwrap()).collect())
    }

    #[test]
    fn listings_are_sorted_filtered_and_cut() {
        type Row = (Option<&'static str>, &'static [&'static str], Option<usize>, &'static [u64]);
        let rows: &[Row] = &[
            (None, &[], None, &[1, 2, 3, 4]),
            (None, &[], Some(2), &[1, 2]),
            (Some("eval_loss"), &[], None, &[3, 2, 4, 1]),
            (Some("-eval_loss"), &[], None, &[4, 2, 3, 1]),
            (Some("value"), &[], None, &[3, 2, 4, 1]),
            (Some("-value"), &["value<5"], None, &[2, 3]),
            (Some("state"), &[], None, &[2, 3, 4, 1]),
            (Some("-lora_rank"), &[], Some(2), &[1, 3]),
            (Some("parameters.lora_rank"), &[], None, &[2, 3, 1, 4]),
            (None, &["lora_rank>=8"], None, &[1, 3]),
            (None, &["lora_rank > 4", "lora_rank<16"], None, &[3]),
            (None, &["state!=completed"], None, &[1, 4]),
            (None, &["state == completed", "eval_loss<1"], None, &[3]),
            (None, &["eval_loss=1.5"], None, &[2]),
            (None, &["loss<=2"], None, &[4]),
        ];
        for (sort, filter, limit, want) in rows {
            assert_eq!(ids(*sort, filter, *limit).unwrap(), *want, "{sort:?} {filter:?} {limit:?}");
        }
    }

    #[test]
    fn what_cannot_be_is_named() {
        for (sort, filter, want) in [
            (Some("eval_los"), &[][..], "--sort eval_los: there is no such key; known are id, state"),
            (None, &["rank>8"], "--filter rank: there is no such key"),
            (None, &["lora_rank"], "--filter lora_rank: no condition"),
            (None, &[">=8"], "--filter >=8: no condition"),
        ] {
            let failure = format!("{:?}", ids(sort, filter, None).unwrap_err());
            assert!(failure.contains(want), "{failure}");
        }
    }
}
