//! All-gathers and reduce-scatters over several hosts, in each of which the devices read each
//! other's memory.
//!
//! A device's block goes through pinned memory to the devices that have its place on the other
//! hosts (its *rail*), and the devices of each host give each other what their rails have brought.
//! A reduce-scatter is the same backwards. Blocks are in the order of ranks, so that the devices of
//! a host have several ranges to give each other if ranks are numbered host by host: one for each
//! host. If ranks are numbered in turns, it is one.

use std::ops::Range;

use unisum_cuda_ipc::{CudaError, Pinned, Stream};
use unisum_kernels::Fold;
use unisum_link::CollectiveKind;

use super::{ALIGNMENT, BLOCK_BYTES, Hierarchy};
use crate::Error;
use crate::collective::raw::RawBuffers;
use crate::collective::reduction::Reduction;
use crate::collective::{Blocks, Collective};
use crate::device::buffer::{RawDeviceBuffers, device_error};
use crate::device::call::Calling;
use crate::device::memories::Owned;

/// What a rail's ranks together have in pinned memory at once, each of them, is so long at most.
const RAIL_BYTES: usize = 64 << 20;

/// Elements in which the blocks of each place lie side by side, in the order of the places.
#[derive(Debug, PartialEq)]
pub(super) struct Shared {
    range: Range<usize>,
    /// By place on a host.
    counts: Vec<usize>,
    /// Whose blocks these are, if of one host only.
    host: Option<usize>,
}

/// The blocks of all ranks, of which each has a host and a place on it, cut where the places do not
/// follow each other.
pub(super) fn ranges(places: &[(usize, usize)], blocks: &Blocks) -> Vec<Shared> {
    let on_each = places.iter().map(|&(_, place)| place + 1).max().unwrap_or(0);
    let mut block = every(blocks, places.len()).into_iter();
    let shared = |ranks: &[(usize, usize)]| {
        let mut counts = vec![0; on_each];
        let own: Vec<_> = block.by_ref().take(ranks.len()).collect();
        for ((_, place), block) in ranks.iter().zip(&own) {
            counts[*place] += block.len();
        }
        let host = ranks[0].0;
        let host = ranks.iter().all(|rank| rank.0 == host).then_some(host);
        Shared { range: own[0].start..own[own.len() - 1].end, counts, host }
    };
    places.chunk_by(|one, next| one.1 <= next.1).map(shared).collect()
}

/// Where the block of each rank lies.
fn every(blocks: &Blocks, world: usize) -> Vec<Range<usize>> {
    let length = |rank: usize| match blocks {
        Blocks::Even(each) => *each,
        Blocks::Given(counts) => counts[rank],
        Blocks::Pairs(..) => unreachable!("all-to-alls are staged"),
    };
    let block = |at: &mut usize, rank| {
        let start = std::mem::replace(at, *at + length(rank));
        Some(start..*at)
    };
    (0..world).scan(0, block).collect()
}

/// Where the blocks of the ranks with this place lie.
fn of_rail(places: &[(usize, usize)], place: usize, blocks: &Blocks) -> Vec<Range<usize>> {
    let all = every(blocks, places.len()).into_iter().zip(places);
    all.filter(|(_, rank)| rank.1 == place).map(|(block, _)| block).collect()
}

/// Parts of all these blocks of `most` elements at most, which travel together.
fn waves(blocks: &[Range<usize>], most: usize) -> Vec<Vec<Range<usize>>> {
    let longest = blocks.iter().map(Range::len).max().unwrap_or(0);
    let part = |block: &Range<usize>, from: usize| {
        let at = |offset: usize| block.start + offset.min(block.len());
        at(from)..at(from + most)
    };
    let wave = |from| blocks.iter().map(|block| part(block, from)).collect();
    (0..longest).step_by(most).map(wave).collect()
}

/// Where an element of the block `of` is, of blocks side by side.
fn beside(blocks: &[Range<usize>], of: usize, element: usize) -> usize {
    let before: usize = blocks[..of].iter().map(Range::len).sum();
    before + element - blocks[of].start
}

/// The most elements of a block that travel at once, on a rail over so many hosts.
fn most(hosts: usize, element_bytes: usize) -> usize {
    let bytes = BLOCK_BYTES.min(RAIL_BYTES / hosts) / ALIGNMENT * ALIGNMENT;
    (bytes / element_bytes).max(1)
}

impl Hierarchy {
    /// How many elements the blocks of the rail have.
    pub(super) fn elements_of_rail(&self, blocks: &Blocks) -> usize {
        of_rail(&self.places, self.node.rank(), blocks).iter().map(Range::len).sum()
    }
}

/// A collective on its way.
struct Way<'a> {
    hierarchy: &'a Hierarchy,
    gathers: bool,
    buffers: &'a RawDeviceBuffers,
    owners: &'a [&'a Owned],
    stream: &'a Stream,
    fold: Fold,
    /// Of the rail, in the elements of all ranks.
    blocks: &'a [Range<usize>],
    /// Bytes of pinned memory of a wave.
    room: usize,
    found: bool,
}

/// What travels together.
struct Wave<'a> {
    /// Of each block of the rail.
    parts: &'a [Range<usize>],
    /// Whose pinned memory and moments it has.
    half: usize,
}

impl Wave<'_> {
    /// Each part, its rank on the rail, and where it lies on the host, in elements.
    fn each(&self) -> impl Iterator<Item = (usize, &Range<usize>, usize)> {
        let starts = self.parts.iter().scan(0, |at, part| {
            let start = *at;
            *at += part.len();
            Some(start)
        });
        let parts = self.parts.iter().enumerate().zip(starts);
        parts.map(|((of, part), start)| (of, part, start)).filter(|(_, part, _)| !part.is_empty())
    }
}

impl Way<'_> {
    const fn bytes(&self, elements: usize) -> usize {
        elements * self.buffers.dtype.bytes()
    }

    /// This rank on the rail.
    fn own(&self) -> usize {
        self.hierarchy.rail.rank()
    }

    /// Where a part of the block `of` is on the device, of the blocks that are gathered or
    /// reduced by the host.
    fn of_host(&self, of: usize, part: &Range<usize>) -> u64 {
        if self.gathers || self.buffers.input.is_none() {
            return self.buffers.output.0 + self.bytes(part.start) as u64;
        }
        self.scattered(beside(self.blocks, of, part.start))
    }

    /// Where an element that the host has reduced is, if the input has to stay as it is.
    fn scattered(&self, element: usize) -> u64 {
        let memory = self.hierarchy.scattered.as_ref();
        memory.map_or(0, |owned| owned.memory().address() + self.bytes(element) as u64)
    }

    /// Where a part of this rank's result goes.
    fn of_result(&self, part: &Range<usize>) -> u64 {
        let is_block = !self.gathers && self.buffers.input.is_some();
        let start = if is_block { self.blocks[self.own()].start } else { 0 };
        self.buffers.output.0 + self.bytes(part.start - start) as u64
    }

    /// What is copied from and to the host comes after what is in the stream.
    fn start(&self) -> Result<(), CudaError> {
        let Hierarchy { copies, moments, .. } = self.hierarchy;
        moments[0].scattered.record(self.stream)?;
        copies.wait(&moments[0].scattered)
    }

    fn gather(&mut self, ranges: &[Shared], waves: &[Vec<Range<usize>>]) -> Result<(), Error> {
        let own = &self.blocks[self.own()];
        if let Some((from, _)) = self.buffers.input.filter(|_| !own.is_empty()) {
            let (to, bytes) = (self.of_result(own), self.bytes(own.len()));
            // SAFETY: the buffers are the caller's for as long as the stream works on them.
            unsafe { self.stream.copy(to, from, bytes) }.map_err(device_error)?;
        }
        self.start().map_err(device_error)?;
        let here = self.hierarchy.here;
        let (own, others): (Vec<_>, _) = ranges.iter().partition(|it| it.host == Some(here));
        // Nothing has to come from another host for these.
        own.into_iter().try_for_each(|shared| self.gather_in_host(shared))?;
        self.cross(waves)?;
        others.into_iter().try_for_each(|shared: &Shared| self.gather_in_host(shared))
    }

    fn gather_in_host(&self, Shared { range, counts, .. }: &Shared) -> Result<(), Error> {
        if range.is_empty() {
            return Ok(());
        }
        let output = (self.buffers.output.0 + self.bytes(range.start) as u64, range.len());
        let buffers = RawDeviceBuffers { dtype: self.buffers.dtype, input: None, output };
        let gather = Collective::all_gather().with_counts(counts);
        self.hierarchy.node.call(&gather, buffers, self.owners, self.stream)
    }

    fn scatter(&mut self, ranges: &[Shared], waves: &[Vec<Range<usize>>]) -> Result<(), Error> {
        let how = match self.fold.factor {
            Some(factor) => Reduction::sum_scaled_by(factor),
            None => Reduction::new(self.fold.op),
        };
        let mut before = 0;
        for Shared { range, counts, .. } in ranges.iter().filter(|it| !it.range.is_empty()) {
            let own = counts[self.hierarchy.node.rank()];
            let at = |base: u64| base + self.bytes(range.start) as u64;
            let (input, output) = match self.buffers.input {
                None => (None, (at(self.buffers.output.0), range.len())),
                Some((from, _)) => (Some((at(from), range.len())), (self.scattered(before), own)),
            };
            let buffers = RawDeviceBuffers { dtype: self.buffers.dtype, input, output };
            let scatter = Collective::reduce_scatter(how).with_counts(counts);
            self.hierarchy.node.call(&scatter, buffers, self.owners, self.stream)?;
            before += own;
        }
        self.start().map_err(device_error)?;
        self.cross(waves)
    }

    /// One wave is copied down while the one before is between the hosts.
    fn cross(&mut self, waves: &[Vec<Range<usize>>]) -> Result<(), Error> {
        let wave = |number: usize| Wave { parts: &waves[number], half: number % 2 };
        for number in 0..waves.len() {
            self.copy_down(&wave(number)).map_err(device_error)?;
            if let Some(before) = number.checked_sub(1) {
                self.end(&wave(before))?;
            }
        }
        match waves.len().checked_sub(1) {
            Some(last) => self.end(&wave(last)),
            None => Ok(()),
        }
    }

    /// Where an element of a wave is on the host.
    fn on_host(&self, half: usize, element: usize) -> std::ptr::NonNull<u8> {
        let pinned = self.hierarchy.pinned.as_ref().map(Pinned::host).expect("there is room");
        // SAFETY: the memory has two of them, and each has so many elements.
        unsafe { pinned.add(half * self.room + self.bytes(element)) }
    }

    fn copy_down(&self, wave: &Wave<'_>) -> Result<(), CudaError> {
        let Hierarchy { copies, moments, .. } = self.hierarchy;
        for (of, part, start) in wave.each().filter(|it| !self.gathers || it.0 == self.own()) {
            let to = self.on_host(wave.half, start);
            let (from, bytes) = (self.of_host(of, part), self.bytes(part.len()));
            // SAFETY: the part is the caller's, or this layer's, for as long as the stream works on
            // it, and its memory on the host is as long; what was there went back before, in this
            // stream.
            unsafe { copies.copy_to_host(to.as_ptr(), from, bytes) }?;
        }
        moments[wave.half].down.record(copies)
    }

    /// The hosts gather or reduce what is in pinned memory, and what came of it goes back.
    fn end(&mut self, wave: &Wave<'_>) -> Result<(), Error> {
        let Hierarchy { node, rail, moments, .. } = self.hierarchy;
        node.await_event(&moments[wave.half].down)?;
        let counts: Vec<usize> = wave.parts.iter().map(Range::len).collect();
        let collective = match self.gathers {
            true => Collective::all_gather(),
            false if self.fold.watch => {
                Collective::reduce_scatter(Reduction::new(self.fold.op).detect_nonfinite())
            }
            false => Collective::reduce_scatter(self.fold.op),
        };
        let (from, all) = (self.on_host(wave.half, 0), counts.iter().sum());
        // SAFETY: page-aligned memory with so many elements, which nobody else reads or writes
        // until they are copied back.
        let lent = unsafe { RawBuffers::in_place(self.buffers.dtype, from, all) };
        self.found |= rail.run_raw(&collective.with_counts(&counts), lent)?.nonfinite;
        self.copy_up(wave).map_err(device_error)
    }

    fn copy_up(&self, wave: &Wave<'_>) -> Result<(), CudaError> {
        let Hierarchy { copies, moments, .. } = self.hierarchy;
        for (_, part, start) in wave.each().filter(|it| self.gathers != (it.0 == self.own())) {
            let from = self.on_host(wave.half, start);
            let (to, bytes) = (self.of_result(part), self.bytes(part.len()));
            // SAFETY: as in `copy_down`; the caller's stream waits for it just below.
            unsafe { copies.copy_to_device(to, from.as_ptr(), bytes) }?;
        }
        moments[wave.half].up.record(copies)?;
        self.stream.wait(&moments[wave.half].up)
    }
}

impl Calling<'_> {
    /// An all-gather or a reduce-scatter; whether a result of this rank is infinite or NaN.
    pub(super) fn over_rails(
        &mut self,
        owners: &[&Owned],
        fold: &Fold,
        all: &Blocks,
    ) -> Result<bool, Error> {
        let gathers = self.collective.kind() == CollectiveKind::AllGather;
        let element_bytes = self.buffers.dtype.bytes();
        let hierarchy = self.state.hierarchy.as_mut().expect("asked before");
        let ranges = ranges(&hierarchy.places, all);
        let blocks = &of_rail(&hierarchy.places, hierarchy.node.rank(), all)[..];
        let waves = waves(blocks, most(hierarchy.rail.world(), element_bytes));
        // The first wave is the longest.
        let longest: usize = waves.first().into_iter().flatten().map(Range::len).sum();
        let room = hierarchy.room((longest * element_bytes).next_multiple_of(ALIGNMENT));
        let room = room.map_err(device_error)?;
        let hierarchy = &**hierarchy;
        let owners = &[owners, &hierarchy.scattered.iter().collect::<Vec<_>>()].concat()[..];
        let (buffers, stream, fold) = (&self.buffers, self.stream, *fold);
        let found = false;
        let mut way =
            Way { hierarchy, gathers, buffers, owners, stream, fold, blocks, room, found };
        match gathers {
            true => way.gather(&ranges, &waves)?,
            false => way.scatter(&ranges, &waves)?,
        }
        Ok(way.found)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::places;
    use super::*;

    /// Hosts of ranks, with equally many each, in any order, and the lengths of blocks.
    fn worlds() -> impl Strategy<Value = (Vec<(usize, usize)>, Blocks)> {
        let hosts = (2..5_usize, 2..5_usize).prop_flat_map(|(hosts, each)| {
            let ranks: Vec<&str> =
                (0..hosts * each).map(|it| ["a", "b", "c", "d"][it % hosts]).collect();
            prop_oneof![
                Just(ranks.clone()),
                Just({
                    let mut by_host = ranks.clone();
                    by_host.sort_unstable();
                    by_host
                }),
                Just(ranks).prop_shuffle(),
            ]
        });
        hosts.prop_flat_map(|hosts| {
            let places = places(&hosts).expect("hosts are even");
            let counts = proptest::collection::vec(0..9_usize, hosts.len());
            let blocks = prop_oneof![
                (0..9_usize).prop_map(Blocks::Even),
                counts.prop_map(|counts| Blocks::Given(counts.into())),
            ];
            (Just(places), blocks)
        })
    }

    /// The ranks of a host, by place, or of a rail.
    fn ranks(places: &[(usize, usize)], is_one: impl Fn(&(usize, usize)) -> bool) -> Vec<usize> {
        (0..places.len()).filter(|&rank| is_one(&places[rank])).collect()
    }

    /// The part of a range that a place has.
    fn part(Shared { range, counts, .. }: &Shared, place: usize) -> Range<usize> {
        let start = range.start + counts[..place].iter().sum::<usize>();
        start..start + counts[place]
    }

    proptest! {
        /// What each rank has after each step, by element: a gathering as `Way::gather` does it.
        #[test]
        fn every_rank_gathers_every_element((places, blocks) in worlds(), most in 1..7_usize) {
            let (all, ranges) = (every(&blocks, places.len()), ranges(&places, &blocks));
            let total = all.last().unwrap().end;
            let has = |block: &Range<usize>| (0..total).map(|it| block.contains(&it)).collect();
            let mut held: Vec<Vec<bool>> = all.iter().map(has).collect();
            let in_hosts = |held: &mut Vec<Vec<bool>>, is_first: bool| {
                for (rank, &(host, _)) in places.iter().enumerate() {
                    let mine = ranges.iter().filter(|it| (it.host == Some(host)) == is_first);
                    for shared in mine {
                        for other in ranks(&places, |it| it.0 == host) {
                            let part = part(shared, places[other].1);
                            let theirs = held[other][part.clone()].to_vec();
                            assert!(theirs.iter().all(|&it| it), "{other} gives what it has");
                            held[rank][part].copy_from_slice(&theirs);
                        }
                    }
                }
            };
            in_hosts(&mut held, true);
            for (rank, &(_, place)) in places.iter().enumerate() {
                let rail = ranks(&places, |it| it.1 == place);
                for wave in waves(&of_rail(&places, place, &blocks), most) {
                    for (part, &from) in wave.iter().zip(&rail) {
                        assert!(part.len() <= most);
                        assert!(part.clone().all(|it| all[from].contains(&it)));
                        held[rank][part.clone()].fill(true);
                    }
                }
            }
            in_hosts(&mut held, false);
            prop_assert!(held.iter().flatten().all(|&it| it));
        }

        /// The sum of the ranks that are in each element: a scattering as `Way::scatter` does it.
        #[test]
        fn every_rank_has_the_sum_of_all((places, blocks) in worlds(), most in 1..7_usize) {
            let (all, ranges) = (every(&blocks, places.len()), ranges(&places, &blocks));
            let of_host = |host: usize| ranks(&places, |it| it.0 == host).len() as u64;
            for (rank, &(_, place)) in places.iter().enumerate() {
                let own = of_rail(&places, place, &blocks);
                let rail = ranks(&places, |it| it.1 == place);
                // Elements side by side, as the device has them.
                let scattered: Vec<usize> = ranges.iter().flat_map(|it| part(it, place)).collect();
                let mut sums = vec![0; all[rank].len()];
                for wave in waves(&own, most) {
                    for (of, part) in wave.iter().enumerate().filter(|it| rail[it.0] == rank) {
                        for element in part.clone() {
                            assert_eq!(scattered[beside(&own, of, element)], element);
                            let hosts = rail.iter().map(|&it| of_host(places[it].0));
                            sums[element - all[rank].start] += hosts.sum::<u64>();
                        }
                    }
                }
                prop_assert!(sums.iter().all(|&sum| sum == places.len() as u64));
            }
        }
    }

    #[test]
    fn ranks_by_host_share_a_range_for_each_and_ranks_in_turns_share_one() {
        let of = |hosts: &[&str]| ranges(&places(hosts).expect("they are even"), &Blocks::Even(2));
        let shared = |range, counts: &[usize], host| Shared { range, counts: counts.into(), host };
        let by_host = [shared(0..4, &[2, 2], Some(0)), shared(4..8, &[2, 2], Some(2))];
        assert_eq!(of(&["a", "a", "b", "b"]), by_host);
        assert_eq!(of(&["a", "b", "a", "b"]), [shared(0..8, &[4, 4], None)]);
        assert_eq!(of(&["a", "b", "b", "a"]), [shared(0..8, &[4, 4], None)]);
        // Places 0, 1, 0, 2, 1, 2.
        let mixed = [shared(0..4, &[2, 2, 0], Some(0)), shared(4..8, &[2, 0, 2], None)];
        let last = shared(8..12, &[0, 2, 2], Some(2));
        assert_eq!(of(&["a", "a", "b", "a", "b", "b"])[..2], mixed);
        assert_eq!(of(&["a", "a", "b", "a", "b", "b"])[2], last);
    }

    #[test]
    fn pinned_memory_is_bounded_whatever_the_number_of_hosts() {
        for (hosts, bytes) in [(2, 1), (16, 4), (17, 8), (1000, 16)] {
            let elements = most(hosts, bytes);
            assert!(elements * bytes * hosts <= RAIL_BYTES && elements * bytes <= BLOCK_BYTES);
            assert!(elements > 1 && (elements * bytes).is_multiple_of(ALIGNMENT));
        }
    }
}
