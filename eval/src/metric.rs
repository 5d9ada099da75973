//! What is counted of an item, and the figure that all items make.

use crate::filter::{Ignored, NO_FILTER};
use crate::task::OutputType;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::fmt;

/// A metric, under its name in the harness.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Whether the likeliest choice is the right one; with labels, the true choices' share of the probability.
    Acc,
    /// Whether the choice that is likeliest for each of its characters is the right one.
    AccNorm,
    /// Whether the choice that is likeliest for each of its bytes is the right one.
    AccBytes,
    /// Whether the answer is one of the right ones.
    ExactMatch,
    /// `exp` of the mean negative log-likelihood of a word.
    WordPerplexity,
    /// `exp` of the mean negative log-likelihood of a byte.
    BytePerplexity,
    /// The mean negative log-likelihood of a byte, in bits.
    BitsPerByte,
}

impl Metric {
    /// The tasks that it is a metric of.
    pub fn output_type(self) -> OutputType {
        match self {
            Self::Acc | Self::AccNorm | Self::AccBytes => OutputType::MultipleChoice,
            Self::ExactMatch => OutputType::GenerateUntil,
            Self::WordPerplexity | Self::BytePerplexity | Self::BitsPerByte => {
                OutputType::LoglikelihoodRolling
            }
        }
    }

    /// Whether more is better.
    pub fn higher_is_better(self) -> bool {
        self.output_type() != OutputType::LoglikelihoodRolling
    }
}

impl fmt::Display for Metric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Acc => "acc",
            Self::AccNorm => "acc_norm",
            Self::AccBytes => "acc_bytes",
            Self::ExactMatch => "exact_match",
            Self::WordPerplexity => "word_perplexity",
            Self::BytePerplexity => "byte_perplexity",
            Self::BitsPerByte => "bits_per_byte",
        })
    }
}

/// A metric that a task counts: by its name alone, or as `metric` beside what `exact_match` disregards.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Value", into = "Value")]
pub struct Counted {
    /// The metric.
    pub metric: Metric,
    /// What `exact_match` disregards.
    pub ignored: Ignored,
}

impl From<Metric> for Counted {
    fn from(metric: Metric) -> Self {
        Self { metric, ignored: Ignored::default() }
    }
}

impl TryFrom<Value> for Counted {
    type Error = String;

    fn try_from(value: Value) -> Result<Self, String> {
        let (metric, options) = match value {
            Value::Object(mut options) => {
                (options.remove("metric").ok_or("a mapping in metrics has no `metric`")?, options)
            }
            name => (name, Map::new()),
        };
        let metric: Metric = serde_json::from_value(metric).map_err(|error| error.to_string())?;
        if let Some(key) = options.keys().next().filter(|_| metric != Metric::ExactMatch) {
            return Err(format!("{metric} has no {key}"));
        }
        let ignored = serde_json::from_value(options.into()).map_err(|error| format!("{metric}: {error}"))?;
        Ok(Self { metric, ignored })
    }
}

impl From<Counted> for Value {
    fn from(counted: Counted) -> Self {
        if counted.ignored == Ignored::default() {
            return json!(counted.metric);
        }
        let mut value = json!(counted.ignored);
        value["metric"] = json!(counted.metric);
        value
    }
}

/// What is counted: a metric, of generated answers behind one of their task's filters. It is written `acc` or
/// `exact_match,strict-match`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Measure {
    /// The metric.
    pub metric: Metric,
    /// The filter's name.
    pub filter: Option<String>,
}

impl Measure {
    /// A metric behind a filter; the harness's `none` is none.
    pub fn new(metric: Metric, filter: Option<&str>) -> Self {
        Self { metric, filter: filter.filter(|name| *name != NO_FILTER).map(str::to_owned) }
    }

    /// Its name in the harness's results: `acc,none`; with `_stderr` as the `kind`, that of its standard error.
    pub fn key(&self, kind: &str) -> String {
        format!("{}{kind},{}", self.metric, self.filter.as_deref().unwrap_or(NO_FILTER))
    }
}

impl fmt::Display for Measure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.filter {
            Some(filter) => write!(f, "{},{filter}", self.metric),
            None => self.metric.fmt(f),
        }
    }
}

impl TryFrom<String> for Measure {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        let (metric, filter) = name.split_once(',').map_or((name.as_str(), None), |(m, f)| (m, Some(f)));
        let metric = serde_json::from_value(metric.into()).map_err(|error| error.to_string())?;
        Ok(Self::new(metric, filter))
    }
}

impl From<Measure> for String {
    fn from(measure: Measure) -> Self {
        measure.to_string()
    }
}

/// What is right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Gold {
    /// One choice.
    Choice(usize),
    /// Each choice that is marked.
    Labels(Vec<bool>),
}

/// What a metric makes of one item: a number, or a log-likelihood with the number of words or bytes that it is of.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Score {
    /// A number.
    Value(f64),
    /// A log-likelihood and its weight.
    Weighted(f64, u64),
}

impl Score {
    /// The number, or the log-likelihood.
    fn value(&self) -> f64 {
        match self {
            Self::Value(value) | Self::Weighted(value, _) => *value,
        }
    }
}

/// What a metric makes of all items.
#[derive(Debug, Clone, PartialEq)]
pub struct Figure {
    /// What was counted.
    pub measure: Measure,
    /// Its value.
    pub value: f64,
    /// The standard error of a mean, from the items' own spread; none of one item, and none of what is no mean.
    pub stderr: Option<f64>,
}

/// The score of an item's choices.
pub fn of_choices(metric: Metric, gold: &Gold, choices: &[String], log_likelihoods: &[f64]) -> Score {
    let length = |choice: &String| match metric {
        Metric::AccNorm => choice.chars().count() as f64,
        Metric::AccBytes => choice.len() as f64,
        _ => 1.0,
    };
    Score::Value(match gold {
        Gold::Labels(labels) => true_share(labels, log_likelihoods),
        Gold::Choice(right) => {
            let scored = log_likelihoods.iter().zip(choices).map(|(l, choice)| l / length(choice));
            f64::from(likeliest(scored) == Some(*right))
        }
    })
}

/// The first of the largest.
fn likeliest(scores: impl Iterator<Item = f64>) -> Option<usize> {
    let mut best: Option<(usize, f64)> = None;
    for (place, score) in scores.enumerate() {
        if best.is_none_or(|(_, most)| score > most) {
            best = Some((place, score));
        }
    }
    best.map(|(place, _)| place)
}

/// Σ exp(l) over the true choices by that over all. Every l has the largest taken off, so that long texts leave more
/// than zeros.
fn true_share(labels: &[bool], log_likelihoods: &[f64]) -> f64 {
    let most = log_likelihoods.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mass = |wanted: &dyn Fn(bool) -> bool| -> f64 {
        let counted = labels.iter().zip(log_likelihoods).filter(|(label, _)| wanted(**label));
        counted.map(|(_, l)| (l - most).exp()).sum()
    };
    mass(&|label| label) / mass(&|_| true)
}

/// The score of a whole text.
pub fn of_text(metric: Metric, text: &str, log_likelihood: f64) -> Score {
    let weight = if metric == Metric::WordPerplexity { words(text) } else { text.len() };
    Score::Weighted(log_likelihood, weight as u64)
}

/// `len(re.split(r"\s+", text))`: a text that begins or ends with a space has an empty word there.
fn words(text: &str) -> usize {
    let inner = text.split_whitespace().count();
    match (inner, text.is_empty()) {
        (0, true) => 1,
        (0, false) => 2,
        _ => {
            let at_start = text.starts_with(char::is_whitespace);
            let at_end = text.ends_with(char::is_whitespace);
            inner + usize::from(at_start) + usize::from(at_end)
        }
    }
}

/// The figure of all items.
pub fn aggregate(measure: &Measure, scores: &[Score]) -> Figure {
    let (mut sum, mut weight) = (0.0, 0.0);
    for score in scores {
        let (value, of) = match score {
            Score::Value(value) => (*value, 1.0),
            Score::Weighted(value, of) => (*value, *of as f64),
        };
        sum += value;
        weight += of;
    }
    let mean = sum / weight;
    let (value, stderr) = match measure.metric {
        Metric::WordPerplexity | Metric::BytePerplexity => ((-mean).exp(), None),
        Metric::BitsPerByte => (-mean / std::f64::consts::LN_2, None),
        _ => (mean, standard_error(&scores.iter().map(Score::value).collect::<Vec<_>>())),
    };
    Figure { measure: measure.clone(), value, stderr }
}

/// The standard error of a mean: the sample's standard deviation by √n. There is none of one value.
pub fn standard_error(values: &[f64]) -> Option<f64> {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares = values.iter().map(|value| (value - mean).powi(2));
    (n > 1.0).then(|| (squares.sum::<f64>() / (n - 1.0)).sqrt() / n.sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scores_of_choices() {
        let check = |metric, gold: Gold, choices: &[&str], l: &[f64], want: f64| {
            let choices: Vec<_> = choices.iter().map(ToString::to_string).collect();
            let Score::Value(got) = of_choices(metric, &gold, &choices, l) else { panic!("a value") };
            assert!((got - want).abs() < 1e-12, "{metric} of {choices:?} at {l:?}: {got}, not {want}");
        };
        let one = Gold::Choice;
        check(Metric::Acc, one(1), &["a", "b"], &[-2.0, -1.0], 1.0);
        check(Metric::Acc, one(0), &["a", "b"], &[-2.0, -1.0], 0.0);
        // The first of two as likely.
        check(Metric::Acc, one(1), &["a", "b"], &[-1.0, -1.0], 0.0);
        check(Metric::AccNorm, one(1), &["a", "four"], &[-1.0, -2.0], 1.0);
        // Three characters, nine bytes.
        check(Metric::AccNorm, one(0), &["abcd", "日本語"], &[-4.0, -3.3], 1.0);
        check(Metric::AccBytes, one(1), &["abcd", "日本語"], &[-4.0, -3.3], 1.0);
        let labels = |labels: &[u8]| Gold::Labels(labels.iter().map(|l| *l == 1).collect());
        let ln = f64::ln;
        check(Metric::Acc, labels(&[1, 0, 1]), &["", "", ""], &[ln(0.1), ln(0.2), ln(0.1)], 0.5);
        check(Metric::Acc, labels(&[1, 0]), &["", ""], &[-2000.0, -2000.0], 0.5);
    }

    #[test]
    fn figures_of_all_items() {
        let check = |metric, scores: &[Score], value: f64, stderr: Option<f64>| {
            let got = aggregate(&Measure::new(metric, None), scores);
            assert!((got.value - value).abs() < 1e-12, "{metric}: {got:?}, not {value}");
            match (got.stderr, stderr) {
                (Some(got), Some(want)) => assert!((got - want).abs() < 1e-12, "{metric}: {got}, not {want}"),
                (got, want) => assert_eq!(got, want, "{metric}"),
            }
        };
        let values = |values: &[f64]| values.iter().map(|v| Score::Value(*v)).collect::<Vec<_>>();
        check(Metric::Acc, &values(&[1.0, 0.0, 0.0, 1.0]), 0.5, Some((1.0f64 / 3.0).sqrt() / 2.0));
        check(Metric::AccNorm, &values(&[1.0]), 1.0, None);
        check(Metric::ExactMatch, &values(&[0.0, 0.0, 0.0, 1.0]), 0.25, Some(0.25));
        let texts = [Score::Weighted(-6.0, 2), Score::Weighted(-3.0, 1)];
        check(Metric::WordPerplexity, &texts, 3f64.exp(), None);
        check(Metric::BitsPerByte, &texts, 3.0 / 2f64.ln(), None);
    }

    #[test]
    fn names_of_what_is_counted() {
        for (name, filter, key) in [
            ("acc", None, "acc_stderr,none"),
            ("exact_match,strict-match", Some("strict-match"), "exact_match_stderr,strict-match"),
        ] {
            let measure: Measure = serde_json::from_value(name.into()).unwrap();
            assert_eq!((measure.filter.as_deref(), measure.key("_stderr").as_str()), (filter, key));
            assert_eq!(json!(measure), name);
        }
        assert_eq!(Measure::new(Metric::ExactMatch, Some("none")).to_string(), "exact_match");
        let read = |value: Value| serde_json::from_value::<Counted>(value).map_err(|error| error.to_string());
        let options = json!({
            "metric": "exact_match", "ignore_case": true, "ignore_numbers": false, "ignore_punctuation": false,
            "regexes_to_ignore": [","],
        });
        assert_eq!(json!(read(options.clone()).unwrap()), options);
        assert_eq!(json!(read("acc".into()).unwrap()), "acc");
        for (value, want) in [
            (json!({ "metric": "acc", "ignore_case": true }), "acc has no ignore_case"),
            (json!({ "metric": "exact_match", "ignore_accents": true }), "unknown field `ignore_accents`"),
            (json!({ "ignore_case": true }), "has no `metric`"),
            (json!("f1"), "unknown variant `f1`"),
        ] {
            let error = read(value).unwrap_err();
            assert!(error.contains(want), "{error}");
        }
    }

    #[test]
    fn words_as_pythons_split_counts_them() {
        for (text, want) in [("", 1), (" ", 2), ("a", 1), ("a b", 2), (" a\n\nb ", 4), ("a b\n", 3)] {
            assert_eq!(words(text), want, "{text:?}");
        }
    }
}
