//! Collectives in a world of one: copies, times a factor.

use unisum_kernels::Element;
use unisum_kernels::Folded;

use crate::collective::{Buffers, Collective};
use crate::reduction::Outcome;

/// What the collective is in a world of one, where the buffers fit.
pub(crate) fn run<T: Element>(collective: &Collective, buffers: Buffers<'_, T>) -> Outcome {
    let data = match buffers {
        Buffers::InPlace(data) => data,
        Buffers::Apart(input, output) => {
            output.copy_from_slice(input);
            output
        }
    };
    let fold = collective.fold(T::DTYPE);
    let folds = fold.watch || fold.factor.is_some();
    if !collective.kind().reduces() || data.is_empty() || !folds {
        return Outcome::default();
    }
    let (own, count): (*mut u8, usize) = (data.as_mut_ptr().cast(), data.len());
    // SAFETY: the slice holds `count` elements, and a fold of one source in place is allowed.
    let folded = unsafe { fold.run(own, &[own.cast_const()], count) };
    Outcome { nonfinite: folded == Folded::Nonfinite }
}
