//! Progress on standard error: one changing line on a terminal, a line a tenth of the way elsewhere.

use crate::output::{bytes, say};
use domain::metric::{self, MetricPoint};
use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use trainer::model::LoadProgress;

/// What is shown of a run while it trains.
pub(crate) struct Progress {
    total: u64,
    bar: Option<ProgressBar>,
    tenth: u64,
}

impl Progress {
    /// Of a run of `total` steps of which `step` are made.
    pub(crate) fn new(step: u64, total: u64) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(total).with_position(step);
            match ProgressStyle::with_template("{bar:24} {pos}/{len}  {wide_msg}  {eta}") {
                Ok(style) => bar.with_style(style),
                Err(_) => bar,
            }
        });
        Self { total, bar, tenth: Self::tenth_of(step, total) }
    }

    /// Shows a step; `point` is what was measured at it.
    pub(crate) fn step(&mut self, step: u64, point: Option<&MetricPoint>) {
        if let Some(bar) = &self.bar {
            bar.set_position(step);
            if let Some(point) = point {
                bar.set_message(text(point));
            }
            return;
        }
        let (Some(point), tenth) = (point, Self::tenth_of(step, self.total)) else { return };
        if tenth > self.tenth {
            self.tenth = tenth;
            say!("step {step}/{}  {}", self.total, text(point));
        }
    }

    /// Takes the changing line away.
    pub(crate) fn finish(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }

    fn tenth_of(step: u64, total: u64) -> u64 {
        10 * step / total.max(1)
    }
}

/// What is shown while a model's weights are read: a changing line on a terminal, a line a tenth of the way elsewhere, neither for
/// what is small.
pub(crate) struct Loading {
    what: &'static str,
    bar: Option<ProgressBar>,
    tenth: u64,
}

/// Bytes of weights below which loading takes no time worth showing.
const SMALL: u64 = 1_000_000_000;

impl Loading {
    pub(crate) fn new() -> Self {
        Self::of("loading")
    }

    /// Of what is done with the weights.
    pub(crate) fn of(what: &'static str) -> Self {
        Self { what, bar: None, tenth: 0 }
    }

    /// Shows how far the loading of a base is.
    pub(crate) fn watch(&mut self, progress: LoadProgress) {
        if let LoadProgress::Read { bytes, of } = progress {
            self.read(bytes, of);
        }
    }

    /// Shows how many bytes of the files are read.
    pub(crate) fn read(&mut self, read: u64, total: u64) {
        if total < SMALL {
            return;
        }
        if std::io::stderr().is_terminal() {
            let bar = || {
                let bar = ProgressBar::new(total).with_message(self.what);
                match ProgressStyle::with_template("{msg} {bar:24} {bytes}/{total_bytes}  {eta}") {
                    Ok(style) => bar.with_style(style),
                    Err(_) => bar,
                }
            };
            return self.bar.get_or_insert_with(bar).set_position(read);
        }
        let tenth = Progress::tenth_of(read, total);
        if tenth > self.tenth {
            self.tenth = tenth;
            say!("{}: {} of {}", self.what, bytes(read), bytes(total));
        }
    }

    /// Takes the changing line away.
    pub(crate) fn finish(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}

fn text(point: &MetricPoint) -> String {
    let shown = [
        ("loss", metric::LOSS, 4),
        ("eval/loss", metric::EVAL_LOSS, 4),
        ("grad norm", metric::GRAD_NORM, 3),
        ("tokens/s", metric::TOKENS_PER_SECOND, 0),
    ];
    let part = |(label, name, digits): (&str, &str, usize)| {
        point.get(name).map(|value| format!("{label} {value:.digits$}"))
    };
    shown.into_iter().filter_map(part).collect::<Vec<_>>().join("  ")
}
