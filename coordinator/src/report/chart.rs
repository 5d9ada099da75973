//! Charts as inline SVG. plotters draws at twice the size that the page shows, because it places marks on
//! whole pixels; colours that follow the page's light or dark scheme are stand-ins that `style.css` replaces.

use super::numbers;
use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, ValueFormatter};
use plotters::prelude::*;
use std::ops::Range;

/// Colours of trials, in rank order; legible on white and on near-black.
pub(super) const PALETTE: [&str; 8] =
    ["#2f7ed8", "#e8833a", "#3a9d5d", "#d6455d", "#8f63c9", "#2a9ba6", "#a9713d", "#d65fa8"];
/// The colour of all other trials.
pub(super) const OTHERS: &str = "#8c8c96";

const SIZE: (u32, u32) = (900, 560);
const FONT: i32 = 30;
/// Stand-ins; `style.css` names the same values.
const GRID: RGBColor = RGBColor(0xC0, 0xC0, 0xC1);
const INK: RGBColor = RGBColor(0x10, 0x10, 0x11);
const PAPER: RGBColor = RGBColor(0xFE, 0xFE, 0xFD);

/// One side of a chart: which values it spans, how far apart they stand, and the ticks to label.
#[derive(Clone)]
pub(super) struct Axis {
    ends: (f64, f64),
    ticks: Vec<(f64, String)>,
    logarithmic: bool,
}

impl Axis {
    /// Even distances for even differences, over the range of `values`.
    pub(super) fn linear(values: impl Iterator<Item = f64>) -> Self {
        let (low, high) = range(values);
        Self { ends: widen(low, high), ticks: numbered(linear_ticks(low, high)), logarithmic: false }
    }

    /// Even distances for even ratios. Values must be positive.
    pub(super) fn logarithmic(values: impl Iterator<Item = f64>) -> Self {
        let (low, high) = range(values.map(f64::log10));
        Self { ends: widen(low, high), ticks: numbered(log_ticks(low, high)), logarithmic: true }
    }

    /// One place a name: 0, 1, 2, ….
    pub(super) fn categories(names: &[String]) -> Self {
        let ticks = names.iter().enumerate().map(|(i, name)| (i as f64, shorten(name))).collect();
        let last = names.len().saturating_sub(1) as f64;
        Self { ends: (-0.5, last + 0.5), ticks, logarithmic: false }
    }
}

fn numbered(ticks: Vec<f64>) -> Vec<(f64, String)> {
    ticks.into_iter().map(|value| (value, numbers::number(value))).collect()
}

impl Ranged for Axis {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    /// The pixel of a value; of one beyond the ends, the end's.
    fn map(&self, value: &f64, (first, last): (i32, i32)) -> i32 {
        let (low, high) = self.ends;
        let place = if self.logarithmic { value.log10() } else { *value };
        let share = (place.clamp(low, high) - low) / (high - low);
        first + (share * f64::from(last - first)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        if hint.weight().allow_light_points() {
            return Vec::new();
        }
        self.ticks.iter().map(|(value, _)| *value).collect()
    }

    fn range(&self) -> Range<f64> {
        let value = |end: f64| if self.logarithmic { 10f64.powf(end) } else { end };
        value(self.ends.0)..value(self.ends.1)
    }
}

impl ValueFormatter<f64> for Axis {
    fn format_ext(&self, value: &f64) -> String {
        self.ticks.iter().find(|(tick, _)| tick == value).map(|(_, label)| label.clone()).unwrap_or_default()
    }
}

/// Something to draw, in the axes' values.
pub(super) enum Mark {
    /// A line through points.
    Line { points: Vec<(f64, f64)>, colour: &'static str, width: u32 },
    /// A dashed line across the chart.
    Level { y: f64 },
    /// A dot: full, or a ring.
    Dot { x: f64, y: f64, colour: &'static str, full: bool, size: i32 },
}

/// The marks over the axes, later ones on top, as an `<svg>` element.
///
/// # Errors
/// What plotters could not draw.
pub(super) fn draw(x: &Axis, y: &Axis, marks: &[Mark]) -> Result<String, String> {
    let mut svg = String::new();
    paint(&mut svg, x, y, marks).map_err(|e| e.to_string())?;
    Ok(svg)
}

fn paint(
    svg: &mut String,
    x: &Axis,
    y: &Axis,
    marks: &[Mark],
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
    let mut chart = ChartBuilder::on(&root)
        .margin(16)
        .margin_right(28)
        .x_label_area_size(50)
        .y_label_area_size(90)
        .build_cartesian_2d(x.clone(), y.clone())?;
    chart
        .configure_mesh()
        .bold_line_style(GRID)
        .axis_style(GRID)
        .label_style(("sans-serif", FONT).into_font().color(&INK))
        .draw()?;
    for mark in marks {
        match mark {
            Mark::Line { points, colour, width } => {
                let style = rgb(colour).stroke_width(*width);
                chart.draw_series(LineSeries::new(points.iter().copied(), style))?;
            }
            Mark::Level { y: level } => {
                let Range { start, end } = x.range();
                let ends = [(start, *level), (end, *level)];
                chart.draw_series(DashedLineSeries::new(ends, 14, 10, INK.stroke_width(2)))?;
            }
            Mark::Dot { x, y, colour, full, size } => {
                let fill = if *full { rgb(colour).filled() } else { PAPER.filled() };
                chart.draw_series([Circle::new((*x, *y), *size, fill)])?;
                chart.draw_series([Circle::new((*x, *y), *size, rgb(colour).stroke_width(4))])?;
            }
        }
    }
    root.present()?;
    Ok(())
}

/// A `#rrggbb` colour; grey if it is none.
fn rgb(colour: &str) -> RGBColor {
    let value = colour.strip_prefix('#').and_then(|hex| u32::from_str_radix(hex, 16).ok());
    let [_, r, g, b] = value.unwrap_or(0x80_80_80).to_be_bytes();
    RGBColor(r, g, b)
}

/// The finite values' range; (0, 1) of none.
fn range(values: impl Iterator<Item = f64>) -> (f64, f64) {
    let (low, high) = values
        .filter(|v| v.is_finite())
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
    if low > high { (0.0, 1.0) } else { (low, high) }
}

/// Room at both ends, and some width where all values are one.
fn widen(low: f64, high: f64) -> (f64, f64) {
    let room = if high > low { (high - low) * 0.05 } else { low.abs().max(1.0) * 0.1 };
    (low - room, high + room)
}

/// Multiples of 1, 2 or 5 times a power of ten: six at most, one at least between the range's ends.
fn linear_ticks(low: f64, high: f64) -> Vec<f64> {
    if high <= low {
        return vec![low];
    }
    let rough = (high - low) / 5.0;
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0].map(|m| m * power).into_iter().find(|s| *s >= rough).unwrap_or(10.0 * power);
    let first = (low / step - 1e-9).ceil() as i64;
    let last = (high / step + 1e-9).floor() as i64;
    (first..=last).map(|i| i as f64 * step).collect()
}

/// 1, 2 and 5 times powers of ten between 10^low and 10^high; the powers alone over many decades.
fn log_ticks(low: f64, high: f64) -> Vec<f64> {
    let multiples: &[f64] = match high - low {
        width if width > 3.0 => &[1.0],
        width if width > 1.7 => &[1.0, 3.0],
        _ => &[1.0, 2.0, 5.0],
    };
    let room = 0.05 * (high - low).max(0.1);
    (low.floor() as i32..=high.ceil() as i32)
        .flat_map(|exponent| multiples.iter().map(move |m| m * 10f64.powi(exponent)))
        .filter(|v| (low - room..=high + room).contains(&v.log10()))
        .collect()
}

/// A name as short as an axis needs it.
fn shorten(name: &str) -> String {
    const LONGEST: usize = 16;
    if name.chars().count() <= LONGEST {
        return name.into();
    }
    name.chars().take(LONGEST - 1).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(got: &[f64], want: &[f64]) {
        let same = got.len() == want.len() && got.iter().zip(want).all(|(a, b)| (a / b - 1.0).abs() < 1e-9);
        assert!(same, "{got:?} is not {want:?}");
    }

    #[test]
    fn ticks_stand_at_round_values() {
        close(&linear_ticks(1.0, 2.0), &[1.0, 1.2, 1.4, 1.6, 1.8, 2.0]);
        close(&linear_ticks(2.94, 5.1), &[3.0, 3.5, 4.0, 4.5, 5.0]);
        close(&linear_ticks(7.0, 7.0), &[7.0]);
        close(&log_ticks(-4.0, -2.0), &[1e-4, 3e-4, 1e-3, 3e-3, 1e-2]);
        close(&log_ticks(-3.0, -2.3), &[1e-3, 2e-3, 5e-3]);
        close(&log_ticks(-6.0, 0.0), &[1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0]);
    }

    #[test]
    fn any_range_can_be_drawn() {
        for values in [vec![], vec![f64::NAN], vec![0.0], vec![3.0, 3.0], vec![1e-9, 1e12], vec![-5.0, 5.0]] {
            let y = Axis::linear(values.iter().copied());
            let x = Axis::logarithmic(values.iter().map(|v| v.abs()).filter(|v| *v > 0.0));
            let line = Mark::Line { points: vec![(1.0, 1e300), (2.0, -1e300)], colour: PALETTE[0], width: 2 };
            let svg = draw(&x, &y, &[line, Mark::Level { y: 2.0 }]).unwrap();
            assert!(svg.trim_end().ends_with("</svg>"), "{values:?}");
        }
    }

    #[test]
    fn names_are_escaped_and_short() {
        let names = ["<script>".to_string(), "a very long list of modules".to_string()];
        let dot = Mark::Dot { x: 0.0, y: 1.0, colour: OTHERS, full: false, size: 5 };
        let svg = draw(&Axis::categories(&names), &Axis::linear([1.0].into_iter()), &[dot]);
        let svg = svg.unwrap();
        assert!(svg.contains("&lt;script&gt;") && svg.contains("a very long lis…"), "{svg}");
        assert!(!svg.contains("<script>"), "{svg}");
    }
}
