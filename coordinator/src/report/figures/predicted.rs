//! What the footprint model said that trials would need, beside what they needed.

use super::super::Sources;
use super::super::chart::{Axis, Chart, Key, Mark, Shape};
use super::super::document::{Figure, Line};
use super::super::numbers;
use super::super::slice::Fact;

/// The figure, of trials that were alone on their device.
pub(in super::super) fn figure(sources: &Sources) -> Option<Figure> {
    let pair = |fact: &Fact| {
        let predicted = fact.trial.summary.as_ref()?.predicted_peak_memory_bytes? as f64;
        Some((predicted, fact.peak_memory()?))
    };
    let solo = sources.facts.facts.iter().filter(|fact| fact.is_solo());
    let pairs: Vec<_> = solo.filter_map(|fact| Some((pair(fact)?, sources.entry(fact.trial)?.1))).collect();
    if pairs.len() < 2 {
        return None;
    }
    let mut off: Vec<_> = pairs.iter().map(|((predicted, measured), _)| predicted / measured).collect();
    off.sort_by(f64::total_cmp);
    let highest = pairs.iter().map(|((predicted, measured), _)| predicted.max(*measured)).fold(0.0, f64::max);
    let (unit, name) = numbers::byte_unit(highest);
    let end = highest / unit;
    let mut marks = vec![Mark::Dashed { from: (0.0, 0.0), to: (end, end) }];
    marks.extend(pairs.iter().map(|((predicted, measured), colour)| Mark::Dot {
        x: measured / unit,
        y: predicted / unit,
        colour,
        full: true,
        size: 9,
        shape: Shape::Circle,
    }));
    let far = |ratio: f64| match ratio {
        0.9995..1.0005 => "as measured".to_string(),
        ratio => format!("{} {}", numbers::change(ratio), if ratio > 1.0 { "too high" } else { "too low" }),
    };
    let caption = format!(
        ": of {} trials alone on their device; the middle one {}, the outermost {} and {}.",
        pairs.len(),
        far(off[off.len() / 2]),
        far(off[0]),
        far(off[off.len() - 1])
    );
    Some(Figure {
        name: "predicted-memory".into(),
        description: "Predicted against measured peak memory of each trial".into(),
        chart: Chart {
            x: Axis::from_zero([end].into_iter()),
            y: Axis::from_zero([end].into_iter()),
            titles: (format!("measured, {name}"), format!("predicted, {name}")),
            legend: vec![(Key::Dashed, "as predicted".into())],
            marks,
        },
        caption: Line::default().strong("Peak memory as predicted before a trial began").text(caption),
        data: None,
    })
}
