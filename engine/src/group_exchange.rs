//! The group exchange: what the ranks of a node do together in shared memory.
//!
//! Registered regions are folded and written in place. Private memory passes through the members'
//! staging buffers in pieces small enough to stay in cache, two of each in turn:
//!
//! ```text
//! staging buffer    input of piece 0, 2, … | input of piece 1, 3, … | result | result
//! of each member    (a part for each member)
//! ```
//! Between two arrivals, every member stages its inputs of piece k, folds its part of piece k−1,
//! and copies the others' results of piece k−2: one arrival per piece. Nobody overwrites what
//! others still read, since they read it before the last arrival.

use std::ops::Range;

use unisum_kernels::copy;
use unisum_link::{Arrival, Group, LinkError, Part, Rank};

use super::folding::{Extras, Folding};
use super::memories::Memories;
use super::program::Exchange;

/// Blocks of mapped memory: read from all members, folded and written while in the first-level
/// cache.
pub(super) const MAPPED_BLOCK: usize = 16 << 10;
/// How much of the staging buffers the ranks of one core use, so that they stay in a near cache
/// together with what is copied (measured where second-level caches hold 512 KiB), unless parts
/// would become shorter than this: each piece costs an arrival of all.
const CORE_BYTES: f64 = (1 << 20) as f64;
const PART_BYTES_MIN: usize = 8 << 10;
/// Parts begin at cache lines.
pub(super) const LINE: usize = 64;

/// What a group action is executed with.
pub(crate) struct GroupContext<'a> {
    pub(crate) rank: Rank,
    pub(crate) group: &'a mut dyn Group,
    pub(crate) memories: Memories,
    pub(crate) folding: &'a mut Folding,
    /// What the folds of the action do besides folding.
    pub(crate) extras: Extras,
    /// Whether a mark is passed on to other ranks.
    pub(crate) spreads_marks: bool,
    pub(crate) sources: &'a mut Sources,
    /// The largest number of bytes of a slice in one piece, see [`part_bytes`].
    pub(crate) part_bytes: usize,
}

/// Room for the addresses of one fold, kept so that nothing is allocated.
#[derive(Debug, Default)]
pub(crate) struct Sources(pub(super) Vec<*const u8>);

// SAFETY: the addresses are used in the call that collects them and never afterwards.
unsafe impl Send for Sources {}

/// How an exchange continues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    Done,
    /// After this arrival it is done.
    Last(Arrival),
    /// After this arrival, the next piece follows.
    Piece(Arrival),
}

impl GroupContext<'_> {
    /// Enters. The first piece of a private region is staged, in case some member cannot map it.
    pub(crate) fn enter(&mut self, exchange: &Exchange) -> Arrival {
        if exchange.folds && !self.input_is_registered() {
            self.stage(exchange, 0);
        }
        self.group.enter(false)
    }

    /// After the enter: folds this rank's slice of all members, distributes it to them, or both.
    pub(crate) fn exchange(&mut self, exchange: &Exchange) -> Result<Next, LinkError> {
        if ![Part::Input, Part::Output].into_iter().all(|part| self.group.registered(part)) {
            let first = usize::from(exchange.folds);
            return self.piece(exchange, first);
        }
        for bytes in blocks(&exchange.slices[self.place()]) {
            if exchange.folds {
                self.fold_mapped(&bytes)?;
            }
            if exchange.gathers {
                self.push(&bytes)?;
            }
        }
        self.group.confirm()?;
        Ok(if exchange.gathers { Next::Last(self.arrive()) } else { Next::Done })
    }

    /// Folds a piece of this rank's slice of all members' registered inputs.
    pub(crate) fn fold_piece(&mut self, piece: &Range<usize>) -> Result<(), LinkError> {
        blocks(piece).try_for_each(|bytes| self.fold_mapped(&bytes))?;
        self.group.confirm()
    }

    /// Stores a piece of this rank's output at all members, divided first if the extras say so.
    pub(crate) fn push_piece(&mut self, piece: &Range<usize>) -> Result<(), LinkError> {
        for bytes in blocks(piece) {
            if self.extras.divides {
                let own = self.output(&bytes);
                let own_only = [own.cast_const()];
                // SAFETY: the output is valid for `bytes`, which only this rank touches until the
                // next arrival; folding one source in place is allowed.
                unsafe { self.folding.run(own, &own_only, bytes.len(), self.extras) };
            }
            self.push(&bytes)?;
        }
        Ok(())
    }

    fn fold_mapped(&mut self, bytes: &Range<usize>) -> Result<(), LinkError> {
        self.fold_into(bytes, |group, member| {
            let mapped = group.source(member, Part::Input, bytes.clone())?;
            Ok(mapped.expect("registered regions are mapped"))
        })
    }

    /// The work between two arrivals of an exchange of private regions.
    pub(crate) fn piece(&mut self, exchange: &Exchange, k: usize) -> Result<Next, LinkError> {
        if exchange.folds {
            if !self.input_is_registered() {
                self.stage(exchange, k);
            }
            if let Some(k) = k.checked_sub(1) {
                self.fold_part(exchange, k)?;
            }
        } else {
            let part = self.part(&exchange.slices[self.place()], k);
            self.stage_result(k, &part, &part);
        }
        let behind = if exchange.folds { 2 } else { 1 };
        if let Some(k) = k.checked_sub(behind).filter(|_| exchange.gathers) {
            self.copy_results(exchange, k);
        }
        let pieces = exchange.longest().div_ceil(self.part_bytes);
        let is_last = k + 1 >= pieces + behind;
        Ok(if is_last { Next::Done } else { Next::Piece(self.arrive()) })
    }

    /// Copies this rank's inputs of piece `k` for the others to its staging buffer.
    fn stage(&self, exchange: &Exchange, k: usize) {
        let own = self.place();
        for (place, slice) in exchange.slices.iter().enumerate().filter(|(it, _)| *it != own) {
            let part = self.part(slice, k);
            let to = self.staging(self.rank, self.input(k, place, part.len()));
            let from = self.memories.regions.input.pointer(&part);
            // SAFETY: the region and the staging buffer are valid for that many bytes and never
            // overlap. Whoever read the input of piece k − 2 here did so before the last arrival.
            unsafe { copy(from, to, part.len()) };
        }
    }

    /// Folds this rank's part of piece `k` into its region, and stages the result for the others.
    fn fold_part(&mut self, exchange: &Exchange, k: usize) -> Result<(), LinkError> {
        let place = self.place();
        let part = self.part(&exchange.slices[place], k);
        if part.is_empty() {
            // After the last arrival, nothing is read from the others, who may have left.
            return Ok(());
        }
        let input = self.input(k, place, part.len());
        let rank = self.rank;
        for bytes in blocks(&part) {
            let own = self.memories.regions.input.pointer(&bytes).cast_const();
            let input = within(&input, &part, &bytes);
            self.fold_into(&bytes, |group, member| {
                if member == rank {
                    return Ok(own);
                }
                let mapped = group.source(member, Part::Input, bytes.clone())?;
                Ok(mapped.unwrap_or_else(|| group.staging(member, input.clone()).cast_const()))
            })?;
            if exchange.gathers {
                self.stage_result(k, &part, &bytes);
            }
        }
        // Some members' inputs may be registered, and were read in place.
        self.group.confirm()
    }

    /// Stages `bytes` of this rank's `part` of piece `k`.
    fn stage_result(&self, k: usize, part: &Range<usize>, bytes: &Range<usize>) {
        let place = within(&self.result(k, part.len()), part, bytes);
        let to = self.staging(self.rank, place);
        // SAFETY: as in `stage`.
        unsafe { copy(self.output(bytes), to, bytes.len()) };
    }

    /// Copies the others' results of piece `k` into this rank's region.
    fn copy_results(&self, exchange: &Exchange, k: usize) {
        for (&member, slice) in self.group.members().iter().zip(&exchange.slices) {
            if member == self.rank {
                continue;
            }
            let part = self.part(slice, k);
            let from = self.staging(member, self.result(k, part.len()));
            // SAFETY: as in `stage`; the member finished the result before the last arrival.
            unsafe { copy(from, self.output(&part), part.len()) };
        }
    }

    /// Folds the operands that `source` gives for each member into `bytes` of this rank's output.
    fn fold_into(
        &mut self,
        bytes: &Range<usize>,
        source: impl Fn(&dyn Group, Rank) -> Result<*const u8, LinkError>,
    ) -> Result<(), LinkError> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.sources.0.clear();
        for &member in self.group.members() {
            self.sources.0.push(source(&*self.group, member)?);
        }
        let into = self.output(bytes);
        // SAFETY: `into` and every source are valid for `bytes`. All members arrived, so their
        // values are there, and only this rank writes these bytes until the next arrival.
        unsafe { self.folding.run(into, &self.sources.0, bytes.len(), self.extras) };
        Ok(())
    }

    /// Stores `bytes` of this rank's output at all members.
    fn push(&self, bytes: &Range<usize>) -> Result<(), LinkError> {
        let own = self.output(bytes);
        for &member in self.group.members().iter().filter(|&&member| member != self.rank) {
            let target = self.group.target(member, bytes.clone())?;
            // SAFETY: both are valid for `bytes`: the own region, and the member's mapped one.
            // Nobody but this rank touches these bytes of any member until the next arrival, and
            // the buffers of two ranks never overlap.
            unsafe { copy(own, target, bytes.len()) };
        }
        Ok(())
    }

    /// Arrives, and passes on what this rank detected.
    pub(super) fn arrive(&mut self) -> Arrival {
        if self.folding.nonfinite && self.spreads_marks {
            self.group.mark();
        }
        self.group.arrive()
    }

    fn output(&self, bytes: &Range<usize>) -> *mut u8 {
        self.memories.regions.output.pointer(bytes)
    }

    pub(super) const fn input_is_registered(&self) -> bool {
        self.memories.regions.input.heap_offset().is_some()
    }

    fn place(&self) -> usize {
        let place = self.group.members().binary_search(&self.rank);
        place.expect("a rank is in its own group")
    }

    /// The part of a slice in piece `k`.
    fn part(&self, slice: &Range<usize>, k: usize) -> Range<usize> {
        let at = |k: usize| slice.end.min(slice.start + k * self.part_bytes);
        at(k)..at(k + 1)
    }

    /// Where the part for the member at `place` lies among the inputs of piece `k`.
    fn input(&self, k: usize, place: usize, bytes: usize) -> Range<usize> {
        self.on_bench((k % 2) * self.group.members().len() + place, bytes)
    }

    /// Where the result of piece `k` lies.
    fn result(&self, k: usize, bytes: usize) -> Range<usize> {
        self.on_bench(2 * self.group.members().len() + k % 2, bytes)
    }

    fn on_bench(&self, part: usize, bytes: usize) -> Range<usize> {
        let start = part * self.part_bytes;
        start..start + bytes
    }

    pub(super) fn staging(&self, member: Rank, bytes: Range<usize>) -> *mut u8 {
        self.group.staging(member, bytes)
    }
}

/// The longest part of a piece among this many members with staging buffers of `staging` bytes: all
/// inputs and results fit twice.
pub(super) fn part_bytes(members: usize, staging: usize, ranks_per_core: f64) -> usize {
    let parts = 2 * (members + 1);
    let share = (CORE_BYTES / ranks_per_core.max(1.0)) as usize;
    let part = (share / parts).max(PART_BYTES_MIN).min(staging / parts);
    part / LINE * LINE
}

/// Where `bytes` of `part` lie in the place that holds the part.
const fn within(place: &Range<usize>, part: &Range<usize>, bytes: &Range<usize>) -> Range<usize> {
    let start = place.start + (bytes.start - part.start);
    start..start + (bytes.end - bytes.start)
}

/// A range of mapped memory in blocks that stay in cache.
fn blocks(range: &Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
    let Range { start, end } = *range;
    (start..end).step_by(MAPPED_BLOCK).map(move |start| start..end.min(start + MAPPED_BLOCK))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_fit_the_benches_and_stay_long_among_many_members() {
        let staging = 1 << 20;
        for (members, ranks_per_core) in (2..=1024).flat_map(|n| [(n, 0.1), (n, n as f64 / 2.0)]) {
            let (part, parts) = (part_bytes(members, staging, ranks_per_core), 2 * (members + 1));
            assert!(part > 0 && part % LINE == 0 && part * parts <= staging, "{members}: {part}");
            let of_staging = staging / parts / LINE * LINE;
            assert!(part >= of_staging.min(PART_BYTES_MIN), "{members}: {part}");
            let of_core = ranks_per_core.max(1.0) * (parts * part) as f64;
            assert!(of_core <= CORE_BYTES || part <= PART_BYTES_MIN, "{members}: {of_core}");
        }
    }
}
