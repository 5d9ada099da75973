//! The best value so far over the device time that was spent.

use super::super::Sources;
use super::super::chart::{Axis, Chart, Mark, PALETTE, Shape};
use super::super::document::{Figure, Line, Table};
use super::super::numbers;
use domain::sweep::Goal;
use domain::trial::{Stretch, Trial};

/// The figure, once two trials are over that were measured.
pub(in super::super) fn figure(sources: &Sources) -> Option<Figure> {
    let mut over: Vec<_> = sources
        .entries
        .iter()
        .filter_map(|entry| {
            // Time that came to no value was spent, too.
            Some((entry.trial.finished_at?, seconds(entry.trial), entry.value))
        })
        .collect();
    over.sort_by_key(|(at, ..)| *at);
    let spent: Vec<_> = over.iter().map(|(_, seconds, value)| (*seconds, *value)).collect();
    let steps = best_so_far(&spent, sources.sweep.spec.search.goal);
    let total = steps.last().map_or(0.0, |(seconds, _)| *seconds);
    if steps.len() < 2 || total <= 0.0 {
        return None;
    }
    let (unit, unit_name) = numbers::time_unit(total);
    let metric = &sources.sweep.spec.search.metric;
    let points: Vec<_> = steps.iter().map(|(seconds, value)| (seconds / unit, *value)).collect();
    // Between two trials the best stays what it was.
    let stairs = points.windows(2).flat_map(|pair| [pair[0], (pair[1].0, pair[0].1)]);
    let line = stairs.chain(points.last().copied()).collect();
    let colour = PALETTE[0];
    let mut marks = vec![Mark::Line { points: line, colour, width: 4 }];
    marks.extend(points.iter().map(|&(x, y)| Mark::Dot {
        x,
        y,
        colour,
        full: true,
        size: 7,
        shape: Shape::Circle,
    }));
    let mut data = Table::new([format!("device {unit_name}"), metric.clone()]);
    for (time, best) in &points {
        data.row([numbers::number(*time), numbers::loss(*best)]);
    }
    Some(Figure {
        name: "best-so-far".into(),
        description: format!("The best {metric} so far over device {unit_name}"),
        chart: Chart {
            x: Axis::from_zero(points.iter().map(|p| p.0)),
            y: Axis::linear(points.iter().map(|p| p.1)),
            titles: (format!("device {unit_name}"), numbers::titled(metric)),
            legend: Vec::new(),
            marks,
        },
        caption: Line::default().strong("Best so far").text(format!(
            ": {metric} over the device {unit_name} of the trials that are over, in the order of their ends."
        )),
        data: Some(data),
    })
}

/// Seconds of a device that a trial took; of one that has told of none, because it failed, those of its stretches.
fn seconds(trial: &Trial) -> f64 {
    if let Some(summary) = &trial.summary {
        return summary.device_seconds;
    }
    let stretch = |stretch: Stretch| {
        let to = stretch.to.or(trial.finished_at).unwrap_or(stretch.from);
        to.since(stretch.from).as_secs_f64()
    };
    trial.stretches().into_iter().map(stretch).sum()
}

/// The time spent and the best value after each trial with a value, of trials' times and values in the order of their
/// ends.
fn best_so_far(trials: &[(f64, Option<f64>)], goal: Goal) -> Vec<(f64, f64)> {
    let (mut spent, mut steps) = (0.0, Vec::<(f64, f64)>::new());
    for (seconds, value) in trials {
        spent += seconds;
        let Some(value) = *value else { continue };
        let best = steps.last().map_or(value, |(_, best)| *best);
        steps.push((spent, if goal.better(value, best) { value } else { best }));
    }
    steps
}

#[cfg(test)]
mod tests {
    use super::super::super::made::{self, four_bit};
    use super::*;
    use domain::trial::TrialPlacement;
    use domain::{AgentId, Attempt, DeviceId, Timestamp};

    /// A trial that failed without a summary took its device's time all the same.
    #[test]
    fn time_that_came_to_nothing_was_spent() {
        let mut trial = made::unfit(1, four_bit(2, 16, 512), 45.0);
        assert_eq!(seconds(&trial), 0.0);
        trial.finished_at = Some(Timestamp(90_000));
        let placed = |attempt: u32, from: u64, to: Option<u64>| TrialPlacement {
            started_at: Some(Timestamp(from)),
            ended_at: to.map(Timestamp),
            ..TrialPlacement::new(Attempt(attempt), AgentId::new("a"), DeviceId::new("cuda:0"))
        };
        trial.placements = vec![placed(1, 0, Some(30_000)), placed(2, 80_000, None)];
        assert_eq!(seconds(&trial), 40.0);
        let measured = made::measured(2, four_bit(2, 16, 512), 7.0, 1.0);
        assert_eq!(seconds(&measured), 1000.0);
    }

    #[test]
    fn the_best_only_gets_better() {
        let trials = [(10.0, Some(3.0)), (5.0, Some(4.0)), (20.0, Some(2.0))];
        assert_eq!(best_so_far(&trials, Goal::Minimize), [(10.0, 3.0), (15.0, 3.0), (35.0, 2.0)]);
        assert_eq!(best_so_far(&trials, Goal::Maximize), [(10.0, 3.0), (15.0, 4.0), (35.0, 4.0)]);
        let one_failed = [(10.0, Some(3.0)), (5.0, None), (20.0, Some(2.0))];
        assert_eq!(best_so_far(&one_failed, Goal::Minimize), [(10.0, 3.0), (35.0, 2.0)]);
        assert_eq!(best_so_far(&[], Goal::Minimize), []);
    }
}
