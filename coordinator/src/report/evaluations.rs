//! What the tasks of a sweep's evaluations say: of the base, of the best adapter of each precision mode, and whether the
//! two differ by more than chance.

use super::Sources;
use super::document::{Block, Line, Table};
use super::figures::accuracy;
use super::numbers::{NONE, or_dash};
use super::series::Entry;
use super::slice::PRECISION;
use domain::metric::PERPLEXITIES;
use domain::trial::{TaskScore, Trial};

/// Standard errors on each side of 95 % of a normal distribution.
pub(super) const NORMAL_95: f64 = 1.96;

/// Accuracies as a figure, and a table with a row for each metric and precision mode with how to read it.
pub(super) fn blocks(sources: &Sources) -> Vec<Block> {
    let mut table = Table::new([
        "metric",
        PRECISION,
        "trial",
        "examples",
        "items",
        "base",
        "adapter",
        "difference",
        "95 % interval",
        "so the adapter is",
    ]);
    let best = sources.best_of_modes();
    let scores = |entry: &Entry| entry.trial.summary.clone().map(|s| s.evaluations).unwrap_or_default();
    let mut names: Vec<String> = Vec::new();
    for name in best.iter().flat_map(|(_, entry)| scores(entry)).map(|score| score.name()) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    for name in &names {
        for (mode, entry) in &best {
            let scores = scores(entry);
            let Some(score) = scores.iter().find(|score| score.name() == *name) else { continue };
            table.row(row(score, mode, or_dash(entry.trial.id.number(), |number| number.to_string())));
        }
    }
    let unasked: Vec<_> = sources.entries.iter().filter_map(|entry| not_asked(entry.trial)).collect();
    let unasked = (!unasked.is_empty()).then_some(Block::List(unasked));
    let others = asked_others(sources).then(|| Block::Warning(Line::from(OTHERS)));
    if names.is_empty() {
        return unasked.into_iter().collect();
    }
    let how = "± is one standard error over items. Base and adapter answered the same items, so the interval is that of \
               their paired difference; where it holds 0, chance alone may be what made them differ.";
    let figure = accuracy::figure(&best).map(|figure| Block::Figures(vec![figure]));
    let table = [Block::Table(table), Block::Note(Line::from(how))];
    others.into_iter().chain(figure).chain(table).chain(unasked).collect()
}

/// Said where scores of several trials are of different questions.
const OTHERS: &str = "Not all trials were asked the same documents, so that their scores do not compare: what lies at a path, or on the hub, \
                      was another on another machine or at another time. Their records say which were asked the same (digests, documents).";

/// Whether trials were asked different documents.
fn asked_others(sources: &Sources) -> bool {
    let digests = sources.entries.iter().filter_map(|entry| entry.trial.digests.as_ref());
    let mut known = digests.map(|digests| digests.documents.as_str()).filter(|digest| !digest.is_empty());
    let first = known.next();
    known.any(|digest| Some(digest) != first)
}

/// Why a trial that was trained was not asked.
fn not_asked(trial: &Trial) -> Option<Line> {
    let why = trial.summary.as_ref()?.unasked.as_ref()?;
    Some(Line::default().strong(&trial.id).text(" was not asked: ").text(why))
}

fn row(score: &TaskScore, mode: &str, trial: String) -> [String; 10] {
    let difference = score.base_value.map(|base| score.value - base);
    let interval = difference.zip(score.difference_stderr).map(|(d, stderr)| {
        let reach = NORMAL_95 * stderr;
        (d - reach, d + reach)
    });
    let less_is_better = PERPLEXITIES.contains(&score.metric.as_str());
    let said = match interval {
        Some((low, high)) if low > 0.0 || high < 0.0 => {
            if (low > 0.0) == less_is_better {
                "worse"
            } else {
                "better"
            }
        }
        Some(_) => "no different, as far as this shows",
        None => NONE,
    };
    [
        score.name(),
        mode.into(),
        trial,
        score.num_fewshot.to_string(),
        score.documents.to_string(),
        or_dash(score.base_value, |value| with_error(value, score.base_stderr)),
        with_error(score.value, score.stderr),
        or_dash(difference, |difference| format!("{difference:+.4}")),
        or_dash(interval, |(low, high)| format!("{low:+.4} to {high:+.4}")),
        said.into(),
    ]
}

/// A value with its standard error.
pub(super) fn with_error(value: f64, stderr: Option<f64>) -> String {
    let stderr = stderr.map_or_else(String::new, |stderr| format!(" ± {stderr:.4}"));
    format!("{value:.4}{stderr}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_that_chance_could_make_is_none() {
        let check = |metric: &str, value: f64, stderr: Option<f64>, interval: &str, said: &str| {
            let score = TaskScore {
                task: "t".into(),
                metric: metric.into(),
                value,
                stderr: Some(0.01),
                base_value: Some(0.5),
                base_stderr: None,
                difference_stderr: stderr,
                num_fewshot: 5,
                documents: 100,
            };
            let row = row(&score, "4bit", "3".into());
            assert_eq!((row[8].as_str(), row[9].as_str()), (interval, said), "{metric} {value}");
        };
        let none = "no different, as far as this shows";
        check("acc", 0.6, Some(0.01), "+0.0804 to +0.1196", "better");
        check("acc", 0.4, Some(0.01), "-0.1196 to -0.0804", "worse");
        check("acc", 0.51, Some(0.01), "-0.0096 to +0.0296", none);
        check("bits_per_byte", 0.6, Some(0.01), "+0.0804 to +0.1196", "worse");
        check("word_perplexity", 0.4, None, NONE, NONE);
        check("acc", 0.5, Some(0.0), "+0.0000 to +0.0000", none);
    }
}
