//! The memory the kernels read and write, in chunks of `W` elements at any alignment.
//!
//! Pointers, not slices: the destination may be a source, and a peer process may have mapped it.

/// What a kernel reads.
#[derive(Clone, Copy)]
pub(super) struct Source<T, const W: usize> {
    start: *const [T; W],
    len: usize,
}

/// What a kernel writes.
#[derive(Clone, Copy)]
pub(super) struct Target<T, const W: usize> {
    start: *mut [T; W],
    len: usize,
}

impl<T: Copy + Default, const W: usize> Source<T, W> {
    /// # Safety
    /// While this or a copy is in use, the `len` chunks at `start` hold values that nobody writes,
    /// except through a [`Target`] on the same thread.
    #[inline(always)]
    pub(super) unsafe fn new(start: *const u8, len: usize) -> Self {
        Self { start: start.cast(), len }
    }

    /// The `len` chunks from `at` on.
    #[inline(always)]
    pub(super) fn slice(self, at: usize, len: usize) -> Self {
        assert!(at <= self.len && len <= self.len - at);
        Self { start: self.start.wrapping_add(at), len }
    }

    #[inline(always)]
    pub(super) fn get(self, i: usize) -> [T; W] {
        assert!(i < self.len);
        // SAFETY: the chunk is one of those that `new` was given.
        unsafe { self.start.wrapping_add(i).read_unaligned() }
    }

    /// The `count` elements after `chunks` chunks from `start` on, and zeros up to a chunk.
    ///
    /// # Safety
    /// The elements hold values that nobody writes during the call.
    #[inline(always)]
    pub(super) unsafe fn part(start: *const u8, chunks: usize, count: usize) -> [T; W] {
        assert!(count <= W);
        let from = start.cast::<[T; W]>().wrapping_add(chunks).cast::<u8>();
        let mut chunk = [T::default(); W];
        // SAFETY: the caller vouches for the elements; as many fit into a chunk.
        unsafe { from.copy_to_nonoverlapping(chunk.as_mut_ptr().cast(), count * size_of::<T>()) };
        chunk
    }
}

impl<T: Copy, const W: usize> Target<T, W> {
    /// # Safety
    /// While this or a copy is in use, the `len` chunks at `start` may be written, and nobody else
    /// accesses them, except through a [`Source`] on the same thread.
    #[inline(always)]
    pub(super) unsafe fn new(start: *mut u8, len: usize) -> Self {
        Self { start: start.cast(), len }
    }

    #[inline(always)]
    pub(super) fn len(self) -> usize {
        self.len
    }

    /// The `len` chunks from `at` on.
    #[inline(always)]
    pub(super) fn slice(self, at: usize, len: usize) -> Self {
        assert!(at <= self.len && len <= self.len - at);
        Self { start: self.start.wrapping_add(at), len }
    }

    /// The same memory as `source`, by way of this pointer, if it is the same.
    #[inline(always)]
    pub(super) fn as_source(self, source: Source<T, W>) -> Option<Source<T, W>> {
        (self.start.cast_const() == source.start)
            .then_some(Source { start: self.start.cast_const(), len: self.len.min(source.len) })
    }

    #[inline(always)]
    pub(super) fn set(self, i: usize, chunk: [T; W]) {
        assert!(i < self.len);
        // SAFETY: the chunk is one of those that `new` was given.
        unsafe { self.start.wrapping_add(i).write_unaligned(chunk) };
    }

    /// Writes the first `count` elements of `chunk` after `chunks` chunks from `start` on.
    ///
    /// # Safety
    /// The elements may be written, and nobody else accesses them during the call.
    #[inline(always)]
    pub(super) unsafe fn set_part(start: *mut u8, chunks: usize, count: usize, chunk: [T; W]) {
        assert!(count <= W);
        let to = start.cast::<[T; W]>().wrapping_add(chunks).cast::<u8>();
        // SAFETY: the caller vouches for the elements; a chunk has as many.
        unsafe { to.copy_from_nonoverlapping(chunk.as_ptr().cast(), count * size_of::<T>()) };
    }
}
