//! How far something is, on a terminal.

use std::io::IsTerminal as _;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use crate::output::Output;
use crate::units;

/// A line on standard error; nothing where that is no terminal, or JSON was asked for. It goes away when it is dropped.
pub struct Bar(ProgressBar);

impl Bar {
    pub fn new(out: &Output) -> Self {
        if out.is_json() || !std::io::stderr().is_terminal() {
            return Self(ProgressBar::hidden());
        }
        let bar = ProgressBar::new(0);
        if let Ok(style) = ProgressStyle::with_template("{prefix} [{bar:30}] {pos}/{len} positions, {msg}") {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.enable_steady_tick(Duration::from_millis(200));
        Self(bar)
    }

    /// So many of so many positions, so many bytes.
    pub fn at(&self, what: &'static str, positions: u64, total: u64, bytes: u64) {
        self.0.set_prefix(what);
        self.0.set_length(total);
        self.0.set_position(positions);
        self.0.set_message(units::bytes(bytes));
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}
