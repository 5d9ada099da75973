//! A side of a chart: where values stand, and which of them have a label.

use super::numbers;
use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, Ranged, ValueFormatter};
use std::ops::Range;

/// One side of a chart: which values it spans, how far apart they stand, and the ticks to label.
#[derive(Clone)]
pub(super) struct Axis {
    ends: (f64, f64),
    ticks: Vec<(f64, String)>,
    logarithmic: bool,
    /// Of one with named rows, how many pixels it is long; of a level one, how wide its chart is; `None` as all others.
    pub(super) pixels: Option<u32>,
}

impl Axis {
    /// Even distances for even differences, over the range of `values`.
    pub(super) fn linear(values: impl Iterator<Item = f64>) -> Self {
        let (low, high) = range(values);
        Self {
            ends: widen(low, high),
            ticks: numbered(linear_ticks(low, high)),
            logarithmic: false,
            pixels: None,
        }
    }

    /// The same from zero on, for what is compared by its length.
    pub(super) fn from_zero(values: impl Iterator<Item = f64>) -> Self {
        let (_, high) = range(values.chain([0.0]));
        let high = if high > 0.0 { high } else { 1.0 };
        Self {
            ends: (0.0, high * 1.05),
            ticks: numbered(linear_ticks(0.0, high)),
            logarithmic: false,
            pixels: None,
        }
    }

    /// Even distances for even ratios. Values must be positive.
    pub(super) fn logarithmic(values: impl Iterator<Item = f64>) -> Self {
        let (low, high) = range(values.map(f64::log10));
        Self {
            ends: widen(low, high),
            ticks: numbered(log_ticks(low, high)),
            logarithmic: true,
            pixels: None,
        }
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

    /// The last value that has a place, of one that is not logarithmic.
    pub(super) fn end(&self) -> f64 {
        self.ends.1
    }

    /// The same with more room, without a tick, up to a value.
    pub(super) fn up_to(self, end: f64) -> Self {
        Self { ends: (self.ends.0, end.max(self.ends.1)), ..self }
    }

    /// The same, level, of a chart that is so many pixels wide.
    pub(super) fn wide(self, pixels: u32) -> Self {
        Self { pixels: Some(pixels), ..self }
    }

    /// From 0 to 1, without ticks, with room for texts at both ends.
    pub(super) fn unlabelled() -> Self {
        Self { ends: (-0.4, 1.12), ticks: Vec::new(), logarithmic: false, pixels: None }
    }

    /// One place a name: 0, 1, 2, ….
    pub(super) fn categories(names: &[String]) -> Self {
        const LONGEST: usize = 16;
        let ticks = names.iter().enumerate().map(|(i, name)| (i as f64, shorten(name, LONGEST))).collect();
        let last = names.len().saturating_sub(1) as f64;
        Self { ends: (-0.5, last + 0.5), ticks, logarithmic: false, pixels: None }
    }

    /// An upright axis with names at places of its own, and as many pixels as they need.
    pub(super) fn rows(names: impl Iterator<Item = (f64, String)>, ends: (f64, f64), pixels: u32) -> Self {
        const LONGEST: usize = 24;
        let ticks = names.map(|(place, name)| (place, shorten_middle(&name, LONGEST))).collect();
        Self { ends, ticks, logarithmic: false, pixels: Some(pixels) }
    }

    /// Letters of the longest label.
    pub(super) fn longest_label(&self) -> usize {
        self.ticks.iter().map(|(_, label)| label.chars().count()).max().unwrap_or_default()
    }
}

fn numbered(ticks: Vec<f64>) -> Vec<(f64, String)> {
    let label = |value: f64| match numbers::number(value).strip_prefix('-') {
        Some(size) => format!("−{size}"),
        None => numbers::number(value),
    };
    ticks.into_iter().map(|value| (value, label(value))).collect()
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
fn shorten(name: &str, longest: usize) -> String {
    if name.chars().count() <= longest {
        return name.into();
    }
    name.chars().take(longest.saturating_sub(1)).chain(['…']).collect()
}

/// The same with its beginning and its end: names of devices differ there.
fn shorten_middle(name: &str, longest: usize) -> String {
    let letters: Vec<char> = name.chars().collect();
    if letters.len() <= longest {
        return name.into();
    }
    let end = longest.saturating_sub(1) / 2;
    let begin = longest.saturating_sub(1) - end;
    letters[..begin].iter().chain(&['…']).chain(&letters[letters.len() - end..]).collect()
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
    fn a_few_chosen_values_have_a_tick_each() {
        let ticks = |axis: &Axis| axis.ticks.iter().map(|(_, label)| label.clone()).collect::<Vec<_>>();
        let batches = Axis::chosen(&[1.0, 2.0, 24.0]);
        assert_eq!((ticks(&batches), batches.logarithmic), (vec!["1".into(), "2".into(), "24".into()], true));
        assert!(!Axis::chosen(&[8.0, 16.0]).logarithmic);
        assert!(Axis::chosen(&(1..=20).map(f64::from).collect::<Vec<_>>()).ticks.len() < 12);
        assert_eq!(ticks(&Axis::from_zero([2.0, 4.0].into_iter())), ["0", "1", "2", "3", "4"]);
        assert_eq!(ticks(&Axis::linear([-1.0, 1.0].into_iter())), ["−1", "−0.5", "0", "0.5", "1"]);
        let above = Axis::from_zero([4.0].into_iter()).up_to(6.0);
        assert_eq!((ticks(&above).len(), above.end()), (5, 6.0), "room without ticks");
    }

    #[test]
    fn rows_have_names_and_a_length() {
        let names =
            [(-0.5, "agent · cuda:0".to_string()), (-3.0, "a-name-that-is-longer-than-others".into())];
        let axis = Axis::rows(names.into_iter(), (-4.0, 0.0), 104);
        let labels: Vec<_> = axis.ticks.iter().map(|(_, label)| label.as_str()).collect();
        assert_eq!(labels, ["agent · cuda:0", "a-name-that-…than-others"]);
        assert_eq!((axis.longest_label(), axis.pixels, axis.range()), (24, Some(104), -4.0..0.0));
    }
}
