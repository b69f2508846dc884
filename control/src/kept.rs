//! What other ranks tell rank 0 to keep.

use std::sync::{Mutex, PoisonError};

/// Lines that came and that nobody took yet. On other ranks than 0 there are none.
#[derive(Debug, Default)]
pub struct Kept(Mutex<Vec<String>>);

/// Most lines that wait.
const LINES_MAX: usize = 1 << 16;

impl Kept {
    pub(super) fn put(&self, line: String) {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() < LINES_MAX {
            lines.push(line);
        }
    }

    /// Takes them, in the order in which they came.
    pub fn take(&self) -> Vec<String> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
