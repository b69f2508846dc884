//! One pass of a reduction, and the kernel that executes it.

use std::num::NonZeroU32;

use half::{bf16, f16};

use crate::custom::Custom;
use crate::isa::{Isa, Kernel, Task};
use crate::number::{Arithmetic, Bits, Float, Ordered};
use crate::op::Undefined;
use crate::operator::{And, Average, Extreme, Or, Product, Scaled, Sum, Weighted, Xor};
use crate::watch::{self, Blind, Nonfinite};
use crate::{Bool, Dtype, ReduceOp, f8e4m3, f8e5m2, pieces};

/// One pass of a reduction: `dst[i] = source 0[i] ∘ source 1[i] ∘ …`, element by element.
///
/// The sources are folded from left to right, so their order is part of the result. 16-bit and
/// 8-bit floats are folded in `f32` and rounded once at the end. [`ReduceOp`] defines each
/// operation.
#[derive(Clone, Copy, Debug)]
pub struct Fold {
    /// The type of the elements.
    pub dtype: Dtype,
    /// The operation. `Average` folds like `Sum`; the division is `divide_by`.
    pub op: ReduceOp,
    /// Divides the folded element by this before it is rounded: the last pass of an average. With
    /// one source, the pass only divides. Only for `Sum` and `Average`.
    pub divide_by: Option<NonZeroU32>,
    /// Multiplies each element of every source by this before it is added. With one source, the
    /// pass only multiplies. Only for `Sum` of floats. Products of `f64` are rounded to `f64`; for
    /// all other types, the factor is rounded to `f32` first, and so are the products.
    pub factor: Option<f64>,
    /// Whether to detect an infinite or NaN result. Results of integers never are.
    pub watch: bool,
    /// A user function that folds instead of `op`, in the order of the sources. Its elements have
    /// type `dtype`; NaN results become the canonical one, and truth values become 0 or 1.
    pub custom: Option<Custom>,
}

/// The outcome of a fold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Folded {
    /// `dst` holds the results.
    Done,
    /// `dst` holds the results, and at least one is infinite or NaN. Only if [`Fold::watch`] is
    /// set.
    Nonfinite,
    /// The user function panicked. The contents of `dst` are unspecified.
    Panicked,
}

impl Fold {
    /// A pass that only folds.
    pub const fn new(dtype: Dtype, op: ReduceOp) -> Self {
        Self { dtype, op, divide_by: None, factor: None, watch: false, custom: None }
    }

    /// Checks that the fold is defined. User functions are defined for everything.
    ///
    /// # Errors
    /// States what `op` or `factor` is not defined for.
    pub fn check_defined(&self) -> Result<(), Undefined> {
        let Self { dtype, op, .. } = *self;
        if self.custom.is_some() {
            return Ok(());
        }
        if !op.is_defined_for(dtype) {
            return Err(Undefined::Operation { op, dtype });
        }
        match self.factor {
            Some(_) if op != ReduceOp::Sum => Err(Undefined::FactorOf(op)),
            Some(_) if !dtype.is_float() => Err(Undefined::FactorOfType(dtype)),
            _ => Ok(()),
        }
    }

    /// Folds `count` elements of each of `sources` into `dst`, on the best instruction set of this
    /// machine.
    ///
    /// Pointers need not be aligned to the element. Each source is read once, `dst` is written
    /// once, and nothing is allocated.
    ///
    /// # Panics
    /// If `sources` is empty, if the fold is not [defined](Self::check_defined), or if `divide_by`
    /// is set for an operation that does not sum, or together with `factor` or `custom`.
    ///
    /// # Safety
    /// Each source is valid for reads and `dst` for writes of `count · dtype.bytes()` bytes, and
    /// nobody writes to the sources or touches `dst` during the call. `dst` is exactly one of the
    /// sources or overlaps none. `custom` is meant for elements of `dtype`.
    pub unsafe fn run(&self, dst: *mut u8, sources: &[*const u8], count: usize) -> Folded {
        // SAFETY: the caller keeps the same contract.
        unsafe { self.run_with(Isa::best(), dst, sources, count) }
    }

    /// Like [`run`](Self::run), on the instruction set `isa`: for tests and measurements.
    ///
    /// # Panics
    /// As [`run`](Self::run).
    ///
    /// # Safety
    /// As [`run`](Self::run).
    pub unsafe fn run_with(
        &self,
        isa: Isa,
        dst: *mut u8,
        sources: &[*const u8],
        count: usize,
    ) -> Folded {
        self.assert_sound(sources);
        if let Some(custom) = self.custom {
            // SAFETY: the caller keeps the same contract.
            return unsafe { pieces::fold(self, custom, dst, sources, count) };
        }
        let divisor = self.divide_by.unwrap_or(NonZeroU32::MIN);
        let task =
            Task { dst, sources, skip: 0, count, divisor, factor: self.factor.unwrap_or(1.0) };
        // SAFETY: the caller keeps the same contract, and `sources` is not empty.
        unsafe { self.by_dtype(isa, &task) }
    }

    #[inline]
    fn assert_sound(&self, sources: &[*const u8]) {
        assert!(!sources.is_empty(), "a fold needs a source");
        if let Err(undefined) = self.check_defined() {
            panic!("{undefined}");
        }
        let sums = matches!(self.op, ReduceOp::Sum | ReduceOp::Average);
        let divides_alone = sums && self.factor.is_none() && self.custom.is_none();
        assert!(divides_alone || self.divide_by.is_none(), "{self:?} cannot be averaged");
    }

    /// # Safety
    /// As [`Isa::fold`], for elements of `self.dtype`.
    unsafe fn by_dtype(&self, isa: Isa, task: &Task<'_>) -> Folded {
        // Where integers wrap, the sign does not matter: one kernel serves both.
        let wraps = self.divide_by.is_none() && !matches!(self.op, ReduceOp::Min | ReduceOp::Max);
        // The number is how many accumulators a block has: 4 KiB of them.
        let by_op = match self.dtype {
            Dtype::F8E4M3 => Self::floats::<f8e4m3, 1024>,
            Dtype::F8E5M2 => Self::floats::<f8e5m2, 1024>,
            Dtype::F16 => Self::floats::<f16, 1024>,
            Dtype::Bf16 => Self::floats::<bf16, 1024>,
            Dtype::F32 => Self::floats::<f32, 1024>,
            Dtype::F64 => Self::floats::<f64, 512>,
            Dtype::I8 if !wraps => Self::integers::<i8, 4096>,
            Dtype::I8 | Dtype::U8 => Self::integers::<u8, 4096>,
            Dtype::I16 if !wraps => Self::integers::<i16, 2048>,
            Dtype::I16 | Dtype::U16 => Self::integers::<u16, 2048>,
            Dtype::I32 if !wraps => Self::integers::<i32, 1024>,
            Dtype::I32 | Dtype::U32 => Self::integers::<u32, 1024>,
            Dtype::I64 if !wraps => Self::integers::<i64, 512>,
            Dtype::I64 | Dtype::U64 => Self::integers::<u64, 512>,
            Dtype::Bool => Self::bits::<Bool>,
        };
        // SAFETY: the caller's contract, and `by_op` is the one for `self.dtype`.
        unsafe { by_op(self, isa, task) }
    }

    /// # Safety
    /// As [`Isa::fold`].
    unsafe fn floats<T: Float + Ordered, const N: usize>(
        &self,
        isa: Isa,
        task: &Task<'_>,
    ) -> Folded {
        if !self.watch {
            // SAFETY: the caller keeps the same contract.
            unsafe { self.blind::<T, N>()(isa, task) };
            return Folded::Done;
        }
        let found = match self.watching::<T, N>() {
            // SAFETY: the caller keeps the same contract.
            Some(fold) => unsafe { fold(isa, task) },
            // SAFETY: the caller keeps the same contract.
            None => unsafe { watch::after_blocks::<T>(self.blind::<T, N>(), isa, task) },
        };
        if found { Folded::Nonfinite } else { Folded::Done }
    }

    /// The kernel that watches its results: only the frequent ones have one.
    fn watching<T: Float, const N: usize>(&self) -> Option<Kernel> {
        match (self.op, self.divide_by, self.factor) {
            (ReduceOp::Sum | ReduceOp::Average, None, None) => {
                Some(Isa::fold::<T, Sum, Nonfinite, N>)
            }
            (ReduceOp::Sum | ReduceOp::Average, Some(divisor), None)
                if divisor.is_power_of_two() =>
            {
                Some(Isa::fold::<T, Scaled, Nonfinite, N>)
            }
            _ => None,
        }
    }

    /// The kernel that does not watch.
    fn blind<T: Float + Ordered, const N: usize>(&self) -> Kernel {
        match (self.op, self.divide_by) {
            (ReduceOp::Product, _) => Isa::fold::<T, Product, Blind, N>,
            (ReduceOp::Min, _) => Isa::fold::<T, Extreme<false>, Blind, N>,
            (ReduceOp::Max, _) => Isa::fold::<T, Extreme<true>, Blind, N>,
            (_, Some(divisor)) if divisor.is_power_of_two() => Isa::fold::<T, Scaled, Blind, N>,
            (_, Some(_)) => Isa::fold::<T, Average, Blind, N>,
            (_, None) if self.factor.is_some() => Isa::fold::<T, Weighted, Blind, N>,
            (_, None) => Isa::fold::<T, Sum, Blind, N>,
        }
    }

    /// # Safety
    /// As [`Isa::fold`].
    unsafe fn integers<T: Arithmetic + Ordered, const N: usize>(
        &self,
        isa: Isa,
        task: &Task<'_>,
    ) -> Folded {
        let fold = match (self.op, self.divide_by) {
            (ReduceOp::Sum | ReduceOp::Average, None) => Isa::fold::<T, Sum, Blind, N>,
            (ReduceOp::Sum | ReduceOp::Average, Some(_)) => Isa::fold::<T, Average, Blind, N>,
            (ReduceOp::Product, _) => Isa::fold::<T, Product, Blind, N>,
            (ReduceOp::Min, _) => Isa::fold::<T, Extreme<false>, Blind, N>,
            (ReduceOp::Max, _) => Isa::fold::<T, Extreme<true>, Blind, N>,
            (ReduceOp::BitAnd | ReduceOp::BitOr | ReduceOp::BitXor, _) => {
                let task = Task { count: task.count * size_of::<T>(), ..*task };
                // SAFETY: the elements are these bytes.
                return unsafe { self.bits::<u8>(isa, &task) };
            }
        };
        // SAFETY: the caller keeps the same contract.
        unsafe { fold(isa, task) };
        Folded::Done
    }

    /// # Safety
    /// As [`Isa::fold`].
    unsafe fn bits<T: Bits>(&self, isa: Isa, task: &Task<'_>) -> Folded {
        let fold = match self.op {
            ReduceOp::Product | ReduceOp::Min | ReduceOp::BitAnd => {
                Isa::fold::<T, And, Blind, 4096>
            }
            ReduceOp::BitXor => Isa::fold::<T, Xor, Blind, 4096>,
            _ => Isa::fold::<T, Or, Blind, 4096>,
        };
        // SAFETY: the caller keeps the same contract.
        unsafe { fold(isa, task) };
        Folded::Done
    }
}
