//! Registered memory: buffers that every rank of the node can access without a copy.

use std::fmt;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

use unisum_kernels::Element;

use crate::memory::Memory;

/// A slice of `T`, initially zero, that a communicator allocated in memory its links access
/// directly.
///
/// It is used like a slice: [`crate::Communicator::all_reduce`] recognizes it by its address. It
/// may outlive its communicator. It must not be touched in a forked child.
pub struct Buffer<T> {
    memory: Memory,
    count: usize,
    elements: PhantomData<T>,
}

// SAFETY: a buffer owns its memory like a `Vec<T>`, and `T: Element` is plain data.
unsafe impl<T: Send> Send for Buffer<T> {}
// SAFETY: as for `Send`; shared access is read-only.
unsafe impl<T: Sync> Sync for Buffer<T> {}

impl<T: Element> Buffer<T> {
    /// # Safety
    /// `memory` holds `count` initialised elements, aligned for `T`.
    pub(crate) const unsafe fn new(memory: Memory, count: usize) -> Self {
        Self { memory, count, elements: PhantomData }
    }
}

impl<T> Deref for Buffer<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `new`'s caller promised initialised, aligned memory for `count` elements that
        // lives as long as `self`; peers write it only while a collective holds it mutably.
        unsafe { std::slice::from_raw_parts(self.memory.start().cast().as_ptr(), self.count) }
    }
}

impl<T> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`; `&mut self` makes the access exclusive in this process.
        unsafe { std::slice::from_raw_parts_mut(self.memory.start().cast().as_ptr(), self.count) }
    }
}

impl<T> AsRef<[T]> for Buffer<T> {
    fn as_ref(&self) -> &[T] {
        self
    }
}

impl<T> AsMut<[T]> for Buffer<T> {
    fn as_mut(&mut self) -> &mut [T] {
        self
    }
}

impl<T> fmt::Debug for Buffer<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Buffer").field("count", &self.count).finish_non_exhaustive()
    }
}
