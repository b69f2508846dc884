//! A rank's membership in a world of two or more: what runs its collectives.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use unisum_link::{Collective as Kind, Element, Rank, ReduceOp, Regions};

use crate::Error;
use crate::background::Background;
use crate::collective::{Blocks, Buffers, Collective, Extents, Lengths};
use crate::programs::Key;
use crate::reduction::Outcome;
use crate::runner::{Request, Runner};
use crate::turns::Number;
use crate::wiring::Job;

/// What a rank of a larger world has.
pub(crate) struct Member {
    pub(crate) core: Arc<Core>,
    pub(crate) background: Background,
}

/// What a collective needs, on whichever thread it runs.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) runner: Runner,
    pub(crate) job: Arc<Job>,
    pub(crate) rank: Rank,
    pub(crate) world: usize,
}

/// Memory for calls without elements, whose message carries one element that nobody reads.
#[derive(Debug, Default)]
#[repr(align(16))]
struct Spare([u8; 16]);

impl Core {
    /// Runs a checked collective when its turn comes.
    ///
    /// # Safety
    /// The buffers stay where they are, and nobody else touches them, until this returns.
    pub(crate) unsafe fn execute<T: Element>(
        &self,
        turn: Number,
        collective: &Collective,
        buffers: Buffers<'_, T>,
    ) -> Result<Outcome, Error> {
        match buffers {
            // What goes out may not be overwritten by what comes in.
            Buffers::InPlace(data) if collective.kind() == Kind::AllToAll => {
                let input = data.to_vec();
                // SAFETY: the caller promised it of the data, and the copy is owned.
                unsafe {
                    self.execute_apart_or_in_place(turn, collective, Buffers::Apart(&input, data))
                }
            }
            // SAFETY: the caller promised it.
            buffers => unsafe { self.execute_apart_or_in_place(turn, collective, buffers) },
        }
    }

    /// # Safety
    /// As [`Core::execute`].
    unsafe fn execute_apart_or_in_place<T: Element>(
        &self,
        turn: Number,
        collective: &Collective,
        buffers: Buffers<'_, T>,
    ) -> Result<Outcome, Error> {
        let lengths = buffers.lengths();
        let extents = match collective.size(T::DTYPE, (self.rank, self.world), lengths) {
            Ok(extents) => extents,
            Err(text) => return Err(self.runner.refuse(turn, &text)),
        };
        let mut fold = collective.fold(T::DTYPE);
        let is_empty = extents.blocks == Blocks::Even(0);
        let mut spare = Spare::default();
        let regions = if is_empty {
            fold.custom = None;
            // SAFETY: this function owns it.
            Regions::in_place(unsafe { self.job.arena.region(&mut spare.0) })
        } else {
            // SAFETY: the caller promised it.
            unsafe { self.regions(buffers, &extents) }
        };
        let key = Key {
            kind: collective.kind(),
            root: collective.root(),
            blocks: extents.blocks,
            element_bytes: T::DTYPE.bytes(),
            average: fold.op == ReduceOp::Average && collective.kind().reduces(),
            scales: fold.factor.is_some(),
            ordered: fold.custom.is_some() && collective.reduction().is_ordered(),
            in_place: is_empty || matches!(lengths, Lengths::InPlace(_)),
        };
        self.runner.run(turn, &Request { key, fold, regions })
    }

    /// # Safety
    /// As [`Core::execute`].
    unsafe fn regions<T: Element>(&self, buffers: Buffers<'_, T>, extents: &Extents) -> Regions {
        let bytes = |range: &Range<usize>| range.start * size_of::<T>()..range.end * size_of::<T>();
        let (puts, gets) = (bytes(&extents.input), bytes(&extents.output));
        let (input, output) = match buffers {
            Buffers::InPlace(data) => {
                // SAFETY: the caller promised it.
                let both = unsafe { self.job.arena.region(data) };
                (both, both)
            }
            Buffers::Apart(from, to) => {
                // SAFETY: the caller promised it; an input that lies apart is only read.
                let input = unsafe { self.job.arena.region_to_read(from) };
                // SAFETY: the caller promised it.
                (input, unsafe { self.job.arena.region(to) })
            }
        };
        Regions { input: input.part(&puts), output: output.part(&gets) }
    }
}

impl fmt::Debug for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Member").field("core", &self.core).finish_non_exhaustive()
    }
}
