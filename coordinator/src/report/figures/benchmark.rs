//! The published report's six figures: memory, speed and cost by one parameter, all else held, a line for each precision mode,
//! and of each for every accelerator.

use super::super::chart::{Axis, Chart, Key, Mark, PALETTE, Shape};
use super::super::document::{Figure, Line, Table};
use super::super::numbers;
use super::super::slice::{ACCELERATOR, AGAIN, Dependence, Fact, Facts, PRECISION, Slice, named, sorted};
use super::file_name;
use serde_json::Value;
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

/// Those of them for which there are trials.
pub(in super::super) fn figures(facts: &Facts) -> Vec<Figure> {
    let first =
        |(measure, by): (Measure, &[&'static str])| by.iter().find_map(|by| figure(facts, measure, by));
    FIGURES.into_iter().filter_map(first).collect()
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

fn figure(facts: &Facts, measure: Measure, by: &'static str) -> Option<Figure> {
    let known = |fact: &Fact| measure.of(fact).is_some() || fact.does_not_fit();
    let standing = |solo: bool| {
        let counts = |fact: &Fact| known(fact) && (!solo || fact.is_solo());
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
    Some(Figure {
        name: file_name(&title),
        description: format!("{title}, a line for each {}", named_lines(facts, by).replace('_', " ")),
        chart: chart(&slice, &places, measure, by),
        caption,
        data: Some(data(&places, measure, by, &named_lines(facts, by))),
    })
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

fn chart(slice: &Slice, places: &[Place], measure: Measure, by: &str) -> Chart {
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
    let highest = measured.fold(0.0, f64::max);
    let unfit = places.iter().any(|place| matches!(place.outcome, Outcome::DoesNotFit(_)));
    let limits = if unfit && measure == Measure::Memory { memories(slice) } else { Vec::new() };
    let limit = limits.iter().copied().reduce(f64::max);
    let (unit, unit_name) = match measure {
        Measure::Memory => numbers::byte_unit(highest.max(limit.unwrap_or(0.0))),
        Measure::Speed => (1.0, "rows/s"),
        Measure::Cost => (1.0, "US dollars"),
    };
    // What needs far more than there is stands at the edge: the table has the number.
    let edge = 1.3 * highest.max(limit.unwrap_or(0.0));
    let y_of = |place: &Place| match (&place.outcome, measure) {
        (Outcome::Measured(value, _), _) => *value / unit,
        (Outcome::DoesNotFit(needed), Measure::Memory) => (*needed as f64).min(edge) / unit,
        (Outcome::DoesNotFit(_), _) => 0.0,
    };

    let mut marks = Vec::new();
    let mut legend = Vec::new();
    marks.extend(limits.iter().map(|bytes| Mark::Level { y: bytes / unit }));
    for (line, name) in series.iter().enumerate() {
        let (colour, shape) = (PALETTE[line % PALETTE.len()], Shape::of(line));
        legend.push((Key::Dot(colour, shape), (*name).to_string()));
        let of_it: Vec<_> = places.iter().filter(|place| place.series == *name).collect();
        let points = of_it.iter().filter(|place| matches!(place.outcome, Outcome::Measured(..)));
        let points: Vec<_> = points.map(|place| (x_of(place, line), y_of(place))).collect();
        if numeric.is_some() {
            marks.push(Mark::Line { points: points.clone(), colour, width: 4 });
        }
        marks.extend(points.iter().map(|&(x, y)| Mark::Dot { x, y, colour, full: true, size: 10, shape }));
        let unfit = of_it.iter().filter(|place| matches!(place.outcome, Outcome::DoesNotFit(_)));
        marks.extend(unfit.map(|place| Mark::Cross { x: x_of(place, line), y: y_of(place), colour }));
    }
    if unfit {
        legend.push((Key::Cross, "does not fit".into()));
    }
    let whose = if limits.len() > 1 { "each device's memory" } else { "the device's memory" };
    legend.extend(limit.map(|_| (Key::Dashed, whose.into())));
    let heights = places.iter().map(y_of).chain(limit.map(|bytes| bytes / unit)).collect::<Vec<_>>();
    Chart {
        x: numeric.as_ref().map_or_else(|| Axis::categories(&names), |values| Axis::chosen(values)),
        y: Axis::from_zero(heights.into_iter()),
        titles: (by.replace('_', " "), format!("{}, {unit_name}", measure.name())),
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
mod tests {
    use super::super::super::made::{self, float16, four_bit};
    use super::*;

    fn shown(trials: &[domain::trial::Trial]) -> Vec<(String, String, Vec<Vec<String>>)> {
        let facts = Facts::of(trials);
        let rows = |figure: &Figure| {
            let rows = figure.data.as_ref().map_or(&[][..], |table| &table.rows);
            rows.iter().map(|row| row.cells.iter().map(Line::plain).collect()).collect()
        };
        figures(&facts).iter().map(|f| (f.name.clone(), f.caption.plain(), rows(f))).collect()
    }

    #[test]
    fn a_parameter_with_one_value_has_no_figure() {
        let trials = [made::measured(1, four_bit(2, 16, 512), 7.0, 3.0)];
        assert!(shown(&trials).is_empty());
        assert!(shown(&[]).is_empty());
    }

    #[test]
    fn the_published_figures_with_what_does_not_fit() {
        let trials = [
            made::measured(1, float16(1, 16, 512), 20.0, 4.0),
            made::measured(2, float16(2, 16, 512), 28.0, 5.0),
            made::unfit(3, float16(4, 16, 512), 45.0),
            made::measured(4, four_bit(1, 16, 512), 6.0, 2.0),
            made::measured(5, four_bit(2, 16, 512), 7.0, 3.0),
            made::measured(6, four_bit(2, 64, 512), 8.0, 2.5),
            made::measured(7, four_bit(2, 16, 1024), 9.0, 1.5),
        ];
        let shown = shown(&trials);
        let names: Vec<_> = shown.iter().map(|(name, ..)| name.as_str()).collect();
        assert_eq!(
            names,
            [
                "peak-memory-by-batch-size",
                "peak-memory-by-lora-rank",
                "peak-memory-by-max-sequence-length",
                "speed-by-lora-rank",
                "speed-by-max-sequence-length",
                "cost-of-a-run-by-precision-mode",
            ]
        );
        let (_, caption, rows) = &shown[0];
        assert_eq!(
            caption,
            "Peak memory by batch size. Held: lora_rank 16, max_sequence_length 512; each trial alone on its device. ×: \
             does not fit."
        );
        assert_eq!(rows[4], ["4", "float16", "does not fit: needs 45 GB", "–"]);
        assert_eq!(rows[2], ["2", "4bit", "7 GB", "1"]);
        assert_eq!(rows.len(), 5);
    }

    /// The published report's two devices in one: a line for each of both.
    #[test]
    fn each_accelerator_has_lines_of_its_own() {
        let on = |accelerator: &str, gigabytes: f64, mut trial: domain::trial::Trial| {
            trial.device = Some(made::device(accelerator, gigabytes, 2.86));
            trial
        };
        let v100 = |trial| on("V100-16GB", 15.5, trial);
        let trials = [
            made::measured(1, float16(1, 16, 512), 20.0, 4.0),
            made::measured(2, float16(2, 16, 512), 28.0, 5.0),
            made::measured(3, four_bit(2, 16, 512), 7.0, 3.0),
            v100(made::unfit(4, float16(1, 16, 512), 20.0)),
            v100(made::measured(5, four_bit(1, 16, 512), 6.0, 1.0)),
            v100(made::measured(6, four_bit(2, 16, 512), 7.0, 1.5)),
            v100(made::measured(7, four_bit(2, 64, 512), 8.0, 1.2)),
        ];
        let shown = shown(&trials);
        let rows = |name: &str| -> Vec<String> {
            let (.., rows) = shown.iter().find(|(known, ..)| known == name).unwrap();
            rows.iter().map(|row| row.join(" | ")).collect()
        };
        assert_eq!(
            rows("peak-memory-by-batch-size"),
            [
                "1 | 4bit, V100-16GB | 6 GB | 1",
                "1 | float16, A100-40GB | 20 GB | 1",
                "1 | float16, V100-16GB | does not fit: needs 20 GB | –",
                "2 | 4bit, A100-40GB | 7 GB | 1",
                "2 | 4bit, V100-16GB | 7 GB | 1",
                "2 | float16, A100-40GB | 28 GB | 1",
            ]
        );
        let speeds = rows("speed-by-lora-rank");
        assert_eq!(speeds[1], "16 | 4bit, V100-16GB | 1.5 rows/s | 1", "{speeds:#?}");
        assert_eq!(rows("cost-of-a-run-by-accelerator").len(), 3);
        let figures = figures(&Facts::of(&trials));
        let levels = figures[0].chart.marks.iter().filter(|mark| matches!(mark, Mark::Level { .. }));
        assert_eq!(levels.count(), 2, "the memory of each");
        assert!(figures[0].description.ends_with("a line for each precision mode, accelerator"));
    }

    #[test]
    fn what_is_computed_again_has_a_line_of_its_own() {
        use domain::trial::GradientCheckpointing::{Off, On};
        let mut trials = Vec::new();
        for (number, (batch, again, gigabytes)) in (1..).zip([(1, Off, 6.0), (2, Off, 7.0), (1, On, 4.0)]) {
            let mut trial = made::measured(number, four_bit(batch, 16, 512), gigabytes, 1.0);
            trial.config.gradient_checkpointing = again;
            trials.push(trial);
        }
        let (_, caption, rows) = &shown(&trials)[0];
        assert!(caption.contains("No other parameter that moves it differs"), "{caption}");
        assert_eq!(rows[1], ["1", "4bit, recomputed", "4 GB", "1"]);
        assert_eq!(rows.len(), 3);
    }

    #[test]
    fn what_was_packed_is_not_beside_what_was_solo() {
        let mut trials = vec![
            made::measured(1, four_bit(1, 16, 512), 6.0, 2.0),
            made::measured(2, four_bit(2, 16, 512), 7.0, 3.0),
            made::packed(3, four_bit(4, 16, 512), 3.0, 1.0),
        ];
        assert_eq!(shown(&trials)[0].2.len(), 2);
        trials.remove(0);
        let (_, caption, rows) = &shown(&trials)[0];
        assert!(caption.contains("packed") && rows.len() == 2, "{caption}");
    }

    #[test]
    fn the_cost_of_runs_that_ended_on_each_accelerator() {
        let mut trials = vec![
            made::measured(1, float16(2, 16, 512), 28.0, 5.0),
            made::measured(2, four_bit(2, 16, 512), 7.0, 3.0),
            made::measured(3, four_bit(2, 16, 512), 7.0, 1.0),
            made::unfit(4, float16(2, 16, 512), 28.0),
        ];
        for trial in &mut trials[2..] {
            trial.device = Some(made::device("V100-16GB", 16.0, 2.86));
        }
        trials[2].cost_usd = Some(6.75);
        let shown = shown(&trials);
        let (name, _, rows) = shown.last().unwrap();
        assert_eq!((name.as_str(), rows.len()), ("cost-of-a-run-by-accelerator", 4));
        assert_eq!(rows[2], ["V100-16GB", "4bit", "$6.75", "1"]);
        assert_eq!(rows[3], ["V100-16GB", "float16", "does not fit: needs 28 GB", "–"]);
        assert_eq!(shown.len(), 1, "no other parameter has two values");
    }
}
