//! The published report's six figures: memory, speed and cost by one parameter, all else held, a line for each precision mode,
//! and of each for every accelerator.

use super::super::chart::{Axis, Chart, Key, Mark, OTHERS, PALETTE, Shape};
use super::super::document::{Figure, Line, Table};
use super::super::numbers;
use super::super::slice::{
    ACCELERATOR, AGAIN, Dependence, Fact, Facts, Fixed, PRECISION, Slice, named, sorted,
};
use super::file_name;
use config::published::{Number, Published};
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};

/// A number of a trial that a figure shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Measure {
    Memory,
    Speed,
    Cost,
}

impl Measure {
    fn of(self, fact: &Fact) -> Option<f64> {
        match self {
            Self::Memory => fact.peak_memory(),
            Self::Speed => fact.speed(),
            Self::Cost => fact.cost(),
        }
    }

    fn dependence(self) -> Dependence {
        match self {
            Self::Memory | Self::Speed => Dependence::Step,
            Self::Cost => Dependence::Run,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Memory => "Peak memory",
            Self::Speed => "Speed",
            Self::Cost => "Cost of a run",
        }
    }

    fn show(self, value: f64) -> String {
        match self {
            Self::Memory => numbers::bytes(value as u64),
            Self::Speed => format!("{} rows/s", numbers::number(value)),
            Self::Cost => numbers::usd(value),
        }
    }

    /// What several trials of one configuration come to: the most of their bytes, the mean of the rest.
    fn join(self, values: &[f64]) -> f64 {
        match self {
            Self::Memory => values.iter().copied().fold(0.0, f64::max),
            Self::Speed | Self::Cost => values.iter().sum::<f64>() / values.len() as f64,
        }
    }
}

/// The figures, in the published order: what is shown, and by which parameter; the first that has several values.
const FIGURES: [(Measure, &[&str]); 6] = [
    (Measure::Memory, &["batch_size"]),
    (Measure::Memory, &["lora_rank"]),
    (Measure::Memory, &["max_sequence_length"]),
    (Measure::Speed, &["lora_rank"]),
    (Measure::Speed, &["max_sequence_length"]),
    (Measure::Cost, &[ACCELERATOR, PRECISION]),
];

/// Those of them for which there are trials; with what was `published` of the same base.
pub(in super::super) fn figures(facts: &Facts, published: Option<&Published>) -> Vec<Figure> {
    let (mut figures, mut held) = (Vec::new(), Vec::new());
    for (measure, by) in FIGURES {
        // What a run costs is told of what the figures before it hold, where that was run, so that all are of one
        // configuration.
        let usual: &[Fixed] = if measure == Measure::Cost { &held } else { &[] };
        let shown = |usual| by.iter().find_map(|by| figure(facts, published, measure, by, usual));
        let Some((figure, fixed)) = shown(usual).or_else(|| shown(&[])) else { continue };
        figures.push(figure);
        for (name, value) in fixed {
            let moves_a_step = measure != Measure::Cost && !held.iter().any(|(known, _)| *known == name);
            held.extend(moves_a_step.then_some((name, value)));
        }
    }
    figures
}

/// What an axis by a parameter is called, with its unit.
pub(super) fn axis_name(by: &str) -> String {
    let name = by.replace('_', " ");
    match by {
        "batch_size" => format!("{name}, rows"),
        "max_sequence_length" => format!("{name}, tokens"),
        _ => name,
    }
}

/// Published numbers of what a figure holds: the value of the parameter that it is by, and the number.
fn published_places(published: &Published, slice: &Slice, measure: Measure, by: &str) -> Vec<(Value, f64)> {
    let (numbers, unit) = match measure {
        Measure::Memory => (&published.peak_memory, 1e9),
        Measure::Speed => (&published.speed, 1.0),
        Measure::Cost => (&published.cost, 1.0),
    };
    let Some(first) = slice.facts.first() else { return Vec::new() };
    let place = |number: &Number| {
        let setting = number.setting(&published.usual);
        let is_here = slice.facts.iter().any(|fact| fact.get(ACCELERATOR) == setting.accelerator.as_str());
        let held = [
            ("batch_size", json!(setting.batch_size)),
            ("lora_rank", json!(setting.lora_rank)),
            ("max_sequence_length", json!(setting.max_sequence_length)),
            (ACCELERATOR, json!(setting.accelerator)),
            (PRECISION, json!(number.precision_mode)),
        ];
        let same = held[..3].iter().all(|(name, value)| *name == by || first.get(name) == value);
        let as_long = measure != Measure::Cost
            || first.trial.config_in_force().max_steps.map(u64::from) == Some(published.usual.max_steps);
        let (_, at) = held.into_iter().find(|(name, _)| *name == by)?;
        let value = number.value.filter(|_| is_here && same && as_long)?;
        Some((at, value * unit))
    };
    numbers.iter().filter_map(place).collect()
}

/// The parameters whose values have lines of their own; so have those of [`AGAIN`].
fn lines_of(facts: &Facts, by: &str) -> Vec<&'static str> {
    match by {
        PRECISION => vec![ACCELERATOR],
        ACCELERATOR => vec![PRECISION],
        _ if facts.has_several(ACCELERATOR) => vec![PRECISION, ACCELERATOR],
        _ => vec![PRECISION],
    }
}

/// What a line is of, as people read it.
fn named_lines(facts: &Facts, by: &str) -> String {
    lines_of(facts, by).join(", ")
}

/// The name of a trial's line.
fn line_of(facts: &Facts, fact: &Fact, by: &str) -> String {
    let names = lines_of(facts, by).into_iter().map(|name| numbers::value(fact.get(name)));
    let name = names.collect::<Vec<_>>().join(", ");
    match fact.get(AGAIN) {
        _ if !facts.varies(AGAIN) => name,
        Value::Bool(false) => name,
        Value::Bool(true) => format!("{name}, recomputed"),
        other => format!("{name}, {}", numbers::value(other)),
    }
}

/// How high a row of what does not fit is, as a part of the axis.
const STRIP_ROW: f64 = 0.07;

/// What became of a configuration.
#[derive(Debug, PartialEq)]
enum Outcome {
    /// So much, of so many trials.
    Measured(f64, usize),
    /// It needs so many bytes.
    DoesNotFit(u64),
}

/// A place in a figure: where it stands, on which line, and what was found.
struct Place<'a> {
    by: &'a Value,
    series: String,
    outcome: Outcome,
    recomputed: Option<u64>,
}

fn figure(
    facts: &Facts,
    published: Option<&Published>,
    measure: Measure,
    by: &'static str,
    usual: &[Fixed],
) -> Option<(Figure, Vec<Fixed>)> {
    let known = |fact: &Fact| measure.of(fact).is_some() || fact.does_not_fit();
    let standing = |solo: bool| {
        let is_usual = |fact: &Fact| usual.iter().all(|(name, value)| name == by || fact.get(name) == value);
        let counts = |fact: &Fact| known(fact) && (!solo || fact.is_solo()) && is_usual(fact);
        let free: Vec<_> = [by].into_iter().chain(lines_of(facts, by)).chain([AGAIN]).collect();
        let slice = facts.slice(&free, measure.dependence(), counts)?;
        let places = places(facts, &slice, measure, by);
        let has_numbers = places.iter().any(|place| matches!(place.outcome, Outcome::Measured(..)));
        let several = sorted(places.iter().map(|place| place.by)).len() > 1;
        (has_numbers && several).then_some((slice, places))
    };
    let (slice, places) = standing(true).or_else(|| standing(false))?;
    let packed = slice.facts.iter().any(|fact| !fact.is_solo());
    let by_name = by.replace('_', " ");
    let title = format!("{} by {by_name}", measure.name());

    let unfit = places.iter().filter(|place| matches!(place.outcome, Outcome::DoesNotFit(_))).count();
    let mut caption = Line::default().strong(&title).text(". ");
    caption = caption.text(match named(&slice.fixed).as_str() {
        "" => "No other parameter that moves it differs".to_string(),
        held => format!("Held: {held}"),
    });
    caption = caption.text(match (packed, measure) {
        (false, _) => "; each trial alone on its device.",
        (true, Measure::Memory) => "; packed: trials shared devices, bytes are attributed to them.",
        (true, _) => "; packed: trials shared devices.",
    });
    if unfit > 0 {
        caption = caption.text(" ×: does not fit.");
    }
    let published =
        published.map_or_else(Vec::new, |published| published_places(published, &slice, measure, by));
    if !published.is_empty() {
        caption = caption.text(" Grey rings: what was published, LoRA in float16 and QLoRA in 4bit.");
    }
    let figure = Figure {
        name: file_name(&title),
        description: format!("{title}, a line for each {}", named_lines(facts, by).replace('_', " ")),
        chart: chart(&slice, &places, &published, measure, by),
        caption,
        data: Some(data(&places, measure, by, &named_lines(facts, by))),
    };
    Some((figure, slice.fixed))
}

/// The places of a slice, by parameter, then by precision.
fn places<'f>(facts: &Facts, slice: &Slice<'_, 'f>, measure: Measure, by: &str) -> Vec<Place<'f>> {
    let mut places = Vec::new();
    let named: Vec<_> = slice.facts.iter().map(|fact| (line_of(facts, fact, by), *fact)).collect();
    let series: BTreeSet<_> = named.iter().map(|(name, _)| name).collect();
    for value in sorted(slice.facts.iter().map(|fact| fact.get(by))) {
        for name in &series {
            let here = || {
                let here = named.iter().filter(|(line, fact)| line == *name && fact.get(by) == value);
                here.map(|(_, fact)| fact)
            };
            let values: Vec<_> = here().filter_map(|fact| measure.of(fact)).collect();
            let outcome = match values.as_slice() {
                [] if here().next().is_none() => continue,
                [] => {
                    let needed = here().filter_map(|fact| Some(fact.shortage()?.needed())).max();
                    Outcome::DoesNotFit(needed.unwrap_or_default())
                }
                values => Outcome::Measured(measure.join(values), values.len()),
            };
            let recomputed = here().filter_map(|fact| fact.recomputed_layers()).max();
            places.push(Place { by: value, series: (*name).clone(), outcome, recomputed });
        }
    }
    places
}

fn data(places: &[Place], measure: Measure, by: &str, lines: &str) -> Table {
    let again = places.iter().any(|place| place.recomputed.is_some_and(|layers| layers > 0));
    let mut head = vec![by, lines, measure.name(), "trials"];
    head.extend(again.then_some("layers computed again"));
    let mut table = Table::new(head);
    for place in places {
        let (value, trials) = match &place.outcome {
            Outcome::Measured(value, trials) => (measure.show(*value), trials.to_string()),
            Outcome::DoesNotFit(needed) => {
                (format!("does not fit: needs {}", numbers::bytes(*needed)), numbers::NONE.into())
            }
        };
        let mut cells = vec![numbers::value(place.by), place.series.clone(), value, trials];
        cells.extend(again.then(|| numbers::or_dash(place.recomputed, |layers| layers.to_string())));
        table.row(cells);
    }
    table
}

fn chart(slice: &Slice, places: &[Place], published: &[(Value, f64)], measure: Measure, by: &str) -> Chart {
    let values = sorted(places.iter().map(|place| place.by));
    let series: BTreeSet<_> = places.iter().map(|place| place.series.as_str()).collect();
    let numeric: Option<Vec<f64>> = values.iter().map(|value| value.as_f64()).collect();
    let names: Vec<_> = values.iter().map(|value| numbers::value(value)).collect();
    // Lines of their own do not hide each other where places have names instead of numbers.
    let beside = |line: usize| (line as f64 - (series.len() - 1) as f64 / 2.0) * 0.16;
    let x_of = |place: &Place, line: usize| match &numeric {
        Some(_) => place.by.as_f64().unwrap_or_default(),
        None => values.iter().position(|value| *value == place.by).unwrap_or(0) as f64 + beside(line),
    };

    let measured = places.iter().filter_map(|place| match place.outcome {
        Outcome::Measured(value, _) => Some(value),
        Outcome::DoesNotFit(_) => None,
    });
    let highest = measured.chain(published.iter().map(|(_, value)| *value)).fold(0.0, f64::max);
    let is_unfit = |place: &&Place| matches!(place.outcome, Outcome::DoesNotFit(_));
    let unfit: BTreeSet<_> = places.iter().filter(is_unfit).map(|place| place.series.as_str()).collect();
    let limits = if !unfit.is_empty() && measure == Measure::Memory { memories(slice) } else { Vec::new() };
    let limit = limits.iter().copied().reduce(f64::max);
    let (unit, unit_name) = match measure {
        Measure::Memory => numbers::byte_unit(highest.max(limit.unwrap_or(0.0))),
        Measure::Speed => (1.0, "rows/s"),
        Measure::Cost => (1.0, "US dollars"),
    };
    let heights = [highest / unit, limit.unwrap_or(0.0) / unit];
    // What does not fit stands in a strip above all numbers, a row for each line: the table says what it needs.
    let y = Axis::from_zero(heights.into_iter());
    let top = y.end();
    let row = |line: &str| unfit.iter().position(|name| *name == line).unwrap_or_default() as f64;
    let above = |rows: f64| top * (1.0 + STRIP_ROW * rows);

    let mut marks = Vec::new();
    let mut legend = Vec::new();
    marks.extend(limits.iter().map(|bytes| Mark::Level { y: bytes / unit }));
    for (line, name) in series.iter().enumerate() {
        let (colour, shape) = (PALETTE[line % PALETTE.len()], Shape::of(line));
        legend.push((Key::Dot(colour, shape), (*name).to_string()));
        let of_it: Vec<_> = places.iter().filter(|place| place.series == *name).collect();
        let points = of_it.iter().filter_map(|place| match place.outcome {
            Outcome::Measured(value, _) => Some((x_of(place, line), value / unit)),
            Outcome::DoesNotFit(_) => None,
        });
        let points: Vec<_> = points.collect();
        if numeric.is_some() {
            marks.push(Mark::Line { points: points.clone(), colour, width: 4 });
        }
        marks.extend(points.iter().map(|&(x, y)| Mark::Dot { x, y, colour, full: true, size: 10, shape }));
        let crosses = of_it.into_iter().filter(is_unfit);
        marks.extend(crosses.map(|place| Mark::Cross {
            x: x_of(place, line),
            y: above(row(name) + 0.6),
            colour,
        }));
    }
    for (at, value) in published {
        let x = match &numeric {
            Some(_) => at.as_f64(),
            None => values.iter().position(|value| *value == at).map(|place| place as f64),
        };
        // Of a value that no trial has there is no place.
        let x = x.filter(|_| values.contains(&at));
        let y = value / unit;
        marks.extend(x.map(|x| Mark::Dot {
            x,
            y,
            colour: OTHERS,
            full: false,
            size: 12,
            shape: Shape::Circle,
        }));
    }
    if !unfit.is_empty() {
        legend.push((Key::Cross, "does not fit".into()));
    }
    let whose = if limits.len() > 1 { "each device's memory" } else { "the device's memory" };
    legend.extend(limit.map(|_| (Key::Dashed, whose.into())));
    legend.extend((!published.is_empty()).then(|| (Key::Ring, "published".into())));
    Chart {
        x: numeric.as_ref().map_or_else(|| Axis::categories(&names), |values| Axis::chosen(values)),
        y: y.up_to(above(unfit.len() as f64)),
        titles: (axis_name(by), format!("{}, {unit_name}", measure.name())),
        legend,
        marks,
    }
}

/// The bytes of the accelerators of a slice, each once: those of the largest device.
fn memories(slice: &Slice) -> Vec<f64> {
    let mut most: BTreeMap<&str, u64> = BTreeMap::new();
    for device in slice.facts.iter().filter_map(|fact| fact.trial.device.as_ref()) {
        let bytes = most.entry(&device.accelerator).or_default();
        *bytes = device.memory_bytes.max(*bytes);
    }
    most.into_values().map(|bytes| bytes as f64).collect()
}

#[cfg(test)]
mod tests;
