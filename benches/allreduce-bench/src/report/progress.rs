//! A line on the terminal that says what is being measured.

use std::io::{self, IsTerminal as _};

use unisum::{Dtype, ReduceOp};

use crate::collective::Case;

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
    pub(crate) fn step(
        &mut self,
        case: &Case,
        dtype: Dtype,
        op: Option<ReduceOp>,
        algorithm: &str,
    ) {
        self.done += 1;
        if self.shown {
            let Self { done, steps, .. } = self;
            let (kind, bytes) = (case.kind, case.count * dtype.bytes());
            let op = op.map_or_else(String::new, |op| format!(", {op}"));
            eprint!("{ERASE}{kind} of {bytes} B, {dtype}{op}, {algorithm} ({done} of {steps})");
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
