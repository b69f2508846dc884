//! How elements are reduced, and what a reduction tells beside its result.

use unisum_kernels::Fold;
use unisum_kernels::{CustomOp, Dtype, Element, ReduceOp};

/// How elements are reduced: an operation, a factor for the inputs, whether to look for infinities
/// and NaNs.
///
/// A [`ReduceOp`] is one by itself. With a [`CustomOp`] the elements are folded by a function of
/// the program; if that does not commute they are folded in rank order.
#[derive(Clone, Copy, Debug)]
pub struct Reduction {
    fold: Fold,
    /// The element type that a custom function is made for.
    made_for: Option<Dtype>,
}

impl Reduction {
    /// Plain `op`.
    pub const fn new(op: ReduceOp) -> Self {
        // The type is put in when the buffers are known.
        Self { fold: Fold::new(Dtype::U8, op), made_for: None }
    }

    /// A sum of inputs that are multiplied by `factor` before they are added, in the same pass;
    /// for floats. All ranks give the same factor.
    pub const fn sum_scaled_by(factor: f64) -> Self {
        let mut reduction = Self::new(ReduceOp::Sum);
        reduction.fold.factor = Some(factor);
        reduction
    }

    /// Has [`Outcome::nonfinite`] tell whether a result is infinite or NaN, the same on all ranks,
    /// at no further pass over the data and no further message. For sums and products of floats in
    /// an all-reduce; a reduce-scatter tells each rank of its own block. Of others nothing is told.
    #[must_use]
    pub const fn watched(mut self) -> Self {
        // What a function of the program makes of an infinity need not be one.
        self.fold.watch = self.fold.custom.is_none()
            && matches!(self.fold.op, ReduceOp::Sum | ReduceOp::Product | ReduceOp::Average);
        self
    }

    /// The operation and whether results are watched, if there is nothing else to it.
    pub(crate) const fn plain(&self) -> Option<(ReduceOp, bool)> {
        match self.fold {
            Fold { op, watch, factor: None, custom: None, .. } => Some((op, watch)),
            _ => None,
        }
    }

    /// The fold of elements of type `dtype`.
    pub(crate) fn fold(&self, dtype: Dtype) -> Fold {
        let watch = self.fold.watch && dtype.is_float();
        Fold { dtype, watch, ..self.fold }
    }

    /// Whether the order of the operands is part of the result.
    pub(crate) fn is_ordered(&self) -> bool {
        self.fold.custom.is_some_and(|custom| !custom.is_commutative())
    }

    /// Whether elements of type `dtype` can be reduced so; else what is wrong.
    pub(crate) fn check(&self, dtype: Dtype) -> Result<(), String> {
        if let Some(made_for) = self.made_for.filter(|&made_for| made_for != dtype) {
            return Err(format!(
                "a function that reduces {made_for} was given elements of {dtype}"
            ));
        }
        self.fold(dtype).check_defined().map_err(|undefined| undefined.to_string())
    }
}

impl From<ReduceOp> for Reduction {
    fn from(op: ReduceOp) -> Self {
        Self::new(op)
    }
}

impl<T: Element> From<CustomOp<T>> for Reduction {
    fn from(function: CustomOp<T>) -> Self {
        let mut reduction = Self::new(ReduceOp::Sum);
        reduction.fold.custom = Some(function.erased());
        reduction.made_for = Some(T::DTYPE);
        reduction
    }
}

/// What a collective tells beside its result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Outcome {
    /// Whether some element of the result is infinite or NaN: of an all-reduce's, the same on all
    /// ranks; of this rank's block, of a reduce-scatter. Only if that was asked for
    /// ([`Reduction::watched`]) and is told, else `false`.
    pub nonfinite: bool,
}
