//! What the models of memory and speed said that trials would need, beside what they needed.

use super::super::Sources;
use super::super::chart::{Axis, Chart, Key, Mark, Shape};
use super::super::document::{Figure, Line};
use super::super::numbers;
use super::super::slice::Fact;

/// Something that is predicted, and measured.
struct Kind {
    /// The figure's file.
    file: &'static str,
    /// What it is, in the figure's description.
    what: &'static str,
    /// What the figure is of.
    title: &'static str,
    /// What it is predicted and measured as.
    pair: fn(&Fact) -> Option<(f64, f64)>,
    /// The unit for values up to the highest, and its name.
    unit: fn(f64) -> (f64, &'static str),
}

const KINDS: [Kind; 2] = [
    Kind {
        file: "predicted-memory",
        what: "peak memory",
        title: "Peak memory as predicted before a trial began",
        pair: |fact| {
            Some((fact.trial.summary.as_ref()?.predicted_peak_memory_bytes? as f64, fact.peak_memory()?))
        },
        unit: numbers::byte_unit,
    },
    Kind {
        file: "predicted-seconds",
        what: "seconds a step",
        title: "Seconds of a step on the longest rows as predicted, beside those of the mean step",
        pair: |fact| {
            let predicted = fact.trial.summary.as_ref()?.predicted_seconds_per_step;
            Some((predicted.filter(|seconds| *seconds > 0.0)?, fact.trial.seconds_per_step()?))
        },
        unit: |_| (1.0, "s a step"),
    },
];

/// The figures, of trials that were alone on their device.
pub(in super::super) fn figures(sources: &Sources) -> Vec<Figure> {
    KINDS.iter().filter_map(|kind| figure(sources, kind)).collect()
}

fn figure(sources: &Sources, kind: &Kind) -> Option<Figure> {
    let solo = sources.facts.facts.iter().filter(|fact| fact.is_solo());
    let pairs: Vec<_> =
        solo.filter_map(|fact| Some(((kind.pair)(fact)?, sources.entry(fact.trial)?.1))).collect();
    if pairs.len() < 2 {
        return None;
    }
    let mut off: Vec<_> = pairs.iter().map(|((predicted, measured), _)| predicted / measured).collect();
    off.sort_by(f64::total_cmp);
    let highest = pairs.iter().map(|((predicted, measured), _)| predicted.max(*measured)).fold(0.0, f64::max);
    let (unit, name) = (kind.unit)(highest);
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
        name: kind.file.into(),
        description: format!("Predicted against measured {} of each trial", kind.what),
        chart: Chart {
            x: Axis::from_zero([end].into_iter()),
            y: Axis::from_zero([end].into_iter()),
            titles: (format!("measured, {name}"), format!("predicted, {name}")),
            legend: vec![(Key::Dashed, "as predicted".into())],
            marks,
        },
        caption: Line::default().strong(kind.title).text(caption),
        data: None,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::super::super::Records;
    use super::super::super::made::{float16, measured, sweep};
    use super::*;

    /// Each kind that two trials have both numbers of.
    #[test]
    fn what_is_drawn() {
        let mut trials: Vec<_> =
            (1..=2).map(|number| measured(number, float16(2, 8, 512), 20.0, f64::from(number))).collect();
        let drawn = |trials: &[domain::trial::Trial]| {
            let sweep = sweep();
            let sources = Sources::of(Records { sweep: &sweep, trials, curves: &[], items: &[] });
            let figures = figures(&sources);
            figures.into_iter().map(|figure| (figure.name, figure.caption.plain())).collect::<Vec<_>>()
        };
        let names: Vec<_> = drawn(&trials).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["predicted-memory"]);
        // Two rows a step, at 1 and 2 rows a second.
        for (trial, predicted) in trials.iter_mut().zip([2.0, 1.5]) {
            trial.summary.as_mut().unwrap().predicted_seconds_per_step = Some(predicted);
        }
        let both = drawn(&trials);
        assert_eq!(both[1].0, "predicted-seconds");
        let caption = &both[1].1;
        assert!(caption.contains("as measured") && caption.contains("50 % too high"), "{caption}");
        trials[0].summary.as_mut().unwrap().predicted_seconds_per_step = Some(0.0);
        assert_eq!(drawn(&trials).len(), 1);
    }
}
