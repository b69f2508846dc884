//! Folds, and what they detect.

use unisum_kernels::{Fold, Folded};

/// How the elements of one collective are folded, and what was detected so far.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Folding {
    fold: Fold,
    /// Whether this rank has an infinite or NaN result.
    pub(crate) nonfinite: bool,
    /// Whether a function of the user panicked.
    pub(crate) panicked: bool,
}

/// What one fold does besides folding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Extras {
    /// Divide by the number of ranks: the last fold of an average.
    pub(crate) divides: bool,
    /// Multiply by the factor: the first fold of the inputs.
    pub(crate) scales: bool,
    /// Whether results are written: data that passes through to another rank is not watched.
    pub(crate) watches: bool,
}

impl Folding {
    /// With the `fold` that the caller requested.
    pub(crate) const fn new(fold: Fold) -> Self {
        Self { fold, nonfinite: false, panicked: false }
    }

    pub(crate) const fn element_bytes(&self) -> usize {
        self.fold.dtype.bytes()
    }

    pub(crate) const fn watches(&self) -> bool {
        self.fold.watch
    }

    /// Runs the fold and records what it detected.
    ///
    /// # Safety
    /// As [`Fold::run`], with `bytes` bytes of whole elements.
    pub(crate) unsafe fn run(
        &mut self,
        into: *mut u8,
        sources: &[*const u8],
        bytes: usize,
        extras: Extras,
    ) {
        let fold = Fold {
            divide_by: self.fold.divide_by.filter(|_| extras.divides),
            factor: self.fold.factor.filter(|_| extras.scales),
            watch: self.fold.watch && extras.watches,
            ..self.fold
        };
        // SAFETY: the caller promised it.
        let folded = unsafe { fold.run(into, sources, bytes / self.element_bytes()) };
        match folded {
            Folded::Done => {}
            Folded::Nonfinite => self.nonfinite = true,
            Folded::Panicked => self.panicked = true,
        }
    }
}
