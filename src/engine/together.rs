//! The group actions: what the ranks of a node do together in shared memory.

use std::ops::Range;

use unisum_link::kernels::Fold;
use unisum_link::{Group, LinkError, Rank, Region};

/// Blocks of mapped memory: read from all members, folded and written while in the first cache.
const MAPPED_BLOCK: usize = 16 << 10;
/// Blocks of private memory: large enough that the system call that fetches one is amortised.
const PRIVATE_BLOCK: usize = 64 << 10;

/// What a group action works with.
pub(crate) struct GroupBench<'a> {
    pub(crate) rank: Rank,
    pub(crate) group: &'a mut dyn Group,
    pub(crate) region: Region,
    pub(crate) fold: Fold,
    pub(crate) scratch: &'a mut Vec<u8>,
}

impl GroupBench<'_> {
    /// Folds `bytes` of all members into this rank's region; with `push`, stores every block at
    /// all members. Nobody else touches these bytes between the group's arrivals.
    pub(crate) fn fold(&mut self, bytes: &Range<usize>, push: bool) -> Result<(), LinkError> {
        let members = self.group.members().to_vec();
        let block = if self.group.registered() { MAPPED_BLOCK } else { PRIVATE_BLOCK };
        let mut sources = Vec::with_capacity(members.len());
        for start in bytes.clone().step_by(block) {
            let bytes = start..bytes.end.min(start + block);
            self.sources_of(&members, &bytes, &mut sources)?;
            let own = self.region.pointer(&bytes);
            let count = bytes.len() / self.fold.dtype.bytes();
            // SAFETY: `own` is valid for `bytes`; the sources are mapped memory or scratch of the
            // same length. All members arrived, so their values are there, and only this rank
            // writes these bytes until the next arrival.
            unsafe { self.fold.run(own, &sources, count) };
            if push {
                self.push(&members, &bytes);
            }
        }
        Ok(())
    }

    fn sources_of(
        &mut self,
        members: &[Rank],
        bytes: &Range<usize>,
        sources: &mut Vec<*const u8>,
    ) -> Result<(), LinkError> {
        let room = bytes.len() * members.len();
        if !self.group.registered() && self.scratch.len() < room {
            self.scratch.resize(room, 0);
        }
        sources.clear();
        for (place, &member) in members.iter().enumerate() {
            let at = if self.group.registered() {
                0..0
            } else {
                place * bytes.len()..(place + 1) * bytes.len()
            };
            sources.push(self.group.source(member, bytes.clone(), &mut self.scratch[at])?);
        }
        Ok(())
    }

    /// Stores `bytes` of this rank's region at all members.
    pub(crate) fn push(&mut self, members: &[Rank], bytes: &Range<usize>) {
        let own = self.region.pointer(bytes);
        for &member in members.iter().filter(|&&member| member != self.rank) {
            let target = self.group.target(member, bytes.clone());
            // SAFETY: both are valid for `bytes`: the own region, and the member's mapped one.
            // Nobody but this rank touches these bytes of any member until the next arrival, and
            // the buffers of two ranks never overlap.
            unsafe { std::ptr::copy_nonoverlapping(own, target, bytes.len()) };
        }
    }

    /// Copies every other member's slice into this rank's region.
    pub(crate) fn pull(&mut self, slices: &[Range<usize>]) -> Result<(), LinkError> {
        let members = self.group.members().to_vec();
        for (&member, bytes) in members.iter().zip(slices) {
            if member == self.rank || bytes.is_empty() {
                continue;
            }
            let own = self.region.pointer(bytes);
            // SAFETY: the region is valid for `bytes` and, between two arrivals, only this rank
            // touches the slices of others in its own region.
            let landing = unsafe { std::slice::from_raw_parts_mut(own, bytes.len()) };
            let source = self.group.source(member, bytes.clone(), landing)?;
            if source != own.cast_const() {
                // SAFETY: `source` is the member's mapped memory, `bytes` long and final since
                // the last arrival; two ranks' buffers never overlap.
                unsafe { std::ptr::copy_nonoverlapping(source, own, bytes.len()) };
            }
        }
        Ok(())
    }
}
