//! How elements are reduced, and what a reduction reports besides its result.

use unisum_kernels::{Custom, CustomOp, Dtype, Element, Fold, ReduceOp};

/// How elements are reduced: an operation, a factor for the inputs, and whether to detect
/// infinities and NaNs.
///
/// A [`ReduceOp`] converts into one. With a [`CustomOp`], a user function folds the elements; if it
/// does not commute, they are folded in rank order.
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

    /// A sum of inputs that are multiplied by `factor` before they are added, in the same pass; for
    /// floats. All ranks pass the same factor.
    pub const fn sum_scaled_by(factor: f64) -> Self {
        let mut reduction = Self::new(ReduceOp::Sum);
        reduction.fold.factor = Some(factor);
        reduction
    }

    /// A reduction of elements of type `dtype` by a function.
    pub(super) const fn custom(dtype: Dtype, custom: Custom) -> Self {
        let mut reduction = Self::new(ReduceOp::Sum);
        reduction.fold.custom = Some(custom);
        reduction.made_for = Some(dtype);
        reduction
    }

    /// Makes [`Outcome::nonfinite`] report whether a result is infinite or NaN, without another
    /// pass over the data or another message. For sums and products of floats: in an all-reduce,
    /// the answer is the same on all ranks; in a reduce-scatter, it is about each rank's own block.
    /// Other collectives report nothing.
    #[must_use]
    pub const fn detect_nonfinite(mut self) -> Self {
        // What a user function makes of an infinity need not be one.
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

    /// Checks that elements of type `dtype` can be reduced this way.
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
        Self::custom(T::DTYPE, function.erased())
    }
}

/// What a collective reports besides its result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Outcome {
    /// Whether an element of the result is infinite or NaN: of an all-reduce's result, the same on
    /// all ranks; of this rank's block, in a reduce-scatter. `false` unless it was requested
    /// ([`Reduction::detect_nonfinite`]) and the collective reports it.
    pub nonfinite: bool,
}
