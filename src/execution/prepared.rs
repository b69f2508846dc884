//! The call that was made last, kept ready: training makes the same call again and again.

use std::ops::Range;
use std::sync::Arc;

use unisum_kernels::Fold;
use unisum_kernels::{Dtype, ReduceOp};
use unisum_link::{Call, CollectiveKind as Kind, Rank};

use crate::collective::agreement::Purpose;
use crate::collective::{Collective, Extents, Lengths};
use unisum_engine::Program;

/// A call that can be made: all of it but its number and its memory.
#[derive(Debug)]
pub(crate) struct PreparedCall {
    /// How it is known again, if it is one of those calls.
    pub(crate) known: Option<CachedCall>,
    /// Which algorithm was fixed when the call got ready.
    pub(crate) fixed: usize,
    pub(crate) call: Call,
    /// The call's own part of its history.
    pub(crate) fingerprint: u64,
    pub(crate) fold: Fold,
    pub(crate) program: Arc<Program>,
}

/// What was given for a call, its memory apart, if it is one of those that are known again: those
/// of even blocks, without a factor and without a function of the user; not an all-to-all in place,
/// which copies its input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct CallSignature {
    kind: Kind,
    root: Rank,
    op: ReduceOp,
    watch: bool,
    dtype: Dtype,
    lengths: Lengths,
}

impl CallSignature {
    pub(crate) fn new(collective: &Collective, dtype: Dtype, lengths: Lengths) -> Option<Self> {
        let (kind, root) = (collective.kind(), collective.root());
        let (op, watch) = collective.reduction().plain()?;
        let copies = kind == Kind::AllToAll && matches!(lengths, Lengths::InPlace(_));
        let form = Self { kind, root, op, watch, dtype, lengths };
        let is_users = collective.purpose() == Purpose::User;
        (collective.has_even_counts() && !copies && is_users).then_some(form)
    }
}

/// How a call is known when it comes again, and what followed from that.
#[derive(Clone, Debug)]
pub(crate) struct CachedCall {
    form: CallSignature,
    /// The bytes of the first buffer that are put in, and of the last that are got.
    pub(crate) input: Range<usize>,
    pub(crate) output: Range<usize>,
    pub(crate) is_empty: bool,
}

impl CachedCall {
    pub(crate) fn new(form: CallSignature, extents: &Extents) -> Self {
        let (input, output) = extents.bytes(form.dtype);
        Self { form, input, output, is_empty: extents.blocks.is_empty() }
    }
}

impl PreparedCall {
    /// What is known of a call of this form, if it is this one and that algorithm is fixed.
    pub(crate) fn again(&self, form: CallSignature, fixed: usize) -> Option<&CachedCall> {
        self.known.as_ref().filter(|known| known.form == form && self.fixed == fixed)
    }
}

#[cfg(test)]
mod tests {
    use unisum_kernels::CustomOp;

    use super::*;
    use crate::collective::reduction::Reduction;

    const IN_PLACE: Lengths = Lengths::InPlace(8);

    fn form(collective: &Collective) -> Option<CallSignature> {
        CallSignature::new(collective, Dtype::F32, IN_PLACE)
    }

    #[test]
    fn calls_that_differ_in_anything_but_addresses_have_different_forms() {
        let sum = Collective::all_reduce(ReduceOp::Sum);
        let apart = Lengths::OutOfPlace { input: 8, output: 8 };
        let forms = [
            form(&sum),
            form(&Collective::all_reduce(ReduceOp::Max)),
            form(&Collective::all_reduce(Reduction::new(ReduceOp::Sum).detect_nonfinite())),
            form(&Collective::reduce(ReduceOp::Sum, 0)),
            form(&Collective::reduce(ReduceOp::Sum, 1)),
            // As many bytes, and as many elements.
            CallSignature::new(&sum, Dtype::F64, Lengths::InPlace(4)),
            CallSignature::new(&sum, Dtype::I32, IN_PLACE),
            CallSignature::new(&sum, Dtype::F32, apart),
            CallSignature::new(&sum, Dtype::F32, Lengths::InPlace(0)),
        ];
        for (at, form) in forms.iter().enumerate() {
            assert!(form.is_some(), "{at}");
            assert!(!forms[..at].contains(form), "{at}: {form:?}");
        }
        assert_eq!(form(&Collective::all_reduce(ReduceOp::Sum)), forms[0]);
    }

    #[test]
    fn calls_of_which_more_was_given_are_not_known_again() {
        let function = CustomOp::<f32>::commutative(|acc, other| acc.copy_from_slice(other));
        let others = [
            Collective::all_reduce(Reduction::sum_scaled_by(0.5)),
            Collective::all_reduce(function),
            Collective::all_gather().with_counts(&[3, 5]),
            Collective::all_to_all_v(&[1, 7], &[1, 7]),
            Collective::all_to_all(),
        ];
        assert!(others.iter().all(|it| form(it).is_none()));
        let apart = Lengths::OutOfPlace { input: 8, output: 8 };
        assert!(CallSignature::new(&Collective::all_to_all(), Dtype::F32, apart).is_some());
    }
}
