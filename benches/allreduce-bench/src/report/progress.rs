//! A line on the terminal that says what is being measured.

use std::io::{self, IsTerminal as _};

use unisum::{Dtype, ReduceOp};

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
    pub(crate) fn step(&mut self, bytes: usize, dtype: Dtype, op: ReduceOp, algorithm: &str) {
        self.done += 1;
        if self.shown {
            let Self { done, steps, .. } = self;
            eprint!("{ERASE}measuring {bytes} B of {dtype}, {op}, {algorithm} ({done} of {steps})");
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
