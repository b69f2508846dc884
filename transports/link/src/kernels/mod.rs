//! Reduction kernels: fold the elements of several buffers into one.
//!
//! The loops are written once (`loops`), generic over the element type (`number`), the operation
//! (`operator`) and the instruction set (`isa`). Each instruction set compiles them again with its
//! features switched on, and the compiler vectorises them; only 16-bit floats are converted by
//! hand (`x86`). No step may be fused or reordered, so all of them give the same bits.

mod buffers;
mod float16;
mod isa;
mod loops;
mod number;
mod operator;
mod reciprocal;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::num::NonZeroU32;

pub use isa::{Isa, isa};

use self::isa::Task;
use self::number::Number;
use self::operator::{Average, Extreme, Product, Scaled, Sum};
use crate::{Dtype, ReduceOp};

/// One pass of a reduction: `dst[i] = source 0[i] ∘ source 1[i] ∘ …`, element by element.
///
/// The sources are folded from left to right, so their order is part of the result; 16-bit floats
/// are folded in `f32` and rounded once at the end. [`ReduceOp`] says what each operation does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Fold {
    /// The type of the elements.
    pub dtype: Dtype,
    /// The operation. `Average` folds like `Sum`; the division is `divide_by`.
    pub op: ReduceOp,
    /// Divides the folded element by this, before it is rounded: the last pass of an average. With
    /// one source, the pass only divides. Only for `Sum` and `Average`.
    pub divide_by: Option<NonZeroU32>,
}

impl Fold {
    /// Folds `count` elements of each of `sources` into `dst`, on the best instruction set this
    /// machine has.
    ///
    /// No pointer need be aligned to the element. Each source is read once and `dst` written once;
    /// nothing is allocated.
    ///
    /// # Panics
    /// If `sources` is empty, or if `divide_by` is set for an operation that does not sum.
    ///
    /// # Safety
    /// Each source is valid for reads and `dst` for writes of `count · dtype.bytes()` bytes, and
    /// nobody writes to the sources or touches `dst` during the call. `dst` is one of the sources
    /// exactly, or overlaps none.
    pub unsafe fn run(&self, dst: *mut u8, sources: &[*const u8], count: usize) {
        // SAFETY: the caller keeps the same contract.
        unsafe { self.run_with(Isa::best(), dst, sources, count) };
    }

    /// Does what [`run`](Self::run) does, on the instruction set `isa`: for tests and measurements.
    ///
    /// # Panics
    /// As [`run`](Self::run).
    ///
    /// # Safety
    /// As [`run`](Self::run).
    pub unsafe fn run_with(&self, isa: Isa, dst: *mut u8, sources: &[*const u8], count: usize) {
        let sums = matches!(self.op, ReduceOp::Sum | ReduceOp::Average);
        assert!(!sources.is_empty(), "a fold needs a source");
        assert!(sums || self.divide_by.is_none(), "{} cannot be averaged", self.op);
        let task = Task { dst, sources, count, divisor: self.divide_by.unwrap_or(NonZeroU32::MIN) };
        // SAFETY: the caller keeps the same contract, and `sources` is not empty.
        unsafe { self.by_dtype(isa, &task) };
    }

    /// # Safety
    /// As [`Isa::fold`], for elements of `self.dtype`.
    unsafe fn by_dtype(&self, isa: Isa, task: &Task<'_>) {
        // Where integers wrap, the sign does not matter: one kernel serves both.
        let wraps = self.divide_by.is_none() && !matches!(self.op, ReduceOp::Min | ReduceOp::Max);
        // The number is how many accumulators a block has: 4 KiB of them.
        let by_op = match self.dtype {
            Dtype::F16 => Self::by_op::<half::f16, 1024>,
            Dtype::Bf16 => Self::by_op::<half::bf16, 1024>,
            Dtype::F32 => Self::by_op::<f32, 1024>,
            Dtype::F64 => Self::by_op::<f64, 512>,
            Dtype::I8 if !wraps => Self::by_op::<i8, 4096>,
            Dtype::I8 | Dtype::U8 => Self::by_op::<u8, 4096>,
            Dtype::I16 if !wraps => Self::by_op::<i16, 2048>,
            Dtype::I16 | Dtype::U16 => Self::by_op::<u16, 2048>,
            Dtype::I32 if !wraps => Self::by_op::<i32, 1024>,
            Dtype::I32 | Dtype::U32 => Self::by_op::<u32, 1024>,
            Dtype::I64 if !wraps => Self::by_op::<i64, 512>,
            Dtype::I64 | Dtype::U64 => Self::by_op::<u64, 512>,
        };
        // SAFETY: the caller's contract, and `by_op` is the one for `self.dtype`.
        unsafe { by_op(self, isa, task) };
    }

    /// # Safety
    /// As [`Isa::fold`].
    unsafe fn by_op<T: Number, const N: usize>(&self, isa: Isa, task: &Task<'_>) {
        let fold = match (self.op, self.divide_by) {
            (ReduceOp::Sum | ReduceOp::Average, None) => Isa::fold::<T, Sum, N>,
            (ReduceOp::Sum | ReduceOp::Average, Some(divisor)) => {
                if T::SCALES && divisor.is_power_of_two() {
                    Isa::fold::<T, Scaled, N>
                } else {
                    Isa::fold::<T, Average, N>
                }
            }
            (ReduceOp::Product, _) => Isa::fold::<T, Product, N>,
            (ReduceOp::Min, _) => Isa::fold::<T, Extreme<false>, N>,
            (ReduceOp::Max, _) => Isa::fold::<T, Extreme<true>, N>,
        };
        // SAFETY: the caller keeps the same contract.
        unsafe { fold(isa, task) };
    }
}
