//! What each device did when: a bar is a trial, bars above each other are a pack, the strip below is the sum of their peaks.

use super::super::Sources;
use super::super::chart::{Axis, Chart, Key, MEMORY, Mark};
use super::super::document::{Figure, Line, Table};
use super::super::numbers::{self, or_dash};
use domain::Timestamp;
use domain::trial::{Stretch, Trial};
use std::collections::{BTreeMap, BTreeSet};

/// Devices that are drawn at most: of more, nobody could tell a bar from another.
const MOST: usize = 24;
/// How high the strip of memory is, and the gap below it, in rows of bars.
const STRIP: f64 = 1.0;
const GAP: f64 = 0.6;
/// How much of its row a bar fills.
const FILLED: f64 = 0.85;
/// Pixels of a row, unless there are so many rows that the figure would be too high.
const ROW: f64 = 26.0;
const HIGHEST: f64 = 2400.0;

/// The figure, once two trials have trained, or one in two places.
pub(in super::super) fn figure(sources: &Sources) -> Option<Figure> {
    let mut lanes = lanes(sources);
    let bars = || lanes.iter().flat_map(|lane| &lane.bars);
    if bars().count() < 2 {
        return None;
    }
    let first = bars().map(|bar| bar.from).fold(f64::INFINITY, f64::min);
    let last = bars().map(|bar| bar.to).fold(first, f64::max);
    let moved = moved(sources);
    let data = data(&lanes, last - first);
    let devices = lanes.len();
    let unknown = lanes.iter().any(|lane| !lane.has_device);
    if devices > MOST {
        let mut busy: Vec<_> = lanes.iter().map(Lane::busy).collect();
        busy.sort_by(|a, b| b.total_cmp(a));
        let least = busy.get(MOST - 1).copied().unwrap_or_default();
        lanes.retain(|lane| lane.busy() >= least);
        lanes.truncate(MOST);
    }
    let mut caption = Line::default().strong("Timeline of devices").text(
        ": a bar is a trial in its colour in the table of trials, bars above each other are a pack. The strip below them is \
         the sum of their peak memory, as a part of the device's.",
    );
    if moved > 0 {
        let count = if moved == 1 { "One trial".into() } else { format!("{moved} trials") };
        caption =
            caption.text(format!(" {count} went on elsewhere, or later: each has a bar for every attempt."));
    }
    if unknown {
        caption = caption.text(" Of trials of an earlier version the agent alone is known.");
    }
    if devices > MOST {
        caption = caption.text(format!(" The busiest {MOST} of {devices} devices."));
    }
    Some(Figure {
        name: "timeline".into(),
        description: format!(
            "What each of {} did when",
            if devices == 1 { "one device".into() } else { format!("{devices} devices") }
        ),
        chart: chart(&lanes, last),
        caption,
        data: Some(data),
    })
}

/// How many trials trained in several stretches.
fn moved(sources: &Sources) -> usize {
    sources.entries.iter().filter(|entry| entry.trial.stretches().len() > 1).count()
}

/// A stretch of a trial's training, in seconds since the sweep was submitted.
struct Bar<'a> {
    trial: &'a Trial,
    colour: &'static str,
    from: f64,
    to: f64,
    row: usize,
}

impl Bar<'_> {
    fn peak(&self) -> f64 {
        let summary = self.trial.summary.as_ref();
        summary.and_then(|summary| summary.peak_memory_bytes).unwrap_or_default() as f64
    }
}

/// A device with what it did.
struct Lane<'a> {
    name: String,
    has_device: bool,
    accelerator: Option<&'a str>,
    memory: Option<u64>,
    /// By their beginnings.
    bars: Vec<Bar<'a>>,
    rows: usize,
}

impl Lane<'_> {
    /// What stands beside it: an agent's name says less than what its device is.
    fn label(&self) -> String {
        let device = self.name.rsplit(" · ").next().unwrap_or(&self.name);
        self.accelerator.map_or_else(|| self.name.clone(), |on| format!("{on} · {device}"))
    }

    /// Puts each bar into the first row that is free: as many rows as trials that trained at a time.
    fn arrange(&mut self) {
        self.bars.sort_by(|a, b| a.from.total_cmp(&b.from));
        let mut free: Vec<f64> = Vec::new();
        for bar in &mut self.bars {
            bar.row = free.iter().position(|until| *until <= bar.from).unwrap_or(free.len());
            match free.get_mut(bar.row) {
                Some(until) => *until = bar.to,
                None => free.push(bar.to),
            }
        }
        self.rows = free.len();
    }

    /// Seconds in which at least one trial trained.
    fn busy(&self) -> f64 {
        let (mut busy, mut until) = (0.0, f64::NEG_INFINITY);
        for bar in &self.bars {
            busy += (bar.to - bar.from.max(until)).max(0.0);
            until = until.max(bar.to);
        }
        busy
    }

    /// Bytes that its trials held at most together, each at its peak, from each of these seconds on.
    fn held(&self) -> Vec<(f64, f64)> {
        let changes = self.bars.iter().flat_map(|bar| [(bar.from, bar.peak()), (bar.to, -bar.peak())]);
        let mut changes: Vec<_> = changes.collect();
        // At the same moment one ends before the other begins.
        changes.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1)));
        let mut sum = 0.0;
        let held = changes.into_iter().map(|(at, change)| {
            sum += change;
            (at, sum)
        });
        held.collect()
    }
}

/// The devices by agent and number, with their bars in rows.
fn lanes<'a>(sources: &Sources<'a>) -> Vec<Lane<'a>> {
    let since = sources.sweep.created_at;
    let seconds = |time: Timestamp| time.since(since).as_secs_f64();
    // A shorter name is that of a smaller number: cuda:2 comes before cuda:10.
    let mut lanes: BTreeMap<(&str, usize, &str), Lane> = BTreeMap::new();
    for (entry, colour) in sources.entries.iter().zip(&sources.colours) {
        let stretches = entry.trial.stretches();
        let newest = stretches.len().saturating_sub(1);
        for (i, Stretch { agent, device, from, to }) in stretches.into_iter().enumerate() {
            let name = device.map_or("", |device| device.as_str());
            let lane = lanes.entry((agent, name.len(), name)).or_insert_with(|| Lane {
                name: if name.is_empty() { agent.into() } else { format!("{agent} · {name}") },
                has_device: device.is_some(),
                accelerator: None,
                memory: None,
                bars: Vec::new(),
                rows: 0,
            });
            // A record has no device but the last.
            if let Some(device) = entry.trial.device.as_ref().filter(|_| i == newest) {
                (lane.accelerator, lane.memory) =
                    (Some(device.accelerator.as_str()), Some(device.memory_bytes));
            }
            // One that still trains was last heard of with its last point.
            let to = to.or_else(|| entry.points.last().map(|point| point.time)).map_or(0.0, seconds);
            let from = seconds(from);
            lane.bars.push(Bar { trial: entry.trial, colour, from, to: to.max(from), row: 0 });
        }
    }
    let mut lanes: Vec<_> = lanes.into_values().collect();
    lanes.iter_mut().for_each(Lane::arrange);
    lanes
}

fn data(lanes: &[Lane], whole: f64) -> Table {
    let head = ["device", "accelerator", "trials", "busy", "of the time", "at a time", "peaks together"];
    let mut table = Table::new(head);
    for lane in lanes {
        let trials: BTreeSet<_> = lane.bars.iter().map(|bar| &bar.trial.id).collect();
        let most = lane.held().into_iter().map(|(_, bytes)| bytes).fold(0.0, f64::max);
        let milliseconds = |seconds: f64| (seconds * 1e3).round() as u64;
        let most = (most > 0.0).then(|| match lane.memory {
            Some(memory) => {
                format!("{}, {}", numbers::bytes(most as u64), numbers::percent(most as u64, memory))
            }
            None => numbers::bytes(most as u64),
        });
        table.row([
            lane.name.clone(),
            or_dash(lane.accelerator, str::to_string),
            trials.len().to_string(),
            numbers::seconds(lane.busy()),
            numbers::percent(milliseconds(lane.busy()), milliseconds(whole)),
            lane.rows.to_string(),
            or_dash(most, |most| most),
        ]);
    }
    table
}

fn chart(lanes: &[Lane], last: f64) -> Chart {
    let (unit, unit_name) = numbers::time_unit(last);
    let (mut marks, mut names, mut top) = (Vec::new(), Vec::new(), 0.0);
    let labels: Vec<_> = lanes.iter().map(Lane::label).collect();
    for (lane, label) in lanes.iter().zip(&labels) {
        let base = top - lane.rows as f64 - STRIP;
        // Devices of several agents may be called alike.
        let alone = labels.iter().filter(|other| *other == label).count() == 1;
        names.push(((top + base) / 2.0, if alone { label.clone() } else { lane.name.clone() }));
        if let Some(memory) = lane.memory.filter(|memory| *memory > 0) {
            let high = |bytes: f64| base + STRIP * (bytes / memory as f64).clamp(0.0, 1.0);
            let held = lane.held();
            let mut points = Vec::new();
            let mut before = base;
            for (at, bytes) in &held {
                points.extend([(at / unit, before), (at / unit, high(*bytes))]);
                before = high(*bytes);
            }
            // From the last bar's end back along the bottom.
            points.extend([held.last(), held.first()].into_iter().flatten().map(|(at, _)| (at / unit, base)));
            marks.push(Mark::Area { points, colour: MEMORY });
        }
        marks.extend(lane.bars.iter().map(|bar| {
            let above = top - bar.row as f64;
            let (x, y) = ((bar.from / unit, bar.to / unit), (above, above - FILLED));
            Mark::Bar { x, y, colour: bar.colour }
        }));
        top = base - GAP;
    }
    Chart {
        x: Axis::from_zero([last / unit].into_iter()),
        y: Axis::rows(names.into_iter(), (top, 0.0), (-top * ROW).clamp(4.0 * ROW, HIGHEST) as u32),
        titles: (format!("{unit_name} since it was submitted"), String::new()),
        legend: vec![(Key::Line(MEMORY), "peak memory together".into())],
        marks,
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::made::{self, four_bit};
    use super::super::super::{Records, Sources};
    use super::*;
    use domain::trial::TrialPlacement;
    use domain::{AgentId, Attempt, DeviceId};

    /// A trial of 10 GB with stretches on agent `a`: device, from, to.
    fn trial(number: u32, stretches: &[(&str, u64, Option<u64>)]) -> Trial {
        let placed = |(attempt, (device, from, to)): (u32, &(&str, u64, Option<u64>))| TrialPlacement {
            attempt: Attempt(attempt),
            agent: AgentId::new("a"),
            device: DeviceId::new(*device),
            started_at: Some(Timestamp(1000 * from)),
            ended_at: to.map(|to| Timestamp(1000 * to)),
        };
        Trial {
            agent: Some("a".into()),
            placements: (1..).zip(stretches).map(placed).collect(),
            ..made::measured(number, four_bit(2, 16, 512), 10.0, 1.0)
        }
    }

    fn shown(trials: &[Trial]) -> Option<(String, Vec<Vec<String>>, usize)> {
        let sweep = made::sweep();
        let sources = Sources::of(Records { sweep: &sweep, trials, curves: &[], items: &[] });
        let figure = figure(&sources)?;
        assert!(figure.chart.draw(true).unwrap().contains("simulated"));
        let rows = figure.data.iter().flat_map(|table| &table.rows);
        let rows = rows.map(|row| row.cells.iter().map(Line::plain).collect()).collect();
        let bars = figure.chart.marks.iter().filter(|mark| matches!(mark, Mark::Bar { .. })).count();
        Some((figure.caption.plain(), rows, bars))
    }

    #[test]
    fn devices_by_their_numbers_with_packs_and_what_moved() {
        let trials = [
            trial(1, &[("cuda:10", 0, Some(50)), ("cuda:2", 60, Some(100))]),
            trial(2, &[("cuda:2", 10, Some(40))]),
            trial(3, &[("cuda:2", 20, Some(60))]),
        ];
        let (caption, rows, bars) = shown(&trials).unwrap();
        assert!(caption.contains("One trial went on elsewhere") && !caption.contains("earlier"), "{caption}");
        assert_eq!(
            rows,
            [
                ["a · cuda:2", "A100-40GB", "3", "1 min 30 s", "90 %", "2", "20 GB, 47.73 %"],
                ["a · cuda:10", "–", "1", "50.0 s", "50 %", "1", "10 GB"],
            ]
        );
        assert_eq!(bars, 4, "an attempt each");
    }

    #[test]
    fn a_trial_that_still_trains_ends_with_its_last_point() {
        let sweep = made::sweep();
        let trials = [trial(1, &[("cpu", 10, None)]), trial(2, &[("cpu", 10, None)])];
        let point = |seconds: u64| domain::metric::MetricPoint {
            step: 1,
            time: Timestamp(1000 * seconds),
            values: vec![],
        };
        let curves = [(trials[0].id.clone(), vec![point(20), point(35)])];
        let sources = Sources::of(Records { sweep: &sweep, trials: &trials, curves: &curves, items: &[] });
        let lanes = lanes(&sources);
        let ends: Vec<_> = lanes[0].bars.iter().map(|bar| (bar.from, bar.to)).collect();
        assert_eq!((lanes.len(), ends), (1, vec![(10.0, 35.0), (10.0, 10.0)]));
    }

    #[test]
    fn trials_of_an_earlier_version_stand_by_their_agent() {
        let old = |number| Trial { started_at: Some(Timestamp(0)), ..trial(number, &[]) };
        let (caption, rows, bars) = shown(&[old(1), old(2)]).unwrap();
        assert!(caption.contains("Of trials of an earlier version the agent alone is known."), "{caption}");
        let names: Vec<_> = rows.iter().map(|row| (row[0].as_str(), row[2].as_str())).collect();
        assert_eq!((names, bars), (vec![("a", "2")], 2));
        assert!(shown(&[old(1)]).is_none(), "one bar tells nothing");
        assert!(shown(&[]).is_none());
    }

    #[test]
    fn of_many_devices_the_busiest() {
        let names: Vec<_> = (0..30).map(|i| format!("cuda:{i}")).collect();
        let trials: Vec<_> =
            (1..).zip(&names).map(|(n, name)| trial(n, &[(name.as_str(), 0, Some(u64::from(n)))])).collect();
        let (caption, rows, bars) = shown(&trials).unwrap();
        assert!(caption.ends_with("The busiest 24 of 30 devices."), "{caption}");
        assert_eq!((rows.len(), bars), (30, 24));
    }
}
