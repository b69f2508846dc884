//! Collectives over several hosts, in each of which the devices read each other's memory: here
//! all-reduces, in `rails` all-gathers and reduce-scatters.
//!
//! For an all-reduce, the devices of a host reduce-scatter among themselves, so that each has a
//! block of the host's result. It goes to pinned memory, where the host reduces it with the blocks
//! of the devices that have the same place on the other hosts, and back; then the devices
//! all-gather the blocks. Long buffers take this way in pieces: one is on the wire while the
//! devices reduce the next.

mod rails;

use std::collections::HashMap;
use std::ops::Range;

use unisum_cuda_ipc::{CudaError, Event, Pinned, Stream};
use unisum_kernels::{Dtype, Fold, ReduceOp};
use unisum_link::{CollectiveKind, Rank};

use super::DeviceCommunicator;
use super::areas::rounded;
use super::buffer::{RawDeviceBuffers, device_error};
use super::call::Calling;
use super::card::{Refusal, RefusalKind};
use super::joining::DeviceRoute;
use super::memories::Owned;
use crate::collective::raw::RawBuffers;
use crate::collective::reduction::Reduction;
use crate::collective::{Blocks, Buffers, Collective, Extents};
use crate::communicator::groups::Making;
use crate::{Communicator, Error};

/// A device's block of a piece is about so long: what a network carries in many times the few
/// launches that a piece costs, and short beside what is worth cutting.
const BLOCK_BYTES: usize = 4 << 20;
/// Blocks begin at multiples of so many bytes of the buffer, for the kernels' widest accesses.
const ALIGNMENT: usize = 64;
/// What a device copies from or to the host in a second: H100 with PCIe 5.0 x16, as in
/// `DeviceFigures`. Reckoned, not measured.
const HOST_BYTES_PER_S: f64 = 0.8 * 64e9;
/// What a call of a host's ranks takes before anything is in their streams: assumed, not measured.
const CALL_S: f64 = 10e-6;
/// The algorithm that all of this is.
pub(super) const NAME: &str = "hierarchical";

/// What it needs.
#[derive(Debug)]
pub(super) struct Hierarchy {
    /// The ranks of this host, whose devices read each other's memory.
    node: DeviceCommunicator,
    /// The ranks that have this one's place on their hosts.
    rail: Communicator,
    /// Which host and which place on it each rank has.
    places: Vec<(usize, usize)>,
    /// This rank's host.
    here: usize,
    /// For copies from and to the host, beside the caller's stream.
    copies: Stream,
    pinned: Option<Pinned>,
    /// Of pieces in turns.
    moments: [Moments; 2],
    /// On the device, what its host has reduced for the ranks of the rail.
    scattered: Option<Owned>,
    /// Whether it is faster than a call through the hosts alone, by collective, type and elements.
    pays: HashMap<(CollectiveKind, Dtype, usize), bool>,
}

/// Of a piece.
#[derive(Debug)]
struct Moments {
    /// The host's devices have reduced it.
    scattered: Event,
    /// This device's block is in pinned memory.
    down: Event,
    /// It is back, reduced over all hosts.
    up: Event,
}

/// A piece of a call's buffer, in elements.
struct Piece {
    range: Range<usize>,
    /// The blocks of the devices of the host.
    counts: Vec<usize>,
    /// This device's, in the buffer.
    own: Range<usize>,
    /// Whose pinned memory and moments it has.
    half: usize,
}

/// Which host and which place on it each rank has, if all hosts of several have as many ranks, and
/// more than one: the same answer on all ranks.
fn places(hosts: &[&str]) -> Option<Vec<(usize, usize)>> {
    let host = |rank: Rank| hosts.iter().position(|host| *host == hosts[rank]).expect("itself");
    let place = |rank: Rank| (0..rank).filter(|&it| host(it) == host(rank)).count();
    let all: Vec<_> = (0..hosts.len()).map(|rank| (host(rank), place(rank))).collect();
    let ranks_on = |host: usize| all.iter().filter(|it| it.0 == host).count();
    let on_first = ranks_on(0);
    let is_even = all.iter().all(|&(host, _)| ranks_on(host) == on_first);
    (is_even && on_first > 1 && on_first < all.len()).then_some(all)
}

/// Whether the devices of each host take less time than it saves to copy a block only, down, back
/// or both. `on_devices` is what a collective of so many elements takes among those of a host.
fn pays(
    kind: CollectiveKind,
    (count, element_bytes): (usize, usize),
    (places, on_each): (&[(usize, usize)], usize),
    on_devices: impl Fn(&Collective, usize) -> f64,
) -> bool {
    let scatter = |count| on_devices(&Collective::reduce_scatter(ReduceOp::Sum), count);
    let gather = |count| on_devices(&Collective::all_gather(), count);
    let bytes = (count * element_bytes) as f64;
    let saved = (bytes - bytes / on_each as f64) / HOST_BYTES_PER_S;
    if kind == CollectiveKind::AllReduce {
        return scatter(count) + gather(count) < 2.0 * saved;
    }
    // One call for each range in which the places follow each other.
    let calls = rails::ranges(places, &Blocks::Even(1)).len();
    let each = count.div_ceil(calls);
    let of_one = match kind {
        CollectiveKind::AllGather => gather(each),
        _ => scatter(each),
    };
    calls as f64 * (of_one + CALL_S) < saved
}

/// The pieces of a buffer.
fn pieces(count: usize, element_bytes: usize, (place, local): (usize, usize)) -> Vec<Piece> {
    let unit = (ALIGNMENT / element_bytes).max(1);
    let most = (BLOCK_BYTES / element_bytes).max(1) * local;
    let begins = (0..count).step_by(most);
    let piece = |(number, start): (usize, usize)| {
        let length = most.min(count - start);
        let block = length.div_ceil(local).next_multiple_of(unit);
        let begin = |place: usize| (place * block).min(length);
        let counts = (0..local).map(|it| begin(it + 1) - begin(it)).collect();
        let own = start + begin(place)..start + begin(place + 1);
        Piece { range: start..start + length, counts, own, half: number % 2 }
    };
    begins.enumerate().map(piece).collect()
}

impl Hierarchy {
    /// Agrees with all ranks whether there is one. Collective.
    ///
    /// # Errors
    /// If the job fails.
    pub(super) fn join(host: &Communicator, ordinal: usize) -> Result<Option<Self>, Error> {
        let Some(member) = &host.member else { return Ok(None) };
        let ranks = member.core.runner.membership.ranks();
        let Some(places) = places(&member.core.job.hosts(ranks)) else { return Ok(None) };
        let (here, place) = places[host.rank()];
        let group = |color: usize| {
            let made = host.make(&Making::Device, Some(color as u32), host.rank() as i64)?;
            Ok::<_, Error>(made.expect("who has a color is in a group"))
        };
        let (node, rail) = (group(here)?, group(place)?);
        // Both choose for themselves, whatever is fixed for the whole.
        rail.set_algorithm(None)?;
        let made = Self::make(&node, rail, (places, here), ordinal);
        let all_have = host.exchange(vec![u8::from(made.is_some())])?;
        Ok(made.filter(|_| all_have.iter().all(|has| has[..] == [1])))
    }

    fn make(
        node: &Communicator,
        rail: Communicator,
        (places, here): (Vec<(usize, usize)>, usize),
        ordinal: usize,
    ) -> Option<Self> {
        let node = node.on_device(ordinal);
        let node = node.inspect_err(|error| tracing::debug!("{error}")).ok()?;
        node.set_algorithm(None).ok()?;
        let moments = || -> Result<_, CudaError> {
            let event = || Event::new(&node.device, false);
            Ok(Moments { scattered: event()?, down: event()?, up: event()? })
        };
        let parts = || Ok::<_, CudaError>((Stream::new(&node.device)?, [moments()?, moments()?]));
        let (copies, moments) = parts().inspect_err(|error| tracing::debug!("{error}")).ok()?;
        let is_direct = *node.route() == DeviceRoute::CudaIpc;
        let (pinned, scattered, pays) = (None, None, HashMap::new());
        is_direct.then_some(Self {
            node,
            rail,
            places,
            here,
            copies,
            pinned,
            moments,
            scattered,
            pays,
        })
    }

    /// The hosts, and the devices of each.
    pub(super) fn extent(&self) -> (usize, usize) {
        (self.rail.world(), self.node.world())
    }

    /// The devices of this rank's host.
    pub(super) const fn node(&self) -> &DeviceCommunicator {
        &self.node
    }

    /// Whether a collective of so many elements in all goes this way, if `fixed` is not another
    /// one: the same on all ranks.
    pub(super) fn takes(
        &mut self,
        kind: CollectiveKind,
        fold: &Fold,
        count: usize,
        fixed: Option<&str>,
    ) -> bool {
        let can = match kind {
            CollectiveKind::AllGather => true,
            // Integers are divided once, by all.
            CollectiveKind::AllReduce | CollectiveKind::ReduceScatter => {
                fold.custom.is_none() && (fold.op != ReduceOp::Average || fold.dtype.is_float())
            }
            _ => false,
        };
        match fixed.filter(|name| can && crate::algorithms_of(kind).contains(name)) {
            Some(name) => name == NAME,
            None => can && self.pays(kind, fold.dtype, count),
        }
    }

    /// Whether it is faster for so many elements in all; asked once.
    fn pays(&mut self, kind: CollectiveKind, dtype: Dtype, count: usize) -> bool {
        let (node, places) = (&self.node, &self.places);
        *self.pays.entry((kind, dtype, count)).or_insert_with(|| {
            let on_devices = |of: &Collective, count| node.reckoned(of, dtype, count);
            pays(kind, (count, dtype.bytes()), (places, node.world()), on_devices)
        })
    }

    /// Device memory of at least so many bytes for what the host reduces for the rail.
    fn grow(&mut self, bytes: usize) -> Result<(), CudaError> {
        if bytes > self.scattered.as_ref().map_or(0, |owned| owned.memory().bytes()) {
            // Peers keep the old one open until they have heard that it goes.
            self.scattered = Some(Owned::zeroed(self.node.device(), rounded(bytes))?);
        }
        Ok(())
    }

    /// Pinned memory for two pieces, and where the second begins.
    fn room(&mut self, bytes: usize) -> Result<usize, CudaError> {
        if self.pinned.as_ref().is_none_or(|pinned| pinned.bytes() < 2 * bytes) {
            self.copies.synchronize()?;
            self.pinned = None;
            self.pinned = Some(Pinned::zeroed(self.copies.device(), 2 * bytes)?);
        }
        Ok(bytes)
    }
}

/// An all-reduce on its way.
struct Way<'a> {
    hierarchy: &'a mut Hierarchy,
    buffers: &'a RawDeviceBuffers,
    owners: &'a [&'a Owned],
    stream: &'a Stream,
    fold: Fold,
    /// Bytes of the pinned memory of a piece.
    room: usize,
    found: bool,
}

impl Way<'_> {
    /// Addresses and elements of a part of the output.
    const fn output(&self, range: &Range<usize>) -> (u64, usize) {
        let at = range.start * self.buffers.dtype.bytes();
        (self.buffers.output.0 + at as u64, range.end - range.start)
    }

    /// The devices of the host reduce a piece, and this one's block goes to the host.
    fn begin(&mut self, piece: &Piece) -> Result<(), Error> {
        let dtype = self.buffers.dtype;
        let how = match self.fold.factor {
            Some(factor) => Reduction::sum_scaled_by(factor),
            None => Reduction::new(self.fold.op),
        };
        let scatter = Collective::reduce_scatter(how).with_counts(&piece.counts);
        let from_start = (piece.range.start * dtype.bytes()) as u64;
        let input = self.buffers.input.map(|(at, _)| (at + from_start, piece.range.len()));
        let own = if input.is_some() { &piece.own } else { &piece.range };
        let buffers = RawDeviceBuffers { dtype, input, output: self.output(own) };
        self.hierarchy.node.call(&scatter, buffers, self.owners, self.stream)?;
        self.copy_down(piece).map_err(device_error)
    }

    fn copy_down(&self, piece: &Piece) -> Result<(), CudaError> {
        let Hierarchy { copies, pinned, moments, .. } = &*self.hierarchy;
        let Moments { scattered, down, .. } = &moments[piece.half];
        scattered.record(self.stream)?;
        copies.wait(scattered)?;
        if !piece.own.is_empty() {
            let to = self.block(pinned.as_ref().expect("there is room"), piece);
            let bytes = piece.own.len() * self.buffers.dtype.bytes();
            // SAFETY: the block is the caller's for as long as the stream works on it, and its
            // memory on the host is as long; what was there went back before, in this stream.
            unsafe { copies.copy_to_host(to.as_ptr(), self.output(&piece.own).0, bytes) }?;
        }
        down.record(copies)
    }

    /// Where a piece's block is on the host.
    const fn block(&self, pinned: &Pinned, piece: &Piece) -> std::ptr::NonNull<u8> {
        // SAFETY: the memory has two of them.
        unsafe { pinned.host().add(piece.half * self.room) }
    }

    /// The hosts reduce the block, and the devices of each tell each other theirs.
    fn end(&mut self, piece: &Piece) -> Result<(), Error> {
        let dtype = self.buffers.dtype;
        let Hierarchy { node, rail, pinned, moments, .. } = &*self.hierarchy;
        node.await_event(&moments[piece.half].down)?;
        if !piece.own.is_empty() {
            let mut how = Reduction::new(self.fold.op);
            if self.fold.watch {
                how = how.detect_nonfinite();
            }
            let block = self.block(pinned.as_ref().expect("there is room"), piece);
            // SAFETY: page-aligned memory with so many elements, which nobody else reads or writes
            // until they are copied back.
            let lent = unsafe { RawBuffers::in_place(dtype, block, piece.own.len()) };
            self.found |= rail.run_raw(&Collective::all_reduce(how), lent)?.nonfinite;
        }
        self.copy_up(piece).map_err(device_error)?;
        let gather = Collective::all_gather().with_counts(&piece.counts);
        let buffers = RawDeviceBuffers { dtype, input: None, output: self.output(&piece.range) };
        self.hierarchy.node.call(&gather, buffers, self.owners, self.stream)
    }

    fn copy_up(&self, piece: &Piece) -> Result<(), CudaError> {
        let Hierarchy { copies, pinned, moments, .. } = &*self.hierarchy;
        let up = &moments[piece.half].up;
        if !piece.own.is_empty() {
            let from = self.block(pinned.as_ref().expect("there is room"), piece);
            let bytes = piece.own.len() * self.buffers.dtype.bytes();
            // SAFETY: as in `copy_down`; the caller's stream waits for it just below.
            unsafe { copies.copy_to_device(self.output(&piece.own).0, from.as_ptr(), bytes) }?;
        }
        up.record(copies)?;
        self.stream.wait(up)
    }

    /// Whether a result was infinite or NaN in a block of any device of the host: the others have
    /// the same blocks.
    fn found(self) -> Result<bool, Error> {
        let mut found = [u8::from(self.found)];
        if self.fold.watch {
            let any = Collective::all_reduce(ReduceOp::Max);
            self.hierarchy.node.host().run(&any, Buffers::InPlace(&mut found))?;
        }
        Ok(found != [0])
    }
}

impl Calling<'_> {
    /// Whether the call, which all ranks make alike, takes the way over the devices of each host.
    pub(super) fn is_hierarchical(&mut self, fold: &Fold, blocks: &Blocks) -> bool {
        let kind = self.collective.kind();
        let world = self.collective.has_blocks().then_some(self.communicator.world());
        let (count, fixed) = (blocks.whole(world, false), self.state.programs.fixed());
        let hierarchy = self.state.hierarchy.as_mut();
        hierarchy.is_some_and(|it| it.takes(kind, fold, count, fixed))
    }

    /// Memory for what the way over the devices of each host needs beside the buffers.
    pub(super) fn reserve(&mut self, fold: &Fold, extents: &Extents) -> Result<(), Refusal> {
        let is_apart = self.buffers.input.is_some();
        if self.collective.kind() != CollectiveKind::ReduceScatter
            || !is_apart
            || !self.is_hierarchical(fold, &extents.blocks)
        {
            return Ok(());
        }
        let hierarchy = self.state.hierarchy.as_mut().expect("asked just above");
        let bytes = hierarchy.elements_of_rail(&extents.blocks) * self.buffers.dtype.bytes();
        hierarchy.grow(bytes).map_err(|error| {
            let text = format!("{bytes} bytes beside the buffers: {error}");
            Refusal::new(RefusalKind::Device, text)
        })
    }

    /// A collective over the devices of each host, and the hosts.
    pub(super) fn climb(
        &mut self,
        owners: &[&Owned],
        fold: &Fold,
        blocks: &Blocks,
    ) -> Result<(), Error> {
        self.follow().map_err(|error| self.communicator.fail(&error))?;
        let found = match self.collective.kind() {
            CollectiveKind::AllReduce => self.over_hosts(owners, fold),
            _ => self.over_rails(owners, fold, blocks),
        };
        // Some ranks may be further than others: there is no way back.
        let found = found.map_err(|error| self.communicator.give_up(error))?;
        self.state.found |= found;
        Ok(())
    }

    fn over_hosts(&mut self, owners: &[&Owned], fold: &Fold) -> Result<bool, Error> {
        let dtype = self.buffers.dtype;
        let hierarchy = self.state.hierarchy.as_mut().expect("asked before");
        let node = (hierarchy.node.rank(), hierarchy.node.world());
        let pieces = pieces(self.buffers.output.1, dtype.bytes(), node);
        let longest = pieces.iter().map(|it| it.own.len() * dtype.bytes()).max().unwrap_or(0);
        let room = hierarchy.room(longest.next_multiple_of(ALIGNMENT)).map_err(device_error)?;
        let (buffers, stream) = (&self.buffers, self.stream);
        let mut way = Way { hierarchy, buffers, owners, stream, fold: *fold, room, found: false };
        for (number, piece) in pieces.iter().enumerate() {
            way.begin(piece)?;
            if let Some(before) = number.checked_sub(1) {
                way.end(&pieces[before])?;
            }
        }
        if let Some(last) = pieces.last() {
            way.end(last)?;
        }
        way.found()
    }
}

#[cfg(test)]
mod tests {
    use unisum_algorithms::Topology;

    use super::super::program::{Form, Programs};
    use super::*;

    #[test]
    fn hosts_have_equally_many_devices_or_there_is_no_hierarchy() {
        assert_eq!(places(&["a", "b", "a", "b"]), Some(vec![(0, 0), (1, 0), (0, 1), (1, 1)]));
        for hosts in [&["a", "a"][..], &["a", "b"], &["a", "a", "b"], &["a"]] {
            assert_eq!(places(hosts), None, "{hosts:?}");
        }
    }

    /// From how many bytes of f32 on a collective goes this way, among powers of two.
    fn pays_from(kind: CollectiveKind, places: &[(usize, usize)], on_each: usize) -> usize {
        let topology = Topology::flat(on_each);
        let on_devices = |of: &Collective, count| {
            let form = Form::typical(of, Dtype::F32, count, (0, &topology));
            Programs::fastest_seconds(&form, 0)
        };
        let pays = |power: &u32| pays(kind, (1 << power >> 2, 4), (places, on_each), on_devices);
        let powers = 10..=30;
        assert!(pays(&30), "{kind} of 1 GiB");
        1 << powers.rev().take_while(pays).last().expect("the first one does")
    }

    /// docs/cuda.md has these rows, for ranks by host and in turns.
    #[test]
    fn the_documented_sizes_are_those_from_which_on_devices_pay() {
        use CollectiveKind::{AllGather, AllReduce, ReduceScatter};
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/cuda.md");
        let documented = std::fs::read_to_string(path).unwrap();
        let row = |(hosts, on_each): (usize, usize)| {
            let ranks = 0..hosts * on_each;
            let by_host: Vec<_> = ranks.clone().map(|it| (it / on_each, it % on_each)).collect();
            let in_turns: Vec<_> = ranks.map(|it| (it % hosts, it / hosts)).collect();
            let from = |kind, places: &[_]| match pays_from(kind, places, on_each) >> 10 {
                kib @ ..1024 => format!("{kib} KiB"),
                kib => format!("{} MiB", kib >> 10),
            };
            let both = |kind| format!("{}, {}", from(kind, &by_host), from(kind, &in_turns));
            let (reduces, gathers, scatters) =
                (from(AllReduce, &by_host), both(AllGather), both(ReduceScatter));
            format!("| {hosts} | {on_each} | {reduces} | {gathers} | {scatters} |")
        };
        let rows = [(2, 2), (2, 4), (2, 8), (8, 8)].map(row).join("\n");
        assert!(documented.contains(&rows), "docs/cuda.md does not have:\n{rows}");
    }

    #[test]
    fn pieces_have_each_element_once_and_blocks_are_aligned() {
        for (bytes, local) in [(1, 2), (2, 3), (4, 8), (8, 2)] {
            for count in [0, 1, 7, 64, 1000, 3 * local * BLOCK_BYTES / bytes + 5] {
                let of = |place| pieces(count, bytes, (place, local));
                let mut end = 0;
                for (number, piece) in of(0).iter().enumerate() {
                    for place in 0..local {
                        let own = of(place)[number].own.clone();
                        assert_eq!((own.start, own.len()), (end, piece.counts[place]));
                        assert!(own.len() * bytes <= BLOCK_BYTES);
                        assert!(own.is_empty() || own.start * bytes % ALIGNMENT == 0);
                        end = own.end;
                    }
                    assert_eq!((piece.range.end, piece.half), (end, number % 2));
                }
                assert_eq!(end, count);
            }
        }
    }
}
