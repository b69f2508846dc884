//! Collectives in a world of one: copies, times a factor.

use unisum_kernels::Folded;

use crate::collective::Collective;
use crate::collective::raw::RawBuffers;
use crate::collective::reduction::Outcome;

/// What the collective is in a world of one, where the buffers fit.
pub(crate) fn run(collective: &Collective, buffers: &RawBuffers<'_>) -> Outcome {
    let ((from, given), (own, bytes)) = (buffers.input(), buffers.output());
    if !buffers.is_in_place() {
        assert_eq!(given, bytes, "the buffers of a world of one are equally long");
        // SAFETY: input and output are apart and equally long.
        unsafe { from.copy_to_nonoverlapping(own, bytes) };
    }
    let dtype = buffers.dtype();
    let fold = collective.fold(dtype);
    let folds = fold.watch || fold.factor.is_some();
    if !collective.kind().reduces() || bytes == 0 || !folds {
        return Outcome::default();
    }
    let (own, count) = (own.as_ptr(), bytes / dtype.bytes());
    // SAFETY: the buffer holds `count` elements, and a fold of one source in place is allowed.
    let folded = unsafe { fold.run(own, &[own.cast_const()], count) };
    Outcome { nonfinite: folded == Folded::Nonfinite }
}
