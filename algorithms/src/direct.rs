//! Direct exchanges: everybody with everybody, in one step.

use std::ops::Range;

use crate::algorithm::{Group, Steps};
use crate::{Flat, Incoming, OnArrival, Outgoing, Pattern, Rank, Scope, Shape, Step, chunk};

/// One-shot: everybody sends everything to everybody and reduces it all in one pass.
///
/// The choice for tiny messages in shared memory.
/// Cost: α + (n−1)·S·β + (n−1)·S·γ.
///
/// Source: the all-pairs all-reduce of MSCCL++, Shah et al., "MSCCL++: Rethinking GPU communication
/// abstractions for AI inference", 2025, section 4.
pub static ONE_SHOT: Flat = Flat { name: "one-shot", phase: one_shot, in_rank_order: true };

/// Two-shot: everybody reduces its own slice from everybody, then gives it to everybody.
///
/// The choice for all but tiny messages in shared memory: two barriers, and each byte is read and
/// written once.
/// Cost: 2·α + 2(n−1)/n·S·β + (n−1)/n·S·γ, as 2(n−1) messages per rank where run pairwise.
///
/// Source: as [`ONE_SHOT`].
pub static TWO_SHOT: Flat = Flat { name: "two-shot", phase: two_shot, in_rank_order: true };

fn one_shot(group: Group<'_>, range: Range<usize>) -> Steps<'_> {
    let step = (group.len() > 1).then(|| Step {
        pattern: Pattern::OneShot,
        ..reduce_scatter(&group.members, group.me, |_| range.clone())
    });
    Box::new(step.into_iter())
}

fn two_shot(group: Group<'_>, range: Range<usize>) -> Steps<'_> {
    let n = group.len();
    let phases = if n > 1 { 0..2 } else { 0..0 };
    Box::new(phases.map(move |phase| {
        let slice_of = |i| chunk(&range, n, i);
        match phase {
            0 => reduce_scatter(&group.members, group.me, slice_of),
            _ => all_gather(&group.members, group.me, slice_of),
        }
    }))
}

/// Member `i` reduces `slice_of(i)` from all members; nothing in a group of one.
pub(crate) fn reduce_scatter(
    members: &[Rank],
    me: usize,
    slice_of: impl Fn(usize) -> Range<usize>,
) -> Step {
    if members.len() < 2 {
        return Step::default();
    }
    let outgoing =
        others(members, me).map(|(i, to)| Outgoing { to, elements: slice_of(i) }).collect();
    let mut from: Vec<Rank> = others(members, me).map(|(_, rank)| rank).collect();
    from.sort_unstable();
    let mine = Incoming { from, elements: slice_of(me), on_arrival: OnArrival::Reduce };
    Step { pattern: Pattern::ReduceScatter, outgoing, incoming: vec![mine] }
}

/// Member `i` stores `slice_of(i)` at all members; nothing in a group of one.
pub(crate) fn all_gather(
    members: &[Rank],
    me: usize,
    slice_of: impl Fn(usize) -> Range<usize>,
) -> Step {
    if members.len() < 2 {
        return Step::default();
    }
    let store = |(i, rank)| Incoming {
        from: vec![rank],
        elements: slice_of(i),
        on_arrival: OnArrival::Store,
    };
    Step {
        pattern: Pattern::AllGather,
        outgoing: others(members, me)
            .map(|(_, to)| Outgoing { to, elements: slice_of(me) })
            .collect(),
        incoming: others(members, me).map(store).collect(),
    }
}

/// One step of a group: every member gives its elements to all others.
pub(crate) fn exchange(
    shape: &Shape,
    scope: Scope,
    rank: Rank,
    elements_of: impl Fn(Rank) -> Vec<Range<usize>>,
) -> Step {
    let step = Step::new(Pattern::Direct(scope));
    let members = step.members(rank, &shape.topology);
    if members.len() < 2 {
        return Step::default();
    }
    let mine = elements_of(rank);
    members.into_iter().filter(|&other| other != rank).fold(step, |step, other| {
        step.send_all(other, mine.clone()).store_all(other, elements_of(other))
    })
}

/// One step of a group: the member `from` gives every other member its part.
pub(crate) fn fan_out(
    shape: &Shape,
    scope: Scope,
    from: Rank,
    rank: Rank,
    part_of: impl Fn(Rank) -> Range<usize>,
) -> Step {
    let step = Step::new(Pattern::Direct(scope));
    let members = step.members(rank, &shape.topology);
    let others = members.iter().filter(|&&other| other != from);
    match members.len() {
        0 | 1 => Step::default(),
        _ if rank == from => others.fold(step, |step, &to| step.send(to, part_of(to))),
        _ => step.store(from, part_of(rank)),
    }
}

fn others(members: &[Rank], me: usize) -> impl Iterator<Item = (usize, Rank)> {
    members.iter().copied().enumerate().filter(move |(i, _)| *i != me)
}
