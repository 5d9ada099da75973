//! Charts as SVG. plotters draws at twice the size that the page shows, because it places marks on whole pixels;
//! colours that follow the page's light or dark scheme are stand-ins that `style.css`, or the style of a file of its own,
//! replaces.

use super::numbers;
use plotters::coord::Shift;
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
/// Height of a line of text above the chart.
const LINE: u32 = 42;
/// What a letter is wide, about; there are no fonts to measure by.
const LETTER: i32 = 15;
/// Stand-ins; `style.css` and [`standalone`] name the same values.
const GRID: RGBColor = RGBColor(0xC0, 0xC0, 0xC1);
const INK: RGBColor = RGBColor(0x10, 0x10, 0x11);
const PAPER: RGBColor = RGBColor(0xFE, 0xFE, 0xFD);

type Painted = Result<(), Box<dyn std::error::Error + Send + Sync>>;

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

    /// The same from zero on, for what is compared by its length.
    pub(super) fn from_zero(values: impl Iterator<Item = f64>) -> Self {
        let (_, high) = range(values.chain([0.0]));
        let high = if high > 0.0 { high } else { 1.0 };
        Self { ends: (0.0, high * 1.05), ticks: numbered(linear_ticks(0.0, high)), logarithmic: false }
    }

    /// Even distances for even ratios. Values must be positive.
    pub(super) fn logarithmic(values: impl Iterator<Item = f64>) -> Self {
        let (low, high) = range(values.map(f64::log10));
        Self { ends: widen(low, high), ticks: numbered(log_ticks(low, high)), logarithmic: true }
    }

    /// A few values that were chosen, each with its tick; even ratios where they span more than a factor of eight.
    pub(super) fn chosen(values: &[f64]) -> Self {
        const MOST: usize = 10;
        let (low, high) = range(values.iter().copied());
        let logarithmic = low > 0.0 && high / low >= 8.0;
        let axis = match logarithmic {
            true => Self::logarithmic(values.iter().copied()),
            false => Self::linear(values.iter().copied()),
        };
        if values.len() > MOST {
            return axis;
        }
        Self { ticks: numbered(values.to_vec()), ..axis }
    }

    /// From 0 to 1, without ticks, with room for texts at both ends.
    pub(super) fn unlabelled() -> Self {
        Self { ends: (-0.4, 1.12), ticks: Vec::new(), logarithmic: false }
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

/// The form of a dot, so that series differ in more than colour.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    Circle,
    Triangle,
    Square,
}

impl Shape {
    /// That of a series.
    pub(super) fn of(series: usize) -> Self {
        [Self::Circle, Self::Triangle, Self::Square][series % 3]
    }
}

/// Something to draw, in the axes' values.
pub(super) enum Mark {
    /// A line through points.
    Line { points: Vec<(f64, f64)>, colour: &'static str, width: u32 },
    /// A dashed line between two points.
    Dashed { from: (f64, f64), to: (f64, f64) },
    /// A dashed line across the chart.
    Level { y: f64 },
    /// A dot: full, or a ring.
    Dot { x: f64, y: f64, colour: &'static str, full: bool, size: i32, shape: Shape },
    /// What ended badly, or does not fit.
    Cross { x: f64, y: f64, colour: &'static str },
    /// A short text, its middle above the place or, if `below`, under it.
    Text { x: f64, y: f64, text: String, below: bool },
}

/// What a mark means.
pub(super) enum Key {
    Dot(&'static str, Shape),
    Line(&'static str),
    Dashed,
    Ring,
    Cross,
}

/// Axes and marks, later ones on top.
pub(super) struct Chart {
    pub(super) x: Axis,
    pub(super) y: Axis,
    /// What the axes are, below and above the chart; may be empty.
    pub(super) titles: (String, String),
    /// Above the chart, as far as there is room.
    pub(super) legend: Vec<(Key, String)>,
    pub(super) marks: Vec<Mark>,
}

impl Chart {
    /// As an `<svg>` element, which says of simulated numbers that they are.
    ///
    /// # Errors
    /// What plotters could not draw.
    pub(super) fn draw(&self, simulated: bool) -> Result<String, String> {
        let mut svg = String::new();
        self.paint(&mut svg, simulated).map_err(|e| e.to_string())?;
        Ok(svg)
    }

    fn paint(&self, svg: &mut String, simulated: bool) -> Painted {
        let root = SVGBackend::with_string(svg, SIZE).into_drawing_area();
        let (x_title, y_title) = &self.titles;
        let titled = !y_title.is_empty() || simulated;
        let legend = self.legend_lines();
        let lines = u32::from(titled) + legend.len() as u32;
        let mut chart = ChartBuilder::on(&root)
            .margin(16)
            .margin_top(16 + lines * LINE)
            .margin_right(28)
            .x_label_area_size(if x_title.is_empty() { 50 } else { 90 })
            .y_label_area_size(90)
            .build_cartesian_2d(self.x.clone(), self.y.clone())?;
        chart
            .configure_mesh()
            .bold_line_style(GRID)
            .axis_style(GRID)
            .label_style(("sans-serif", FONT).into_font().color(&INK))
            .x_desc(x_title.as_str())
            .draw()?;
        let text = ("sans-serif", FONT).into_font().color(&INK);
        if !y_title.is_empty() {
            root.draw(&Text::new(y_title.as_str(), (16, 12), text.clone()))?;
        }
        if simulated {
            let word = "simulated";
            let left = SIZE.0 as i32 - 28 - LETTER * word.len() as i32;
            root.draw(&Text::new(word, (left, 12), text.clone()))?;
        }
        for (line, entries) in legend.iter().enumerate() {
            paint_legend(&root, 12 + LINE as i32 * (i32::from(titled) + line as i32), entries)?;
        }
        for mark in &self.marks {
            match mark {
                Mark::Line { points, colour, width } => {
                    let style = rgb(colour).stroke_width(*width);
                    chart.draw_series(LineSeries::new(points.iter().copied(), style))?;
                }
                Mark::Dashed { from, to } => {
                    chart.draw_series(DashedLineSeries::new([*from, *to], 14, 10, INK.stroke_width(2)))?;
                }
                Mark::Level { y: level } => {
                    let Range { start, end } = self.x.range();
                    let ends = [(start, *level), (end, *level)];
                    chart.draw_series(DashedLineSeries::new(ends, 14, 10, INK.stroke_width(2)))?;
                }
                Mark::Dot { x, y, colour, full, size, shape } => {
                    let at = chart.plotting_area().map_coordinate(&(*x, *y));
                    dot(&root, at, (*size, *shape), colour, *full)?;
                }
                Mark::Cross { x, y, colour } => {
                    let at = chart.plotting_area().map_coordinate(&(*x, *y));
                    root.draw(&Cross::new(at, 11, rgb(colour).stroke_width(6)))?;
                }
                Mark::Text { x, y, text: said, below } => {
                    let (x, y) = chart.plotting_area().map_coordinate(&(*x, *y));
                    let left = x - LETTER * said.chars().count() as i32 / 2;
                    let top = if *below { y + 12 } else { y - FONT - 12 };
                    root.draw(&Text::new(said.as_str(), (left, top), text.clone()))?;
                }
            }
        }
        root.present()?;
        Ok(())
    }

    /// The legend, as much on a line as there is room for.
    fn legend_lines(&self) -> Vec<Vec<&(Key, String)>> {
        let (mut lines, mut left): (Vec<Vec<_>>, i32) = (Vec::new(), 0);
        for entry in &self.legend {
            left += legend_width(entry);
            match lines.last_mut() {
                Some(line) if LEGEND_LEFT + left <= SIZE.0 as i32 => line.push(entry),
                _ => {
                    left = legend_width(entry);
                    lines.push(vec![entry]);
                }
            }
        }
        lines
    }
}

/// Where a legend begins, and how wide what stands before a meaning is.
const LEGEND_LEFT: i32 = 20;
const KEY_WIDTH: i32 = 46;

fn legend_width((_, meaning): &(Key, String)) -> i32 {
    KEY_WIDTH + LETTER * meaning.chars().count() as i32 + 20
}

fn paint_legend(root: &Root, top: i32, entries: &[&(Key, String)]) -> Painted {
    let style = ("sans-serif", FONT).into_font().color(&INK);
    let mut left = LEGEND_LEFT;
    for entry in entries {
        let (key, meaning) = entry;
        let middle = (left + 16, top + FONT / 2);
        let ends = vec![(left, middle.1), (left + 34, middle.1)];
        match key {
            Key::Dot(colour, shape) => dot(root, middle, (10, *shape), colour, true)?,
            Key::Line(colour) => root.draw(&PathElement::new(ends, rgb(colour).stroke_width(6)))?,
            Key::Dashed => {
                for part in [0, 20] {
                    let ends = [(left + part, middle.1), (left + part + 14, middle.1)];
                    root.draw(&PathElement::new(ends, INK.stroke_width(2)))?;
                }
            }
            Key::Ring => dot(root, middle, (9, Shape::Circle), OTHERS, false)?,
            Key::Cross => root.draw(&Cross::new(middle, 11, rgb(OTHERS).stroke_width(6)))?,
        }
        root.draw(&Text::new(meaning.as_str(), (left + KEY_WIDTH, top), style.clone()))?;
        left += legend_width(entry);
    }
    Ok(())
}

type Root<'a> = DrawingArea<SVGBackend<'a>, Shift>;

fn dot(root: &Root, at: (i32, i32), (size, shape): (i32, Shape), colour: &str, full: bool) -> Painted {
    let styles = [if full { rgb(colour).filled() } else { PAPER.filled() }, rgb(colour).stroke_width(4)];
    for style in styles {
        match shape {
            Shape::Circle => root.draw(&Circle::new(at, size, style))?,
            Shape::Triangle => {
                let (x, y) = at;
                let corners = [(x, y - size - 2), (x + size + 1, y + size), (x - size - 1, y + size)];
                match style.filled {
                    true => root.draw(&Polygon::new(corners, style))?,
                    false => root.draw(&PathElement::new([&corners[..], &corners[..1]].concat(), style))?,
                }
            }
            Shape::Square => {
                let (x, y) = at;
                root.draw(&Rectangle::new(
                    [(x - size + 1, y - size + 1), (x + size - 1, y + size - 1)],
                    style,
                ))?;
            }
        }
    }
    Ok(())
}

/// A chart as a file of its own: with its title and description, on paper that follows the reader's colour scheme.
pub(super) fn standalone(svg: &str, title: &str, description: &str) -> String {
    const STYLE: &str = "<style>:root{--paper:#fefefd;--ink:#1c1c22;--soft:#62626c;--line:#dcdcd6}\
        @media(prefers-color-scheme:dark){:root{--paper:#16161a;--ink:#ececf0;--soft:#a2a2ae;--line:#35353e}}\
        svg{background:var(--paper)}text{fill:var(--ink)}[stroke=\"#C0C0C1\"]{stroke:var(--line)}\
        [stroke=\"#101011\"]{stroke:var(--soft)}[fill=\"#FEFEFD\"]{fill:var(--paper)}</style>";
    let (start, rest) = svg.trim_start().split_once('>').unwrap_or((svg, ""));
    let escape = super::html::escape;
    format!(
        "{start} role=\"img\">\n<title>{}</title>\n<desc>{}</desc>\n{STYLE}{rest}",
        escape(title),
        escape(description)
    )
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

    fn chart(x: Axis, y: Axis, marks: Vec<Mark>) -> Chart {
        let legend = vec![(Key::Dot(OTHERS, Shape::Square), "a".into()), (Key::Dashed, "b".into())];
        Chart { x, y, titles: ("x".into(), "y".into()), legend, marks }
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
            let dashed = Mark::Dashed { from: (0.0, 0.0), to: (1.0, 1.0) };
            let text = Mark::Text { x: 1.0, y: 2.0, text: "<b>".into(), below: true };
            let dots = [Shape::Circle, Shape::Triangle, Shape::Square].map(|shape| Mark::Dot {
                x: 1.0,
                y: f64::NAN,
                colour: OTHERS,
                full: shape == Shape::Circle,
                size: 5,
                shape,
            });
            let marks = [line, dashed, Mark::Level { y: 2.0 }, text].into_iter().chain(dots).collect();
            let svg = chart(x, y, marks).draw(true).unwrap();
            assert!(svg.trim_end().ends_with("</svg>"), "{values:?}");
            assert!(svg.contains("simulated") && !svg.contains("<b>"), "{svg}");
        }
    }

    #[test]
    fn names_are_escaped_and_short() {
        let names = ["<script>".to_string(), "a very long list of modules".to_string()];
        let svg = chart(Axis::categories(&names), Axis::linear([1.0].into_iter()), Vec::new()).draw(false);
        let svg = svg.unwrap();
        assert!(svg.contains("&lt;script&gt;") && svg.contains("a very long lis…"), "{svg}");
        assert!(!svg.contains("<script>"), "{svg}");
    }

    #[test]
    fn a_few_chosen_values_have_a_tick_each() {
        let ticks = |axis: &Axis| axis.ticks.iter().map(|(_, label)| label.clone()).collect::<Vec<_>>();
        let batches = Axis::chosen(&[1.0, 2.0, 24.0]);
        assert_eq!((ticks(&batches), batches.logarithmic), (vec!["1".into(), "2".into(), "24".into()], true));
        assert!(!Axis::chosen(&[8.0, 16.0]).logarithmic);
        assert!(Axis::chosen(&(1..=20).map(f64::from).collect::<Vec<_>>()).ticks.len() < 12);
        assert_eq!(ticks(&Axis::from_zero([2.0, 4.0].into_iter())), ["0", "1", "2", "3", "4"]);
    }

    #[test]
    fn a_file_of_its_own_has_a_title_and_a_style() {
        let file = standalone("<svg width=\"1\" height=\"2\">\n<g/></svg>", "a < b", "what is \"seen\"");
        assert!(
            file.starts_with("<svg width=\"1\" height=\"2\" role=\"img\">\n<title>a &lt; b</title>"),
            "{file}"
        );
        assert!(
            file.contains("<desc>what is &quot;seen&quot;</desc>") && file.ends_with("<g/></svg>"),
            "{file}"
        );
    }
}
