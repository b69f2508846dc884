//! The buffers the suite works on.

use std::any::Any;
use std::fmt;
use std::ptr::NonNull;

use crate::Region;

/// A buffer of one rank, private or registered, that lives as long as this value.
pub struct Memory {
    base: NonNull<u8>,
    bytes: usize,
    heap_offset: Option<u64>,
    _owner: Box<dyn Any + Send>,
}

// SAFETY: the memory is owned by the value (through `_owner`) and used by whoever holds it.
unsafe impl Send for Memory {}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes at {:p} ({:?})", self.bytes, self.base, self.heap_offset)
    }
}

impl Memory {
    /// Registered memory at `heap_offset` of the rank's heap; `owner` keeps it alive.
    ///
    /// # Safety
    /// `bytes` bytes at `base` are valid for reads and writes, and nobody else's, while `owner`
    /// lives.
    pub unsafe fn registered(
        base: NonNull<u8>,
        bytes: usize,
        heap_offset: u64,
        owner: Box<dyn Any + Send>,
    ) -> Self {
        Self { base, bytes, heap_offset: Some(heap_offset), _owner: owner }
    }

    /// Plain memory of the process.
    pub fn private(bytes: usize) -> Self {
        // Words, so that elements of every type are aligned.
        let mut owner = vec![0u64; bytes.div_ceil(8)].into_boxed_slice();
        let base = NonNull::from(&mut *owner).cast();
        Self { base, bytes, heap_offset: None, _owner: Box::new(owner) }
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// The whole of it as a region.
    pub fn region(&self) -> Region {
        // SAFETY: `self` keeps the memory alive, and each rank of the suite keeps its memory
        // until its link is done with it.
        unsafe { Region::new(self.base, self.bytes, self.heap_offset) }
    }

    /// Copies `bytes` to `at`. Bounds are checked.
    pub fn write(&self, at: usize, bytes: &[u8]) {
        let to = self.region().pointer(&(at..at + bytes.len()));
        // SAFETY: `pointer` checked the bounds, and the two don't overlap.
        unsafe { to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }

    /// A copy of `bytes` bytes from `at`. Bounds are checked.
    pub fn read(&self, at: usize, bytes: usize) -> Vec<u8> {
        copy(self.region().pointer(&(at..at + bytes)), bytes)
    }
}

/// A copy of `bytes` bytes at `from`, which a link or a region said are readable.
pub(super) fn copy(from: *const u8, bytes: usize) -> Vec<u8> {
    let mut into = vec![0; bytes];
    // SAFETY: the caller got `from` as the address of that many readable bytes.
    unsafe { from.copy_to_nonoverlapping(into.as_mut_ptr(), bytes) };
    into
}

/// `bytes` bytes that tell messages apart: different for each seed, and not periodic in powers of
/// two, so that a shifted or swapped piece shows.
pub(super) fn pattern(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut filled = Vec::with_capacity(bytes + 8);
    while filled.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        filled.extend_from_slice(&state.to_le_bytes());
    }
    filled.truncate(bytes);
    filled
}
