//! Metrics over the steps, a line a trial.

use super::super::Sources;
use super::super::chart::{Axis, Chart, Key, Mark, Shape};
use super::super::document::{Block, Figure, Line};
use super::super::{numbers, series};
use super::{MOST_LINES, file_name, of_how_many};
use domain::metric;
use domain::trial::TrialState;

/// The curves of held-out and training loss.
pub(in super::super) fn blocks(sources: &Sources) -> Vec<Block> {
    let of = [metric::EVAL_LOSS, metric::LOSS].map(|name| curve(sources, name));
    let nothing: Vec<_> = of.iter().filter_map(|curve| curve.as_ref().err()).collect();
    let missing =
        nothing.iter().map(|name| Block::Paragraph(Line::default().strong(name).text(": no points.")));
    let mut blocks: Vec<_> = missing.collect();
    let figures: Vec<_> = of.into_iter().filter_map(Result::ok).collect();
    if !figures.is_empty() {
        blocks.push(Block::Figures(figures));
    }
    blocks
}

/// A metric over the steps; the best lies on top, and where a trial was ended there is a mark. `Err`: no trial has it.
fn curve(sources: &Sources, name: &'static str) -> Result<Figure, &'static str> {
    let entries = &sources.entries[..sources.entries.len().min(MOST_LINES)];
    let raw: Vec<_> = entries.iter().map(|e| series::curve(e.points, name)).collect();
    if raw.iter().all(Vec::is_empty) {
        return Err(name);
    }
    let long = raw.iter().any(|curve| curve.len() > series::LONG);
    let drawn: Vec<_> = raw.into_iter().map(series::smooth).collect();
    let x = Axis::linear(drawn.iter().flatten().map(|p| p.0));
    // A trial that diverges must not flatten the others: the chart ends a little above the usual start.
    let mut starts: Vec<_> = drawn.iter().filter_map(|c| c.first()).map(|p| p.1).collect();
    starts.sort_by(f64::total_cmp);
    let ceiling = 1.3 * starts[starts.len() / 2].abs();
    let y = Axis::linear(drawn.iter().flatten().map(|p| p.1.min(ceiling)));

    let base = sources.entries.iter().find_map(|e| e.trial.summary.as_ref()?.base_eval_loss);
    let level = base.filter(|_| name == metric::EVAL_LOSS);
    let mut marks: Vec<_> = level.map(|y| Mark::Level { y }).into_iter().collect();
    let mut legend = Vec::new();
    legend.extend(level.map(|_| (Key::Dashed, "the base".to_string())));
    let mut ended = [false; 2];
    for (rank, ((points, entry), colour)) in
        drawn.into_iter().zip(entries).zip(&sources.colours).enumerate().rev()
    {
        let last = points.last().copied();
        marks.push(Mark::Line { points, colour, width: if rank == 0 { 6 } else { 3 } });
        let Some((x, y)) = last else { continue };
        match entry.trial.state {
            TrialState::Stopped => {
                ended[0] = true;
                marks.push(Mark::Dot { x, y, colour, full: false, size: 7, shape: Shape::Circle });
            }
            TrialState::Diverged => {
                ended[1] = true;
                marks.push(Mark::Cross { x, y, colour });
            }
            _ => {}
        }
    }
    legend.extend(ended[0].then(|| (Key::Ring, "stopped early".into())));
    legend.extend(ended[1].then(|| (Key::Cross, "diverged".into())));

    let mut caption = Line::default().strong(name).text(" over steps");
    caption = caption.text(if long { ", smoothed where long" } else { "" });
    caption = caption.text(if level.is_some() { "; dashed: the base without an adapter" } else { "" });
    caption = caption.text(". Colours as in the table of trials; the best is thick.");
    caption = caption.text(of_how_many(sources.entries.len()));
    Ok(Figure {
        name: file_name(&format!("{name} over steps")),
        description: format!("{name} over the steps of each trial"),
        chart: Chart { x, y, titles: ("steps".into(), numbers::titled(name)), legend, marks },
        caption,
        data: None,
    })
}
