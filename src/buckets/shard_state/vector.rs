//! Memory of what a rank keeps for its shards, which outlives it where it was lent.

use std::collections::TryReserveError;
use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut, Range};
use std::ptr::NonNull;
use std::slice;
use std::sync::Arc;

use unisum_kernels::Element;

use super::moving::room;
use crate::buckets::Place;

/// Elements that stay where they are as long as this or a [`Place`] of theirs lives.
pub(super) struct Vector<T>(Arc<Allocation<T>>);

/// What a `Vec` was.
struct Allocation<T> {
    start: NonNull<T>,
    count: usize,
    capacity: usize,
}

// SAFETY: it owns its elements, as a `Vec` does; who may touch them when is up to its users.
unsafe impl<T: Send> Send for Allocation<T> {}
// SAFETY: as for `Send`; shared, it is only read.
unsafe impl<T: Sync> Sync for Allocation<T> {}

impl<T> Drop for Allocation<T> {
    fn drop(&mut self) {
        // SAFETY: these are the parts of a `Vec` that was forgotten, and nobody has them any more.
        drop(unsafe { Vec::from_raw_parts(self.start.as_ptr(), self.count, self.capacity) });
    }
}

impl<T> From<Vec<T>> for Vector<T> {
    fn from(elements: Vec<T>) -> Self {
        let mut elements = ManuallyDrop::new(elements);
        let (count, capacity) = (elements.len(), elements.capacity());
        let start = NonNull::from(elements.as_mut_slice()).cast();
        Self(Arc::new(Allocation { start, count, capacity }))
    }
}

impl<T: Element + Default> Vector<T> {
    /// So many zeros.
    ///
    /// # Errors
    /// If there is no memory.
    pub(super) fn zeroed(count: usize) -> Result<Self, TryReserveError> {
        let mut elements = room(count)?;
        elements.resize(count, T::default());
        Ok(elements.into())
    }

    /// Where some of the elements are.
    pub(super) fn place(&self, elements: Range<usize>) -> Place {
        let (start, count) = (self.0.start.cast(), self.0.count);
        Place::new(self.0.clone(), start, count, T::DTYPE).part(elements)
    }
}

impl<T> Deref for Vector<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: initialized elements. Whoever has a place of theirs leaves them alone while a
        // call uses them, as its documentation demands.
        unsafe { slice::from_raw_parts(self.0.start.as_ptr(), self.0.count) }
    }
}

impl<T> DerefMut for Vector<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`; no other `Vector` has these elements, and this one is borrowed.
        unsafe { slice::from_raw_parts_mut(self.0.start.as_ptr(), self.0.count) }
    }
}

/// Other memory with the same elements.
impl<T: Clone> Clone for Vector<T> {
    fn clone(&self) -> Self {
        self.to_vec().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_keeps_elements_that_their_owner_has_left() {
        let mut vector = Vector::from(vec![1.0_f32, 2.0, 3.0]);
        let place = vector.place(1..3);
        vector[1] = 5.0;
        let mut copy = vector.clone();
        copy[2] = 7.0;
        drop(vector);
        assert_eq!((place.count(), place.dtype()), (2, f32::DTYPE));
        let start = place.start().cast::<f32>().as_ptr();
        // SAFETY: the place keeps them, and nobody writes them.
        let elements = unsafe { slice::from_raw_parts(start, place.count()) };
        assert_eq!((elements, &copy[..]), (&[5.0, 3.0][..], &[1.0, 5.0, 7.0][..]));
        let none = Vector::<f32>::zeroed(0).expect("it takes none");
        assert_eq!(none.place(0..0).count(), 0);
    }

    #[test]
    fn more_than_all_memory_is_an_error() {
        assert!(Vector::<f64>::zeroed(usize::MAX / 16).is_err());
    }
}
