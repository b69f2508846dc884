//! All-gather.

use std::ops::Range;

use crate::algorithm::{Algorithm, Group, Plan, Rounds};
use crate::direct::exchange;
use crate::halves::joined;
use crate::lanes::Lanes;
use crate::{Pattern, Rank, Scope, Shape, Step, chunk};

/// Direct: everybody sends its block to everybody at once.
///
/// The choice in shared memory, where everybody copies from everybody, and for small blocks.
/// Cost: α + (n−1)/n·S·β for S bytes in all, as n−1 messages per rank where run pairwise.
pub static DIRECT: Plan = Plan::new("direct", direct, true);

/// Ring: every block goes once around.
///
/// The choice for large blocks: each rank speaks only to its neighbours.
/// Cost: (n−1)·α + (n−1)/n·S·β.
///
/// Source: Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in
/// MPICH", IJHPCA 19(1), 2005, section 4.1.
pub static RING: Plan = Plan::new("ring", ring, true);

/// Bruck: in round t each rank gets what the rank at distance 2^t has.
///
/// The choice for small blocks between nodes. For any number of ranks.
/// Cost: log₂(n)·α + (n−1)/n·S·β; a message joins the blocks that lie side by side.
///
/// Source: Bruck et al., "Efficient algorithms for all-to-all communications in multiport
/// message-passing systems", IEEE TPDS 8(11), 1997, section 4.
pub static DOUBLING: Plan = Plan::new("doubling", doubling, true);

/// Hierarchical: within the nodes, across them by rings, within them again.
///
/// The choice for large blocks on several nodes. As many members as the smallest node has each
/// carry their part of every node's blocks across.
/// Cost: across N nodes (N−1)·α + (N−1)/N·S·β in all; within them two direct steps.
///
/// Source: Träff, "Efficient allgather for regular SMP-clusters", EuroPVM/MPI 2006.
pub static HIERARCHICAL: Plan = Plan::new("hierarchical", hierarchical, true);

/// Hierarchical with Bruck's algorithm across the nodes.
///
/// The choice for small blocks on many nodes.
/// Cost: as [`HIERARCHICAL`], with log₂(N)·α across.
pub static HIERARCHICAL_DOUBLING: Plan =
    Plan::new("hierarchical-doubling", hierarchical_doubling, true);

pub(crate) static ALL: [&dyn Algorithm; 5] =
    [&RING, &DOUBLING, &DIRECT, &HIERARCHICAL, &HIERARCHICAL_DOUBLING];

pub(crate) fn direct(shape: &Shape, rank: Rank) -> Rounds<'_> {
    let block_of = |member| vec![shape.block(member)];
    Box::new(std::iter::once_with(move || exchange(shape, Scope::World, rank, block_of)))
}

pub(crate) fn ring(shape: &Shape, rank: Rank) -> Rounds<'_> {
    let order = shape.topology.by_node();
    around(Group::by_node(shape, rank), Box::new(|i| vec![shape.block(order[i])]))
}

pub(crate) fn doubling(shape: &Shape, rank: Rank) -> Rounds<'_> {
    let order = shape.topology.by_node();
    doubled(Group::by_node(shape, rank), Box::new(|i| vec![shape.block(order[i])]))
}

pub(crate) fn hierarchical(shape: &Shape, rank: Rank) -> Rounds<'_> {
    in_lanes(shape, rank, around)
}

pub(crate) fn hierarchical_doubling(shape: &Shape, rank: Rank) -> Rounds<'_> {
    in_lanes(shape, rank, doubled)
}

/// The elements of each member, by its position.
type BlocksOf<'a> = Box<dyn Fn(usize) -> Vec<Range<usize>> + Send + 'a>;

/// An all-gather among the members of a group.
type Gathering = for<'a> fn(Group<'a>, BlocksOf<'a>) -> Rounds<'a>;

/// All-gathers in the nodes, then in the lanes, then gives what the lanes brought to the nodes.
fn in_lanes(shape: &Shape, rank: Rank, across: Gathering) -> Rounds<'_> {
    let topology = &shape.topology;
    let (nodes, node) = (topology.node_count(), topology.node_of(rank) as usize);
    let lanes = Lanes::new(topology, None);
    // What a lane carries of the blocks of a node.
    let share = move |node: usize, lane: usize| -> Vec<Range<usize>> {
        let blocks = topology.members_of(node).iter().map(|&member| shape.block(member));
        let ranges = joined(blocks).into_iter();
        ranges.map(|range| chunk(&range, lanes.count, lane)).collect()
    };
    let first = move || exchange(shape, Scope::Node, rank, |member| vec![shape.block(member)]);
    let mine = lanes.lane_of(rank);
    let lane = mine.unwrap_or(0);
    let carriers = (0..nodes).map(|node| lanes.carrier(node, lane)).collect();
    let rounds = across(Group { members: carriers, me: node }, Box::new(move |i| share(i, lane)));
    let rounds = rounds.map(move |step| if mine.is_some() { step } else { Step::default() });
    let brought = move |member| {
        let foreign = (0..nodes).filter(|&other| other != node);
        let lane = lanes.lane_of(member);
        foreign.filter_map(|other| Some(share(other, lane?))).flatten().collect()
    };
    let last = move || exchange(shape, Scope::Node, rank, brought);
    Box::new(std::iter::once_with(first).chain(rounds).chain(std::iter::once_with(last)))
}

/// A ring: the blocks of each member go once around the group.
pub(crate) fn around<'a>(group: Group<'a>, blocks_of: BlocksOf<'a>) -> Rounds<'a> {
    let (n, me) = (group.len(), group.me);
    Box::new((0..n - 1).map(move |t| {
        Step::default()
            .send_all(group.at(me + 1), blocks_of((me + n - t) % n))
            .store_all(group.at(me + n - 1), blocks_of((me + n - 1 - t) % n))
    }))
}

/// Bruck's: in each round a member has the blocks of twice as many members that follow it.
fn doubled<'a>(group: Group<'a>, blocks_of: BlocksOf<'a>) -> Rounds<'a> {
    let (n, me) = (group.len(), group.me);
    let rounds = 0..n.next_power_of_two().trailing_zeros();
    Box::new(rounds.map(move |t| {
        let distance = 1 << t;
        // The last round may need fewer than there are.
        let from = |first: usize| {
            let run = first..first + distance.min(n - distance);
            joined(run.flat_map(|position| blocks_of(position % n)))
        };
        Step::new(Pattern::Wall)
            .send_all(group.at(me + n - distance), from(me))
            .store_all(group.at(me + distance), from(me + distance))
    }))
}
