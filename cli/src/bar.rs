//! How much of a number of bytes is done: a bar on a terminal, a line of what is large elsewhere.

use crate::output::{bytes, say};
use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;

/// Bytes that are worth a line where there is no terminal.
const LARGE: u64 = 10_000_000;

/// One such bar. It is gone when it is dropped.
pub(crate) struct Bar(Option<ProgressBar>);

impl Bar {
    /// `doing` and `what` say what is done with what, of which `done` bytes are done already.
    pub(crate) fn new(doing: &str, what: &str, done: u64, total: u64) -> Self {
        if !std::io::stderr().is_terminal() {
            if total >= LARGE {
                let from = if done > 0 { format!(" from byte {done} on") } else { String::new() };
                say!("{doing} {what}, {}{from}", bytes(total));
            }
            return Self(None);
        }
        let bar = ProgressBar::new(total).with_position(done).with_message(format!("{doing} {what}"));
        let template = "{bar:24} {bytes}/{total_bytes} {bytes_per_sec}  {wide_msg}  {eta}";
        Self(Some(match ProgressStyle::with_template(template) {
            Ok(style) => bar.with_style(style),
            Err(_) => bar,
        }))
    }

    /// So many bytes more are done.
    pub(crate) fn add(&self, count: u64) {
        self.0.iter().for_each(|bar| bar.inc(count));
    }

    /// So many bytes are done.
    pub(crate) fn set(&self, done: u64) {
        self.0.iter().for_each(|bar| bar.set_position(done));
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.iter().for_each(ProgressBar::finish_and_clear);
    }
}
