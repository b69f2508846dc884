//! Looking for results that are infinite or NaN, while they are in registers.

use std::array::from_fn;

use super::isa::{Isa, Kernel, Task};
use super::number::{Float, Number};

/// What is remembered of the results, line by line.
pub(super) trait Watch<T: Number> {
    type Seen<const W: usize>: Copy;

    fn nothing<const W: usize>() -> Self::Seen<W>;
    fn see<const W: usize>(seen: Self::Seen<W>, line: [T; W]) -> Self::Seen<W>;
    /// Whether something that was seen is infinite or NaN.
    fn found<const W: usize>(seen: Self::Seen<W>) -> bool;
}

/// Does not look.
pub(super) struct Blind;

impl<T: Number> Watch<T> for Blind {
    type Seen<const W: usize> = ();

    #[inline(always)]
    fn nothing<const W: usize>() {}
    #[inline(always)]
    fn see<const W: usize>((): (), _: [T; W]) {}
    #[inline(always)]
    fn found<const W: usize>((): ()) -> bool {
        false
    }
}

/// Looks at every result, and remembers the greatest magnitudes.
pub(super) struct Nonfinite;

impl<T: Float> Watch<T> for Nonfinite {
    type Seen<const W: usize> = [T::Magnitude; W];

    #[inline(always)]
    fn nothing<const W: usize>() -> [T::Magnitude; W] {
        [T::Magnitude::default(); W]
    }
    #[inline(always)]
    fn see<const W: usize>(seen: [T::Magnitude; W], line: [T; W]) -> [T::Magnitude; W] {
        from_fn(|lane| seen[lane].max(line[lane].magnitude()))
    }
    #[inline(always)]
    fn found<const W: usize>(seen: [T::Magnitude; W]) -> bool {
        seen.iter().any(|magnitude| *magnitude >= T::INFINITE)
    }
}

/// Folds by blocks that stay in the first-level cache, and then looks at each.
///
/// # Safety
/// As `fold`, for elements `T`.
pub(super) unsafe fn after_blocks<T: Float>(fold: Kernel, isa: Isa, task: &Task<'_>) -> bool {
    const BLOCK_BYTES: usize = 4096;
    let block = BLOCK_BYTES / size_of::<T>();
    let mut found = false;
    for at in (0..task.count).step_by(block) {
        let (skip, count) = (task.skip + at * size_of::<T>(), block.min(task.count - at));
        let task = Task { skip, count, ..*task };
        // SAFETY: the caller keeps the same contract.
        unsafe { fold(isa, &task) };
        // SAFETY: the elements are within the count, for which `dst` was written.
        found |= unsafe { isa.any_nonfinite::<T>(task.dst.wrapping_add(skip), count) };
    }
    found
}
