//! Executes pulls: each member copies or folds its operands from the memory of the others.
//!
//! Registered regions are read in place. Private memory is staged in the members' staging buffers
//! in pieces, with a lane for each different range that a member sends. Pieces alternate between
//! the two halves of the staging buffer:
//!
//! ```text
//! staging buffer of each member    lane 0 | lane 1 | … of piece 0, 2, … | same of 1, 3, …
//! ```
//! Between two arrivals, every member stages piece k and takes piece k−1. Everybody took piece k−2,
//! which was on that half before, before the last arrival.

use std::ops::Range;

use unisum_kernels::copy;
use unisum_link::{LinkError, Part};

use super::folding::Extras;
use super::group_exchange::{GroupContext, LINE, MAPPED_BLOCK, Next};
use super::placement::{Memory, Place};
use super::pull::{Origin, Pull, Take};

/// The longest part of a lane in one piece, such that copies stay in a second-level cache.
const LANE_BYTES_MAX: usize = 256 << 10;

impl GroupContext<'_> {
    /// After the enter: takes everything, or stages the first piece.
    pub(crate) fn pull(&mut self, pull: &Pull) -> Result<Next, LinkError> {
        if pull.deposits {
            self.take_all(pull)?;
            return Ok(Next::Done);
        }
        if !self.is_mapped(pull) {
            return self.pull_piece(pull, 0);
        }
        self.take_all(pull)?;
        self.group.confirm()?;
        Ok(Next::Last(self.arrive()))
    }

    /// The work between two arrivals of a pull from private regions.
    pub(crate) fn pull_piece(&mut self, pull: &Pull, k: usize) -> Result<Next, LinkError> {
        let part = self.lane_bytes(pull);
        let is_last = k * part >= pull.longest;
        if !is_last {
            self.stage_lanes(pull, k);
        }
        if let Some(k) = k.checked_sub(1) {
            for take in &pull.takes {
                let bytes = k * part..take.bytes.min((k + 1) * part);
                self.take(take, &bytes, |context, origin| {
                    context.on_lane(pull, origin, k, bytes.len())
                })?;
            }
            // Some members' regions may be registered, and were read in place.
            self.group.confirm()?;
        }
        let arrival = self.arrive();
        Ok(if is_last { Next::Last(arrival) } else { Next::Piece(arrival) })
    }

    /// Whether all members read everything that is sent in place.
    fn is_mapped(&self, pull: &Pull) -> bool {
        let parts =
            if pull.from_inputs { &[Part::Input][..] } else { &[Part::Input, Part::Output] };
        parts.iter().all(|&part| self.group.registered(part))
    }

    fn take_all(&mut self, pull: &Pull) -> Result<(), LinkError> {
        for take in &pull.takes {
            // A copy needs no confirmation of what it read.
            let block = if take.folds { MAPPED_BLOCK } else { take.bytes.max(1) };
            for start in (0..take.bytes).step_by(block) {
                let bytes = start..take.bytes.min(start + block);
                self.take(take, &bytes, |_, _| unreachable!("everything is mapped"))?;
            }
        }
        Ok(())
    }

    /// Copies or folds `bytes` of a take; `private` gives the place where a private operand is
    /// staged.
    fn take(
        &mut self,
        take: &Take,
        bytes: &Range<usize>,
        private: impl Fn(&Self, &Origin) -> *const u8,
    ) -> Result<(), LinkError> {
        if bytes.start >= bytes.end {
            return Ok(());
        }
        self.sources.0.clear();
        if take.everything {
            self.group.deposits(bytes, &mut self.sources.0);
        }
        let others = if take.everything { &[] } else { &take.sources[..] };
        for origin in others {
            let source = match origin.member == self.rank {
                true => self.own(origin.place, bytes).cast_const(),
                false => match self.mapped(origin, bytes)? {
                    Some(mapped) => mapped,
                    None => private(self, origin),
                },
            };
            self.sources.0.push(source);
        }
        let into = self.own(take.writes, bytes);
        match (take.folds, self.sources.0[0]) {
            // SAFETY: source and destination are valid for that many bytes: this rank's memory,
            // and a member's region or staging buffer. The member has the value there since the
            // last arrival and keeps it until the next, and nobody else writes this rank's
            // memory.
            (false, source) => unsafe { copy(source, into, bytes.len()) },
            (true, _) => {
                let watches = take.writes.memory == Memory::Output;
                let extras = Extras { watches, ..self.extras };
                // SAFETY: as above, for every source; the destination may be one of them.
                unsafe { self.folding.run(into, &self.sources.0, bytes.len(), extras) };
            }
        }
        Ok(())
    }

    fn own(&self, place: Place, bytes: &Range<usize>) -> *mut u8 {
        self.memories.pointer(place.plus(bytes.start), bytes.len())
    }

    fn mapped(
        &self,
        origin: &Origin,
        bytes: &Range<usize>,
    ) -> Result<Option<*const u8>, LinkError> {
        let part = match origin.place.memory {
            Memory::Input => Part::Input,
            _ => Part::Output,
        };
        let start = origin.place.start + bytes.start;
        self.group.source(origin.member, part, start..start + bytes.len())
    }

    /// Copies piece `k` of what others take from this rank to its staging buffer.
    fn stage_lanes(&self, pull: &Pull, k: usize) {
        let part = self.lane_bytes(pull);
        for (lane, &(place, total)) in pull.lanes.iter().enumerate() {
            let bytes = k * part..total.min((k + 1) * part);
            if bytes.start >= bytes.end {
                continue;
            }
            let from = self.own(place, &bytes);
            let to = self.staging(self.rank, self.lane(pull, lane, k, bytes.len()));
            // SAFETY: the region and the staging buffer are valid for that many bytes and never
            // overlap; piece k − 2 was taken before the last arrival.
            unsafe { copy(from, to, bytes.len()) };
        }
    }

    fn on_lane(&self, pull: &Pull, origin: &Origin, k: usize, bytes: usize) -> *const u8 {
        self.staging(origin.member, self.lane(pull, origin.lane, k, bytes)).cast_const()
    }

    fn lane(&self, pull: &Pull, lane: usize, k: usize, bytes: usize) -> Range<usize> {
        let start = ((k % 2) * pull.lanes_max + lane) * self.lane_bytes(pull);
        start..start + bytes
    }

    /// The largest number of bytes of a lane in one piece.
    fn lane_bytes(&self, pull: &Pull) -> usize {
        let lanes = 2 * pull.lanes_max.max(1);
        (self.group.staging_bytes() / lanes / LINE * LINE).min(LANE_BYTES_MAX)
    }
}
