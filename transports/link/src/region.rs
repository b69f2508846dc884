//! The memory a collective works on.

use std::ops::Range;
use std::ptr::NonNull;

/// Memory of one collective call on this rank: plain memory of the process, or part of the shared
/// heap that the ranks of a node map.
///
/// A region is a promise of its creator: the memory stays valid, and nobody else in this process
/// touches it, until the engine reports the end of the collective.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    base: NonNull<u8>,
    bytes: usize,
    heap_offset: Option<u64>,
}

// SAFETY: a region is an address range; whoever made it promised exclusive use to its holder,
// whichever thread that is.
unsafe impl Send for Region {}

impl Region {
    /// The region of `bytes` bytes at `base`; `heap_offset` is its place in this rank's shared
    /// heap, if it lies there.
    ///
    /// # Safety
    /// The range must stay valid for reads and writes, and untouched by anyone but the engine and
    /// its links, until the collective that uses it has ended.
    pub const unsafe fn new(base: NonNull<u8>, bytes: usize, heap_offset: Option<u64>) -> Self {
        Self { base, bytes, heap_offset }
    }

    /// Size in bytes.
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    /// Where the region starts.
    pub const fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// The region's place in this rank's shared heap, if it lies there.
    pub const fn heap_offset(&self) -> Option<u64> {
        self.heap_offset
    }

    /// The part `bytes` of the region.
    ///
    /// # Panics
    /// If the range is not inside the region: plans are proven, so that would be our bug.
    #[inline]
    #[must_use]
    pub fn part(&self, bytes: &Range<usize>) -> Self {
        // Null has no part but the empty one, so the address is never null.
        let base = NonNull::new(self.pointer(bytes)).unwrap_or(self.base);
        let heap_offset = self.heap_offset.map(|offset| offset + bytes.start as u64);
        Self { base, bytes: bytes.len(), heap_offset }
    }

    /// The address of `bytes` within the region.
    ///
    /// # Panics
    /// If the range is not inside the region: plans are proven, so that would be our bug.
    #[inline]
    pub fn pointer(&self, bytes: &Range<usize>) -> *mut u8 {
        assert!(
            bytes.start <= bytes.end && bytes.end <= self.bytes,
            "bytes {bytes:?} lie outside a region of {} bytes",
            self.bytes
        );
        // SAFETY: the offset was just checked to lie inside the region (or one past its end).
        unsafe { self.base.as_ptr().add(bytes.start) }
    }
}

/// The memory of one collective on this rank.
///
/// Peers may read both regions, and write the output, until the collective has ended here. A rank
/// that has no input or no output has an empty region for it.
#[derive(Clone, Copy, Debug)]
pub struct Regions {
    /// This rank's contribution; read only, unless it is the output as well.
    pub input: Region,
    /// Where the result goes.
    pub output: Region,
}

impl Regions {
    /// The regions of a collective in place: one for both.
    pub const fn in_place(region: Region) -> Self {
        Self { input: region, output: region }
    }
}
