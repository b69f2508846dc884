//! Batches: one collective on many tensors, in few launches.
//!
//! A launch costs a latency, a copy costs a pass over the cache. So small tensors are copied into
//! *packs*, on which the collective runs once, and back; large ones are launched by themselves,
//! where they lie. What is packed with what follows from the lengths that all ranks agree on.

use std::ops::Range;

use unisum_kernels::Dtype;
use unisum_link::{CollectiveKind as Kind, Rank, Region, Regions};

use crate::collective::raw::RawBuffers;
use crate::collective::{Blocks, Collective, Extent, Extents};
use crate::memory::{Arena, Memory};

/// The largest tensor that is packed: all its blocks, in bytes.
const TENSOR_BYTES_MAX: usize = 64 << 10;
/// A pack stays in the second cache.
const PACK_BYTES_MAX: usize = 512 << 10;

/// Memory that packs are made in, kept from batch to batch.
#[derive(Debug, Default)]
pub(crate) struct Scratch(Option<(Memory, usize)>);

impl Scratch {
    /// A region of `bytes` bytes.
    ///
    /// # Errors
    /// If there is no memory.
    fn region(&mut self, arena: &Arena, bytes: usize) -> Result<Region, String> {
        if self.0.as_ref().is_none_or(|(_, size)| *size < bytes) {
            let size = bytes.max(2 * PACK_BYTES_MAX);
            self.0 = Some((arena.allocate_anywhere(size)?, size));
        }
        let Some((memory, _)) = &self.0 else { unreachable!("it was just put there") };
        // SAFETY: the memory is at least so large, and only the batch whose turn it is uses it.
        Ok(unsafe { arena.region_at(memory.start(), bytes) })
    }
}

/// Which tensors, by their indices, are launched together: every index once, the large ones alone.
/// A tensor has `blocks` blocks.
pub(crate) fn launches(tensors: &[Extents], blocks: usize, dtype: Dtype) -> Vec<Vec<usize>> {
    let mut launches = Vec::new();
    let (mut pack, mut packed) = (Vec::new(), 0);
    for (index, tensor) in tensors.iter().enumerate() {
        let bytes = match &tensor.blocks {
            Blocks::Even(each) => each * blocks * dtype.bytes(),
            Blocks::Given(counts) => counts.iter().sum::<usize>() * dtype.bytes(),
            // No rank knows what the others have.
            Blocks::Pairs(..) => usize::MAX,
        };
        if bytes > TENSOR_BYTES_MAX {
            launches.push(vec![index]);
            continue;
        }
        if packed + bytes > PACK_BYTES_MAX {
            launches.push(std::mem::take(&mut pack));
            packed = 0;
        }
        packed += bytes;
        pack.push(index);
    }
    launches.push(pack);
    launches.retain(|launch| !launch.is_empty());
    launches
}

/// Several tensors as one: block by block, in each block tensor by tensor.
pub(crate) struct Pack<'a> {
    tensors: Vec<&'a Extents>,
    dtype: Dtype,
    kind: Kind,
    /// How much of the pack this rank puts in, and gets.
    extents: (Extent, Extent),
    /// How many blocks there are, and which is this rank's.
    blocks: usize,
    own: usize,
}

impl<'a> Pack<'a> {
    pub(crate) fn new(
        tensors: Vec<&'a Extents>,
        collective: &Collective,
        (rank, world): (Rank, usize),
        dtype: Dtype,
    ) -> Self {
        let (blocks, own) = if collective.has_blocks() { (world, rank) } else { (1, 0) };
        let (kind, extents) = (collective.kind(), collective.extents(rank));
        Self { tensors, dtype, kind, extents, blocks, own }
    }

    pub(crate) const fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The blocks of all tensors together.
    pub(crate) fn blocks(&self) -> Blocks {
        match &self.tensors[0].blocks {
            Blocks::Even(_) => Blocks::Even(self.block_len(0)),
            _ => Blocks::Given((0..self.blocks).map(|block| self.block_len(block)).collect()),
        }
    }

    fn block_len(&self, block: usize) -> usize {
        self.tensors.iter().map(|tensor| tensor.blocks.range(block).len()).sum()
    }

    /// The blocks that have their place in the pack: all, or only this rank's.
    fn placed(&self) -> Range<usize> {
        match self.extents {
            (Extent::Whole, _) | (_, Extent::Whole) => 0..self.blocks,
            _ => self.own..self.own + 1,
        }
    }

    /// Memory for what is put in and what is got, apart only where they can't be one.
    ///
    /// # Errors
    /// If there is none.
    pub(crate) fn regions(&self, scratch: &mut Scratch, arena: &Arena) -> Result<Regions, String> {
        let len: usize = self.placed().map(|block| self.block_len(block)).sum();
        let bytes = len * self.dtype.bytes();
        if self.kind == Kind::AllToAll {
            let both = scratch.region(arena, 2 * bytes)?;
            let (input, output) = (both.part(&(0..bytes)), both.part(&(bytes..2 * bytes)));
            return Ok(Regions { input, output });
        }
        Ok(Regions::in_place(scratch.region(arena, bytes)?))
    }

    /// The parts of the regions that the collective puts in and gets.
    pub(crate) fn used(&self, regions: Regions) -> Regions {
        let elements = |extent| match extent {
            Extent::Nothing => 0..0,
            Extent::Whole => 0..(0..self.blocks).map(|block| self.block_len(block)).sum(),
            Extent::Block => {
                let before = self.placed().take_while(|&block| block != self.own);
                let start: usize = before.map(|block| self.block_len(block)).sum();
                start..start + self.block_len(self.own)
            }
        };
        let (puts, gets) = (elements(self.extents.0), elements(self.extents.1));
        let (input, output) = (self.bytes(&puts), self.bytes(&gets));
        Regions { input: regions.input.part(&input), output: regions.output.part(&output) }
    }

    /// Elements of the pack, in bytes.
    const fn bytes(&self, range: &Range<usize>) -> Range<usize> {
        range.start * self.dtype.bytes()..range.end * self.dtype.bytes()
    }

    /// Copies what the tensors put in, from the buffers `which` of a batch.
    pub(crate) fn fill(&self, batch: &[RawBuffers<'_>], which: &[usize], to: Region) {
        self.for_each_run(self.extents.0, |tensor, run, at| {
            let start = self.tensors[tensor].input.start;
            let from = batch[which[tensor]].input_at(&(start + run.start..start + run.end));
            let placed = self.bytes(&(at..at + run.len()));
            let to = to.pointer(&placed);
            // SAFETY: the region holds the range, is aligned to pages, and is this batch's alone;
            // the buffers lie elsewhere.
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, placed.len()) };
        });
    }

    /// Copies what the tensors get, to the buffers `which` of a batch.
    pub(crate) fn empty(&self, from: Region, batch: &mut [RawBuffers<'_>], which: &[usize]) {
        self.for_each_run(self.extents.1, |tensor, run, at| {
            let start = self.tensors[tensor].output.start;
            let to = batch[which[tensor]].output_at(&(start + run.start..start + run.end));
            let placed = self.bytes(&(at..at + run.len()));
            let from = from.pointer(&placed);
            // SAFETY: as in `fill`; the collective has written elements of this type there.
            unsafe { std::ptr::copy_nonoverlapping(from, to.as_ptr(), placed.len()) };
        });
    }

    /// Calls `copy` with each tensor's runs of elements, counted in what is put in or got of it,
    /// and with the place in the pack where they lie.
    fn for_each_run(&self, extent: Extent, mut copy: impl FnMut(usize, Range<usize>, usize)) {
        let mut at = 0;
        for block in self.placed() {
            for (index, tensor) in self.tensors.iter().enumerate() {
                let range = tensor.blocks.range(block);
                let len = range.len();
                match extent {
                    Extent::Whole => copy(index, range, at),
                    Extent::Block if block == self.own => copy(index, 0..len, at),
                    Extent::Block | Extent::Nothing => {}
                }
                at += len;
            }
        }
    }
}
