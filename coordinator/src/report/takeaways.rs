//! Key takeaways: sentences computed from the trials. What one parameter does is said of pairs of trials that differ in
//! it alone, and causes are kept apart: bytes, seconds and dollars are compared between trials that were alone on
//! their devices and computed as many layers again. Without a pair there is no sentence.

use super::Sources;
use super::document::Line;
use super::numbers;
use super::slice::{ACCELERATOR, AGAIN, Contrasts, Dependence, Fact, Facts, PRECISION, named, sorted};
use domain::metric::LOSS;
use domain::sweep::Goal;
use domain::trial::TrialState;
use serde_json::Value;

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

const MEASURES: [Measure; 4] = [Measure::Memory, Measure::Speed, Measure::Cost, Measure::Quality];

/// Parameters of which the ends are compared, and in what: a run with another batch or length sees other rows, so that
/// its dollars and its quality are no matter of the parameter alone.
const RANGES: [(&str, &[Measure]); 3] = [
    ("batch_size", &[Measure::Memory, Measure::Speed]),
    ("lora_rank", &MEASURES),
    ("max_sequence_length", &[Measure::Memory, Measure::Tokens]),
];

/// The sentences, the widest question first.
pub(super) fn takeaways(sources: &Sources) -> Vec<Line> {
    let mut lines = Vec::new();
    for parameter in [PRECISION, AGAIN, ACCELERATOR] {
        let contrast = Contrast { sources, parameter, trials: sources.facts.contrasts(parameter) };
        let values = contrast.trials.values();
        for (i, a) in values.iter().enumerate() {
            for b in &values[i + 1..] {
                let (a, b) = if comes_first(parameter, a, b) { (*a, *b) } else { (*b, *a) };
                lines.extend(MEASURES.iter().filter_map(|measure| contrast.compared(*measure, a, b)));
            }
        }
    }
    for (parameter, measures) in RANGES {
        let contrast = Contrast { sources, parameter, trials: sources.facts.contrasts(parameter) };
        let values = contrast.trials.values();
        lines.extend(measures.iter().filter_map(|measure| {
            // The two ends, or what lies nearest to them of which there is a pair.
            let ends = values.iter().enumerate();
            let mut ends = ends.flat_map(|(i, a)| values[i + 1..].iter().rev().map(move |b| (*a, *b)));
            ends.find_map(|(a, b)| contrast.compared(*measure, a, b))
        }));
    }
    for parameter in ["batch_size", "max_sequence_length"] {
        lines.extend(limits(&sources.facts, parameter));
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
            // Another metric is said as what it is, by its own measure.
            Self::Quality => {
                let metric = sources.sweep.spec.search.metric.as_str();
                let value = sources
                    .entry(fact.trial)?
                    .0
                    .value
                    .filter(|_| metric.ends_with(LOSS) || metric.starts_with("eval/"));
                value.filter(|value| *value > 0.0 && fact.trial.state == TrialState::Completed)
            }
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

    /// How a single pair is told beside others: by a sign.
    fn sign(ratio: f64) -> String {
        let change = numbers::change(ratio);
        if change == "0 %" { change } else { format!("{}{change}", if ratio > 1.0 { '+' } else { '−' }) }
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
        let said = measure.say(sources, [&sides[0], &sides[1]], middle);
        let mut line = Line::default();
        line = match ratios.len() {
            1 => line
                .strong(format!("{said} at {}", place(&sources.facts, first.1, parameter)))
                .text(" (1 pair)."),
            pairs => line.strong(said).text(format!(
                " (the median of {pairs} pairs: {} at {}, {} at {}).",
                Measure::sign(first.2),
                place(&sources.facts, first.1, parameter),
                Measure::sign(last.2),
                place(&sources.facts, last.1, parameter)
            )),
        };
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

/// The largest values that fit and the smallest above them that do not, for each precision mode, recomputed or not, of
/// which something does not.
fn limits(facts: &Facts, parameter: &str) -> Vec<Line> {
    let known = |fact: &Fact| fact.does_not_fit() || (fact.is_solo() && fact.peak_memory().is_some());
    let Some(slice) = facts.slice(&[parameter, PRECISION, AGAIN], Dependence::Step, known) else {
        return Vec::new();
    };
    let mut held = named(&slice.fixed);
    if !held.is_empty() {
        held = format!(" ({held})");
    }
    let mut lines = Vec::new();
    let modes = sorted(slice.facts.iter().map(|fact| fact.get(PRECISION)));
    let again = sorted(slice.facts.iter().map(|fact| fact.get(AGAIN)));
    for (mode, again) in modes.iter().flat_map(|mode| again.iter().map(move |again| (*mode, *again))) {
        let is_it = |fact: &&&Fact| fact.get(PRECISION) == mode && fact.get(AGAIN) == again;
        let of_it = || slice.facts.iter().filter(is_it);
        let fit = of_it().filter(|fact| !fact.does_not_fit()).max_by(|a, b| by_number(a, b, parameter));
        let above = |unfit: &&&Fact| fit.is_none_or(|fit| by_number(unfit, fit, parameter).is_gt());
        let unfit = of_it().filter(|fact| fact.does_not_fit()).filter(above);
        let Some(unfit) = unfit.min_by(|a, b| by_number(a, b, parameter)) else { continue };
        let recomputed = if facts.varies(AGAIN) && *again == Value::Bool(true) { ", recomputed" } else { "" };
        let mode = numbers::value(mode) + recomputed;
        let value = |fact: &Fact| numbers::value(fact.get(parameter));
        let lacks = unfit.shortage().map_or_else(String::new, |lacked| {
            format!(", which needs {} of {}", numbers::bytes(lacked.needed()), numbers::bytes(lacked.device))
        });
        let said = match fit {
            Some(fit) => format!("{mode}{held} fits up to {parameter} {}, not {}", value(fit), value(unfit)),
            None => format!("{mode}{held} does not fit, even at {parameter} {}", value(unfit)),
        };
        lines.push(Line::default().strong(said).text(format!("{lacks}.")));
    }
    lines
}

fn by_number(a: &Fact, b: &Fact, parameter: &str) -> std::cmp::Ordering {
    let number = |fact: &Fact| fact.get(parameter).as_f64().unwrap_or(f64::NAN);
    number(a).total_cmp(&number(b))
}

#[cfg(test)]
mod tests {
    use super::super::Records;
    use super::super::made::{self, float16, four_bit};
    use super::*;
    use domain::trial::Trial;

    fn said(trials: &[Trial]) -> Vec<String> {
        let sweep = made::sweep();
        let sources = Sources::of(Records { sweep: &sweep, trials, curves: &[] });
        takeaways(&sources).iter().map(Line::plain).collect()
    }

    fn check(trials: &[Trial], wanted: &[&str], unwanted: &[&str]) {
        let said = said(trials);
        for want in wanted {
            assert!(said.iter().any(|line| line == want), "{want:?} is not among {said:#?}");
        }
        for text in unwanted {
            assert!(!said.iter().any(|line| line.contains(text)), "{text:?} is in {said:#?}");
        }
    }

    #[test]
    fn without_a_pair_there_is_no_sentence() {
        check(&[], &[], &[""]);
        let trials = [
            made::measured(1, float16(2, 16, 512), 28.0, 5.0),
            made::measured(2, four_bit(4, 16, 512), 7.0, 3.0),
        ];
        check(&trials, &[], &[""]);
    }

    #[test]
    fn what_four_bits_save_and_cost() {
        let mut trials = vec![
            made::measured(1, float16(2, 16, 512), 28.0, 5.0),
            made::measured(2, four_bit(2, 16, 512), 7.28, 3.0),
        ];
        check(
            &trials,
            &[
                "4bit needs 74 % less memory than float16 at batch 2 × 512 (1 pair).",
                "4bit is 40 % slower than float16 at batch 2 × 512 (1 pair).",
                "4bit costs 67 % more than float16 at batch 2 × 512 (1 pair).",
            ],
            &["eval/loss"],
        );
        trials[0].eval_loss = Some(2.0);
        trials[1].eval_loss = Some(2.02);
        check(
            &trials,
            &["4bit ends with a 1 % higher, so worse, eval/loss than float16 at batch 2 × 512 (1 pair)."],
            &[],
        );
        trials.push(made::measured(3, float16(4, 16, 512), 40.0, 6.0));
        trials.push(made::measured(4, four_bit(4, 16, 512), 8.0, 6.0));
        check(
            &trials,
            &[
                "4bit needs 77 % less memory than float16 (the median of 2 pairs: −80 % at batch 4 × 512, −74 % at \
                 batch 2 × 512).",
                "4bit is 20 % slower than float16 (the median of 2 pairs: −40 % at batch 2 × 512, 0 % at batch 4 × 512).",
                "batch_size 4 needs 26 % more memory than batch_size 2 (the median of 2 pairs: +9.9 % at 4bit, 512 tokens, \
                 +43 % at float16, 512 tokens).",
            ],
            &[],
        );
    }

    #[test]
    fn what_is_computed_again_is_a_cause_of_its_own() {
        let mut trials = vec![
            made::measured(1, float16(2, 16, 512), 28.0, 5.0),
            made::measured(2, four_bit(2, 16, 512), 7.0, 3.0),
            made::measured(3, float16(4, 16, 512), 30.0, 5.0),
            made::measured(4, four_bit(4, 16, 512), 9.0, 4.0),
        ];
        for (trial, layers) in trials.iter_mut().zip([0, 0, 32, 0]) {
            if let Some(summary) = &mut trial.summary {
                summary.recomputed_layers = Some(layers);
            }
        }
        check(
            &trials,
            &[
                "4bit needs 75 % less memory than float16 at batch 2 × 512 (1 pair). 1 pair is left out: one of the two \
               computed more layers again.",
            ],
            &["median"],
        );
        trials.truncate(1);
        trials.push(made::measured(5, float16(2, 16, 512), 21.0, 4.0));
        trials[1].config.gradient_checkpointing = domain::trial::GradientCheckpointing::On;
        trials[0].config.gradient_checkpointing = domain::trial::GradientCheckpointing::Off;
        check(
            &trials,
            &[
                "gradient_checkpointing true needs 25 % less memory than gradient_checkpointing false at batch 2 × 512 (1 \
                 pair).",
                "gradient_checkpointing true is 20 % slower than gradient_checkpointing false at batch 2 × 512 (1 pair).",
            ],
            &[],
        );
    }

    #[test]
    fn packed_trials_say_nothing_of_memory_and_speed() {
        let mut trials = vec![
            made::packed(1, float16(2, 16, 512), 28.0, 5.0),
            made::packed(2, four_bit(2, 16, 512), 7.0, 3.0),
        ];
        trials.iter_mut().for_each(|trial| trial.eval_loss = Some(2.0));
        check(
            &trials,
            &["4bit ends at the eval/loss of float16 at batch 2 × 512 (1 pair)."],
            &["memory", "slower"],
        );
    }

    #[test]
    fn what_fits_and_what_does_not() {
        let trials = [
            made::measured(1, float16(1, 16, 512), 20.0, 5.0),
            made::measured(2, float16(2, 16, 512), 28.0, 5.0),
            made::unfit(3, float16(4, 16, 512), 45.0),
            made::unfit(4, float16(8, 16, 512), 80.0),
            made::measured(5, four_bit(8, 16, 512), 9.0, 3.0),
        ];
        check(
            &trials,
            &["float16 fits up to batch_size 2, not 4, which needs 45 GB of 41.9 GB."],
            &["4bit fits", "max_sequence_length"],
        );
        // Pairs of which one does not fit are counted; what ran out beside others is none of those.
        let mut beside_others = made::unfit(9, four_bit(1, 16, 512), 45.0);
        beside_others.failure.as_mut().unwrap().message = "ran out beside 3 others".into();
        check(
            &[&trials[..3], &[made::measured(6, four_bit(4, 16, 512), 8.0, 3.0), beside_others]].concat(),
            &["batch_size 2 needs 40 % more memory than batch_size 1 at float16, 512 tokens (1 pair)."],
            &["4bit does not fit"],
        );
        check(
            &[
                &trials[1..3],
                &[
                    made::measured(6, four_bit(2, 16, 512), 7.0, 3.0),
                    made::measured(7, four_bit(4, 16, 512), 8.0, 3.0),
                ],
            ]
            .concat(),
            &[
                "4bit needs 75 % less memory than float16 at batch 2 × 512 (1 pair). In 1 more, one of the two does not fit.",
            ],
            &[],
        );
        check(
            &[made::unfit(1, float16(1, 16, 512), 45.0), made::unfit(2, float16(2, 16, 512), 46.0)],
            &["float16 does not fit, even at batch_size 1, which needs 45 GB of 41.9 GB."],
            &[],
        );
    }

    #[test]
    fn the_middle_of_values() {
        for (sorted, want) in [
            (vec![], None),
            (vec![1.0], Some(1.0)),
            (vec![1.0, 3.0], Some(2.0)),
            (vec![1.0, 2.0, 9.0], Some(2.0)),
        ] {
            assert_eq!(median(&sorted), want);
        }
    }
}
