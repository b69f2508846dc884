//! Memory that a member takes back after it was read: nothing that was read of it counts.
//!
//! The [`Group`] here is a double of one in shared memory whose other member aborts at the worst
//! moment: after this rank has read its registered region, and before [`Group::confirm`]. In the
//! transport the moment can't be met on purpose; that `confirm` itself sees an abort is for
//! `unisum_link::conformance::taken_back` to show.

use std::cell::Cell;
use std::ops::Range;
use std::ptr::NonNull;
use std::time::Instant;

use unisum_kernels::{Dtype, Fold, ReduceOp};
use unisum_link::{Arrival, Group, LinkError, Part, Rank, Region, Regions};

use super::folding::{Extras, Folding};
use super::group_exchange::{GroupContext, Next, Sources};
use super::memories::Memories;
use super::placement::{Memory, Place};
use super::program::Exchange;
use super::pull::{Origin, Pull, Take};

/// Of each region: two blocks of mapped memory and a piece.
const BYTES: usize = 40 << 10;
const PART: usize = 16 << 10;

/// Rank 1, which is also the memory of the group.
struct Leaver {
    regions: [Vec<Cell<u8>>; 2],
    staging: [Vec<Cell<u8>>; 2],
    /// Which of the members' regions are registered, as the group says it.
    registered: bool,
    /// Whether it takes its memory back once it was read.
    leaves: bool,
    is_read: Cell<bool>,
    arrivals: u64,
}

impl Group for Leaver {
    fn members(&self) -> &[Rank] {
        &[0, 1]
    }

    fn slot_bytes(&self) -> usize {
        0
    }

    fn enter(&mut self, _: bool) -> Arrival {
        self.arrive()
    }

    fn arrive(&mut self) -> Arrival {
        assert!(!self.is_read.get(), "an arrival says that what was read counts");
        self.arrivals += 1;
        Arrival(self.arrivals)
    }

    fn mark(&mut self) {}

    fn complete(&mut self, _: Arrival) -> Result<bool, LinkError> {
        Ok(true)
    }

    fn awaits_own_core(&mut self, _: Arrival) -> bool {
        false
    }

    fn yielded(&mut self) {}

    fn missing(&self, _: Arrival) -> Vec<Rank> {
        Vec::new()
    }

    fn park(&mut self, _: Arrival, _: Instant) -> Result<(), LinkError> {
        Ok(())
    }

    fn registered(&self, _: Part) -> bool {
        self.registered
    }

    fn deposits(&self, _: &Range<usize>, _: &mut Vec<*const u8>) {
        unreachable!("nothing is deposited")
    }

    fn source(
        &self,
        member: Rank,
        part: Part,
        bytes: Range<usize>,
    ) -> Result<Option<*const u8>, LinkError> {
        self.is_read.set(self.is_read.get() || member == 1);
        Ok(Some(self.regions[usize::from(part == Part::Output)][bytes].as_ptr().cast()))
    }

    fn confirm(&self) -> Result<(), LinkError> {
        match self.is_read.replace(false) && self.leaves {
            true => Err(LinkError::closed(1)),
            false => Ok(()),
        }
    }

    fn target(&self, _: Rank, bytes: Range<usize>) -> Result<*mut u8, LinkError> {
        Ok(self.regions[1][bytes].as_ptr().cast_mut().cast())
    }

    fn staging_bytes(&self) -> usize {
        self.staging[0].len()
    }

    fn staging(&self, member: Rank, bytes: Range<usize>) -> *mut u8 {
        self.staging[member][bytes].as_ptr().cast_mut().cast()
    }
}

/// Does `work` as rank 0, beside a member that takes its memory back and beside one that does not.
#[track_caller]
fn check(
    (own_is_registered, registered): (bool, bool),
    work: impl Fn(&mut GroupContext<'_>) -> Result<(), LinkError>,
) {
    for leaves in [false, true] {
        let mut group = Leaver {
            regions: [vec![Cell::new(1); BYTES], vec![Cell::new(0); BYTES]],
            staging: [vec![Cell::new(0); 1 << 20], vec![Cell::new(1); 1 << 20]],
            registered,
            leaves,
            is_read: Cell::new(false),
            arrivals: 0,
        };
        let mut memory = [vec![1_u8; BYTES], vec![0; BYTES], vec![0; 1]];
        let heap_offset = own_is_registered.then_some(0);
        let [input, output, scratch] = memory.each_mut().map(|memory| {
            // SAFETY: the memory outlives the regions, and is not looked at before that.
            unsafe { Region::new(NonNull::from(&mut memory[..]).cast(), memory.len(), heap_offset) }
        });
        let fold = Fold {
            dtype: Dtype::U8,
            op: ReduceOp::Sum,
            divide_by: None,
            factor: None,
            watch: false,
            custom: None,
        };
        let mut context = GroupContext {
            rank: 0,
            group: &mut group,
            memories: Memories { regions: Regions { input, output }, scratch },
            folding: &mut Folding::new(fold),
            extras: Extras::default(),
            spreads_marks: false,
            sources: &mut Sources::default(),
            part_bytes: PART,
        };
        let outcome = work(&mut context);
        let expected = if leaves { Err(LinkError::closed(1)) } else { Ok(()) };
        assert_eq!(outcome, expected, "it leaves: {leaves}");
        assert!(!group.is_read.get(), "what was read is not confirmed");
    }
}

/// What both members do with the whole of their regions, half each.
fn exchange(folds: bool, gathers: bool) -> Exchange {
    let slices = vec![0..BYTES / 2, BYTES / 2..BYTES];
    Exchange { slices, enters: true, folds, gathers, divides: false, scales: false }
}

#[test]
fn an_exchange_of_registered_memory() {
    for gathers in [false, true] {
        check((true, true), |context| context.exchange(&exchange(true, gathers)).map(drop));
    }
}

#[test]
fn a_piece_of_an_exchange_of_registered_memory() {
    check((true, true), |context| context.fold_piece(&(0..BYTES / 2)));
}

/// Rank 0's memory is private, rank 1's is not.
#[test]
fn an_exchange_with_private_memory() {
    for gathers in [false, true] {
        check((false, false), |context| {
            let exchange = exchange(true, gathers);
            let mut piece = 0;
            let mut next = context.piece(&exchange, piece)?;
            while let Next::Piece(_) = next {
                piece += 1;
                next = context.piece(&exchange, piece)?;
            }
            Ok(())
        });
    }
}

/// Takes all that rank 1 has; as a copy, or folded with the own.
fn pull(folds: bool) -> Pull {
    let input = Place { memory: Memory::Input, start: 0 };
    let members = if folds { &[0, 1][..] } else { &[1] };
    let sources = members.iter().map(|&member| Origin { member, place: input, lane: 0 });
    let take = Take {
        sources: sources.collect(),
        writes: Place { memory: Memory::Output, start: 0 },
        bytes: BYTES,
        folds,
        everything: false,
    };
    Pull {
        deposits: false,
        enters: true,
        from_inputs: true,
        takes: vec![take],
        lanes: vec![(input, BYTES)],
        lanes_max: 1,
        longest: BYTES,
        divides: false,
        scales: false,
    }
}

#[test]
fn a_pull_from_registered_memory() {
    for folds in [false, true] {
        check((true, true), |context| context.pull(&pull(folds)).map(drop));
    }
}

#[test]
fn a_pull_with_private_memory() {
    for folds in [false, true] {
        check((false, false), |context| {
            let pull = pull(folds);
            let mut piece = 0;
            let mut next = context.pull(&pull)?;
            while let Next::Piece(_) = next {
                piece += 1;
                next = context.pull_piece(&pull, piece)?;
            }
            Ok(())
        });
    }
}
