//! Cutting a plan's transfers into pipeline slices.

use std::ops::Range;

use crate::chunk::{nth_slice, slice_count};
use crate::{Incoming, Outgoing, Pattern, Step};

/// Cuts the transfers of one rank's `steps` into nearly equal slices of at most `max_elements`, in
/// wavefront order.
///
/// Slice k of round r becomes part of sub-step (r, k), which holds slice k of each of the round's
/// transfers that has one. The sub-steps are ordered by (r + k, r), so that slice k goes on its way
/// while slice k+1 arrives. Empty transfers and empty steps are dropped.
///
/// A step with a mark is a wall, and so is one of [`Pattern::Wall`]: no sub-step of an earlier
/// round comes after it and none of a later round before it, because it splits or merges ranges,
/// and slice numbers lose their meaning. Its own sub-steps are [`Pattern::Pairs`]. To run a marked
/// step as a group step, leave it whole, and slice only the runs of steps between such steps.
///
/// Every rank orders by the same key and cuts the same ranges in the same way. Transfers between
/// two ranks therefore come in the same order on both ends, and an executor with a window of one
/// open sub-step and rendezvous sends does not deadlock: the unfinished sub-step with the least key
/// finds its partners at that same key. Within a run of `Pairs` steps, a range must be sent on as
/// it came, or untouched by earlier rounds; otherwise a slice could overtake the slice it depends
/// on. [`prove`](crate::prove) checks this for every algorithm.
pub fn slice(steps: impl Iterator<Item = Step>, max_elements: usize) -> Vec<Step> {
    let mut keyed = Vec::new();
    let mut segment = 0;
    for (round, step) in steps.enumerate() {
        let wall = step.pattern != Pattern::Pairs;
        segment += usize::from(wall);
        for k in 0..slices_of(&step, max_elements) {
            keyed.push(((segment, round + k, round), sub_step(&step, max_elements, k)));
        }
        segment += usize::from(wall);
    }
    keyed.sort_by_key(|(key, _)| *key);
    keyed.into_iter().map(|(_, step)| step).collect()
}

/// How many sub-steps `step` is cut into.
pub(crate) fn slices_of(step: &Step, max_elements: usize) -> usize {
    let sent = step.outgoing.iter().map(|o| o.elements.len());
    let lengths = sent.chain(step.incoming.iter().map(|i| i.elements.len()));
    lengths.map(|len| slice_count(len, max_elements)).max().unwrap_or(0)
}

fn sub_step(step: &Step, max_elements: usize, k: usize) -> Step {
    let cut = |elements: &Range<usize>| {
        Some(nth_slice(elements, max_elements, k)).filter(|part| !part.is_empty())
    };
    let send = |o: &Outgoing| cut(&o.elements).map(|elements| Outgoing { to: o.to, elements });
    let receive = |i: &Incoming| {
        cut(&i.elements).map(|elements| Incoming { from: i.from.clone(), elements, ..*i })
    };
    Step {
        pattern: Pattern::Pairs,
        outgoing: step.outgoing.iter().filter_map(send).collect(),
        incoming: step.incoming.iter().filter_map(receive).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Algorithm, Shape, TREE, TWO_SHOT};

    #[test]
    fn slices_follow_each_other_up_the_tree() {
        let shape = Shape::flat(5, 30); // 0 is the parent of 1 and 3, 1 of 2, 3 of 4
        let plan = slice(TREE.steps(&shape, 1), 10);
        let moves: Vec<_> = plan
            .iter()
            .map(|step| match (&step.outgoing[..], &step.incoming[..]) {
                ([out], []) => (out.to, out.elements.start),
                ([], [arrival]) => (arrival.from[0], arrival.elements.start),
                _ => panic!("a tree rank does one thing per sub-step: {step:?}"),
            })
            .collect();
        let up = [(2, 0), (2, 10), (0, 0), (2, 20), (0, 10)];
        assert_eq!(moves[..5], up);
    }

    #[test]
    fn a_marked_step_is_a_wall() {
        let shape = Shape::flat(2, 100);
        let plan = slice(TWO_SHOT.steps(&shape, 0), 20);
        assert_eq!(plan.len(), 6);
        assert!(plan.iter().all(|step| step.pattern == Pattern::Pairs));
    }

    #[test]
    fn empty_transfers_and_steps_are_dropped() {
        let shape = Shape::flat(4, 1);
        let plan = slice(TWO_SHOT.steps(&shape, 3), 8);
        assert!(plan.iter().all(|step| !step.is_empty()));
        assert!(slice(TWO_SHOT.steps(&Shape::flat(4, 0), 3), 8).is_empty());
    }
}
