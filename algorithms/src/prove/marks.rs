//! Whether the marks of steps tell the truth about their groups.

use std::ops::Range;

use super::{Fault, overlap, ranges};
use crate::{Incoming, OnArrival, Pattern, Rank, Step, Topology};

/// Checks every marked step against those of its group, and that ranks keep to the slices they own.
pub(super) fn check(plans: &[Vec<Step>], topology: &Topology) -> Result<(), Fault> {
    for (rank, plan) in plans.iter().enumerate() {
        let mut owned = Vec::new();
        for (round, step) in plan.iter().enumerate() {
            let pattern = step.pattern;
            let fault = |why| Fault::Mark { rank, round, pattern, why };
            check_group(plans, topology, rank, round).map_err(fault)?;
            check_ownership(&mut owned, topology, rank, step).map_err(fault)?;
        }
    }
    Ok(())
}

/// The members of a scatter that is not gathered yet, and the slice it left this rank.
type Scattered = (Vec<Rank>, Range<usize>);

/// Between a scatter and its gather a rank touches only its own slice; scatters nest.
fn check_ownership(
    owned: &mut Vec<Scattered>,
    topology: &Topology,
    rank: Rank,
    step: &Step,
) -> Result<(), &'static str> {
    if step.pattern == Pattern::AllGather
        && let Some((members, slice)) = owned.pop()
        && (members != step.members(rank, topology) || step.outgoing[0].elements != slice)
    {
        return Err("it gathers other slices than were scattered");
    }
    if let Some((_, slice)) = owned.last() {
        let within =
            |e: &Range<usize>| e.is_empty() || (slice.start <= e.start && e.end <= slice.end);
        if !ranges(step).all(within) {
            return Err("it touches another member's slice");
        }
    }
    if step.pattern == Pattern::ReduceScatter {
        owned.push((step.members(rank, topology), step.incoming[0].elements.clone()));
    }
    Ok(())
}

/// All members run the same pattern in this round with the same group, and the ranges fit it.
fn check_group(
    plans: &[Vec<Step>],
    topology: &Topology,
    rank: Rank,
    round: usize,
) -> Result<(), &'static str> {
    let step = &plans[rank][round];
    match step.pattern {
        Pattern::Pairs => return Ok(()),
        Pattern::Wall => return check_wall(plans, round),
        Pattern::Direct(_) => return check_direct(plans, topology, rank, round),
        Pattern::OneShot | Pattern::ReduceScatter | Pattern::AllGather => {}
    }
    let members = step.members(rank, topology);
    if members.len() < 2 || !members.is_sorted_by(|a, b| a < b) {
        return Err("its receivers are not a group");
    }
    let Some(mine) = contribution(step) else {
        return Err("its ranges are not those of the pattern");
    };
    for &other in members.iter().filter(|&&member| member != rank) {
        let Some(theirs) = plans[other].get(round).filter(|theirs| theirs.pattern == step.pattern)
        else {
            return Err("a member runs another pattern");
        };
        // Equal groups are transitive, so comparing with the first member's is enough.
        if members[0] == other.min(rank) && theirs.members(other, topology) != members {
            return Err("a member has another group");
        }
        let Some(their_range) = contribution(theirs) else {
            return Err("a member's ranges are not those of the pattern");
        };
        if !agrees(step, &mine, other, &their_range) {
            return Err("members disagree about a range or share elements");
        }
    }
    Ok(())
}

/// Everybody who does something in this round has the mark.
fn check_wall(plans: &[Vec<Step>], round: usize) -> Result<(), &'static str> {
    let apart = |step: &Step| step.pattern != Pattern::Wall && !step.is_empty();
    if plans.iter().filter_map(|plan| plan.get(round)).any(apart) {
        return Err("another rank has work without the mark");
    }
    Ok(())
}

/// All members of the scope have the mark, transfers stay among them, and nobody receives into what
/// is read.
fn check_direct(
    plans: &[Vec<Step>],
    topology: &Topology,
    rank: Rank,
    round: usize,
) -> Result<(), &'static str> {
    let step = &plans[rank][round];
    let members = step.members(rank, topology);
    if members.len() < 2 {
        return Err("its scope has no other rank");
    }
    let marked = |member: Rank| {
        plans[member].get(round).is_some_and(|theirs| theirs.pattern == step.pattern)
    };
    if !members.iter().all(|&member| marked(member)) {
        return Err("a member runs another pattern");
    }
    let sources = step.incoming.iter().flat_map(|i| &i.from);
    let mut partners = step.outgoing.iter().map(|o| &o.to).chain(sources);
    if !partners.all(|partner| members.contains(partner)) {
        return Err("a transfer leaves the group");
    }
    let is_read = |i: &Incoming| step.outgoing.iter().any(|o| overlap(&o.elements, &i.elements));
    if step.incoming.iter().any(is_read) {
        return Err("it receives into what others read");
    }
    Ok(())
}

/// The range that is this rank's own in its marked step: the one it reduces, or the one it gives to
/// all.
fn contribution(step: &Step) -> Option<Range<usize>> {
    match step.pattern {
        Pattern::Pairs | Pattern::Wall | Pattern::Direct(_) => None,
        Pattern::OneShot | Pattern::ReduceScatter => match &step.incoming[..] {
            [Incoming { from, elements, on_arrival: OnArrival::Reduce }]
                if from.len() == step.outgoing.len() =>
            {
                Some(elements.clone())
            }
            _ => None,
        },
        Pattern::AllGather => {
            let mine = step.outgoing.first()?.elements.clone();
            let same = step.outgoing.iter().all(|o| o.elements == mine);
            (same && step.incoming.len() == step.outgoing.len()).then_some(mine)
        }
    }
}

/// Whether this rank's step says about `other` what `other`'s own range says.
fn agrees(step: &Step, mine: &Range<usize>, other: Rank, theirs: &Range<usize>) -> bool {
    let sent = step.outgoing.iter().find(|o| o.to == other).map(|o| &o.elements);
    let arrival = step.incoming.iter().find(|i| i.from.contains(&other));
    let Some(Incoming { elements, on_arrival, .. }) = arrival else {
        return false;
    };
    match step.pattern {
        Pattern::Pairs | Pattern::Wall | Pattern::Direct(_) => true,
        Pattern::OneShot => mine == theirs && sent == Some(mine),
        Pattern::ReduceScatter => sent == Some(theirs) && !overlap(mine, theirs),
        Pattern::AllGather => {
            elements == theirs && *on_arrival == OnArrival::Store && !overlap(mine, theirs)
        }
    }
}
