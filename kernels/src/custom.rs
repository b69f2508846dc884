//! User-defined reductions.

use std::fmt;
use std::marker::PhantomData;

use crate::Element;
use crate::panics::{Panic, keep_for_reduction};

/// A reduction of two slices of equal length, into the first: `acc[i] = acc[i] ∘ other[i]`.
///
/// The function must be associative up to rounding. It may be called from any thread, several times
/// at once, with pieces of any length, so it must not depend on where a piece lies. It reduces host
/// memory only. If it panics on any rank, the collective fails on all ranks with an error that
/// names the rank and repeats the panic message; a rank that has its whole result without that rank
/// gets it, and the error in its next call. The panic does not propagate further.
pub struct CustomOp<T> {
    custom: Custom,
    elements: PhantomData<fn(T)>,
}

impl<T: Element> CustomOp<T> {
    /// A reduction with `a ∘ b = b ∘ a`. The ranks' elements are reduced in any order, which may be
    /// `a ∘ b` on one rank and `b ∘ a` on another. All ranks get the same bits only if both orders
    /// give the same bits: a maximum that returns the first of +0 and −0 does not, nor does the
    /// first of two different NaNs.
    pub fn commutative(function: fn(&mut [T], &[T])) -> Self {
        Self::new(function, true)
    }

    /// A reduction that does not commute: the elements are reduced in rank order.
    pub fn ordered(function: fn(&mut [T], &[T])) -> Self {
        Self::new(function, false)
    }

    fn new(function: fn(&mut [T], &[T]), commutative: bool) -> Self {
        // SAFETY: `call_typed::<T>` takes such a function for its context, and any thread may call
        // a function.
        let custom = unsafe { Custom::new(call_typed::<T>, function as *const (), commutative) };
        Self { custom, elements: PhantomData }
    }

    /// The same reduction for an engine, which knows the element type from elsewhere.
    pub const fn erased(self) -> Custom {
        self.custom
    }
}

impl<T> Clone for CustomOp<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for CustomOp<T> {}

impl<T> fmt::Debug for CustomOp<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.custom.fmt(f)
    }
}

/// # Safety
/// As a [`Function`], for elements `T`; `context` is a `fn(&mut [T], &[T])`.
unsafe fn call_typed<T: Element>(acc: *mut u8, other: *const u8, count: usize, context: *const ()) {
    // SAFETY: the caller vouches for what the context is.
    let function = unsafe { std::mem::transmute::<*const (), fn(&mut [T], &[T])>(context) };
    // SAFETY: a function may write these elements, which are aligned and nobody else's.
    let acc = unsafe { std::slice::from_raw_parts_mut(acc.cast(), count) };
    // SAFETY: a function may read these elements, which are aligned and which nobody writes.
    let other = unsafe { std::slice::from_raw_parts(other.cast(), count) };
    function(acc, other);
}

/// Reduces `count` elements at `other` into those at `acc`, given a context.
///
/// Both are aligned for the element. `acc` may be written and is nobody else's during the call;
/// nobody writes to `other`. The function may unwind.
pub type Function = unsafe fn(acc: *mut u8, other: *const u8, count: usize, context: *const ());

/// A user-defined reduction for elements of a type that is known from elsewhere. [`CustomOp`]
/// creates one safely.
#[derive(Clone, Copy, Debug)]
pub struct Custom {
    function: Function,
    context: *const (),
    commutative: bool,
}

// SAFETY: `new`'s caller promised that any thread may call the function with the context.
unsafe impl Send for Custom {}
// SAFETY: as for `Send`: several threads at once.
unsafe impl Sync for Custom {}

impl Custom {
    /// A reduction by `function`, which receives `context` unchanged.
    ///
    /// # Safety
    /// As long as a copy of this is used for elements of the intended type, `function` may be
    /// called with `context` on any thread, and on several at once, under the contract of
    /// [`Function`], and it accesses no elements except those it is given.
    pub const unsafe fn new(function: Function, context: *const (), commutative: bool) -> Self {
        Self { function, context, commutative }
    }

    /// Whether the order of the elements does not matter. If it matters, it is rank order.
    pub const fn is_commutative(self) -> bool {
        self.commutative
    }

    /// Calls the function.
    ///
    /// # Errors
    /// If the function panicked. The contents of `acc` are then unspecified.
    ///
    /// # Safety
    /// `acc` and `other` satisfy the contract of [`Function`], for elements of the intended type.
    pub(crate) unsafe fn call(
        self,
        acc: *mut u8,
        other: *const u8,
        count: usize,
    ) -> Result<(), Panicked> {
        let call = || {
            // SAFETY: the caller vouches for the elements, `new`'s caller for the rest.
            unsafe { (self.function)(acc, other, count, self.context) };
        };
        // Nothing but `acc` can be seen half done, and that is unspecified from here on.
        Panic::catch(call).map_err(|panic| {
            keep_for_reduction(&panic);
            Panicked
        })
    }
}

/// The user's function panicked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Panicked;
