//! Live progress on standard error: a changing block on a terminal, a line a change elsewhere.

use crate::board::{Board, Change};
use crate::output::say;
use domain::{Clock, SystemClock};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::Duration;

/// Seconds between two lines about trials that train, where there is no terminal.
const PLAIN_INTERVAL: Duration = Duration::from_secs(5);

/// Seconds without a line after which there is one about the sweep, where there is no terminal.
const PLAIN_SILENCE: Duration = Duration::from_secs(30);

/// Shows a board as it changes.
pub(crate) struct Progress {
    clock: SystemClock,
    screen: Screen,
}

enum Screen {
    Terminal {
        bars: MultiProgress,
        sweep: ProgressBar,
        trials: BTreeMap<u32, ProgressBar>,
    },
    /// When the last lines about trials that train were printed, and the last line at all.
    Plain {
        training: Duration,
        line: Duration,
    },
    Quiet,
}

impl Progress {
    /// On a terminal if standard error is one.
    pub(crate) fn new(quiet: bool) -> Self {
        let screen = if quiet {
            Screen::Quiet
        } else if std::io::stderr().is_terminal() {
            let bars = MultiProgress::new();
            let sweep = bars.add(ProgressBar::new_spinner());
            sweep.enable_steady_tick(Duration::from_millis(250));
            Screen::Terminal { bars, sweep, trials: BTreeMap::new() }
        } else {
            Screen::Plain { training: Duration::ZERO, line: Duration::ZERO }
        };
        Self { clock: SystemClock::new(), screen }
    }

    /// Seconds since it began.
    pub(crate) fn elapsed(&self) -> f64 {
        self.clock.monotonic().as_secs_f64()
    }

    /// Shows a change.
    pub(crate) fn show(&mut self, board: &Board, change: &Change) {
        let now = self.clock.monotonic();
        let sweep_line = board.sweep_line(now.as_secs_f64());
        match &mut self.screen {
            Screen::Quiet => {}
            Screen::Terminal { bars, sweep, trials } => {
                sweep.set_message(sweep_line);
                let (Change::Trial { number, .. } | Change::Progress(number)) = change else { return };
                let Some(trial) = board.trials.get(number) else { return };
                if trial.state.is_terminal() {
                    if let Some(bar) = trials.remove(number) {
                        bar.finish_and_clear();
                        bars.remove(&bar);
                    }
                    if matches!(change, Change::Trial { entered: true, .. }) {
                        let _ = bars.println(board.trial_line(*number));
                    }
                } else if trial.state.holds_device() {
                    let bar = trials.entry(*number).or_insert_with(|| {
                        let bar = bars.insert_before(sweep, ProgressBar::new(1));
                        if let Ok(style) = ProgressStyle::with_template("  {bar:16} {wide_msg}") {
                            bar.set_style(style);
                        }
                        bar
                    });
                    bar.set_length(trial.total_steps.unwrap_or(1));
                    bar.set_position(board.step(*number));
                    bar.set_message(board.trial_line(*number));
                }
            }
            Screen::Plain { training, line } => match change {
                Change::Trial { number, entered: true } => {
                    *line = now;
                    say!("{}", board.trial_line(*number));
                }
                Change::Progress(_) if now.saturating_sub(*training) >= PLAIN_INTERVAL => {
                    (*training, *line) = (now, now);
                    board.training().for_each(|(number, _)| say!("{}", board.trial_line(number)));
                    say!("{sweep_line}");
                }
                _ => {}
            },
        }
    }

    /// Shows that time passes, whether anything changes or not.
    pub(crate) fn tick(&mut self, board: &Board) {
        let now = self.clock.monotonic();
        let sweep_line = board.sweep_line(now.as_secs_f64());
        match &mut self.screen {
            Screen::Quiet => {}
            Screen::Terminal { sweep, .. } => sweep.set_message(sweep_line),
            Screen::Plain { line, .. } => {
                if now.saturating_sub(*line) >= PLAIN_SILENCE {
                    *line = now;
                    say!("{sweep_line}");
                }
            }
        }
    }

    /// Leaves the terminal clean.
    pub(crate) fn finish(self) {
        if let Screen::Terminal { bars, sweep, trials } = self.screen {
            trials.values().for_each(ProgressBar::finish_and_clear);
            sweep.finish_and_clear();
            let _ = bars.clear();
        }
    }
}
