//! A node's part of an all-reduce, fused into its transfers to other nodes.
//!
//! If all members' regions are registered, a rank folds its slice of all of them, and stores the
//! result at all of them, without waiting for anybody in between. It need not do either at once:
//! each piece is folded just before it is first sent or reduced across the nodes, and stored as
//! soon as the last transfer across has brought it, while other pieces are on their way.

use std::collections::BTreeSet;
use std::ops::Range;

use super::placement::{Memory, Overlay, Place};
use super::program::{Action, Exchange};
use super::segment::{Segment, Transfer, Work};

/// The end of a program that folds the members' slices, moves them across the nodes, and
/// distributes them to the members.
pub(super) struct FusedHierarchical<'a> {
    scatter: &'a Exchange,
    across: Option<&'a Segment>,
    /// This rank's slice, in bytes.
    own: Range<usize>,
}

impl<'a> FusedHierarchical<'a> {
    /// The fusion of these last actions of a program, if they can be fused. `place` is this rank's
    /// place among the members.
    pub(super) fn of(actions: &'a [Action], place: usize) -> Option<Self> {
        let (scatter, across, gather) = match actions {
            [Action::Exchange(scatter), Action::Transfers(across), Action::Exchange(gather)] => {
                (scatter, Some(across), gather)
            }
            [Action::Exchange(scatter), Action::Exchange(gather)] => (scatter, None, gather),
            _ => return None,
        };
        let own = scatter.slices.get(place)?.clone();
        let is_whole = scatter.enters && scatter.folds && !scatter.gathers && gather.gathers;
        let inside = |transfer: &Transfer| {
            touched(transfer).is_some_and(|it| own.start <= it.start && it.end <= own.end)
        };
        let fits = across.is_none_or(|across| across.transfers.iter().all(inside));
        (is_whole && fits && scatter.slices == gather.slices).then_some(Self {
            scatter,
            across,
            own,
        })
    }

    /// The fused actions, from after the enter to the last arrival. With `divides`, results are
    /// divided by the number of ranks before they are stored.
    pub(super) fn actions(&self, divides: bool, overlay: Overlay) -> Vec<Action> {
        let nothing = Segment { step_starts: vec![0, 0], ..Segment::new(1) };
        let across = self.across.unwrap_or(&nothing);
        let cuts = self.cuts(across);
        let (first, last) = uses(across, &cuts);
        let scales = self.scatter.scales;
        let mut fused = Segment::new(across.window);
        for step in 0..across.steps() {
            let pieces = |uses: &[usize]| -> Vec<Range<usize>> {
                let here = (0..uses.len()).filter(|&piece| uses[piece] == step);
                here.map(|piece| cuts[piece]..cuts[piece + 1]).collect()
            };
            for piece in pieces(&first) {
                fused.add(local(Work::Fold { scales }, &piece, step), overlay);
            }
            for transfer in
                &across.transfers[across.step_starts[step]..across.step_starts[step + 1]]
            {
                let free = Transfer { waits_for: 0, followers: vec![], ..transfer.clone() };
                fused.add(free, overlay);
            }
            for piece in pieces(&last) {
                fused.add(local(Work::Push { divides }, &piece, step), overlay);
            }
            fused.step_starts.push(fused.transfers.len());
        }
        // A rank without a slice has nothing to do before the others are done.
        let is_empty = fused.transfers.is_empty();
        let transfers = (!is_empty).then_some(Action::Transfers(fused));
        transfers.into_iter().chain([Action::Arrive]).collect()
    }

    /// Where pieces begin that every transfer touches completely or not at all, and where the last
    /// one ends.
    fn cuts(&self, across: &Segment) -> Vec<usize> {
        let touched = across.transfers.iter().filter_map(touched);
        let bounds = touched.chain([self.own.clone()]).flat_map(|range| [range.start, range.end]);
        bounds.collect::<BTreeSet<_>>().into_iter().collect()
    }
}

/// The bytes of the output that a transfer reads or writes; `None` if it is elsewhere.
fn touched(transfer: &Transfer) -> Option<Range<usize>> {
    let Place { memory, start } = transfer.writes.or(transfer.reads)?;
    (memory == Memory::Output).then(|| start..start + transfer.bytes)
}

/// The first and the last step that touches each piece between two cuts; the first step for pieces
/// that none touches.
fn uses(across: &Segment, cuts: &[usize]) -> (Vec<usize>, Vec<usize>) {
    let pieces = cuts.len().saturating_sub(1);
    let (mut first, mut last) = (vec![usize::MAX; pieces], vec![0; pieces]);
    for transfer in &across.transfers {
        let Some(range) = touched(transfer) else { continue };
        let at = |byte: usize| cuts.partition_point(|&cut| cut < byte);
        for piece in at(range.start)..at(range.end) {
            first[piece] = first[piece].min(transfer.step);
            last[piece] = last[piece].max(transfer.step);
        }
    }
    first.iter_mut().filter(|step| **step == usize::MAX).for_each(|step| *step = 0);
    (first, last)
}

/// Work on a piece of this rank's slice that needs no message.
fn local(work: Work, piece: &Range<usize>, step: usize) -> Transfer {
    let at = |memory| Some(Place::new(memory, piece.start));
    let (reads, writes) = match work {
        Work::Fold { .. } => (at(Memory::Input), at(Memory::Output)),
        // If it divides, it writes as well.
        _ => (at(Memory::Output), at(Memory::Output)),
    };
    Transfer { work, bytes: piece.len(), reads, writes, step, waits_for: 0, followers: vec![] }
}

#[cfg(test)]
mod tests {
    use unisum_algorithms::{HIERARCHICAL, HIERARCHICAL_TREE, Shape, Topology};

    use super::super::program::{GroupShape, Program, Source, Tuning};
    use super::*;

    fn program(algorithm: &dyn unisum_algorithms::Algorithm, rank: usize, count: usize) -> Program {
        let topology = Topology::nodes(&[3, 3, 2]);
        let members = topology.members(topology.node_of(rank));
        Program::build(&Source {
            algorithm,
            shape: &Shape::all_reduce(topology, count),
            rank,
            element_bytes: 4,
            average: true,
            scales: false,
            in_place: true,
            tuning: Tuning { slice_bytes: 64, window: 4 },
            group: Some(GroupShape { members: &members, slot_bytes: 0 }),
        })
    }

    fn segment(actions: &[Action]) -> Segment {
        let is_segment = |action: &Action| match action {
            Action::Transfers(segment) => Some(segment.clone()),
            _ => None,
        };
        actions.iter().find_map(is_segment).unwrap_or_default()
    }

    /// Ranks of other nodes may run the plain program, so the transfers must be the same.
    #[test]
    fn transfers_across_stay_as_they_were_in_the_same_order() {
        for algorithm in [&HIERARCHICAL, &HIERARCHICAL_TREE] {
            for (rank, count) in (0..8).flat_map(|rank| [1, 2, 7, 1000].map(|it| (rank, it))) {
                let program = program(algorithm, rank, count);
                let mapped = program.mapped.expect("it can be fused");
                let across = |segment: &Segment| -> Vec<(Work, usize, usize)> {
                    let pairs = segment.transfers.iter().filter(|it| !it.is_local());
                    pairs.map(|it| (it.work.clone(), it.step, it.bytes)).collect()
                };
                assert_eq!(across(&segment(&mapped)), across(&segment(&program.actions)));
            }
        }
    }

    #[test]
    fn each_byte_of_the_slice_is_folded_first_and_stored_last() {
        for (rank, count) in (0..8).flat_map(|rank| [1, 2, 7, 1000].map(|it| (rank, it))) {
            let program = program(&HIERARCHICAL, rank, count);
            let fused = segment(program.mapped.as_deref().expect("it can be fused"));
            let Some(Action::Exchange(scatter)) = program.actions.first() else { panic!("none") };
            let own = scatter.slices[rank % 3].clone();
            for byte in own.step_by(4) {
                let touches: Vec<&Transfer> = fused
                    .transfers
                    .iter()
                    .filter(|it| touched(it).is_some_and(|range| range.contains(&byte)))
                    .collect();
                let [first, between @ .., last] = &touches[..] else { panic!("twice at least") };
                assert!(matches!(first.work, Work::Fold { scales: false }));
                assert!(matches!(last.work, Work::Push { divides: true }));
                assert!(between.iter().all(|it| !it.is_local()), "{between:?}");
            }
        }
    }

    #[test]
    fn the_first_pieces_travel_before_the_last_are_folded_and_are_stored_before_the_last_come() {
        let fused = segment(program(&HIERARCHICAL, 0, 1000).mapped.as_deref().unwrap_or_default());
        let first =
            |is_it: fn(&Work) -> bool| fused.transfers.iter().position(|it| is_it(&it.work));
        let last =
            |is_it: fn(&Work) -> bool| fused.transfers.iter().rposition(|it| is_it(&it.work));
        assert!(
            first(|it| matches!(it, Work::Send { .. }))
                < last(|it| matches!(it, Work::Fold { .. }))
        );
        assert!(
            first(|it| matches!(it, Work::Push { .. }))
                < last(|it| matches!(it, Work::Store { .. }))
        );
    }
}
