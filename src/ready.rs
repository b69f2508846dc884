//! The call that was made last, kept ready: training makes the same call again and again.

use std::ops::Range;
use std::sync::Arc;

use unisum_link::kernels::Fold;
use unisum_link::{Call, Collective as Kind, Dtype, Rank, ReduceOp};

use crate::collective::{Blocks, Collective, Extents, Lengths};
use crate::engine::program::Program;

/// A call that can be made: all of it but its number and its memory.
#[derive(Debug)]
pub(crate) struct Ready {
    /// How it is known again, if it is one of those calls.
    pub(crate) known: Option<Known>,
    /// Which algorithm was fixed when the call got ready.
    pub(crate) fixed: usize,
    pub(crate) call: Call,
    pub(crate) fold: Fold,
    pub(crate) program: Arc<Program>,
}

/// What was given for a call, its memory apart, if it is one of those that are known again: those
/// of even blocks, without a factor and without a function of the user; not an all-to-all in place,
/// which copies its input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Form {
    kind: Kind,
    root: Rank,
    op: ReduceOp,
    watch: bool,
    dtype: Dtype,
    lengths: Lengths,
}

impl Form {
    pub(crate) fn new(collective: &Collective, dtype: Dtype, lengths: Lengths) -> Option<Self> {
        let (kind, root) = (collective.kind(), collective.root());
        let (op, watch) = collective.reduction().plain()?;
        let copies = kind == Kind::AllToAll && matches!(lengths, Lengths::InPlace(_));
        let form = Self { kind, root, op, watch, dtype, lengths };
        (collective.has_even_counts() && !copies).then_some(form)
    }
}

/// How a call is known when it comes again, and what followed from that.
#[derive(Clone, Debug)]
pub(crate) struct Known {
    form: Form,
    /// The bytes of the first buffer that are put in, and of the last that are got.
    pub(crate) input: Range<usize>,
    pub(crate) output: Range<usize>,
    pub(crate) is_empty: bool,
}

impl Known {
    pub(crate) fn new(form: Form, extents: &Extents) -> Self {
        let (input, output) = extents.bytes(form.dtype);
        Self { form, input, output, is_empty: extents.blocks == Blocks::Even(0) }
    }
}

impl Ready {
    /// What is known of a call of this form, if it is this one and that algorithm is fixed.
    pub(crate) fn again(&self, form: Form, fixed: usize) -> Option<&Known> {
        self.known.as_ref().filter(|known| known.form == form && self.fixed == fixed)
    }
}
