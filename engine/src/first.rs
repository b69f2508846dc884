//! What the first step of a plan does with the inputs: whether it can also apply a factor, or the
//! division of an average.

use std::ops::Range;

use unisum_algorithms::{OnArrival, Rank, Step};

use super::program::Source;
use super::pull::is_possible;

/// The first step, if the group executes it together; the same on all its members.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct FirstFold {
    /// It folds everything the members contribute and stores none of it elsewhere, so its operands
    /// can be multiplied as they are read.
    pub(super) takes_all: bool,
    /// It folds everything, and nothing is folded later, so its results can be divided.
    pub(super) is_only: bool,
}

impl FirstFold {
    pub(super) fn of(source: &Source<'_>) -> Self {
        let Some(group) = source.group else { return Self::default() };
        // Only these need it, and it requires the plans of all members.
        if !source.scales && !source.average {
            return Self::default();
        }
        let takes_all = group.members.iter().all(|&member| takes_all_of(source, member));
        let folds = |step: &Step| step.incoming.iter().any(|it| it.on_arrival == OnArrival::Reduce);
        let folds_later = |&member: &Rank| {
            source.algorithm.steps(source.shape, member).skip(1).any(|it| folds(&it))
        };
        let is_only =
            takes_all && source.group_is_world() && !group.members.iter().any(folds_later);
        Self { takes_all, is_only }
    }
}

/// Whether each element that `member` contributes is an operand of a fold in the first step.
fn takes_all_of(source: &Source<'_>, member: Rank) -> bool {
    let Some(first) = source.algorithm.steps(source.shape, member).next() else { return false };
    let folds = first.incoming.iter().all(|it| it.on_arrival == OnArrival::Reduce);
    let sent = first.outgoing.iter().map(|it| &it.elements);
    let mut folded: Vec<&Range<usize>> =
        sent.chain(first.incoming.iter().map(|it| &it.elements)).collect();
    folded.sort_unstable_by_key(|range| range.start);
    folds
        && source.is_group_step(&first, member)
        && is_possible(source, &first, 0)
        && source.shape.contributes(member).iter().all(|input| covers(&folded, input))
}

/// Whether ranges, ordered by their start, cover another one completely.
fn covers(ranges: &[&Range<usize>], all: &Range<usize>) -> bool {
    let reached = ranges.iter().fold(all.start, |reached, range| match range.start <= reached {
        true => reached.max(range.end),
        false => reached,
    });
    reached >= all.end
}
