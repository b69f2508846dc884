//! Where everything lies in the memory that the ranks of a host share (pure arithmetic).
//!
//! ```text
//! header      one page: magic, nonce, who sleeps in the group, who has left it
//! control     per rank, 3 lines: doorbell | identity | name of its socket
//! slots       per rank and parity of an arrival: a card (one line) and a deposit
//! mailboxes   per ordered pair of ranks: a line for the reader, then a ring of entries
//! staging     per ordered pair: one buffer per ring entry (pages appear with the first use)
//! group       per rank: a staging buffer for data between private regions, page by page
//! heaps       per rank: registered memory, sparse
//! ```
//! Ranks are addressed by their *local index*: their index among the candidates of the host.
//! Everything that several processes write or poll has a cache line of its own.

use std::sync::atomic::AtomicU64;

use unisum_link::Call;

/// Entries of a mailbox's ring.
pub(crate) const RING: u64 = 16;
/// Bytes of a staging buffer: the largest message that its sender needn't wait for.
pub(crate) const STAGE_BYTES: usize = 8 << 10;
/// Bytes of a deposit that fit its card.
pub(crate) const INLINE_BYTES: usize = 24;
/// Bytes of a deposit.
pub(crate) const SLOT_BYTES: usize = 16 << 10;
/// Bytes of a group staging buffer.
pub(crate) const GROUP_STAGING_BYTES: usize = 1 << 20;
/// What the memory begins with: "unishm" and the version of this layout.
pub(crate) const MAGIC: u64 = u64::from_le_bytes(*b"unishm\x00\x04");

/// Offsets in the header.
pub(crate) const NONCE: u64 = 8;
/// Members that sleep in the group.
pub(crate) const SLEEPERS: u64 = 64;
/// What they sleep on: how often they were woken.
pub(crate) const WAKES: u64 = 68;
/// The newest arrival for which they were.
pub(crate) const WOKEN: u64 = 72;
/// The last enter of each parity whose collective was marked (see `group`).
pub(crate) const MARKED: [u64; 2] = [128, 136];
/// The rank that took its memory back first, as its local index counted from 1. Alone on its line,
/// which is written when the group ends: reading it costs nothing until then.
pub(crate) const WITHDRAWN: u64 = 192;

const LINE: u64 = 64;
const PAGE: u64 = 4096;
const CONTROL_BYTES: u64 = 3 * LINE;
const SLOT_STRIDE: u64 = LINE + SLOT_BYTES as u64;
const MAILBOX_BYTES: u64 = (1 + RING) * LINE;
const STAGING_BYTES: u64 = RING * STAGE_BYTES as u64;
/// Heaps start at multiples of this, so that huge pages fit.
pub(crate) const HEAP_ALIGN: u64 = 2 << 20;
/// More than any address space has; keeps sums from overflowing.
const BYTES_MAX: u64 = 1 << 56;

/// The sizes that everything else follows from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    local_ranks: u64,
    heap_bytes: u64,
}

impl Layout {
    /// The layout for `local_ranks` ranks with heaps of at most `heap_bytes` bytes (rounded down);
    /// `None` if that is more than memory can ever be.
    pub(crate) fn new(local_ranks: usize, heap_bytes: u64) -> Option<Self> {
        let local_ranks = u64::try_from(local_ranks)
            .ok()
            .filter(|local_ranks| (1..=1 << 14).contains(local_ranks))?;
        let heap_bytes = heap_bytes / HEAP_ALIGN * HEAP_ALIGN;
        let layout = Self { local_ranks, heap_bytes };
        let heaps = local_ranks.checked_mul(heap_bytes).filter(|&bytes| bytes < BYTES_MAX)?;
        (layout.heaps() + heaps < BYTES_MAX).then_some(layout)
    }

    /// Bytes of one heap.
    pub(crate) const fn heap_bytes(&self) -> u64 {
        self.heap_bytes
    }

    /// Bytes of all of it.
    pub(crate) const fn bytes(&self) -> u64 {
        self.heap(self.local_ranks)
    }

    /// The part at the start that is always in use: everything before the staging buffers.
    pub(crate) const fn dense_bytes(&self) -> u64 {
        self.stagings()
    }

    /// The control lines of the rank at a local index.
    pub(crate) const fn control(&self, local_index: u64) -> Control {
        Control(PAGE + local_index * CONTROL_BYTES)
    }

    /// What a rank publishes with an arrival: every other one has the same place.
    pub(crate) const fn slot(&self, local_index: u64, arrival: u64) -> Slot {
        Slot(self.slots() + (2 * local_index + (arrival & 1)) * SLOT_STRIDE)
    }

    /// The line of the mailbox that the reader writes.
    pub(crate) const fn mailbox(&self, from: u64, to: u64) -> u64 {
        self.mailboxes() + (from * self.local_ranks + to) * MAILBOX_BYTES
    }

    /// The staging buffers of an ordered pair, and their bytes.
    pub(crate) const fn staging(&self, from: u64, to: u64) -> (u64, u64) {
        (self.stagings() + (from * self.local_ranks + to) * STAGING_BYTES, STAGING_BYTES)
    }

    /// The group staging buffer of the rank at a local index.
    pub(crate) const fn group_staging(&self, local_index: u64) -> u64 {
        self.group_stagings() + local_index * GROUP_STAGING_BYTES as u64
    }

    /// The heap of the rank at a local index.
    pub(crate) const fn heap(&self, local_index: u64) -> u64 {
        self.heaps() + local_index * self.heap_bytes
    }

    const fn slots(&self) -> u64 {
        PAGE + self.local_ranks * CONTROL_BYTES
    }

    const fn mailboxes(&self) -> u64 {
        self.slots() + self.local_ranks * 2 * SLOT_STRIDE
    }

    const fn stagings(&self) -> u64 {
        (self.mailboxes() + self.local_ranks * self.local_ranks * MAILBOX_BYTES)
            .next_multiple_of(PAGE)
    }

    const fn group_stagings(&self) -> u64 {
        self.stagings() + self.local_ranks * self.local_ranks * STAGING_BYTES
    }

    const fn heaps(&self) -> u64 {
        self.group_staging(self.local_ranks).next_multiple_of(HEAP_ALIGN)
    }
}

/// The offset of an entry's line in its mailbox.
pub(crate) const fn entry(mailbox: u64, number: u64) -> u64 {
    mailbox + (1 + number % RING) * LINE
}

/// Offsets of a rank's control lines.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Control(u64);

#[rustfmt::skip]
impl Control {
    /// Doorbell: counts what happened for this rank.
    pub(crate) const fn events(self) -> u64 { self.0 }
    /// Doorbell: the count at which its sleeper wants to be woken.
    pub(crate) const fn wake_at(self) -> u64 { self.0 + 4 }
    /// Doorbell: awake, asleep or armed; the futex word.
    pub(crate) const fn mode(self) -> u64 { self.0 + 8 }
    /// Not 0 once the rank aborted or left: what it lent is no longer what it was.
    pub(crate) const fn gone(self) -> u64 { self.0 + LINE }
    /// Whether this rank can read every member's private memory.
    pub(crate) const fn verdict(self) -> u64 { self.0 + LINE + 4 }
    /// Its process id, as it sees itself.
    pub(crate) const fn pid(self) -> u64 { self.0 + LINE + 8 }
    /// Address of a private word that its peers try to read.
    pub(crate) const fn probe_address(self) -> u64 { self.0 + LINE + 16 }
    /// What that word holds.
    pub(crate) const fn probe_value(self) -> u64 { self.0 + LINE + 24 }
    /// What it wrote to prove that it mapped this very memory: two words.
    pub(crate) const fn identity(self) -> u64 { self.0 + LINE + 32 }
    /// The core on which it waited last, counted from 1; 0 if it has not waited yet.
    pub(crate) const fn core(self) -> u64 { self.0 + LINE + 48 }
    /// Name of its doorbell's socket: four words.
    pub(crate) const fn socket(self) -> u64 { self.0 + 2 * LINE }
}

/// Offset of a slot: a [`GroupCard`], then room for a deposit.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Slot(u64);

impl Slot {
    /// Where the card is.
    pub(crate) const fn card(self) -> u64 {
        self.0
    }

    /// Where a deposit is.
    pub(crate) const fn deposit(self) -> u64 {
        self.0 + LINE
    }

    /// Where a deposit of at most [`INLINE_BYTES`] is: in the card itself.
    pub(crate) const fn inline_deposit(self) -> u64 {
        self.0 + LINE - INLINE_BYTES as u64
    }
}

/// What a member of a group publishes with an arrival: one line of the cache.
#[derive(Debug)]
#[repr(C, align(64))]
pub(crate) struct GroupCard {
    /// The number of the arrival and the kinds of places: written last and read first.
    pub(crate) arrival: AtomicU64,
    /// What the member called.
    pub(crate) call: [AtomicU64; Call::ENCODED / 8],
    /// Where its input and its output are; or a small deposit, which goes on in the word that
    /// follows.
    pub(crate) locations: [AtomicU64; 2],
    _deposit: u64,
}

const _: () = assert!(size_of::<GroupCard>() as u64 == LINE);
const _: () = assert!(std::mem::offset_of!(GroupCard, locations) + INLINE_BYTES == LINE as usize);

#[cfg(test)]
mod tests {
    use super::*;

    /// Every part of a layout as (offset, bytes).
    fn parts(layout: &Layout) -> Vec<(u64, u64)> {
        let mut parts = vec![(0, PAGE)];
        for local_index in 0..layout.local_ranks {
            parts.push((layout.control(local_index).events(), CONTROL_BYTES));
            parts.push((layout.heap(local_index), layout.heap_bytes));
            parts.push((layout.group_staging(local_index), GROUP_STAGING_BYTES as u64));
            for parity in [6, 7] {
                let slot = layout.slot(local_index, parity);
                parts.push((slot.card(), LINE));
                parts.push((slot.deposit(), SLOT_BYTES as u64));
            }
            for peer in 0..layout.local_ranks {
                parts.push((layout.mailbox(local_index, peer), MAILBOX_BYTES));
                parts.push(layout.staging(local_index, peer));
            }
        }
        parts.sort_unstable();
        parts
    }

    #[test]
    fn parts_do_not_overlap_and_are_aligned() {
        for local_ranks in [1, 2, 3, 16, 61] {
            let layout = Layout::new(local_ranks, 5 << 20).unwrap();
            let parts = parts(&layout);
            for pair in parts.windows(2) {
                assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{local_ranks} local_ranks: {pair:?}");
            }
            assert!(parts.iter().all(|(offset, _)| offset % LINE == 0));
            let (offset, bytes) = parts[parts.len() - 1];
            assert_eq!(offset + bytes, layout.bytes());
            assert_eq!(layout.heap(0) % HEAP_ALIGN, 0);
        }
    }

    #[test]
    fn rings_reuse_their_entries() {
        assert_eq!(entry(128, 3), entry(128, 3 + RING));
        assert_eq!(entry(128, RING - 1) + LINE, 128 + MAILBOX_BYTES);
    }

    #[test]
    fn absurd_sizes_are_refused() {
        assert_eq!(Layout::new(0, 1 << 20), None);
        assert_eq!(Layout::new(1 << 20, 1 << 20), None);
        assert_eq!(Layout::new(4, u64::MAX), None);
        assert!(Layout::new(128, 1 << 46).is_some());
    }
}
