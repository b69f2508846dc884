//! Registered memory for messages that cannot go directly to or from their place.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::domain::Domain;
use crate::error::VerbsError;
use crate::memory::{PAGE, Pages};

/// Recycled slots. [`KEPT_BYTES`] of free slots are kept, and beyond that, those used recently; the
/// rest is freed, the least recently used first. All free slots are freed when memory runs short.
#[derive(Debug, Default)]
pub(crate) struct Slots {
    /// By the logarithm of their size, the least recently used of each size first.
    free: Vec<VecDeque<Free>>,
    free_bytes: usize,
    /// Counts slots taken and collectives begun.
    now: u64,
}

#[derive(Debug)]
struct Free {
    pages: Pages,
    /// When it was last used.
    since: u64,
}

/// Free slots of up to this many bytes are kept, however long they are unused.
const KEPT_BYTES: usize = 16 << 20;
/// Beyond that, they are kept while fewer slots than this are taken, so that a repeated collective
/// finds its own.
const KEPT_FOR: u64 = 1024;
/// A collective counts as this many slots taken, even if it takes none.
const COLLECTIVE: u64 = 64;
/// What must be free besides memory that is registered for a collective: arrivals that reduce go
/// through slots even then, usually four slices at once.
const RESERVE_BYTES: usize = 1 << 20;
const SLICE_BYTES: usize = 256 << 10;

impl Slots {
    /// Begins another collective.
    pub(crate) fn begin(&mut self) {
        self.now += COLLECTIVE;
        self.trim();
    }

    fn trim(&mut self) {
        while self.free_bytes > KEPT_BYTES {
            let oldest = |(class, slots): (usize, &VecDeque<Free>)| {
                slots.front().map(|slot| (slot.since, class))
            };
            let oldest = self.free.iter().enumerate().filter_map(oldest).min();
            let Some((since, class)) = oldest else { return };
            if self.now - since <= KEPT_FOR {
                return;
            }
            let slot = self.free[class].pop_front();
            self.free_bytes -= slot.map_or(0, |slot| slot.pages.bytes());
        }
    }

    /// A slot of at least `bytes` bytes with unspecified content.
    ///
    /// # Errors
    /// If none is free and there is no memory for another, even after freeing the free ones.
    pub(crate) fn take(
        &mut self,
        domains: &[Arc<Domain>],
        bytes: usize,
    ) -> Result<Pages, VerbsError> {
        let bytes = bytes.max(PAGE).next_power_of_two();
        let class = bytes.trailing_zeros() as usize;
        self.now += 1;
        if let Some(slot) = self.free.get_mut(class).and_then(VecDeque::pop_back) {
            self.free_bytes -= bytes;
            return Ok(slot.pages);
        }
        Pages::new(domains, bytes).or_else(|error| match self.give_back() {
            0 => Err(error),
            _ => Pages::new(domains, bytes),
        })
    }

    /// Ensures that there are some free slots.
    ///
    /// # Errors
    /// If there is no memory for them.
    pub(crate) fn reserve(&mut self, domains: &[Arc<Domain>]) -> Result<(), VerbsError> {
        while self.free_bytes < RESERVE_BYTES {
            self.give(Pages::new(domains, SLICE_BYTES)?);
        }
        Ok(())
    }

    /// Takes back a slot that is no longer used.
    pub(crate) fn give(&mut self, pages: Pages) {
        let class = pages.bytes().trailing_zeros() as usize;
        if self.free.len() <= class {
            self.free.resize_with(class + 1, VecDeque::new);
        }
        self.free_bytes += pages.bytes();
        self.free[class].push_back(Free { pages, since: self.now });
        self.trim();
    }

    /// Frees all free slots, and returns how many bytes they had.
    pub(crate) fn give_back(&mut self) -> usize {
        self.free.clear();
        std::mem::take(&mut self.free_bytes)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failure here is a panic")]

    use super::*;

    const MIB: usize = 1 << 20;

    fn use_at_once(slots: &mut Slots, sizes: &[usize]) {
        let taken: Vec<Pages> = sizes.iter().map(|&size| slots.take(&[], size).unwrap()).collect();
        taken.into_iter().for_each(|slot| slots.give(slot));
    }

    #[test]
    fn a_slot_that_was_given_back_is_taken_again() {
        let mut slots = Slots::default();
        let first = slots.take(&[], 100_000).unwrap();
        assert_eq!(first.bytes(), 128 << 10);
        let start = first.start();
        slots.give(first);
        assert_eq!(slots.take(&[], 70_000).unwrap().start(), start);
        assert_eq!(slots.free_bytes, 0);
    }

    const COLLECTIVES: u64 = KEPT_FOR / COLLECTIVE;

    #[test]
    fn what_comes_again_finds_its_slots_and_what_does_not_loses_them() {
        let mut slots = Slots::default();
        for _ in 0..100 {
            slots.begin();
            use_at_once(&mut slots, &[32 * MIB, 32 * MIB]);
            assert_eq!(slots.free_bytes, 64 * MIB, "both are used in each collective");
        }
        for _ in 0..=COLLECTIVES {
            assert_eq!(slots.free_bytes, 64 * MIB);
            slots.begin();
        }
        assert!(slots.free_bytes <= KEPT_BYTES, "{} bytes", slots.free_bytes);
    }

    #[test]
    fn the_least_recently_used_go_first() {
        for (first, then, left) in [
            (&[8 * MIB, 8 * MIB][..], &[MIB][..], 9 * MIB),
            (&[MIB], &[8 * MIB, 8 * MIB], 16 * MIB),
        ] {
            let mut slots = Slots::default();
            use_at_once(&mut slots, first);
            use_at_once(&mut slots, then);
            // Time passes by collectives and, as here, by messages.
            for _ in 0..KEPT_FOR - 2 {
                assert_eq!(slots.free_bytes, 17 * MIB, "{first:?} {then:?}");
                use_at_once(&mut slots, &then[..1]);
            }
            (0..3).for_each(|_| use_at_once(&mut slots, &then[..1]));
            assert_eq!(slots.free_bytes, left, "{first:?} {then:?}");
        }
    }

    #[test]
    fn small_amounts_stay_for_ever() {
        let mut slots = Slots::default();
        use_at_once(&mut slots, &[KEPT_BYTES / 2, KEPT_BYTES / 2]);
        (0..1000).for_each(|_| slots.begin());
        assert_eq!(slots.free_bytes, KEPT_BYTES);
        assert_eq!(slots.give_back(), KEPT_BYTES);
        assert_eq!(slots.give_back(), 0);
        slots.reserve(&[]).unwrap();
        slots.reserve(&[]).unwrap();
        assert_eq!(slots.free_bytes, RESERVE_BYTES);
    }
}
