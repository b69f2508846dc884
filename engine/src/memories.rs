//! The memories of one collective on this rank.

use unisum_link::{Region, Regions};

use super::placement::{Memory, Place};

/// Input and output, which the caller lent, and the engine's scratch memory.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Memories {
    pub(crate) regions: Regions,
    pub(crate) scratch: Region,
}

impl Memories {
    /// The region of `bytes` bytes at a place (in bytes).
    ///
    /// # Panics
    /// If they lie outside the memory: programs are built from proven plans, so that would be our
    /// bug.
    pub(crate) fn region(&self, place: Place, bytes: usize) -> Region {
        self.memory(place.memory).part(&(place.start..place.start + bytes))
    }

    /// The address of a region of that length.
    ///
    /// # Panics
    /// As [`Memories::region`].
    pub(crate) fn pointer(&self, place: Place, bytes: usize) -> *mut u8 {
        self.memory(place.memory).pointer(&(place.start..place.start + bytes))
    }

    const fn memory(&self, memory: Memory) -> &Region {
        match memory {
            Memory::Input => &self.regions.input,
            Memory::Output => &self.regions.output,
            Memory::Scratch => &self.scratch,
        }
    }
}
