//! Charts as SVG. plotters draws at twice the size that the page shows, because it places marks on whole pixels;
//! colours that follow the page's light or dark scheme are stand-ins that `style.css`, or the style of a file of its own,
//! replaces.

pub(super) use super::axis::Axis;
use plotters::coord::Shift;
use plotters::prelude::*;
use std::ops::Range;

/// Colours of trials, in rank order; legible on white and on near-black.
pub(super) const PALETTE: [&str; 8] =
    ["#2f7ed8", "#e8833a", "#3a9d5d", "#d6455d", "#8f63c9", "#2a9ba6", "#a9713d", "#d65fa8"];
/// The colour of what trials of one device hold of its memory together.
pub(super) const MEMORY: &str = "#b8a03f";
/// The colour of all other trials.
pub(super) const OTHERS: &str = "#8c8c96";

const WIDTH: u32 = 900;
/// Height between the axes, unless the rows of one say how high they are: what is written around it makes a chart higher.
const PLOT: u32 = 440;
const MARGIN: u32 = 16;
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
    /// A full rectangle between two values of each axis, at least two pixels wide, with a gap behind it.
    Bar { x: (f64, f64), y: (f64, f64), colour: &'static str },
    /// All that lies within these points.
    Area { points: Vec<(f64, f64)>, colour: &'static str },
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

    /// Whether it is wider than others, and needs the page's width for it.
    pub(super) fn is_broad(&self) -> bool {
        self.width() > WIDTH
    }

    fn width(&self) -> u32 {
        self.x.pixels.unwrap_or(WIDTH)
    }

    fn paint(&self, svg: &mut String, simulated: bool) -> Painted {
        let (x_title, y_title) = &self.titles;
        let titled = !y_title.is_empty() || simulated;
        let legend = self.legend_lines();
        let top = MARGIN + LINE * (u32::from(titled) + legend.len() as u32);
        let below = if x_title.is_empty() { 50 } else { 90 };
        let height = top + self.y.pixels.unwrap_or(PLOT) + below + MARGIN;
        let beside = match self.y.pixels {
            Some(_) => LETTER as u32 * self.y.longest_label() as u32 + 20,
            None => 90,
        };
        let root = SVGBackend::with_string(svg, (self.width(), height)).into_drawing_area();
        let mut chart = ChartBuilder::on(&root)
            .margin(MARGIN)
            .margin_top(top)
            .margin_right(28)
            .x_label_area_size(below)
            .y_label_area_size(beside)
            .build_cartesian_2d(self.x.clone(), self.y.clone())?;
        let mut mesh = chart.configure_mesh();
        // Rows are told by their names.
        if self.y.pixels.is_some() {
            mesh.disable_y_mesh();
        }
        mesh.bold_line_style(GRID)
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
            let left = self.width() as i32 - 28 - LETTER * word.len() as i32;
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
                    root.draw(&Cross::new(at, 9, rgb(colour).stroke_width(5)))?;
                }
                Mark::Bar { x, y, colour } => {
                    let map = |at: (f64, f64)| chart.plotting_area().map_coordinate(&at);
                    let ((left, top), (right, bottom)) = (map((x.0, y.0)), map((x.1, y.1)));
                    let corners = [(left, top), ((right - 1).max(left + 2), bottom)];
                    root.draw(&Rectangle::new(corners, rgb(colour).filled()))?;
                }
                Mark::Area { points, colour } => {
                    let places: Vec<_> =
                        points.iter().map(|at| chart.plotting_area().map_coordinate(at)).collect();
                    root.draw(&Polygon::new(places, rgb(colour).filled()))?;
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
                Some(line) if LEGEND_LEFT + left <= self.width() as i32 => line.push(entry),
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

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(x: Axis, y: Axis, marks: Vec<Mark>) -> Chart {
        let legend = vec![(Key::Dot(OTHERS, Shape::Square), "a".into()), (Key::Dashed, "b".into())];
        Chart { x, y, titles: ("x".into(), "y".into()), legend, marks }
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
            let bar = Mark::Bar { x: (1.0, f64::INFINITY), y: (-1e300, 1e300), colour: OTHERS };
            let area = Mark::Area { points: vec![(0.0, 0.0), (f64::NAN, 1.0), (2.0, 0.0)], colour: MEMORY };
            let marks =
                [line, dashed, Mark::Level { y: 2.0 }, bar, area, text].into_iter().chain(dots).collect();
            let svg = chart(x, y, marks).draw(true).unwrap();
            assert!(svg.trim_end().ends_with("</svg>"), "{values:?}");
            assert!(svg.contains("simulated") && !svg.contains("<b>"), "{svg}");
        }
    }

    #[test]
    fn a_chart_of_rows_is_as_high_as_they_need() {
        let rows = |pixels| Axis::rows([(0.0, "a row".to_string())].into_iter(), (-1.0, 1.0), pixels);
        let svg =
            |pixels| chart(Axis::linear([1.0].into_iter()), rows(pixels), Vec::new()).draw(false).unwrap();
        // Margins, the line of the titles, that of the legend, the axis below with its title.
        for (pixels, height) in [(100, 16 + 2 * 42 + 100 + 90 + 16), (700, 16 + 2 * 42 + 700 + 90 + 16)] {
            let (svg, size) = (svg(pixels), format!("<svg width=\"900\" height=\"{height}\""));
            assert!(svg.contains(&size) && svg.contains("a row"), "{svg}");
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
