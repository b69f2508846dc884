//! A line on the terminal that says what is being measured.

use std::fmt::Display;
use std::io::{self, IsTerminal as _};

/// The progress line; nothing unless standard error is a terminal.
#[derive(Debug)]
pub(crate) struct Progress {
    shown: bool,
    done: usize,
    steps: usize,
}

impl Progress {
    /// The line of the rank that prints.
    pub(crate) fn new(prints: bool, steps: usize) -> Self {
        Self { shown: prints && io::stderr().is_terminal(), done: 0, steps }
    }

    /// Says what comes next.
    pub(crate) fn step(&mut self, what: impl Display) {
        self.done += 1;
        if self.shown {
            eprint!("{ERASE}{what} ({} of {})", self.done, self.steps);
        }
    }

    /// Takes the line away, so that others can be written.
    pub(crate) fn clear(&self) {
        if self.shown {
            eprint!("{ERASE}");
        }
    }
}

/// Back to the first column, and erase the line.
const ERASE: &str = "\r\x1b[K";
