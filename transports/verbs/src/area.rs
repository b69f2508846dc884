//! The memory that a rank sets aside for each peer to write to, and what is sent from.

use crate::wire::{NUMBER_MAX, READY_BYTES};

/// How the memory of one peer is divided: announcements, then cells for small messages. The same
/// on all ranks of a world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    /// Small messages that may be under way from one rank to another.
    pub(crate) cells: usize,
    /// Large messages that may be announced from one rank to another.
    pub(crate) readies: usize,
}

/// Bytes of a cell: the largest small message, with its call.
pub(crate) const CELL_BYTES: usize = 8 << 10;

impl Layout {
    /// Fewer of each in larger worlds, so that all of it stays below 64 MiB up to 500 ranks.
    pub(crate) const fn new(world: usize) -> Self {
        let each = match world {
            0..=16 => 32,
            17..=64 => 16,
            _ => 8,
        };
        Self { cells: each, readies: each }
    }

    /// Where an announcement lies.
    pub(crate) const fn ready(&self, place: usize) -> usize {
        debug_assert!(place < self.readies && self.readies <= NUMBER_MAX as usize);
        place * READY_BYTES
    }

    /// Where a cell lies.
    pub(crate) const fn cell(&self, place: usize) -> usize {
        debug_assert!(place < self.cells);
        (self.readies * READY_BYTES).next_multiple_of(64) + place * CELL_BYTES
    }

    /// Bytes for one peer.
    pub(crate) const fn bytes(&self) -> usize {
        self.cell(self.cells - 1) + CELL_BYTES
    }

    /// Announcing writes that may come in on a peer's first connection: small messages, new
    /// announcements and what they led to, and words that only return credit: of those, each
    /// returns half of all cells.
    pub(crate) const fn announcements(&self) -> usize {
        self.cells + 2 * self.readies + 4
    }
}

/// One peer's part of it on this rank, and the place to send from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Area {
    pub(crate) layout: Layout,
    /// Where the peer writes.
    pub(crate) inbound: *const u8,
    /// What is written at the peer, in the same layout, and the key of the first device for it.
    pub(crate) outbound: *mut u8,
    pub(crate) outbound_key: u32,
    /// The peer's inbound memory, in its addresses, and its first device's key for it.
    pub(crate) remote: u64,
    pub(crate) remote_key: u32,
}

// SAFETY: addresses of memory that belongs to the link, which lets one thread at a time use it.
unsafe impl Send for Area {}

impl Area {
    /// Copies `bytes` bytes of the inbound memory from `at` to `into`.
    ///
    /// # Safety
    /// The device has reported that these bytes are written, the peer has not been told that it
    /// may write there again, and `into` is writable for as many.
    pub(crate) unsafe fn copy_in(&self, at: usize, bytes: usize, into: *mut u8) {
        assert!(at + bytes <= self.layout.bytes(), "inside the area");
        // SAFETY: inside the area; the caller vouches for the rest.
        unsafe { self.inbound.wrapping_add(at).copy_to_nonoverlapping(into, bytes) };
    }

    /// Copies `bytes` bytes at `from` to the outbound memory.
    ///
    /// # Safety
    /// `from` is readable, and no write from that place is under way.
    pub(crate) unsafe fn copy_out(&self, at: usize, from: *const u8, bytes: usize) {
        assert!(at + bytes <= self.layout.bytes(), "inside the area");
        // SAFETY: inside the area; the caller vouches for the rest.
        unsafe { self.outbound.wrapping_add(at).copy_from_nonoverlapping(from, bytes) };
    }
}
