//! How far a task is, on standard error: a changing line on a terminal, a line a tenth of the way elsewhere.

use crate::output::say;
use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;

/// What is shown of a task while it runs.
pub(crate) struct Progress {
    task: String,
    bar: Option<ProgressBar>,
    tenth: usize,
}

impl Progress {
    pub(crate) fn new(task: &str) -> Self {
        Self { task: task.to_owned(), bar: None, tenth: 0 }
    }

    /// Shows how many of the task's requests are answered.
    pub(crate) fn show(&mut self, done: usize, total: usize) {
        if std::io::stderr().is_terminal() {
            let bar = || {
                let bar = ProgressBar::new(total as u64).with_message(self.task.clone());
                match ProgressStyle::with_template("{msg}  {bar:24} {pos}/{len} requests  {eta}") {
                    Ok(style) => bar.with_style(style),
                    Err(_) => bar,
                }
            };
            return self.bar.get_or_insert_with(bar).set_position(done as u64);
        }
        let tenth = 10 * done / total.max(1);
        if tenth > self.tenth {
            self.tenth = tenth;
            say!("{}: {done} of {total} requests", self.task);
        }
    }

    /// Takes the changing line away.
    pub(crate) fn finish(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }
}
