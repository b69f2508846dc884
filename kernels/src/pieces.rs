//! Folds that a user's function does, piece by piece.

use std::mem::MaybeUninit;

use super::{Fold, Folded};
use crate::custom::{Custom, Panicked};
use crate::{Dtype, ReduceOp};

/// Room for a piece of every source in turn: small enough for the stack and the first-level cache.
#[repr(align(64))]
struct Piece([MaybeUninit<u8>; BYTES]);

const BYTES: usize = 4096;

impl Piece {
    const fn new() -> Self {
        Self([const { MaybeUninit::uninit() }; BYTES])
    }

    const fn start(&mut self) -> *mut u8 {
        self.0.as_mut_ptr().cast()
    }

    /// # Safety
    /// `bytes` bytes at `from` may be read, and are no more than a piece holds.
    unsafe fn fill(&mut self, from: *const u8, bytes: usize) {
        // SAFETY: the caller vouches for the source; this is apart from it and holds as many.
        unsafe { self.start().copy_from_nonoverlapping(from, bytes) };
    }
}

/// Folds as [`Fold::run`] says, with `custom` instead of an operation.
///
/// Each piece is folded apart from the destination, which may be a source that comes later.
///
/// # Safety
/// The contract of [`Fold::run`], for elements that `custom` is meant for.
pub(super) unsafe fn fold(
    fold: &Fold,
    custom: Custom,
    dst: *mut u8,
    sources: &[*const u8],
    count: usize,
) -> Folded {
    let piece = BYTES / fold.dtype.bytes();
    let last = Fold { watch: fold.watch, ..Fold::new(fold.dtype, ReduceOp::Sum) };
    let mut room = [const { Piece::new() }; 2];
    let mut outcome = Folded::Done;
    for at in (0..count).step_by(piece) {
        let len = piece.min(count - at);
        let bytes = at * fold.dtype.bytes();
        // SAFETY: the elements are within the count.
        let folded = unsafe { fold_piece(&mut room, fold.dtype, custom, (sources, bytes), len) };
        if folded.is_err() {
            return Folded::Panicked;
        }
        // The function's NaN become the canonical one on the way.
        // SAFETY: the elements are within the count; the piece is apart from them.
        let copied = unsafe { last.run(dst.wrapping_add(bytes), &[room[0].start()], len) };
        if copied == Folded::Nonfinite {
            outcome = Folded::Nonfinite;
        }
    }
    outcome
}

/// Folds `len` elements, `at` bytes into the sources, into the first room.
///
/// # Safety
/// The sources hold these elements, no more than a piece, and nobody writes to them.
unsafe fn fold_piece(
    [acc, copy]: &mut [Piece; 2],
    dtype: Dtype,
    custom: Custom,
    (sources, at): (&[*const u8], usize),
    len: usize,
) -> Result<(), Panicked> {
    let size = dtype.bytes();
    let [first, others @ ..] = sources else { return Ok(()) };
    // SAFETY: the caller vouches for the source.
    unsafe { acc.fill(first.wrapping_add(at), len * size) };
    for other in others {
        let mut other = other.wrapping_add(at);
        if !other.addr().is_multiple_of(size) {
            // SAFETY: the caller vouches for the source.
            unsafe { copy.fill(other, len * size) };
            other = copy.start();
        }
        // SAFETY: `acc` and `other` are aligned; they hold `len` elements and do not overlap.
        unsafe { custom.call(acc.start(), other, len) }?;
    }
    Ok(())
}
