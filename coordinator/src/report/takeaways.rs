//! Key takeaways: sentences computed from the trials. What one parameter does is said of pairs of trials that differ in
//! it alone, and causes are kept apart: bytes, seconds and dollars are compared between trials that were alone on
//! their devices and computed as many layers again. Without a pair there is no sentence. A difference in the sweep's metric has
//! an interval where more is known of it than one pair of values, and is none where that holds 0.

use super::document::{Block, Line};
use super::figures::accuracy::method;
use super::numbers;
use super::quality::{self, Difference};
use super::slice::{ACCELERATOR, AGAIN, Contrasts, Dependence, Fact, Facts, PRECISION, named, sorted};
use super::{Sources, evaluations};
use domain::sweep::Goal;
use serde_json::Value;
use std::collections::BTreeSet;

/// What is compared, and how it is said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Measure {
    Memory,
    /// In rows.
    Speed,
    /// In tokens: rows of other lengths are no measure of speed.
    Tokens,
    Cost,
    Quality,
}

/// What takes bytes, seconds and dollars.
const PRICES: [Measure; 3] = [Measure::Memory, Measure::Speed, Measure::Cost];
const MEASURES: [Measure; 4] = [Measure::Memory, Measure::Speed, Measure::Cost, Measure::Quality];

/// Parameters whose values are compared two by two, and in what: layers that are computed again and another accelerator change
/// nothing that is learned, nor an accelerator the bytes.
const CAUSES: [(&str, &[Measure]); 3] =
    [(PRECISION, &MEASURES), (AGAIN, &PRICES), (ACCELERATOR, &[Measure::Speed, Measure::Cost])];

/// Parameters of which the ends are compared, and in what: a run with another batch or length sees other rows, so that
/// its dollars and its quality are no matter of the parameter alone.
const RANGES: [(&str, &[Measure]); 3] = [
    ("batch_size", &[Measure::Memory, Measure::Speed]),
    ("lora_rank", &MEASURES),
    ("max_sequence_length", &[Measure::Memory, Measure::Tokens]),
];

/// The sentences: what the published report's takeaways are of, and the rest.
#[derive(Default)]
pub(super) struct Takeaways {
    pub(super) key: Vec<Line>,
    pub(super) more: Vec<Line>,
}

/// The section: the rest on demand.
pub(super) fn blocks(sources: &Sources) -> Vec<Block> {
    let Takeaways { key, more } = takeaways(sources);
    let list = |lines: Vec<Line>| (!lines.is_empty()).then_some(Block::List(lines));
    match (key.is_empty(), more.is_empty()) {
        (true, _) => list(more).into_iter().collect(),
        (false, true) => list(key).into_iter().collect(),
        (false, false) => {
            let rest = Block::Details("More takeaways".into(), list(more).into_iter().collect());
            list(key).into_iter().chain([rest]).collect()
        }
    }
}

/// The sentences, the widest question first.
pub(super) fn takeaways(sources: &Sources) -> Takeaways {
    let mut all = Takeaways::default();
    for (parameter, measures) in CAUSES {
        let contrast = Contrast { sources, parameter, trials: sources.facts.contrasts(parameter) };
        let values = contrast.trials.values();
        for (i, a) in values.iter().enumerate() {
            for b in &values[i + 1..] {
                let (a, b) = if comes_first(parameter, a, b) { (*a, *b) } else { (*b, *a) };
                for measure in measures {
                    let is_key = parameter == PRECISION && *measure != Measure::Quality;
                    let lines = if is_key { &mut all.key } else { &mut all.more };
                    lines.extend(contrast.compared(*measure, a, b));
                }
            }
        }
    }
    all.key.extend(accuracies(sources));
    for (parameter, measures) in RANGES {
        let contrast = Contrast { sources, parameter, trials: sources.facts.contrasts(parameter) };
        let values = contrast.trials.values();
        all.more.extend(measures.iter().filter_map(|measure| {
            // The two ends, or what lies nearest to them of which there is a pair.
            let ends = values.iter().enumerate();
            let mut ends = ends.flat_map(|(i, a)| values[i + 1..].iter().rev().map(move |b| (*a, *b)));
            ends.find_map(|(a, b)| contrast.compared(*measure, a, b))
        }));
    }
    for parameter in ["max_sequence_length", "batch_size"] {
        for (recomputed, line) in limits(&sources.facts, parameter) {
            if recomputed { all.more.push(line) } else { all.key.push(line) }
        }
    }
    all
}

/// What the adapters of each precision mode make of the mean of a preset's tasks: against their base, and against each other.
fn accuracies(sources: &Sources) -> Vec<Line> {
    let means = evaluations::means(sources);
    let mut lines = Vec::new();
    let points = |value: f64| numbers::minus(&format!("{:+.1}", 100.0 * value));
    let sure = |of: &evaluations::Gap| match of.interval {
        Some((low, high)) => format!("95 % interval {} to {} points, {}", points(low), points(high), of.by),
        None => "nothing is known of how sure that is".into(),
    };
    for mean in &means {
        let Some(gap) = &mean.against_base else { continue };
        let (of, task) = (method(&mean.mode), &mean.task);
        let said = match gap.said {
            evaluations::NO_DIFFERENCE => {
                format!("No difference shown between {of} and its base in the mean of {task}")
            }
            _ => {
                let direction = if gap.value < 0.0 { "lowers" } else { "raises" };
                format!("{of}, {direction} the mean of {task} by {:.1} points", 100.0 * gap.value.abs())
            }
        };
        let text = format!(
            " ({:.4} → {:.4}; {}; trial {}).",
            mean.value - gap.value,
            mean.value,
            sure(gap),
            mean.trial
        );
        lines.push(Line::default().strong(said).text(text));
    }
    for mean in &means {
        for (other, gap) in &mean.against_others {
            let (a, b, task) = (method(&mean.mode), method(other), &mean.task);
            let said = match gap.said {
                evaluations::NO_DIFFERENCE => {
                    format!("No difference shown between {a} and {b} in the mean of {task}")
                }
                _ => {
                    let side = if gap.value < 0.0 { "below" } else { "above" };
                    format!(
                        "{a}, ends {:.1} points {side} {b}, in the mean of {task}",
                        100.0 * gap.value.abs()
                    )
                }
            };
            lines.push(Line::default().strong(said).text(format!(
                " ({} points; {}).",
                points(gap.value),
                sure(gap)
            )));
        }
    }
    lines
}

/// A parameter, and the trials that differ in it alone.
struct Contrast<'s> {
    sources: &'s Sources<'s>,
    parameter: &'static str,
    trials: Contrasts<'s, 's>,
}

/// Whether `a` is what `b` is compared with: more bits are the usual case, and so is computing nothing again.
fn comes_first(parameter: &str, a: &Value, b: &Value) -> bool {
    const BITS: [&str; 4] = ["float32", "float16", "bfloat16", "4bit"];
    let rank = |value: &Value| match parameter {
        PRECISION => BITS.iter().position(|name| value.as_str() == Some(*name)).unwrap_or(BITS.len()),
        _ => usize::from(value.as_bool() == Some(true)),
    };
    rank(a) <= rank(b)
}

impl Measure {
    fn of(self, sources: &Sources, fact: &Fact) -> Option<f64> {
        let solo = |value: Option<f64>| value.filter(|value| fact.is_solo() && *value > 0.0);
        match self {
            Self::Memory => solo(fact.peak_memory()),
            Self::Speed => solo(fact.speed()),
            Self::Tokens => solo(fact.tokens_per_second()),
            Self::Cost => solo(fact.cost()),
            Self::Quality => quality::value(sources, fact),
        }
    }

    /// `b` against `a`, of which the measure is `ratio` times as much.
    fn say(self, sources: &Sources, [b, a]: [&str; 2], ratio: f64) -> String {
        let change = numbers::change(ratio);
        let more = ratio > 1.0;
        let word = |yes: &'static str, no: &'static str| if more { yes } else { no };
        if change == "0 %" {
            return match self {
                Self::Memory => format!("{b} needs as much memory as {a}"),
                Self::Speed => format!("{b} is as fast as {a}"),
                Self::Tokens => format!("{b} trains as many tokens a second as {a}"),
                Self::Cost => format!("{b} costs as much as {a}"),
                Self::Quality => format!("{b} ends at the {} of {a}", sources.sweep.spec.search.metric),
            };
        }
        if ratio >= 2.0 && self != Self::Quality {
            let times = format!("{} times", numbers::number((ratio * 10.0).round() / 10.0));
            return match self {
                Self::Memory => format!("{b} needs {times} the memory of {a}"),
                Self::Speed => format!("{b} is {times} as fast as {a}"),
                Self::Tokens => format!("{b} trains {times} as many tokens a second as {a}"),
                Self::Cost | Self::Quality => format!("{b} costs {times} as much as {a}"),
            };
        }
        match self {
            Self::Memory => format!("{b} needs {change} {} memory than {a}", word("more", "less")),
            Self::Speed => format!("{b} is {change} {} than {a}", word("faster", "slower")),
            Self::Tokens => format!("{b} trains {change} {} tokens a second than {a}", word("more", "fewer")),
            Self::Cost => format!("{b} costs {change} {} than {a}", word("more", "less")),
            Self::Quality => {
                let search = &sources.sweep.spec.search;
                let better = match search.goal {
                    Goal::Minimize => !more,
                    Goal::Maximize => more,
                };
                let (direction, judged) = (word("higher", "lower"), if better { "better" } else { "worse" });
                format!("{b} ends with a {change} {direction}, so {judged}, {} than {a}", search.metric)
            }
        }
    }

    /// What the measure is of both sides of a pair: `28 GB → 7.3 GB`.
    fn told(self, sources: &Sources, from: &Fact, to: &Fact) -> Option<String> {
        let both = |of: &dyn Fn(&Fact) -> Option<String>| Some(format!("{} → {}", of(from)?, of(to)?));
        match self {
            Self::Memory => both(&|fact| Some(numbers::bytes(fact.peak_memory()? as u64))),
            Self::Speed => {
                both(&|fact| Some(numbers::number(fact.step_seconds()?))).map(|said| said + " s a step")
            }
            Self::Tokens => {
                let tokens = |fact: &Fact| Some(numbers::count(fact.tokens_per_second()?.round() as u64));
                both(&tokens).map(|said| said + " tokens/s")
            }
            Self::Cost => both(&|fact| Some(numbers::usd(fact.cost()?))),
            Self::Quality => both(&|fact| Some(numbers::loss(quality::value(sources, fact)?))),
        }
    }
}

impl Contrast<'_> {
    /// What changing the parameter alone from `a` to `b` does, if there are pairs.
    fn compared(&self, measure: Measure, a: &Value, b: &Value) -> Option<Line> {
        let Self { sources, parameter, trials } = self;
        let pairs = trials.pairs(a, b);
        let unfit = pairs.iter().filter(|(from, to)| from.does_not_fit() || to.does_not_fit()).count();
        let measured = pairs
            .into_iter()
            .filter_map(|(from, to)| Some((from, to, measure.of(sources, to)? / measure.of(sources, from)?)));
        // What is recomputed is a cause of its own, unless it is the one that is looked at.
        let mixed = |from: &Fact, to: &Fact| {
            measure != Measure::Quality
                && *parameter != AGAIN
                && from.recomputed_layers() != to.recomputed_layers()
        };
        let (left_out, mut ratios): (Vec<_>, Vec<_>) = measured.partition(|(from, to, _)| mixed(from, to));
        ratios.sort_by(|x, y| x.2.total_cmp(&y.2));
        let (first, last) = (ratios.first()?, ratios.last()?);
        let middle = median(&ratios.iter().map(|(.., ratio)| *ratio).collect::<Vec<_>>())?;

        let name = |value: &Value| match *parameter {
            PRECISION | ACCELERATOR => numbers::value(value),
            _ => format!("{parameter} {}", numbers::value(value)),
        };
        let sides = [name(b), name(a)];
        let pairs: Vec<_> = ratios.iter().map(|(from, to, _)| (*from, *to)).collect();
        let compares = measure == Measure::Quality;
        let known = compares.then(|| Difference::of(sources, parameter, &pairs)).flatten();
        let said = match known.as_ref().is_some_and(Difference::is_none) {
            true => {
                let metric = &sources.sweep.spec.search.metric;
                format!("No difference in {metric} shown between {} and {}", sides[0], sides[1])
            }
            false => measure.say(sources, [&sides[0], &sides[1]], middle),
        };
        let told = |(from, to, _): &(&Fact, &Fact, f64)| measure.told(sources, from, to);
        let mut line = Line::default();
        line = match ratios.len() {
            1 => {
                let both = told(first).map_or_else(String::new, |both| format!("{both}; "));
                line.strong(format!("{said} at {}", place(&sources.facts, first.1, parameter)))
                    .text(format!(" ({both}1 pair)."))
            }
            pairs => {
                let end = |pair: &(&Fact, &Fact, f64)| {
                    let both = told(pair).map_or_else(String::new, |both| format!("{both}, "));
                    let place = place(&sources.facts, pair.1, parameter);
                    format!("{} ({both}{place})", numbers::signed_change(pair.2))
                };
                line.strong(said).text(format!(
                    ", by the median of {pairs} pairs: from {} to {}.",
                    end(first),
                    end(last)
                ))
            }
        };
        if let Some(difference) = known {
            line = line.text(format!(" {}.", difference.said()));
        }
        match left_out.len() {
            0 => {}
            1 => line = line.text(" 1 pair is left out: one of the two computed more layers again."),
            n => {
                line =
                    line.text(format!(" {n} pairs are left out: one of the two computed more layers again."))
            }
        }
        // Those that are left fit, and may not be typical.
        match unfit {
            0 => {}
            _ if measure == Measure::Quality => {}
            1 => line = line.text(" In 1 more, one of the two does not fit."),
            n => line = line.text(format!(" In {n} more, one of the two does not fit.")),
        }
        Some(line)
    }
}

/// Where a pair stands, by what matters most beside the parameter that is compared: `batch 2 × 512`, and the precision
/// where that differs within the sweep.
fn place(facts: &Facts, fact: &Fact, parameter: &str) -> String {
    let batch = numbers::value(fact.get("batch_size"));
    let length = numbers::value(fact.get("max_sequence_length"));
    let place = match parameter {
        "batch_size" => format!("{length} tokens"),
        "max_sequence_length" => format!("batch {batch}"),
        _ => format!("batch {batch} × {length}"),
    };
    let place = match parameter {
        AGAIN => place,
        _ if facts.varies(AGAIN) && fact.get(AGAIN) == &Value::Bool(true) => format!("{place}, recomputed"),
        _ => place,
    };
    match parameter {
        PRECISION => place,
        _ if facts.varies(PRECISION) => format!("{}, {place}", numbers::value(fact.get(PRECISION))),
        _ => place,
    }
}

/// The middle of sorted values, or the mean of the two in the middle.
fn median(sorted: &[f64]) -> Option<f64> {
    let (low, high) = (sorted.get(sorted.len().checked_sub(1)? / 2)?, sorted.get(sorted.len() / 2)?);
    Some((low + high) / 2.0)
}

/// The largest values that fit and the smallest above them that do not, for each accelerator and precision mode, recomputed or
/// not, of which something does not; with whether it is recomputed.
fn limits(facts: &Facts, parameter: &str) -> Vec<(bool, Line)> {
    let known = |fact: &Fact| fact.does_not_fit() || (fact.is_solo() && fact.peak_memory().is_some());
    let Some(slice) = facts.slice(&[parameter, PRECISION, AGAIN, ACCELERATOR], Dependence::Step, known)
    else {
        return Vec::new();
    };
    let mut held = named(&slice.fixed);
    if !held.is_empty() {
        held = format!(" ({held})");
    }
    let mut lines = Vec::new();
    let modes = sorted(slice.facts.iter().map(|fact| fact.get(PRECISION)));
    let again = sorted(slice.facts.iter().map(|fact| fact.get(AGAIN)));
    // Of trials of an earlier version it is not known.
    let accelerators: BTreeSet<_> = slice.facts.iter().map(|fact| fact.get(ACCELERATOR).as_str()).collect();
    let kinds = modes.iter().flat_map(|mode| again.iter().map(move |again| (*mode, *again)));
    let kinds = kinds.flat_map(|(mode, again)| accelerators.iter().map(move |on| (mode, again, *on)));
    for (mode, again, accelerator) in kinds {
        let is_it = |fact: &&&Fact| {
            let on = fact.get(ACCELERATOR).as_str();
            fact.get(PRECISION) == mode && fact.get(AGAIN) == again && on == accelerator
        };
        let of_it = || slice.facts.iter().filter(is_it);
        let fit = of_it().filter(|fact| !fact.does_not_fit()).max_by(|a, b| by_number(a, b, parameter));
        let above = |unfit: &&&Fact| fit.is_none_or(|fit| by_number(unfit, fit, parameter).is_gt());
        let unfit = of_it().filter(|fact| fact.does_not_fit()).filter(above);
        let Some(unfit) = unfit.min_by(|a, b| by_number(a, b, parameter)) else { continue };
        let is_recomputed = *again == Value::Bool(true);
        let recomputed = match (facts.varies(AGAIN), again) {
            (true, Value::Bool(true)) => ", recomputed,",
            (true, Value::Bool(false)) => ", not recomputed,",
            _ => "",
        };
        let on = accelerator.filter(|_| facts.has_several(ACCELERATOR));
        let on = on.map_or_else(String::new, |accelerator| format!(" on {accelerator}"));
        let mut mode = numbers::value(mode) + recomputed + &on;
        // The comma that ends an insertion ends it before what follows, too.
        if on.is_empty() && !held.is_empty() {
            mode = mode.trim_end_matches(',').into();
        }
        let value = |fact: &Fact| numbers::value(fact.get(parameter));
        let lacks = unfit.shortage().map_or_else(String::new, |lacked| {
            format!(", which needs {} of {}", numbers::bytes(lacked.needed()), numbers::bytes(lacked.device))
        });
        let said = match fit {
            Some(fit) => format!("{mode}{held} fits up to {parameter} {}, not {}", value(fit), value(unfit)),
            None => format!("{mode}{held} does not fit, even at {parameter} {}", value(unfit)),
        };
        lines.push((is_recomputed, Line::default().strong(said).text(format!("{lacks}."))));
    }
    lines
}

fn by_number(a: &Fact, b: &Fact, parameter: &str) -> std::cmp::Ordering {
    let number = |fact: &Fact| fact.get(parameter).as_f64().unwrap_or(f64::NAN);
    number(a).total_cmp(&number(b))
}

#[cfg(test)]
mod tests;
