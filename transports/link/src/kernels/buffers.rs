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

impl<T: Copy, const W: usize> Source<T, W> {
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
}
