//! Reductions of the program's own.

use std::ffi::{c_int, c_void};
use std::panic;

use unisum::{Dtype, Reduction};

use crate::handles::{self, Object};
use crate::memory::check_place;
use crate::status::{guard, invalid, unisum_status};
use crate::types::dtype;

/// A reduction of the program's own.
#[derive(Debug)]
pub struct unisum_reduction {
    _private: [u8; 0],
}

/// Reduces `count` elements at `other` into those at `accumulator`, one by one. It is associative
/// up to rounding. The library calls it from any thread, from several at once, with pieces of any
/// length: it depends on nothing but the elements and `user`, and calls nothing of the library.
/// Gives 0 if all is well; anything else fails the collective, on all ranks, with
/// UNISUM_CALLBACK_FAILED; a rank that has its whole result without the one that failed hears of it
/// in its next call. It must not throw C++ exceptions.
pub type unisum_fold = Option<
    unsafe extern "C" fn(
        user: *mut c_void,
        accumulator: *mut c_void,
        other: *const c_void,
        count: usize,
    ) -> c_int,
>;

/// A function of C's with what it gets.
pub(crate) struct Own {
    fold: Fold,
    user: *mut c_void,
    dtype: Dtype,
    commutes: bool,
}

type Fold = unsafe extern "C" fn(*mut c_void, *mut c_void, *const c_void, usize) -> c_int;

// SAFETY: C is told that any thread calls the function, with that pointer.
unsafe impl Send for Own {}
// SAFETY: as above: several threads at once.
unsafe impl Sync for Own {}

impl Object for Own {
    const KIND: usize = 9;
    const NAME: &'static str = "reduction";
}

impl Own {
    /// The reduction for the library: as long as this is there.
    pub(crate) const fn reduction(&self) -> Reduction {
        let context = std::ptr::from_ref(self).cast();
        // SAFETY: `call` takes this for its context, from any thread; collectives keep it until
        // they have ended.
        unsafe { Reduction::by_function(self.dtype, call, context, self.commutes) }
    }
}

/// # Safety
/// `context` is an [`Own`], the rest is as [`Reduction::by_function`] says.
unsafe fn call(accumulator: *mut u8, other: *const u8, count: usize, context: *const ()) {
    // SAFETY: the caller vouches for it.
    let own = unsafe { &*context.cast::<Own>() };
    // SAFETY: C promises a function for such elements; the caller vouches for those.
    let gave = unsafe { (own.fold)(own.user, accumulator.cast(), other.cast(), count) };
    if gave != 0 {
        // Not `panic!`: C's own failure is no news for a panic hook.
        panic::resume_unwind(Box::new(format!("the reduction gave {gave}")));
    }
}

/// Makes a reduction of elements of type `dtype`, for unisum_collective. `commutes` says that a ∘ b
/// is b ∘ a, to the bit: else elements are reduced in rank order. All ranks make the same. Freed by
/// unisum_reduction_free. Not collective.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_reduction_create(
    dtype: u32,
    fold: unisum_fold,
    user: *mut c_void,
    commutes: bool,
    reduction: *mut *mut unisum_reduction,
) -> unisum_status {
    guard(|| {
        let dtype = self::dtype(dtype)?;
        let Some(fold) = fold else { return invalid("the function is NULL") };
        check_place(reduction, "the reduction")?;
        // SAFETY: C promises that it may be written.
        unsafe { handles::give(Own { fold, user, dtype, commutes }, reduction) };
        Ok(())
    })
}

/// Frees a reduction. Works under way that were given it still call its function.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unisum_reduction_free(
    reduction: *const unisum_reduction,
) -> unisum_status {
    guard(|| handles::remove::<Own, _>(reduction).map(drop))
}
